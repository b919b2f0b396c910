"""A base or a VAE that is one file is the folder of the same weights, for everything."""

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from ldm_layout import UNET, VAE, in_one_file
from photo_batches import fill_with_photos
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ether_diffusion.bases import load_base, open_base, single_file
from ether_diffusion.scripts import ether, train_dreambooth

REAL = single_file.CONFIGS
NARROW: dict[str, dict[str, Any]] = {
    "unet": {"attention_head_dim": 4, "norm_num_groups": 8, "cross_attention_dim": 32, "layers_per_block": 1},
    "vae": {"block_out_channels": [8] * 4, "norm_num_groups": 4, "layers_per_block": 1},
    "text_encoder": {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
    },
}
NARROW["text_encoder_2"] = NARROW["text_encoder"] | {
    "hidden_size": 48,  # by the width, diffusers tells one encoder from the other
    "num_hidden_layers": 10,
    "projection_dim": 48,
}
OF_FAMILY: dict[str, dict[str, dict[str, Any]]] = {
    "v1": {},
    "v2": {
        "unet": {"cross_attention_dim": 1024, "layers_per_block": 2},
        "text_encoder": {"hidden_size": 1024},
    },
    "xl": {
        "unet": {
            "cross_attention_dim": 32 + 48,
            "transformer_layers_per_block": [1, 1, 2],
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 48,
        }
    },
}


def narrow(family: str) -> dict[str, dict[str, Any]]:
    parts = {
        name: dict(config) | NARROW.get(name, {}) | OF_FAMILY[family].get(name, {})
        for name, config in REAL[family]["parts"].items()
    }
    parts["unet"]["block_out_channels"] = [32, 64, 64, 64][: len(parts["unet"]["block_out_channels"])]
    parts["unet"]["sample_size"] = 8
    return parts


TEXTS = ("cond_stage_model.", "conditioner.")


@pytest.fixture(autouse=True)
def narrow_families(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The families' configs with few channels, and a cache of this test's own."""
    few = {name: REAL[name] | {"parts": narrow(name)} for name in REAL}
    monkeypatch.setattr(single_file, "CONFIGS", few)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(single_file, "UNPACKED_FOLDER", tmp_path / "unpacked")


def pipeline_of(family: str, *, channels: int = 4) -> DiffusionPipeline:
    """A pipeline with random weights in the family's classes, put together by stock diffusers."""
    parts = narrow(family)
    torch.manual_seed(0)
    models: dict[str, Any] = {
        "unet": UNet2DConditionModel.from_config(parts["unet"] | {"in_channels": channels}),
        "vae": AutoencoderKL.from_config(parts["vae"]),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**parts["text_encoder"])),
        "tokenizer": single_file._tokenizer(padded_by_end=family != "v2"),
        "scheduler": getattr(diffusers, parts["scheduler"]["_class_name"]).from_config(parts["scheduler"]),
    }
    if family == "xl":
        models["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**parts["text_encoder_2"]))
        models["tokenizer_2"] = single_file._tokenizer(padded_by_end=False)
    else:
        models |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    kind = getattr(diffusers, REAL[family]["pipelines"][channels == 9])
    pipeline: DiffusionPipeline = kind(**models)
    return pipeline


@cache
def weights_of(family: str) -> dict[str, Tensor]:
    """What a file of the family's pipeline holds."""
    return in_one_file(pipeline_of(family))


def states(pipeline: DiffusionPipeline) -> dict[str, dict[str, Tensor]]:
    parts = pipeline.components.items()
    return {name: part.state_dict() for name, part in parts if isinstance(part, torch.nn.Module)}


def write(path: Path, weights: dict[str, Tensor], **metadata: str) -> Path:
    save_file(weights, path, metadata)
    return path


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """A file of SD 1.x."""
    return write(tmp_path / "model.safetensors", weights_of("v1"))


@pytest.mark.parametrize(("family", "channels"), [("v1", 4), ("v1", 9), ("v2", 4), ("xl", 4), ("xl", 9)])
def test_a_file_is_the_folder_of_the_same_weights(tmp_path: Path, family: str, channels: int) -> None:
    pipeline = pipeline_of(family, channels=channels).to(torch.float16)
    path = write(tmp_path / "model.safetensors", in_one_file(pipeline))
    pipeline.save_pretrained(tmp_path / "folder")
    mine, theirs = open_base(path), open_base(tmp_path / "folder")
    assert (type(mine), mine.is_inpainting, mine.native_size) == (
        type(theirs),
        channels == 9,
        theirs.native_size,
    )
    assert mine.prediction_type == theirs.prediction_type
    found, expected = states(load_base(path)), states(pipeline)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)
    prompts = ["a photo of a sks dog", ""]
    ours, stock = (base.load_text_encoders().encode(prompts) for base in (mine, theirs))
    assert torch.equal(ours.sequence, stock.sequence)


def test_the_commands_take_a_file(tmp_path: Path, first: Path) -> None:
    photos, adapter = tmp_path / "photos", str(tmp_path / "adapter")
    fill_with_photos(photos, [(64, 64)])
    base = ["--pretrained_model_name_or_path", str(first), "--output_dir", adapter, "--max_train_steps", "1"]
    subject = ["--instance_data_dir", str(photos), "--instance_prompt", "a sks dog", "--resolution", "64"]
    assert train_dreambooth.main([*base, *subject]) == 0
    picture = tmp_path / "x.png"
    flags = ["--adapter", adapter, "--base", str(first), "--prompt", "a sks dog"]
    flags += ["--steps", "1", "--size", "64"]
    assert ether.main(["generate", *flags, "--output", str(picture)]) == 0
    pipeline_of("v1").save_pretrained(tmp_path / "folder")
    flags[flags.index(str(first))] = str(tmp_path / "folder")
    other = [*flags, "--output", str(tmp_path / "y.png")]
    assert ether.main(["generate", *other]) == 0  # the fingerprint is that of the folder
    with Image.open(picture) as mine, Image.open(tmp_path / "y.png") as theirs:
        assert mine.tobytes() == theirs.tobytes()


def test_each_part_keeps_its_dtype(tmp_path: Path, first: Path) -> None:
    weights = weights_of("v1")
    mixed = {name: tensor.half() if name.startswith(UNET) else tensor for name, tensor in weights.items()}
    base = load_base(write(tmp_path / "mixed.safetensors", mixed))
    assert (base.unet.dtype, base.vae.dtype) == (torch.float16, torch.float32)


def test_what_the_unet_predicts_is_read_from_the_file(tmp_path: Path) -> None:
    xl = weights_of("xl")
    marks = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    base = open_base(write(tmp_path / "marked.safetensors", xl | marks))
    assert base.prediction_type == "v_prediction"
    scheduler = json.loads((base.folder / "scheduler/scheduler_config.json").read_text())
    assert scheduler["rescale_betas_zero_snr"]
    assert open_base(write(tmp_path / "plain.safetensors", xl)).prediction_type == "epsilon"
    said = write(tmp_path / "said.safetensors", xl, **{"modelspec.prediction_type": "v"})
    assert open_base(said).prediction_type == "v_prediction"


def test_a_second_stable_diffusion_of_velocity_is_told_by_its_weights(tmp_path: Path) -> None:
    weights = weights_of("v2")
    few = open_base(write(tmp_path / "epsilon.safetensors", weights))
    assert few.prediction_type == "epsilon"
    name = UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias"
    spread = weights | {name: torch.linspace(-1, 1, len(weights[_norm(weights)]))}
    assert open_base(write(tmp_path / "v.safetensors", spread)).prediction_type == "v_prediction"


def _norm(weights: dict[str, Tensor]) -> str:
    return max(name for name in weights if name.endswith("transformer_blocks.0.norm1.bias"))


def as_tuple(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else value


def without(weights: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if not name.startswith(prefixes)}


@pytest.mark.parametrize(
    ("family", "lacking"), [("v1", VAE), ("v1", TEXTS), ("v2", (VAE, *TEXTS)), ("xl", TEXTS)], ids=str
)
def test_parts_that_a_file_lacks_are_those_of_its_familys_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, lacking: str | tuple[str, ...]
) -> None:
    whole = pipeline_of(family)
    path = write(tmp_path / "bare.safetensors", without(in_one_file(whole), *as_tuple(lacking)))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    home = single_file.HOMES[family]
    with pytest.raises(ValueError, match=f"holds no (vae|text_encoder), and {home}, .* hf download"):
        open_base(path)
    cached = tmp_path / "hub" / f"models--{home.replace('/', '--')}"
    whole.save_pretrained(cached / "snapshots" / "0")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0")
    base = open_base(path)
    found, expected = states(base.load_pipeline()), states(whole)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)


def test_a_file_without_a_vae_takes_another(tmp_path: Path) -> None:
    weights = weights_of("v1")
    path = write(tmp_path / "no_vae.safetensors", without(weights, VAE))
    only = {name.removeprefix(VAE): tensor for name, tensor in weights.items() if name.startswith(VAE)}
    vae = write(tmp_path / "vae.safetensors", only)
    loaded = open_base(path, vae=str(vae)).load_vae()
    torch.testing.assert_close(loaded.state_dict(), pipeline_of("v1").vae.state_dict(), rtol=0, atol=0)


def test_a_file_that_is_no_vae_is_refused_as_one(tmp_path: Path) -> None:
    pipeline_of("v1").save_pretrained(tmp_path / "base")
    other = write(tmp_path / "lora.safetensors", {"lora_unet_x.lora_down.weight": torch.ones(4, 4)})
    with pytest.raises(ValueError, match=r"vae in .*lora\.safetensors does not fit its family"):
        open_base(tmp_path / "base", vae=str(other))


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(first: Path) -> None:
    before = open_base(first).folder
    assert open_base(first).folder == before
    weights = weights_of("v1")
    write(first, weights | {UNET + "out.2.bias": torch.ones(4)})
    os.utime(first, (1, 1))
    after = open_base(first)
    assert not before.exists()
    assert torch.equal(after.load_denoiser().conv_out.bias, torch.ones(4))


REFINER = "conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias"
BAD: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "no text encoder": (lambda w: without(w, *TEXTS), "holds no text_encoder"),
    "no UNet": (lambda w: without(w, UNET), "no checkpoint of a UNet"),
    "a LoRA": (lambda w: {"lora_unet_x.lora_down.weight": torch.ones(4, 4)}, "no checkpoint of a UNet"),
    "a weight is missing": (
        lambda w: without(w, UNET + "out.2.bias"),
        "lacks weights of its unet",
    ),
    "other widths": (lambda w: w | {UNET + "out.2.bias": torch.ones(9)}, "does not fit its family"),
    "a refiner": (
        lambda w: (
            w | {"conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias": torch.ones(1)}
        ),
        "of the kind xl_refiner",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_what_cannot_be_used_is_named_and_nothing_stays(tmp_path: Path, fault: str) -> None:
    change, sentence = BAD[fault]
    path = write(tmp_path / "bad.safetensors", change(weights_of("v1")))
    with pytest.raises(ValueError, match=sentence):
        open_base(path)
    assert not [each for each in (tmp_path / "unpacked").iterdir() if each.is_dir()]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("model.ckpt", "is a pickle, .* get it as .safetensors"),
        ("model.pt", "is a pickle, .* get it as .safetensors"),
        ("model.gguf", "a single file of quantized weights"),
        ("model.safetensors", "is damaged; download it again"),
    ],
)
def test_pickles_quantized_and_damaged_files_are_refused(tmp_path: Path, name: str, sentence: str) -> None:
    (tmp_path / name).write_bytes(b"weights")
    for load in (open_base, load_base):
        with pytest.raises(ValueError, match=sentence):
            load(tmp_path / name)


COUNTS = {
    ("v1", "unet"): 859_520_964,
    ("v2", "unet"): 865_910_724,
    ("xl", "unet"): 2_567_463_684,
    ("v1", "vae"): 83_653_863,
    ("v1", "text_encoder"): 123_060_480,
    ("v2", "text_encoder"): 340_387_840,
    ("xl", "text_encoder_2"): 694_659_840,
}
"""Parameters of the published models."""


@pytest.mark.parametrize(("family", "part"), COUNTS)
def test_the_configs_are_those_of_the_published_models(family: str, part: str) -> None:
    config = REAL[family]["parts"][part]
    with torch.device("meta"):
        if part in ("unet", "vae"):
            model: torch.nn.Module = getattr(diffusers, config["_class_name"]).from_config(config)
        else:
            kind = CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel
            model = kind(CLIPTextConfig(**config))
    assert sum(each.numel() for each in model.parameters()) == COUNTS[family, part]


def test_the_tokenizer_is_clips() -> None:
    """Numbers as OpenAI's tokenizer gives them."""
    tokenizer = single_file._tokenizer(padded_by_end=True)
    assert len(tokenizer) == 49_408
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("astronauts, naïve! 2024").input_ids[0] == 49406
    assert single_file._tokenizer(padded_by_end=False).pad_token_id == 0
