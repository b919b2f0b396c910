"""Many runs at once: each ends as the run that it would be by itself, and what ends one ends no other."""

import json
import os
import random
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from forked_runs import exit_code, fork, until_change, wait_for_lines
from safetensors.torch import load_file
from scripted_evaluation import RISING, scripted
from training_runs import config, contents, log_of, trained_files, write_photos

from ether_diffusion.strict_json import Json
from ether_diffusion.training.checkpoint import newest_checkpoint
from ether_diffusion.training.config import DreamBoothConfig
from ether_diffusion.training.jobs import groups_of, train_jobs
from ether_diffusion.training.run import train_dreambooth

Flags = dict[str, Json]

FROZEN: Flags = {"prior_preservation": "frozen", "class_prompt": "a cat"}
CLASS_IMAGES: Flags = {"prior_preservation": "class_images", "class_prompt": "a cat", "num_class_images": 2}
MANY: list[Flags] = [
    {"adapter": "ether_plus"},
    {"adapter": "ether_plus", "learning_rate": 2e-3, "seed": 3, **FROZEN},
    {"adapter": "ether_plus", "seed": 4, **CLASS_IMAGES},
    {"adapter": "ether", "num_blocks": 4, "learning_rate": 4e-3, "seed": 5, "use_ema": True, **FROZEN},
    {"adapter": "ether", "sides": "output", "gradient_accumulation_steps": 2, "max_train_steps": 25},
    {"adapter": "lora", "rank": 2, "learning_rate": 1e-3, "lr_scheduler": "cosine"},
    {"adapter": "lora", "rank": 2, "train_batch_size": 2, "snr_gamma": 5.0, "seed": 7, **FROZEN},
    {"adapter": "oft", "learning_rate": 1e-4, "target_modules": "to_q,to_v"},
    {"adapter": "ether", "target_modules": "attention_and_feedforward", "resolution": 16},
]


def jobs(tmp_path: Path, place: str, of: list[Flags], **flags: Json) -> list[DreamBoothConfig]:
    """Return jobs with photos of their own and folders in a place."""
    found = []
    for number, own in enumerate(of):
        photos = tmp_path / f"photos-{number}"
        if not photos.exists():
            write_photos(photos, seed=number)
        folders = {"instance_data_dir": str(photos), "output_dir": str(tmp_path / place / str(number))}
        if own.get("prior_preservation") == "class_images":
            folders["class_data_dir"] = str(tmp_path / "classes")
            if not (tmp_path / "classes").exists():
                write_photos(tmp_path / "classes", seed=100)
        found.append(config(tmp_path, **folders, **(flags | own)))
    return found


def folders_of(configs: list[DreamBoothConfig]) -> list[Path]:
    return [each.output.output_dir for each in configs]


def assert_learned_the_same(found: Path, expected: Path) -> None:
    assert contents(found).keys() == contents(expected).keys()
    tensors, wanted = (load_file(each / "adapter_model.safetensors") for each in (found, expected))
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=1e-5)
    for line, own in zip(log_of(found), log_of(expected), strict=True):
        assert line == pytest.approx(own, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_jobs_together_learn_what_each_learns_alone(tmp_path: Path) -> None:
    flags: Flags = {"max_train_steps": 50, "checkpointing_steps": 10}
    together, alone = (jobs(tmp_path, place, MANY, **flags) for place in ("together", "alone"))
    assert [len(group) for group in groups_of(together)] == [len(MANY) - 1, 1]  # one is of another size
    assert train_jobs(together) == 0
    for one, other in zip(folders_of(together), alone, strict=True):
        assert train_dreambooth(other) == 0
        assert_learned_the_same(one, other.output.output_dir)


def test_as_many_rows_of_jobs_go_through_the_denoiser_at_once_as_memory_bears(tmp_path: Path) -> None:
    of: list[Flags] = [{"train_batch_size": 6}]
    many = jobs(tmp_path, "run", of + [{"seed": seed} for seed in range(6)])
    rows = list[int]()

    def note(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, torch.nn.Conv2d) and module.in_channels == 4 and torch.is_grad_enabled():
            rows.append(len(inputs[0]))

    noting = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        assert train_jobs(many) == 0
    finally:
        noting.remove()
    assert rows == [6, 4, 2] * 4  # one job's batch is not divided


@pytest.mark.parametrize(
    "flags",
    [{"gradient_checkpointing": True}, {"cache_latents": False}, {"aspect_ratio_buckets": "8,8;8,16"}],
    ids=lambda flags: next(iter(flags)),
)
def test_jobs_together_learn_the_same_whatever_they_have_in_common(tmp_path: Path, flags: Flags) -> None:
    write_photos(tmp_path / "photos-1", wide=2)
    of: list[Flags] = [{"adapter": "ether_plus"}, {"adapter": "ether_plus", "seed": 1}, {"adapter": "lora"}]
    together, alone = (jobs(tmp_path, place, of, **flags) for place in ("together", "alone"))
    assert train_jobs(together) == 0
    for one, other in zip(folders_of(together), alone, strict=True):
        assert train_dreambooth(other) == 0
        assert_learned_the_same(one, other.output.output_dir)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_jobs_killed_before_changes_of_the_disk_end_as_if_they_had_not_been(tmp_path: Path) -> None:
    of: list[Flags] = [
        {"max_train_steps": 5, "checkpointing_steps": 1, "checkpoints_total_limit": 1, **FROZEN},
        {"max_train_steps": 3, "gradient_accumulation_steps": 2, "checkpointing_steps": 3},
        {"max_train_steps": 7, "adapter": "lora", "checkpointing_steps": 2, "checkpoints_total_limit": 1},
    ]
    whole, killed = (jobs(tmp_path, place, of) for place in ("whole", "killed"))
    assert exit_code(fork(partial(train_jobs, whole))) == 0
    rng, number, num_kills, code = random.Random(0), 0, -1, -signal.SIGKILL
    while code == -signal.SIGKILL:
        number, num_kills = number + rng.randrange(5, 20), num_kills + 1
        code = exit_code(fork(until_change(partial(train_jobs, killed), tmp_path / "killed", number)))
    assert code == 0
    assert num_kills > 8
    for found, expected in zip(folders_of(killed), folders_of(whole), strict=True):
        assert trained_files(found) == trained_files(expected)
        assert log_of(found) == log_of(expected)


def test_what_ends_one_job_ends_no_other(tmp_path: Path) -> None:
    wildly: Flags = {"adapter": "lora", "learning_rate": 1e30}
    until: Flags = {"eval_steps": 1, "stop_when_good": True, "eval_patience": 2, "eval_prompt": ["a sks cat"]}
    until |= {"num_eval_images": 1, "eval_num_inference_steps": 1}
    of = [{}, {}, wildly, {"max_train_steps": 8, **until}, {}]
    whole, broken, wild, good, gone = jobs(tmp_path, "run", of)
    for path in (tmp_path / "photos-1").glob("*.png"):
        path.write_bytes(b"no photo")
    gone.output.output_dir.mkdir(parents=True)
    (gone.output.output_dir / "somebody's.txt").touch()
    with scripted(*RISING), pytest.raises(ValueError, match="3 of 5 jobs could not") as said:
        train_jobs([whole, broken, wild, good, gone])
    _, photos, other, infinite = str(said.value).split(f"\n{tmp_path / 'run'}/")
    assert photos.startswith("1: no usable photos in ")
    assert other.startswith("4: ")
    assert "which belong to no run" in other
    assert infinite.startswith("2: the ")
    assert "is not finite, at learning rate 1e+30" in infinite
    saved = newest_checkpoint(wild.output.output_dir)
    assert saved is not None
    assert saved.step == 1
    assert not broken.output.output_dir.exists()
    assert json.loads((good.output.output_dir / "evaluation.json").read_text())["stopped"]["step"] == 4
    assert len([line for line in log_of(good.output.output_dir) if "loss" in line]) == 4
    alone = jobs(tmp_path, "alone", [{}])[0]
    train_dreambooth(alone)
    assert_learned_the_same(whole.output.output_dir, alone.output.output_dir)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_signal_saves_all_jobs_and_the_same_call_goes_on(tmp_path: Path) -> None:
    of: list[Flags] = [{}, {"gradient_accumulation_steps": 2}]
    flags: Flags = {"max_train_steps": 20, "checkpointing_steps": 100}
    stopped, whole = (jobs(tmp_path, place, of, **flags) for place in ("stopped", "whole"))
    child = fork(partial(train_jobs, stopped))
    wait_for_lines(child, folders_of(stopped)[1] / "log.jsonl", 2)
    os.kill(child, signal.SIGINT)
    assert exit_code(child) == 130
    for path in folders_of(stopped):
        saved = newest_checkpoint(path)
        assert saved is not None
        assert 2 <= saved.step == len(log_of(path)) < 20
    assert exit_code(fork(partial(train_jobs, stopped))) == exit_code(fork(partial(train_jobs, whole))) == 0
    for found, expected in zip(folders_of(stopped), folders_of(whole), strict=True):
        assert log_of(found) == log_of(expected)
        assert adapter_of(found) == adapter_of(expected)


def adapter_of(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_no_job_writes_into_a_folder_of_another(tmp_path: Path) -> None:
    first, second = jobs(tmp_path, "run", [{}, {}])
    same = second.replace(output=second.output.replace(output_dir=first.output.output_dir))
    into = second.replace(output=second.output.replace(output_dir=tmp_path / "photos-0"))
    inside = second.replace(output=second.output.replace(output_dir=first.output.output_dir / "samples"))
    there = first.output.output_dir / ".." / first.output.output_dir.name
    again = second.replace(output=second.output.replace(output_dir=there))
    for other in (same, into, inside, again):
        with pytest.raises(ValueError, match="is the output_dir of one job and a folder of another, or lies"):
            train_jobs([first, other])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "num_groups"),
    [
        ({"learning_rate": 1.0, "seed": 4, "max_train_steps": 9, "adapter": "lora", **FROZEN}, 1),
        ({"mixed_precision": "bf16"}, 2),
        ({"resolution": 16}, 2),
        ({"dropout": 0.1}, 2),
        ({"train_text_encoder": True}, 2),
        ({"pretrained_model_name_or_path": "tiny_world"}, 2),
    ],
)
def test_jobs_are_trained_together_that_share_a_base_in_one_form(
    tmp_path: Path, flags: Flags, num_groups: int
) -> None:
    assert len(groups_of(jobs(tmp_path, "run", [{}, flags]))) == num_groups
