"""What goes wrong with runs and machines: said in a sentence, with all that was learned kept."""

import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked_runs import exit_code, fork, training
from safetensors.torch import load_file, save_file
from training_runs import command, config, environment, log_of, trained_files

from ether_diffusion.scripts.train_dreambooth import main
from ether_diffusion.training.checkpoint import newest_checkpoint
from ether_diffusion.training.config import DreamBoothConfig
from ether_diffusion.training.run import train_dreambooth


def refusal(run: DreamBoothConfig, capsys: pytest.CaptureFixture[str]) -> str:
    """Ask for a run on the command line and return why it is refused."""
    assert main(command(run)[2:]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize("place", ["a file", "below a file", "read-only", "a long name", "a long path"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_slow(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    (tmp_path / "file").write_text("mine")
    places = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "run"}
    places |= {"read-only": Path("/proc/run"), "a long name": tmp_path / ("x" * 300)}
    places["a long path"] = tmp_path.joinpath(*["x" * 200] * 25)
    run = config(tmp_path, output_dir=str(places[place]))
    (tmp_path / "asked").mkdir()
    asked = command(config(tmp_path, output_dir=str(tmp_path / "asked")))[2:]
    assert main([*asked, "--output_dir", str(run.output.output_dir)]) == 2
    said = capsys.readouterr().err
    assert "is a file; give a folder" in said or "cannot be written to" in said
    assert "Traceback" not in said
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_of_any_name_that_a_file_system_takes_holds_a_run(tmp_path: Path) -> None:
    for name in ("-rf two\nlines", "\u202eright to left" + "x" * 220):
        assert train_dreambooth(config(tmp_path, max_train_steps=1, output_dir=str(tmp_path / name))) == 0
        assert newest_checkpoint(tmp_path / name) is not None


def test_a_disk_that_is_full_already_is_found_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=20_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    said = refusal(config(tmp_path), capsys)
    assert "a checkpoint and the result need" in said
    assert "MiB are free; free some, or give another --output_dir" in said
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_a_disk_that_gets_full_leaves_a_whole_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    run = config(tmp_path, checkpoints_total_limit=20, max_train_steps=20, checkpointing_steps=1)
    said = train_on_a_small_disk(tmp_path, run, num_kib=400)
    assert "No space left on device: checkpoint-" in said
    assert "the same command goes on from the newest" in said
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    assert checkpoint.step >= 1
    assert exit_code(fork(training(run))) == 0
    assert [line["step"] for line in log_of(tmp_path / "run")] == list(range(1, 21))


def train_on_a_small_disk(tmp_path: Path, run: DreamBoothConfig, *, num_kib: int) -> str:
    """Train in a folder of that size, keep what is in it, and return what was said."""
    folder = tmp_path / "run"
    folder.mkdir()
    mount = f"mount -t tmpfs -o size={num_kib}k none {folder}"
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-Urm", "sh", "-c", mount]).returncode:
        pytest.skip("runs where user namespaces may mount a tmpfs")
    words = " ".join([sys.executable, *command(run)])
    script = f"{mount} && {words}; code=$?; cp -r {folder} {tmp_path}/kept; exit $code"
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "kept", folder)
    return done.stderr


def test_a_file_that_may_not_grow_leaves_a_whole_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    assert exit_code(fork(training(config(tmp_path, output_dir=str(tmp_path / "whole"))))) == 0
    assert exit_code(fork(training(config(tmp_path, max_train_steps=2)))) == 0
    before = trained_files(tmp_path / "run" / "checkpoint-2")
    limit = len(before["optimizer.safetensors"]) - 1

    def train_within_limit() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return train_dreambooth(config(tmp_path))

    assert exit_code(fork(train_within_limit, tmp_path / "said")) == 2
    assert "File too large: checkpoint-4 needs" in (tmp_path / "said").read_text()
    assert trained_files(tmp_path / "run" / "checkpoint-2") == before
    assert not list((tmp_path / "run").glob(".*"))
    assert exit_code(fork(training(config(tmp_path)))) == 0
    assert trained_files(tmp_path / "run") == trained_files(tmp_path / "whole")
    assert log_of(tmp_path / "run") == log_of(tmp_path / "whole")


def test_memory_that_runs_out_is_a_sentence_on_what_to_lower(tmp_path: Path) -> None:
    assert exit_code(fork(training(config(tmp_path, max_train_steps=2)))) == 0
    before = trained_files(tmp_path / "run" / "checkpoint-2")
    large = config(tmp_path, train_batch_size=1024)

    def train_within_limit() -> int:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
        return train_dreambooth(large, allow_changes=True)

    assert exit_code(fork(train_within_limit, tmp_path / "said")) == 2
    said = (tmp_path / "said").read_text()
    assert "memory ran out" in said
    assert "a smaller --train_batch_size" in said
    assert trained_files(tmp_path / "run" / "checkpoint-2") == before


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_photo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = config(tmp_path, adapter="lora", learning_rate=1e30, checkpointing_steps=100)
    said = refusal(run, capsys)
    name = "photo_1_[0-2].png"
    assert re.search(
        rf"the (loss|gradient) of step 2 is not finite, at learning rate 1e\+30, with {name};", said
    )
    checkpoint = newest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    assert checkpoint.step == len(log_of(tmp_path / "run")) == 1
    assert all(tensor.isfinite().all() for tensor in checkpoint.tensors("adapter_model.safetensors").values())


def test_after_a_power_cut_empty_files_are_passed_over(tmp_path: Path) -> None:
    train_dreambooth(config(tmp_path))
    whole, log = trained_files(tmp_path / "run"), log_of(tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoint-4").iterdir():
        path.write_bytes(b"")
    (tmp_path / "run" / "adapter_model.safetensors").write_bytes(b"")
    assert train_dreambooth(config(tmp_path)) == 0
    assert trained_files(tmp_path / "run") == whole
    assert log_of(tmp_path / "run") == log


def test_of_a_batch_only_the_photo_whose_loss_is_not_finite_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = config(tmp_path, train_batch_size=3)
    (tmp_path / "photos" / "photo_1_1.txt").write_text("z")
    path = tmp_path / "base" / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    tokens = next(name for name in tensors if name.endswith("token_embedding.weight"))
    tensors[tokens][2 + 26 + 25] = torch.nan  # the word "z"
    save_file(tensors, path, {"format": "pt"})
    said = refusal(run, capsys)
    assert "the loss of step 1 is not finite, at learning rate 0.006, with photo_1_1.png;" in said
    assert "photo_1_0" not in said
