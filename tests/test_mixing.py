"""A mix of adapters, saved as one: it draws what they draw together, and says what it was made of."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from method_adapters import METHODS, save_for_tiny_world
from peft import PeftModel
from studio_files import save_tiny_world_adapter
from studio_folders import QUICK, begin, last, pixels

from ether_diffusion import EtherConfig, save_ether
from ether_diffusion.adapters import read_adapter, write_adapter
from ether_diffusion.adapters.methods import quiet
from ether_diffusion.bases import load_base, open_base
from ether_diffusion.export import export_merged
from ether_diffusion.mixing import Ingredient, mix_adapters
from ether_diffusion.scripts import ether
from ether_diffusion.serving.engine import Engine, Request
from ether_diffusion.tiny_world import tiny_world_path
from ether_diffusion.ui.studio import Studio


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fox and cat of ETHER+, text of the UNet and the text encoder, and one of every other method."""
    folder = tmp_path_factory.mktemp("saved")
    for seed, name in enumerate(("fox", "cat")):
        save_tiny_world_adapter(folder / name, seed=seed)
    pipeline = load_base("tiny_world")
    torch.manual_seed(5)
    pipeline.unet.add_adapter(EtherConfig(num_blocks=2))
    pipeline.text_encoder.add_adapter(EtherConfig(num_blocks=2, target_modules=["q_proj", "v_proj"]))
    save_ether(pipeline, folder / "text", base_model="tiny_world", trigger="a sks boat")
    for method in METHODS:
        save_for_tiny_world(folder / method, method)
    # a rotation by as much as the others' noise makes a picture of noise, which any rounding changes
    oft = read_adapter(folder / "oft").first
    small = {name: 0.2 * tensor for name, tensor in oft.tensors.items()}
    write_adapter(folder / "oft", replace(oft, tensors=small), card=False)
    save_for_tiny_world(folder / "hra2", "hra")
    return folder


def draw(adapters: dict[str, Any], strengths: dict[str, float]) -> np.ndarray:
    engine = Engine(open_base("tiny_world"), device=torch.device("cpu"), num_slots=None)
    for name, adapter in adapters.items():
        engine.add_adapter(name, adapter)
    (image,) = engine.draw([Request(prompt="a red fox on a beach", adapters=strengths, steps=6)])
    return np.asarray(image.convert("RGB")).astype(int)


MIXES = [
    {"fox": 0.8, "cat": 0.5}, {"fox": 0.7, "text": 1.2}, {"fox": 0.8, "lora": 0.5},
    {"cat": 0.5, "delora": 0.7}, {"oft": 1.0, "fox": 0.6},
    {"boft": 1.0, "lora": 0.5}, {"hra": 1.0, "hra2": 1.0}, {"ia3": 1.0, "fox": 0.6},
]  # fmt: skip


@pytest.mark.parametrize("mix", MIXES, ids=" ".join)
def test_a_mix_that_is_saved_draws_what_the_adapters_draw_together(
    saved: Path, tmp_path: Path, mix: dict[str, float]
) -> None:
    words = [word for name in mix for word in ("--adapter", str(saved / name))]
    strengths = ["--strength", *map(str, mix.values())]
    assert ether.main(["mix", *words, *strengths, "--output", str(tmp_path / "mix")]) == 0
    together = draw({name: read_adapter(saved / name) for name in mix}, mix)
    mixed = read_adapter(tmp_path / "mix")
    assert mixed.method == "LoRA"
    assert np.abs(draw({"mix": mixed}, {"mix": 1.0}) - together).max() <= 1
    assert np.abs(draw({}, {}) - together).max() > 20  # or it would say nothing
    said = " ".join(map(str, mixed.metadata.training.values()))
    card = (tmp_path / "mix" / "README.md").read_text(encoding="utf-8")
    for name, strength in mix.items():
        sha256 = next(iter(read_adapter(saved / name).hashes.values()))[:16]
        assert f"{name} at {strength:g}" in said
        assert sha256 in card


def test_a_mix_is_the_sum_of_what_merging_adds_to_every_weight(saved: Path, tmp_path: Path) -> None:
    base = load_base("tiny_world")
    mixed = mix_adapters(
        [Ingredient(name, read_adapter(saved / name), s) for name, s in (("fox", 0.5), ("cat", -0.25))], base
    )
    parts = [load_base(export_merged(saved / name, base, tmp_path / name)).unet for name in ("fox", "cat")]
    of_base = base.unet.state_dict()
    for name in mixed.first.modules():
        weight = of_base[f"{name}.weight"].double()
        others = [part.get_submodule(name).weight.detach().double() for part in parts]
        down, up = (mixed.tensors[f"{name}.lora_{side}.weight"].double() for side in "AB")
        expected = 0.5 * (others[0] - weight) - 0.25 * (others[1] - weight)
        torch.testing.assert_close(up @ down, expected, rtol=0, atol=2e-3 * float(expected.abs().max()))
    assert mixed.metadata.base_fingerprint is not None
    assert mixed.config.r == 32  # of ETHER+ with four blocks on two sides, 16 each


def test_what_cannot_be_mixed_is_refused_in_a_sentence(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for names, strengths, words in (
        (["fox"], [], "two adapters or more; found 1"),
        ([], [], "two adapters or more; found 0"),
        (["fox", "oft"], ["0.5"], "oft is an adapter of OFT, which has no strengths"),
        (["fox", "hra"], [], "HRA reads the weights past adapters of other methods"),
        (["fox", "cat"], ["1", "1", "1"], "found 3 strengths for 2 adapters"),
    ):
        given = [word for name in names for word in ("--adapter", str(saved / name))]
        given += ["--strength", *strengths] if strengths else []
        assert ether.main(["mix", *given, "--output", str(tmp_path / "mix")]) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "mix").exists()


def test_adapters_of_every_method_and_of_text_encoders_draw_in_the_studio_as_by_peft(
    saved: Path, tmp_path: Path
) -> None:
    studio, seen = Studio(tmp_path / "studio", base="tiny_world"), set[bytes]()
    for name in ("fox", "text", *METHODS):
        card = studio.library.add_run_result(saved / name, name)
        assert card.fits_base
        assert card.match == "same"
        end = last(begin(studio.engine, replace(QUICK, adapters={card.id: 1.0})))
        pipe = StableDiffusionPipeline.from_pretrained(tiny_world_path())
        with quiet():  # what BOFT says of kernels that are not there
            pipe.unet = PeftModel.from_pretrained(pipe.unet, saved / name)
        if name == "text":
            pipe.text_encoder = PeftModel.from_pretrained(pipe.text_encoder, saved / name / "text_encoder")
        noise = torch.Generator("cpu").manual_seed(QUICK.seed)
        options = {"num_inference_steps": QUICK.steps, "guidance_scale": QUICK.guidance_scale}
        expected = np.asarray(pipe(QUICK.prompt, generator=noise, **options).images[0]).astype(int)
        drawn = pixels(end.pictures[0].path)
        assert np.abs(drawn - expected).max() <= 1, name
        seen.add(drawn.tobytes())
    assert len(seen) == 2 + len(METHODS)
