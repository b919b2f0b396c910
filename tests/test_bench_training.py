"""The bench of training runs, and compares what it says it compares."""

import logging
import warnings
from collections.abc import Iterator

import pytest

from tools import bench_training


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
