"""Lists of jobs and of learning rates by the command, their bad inputs, and Ray."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import photo_files
import pytest
from flag_runs import MEASURED, PLAIN, Outcome, World, made_world
from test_jobs import assert_learned_the_same, jobs
from training_runs import contents, log_of

from ether_diffusion.scripts.train_dreambooth import main, parse_flags, read_call
from ether_diffusion.strict_json import Json
from ether_diffusion.training.jobs import train_jobs
from ether_diffusion.training.run import train_dreambooth
from ether_diffusion.training.run_lock import read_holder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with made_world(tmp_path_factory.mktemp("world")) as made:
        yield made


def words(world: World, flags: dict[str, Json]) -> list[str]:
    """Return flags as words of a command line, a list's values one after the other."""
    placed = {name: world.place(value) for name, value in (PLAIN | flags).items() if value is not None}
    found = list[str]()
    for name, value in placed.items():
        values = value if isinstance(value, list) else [value]
        found += [f"--no-{name}"] if value is False else [f"--{name}"]
        found += [str(each) for each in values if not isinstance(each, bool)]
    return found


def test_a_list_of_jobs_is_trained_whose_options_outrank_flags(world: World, tmp_path: Path) -> None:
    text = f"- output_dir: {tmp_path}/one\n- output_dir: {tmp_path}/two\n  learning_rate: 3e-3\n  seed: 1\n"
    (tmp_path / "jobs.yaml").write_text(text)
    flags: dict[str, Json] = {"jobs": str(tmp_path / "jobs.yaml"), "learning_rate": 1e-2, "output_dir": None}
    assert main(words(world, flags)) == 0
    one, two = (Outcome(tmp_path / name, "") for name in ("one", "two"))
    assert [each.rates for each in (one, two)] == [[round(1e-2 / 6e-3, 6)] * 3, [0.5] * 3]
    assert one.trained != two.trained
    assert main(words(world, flags)) == 0  # there is nothing left to learn


BAD = [
    ("", "is no list of runs; begin each with '- '"),
    ("output_dir: run", "is no list of runs; begin each with '- '"),
    ("- run\n- other", "job 1 of the list of jobs ", "is not a mapping of names to values"),
    ("- seed: 1", "job 1 of ", " has no output_dir; give it one of its own"),
    (
        "- {output_dir: a}\n- {output_dir: b, sed: 1}",
        "job 2 of ",
        "'sed' is not an option; did you mean seed",
    ),
    (
        "- {output_dir: a, rank: 0}\n- {output_dir: b, seed: x}",
        "job 1 of ",
        "rank=0",
        "job 2 of ",
        "seed='x'",
    ),
    ("- {output_dir: a}\n- {output_dir: a}", "'a' is the output_dir of one job and a folder of another"),
    ("- {output_dir: a, dry_run: true}", "dry_run in job 1 of ", "is about one call; give it as a flag"),
    (
        "- output_dir: a\n  data:\n    seed: 1",
        "has nested values in line 3; give each option by its own",
    ),
    ("- {output_dir: a, learning_rate: [1e-3, 1e-3]}", "learning_rate=[0.001, 0.001] names one twice"),
    ("- {output_dir: a, learning_rate: [1e-3, fast]}", "learning_rate='fast' does not fit; use a number"),
    ("- {output_dir: a}\n" * 1001, "has 1001 entries; at most 1000 are read"),
]


@pytest.mark.parametrize(("text", "said"), [(text, said) for text, *said in BAD], ids=range(len(BAD)))
def test_a_bad_list_is_refused_in_a_sentence(
    world: World, tmp_path: Path, text: str, said: list[str], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs.yaml").write_text(text)
    before = photo_files.snapshot(tmp_path)
    assert main(words(world, {"jobs": "jobs.yaml", "output_dir": None})) == 2
    found = capsys.readouterr().err
    assert [part for part in said if part not in found] == []
    assert "Traceback" not in found
    assert photo_files.snapshot(tmp_path) == before


def test_what_is_of_one_run_is_refused_beside_a_list(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "jobs.json").write_text(json.dumps([{"output_dir": "a"}, {"output_dir": "b"}]))
    refused: tuple[tuple[dict[str, Json], str], ...] = (
        ({"jobs": str(tmp_path / "jobs.json"), "dry_run": True}, "dry_run is of one run; leave jobs out"),
        ({"learning_rate": [1e-3, 1e-2], "dry_run": True}, "dry_run is of one run"),
        ({"ray": True}, "ray spreads jobs over machines; give a list of them as jobs"),
        ({"keep": "best"}, "keep=best needs to know what is best; give eval_steps, e.g. 50"),
        ({"jobs": str(tmp_path / "none.yaml")}, "none.yaml does not exist; check the path"),
    )
    for flags, said in refused:
        assert main(words(world, {"output_dir": str(tmp_path / "run"), **flags})) == 2
        assert said in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["jobs.json"]


def test_one_learning_rate_is_one_run_and_several_are_runs_in_folders_of_it() -> None:
    one, many, default = (
        read_call(parse_flags(["--instance_data_dir", "photos", "--instance_prompt", "x", *rates]))
        for rates in (
            ("--learning_rate", "3e-3"),
            ("--learning_rate", "3e-3", "1e-2", "--output_dir", "fox"),
            ("--learning_rate", "none"),
        )
    )
    assert (one.is_list, one.config.learning_rate) == (False, 3e-3)
    assert default.config.optimization.learning_rate is None
    folders = {str(each.output.output_dir): each.learning_rate for each in many.configs}
    assert folders == {"fox/learning_rate-0.003": 3e-3, "fox/learning_rate-0.01": 1e-2}
    assert many.spread == {Path("fox"): many.configs}


def test_the_best_of_several_learning_rates_is_kept(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "fox"
    flags: dict[str, Json] = {
        "learning_rate": [1e-4, 1.0, 1e30],
        "adapter": "lora",
        "output_dir": str(folder),
    }
    flags |= MEASURED | {"keep": "best", "eval_prompt": ["a sks cat"]}
    assert main(words(world, flags)) == 0
    told = json.loads((folder / "learning_rates.json").read_bytes())
    fidelity = {each["folder"]: each["best"]["fidelity"]["mean"] for each in told["learning_rates"]}
    assert fidelity.keys() == {"learning_rate-0.0001", "learning_rate-1"}  # the third is not finite
    kept = folder / told["kept"]
    assert fidelity[kept.name] == max(fidelity.values())
    mine = {name: data for name, data in contents(folder).items() if not name.startswith("learning_rate")}
    theirs = contents(kept)
    assert mine == {name: theirs[name] for name in mine}
    assert mine.keys() >= {"adapter_config.json", "adapter_model.safetensors", "README.md", "evaluation.json"}
    assert mine["adapter_model.safetensors"] == theirs["best/adapter_model.safetensors"]
    before = contents(folder)
    assert main(words(world, flags)) == 0
    assert contents(folder).keys() == before.keys()
    (folder / "learning_rates.json").unlink()
    assert main(words(world, flags)) == 2
    assert "which belong to no comparison of learning rates" in capsys.readouterr().err
    strict: dict[str, Json] = {
        **flags,
        "eval_max_drift": 1e-9,
        "learning_rate": [0.5, 1.0],
        "output_dir": str(tmp_path / "cat"),
    }
    assert main(words(world, strict)) == 2
    assert "no learning rate kept to the bounds on drift" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_spreads_jobs_and_one_whose_worker_is_killed_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason='Ray is not installed: pip install "ether-diffusion[ray]"')
    import ray

    of: list[dict[str, Json]] = [
        {"max_train_steps": 20},
        {"adapter": "lora"},
        {"learning_rate": 1e30, "adapter": "lora"},
    ]
    spread, alone = (jobs(tmp_path, place, of, checkpointing_steps=1) for place in ("spread", "alone"))
    folder = spread[0].output.output_dir

    def kill() -> None:
        while not (folder / "checkpoint-3").exists():
            time.sleep(0.01)
        holder = read_holder(folder / ".lock")
        assert holder is not None
        os.kill(holder.pid, signal.SIGKILL)
        killed.append(holder.pid)

    killed, killer = list[int](), threading.Thread(target=kill, daemon=True)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    killer.start()
    try:
        with pytest.raises(ValueError, match=r"1 of 3 jobs .*\n.*/2: the .* is not finite"):
            train_jobs(spread, ray=True)
    finally:
        ray.shutdown()
    assert killed
    for one, other in zip(spread[:2], alone, strict=False):
        assert train_dreambooth(other) == 0
        assert_learned_the_same(one.output.output_dir, other.output.output_dir)
    assert len(log_of(folder)) == 20
