"""The bench of training runs, and compares what it says it compares."""

import logging
import warnings
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from tools import bench_bases, bench_training


@pytest.fixture(autouse=True)
def loud_again() -> Iterator[None]:
    """A bench silences the process it runs in."""
    with warnings.catch_warnings():
        yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("what", ["step", "run", "memory"])
def test_the_bench_prints_its_table(what: str, capfd: pytest.CaptureFixture[str]) -> None:
    bench_training.main([what, "--quick"])
    printed = capfd.readouterr().out
    names = ["bare steps", "whole run"]
    if what != "run":
        names = ["frozen + AdamW", "ETHER", "ETHER+", "PEFT LoRA r=4"]
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")]
    assert rows[1:] == names


def test_the_bench_of_bases_prints_a_table_of_each_way(capfd: pytest.CaptureFixture[str]) -> None:
    bench_bases.main(["--quick"])
    printed = capfd.readouterr().out
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")]
    methods = ["frozen", "ETHER", "ETHER+", "PEFT LoRA r=4"]
    for name in ("Flux2Klein", "SDXL"):
        title = f"{name}, 64 px, float32"
        at = rows.index(title)
        assert rows[at : at + 10] == [title, *methods, f"{title}, checkpointed", *methods]
        is_there = find_spec("bitsandbytes") is not None
        assert is_there == (f"{title}, nf4" in rows)
        assert is_there != (f"{title}, nf4: left out, bitsandbytes is not installed" in printed)
