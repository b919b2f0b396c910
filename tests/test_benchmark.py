"""`ether benchmark`: the data set's own prompts, runs that go on after a kill, and the paper's table."""

import fcntl
import io
import json
import math
import os
import re
import shutil
import signal
import statistics
import threading
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_models import save_clip, save_dino
from flag_runs import write_drawing_base
from forked_runs import exit_code, fork
from PIL import Image
from training_runs import write_photos

from ether_diffusion.bases import open_base
from ether_diffusion.benchmark.plan import (
    BASE,
    PAPER_TRAINING,
    TINY_SUBJECTS,
    TINY_TRAINING,
    BenchmarkSettings,
    labels_of,
    method_of,
    plan_benchmark,
    read_dreambooth,
    tiny_subjects,
)
from ether_diffusion.benchmark.results import draw_front, shown, summarise, table
from ether_diffusion.benchmark.runs import trained_together, training_config
from ether_diffusion.metrics.encoders import load_encoder
from ether_diffusion.metrics.scores import other_tiny_prompts
from ether_diffusion.pipelines.metadata import fingerprint_of
from ether_diffusion.scripts import ether
from ether_diffusion.tiny_world.concepts import find_concept, subject_concepts, trained_concepts
from ether_diffusion.tiny_world.networks import OUTSIDE_PACKAGES
from ether_diffusion.tiny_world.subjects import photos_of, unseen_prompts, validation_prompts
from ether_diffusion.training.config import AdapterConfig
from ether_diffusion.training.run_lock import LOCK_NAME, Holder, locked

PROMPTS_AND_CLASSES = """Classes

subject_name,class
red_vase,vase
bear,stuffed animal
cat2,cat

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a red {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} wearing a red hat'.format(unique_token, class_token),
]
"""
"""In the form of the file of github.com/google/dreambooth."""

TRAINED = ["--train", "max_train_steps=2", "train_batch_size=1", "checkpointing_steps=1"]
DRAWN = ["--num_images", "1", "--inference_steps", "1"]
QUICK = [*TRAINED, *DRAWN]
TWO_METHODS = ["--methods", "full", "ether_plus", "--subjects", "fox", *QUICK]


def dreambooth(folder: Path, *subjects: str) -> Path:
    for number, subject in enumerate(subjects):
        write_photos(folder / subject, count=2, seed=number)
        for caption in (folder / subject).glob("*.txt"):
            caption.unlink()
    folder.mkdir(exist_ok=True)
    (folder / "prompts_and_classes.txt").write_text(PROMPTS_AND_CLASSES)
    return folder


def benchmark(folder: Path, *arguments: str) -> int:
    small = [] if {"--base", "--merge"} & {*arguments} else ["--base", "tiny_world"]
    return ether.main(["benchmark", "--output_dir", str(folder), *small, *arguments])


def results(folder: Path) -> dict[str, Any]:
    """Return the scores of all runs by their folders."""
    return {
        str(file.parent.relative_to(folder)): json.loads(file.read_text())["scores"]
        for file in sorted(folder.glob("runs/*/*/result.json"))
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark of two methods and the base, of two steps each."""
    folder = tmp_path_factory.mktemp("done")
    assert benchmark(folder, *TWO_METHODS) == 0
    return folder


def test_prompts_and_classes_are_those_of_the_data_set(tmp_path: Path) -> None:
    vase, cat = read_dreambooth(dreambooth(tmp_path / "data", "red_vase", "cat2"), ["red_vase", "cat2"])
    assert vase.prompts == ("a qwe vase in the jungle", "a red qwe vase")
    assert (vase.instance_prompt, vase.class_prompt) == ("a photo of qwe vase", "a photo of vase")
    assert cat.prompts == ("a qwe cat wearing a red hat",)
    assert [each.name for each in read_dreambooth(tmp_path / "data")] == ["cat2", "red_vase"]


def test_a_folder_that_is_no_data_set_gets_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no .*prompts_and_classes\.txt; give the folder"):
        read_dreambooth(tmp_path)
    data = dreambooth(tmp_path / "data", "red_vase", "unknown")
    (data / "bear").mkdir()
    with pytest.raises(
        ValueError, match=r"dog has no folder.*unknown has no class.*no usable photos in .*bear"
    ):
        read_dreambooth(data, ["dog", "unknown", "bear"])
    (data / "prompts_and_classes.txt").write_text("nothing")
    with pytest.raises(ValueError, match="lacks classes or prompts"):
        read_dreambooth(data)
    (data / "prompts_and_classes.txt").write_text(PROMPTS_AND_CLASSES.replace("{0} {1} in", "{0} in"))
    with pytest.raises(ValueError, match=r"'?a \{0\} in the jungle'? does not hold"):
        read_dreambooth(data)


def test_the_forms_are_the_papers_setting_and_subjects_that_the_base_never_saw() -> None:
    assert len(set(TINY_SUBJECTS)) == 24
    assert set(TINY_SUBJECTS) <= {concept.name for concept in subject_concepts()}
    assert not set(TINY_SUBJECTS) & {concept.name for concept in trained_concepts(2)}
    settings = BenchmarkSettings("sd", PAPER_TRAINING)
    assert (settings.num_images, PAPER_TRAINING["num_class_images"]) == (4, 200)
    assert (settings.learning_rate("ether_plus"), settings.learning_rate("full")) == (6e-3, 5e-6)
    blocks = {name: AdapterConfig(adapter=name).blocks for name in ("ether", "ether_plus", "oft")}
    assert (blocks, AdapterConfig().rank) == ({"ether": 4, "ether_plus": 1, "oft": 4}, 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--methods lokr", "lokr is no method"),
        ("--methods lora:rank", "the method lora:rank takes NAME=VALUE; found 'rank'"),
        ("--methods lora:ranks=2", "ranks"),
        ("--methods lora:", "the method lora: takes NAME=VALUE; found ''"),
        ("--methods lora:rank=2,rank=8", "says rank twice"),
        ("--methods lora:learning_rate=-1", "learning_rate=-1"),
        ("--methods lora:output_dir=there", "cannot say output_dir, which the benchmark itself says"),
        ("--methods lora lora:rank=4", "lora and lora:rank=4 would both be LoRA r=4; leave one of them out"),
        ("--methods ether:target_modules=.*q ether:target_modules=.+q", "both be ether_target_modules_._q"),
        ("--train seed=5", "--train cannot say seed"),
        ("--seeds 9223372036854775807", "--seeds are from 0 to 9223372036853; found 9223372036854775807"),
        ("--encoder nothing", "nothing"),
        ("--train steps=5", "steps"),
        ("--train max_train_steps=0", "max_train_steps=0"),
        ("--num_images 0", "num_images must be from 1"),
        ("--num_processes 0", "--num_processes is from 1; found 0"),
        ("--subjects nothing", "no concept is named 'nothing'"),
        (
            "--base elsewhere",
            "the short form is of tiny_world, tiny_world_2, tiny_world_flow; give",
        ),
        ("--data nowhere", "prompts_and_classes.txt"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, words: str
) -> None:
    assert benchmark(tmp_path / "out", *arguments.split()) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith("ether benchmark: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_plan_of_a_data_set_is_said_and_nothing_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = dreambooth(tmp_path / "data", "red_vase", "cat2")
    assert benchmark(tmp_path / "out", "--data", str(data), "--base", "sd", "--plan") == 0
    said = capsys.readouterr().out
    assert "16 runs, 0 of them done: (7 methods and the base alone) × 2 subjects × 1 seeds, on sd" in said
    assert "max_train_steps=1200" in said
    assert "ETHER+: learning rate 0.006" in said
    assert "cat2: a photo of qwe cat; a qwe cat wearing a red hat" in said
    assert not (tmp_path / "out").exists()


def test_the_runs_compare_all_methods_subject_by_subject(tmp_path: Path) -> None:
    subjects = read_dreambooth(dreambooth(tmp_path / "data", "red_vase", "cat2"))
    runs = plan_benchmark(["ether", "lora", "ether"], subjects, [0, 1, 0])
    assert len(runs) == len(set(runs)) == 3 * 2 * 2
    assert [run.method for run in runs[:3]] == [BASE, "ether", "lora"]
    assert len({run.subject.name for run in runs[:3]}) == 1


def test_killed_anywhere_and_shared_by_two_processes_the_scores_are_the_same(
    done: Path, tmp_path: Path
) -> None:
    whole, root = results(done), tmp_path / "killed"
    assert set(whole) == {f"runs/{method}/fox_0" for method in ("base", "full", "ether_plus")}
    run = root / "runs" / "full" / "fox_0"
    child, limit = fork(lambda: benchmark(root, *TWO_METHODS)), time.monotonic() + 100
    while not (run / "adapter/checkpoint-1").exists():
        assert time.monotonic() < limit
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert exit_code(child) == -signal.SIGKILL
    assert not (run / "result.json").exists()
    base = root / "runs" / "base" / "fox_0" / "result.json"
    before = base.stat().st_mtime_ns
    assert benchmark(root, *TWO_METHODS, "--num_processes", "2") == 0
    assert results(root) == whole
    assert base.stat().st_mtime_ns == before
    assert not list(root.rglob("adapter_model.safetensors"))

    found = json.loads((root / "benchmark.json").read_text())
    assert found["num_done"] == found["num_runs"] == 3
    full, plus = found["methods"]["full"], found["methods"]["ether_plus"]
    assert full["parameters"] > 10 * plus["parameters"] > 0
    outside = {"outside"} if all(map(find_spec, OUTSIDE_PACKAGES)) else set[str]()
    assert set(plus["scores"]) == {"object", "tiny_i", "tiny_t", "recognised", "drift"} | outside
    with Image.open(root / "sheet.png") as sheet:
        assert sheet.format == "PNG"


def test_a_training_that_was_stopped_has_the_exit_code_of_its_signal(tmp_path: Path) -> None:
    flags = [
        "--methods",
        "ether",
        "--subjects",
        "fox",
        *DRAWN,
        *TRAINED[:1],
        "max_train_steps=10000",
        *TRAINED[2:],
    ]
    child, limit = fork(lambda: benchmark(tmp_path, *flags)), time.monotonic() + 100
    while not list(tmp_path.glob("runs/ether/fox_0/adapter/checkpoint-*")):
        assert time.monotonic() < limit
        time.sleep(0.01)
    os.kill(child, signal.SIGTERM)
    assert exit_code(child) == 143


def test_a_benchmark_that_waits_for_others_says_once_for_whom_and_then_ends(
    done: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = done / "runs" / "full" / "fox_0"
    (run / "result.json").rename(tmp_path / "result.json")
    (run / LOCK_NAME).write_text(json.dumps(asdict(Holder(7, "elsewhere", "then", "Monday"))))
    with (run / LOCK_NAME).open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as a process of another host holds it
        threading.Timer(3, lambda: (tmp_path / "result.json").rename(run / "result.json")).start()
        assert benchmark(done, *TWO_METHODS) == 0
    assert caplog.text.count(f"{run} is in use by process 7 on elsewhere since Monday") == 1


def test_a_folder_of_other_settings_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text, words in (
        ("notes.txt", "", "holds notes.txt, which belong to no benchmark"),
        ("plan.json", '{"base": "sd"}', "holds a benchmark with other settings (base, "),
    ):
        (tmp_path / name).write_text(text)
        assert benchmark(tmp_path, *QUICK) == 2
        assert words in capsys.readouterr().err


def test_a_folder_goes_on_with_its_own_base_and_data_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def go_on(data: str, base: str) -> int:
        given = [
            "--data",
            str(tmp_path / data),
            "--base",
            str(tmp_path / base / "model"),
            "--encoder",
            "tiny_world",
        ]
        flags = [
            "--methods",
            "ether",
            "--subjects",
            "bear",
            "--train",
            "prior_preservation=none",
            *TRAINED[1:],
        ]
        return benchmark(tmp_path / "out", *given, *flags, *DRAWN)

    for name in ("one", "two"):
        dreambooth(tmp_path / f"data {name}", "bear")
        write_drawing_base(tmp_path / f"base {name}" / "model")
    assert go_on("data one", "base one") == 0
    for data, base in (("data two", "base one"), ("data one", "base two")):
        assert go_on(data, base) == 2
        assert "holds a benchmark with other settings (places)" in capsys.readouterr().err


def test_rows_that_were_done_before_stay_in_the_results(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path / "again")
    before = json.loads((done / "benchmark.json").read_text())
    assert benchmark(tmp_path / "again", "--methods", "ether_plus", *TWO_METHODS[3:]) == 0
    after = json.loads((tmp_path / "again" / "benchmark.json").read_text())
    assert after["methods"] == before["methods"]
    assert after["num_done"] == after["num_runs"] == before["num_runs"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "hra"}, "is of method hra; move it away, and the run is done again"),
        ({"seed": 3}, "is of seed 3; move it away"),
        ({"scores": {"object": "x"}}, r"result\.json: scores"),
        ({"parameters": -5}, r"result\.json: parameters"),
    ],
)
def test_the_result_of_another_run_is_refused(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], words: str
) -> None:
    shutil.copytree(done, tmp_path / "again")
    file = tmp_path / "again" / "runs" / "full" / "fox_0" / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert benchmark(tmp_path / "again", *TWO_METHODS) == 2
    error = capsys.readouterr().err
    assert re.search(words, error), error
    assert error.count("\n") == 1


def test_a_method_that_draws_nothing_is_counted_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["lora:learning_rate=1e6", "ether"]
    assert benchmark(tmp_path, "--methods", *rows, "--subjects", "fox", *QUICK) == 0
    assert "LoRA r=4 (1 diverged)" in capsys.readouterr().out
    found = json.loads((tmp_path / "benchmark.json").read_text())["methods"]
    assert (found[rows[0]]["scores"], found[rows[0]]["num_diverged"]) == ({}, 1)
    assert found["ether"]["scores"]["object"]["num_values"] == 1


def test_drift_and_diversity_stand_beside_likeness(tmp_path: Path) -> None:
    rows = ["lora:learning_rate=1e-12", "ether"]  # the first learns nothing: LoRA begins with the base
    twice = [*TRAINED, "--num_images", "2", "--inference_steps", "1"]
    assert benchmark(tmp_path, "--methods", *rows, "--subjects", "fox", *twice) == 0
    found = json.loads((tmp_path / "benchmark.json").read_text())["methods"]
    assert found[rows[0]]["scores"]["drift"]["mean"] == pytest.approx(0, abs=1e-4)
    assert found["ether"]["scores"]["drift"]["mean"] > 1e-3
    assert "drift" not in found["base"]["scores"]
    pictures = [Image.open(file) for file in sorted(tmp_path.glob("runs/ether/fox_0/pictures/*.png"))]
    vectors = load_encoder("tiny_world").view(pictures).subjects.unflatten(0, (-1, 2))  # two of each prompt
    apart = 1 - (vectors[:, 0] * vectors[:, 1]).sum(1)
    assert found["ether"]["scores"]["diversity"]["mean"] == pytest.approx(float(apart.mean()), abs=1e-5)


def test_one_process_at_a_time_draws_what_the_base_makes_of_other_prompts(tmp_path: Path) -> None:
    row, subject = ["--methods", "lora"], ["--subjects", "fox", *QUICK]
    assert benchmark(tmp_path, *row, *subject) == 0
    others, limit = tmp_path / "other_pictures", time.monotonic() + 100
    drawn = {file.name: file.read_bytes() for file in (others / "0").iterdir()}
    assert len(drawn) == len(other_tiny_prompts())
    shutil.rmtree(others / "0")
    with locked(others):
        child = fork(lambda: benchmark(tmp_path, *row, "ether", *subject))
        while not list(tmp_path.glob("runs/ether/fox_0/pictures/*.png")):
            assert time.monotonic() < limit
            time.sleep(0.01)
        time.sleep(1)
        assert not (others / "0").exists()
    assert exit_code(child) == 0
    assert {file.name: file.read_bytes() for file in (others / "0").iterdir()} == drawn


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_photographs_and_a_base_of_ones_own_give_the_papers_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # no AlexNet
    write_drawing_base(tmp_path / "base")
    data = dreambooth(tmp_path / "data", "red_vase", "cat2")
    flags = ["--data", str(data), "--base", str(tmp_path / "base")]
    flags += ["--encoder", str(save_dino(tmp_path / "dino")), "--encoder", str(save_clip(tmp_path / "clip"))]
    flags += ["--methods", "ether_plus", *DRAWN, *TRAINED, "num_class_images=2", "num_blocks=2"]
    assert benchmark(tmp_path / "out", *flags) == 0
    found = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    row = found["methods"]["ether_plus"]["scores"]
    assert list(row) == ["dino", "clip_i", "clip_t", "drift"]
    assert all(each["num_groups"] == 2 and each["standard_error"] is not None for each in row.values())
    assert list(found["methods"]["real"]["scores"]) == ["dino", "clip_i"]
    assert "DINO ↑" in capsys.readouterr().out
    assert len(list((tmp_path / "out" / "class_images" / "vase").glob("*.png"))) == 2


def test_means_and_errors_are_over_subjects(tmp_path: Path) -> None:
    values = {"bear": 0.2, "cat2": 0.5, "red_vase": 0.9}
    runs = plan_benchmark(["lora"], read_dreambooth(dreambooth(tmp_path / "data", *values)), [0])
    for run in runs:
        result = {"method": run.method, "subject": run.subject.name, "seed": run.seed}
        found: dict[str, Any] = {"scores": {"dino": values[run.subject.name]}}
        if run is runs[-1]:
            found = {"scores": {}, "diverged": "the loss is nan"}
        run.folder(tmp_path).mkdir(parents=True, exist_ok=True)
        (run.folder(tmp_path) / "result.json").write_text(json.dumps(result | found))
    summary = summarise(runs, tmp_path, BenchmarkSettings("tiny_world", TINY_TRAINING), form="short")
    base, lora = summary["methods"][BASE]["scores"]["dino"], summary["methods"]["lora"]
    assert base["mean"] == pytest.approx(statistics.mean(values.values()))
    assert base["standard_error"] == pytest.approx(statistics.stdev(values.values()) / math.sqrt(3))
    assert (lora["num_runs"], lora["num_diverged"], lora["scores"]["dino"]["num_values"]) == (3, 1, 2)
    assert "LoRA r=4 (1 diverged)" in shown(summary)
    assert len({len(line) for line in table(summary)}) == 1


@pytest.fixture(scope="module")
def owl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same benchmark of another subject, as another machine would do it."""
    folder = tmp_path_factory.mktemp("owl")
    assert benchmark(folder, *TWO_METHODS[:4], "owl", *QUICK) == 0
    return folder


def merged(output: Path, *folders: Path) -> int:
    return benchmark(output, "--merge", *map(str, folders))


def test_results_of_several_machines_are_those_of_one_that_did_it_all(
    done: Path, owl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(done, tmp_path / "one")
    shutil.copytree(owl / "runs", tmp_path / "one" / "runs", dirs_exist_ok=True)
    assert benchmark(tmp_path / "one", *TWO_METHODS[:5], "owl", *QUICK) == 0
    expected, said = (tmp_path / "one" / "benchmark.json").read_text(), capsys.readouterr().out
    assert merged(tmp_path / "all", done, owl / "benchmark.json") == 0
    found = json.loads((tmp_path / "all" / "benchmark.json").read_text())
    assert found == json.loads(expected)
    assert capsys.readouterr().out.splitlines()[:-1] == said.splitlines()[:-1]
    assert next(iter(found["differences"]["to_best"].values()))["num_subjects"] == 2
    assert (tmp_path / "all/front.png").read_bytes() == (tmp_path / "one/front.png").read_bytes()


def test_the_base_that_each_machine_drew_counts_once(done: Path, tmp_path: Path) -> None:
    assert benchmark(tmp_path / "lora", "--methods", "lora", "--subjects", "fox", *QUICK) == 0
    assert merged(tmp_path / "all", tmp_path / "lora", done) == 0
    found = json.loads((tmp_path / "all" / "benchmark.json").read_text())
    assert found["num_done"] == found["num_runs"] == len(found["runs"]) == 4
    assert list(found["methods"]) == ["real", BASE, "lora", "full", "ether_plus"]
    base = [run for run in found["runs"] if run["method"] == BASE]
    assert [run["base_fingerprint"] for run in base] == [fingerprint_of(tiny_world_unet())]


def tiny_world_unet() -> Any:
    return open_base("tiny_world").load_unchecked_pipeline(torch.float32).unet


def changed(found: dict[str, Any], change: str) -> None:
    """Let results be of a run, settings or a score that do not go with those of `done`."""
    base = next(run for run in found["runs"] if run["method"] == BASE)
    match change:
        case "base":
            found["settings"]["base"] = "sd"
        case "training":
            found["settings"]["training"]["max_train_steps"] = 3
        case "encoders":
            found["settings"]["encoders"] = ["dino"]
        case "scores":
            for run in found["runs"]:
                run["scores"]["dino"] = 0.5
        case "weights":
            base["base_fingerprint"] = "else"
        case "prompts":
            found["num_prompts"] = 3
        case "form":
            found["form"] = "paper"
        case "rate":
            for run in found["runs"]:
                run["learning_rate"] = 7.0
        case "base's score":
            base["scores"]["object"] += 0.1
            base["subject"] = "fox"
            found["subjects"] = ["fox", "owl"]
        case "key":
            del found["runs"]
        case "number":
            base["scores"]["object"] = "high"
        case "method":
            base["method"] = "real"
        case "bytes":
            found["runs"][-1]["bytes"] = "12"
        case "no count":
            del found["settings"]["num_images"]
        case "twice":
            found["runs"].append(base)
        case "stranger":
            base["subject"] = "cat"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("base", "found base tiny_world in .* and sd in "),
        ("training", "not of one benchmark: found training "),
        ("encoders", "found encoders "),
        ("scores", "found scores "),
        ("weights", "found weights of the base "),
        ("prompts", "found num_prompts "),
        ("form", "found form short, on Tiny World in .* and paper in "),
        ("rate", "full was trained at .* and at 7; merge results of one rate"),
        ("base's score", "base of fox with seed 0 is in .* with object .*; these were not measured alike"),
        ("key", "runs is missing"),
        ("number", "object"),
        ("method", "real is no method"),
        ("bytes", "bytes is"),
        ("no count", "num_images is missing"),
        ("twice", "holds base of owl with seed 0 twice; take one of them out"),
        ("stranger", "holds base of cat with seed 0, which is none of its own"),
    ],
)
def test_results_that_do_not_go_together_are_refused_and_nothing_is_written(
    done: Path, owl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, words: str
) -> None:
    found = json.loads((owl / "benchmark.json").read_text())
    changed(found, change)
    (tmp_path / "benchmark.json").write_text(json.dumps(found))
    assert merged(tmp_path / "all", done, tmp_path) == 2
    error = capsys.readouterr().err
    assert re.search(words, error), error
    assert error.count("\n") == 1
    assert not (tmp_path / "all").exists()


def test_a_run_is_merged_once(
    done: Path, owl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(done, tmp_path / "again")
    for folders, words in (
        ([done, tmp_path / "again"], "full of fox with seed 0 is in"),
        ([done], "found 1 file of results; give two or more"),
        ([done, done], "found 1 file of results; give two or more"),
        ([done, tmp_path / "nothing"], "there are no results"),
    ):
        assert merged(tmp_path / "all", *folders) == 2
        assert words in capsys.readouterr().err
    assert benchmark(tmp_path / "all", "--merge", str(done), str(owl), "--methods", "lora") == 2
    assert "--methods would change nothing with --merge" in capsys.readouterr().err
    assert not (tmp_path / "all").exists()
    assert merged(tmp_path, done, owl) == 2
    assert "is there already" in capsys.readouterr().err


def test_an_outside_judge_is_shown_and_chooses_nothing(tmp_path: Path) -> None:
    subjects = read_dreambooth(dreambooth(tmp_path / "data", "bear", "cat2"))
    runs = plan_benchmark(["lora", "ether"], subjects, [0])
    for number, run in enumerate(runs):
        score = 0.5 + 0.01 * number * (run.method == "ether")
        result = {"method": run.method, "subject": run.subject.name, "seed": run.seed, "parameters": 9}
        run.folder(tmp_path).mkdir(parents=True, exist_ok=True)
        scores = {"object": score, "outside": 1 - score}
        (run.folder(tmp_path) / "result.json").write_text(json.dumps(result | {"scores": scores}))
    summary = summarise(runs, tmp_path, BenchmarkSettings("tiny_world", TINY_TRAINING), form="short")
    found = summary["differences"]
    assert (found["column"], found["best"], found["outside"]["column"]) == ("object", "ether", "outside")
    assert found["to_best"]["lora"]["mean"] == pytest.approx(-0.035)
    assert found["outside"]["to_best"]["lora"]["mean"] == pytest.approx(0.035)
    said = shown(summary)
    assert "object, outside ↑ less that of ETHER" in said
    assert table(summary)[0][2:4] == ["object ↑", "object, outside ↑"]


def test_those_who_share_the_work_take_whole_groups(tmp_path: Path) -> None:
    subjects = tiny_subjects(TINY_SUBJECTS[:10], tmp_path)
    whole = ("full", "full:learning_rate=0.0003")
    runs = plan_benchmark([*whole, "lora"], subjects, [0, 1])
    settings = BenchmarkSettings("tiny_world", TINY_TRAINING)
    groups = {tuple(trained_together(runs, run, settings)) for run in runs if run.method == "lora"}
    assert sorted(len(group) for group in groups) == [2, 2, 8, 8]
    assert {run for group in groups for run in group} == {run for run in runs if run.method == "lora"}
    assert all(trained_together(runs, run, settings) == [run] for run in runs if run.method in whole)


def test_rows_are_methods_with_options_of_their_own(tmp_path: Path) -> None:
    assert method_of("lora:rank=1,lora_alpha=2") == ("lora", {"rank": 1, "lora_alpha": 2})
    labels = {"lora": "LoRA r=4", "lora:rank=16": "LoRA r=16", "oft:num_blocks=2": "OFT n=2"}
    labels["ether_plus:sides=input"] = "ETHER+ sides=input"
    at_rates = {"ether:target_modules=.*to_v,learning_rate=0.1": "ETHER .*to_v"}  # where nothing else tells
    at_rates |= {f"hra:learning_rate={rate}": f"HRA r=4 at {rate}" for rate in (0.1, 0.2)}
    assert labels_of(labels | at_rates) == labels | at_rates
    assert method_of('lora:target_modules=["to_q","to_k"],rank=2')[1] == {
        "target_modules": ["to_q", "to_k"],
        "rank": 2,
    }
    settings = BenchmarkSettings("sd", PAPER_TRAINING)
    assert settings.learning_rate("lora:rank=2") == 6e-4
    for_all = BenchmarkSettings("sd", {**PAPER_TRAINING, "learning_rate": 0.5})
    rows = ("lora:rank=2", "lora:rank=2,learning_rate=0.25")
    assert [for_all.learning_rate(row) for row in rows] == [0.5, 0.25]
    runs = plan_benchmark(list(labels), read_dreambooth(dreambooth(tmp_path / "data", "cat2")), [0])
    assert training_config(runs[1], tmp_path, for_all).optimization.learning_rate == 0.5
    configs = [training_config(run, tmp_path, settings).adapter for run in runs[1:]]
    assert [(each.adapter, each.rank, each.blocks, each.sides) for each in configs] == [
        ("lora", 4, 4, None),
        ("lora", 16, 4, None),
        ("oft", 4, 2, None),
        ("ether_plus", 4, 4, "input"),
    ]
    assert len({run.folder(tmp_path) for run in runs}) == len(runs)


def test_differences_are_of_the_same_subjects_and_have_an_interval(tmp_path: Path) -> None:
    subjects = read_dreambooth(dreambooth(tmp_path / "data", "bear", "cat2", "red_vase"))
    easy = {"bear": 0.2, "cat2": 0.5, "red_vase": 0.9}
    ahead = {"bear": 0.02, "cat2": 0.03, "red_vase": 0.05}
    runs = plan_benchmark(["lora", "ether"], subjects, [0, 1])
    for run in runs:
        score = easy[run.subject.name] + ahead[run.subject.name] * (run.method == "ether") + 0.1 * run.seed
        result = {"method": run.method, "subject": run.subject.name, "seed": run.seed}
        run.folder(tmp_path).mkdir(parents=True, exist_ok=True)
        found = {"scores": {"dino": score}, "parameters": 100 if run.method == "lora" else 10}
        (run.folder(tmp_path) / "result.json").write_text(json.dumps(result | found))
    summary = summarise(runs, tmp_path, BenchmarkSettings("tiny_world", TINY_TRAINING), form="short")
    differences = summary["differences"]
    lora = differences["to_best"]["lora"]
    assert (differences["best"], differences["column"], lora["num_subjects"]) == ("ether", "dino", 3)
    assert lora["mean"] == pytest.approx(-statistics.mean(ahead.values()))
    # of 27 draws of three subjects one is the least, (-0.05)³: 3.7 % of all, so the 2.5 % quantile is there
    assert (lora["low"], lora["high"]) == (pytest.approx(-0.05), pytest.approx(-0.02))
    assert "-0.033  -0.050 to -0.020" in shown(summary)
    front = draw_front(summary)
    assert front is not None
    with Image.open(io.BytesIO(front)) as picture:
        assert picture.format == "PNG"


def test_subjects_are_learned_in_one_batch_and_validated_on_prompts_of_their_own(tmp_path: Path) -> None:
    flags = ["--methods", "ether", "--subjects", "fox", "owl", *DRAWN]
    flags += ["--train", "max_train_steps=2", "train_batch_size=1", "eval_steps=1", "num_eval_images=1"]
    flags += ["eval_num_inference_steps=1", "keep=best", "--keep_adapters"]
    assert benchmark(tmp_path, *flags) == 0
    found = json.loads((tmp_path / "benchmark.json").read_text())
    assert found["num_done"] == found["num_runs"] == 4
    for name in ("fox", "owl"):
        run = tmp_path / "runs" / "ether" / f"{name}_0" / "adapter"
        asked = json.loads((run / "run.json").read_text())["settings"]["eval_prompt"]
        prompts = validation_prompts(find_concept(name))
        assert asked == list(prompts)
        assert len(set(prompts)) == 4
        captions = {photo.caption for photo in photos_of(find_concept(name))}
        assert not set(prompts) & (captions | set(unseen_prompts(find_concept(name))))
