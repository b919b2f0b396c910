"""Exported files and models, read by tools that have never heard of ETHER, compute what the adapter does."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Factory, Patch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from real_configs import meta_unet
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pipelines import motion_unet, tiny_sd, tiny_sdxl
from torch import Tensor
from trained_adapters import (
    CONFIGS,
    dense_update,
    files_in,
    inputs,
    predict,
    relative_error,
    save_adapter,
    train,
)

from ether_diffusion import EtherConfig
from ether_diffusion.adapters import Adapter, AdapterPart, fingerprint, load_ether, read_adapter, save_ether
from ether_diffusion.adapters.format import EXPORT_NAME
from ether_diffusion.export import export_lora, export_merged, lora_header

PIPELINES: dict[str, Callable[[], DiffusionPipeline]] = {"sd": tiny_sd, "sdxl": tiny_sdxl}
JOBS = [*(("sd", name) for name in CONFIGS), ("sdxl", "ether"), ("sdxl", "ether_plus")]


def run_stock_diffusers(jobs: list[tuple[str, Path, Path]], folder: Path) -> dict[str, Tensor]:
    """Load LoRA files in a process that cannot import this package, and return what the UNets compute."""
    (folder / "jobs.json").write_text(json.dumps([[name, str(pipe), str(lora)] for name, pipe, lora in jobs]))
    save_file(inputs(), folder / "inputs.safetensors")
    script = Path(shutil.copy(Path(__file__).with_name("stock_diffusers.py"), folder))
    names = ("jobs.json", "inputs.safetensors", "out.safetensors")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command: list[Any] = [sys.executable, script, *(folder / name for name in names)]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    return load_file(folder / "out.safetensors")


@pytest.fixture(scope="module")
def outside(tmp_path_factory: Factory) -> dict[str, Tensor]:
    """What diffusers alone computes from our exports, and what we compute ourselves, by job and scale."""
    folder = tmp_path_factory.mktemp("outside")
    torch.manual_seed(0)
    jobs, recorded = [], {}
    for kind, name in JOBS:
        pipe = PIPELINES[kind]()
        adapter = save_adapter(pipe, CONFIGS[name], folder / f"{kind}-{name}")
        export_lora(adapter, pipe, adapter, dtype=torch.float32)
        export_lora(adapter, pipe, folder / f"{kind}-{name}-half")
        recorded[f"base/{kind}"] = predict(pipe, None)
        load_ether(pipe, adapter)
        for scale in (0.0, 0.5, 1.0):
            recorded[f"native/{kind}/{name}/{scale}"] = predict(pipe, scale)
        jobs.append((f"{kind}/{name}", folder / kind, adapter))
        jobs.append((f"{kind}/{name}/half", folder / kind, folder / f"{kind}-{name}-half"))
    for kind, build in PIPELINES.items():
        build().save_pretrained(folder / kind)
        with_text = folder / f"{kind}-text"
        recorded[f"native/{kind}/text"] = export_with_text_encoder(build(), with_text)
        jobs.append((f"{kind}/with_text", folder / kind, with_text))
    return recorded | run_stock_diffusers(jobs, folder)


def export_with_text_encoder(pipe: DiffusionPipeline, folder: Path) -> Tensor:
    """Export adapters of the UNet and of every text encoder, and return what the first of these computes."""
    train(pipe.unet, CONFIGS["ether"])
    for name in ("text_encoder", "text_encoder_2"):
        if name in pipe.components:
            train(getattr(pipe, name), EtherConfig(target_modules=["q_proj", "out_proj", "fc1"]))
    save_ether(pipe, folder)
    export_lora(folder, pipe, folder, dtype=torch.float32)
    with torch.no_grad():
        state: Tensor = pipe.text_encoder(inputs()["tokens"]).last_hidden_state
    return state


@pytest.mark.parametrize(("kind", "name"), JOBS)
def test_stock_diffusers_computes_the_export(outside: dict[str, Tensor], kind: str, name: str) -> None:
    for scale in (0.0, 0.5, 1.0):
        native = outside[f"native/{kind}/{name}/{scale}"]
        assert relative_error(outside[f"{kind}/{name}/{scale}"], native) < 1e-5
        if scale == 0.5:
            assert relative_error(outside[f"{kind}/{name}/set_adapters"], native) < 1e-5
        effect = relative_error(native, outside[f"base/{kind}"])
        assert (effect == 0) if scale == 0 else (effect > 1e-2)
    # factors rounded to 11 bits: 7e-4 of the update in each weight, averaged down by the layers
    native = outside[f"native/{kind}/{name}/1.0"]
    assert relative_error(outside[f"{kind}/{name}/half/1.0"], native) < 1e-3


@pytest.mark.parametrize("kind", PIPELINES)
def test_text_encoders_are_exported_with_the_unet(outside: dict[str, Tensor], kind: str) -> None:
    native = outside[f"native/{kind}/text"]
    assert relative_error(outside[f"{kind}/with_text/text"], native) < 1e-5


def test_ranks_that_differ_are_padded_to_one(tmp_path: Path) -> None:
    pipe = tiny_sd()
    adapter = save_adapter(pipe, CONFIGS["mixed_blocks"], tmp_path)
    tensors = load_file(export_lora(adapter, pipe, tmp_path))
    assert {len(t) for k, t in tensors.items() if k.endswith("lora_down.weight")} == {8}
    assert {t.shape[1] for k, t in tensors.items() if k.endswith("lora_up.weight")} == {8}
    assert {t.item() for k, t in tensors.items() if k.endswith(".alpha")} == {8.0}


def header_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def test_the_header_says_what_the_file_is_and_on_which_base_it_is_exact(tmp_path: Path) -> None:
    pipe = tiny_sd()
    adapter = save_adapter(pipe, CONFIGS["ether_plus"], tmp_path)
    header = header_of(export_lora(adapter, pipe, tmp_path, export_name="sks_dog"))
    assert header["format"] == "pt"
    assert header["ss_network_module"] == "networks.lora"
    assert header["ss_network_dim"] == "16"
    assert header["ss_network_alpha"] == "16.0"
    assert header["modelspec.title"] == "sks_dog"
    assert header["modelspec.trigger_phrase"] == "a photo of sks dog"
    assert header["ether.variant"] == "ether_plus"
    assert "exact on this base only" in header["ether.note"]
    trained_on = read_adapter(adapter).metadata.base_fingerprint
    assert trained_on is not None
    assert json.loads(header["ether.base_fingerprint"])["architecture"] == trained_on.architecture
    assert "modelspec.architecture" not in header  # a toy belongs to no family


@pytest.mark.parametrize(
    ("name", "sample_size", "version", "architecture", "second"),
    [
        ("sd15", 64, "sd_v1", "stable-diffusion-v1/lora", None),
        ("sd21", 96, "sd_v2_v", "stable-diffusion-v2-768-v/lora", "True"),
        ("sd21", 64, "sd_v2", "stable-diffusion-v2-512/lora", "True"),
        ("sdxl", 128, "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", None),
    ],
)
def test_the_header_names_the_family_of_a_real_unet(
    name: str, sample_size: int, version: str, architecture: str, second: str | None
) -> None:
    unet = meta_unet(name)
    unet.register_to_config(sample_size=sample_size)
    header = lora_header(AdapterPart(EtherConfig(), {}), rank=4, title="x", denoiser=unet)
    assert header["ss_base_model_version"] == version
    assert header["modelspec.architecture"] == architecture
    assert header.get("ss_v2") == second  # by which A1111 tells 2.x from 1.x


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Factory) -> Path:
    torch.manual_seed(0)
    return save_adapter(tiny_sd(), CONFIGS["ether"], tmp_path_factory.mktemp("saved") / "adapter")


@pytest.fixture
def trained(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def merged(folder: Path) -> DiffusionPipeline:
    pipe = tiny_sd()
    load_ether(pipe, folder)
    pipe.fuse_lora(components=["unet"])
    return pipe


def of_component(folder: Path, component: str) -> Adapter:
    part = read_adapter(folder).first
    return Adapter({"unet": part, component: part})


ANOTHER = "projections are not in|another architecture than"
REFUSED: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: export_lora(f, tiny_sd(seed=7), f), r"made for .*tiny.* other weights; .*--rebake"),
    (lambda f: export_lora(f, tiny_sdxl(), f), ANOTHER),
    (lambda f: export_lora(f, tiny_sdxl(), f, rebake=True), ANOTHER),
    (lambda f: export_lora(f, tiny_sd().unet.to("meta"), f), "meta device"),
    (lambda f: export_lora(f, merged(f), f), "is merged into"),
    (lambda f: export_lora(of_component(f, "vae"), tiny_sd(), f), "diffusers reads no LoRA of vae from"),
    (lambda f: export_lora(of_component(f, "text_encoder_2"), tiny_sd(), f), "no LoRA of text_encoder_2"),
    (lambda f: export_lora(of_component(f, "transformer_2"), tiny_sd(), f), "no LoRA of transformer_2"),
    (lambda f: export_lora(f, tiny_sd(), f, export_name="../x"), "is not a file name"),
    (lambda f: export_lora(f, tiny_sd(), f, export_name="a/b"), "is not a file name"),
    (lambda f: export_lora(f, tiny_sd(), f, export_name=""), "is not a file name"),
    (lambda f: export_lora(f, tiny_sd(), f, export_name=".safetensors"), "is not a file name"),
    (lambda f: export_lora(f, tiny_sd(), f, export_name="a\\b"), "is not a file name"),
    (lambda f: export_merged(f, tiny_sd(), f.parent / "new", scale=float("nan")), "not a finite number"),
    (lambda f: export_merged(f, tiny_sd(), f), "not empty"),
]


@pytest.mark.parametrize(("export", "words"), REFUSED)
def test_what_cannot_be_exported_is_refused_and_nothing_on_the_disk_changes(
    export: Callable[[Path], object], words: str, trained: Path
) -> None:
    before = files_in(trained.parent)
    with pytest.raises((ValueError, FileExistsError), match=words):
        export(trained)
    assert files_in(trained.parent) == before


@pytest.mark.parametrize(
    ("targets", "unet_targets"),
    [
        (["q_proj"], ["to_q"]),
        (["k_proj", "v_proj"], ["to_q"]),
        (["q_proj", "fc1"], ["to_q", "time_embedding.linear_1"]),
        (["fc2"], ["to_q", "time_embedding.linear_1"]),
    ],
)
def test_a_text_encoder_is_read_whatever_of_it_is_adapted(
    targets: list[str], unet_targets: list[str], tmp_path: Path
) -> None:
    pipe = tiny_sd()
    train(pipe.unet, EtherConfig(target_modules=unet_targets))
    train(pipe.text_encoder, EtherConfig(target_modules=targets))
    save_ether(pipe, tmp_path)
    export_lora(tmp_path, pipe, tmp_path, dtype=torch.float32)
    other = tiny_sd()
    other.load_lora_weights(tmp_path, weight_name=EXPORT_NAME)
    assert relative_error(predict(other, None), predict(pipe, None)) < 1e-5
    tokens = inputs()["tokens"]
    with torch.no_grad():
        native = pipe.text_encoder(tokens).last_hidden_state
        assert relative_error(other.text_encoder(tokens).last_hidden_state, native) < 1e-5
        assert relative_error(tiny_sd().text_encoder(tokens).last_hidden_state, native) > 1e-3


def kandinsky_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
        encoder_hid_dim=16,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
        addition_embed_type="image",
        only_cross_attention=False,
    )


@pytest.mark.parametrize(
    ("build", "targets"), [(motion_unet, ["to_q"]), (kandinsky_unet, ["to_q", "add_k_proj"])]
)
def test_unets_that_kohya_has_no_keys_for_are_exported_with_those_of_diffusers(
    build: Callable[[], UNet2DConditionModel], targets: list[str], tmp_path: Path
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        unet = build()
    other = copy.deepcopy(unet)
    train(unet, EtherConfig(target_modules=targets))
    save_ether(unet, tmp_path)
    path = export_lora(tmp_path, other, tmp_path, dtype=torch.float32)
    other.load_lora_adapter(tmp_path, weight_name=path.name, prefix="unet", adapter_name="x")
    for name, sides in read_adapter(tmp_path).projections().items():
        layer = other.get_submodule(name)
        expected = dense_update(layer.get_base_layer().weight.detach(), sides)
        torch.testing.assert_close(layer.get_delta_weight("x").double(), expected, rtol=0, atol=1e-6)


def test_the_same_base_in_half_precision_needs_no_rebake(trained: Path, tmp_path: Path) -> None:
    half = load_file(
        export_lora(trained, tiny_sd().to(torch.float16), tmp_path / "half", dtype=torch.float32)
    )
    full = load_file(export_lora(trained, tiny_sd(), tmp_path / "full", dtype=torch.float32))
    for key in full:
        torch.testing.assert_close(half[key], full[key], rtol=1e-2, atol=1e-3)  # the base's own rounding


def test_a_base_that_carries_the_adapter_exports_the_same_file(trained: Path, tmp_path: Path) -> None:
    pipe = tiny_sd()
    plain = load_file(export_lora(trained, pipe, tmp_path / "plain"))
    load_ether(pipe, trained)
    carried = load_file(export_lora(trained, pipe, tmp_path / "carried"))
    assert plain.keys() == carried.keys()
    assert all(torch.equal(plain[key], carried[key]) for key in plain)


def test_an_earlier_export_is_replaced_by_the_same_bytes_and_a_foreign_file_is_not(trained: Path) -> None:
    pipe = tiny_sd()
    path = export_lora(trained, pipe, trained)
    once = path.read_bytes()
    assert export_lora(trained, tiny_sd(), trained) == path
    assert path.read_bytes() == once
    save_file({"lora_unet_x.alpha": torch.ones(())}, path)
    with pytest.raises(ValueError, match="is there already and is no export"):
        export_lora(trained, pipe, trained)


def test_rebaking_gives_the_reflection_of_the_other_bases_weights(trained: Path, tmp_path: Path) -> None:
    other = tiny_sd(seed=7)
    path = export_lora(trained, other, tmp_path / "rebaked", dtype=torch.float32, rebake=True)
    tensors = load_file(path)
    weights = {}
    for name, sides in read_adapter(trained).projections().items():
        weights[name] = other.unet.get_submodule(name).weight.detach()
        key = "lora_unet_" + name.replace(".", "_")
        update = tensors[f"{key}.lora_up.weight"].double() @ tensors[f"{key}.lora_down.weight"].double()
        torch.testing.assert_close(update, dense_update(weights[name], sides), rtol=0, atol=1e-6)
    stamped = json.loads(header_of(path)["ether.base_fingerprint"])
    expected = fingerprint(weights)
    assert expected is not None
    assert stamped["norms"] == list(expected.norms)


# merged models


def test_a_merged_model_is_the_base_with_the_adapters_weights(trained: Path, tmp_path: Path) -> None:
    pipe = tiny_sd()
    before = predict(pipe, None)
    folder = export_merged(trained, pipe, tmp_path / "merged", scale=0.5)
    assert torch.equal(predict(pipe, None), before)
    merged = DiffusionPipeline.from_pretrained(folder)
    load_ether(pipe, trained)
    assert relative_error(predict(merged, None), predict(pipe, 0.5)) < 1e-5
    assert not list(tmp_path.glob(".*"))


def test_merging_keeps_the_dtype_and_at_scale_0_the_weights(trained: Path, tmp_path: Path) -> None:
    pipe = tiny_sd().to(torch.float16)
    export_merged(trained, pipe, tmp_path / "merged", scale=0.0)
    merged = load_file(tmp_path / "merged" / "unet" / "diffusion_pytorch_model.safetensors")
    for name, weight in pipe.unet.state_dict().items():
        assert torch.equal(merged[name], weight), name


def test_a_failed_merge_leaves_nothing_behind(trained: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    pipe = tiny_sd()
    before = pipe.unet.mid_block.attentions[0].proj_in.weight.clone()

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(pipe.vae, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        export_merged(trained, pipe, tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]
    assert torch.equal(pipe.unet.mid_block.attentions[0].proj_in.weight, before)
