"""Bases of every family train, and what is saved draws the same in diffusers, natively and as a LoRA."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from base_kinds import KINDS, draw, open_pipeline
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from tiny_pipelines import tiny_sd, tiny_sdxl
from training_runs import config, log_of, write_photos

from ether_diffusion import load_ether
from ether_diffusion.strict_json import Json
from ether_diffusion.training.run import train_dreambooth

RUNS: dict[str, tuple[str, dict[str, Json]]] = {
    **{kind: (kind, {}) for kind in KINDS},
    "sdxl with text encoders": ("sdxl", {"train_text_encoder": True}),
    "sd with its text encoder": ("sd", {"train_text_encoder": True, "adapter": "ether"}),
    "float16 in fp16": ("float16", {"mixed_precision": "fp16"}),
    "sdxl in bf16 with text encoders": ("sdxl", {"mixed_precision": "bf16", "train_text_encoder": True}),
}
FAST: dict[str, Json] = {
    "max_train_steps": 2,
    "checkpointing_steps": 1,
    "learning_rate": 0.1,  # two steps are to be seen
    "export_lora": True,
}


class Run(NamedTuple):
    """A run that is done: its base, its folder, and what it was told."""

    base: Path
    folder: Path
    options: dict[str, Json]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module", params=RUNS)
def run(request: pytest.FixtureRequest, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two updates on a base, from the photos to the result folder."""
    torch.manual_seed(0)
    kind, options = RUNS[request.param]
    folder = tmp_path_factory.mktemp("training")
    KINDS[kind]().save_pretrained(folder / "base")
    options = FAST | {"instance_data_dir": str(photos)} | options
    assert train_dreambooth(config(folder, **options)) == 0
    return Run(folder / "base", folder / "run", options)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


def test_the_loss_is_finite(run: Run) -> None:
    losses = [line["loss"] for line in log_of(run.folder)]
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))


def test_the_adapter_and_its_lora_draw_the_same_in_diffusers(run: Run) -> None:
    base, native, lora = (open_pipeline(run.base) for _ in range(3))
    load_ether(native, run.folder)
    lora.load_lora_weights(run.folder)
    plain, adapted, exported = draw(base), draw(native), draw(lora)
    assert distance(adapted, plain) > 1e-3
    assert distance(adapted, exported) < 0.01 * distance(adapted, plain)  # factors are in float16


def test_every_part_that_trains_is_saved_and_loaded(run: Run) -> None:
    pipe = open_pipeline(run.base)
    report = load_ether(pipe, run.folder)
    parts = {"unet"}
    if run.options.get("train_text_encoder"):
        parts |= {name for name in ("text_encoder", "text_encoder_2") if name in pipe.components}
    assert set(report.components) == parts
    for part in parts - {"unet"}:
        tensors = load_file(run.folder / part / "adapter_model.safetensors")
        first = load_file(run.folder / "checkpoint-1" / part / "adapter_model.safetensors")
        learned = [name for name in tensors if "layers.0." in name]  # SDXL leaves the last layer out
        assert learned
        assert all(not torch.equal(tensors[name], first[name]) for name in learned)


def test_what_was_saved_is_float32(run: Run) -> None:
    for tensor in load_file(run.folder / "adapter_model.safetensors").values():
        assert tensor.dtype == torch.float32


def test_it_goes_on_from_a_checkpoint_to_the_same_bytes(run: Run) -> None:
    names = ["adapter_model.safetensors", "pytorch_lora_weights.safetensors"]
    before = [(run.folder / name).read_bytes() for name in names]
    again = config(run.folder.parent, **(run.options | {"resume_from_checkpoint": "checkpoint-1"}))
    assert train_dreambooth(again) == 0
    assert [(run.folder / name).read_bytes() for name in names] == before


def train(tmp_path: Path, make: Callable[[], Any], **options: Json) -> Path:
    make().save_pretrained(tmp_path / "base")
    assert train_dreambooth(config(tmp_path, **(FAST | options))) == 0
    return tmp_path / "run"


def test_another_autoencoder_encodes_the_photos(tmp_path: Path) -> None:
    own = train(tmp_path / "own", tiny_sd)
    other = tiny_sd(seed=9).vae
    assert isinstance(other, AutoencoderKL)
    other.save_pretrained(tmp_path / "vae")
    changed = train(tmp_path / "other", tiny_sd, pretrained_vae_model_name_or_path=str(tmp_path / "vae"))
    assert log_of(own)[0]["loss"] != log_of(changed)[0]["loss"]
    pipe = tiny_sd()
    pipe.vae = other
    same = train(tmp_path / "same", lambda: pipe)
    assert log_of(same) == log_of(changed)


def test_a_variant_of_the_base_is_not_asked_of_another_autoencoder(tmp_path: Path) -> None:
    tiny_sd(seed=9).vae.save_pretrained(tmp_path / "vae")
    base = tiny_sd().to(torch.float16)
    base.save_pretrained(tmp_path / "base", variant="fp16")
    flags = {"variant": "fp16", "pretrained_vae_model_name_or_path": str(tmp_path / "vae")}
    assert train_dreambooth(config(tmp_path, **(FAST | flags))) == 0


def test_a_unet_of_unequal_native_sides_trains(tmp_path: Path) -> None:
    def oblong() -> Any:
        pipe = tiny_sd()
        pipe.unet.register_to_config(sample_size=[8, 12])
        return pipe

    train(tmp_path, oblong)


def test_a_process_may_train_in_one_precision_and_then_in_another(tmp_path: Path) -> None:
    sums = []
    for name, precision in (("half", "bf16"), ("full", None), ("half again", "bf16")):
        run = train(tmp_path / name, tiny_sd, mixed_precision=precision)
        sums.append(log_of(run)[-1]["loss"])
    assert sums[0] == sums[2] != sums[1]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_autoencoder_works_in_float32_under_mixed_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    seen: dict[str, set[torch.dtype]] = {"encode": set(), "decode": set()}

    def watch(name: str) -> None:
        own = getattr(AutoencoderKL, f"_{name}")

        def watched(self: AutoencoderKL, *arguments: Any, **options: Any) -> Any:
            hooks = [
                module.register_forward_hook(lambda _, __, output: seen[name].add(output.dtype))
                for module in self.modules()
                if isinstance(module, torch.nn.Conv2d)
            ]
            try:
                return own(self, *arguments, **options)
            finally:
                for hook in hooks:
                    hook.remove()

        monkeypatch.setattr(AutoencoderKL, f"_{name}", watched)

    watch("encode")
    watch("decode")
    drawn: dict[str, Json] = {
        "validation_prompt": ["a sks cat"],
        "num_validation_images": 1,
        "validation_num_inference_steps": 1,
    }
    train(tmp_path, tiny_sdxl, mixed_precision=precision, **drawn)
    assert seen == {"encode": {torch.float32}, "decode": {torch.float32}}
