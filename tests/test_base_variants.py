"""The weights of a base are found in whatever variant they are, part by part, and never drawn at random."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from base_kinds import half_sd
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from tiny_pipelines import tiny_sd, tiny_sdxl
from torch import nn
from trained_adapters import CONFIGS, train

from ether_diffusion import save_ether
from ether_diffusion.bases import load_base, open_base
from ether_diffusion.pipelines.opening import open_pipeline
from ether_diffusion.scripts import ether

FULL, HALF = torch.float32, torch.float16


def saved(folder: Path, pipe: Any, **options: Any) -> Path:
    pipe.save_pretrained(folder, **options)
    return folder


def half_sdxl() -> Any:
    return tiny_sdxl().to(HALF)


def mixed(folder: Path) -> Path:
    """A base whose parts are of three variants, none of them plain."""
    saved(folder, half_sd(), variant="fp16")
    for part, variant, model in (("unet", "bf16", tiny_sd().unet), ("vae", "non_ema", tiny_sd().vae)):
        next((folder / part).glob("*.safetensors")).unlink()
        model.to(torch.bfloat16 if variant == "bf16" else FULL).save_pretrained(
            folder / part, variant=variant
        )
    return folder


LAYOUTS: dict[str, tuple[Callable[[Path], Path], dict[str, torch.dtype]]] = {
    "fp16 alone": (
        lambda folder: saved(folder, half_sd(), variant="fp16"),
        {"unet": HALF, "vae": HALF, "text_encoder": HALF},
    ),
    "fp16 alone, sdxl": (
        lambda folder: saved(folder, half_sdxl(), variant="fp16"),
        {"unet": HALF, "vae": HALF, "text_encoder": HALF, "text_encoder_2": HALF},
    ),
    "a variant of each part": (mixed, {"unet": torch.bfloat16, "vae": FULL, "text_encoder": HALF}),
    "fp16 in shards": (
        lambda folder: saved(folder, half_sd(), variant="fp16", max_shard_size="50KB"),
        {"unet": HALF, "vae": HALF, "text_encoder": HALF},
    ),
    "fp16 beside plain files": (
        lambda folder: saved(saved(folder, half_sd(), variant="fp16"), tiny_sd()),
        {"unet": FULL, "vae": FULL, "text_encoder": FULL},
    ),
    "pickled": (
        lambda folder: saved(folder, tiny_sd(), safe_serialization=False),
        {"unet": FULL, "vae": FULL},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_path_finds_the_weights_that_are_there(tmp_path: Path, layout: str) -> None:
    make, dtypes = LAYOUTS[layout]
    base = open_base(make(tmp_path / "base"))
    whole = load_base(base.folder)
    assert {name: getattr(whole, name).dtype for name in dtypes} == dtypes
    assert base.denoiser_dtype == dtypes["unet"]
    drawing = open_pipeline(base, device=torch.device("cpu"), dtype=FULL)
    loaded = base.load_denoiser(), base.load_vae(), base.load_text_encoders().models["text_encoder"]
    for name, mine in zip(("unet", "vae", "text_encoder"), loaded, strict=True):
        for key, weight in getattr(whole, name).state_dict().items():
            assert torch.equal(mine.state_dict()[key], weight.to(FULL)), (name, key)
            assert torch.equal(getattr(drawing, name).state_dict()[key], weight.to(FULL)), (name, key)


def test_pickled_weights_are_loaded_without_words_of_alarm(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, tiny_sd(), safe_serialization=False)
    base = open_base(tmp_path)
    capfd.readouterr()
    base.load_denoiser(), base.load_vae(), base.load_text_encoders()
    said = capfd.readouterr().err + caplog.text
    assert "error" not in said.lower()
    assert "unsafe" not in said


def test_the_variant_that_is_wanted_comes_before_plain_files(tmp_path: Path) -> None:
    saved(saved(tmp_path, tiny_sd()), tiny_sd(seed=5), variant="other")
    wanted, plain = open_base(tmp_path, variant="other").load_denoiser(), open_base(tmp_path).load_denoiser()
    assert torch.equal(wanted.conv_in.weight, tiny_sd(seed=5).unet.conv_in.weight)
    assert torch.equal(plain.conv_in.weight, tiny_sd().unet.conv_in.weight)


def test_a_variant_that_no_part_has_is_refused_with_those_there(tmp_path: Path) -> None:
    saved(tmp_path, half_sd(), variant="fp16")
    with pytest.raises(
        ValueError, match="no weights of the variant bf16 but of fp16; name one that is there"
    ):
        open_base(tmp_path, variant="bf16")


def test_several_variants_and_no_plain_files_are_named(tmp_path: Path) -> None:
    saved(saved(tmp_path, tiny_sd(), variant="non_ema"), half_sd(), variant="fp16")
    for load in (open_base, load_base):
        with pytest.raises(ValueError, match="weights of the variants fp16, non_ema alone"):
            load(tmp_path)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_part_without_weights_is_refused_before_another_is_loaded(tmp_path: Path, part: str) -> None:
    saved(tmp_path, tiny_sd())
    next((tmp_path / part).glob("*.safetensors")).rename(tmp_path / part / "weights.msgpack")
    with pytest.raises(ValueError, match=rf"{part} holds no weights that diffusers reads"):
        open_base(tmp_path)


def test_the_commands_take_a_base_of_one_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pipe = half_sd()
    saved(tmp_path / "base", pipe, variant="fp16")
    train(pipe.unet, CONFIGS["ether_plus"])
    save_ether(pipe, tmp_path / "fox", base_model="base")
    drawing = ["--prompt", "abc", "--steps", "1", "--size", "16"]
    assert ether.main(["generate", "--adapter", "fox", *drawing, "--output", "x.png"]) == 0
    assert ether.main(["export", "fox", "--base", "base", "--output", "exported"]) == 0
    assert ether.main(["merge", "fox", "--base", "base", "--output", "merged"]) == 0
    merged: Any = DiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert not torch.equal(
        merged.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.weight,
        tiny_sd().unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.weight,
    )


def test_variants_of_the_hub_are_fetched_where_there_is_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the Hub, which as diffusers gives the files of one variant and what is beside them."""
    there, here = mixed(tmp_path / "there"), tmp_path / "here"
    names = [path.relative_to(there) for path in there.rglob("*") if path.is_file()]

    def download(name: str, *, variant: str | None, **options: object) -> str:
        for path in names:
            if path.suffix != ".safetensors" or f".{variant}." in path.name:
                (here / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(there / path, here / path)
        return str(here)

    tree = [SimpleNamespace(path=str(path)) for path in names]
    monkeypatch.setattr(DiffusionPipeline, "download", download)
    monkeypatch.setattr("ether_diffusion.bases.files.get_cached_repo_tree", lambda name, revision: tree)
    assert load_base("somebody/base").unet.dtype == torch.bfloat16


def damaged(folder: Path, part: str, change: Callable[[dict[str, torch.Tensor], str], object]) -> Path:
    saved(folder, tiny_sd())
    file = next((folder / part).glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors, sorted(tensors)[3])
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


LOADERS: dict[str, Callable[[Path], object]] = {
    "for training": lambda folder: [
        load()
        for base in [open_base(folder)]
        for load in (base.load_vae, base.load_text_encoders, base.load_denoiser)
    ],
    "for drawing": lambda folder: open_pipeline(
        open_base(folder), device=torch.device("cpu"), dtype=torch.float32
    ),
    "for merging": load_base,
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_are_missing_are_not_random(tmp_path: Path, part: str, loader: str) -> None:
    folder = damaged(tmp_path, part, lambda tensors, key: tensors.pop(key))
    with pytest.raises(ValueError, match=rf"the {part} in .* lacks weights of its class .*norm"):
        LOADERS[loader](folder)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_weights_of_another_shape_are_not_random(tmp_path: Path, part: str) -> None:
    folder = damaged(tmp_path, part, lambda tensors, key: tensors.update({key: torch.zeros(3, 7)}))
    with pytest.raises(ValueError, match=rf"the {part} in .*norm.*; fetch or save it again|norm.* shape"):
        load_base(folder)


def test_buffers_of_older_files_are_no_weights(tmp_path: Path) -> None:
    """As Stable Diffusion 1.5's own: keys below text_model, and the positions as a buffer."""
    saved(tmp_path, tiny_sd())
    file = tmp_path / "text_encoder" / "model.safetensors"
    older = {f"text_model.{key}": tensor for key, tensor in load_file(file).items()}
    older["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(older, file, metadata={"format": "pt"})
    model = open_base(tmp_path).load_text_encoders().models["text_encoder"]
    assert isinstance(model, nn.Module)
    for key, tensor in tiny_sd().text_encoder.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
