"""Exported files, read by tools that have never heard of ETHER, compute what the adapter computes."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import pytest
import torch
from diffusers import DiffusionPipeline
from oracles import dense_weight
from real_configs import meta_unet
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pipelines import CONTEXT, LATENT, tiny_sd, tiny_sdxl
from torch import Tensor

from ether_diffusion import EtherConfig
from ether_diffusion.adapter_file import (
    Adapter,
    AdapterMetadata,
    fingerprint,
    load_ether,
    read_adapter,
    save_ether,
)
from ether_diffusion.export import export_lora, export_merged
from ether_diffusion.export.factors import LoraFactors, lora_factors, lora_tensors, stored_factors
from ether_diffusion.export.header import lora_header
from ether_diffusion.export.keys import lora_keys
from ether_diffusion.reflections import Vectors

CONFIGS = {
    "ether": EtherConfig(init_weights=False),
    "ether_plus": EtherConfig(variant="ether_plus", init_weights=False),
    "ether_plus_input": EtherConfig(variant="ether_plus", sides="input", num_blocks=2, init_weights=False),
    "ether_output": EtherConfig(sides="output", num_blocks=8, init_weights=False),
    "ether_both": EtherConfig(sides="both", init_weights=False),
    "mixed_blocks": EtherConfig(num_blocks_pattern={r"mid_block.*": 8}, init_weights=False),
}
PIPELINES: dict[str, Callable[[], DiffusionPipeline]] = {"sd": tiny_sd, "sdxl": tiny_sdxl}
JOBS = [(kind, name) for kind in PIPELINES for name in CONFIGS]


class Trainable(Protocol):
    def add_adapter(self, config: EtherConfig, name: str) -> None: ...


def train(model: Trainable, config: EtherConfig) -> None:
    """Give a model an adapter as training would leave it: far from the identity, on every side."""
    model.add_adapter(replace(config), "default")


def save_adapter(pipe: DiffusionPipeline, config: EtherConfig, folder: Path) -> Path:
    """Save a trained adapter of the UNet and leave the pipeline without it."""
    train(pipe.unet, config)
    save_ether(pipe, folder, trigger="a photo of sks dog", base_model="tiny")
    pipe.unet.delete_adapters("default")
    return folder


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "sample": torch.randn(2, 4, LATENT, LATENT, generator=generator),
        "timestep": torch.tensor([3, 700]),
        "context": torch.randn(2, 7, CONTEXT, generator=generator),
        "context_xl": torch.randn(2, 7, 2 * CONTEXT, generator=generator),
        "pooled": torch.randn(2, CONTEXT, generator=generator),
        "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(2, 1),
        "tokens": torch.tensor([[0, 5, 9, 30, 1]]),
    }


def predict(pipe: DiffusionPipeline, scale: float | None) -> Tensor:
    x = inputs()
    is_xl = "XL" in type(pipe).__name__
    with torch.no_grad():
        sample: Tensor = pipe.unet(
            x["sample"],
            x["timestep"],
            x["context_xl"] if is_xl else x["context"],
            added_cond_kwargs={"text_embeds": x["pooled"], "time_ids": x["time_ids"]} if is_xl else {},
            cross_attention_kwargs=None if scale is None else {"scale": scale},
        ).sample
    return sample


def run_stock_diffusers(jobs: list[tuple[str, Path, Path]], folder: Path) -> dict[str, Tensor]:
    """Load LoRA files in a process that cannot import this package, and return what the UNets compute."""
    (folder / "jobs.json").write_text(json.dumps([[name, str(pipe), str(lora)] for name, pipe, lora in jobs]))
    save_file(inputs(), folder / "inputs.safetensors")
    script = Path(shutil.copy(Path(__file__).with_name("stock_diffusers.py"), folder))
    subprocess.run(
        [
            sys.executable,
            script,
            folder / "jobs.json",
            folder / "inputs.safetensors",
            folder / "out.safetensors",
        ],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    return load_file(folder / "out.safetensors")


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What diffusers alone computes from our exports, and what we compute ourselves, by job and scale."""
    folder = tmp_path_factory.mktemp("outside")
    torch.manual_seed(0)
    jobs, recorded = [], {}
    for kind, build in PIPELINES.items():
        build().save_pretrained(folder / kind)
        for name, config in CONFIGS.items():
            pipe = build()
            adapter = save_adapter(pipe, config, folder / f"{kind}-{name}")
            export_lora(adapter, pipe, adapter, dtype=torch.float32)
            export_lora(adapter, pipe, folder / f"{kind}-{name}-half")
            recorded[f"base/{kind}"] = predict(pipe, None)
            load_ether(pipe, adapter)
            for scale in (0.0, 0.5, 1.0):
                recorded[f"native/{kind}/{name}/{scale}"] = predict(pipe, scale)
            jobs.append((f"{kind}/{name}", folder / kind, adapter))
            jobs.append((f"{kind}/{name}/half", folder / kind, folder / f"{kind}-{name}-half"))
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


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(("kind", "name"), JOBS)
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_stock_diffusers_computes_the_adapter_from_the_export(
    outside: dict[str, Tensor], kind: str, name: str, scale: float
) -> None:
    native = outside[f"native/{kind}/{name}/{scale}"]
    assert relative_error(outside[f"{kind}/{name}/{scale}"], native) < 1e-5
    if scale == 0.5:
        assert relative_error(outside[f"{kind}/{name}/set_adapters"], native) < 1e-5
    effect = relative_error(native, outside[f"base/{kind}"])
    assert (effect == 0) if scale == 0 else (effect > 1e-2)


@pytest.mark.parametrize(("kind", "name"), JOBS)
def test_a_float16_export_is_within_a_thousandth(outside: dict[str, Tensor], kind: str, name: str) -> None:
    # factors rounded to 11 bits: 7e-4 of the update in each weight, averaged down by the layers
    native = outside[f"native/{kind}/{name}/1.0"]
    assert relative_error(outside[f"{kind}/{name}/half/1.0"], native) < 1e-3


@pytest.mark.parametrize("kind", PIPELINES)
def test_text_encoders_are_exported_with_the_unet(outside: dict[str, Tensor], kind: str) -> None:
    native = outside[f"native/{kind}/text"]
    assert relative_error(outside[f"{kind}/with_text/text"], native) < 1e-5


# The block names that diffusers, A1111, ComfyUI and InvokeAI read, and the transformer blocks in each.
SD15_BLOCKS = {
    **{f"down_blocks_{i}_attentions_{j}": 1 for i in (0, 1, 2) for j in (0, 1)},
    "mid_block_attentions_0": 1,
    **{f"up_blocks_{i}_attentions_{j}": 1 for i in (1, 2, 3) for j in (0, 1, 2)},
}
SDXL_BLOCKS = {
    **{f"down_blocks_{i}_attentions_{j}": depth for i, depth in ((1, 2), (2, 10)) for j in (0, 1)},
    "mid_block_attentions_0": 10,
    **{f"up_blocks_{i}_attentions_{j}": depth for i, depth in ((0, 10), (1, 2)) for j in (0, 1, 2)},
}


def table_of_keys(blocks: dict[str, int]) -> set[str]:
    return {
        f"lora_unet_{block}_transformer_blocks_{t}_{attention}_{projection}.{part}"
        for block, depth in blocks.items()
        for t in range(depth)
        for attention in ("attn1", "attn2")
        for projection in ("to_q", "to_k", "to_v", "to_out_0")
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }


@pytest.mark.parametrize(
    ("name", "blocks", "count"),
    [("sd15", SD15_BLOCKS, 128), ("sd21", SD15_BLOCKS, 128), ("sdxl", SDXL_BLOCKS, 560)],
)
def test_the_keys_for_a_real_unet_are_those_of_the_table(
    name: str, blocks: dict[str, int], count: int
) -> None:
    unet = meta_unet(name)
    train(unet, EtherConfig())
    layers = {n: m for n, m in unet.named_modules() if hasattr(m, "ether_input_u")}
    keys = lora_keys(layers, "unet", has_two_text_encoders=False)
    factors = {
        keys[n]: stored_factors(lora_factors(m.base_linear.weight, *m.vectors("default")), torch.float16)
        for n, m in layers.items()
    }
    tensors, rank = lora_tensors(factors)
    assert set(tensors) == table_of_keys(blocks)
    assert len(layers) == count
    assert rank == 4
    for n, m in layers.items():
        assert tensors[f"{keys[n]}.lora_down.weight"].shape == (4, m.in_features)
        assert tensors[f"{keys[n]}.lora_up.weight"].shape == (m.out_features, 4)
        assert tensors[f"{keys[n]}.alpha"].item() == 4


# The rules by which two readers take a key apart, as they are written there.
A1111_BLOCK = re.compile(r"lora_unet_(?:down_blocks_(\d+)|mid_block|up_blocks_(\d+))_attentions_(\d+)_(.+)")


def test_a1111_finds_the_sgm_block_of_every_key() -> None:
    sgm = set()
    for key in table_of_keys(SD15_BLOCKS):
        found = A1111_BLOCK.fullmatch(key.split(".", 1)[0])
        assert found is not None
        down, up, index, _ = found.groups()
        sgm.add(
            f"input_blocks_{1 + 3 * int(down) + int(index)}_1"
            if down
            else f"output_blocks_{3 * int(up) + int(index)}_1"
            if up
            else "middle_block_1"
        )
    assert sgm == {
        *(f"input_blocks_{i}_1" for i in (1, 2, 4, 5, 7, 8)),
        "middle_block_1",
        *(f"output_blocks_{i}_1" for i in range(3, 12)),
    }


@pytest.mark.parametrize(
    ("module", "two", "key"),
    [
        ("encoder.layers.3.self_attn.q_proj", False, "lora_te_text_model_encoder_layers_3_self_attn_q_proj"),
        ("text_model.encoder.layers.0.mlp.fc1", True, "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
    ],
)
def test_text_encoder_keys_say_text_model_and_number_sdxls(module: str, two: bool, key: str) -> None:
    assert lora_keys([module], "text_encoder", has_two_text_encoders=two) == {module: key}


def side(width: int, num_blocks: int, *, distance: float | None) -> Vectors:
    """Vectors of ETHER (None) or of ETHER+ with v about `distance` from -u, relative to its norm."""
    u = torch.randn(num_blocks, width // num_blocks) * 0.1
    if distance is None:
        return Vectors(u, None)
    direction = torch.randn_like(u) / u.shape[1] ** 0.5
    return Vectors(u, -u + distance * u.norm(dim=1, keepdim=True) * direction)


def both_sides(
    where: str, *, num_blocks: int, distance: float | None
) -> tuple[Vectors | None, Vectors | None]:
    first = side(96, num_blocks, distance=distance) if where != "output" else None
    second = side(64, num_blocks, distance=distance) if where != "input" else None
    return first, second


def dense_update(weight: Tensor, sides: tuple[Vectors | None, Vectors | None]) -> Tensor:
    wide = [
        None if s is None else Vectors(s.u.double(), None if s.v is None else s.v.double()) for s in sides
    ]
    return dense_weight(weight.double(), *wide) - weight.double()


SIDES_AND_DISTANCES = [(w, d) for w in ("input", "output", "both") for d in (None, 1.0, 1e-1, 1e-3, 1e-6)]


@pytest.mark.parametrize(("where", "distance"), SIDES_AND_DISTANCES)
def test_the_factors_are_the_dense_update_at_the_promised_rank(where: str, distance: float | None) -> None:
    weight = torch.randn(64, 96) / 96**0.5
    sides = both_sides(where, num_blocks=4, distance=distance)
    down, up = lora_factors(weight, *sides)
    assert down.dtype == up.dtype == torch.float64
    torch.testing.assert_close(up @ down, dense_update(weight, sides), rtol=0, atol=1e-14)
    assert len(down) == 4 * (1 if distance is None else 2) * (2 if where == "both" else 1)


@pytest.mark.parametrize(("where", "distance"), SIDES_AND_DISTANCES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.float32, 3e-7)])
def test_rounding_keeps_the_update_however_close_to_the_identity(
    where: str, distance: float | None, dtype: torch.dtype, tolerance: float
) -> None:
    for num_blocks in (1, 4, 16):
        weight = torch.randn(64, 96) / 96**0.5
        sides = both_sides(where, num_blocks=num_blocks, distance=distance)
        down, up = stored_factors(lora_factors(weight, *sides), dtype)
        assert relative_error(up.double() @ down.double(), dense_update(weight, sides)) < tolerance


def test_an_adapter_at_the_identity_exports_zeros() -> None:
    u = torch.randn(4, 24)
    down, up = stored_factors(lora_factors(torch.randn(64, 96), Vectors(u, -u), None), torch.float16)
    assert torch.equal(up @ down, torch.zeros(64, 96, dtype=torch.float16))


def test_the_rank_is_at_most_the_input_width() -> None:
    weight = torch.randn(16, 8)
    u, v = torch.randn(8, 1), torch.randn(8, 1)
    sides = (Vectors(u, v), Vectors(torch.randn(8, 2), torch.randn(8, 2)))
    down, up = lora_factors(weight, *sides)
    assert len(down) == 8
    torch.testing.assert_close(up @ down, dense_update(weight, sides), rtol=0, atol=1e-13)


def test_an_update_too_large_for_float16_is_refused() -> None:
    with pytest.raises(ValueError, match="export in float32"):
        stored_factors(LoraFactors(torch.full((1, 2), 1e6), torch.full((2, 1), 1e6)), torch.float16)


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
    ("name", "version", "architecture"),
    [
        ("sd15", "sd_v1", "stable-diffusion-v1/lora"),
        ("sd21", "sd_v2_v", "stable-diffusion-v2-768-v/lora"),
        ("sdxl", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_the_header_names_the_family_of_a_real_unet(name: str, version: str, architecture: str) -> None:
    adapter = Adapter(EtherConfig(), {}, AdapterMetadata())
    header = lora_header(adapter, rank=4, title="x", unet=meta_unet(name))
    assert header["ss_base_model_version"] == version
    assert header["modelspec.architecture"] == architecture


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    return save_adapter(tiny_sd(), CONFIGS["ether"], tmp_path / "adapter")


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def untouched(tmp_path: Path, trained: Path) -> Iterator[None]:
    """Nothing on disk may change."""
    before = files_in(tmp_path)
    yield
    assert files_in(tmp_path) == before


@pytest.mark.usefixtures("untouched")
def test_other_weights_are_refused_without_rebake(trained: Path) -> None:
    with pytest.raises(ValueError, match=r"not those trained on .*tiny.*--rebake"):
        export_lora(trained, tiny_sd(seed=7), trained)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("rebake", [False, True])
def test_another_architecture_is_refused(trained: Path, rebake: bool) -> None:
    with pytest.raises(ValueError, match=r"the base has no such module|wide and the base's"):
        export_lora(trained, tiny_sdxl(), trained, rebake=rebake)


@pytest.mark.usefixtures("untouched")
def test_modules_without_a_key_are_refused_by_name(trained: Path) -> None:
    pipe = tiny_sd()
    pipe.unet.add_adapter(EtherConfig(target_modules=["time_embedding.linear_1"]), "default")
    name = "time_embedding.linear_1"
    vectors = pipe.unet.get_submodule(name).vectors("default")[0]
    adapter = Adapter(EtherConfig(), {f"{name}.ether_input_u": vectors.u.detach()})
    with pytest.raises(ValueError, match=r"no key for time_embedding\.linear_1"):
        export_lora(adapter, pipe, trained)


@pytest.mark.usefixtures("untouched")
def test_a_base_without_weights_is_refused(trained: Path) -> None:
    with pytest.raises(ValueError, match="on the meta device"):
        export_lora(trained, tiny_sd().unet.to("meta"), trained)


def test_the_same_base_in_half_precision_needs_no_rebake(trained: Path, tmp_path: Path) -> None:
    half = load_file(
        export_lora(trained, tiny_sd().to(torch.float16), tmp_path / "half", dtype=torch.float32)
    )
    full = load_file(export_lora(trained, tiny_sd(), tmp_path / "full", dtype=torch.float32))
    for key in full:
        torch.testing.assert_close(half[key], full[key], rtol=1e-2, atol=1e-3)  # the base's own rounding


@pytest.mark.usefixtures("untouched")
def test_a_base_with_a_merged_adapter_is_refused(trained: Path) -> None:
    pipe = tiny_sd()
    load_ether(pipe, trained)
    pipe.fuse_lora(components=["unet"])
    with pytest.raises(ValueError, match="unmerge it first"):
        export_lora(trained, pipe, trained)


def test_a_base_that_carries_the_adapter_exports_the_same_file(trained: Path, tmp_path: Path) -> None:
    pipe = tiny_sd()
    plain = load_file(export_lora(trained, pipe, tmp_path / "plain"))
    load_ether(pipe, trained)
    carried = load_file(export_lora(trained, pipe, tmp_path / "carried"))
    assert plain.keys() == carried.keys()
    assert all(torch.equal(plain[key], carried[key]) for key in plain)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("name", ["../x", "a/b", "", ".safetensors", "a\\b"])
def test_an_export_name_is_a_file_name(trained: Path, name: str) -> None:
    with pytest.raises(ValueError, match="is not a file name"):
        export_lora(trained, tiny_sd(), trained, export_name=name)


def test_an_earlier_export_is_replaced_and_a_foreign_file_is_not(trained: Path) -> None:
    pipe = tiny_sd()
    path = export_lora(trained, pipe, trained)
    assert export_lora(trained, pipe, trained) == path
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


def test_merging_into_a_folder_with_something_in_it_is_refused(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("mine")
    before = files_in(tmp_path)
    with pytest.raises(FileExistsError, match="not empty"):
        export_merged(trained, tiny_sd(), tmp_path / "full")
    assert files_in(tmp_path) == before


def test_merging_stops_at_a_scale_that_is_not_finite(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a finite number"):
        export_merged(trained, tiny_sd(), tmp_path / "merged", scale=float("nan"))


def test_a_failed_merge_leaves_nothing_behind(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_sd()
    before = pipe.unet.mid_block.attentions[0].proj_in.weight.clone()

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(pipe.vae, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        export_merged(trained, pipe, tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]
    assert torch.equal(pipe.unet.mid_block.attentions[0].proj_in.weight, before)
