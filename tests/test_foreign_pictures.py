"""Pictures of A1111's web UI and of ComfyUI: what means the same here is read, and the rest is named."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin
from studio_folders import DrawingStudio

from ether_diffusion.pipelines.foreign import read_foreign_metadata
from ether_diffusion.ui.restore import restore

LINES = """a (red:1.2) fox, <lora:foxes:0.8>
on a beach
Negative prompt: rain, <lora:bad:1> snow
Steps: 25, Sampler: Euler a, Schedule type: Karras, CFG scale: 6.5, Seed: 1234567890, Size: 64x72, \
Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, Denoising strength: 0.4, \
Lora hashes: "foxes: ab, bad: cd", \
Version: v1.10.1"""
GRAPH: dict[str, Any] = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 42, "steps": 12, "cfg": 8, "sampler_name": "dpmpp_2m", "scheduler": "karras",
            "denoise": 1.0, "model": ["10", 0], "positive": ["9", 0], "negative": ["7", 0],
            "latent_image": ["5", 0],
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "dreamshaper_8.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 72, "height": 64, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "a dog", "clip": ["4", 1]}},
    "9": {"class_type": "ConditioningSetArea", "inputs": {"conditioning": ["6", 0], "strength": 1.0}},
    "10": {"class_type": "LoraLoader", "inputs": {"lora_name": "x.safetensors", "model": ["4", 0]}},
}  # fmt: skip


def png(**texts: str) -> bytes:
    info, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    for name, text in texts.items():
        info.add_itxt(name, text)
    Image.new("RGB", (64, 72)).save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def test_a1111s_lines_are_read() -> None:
    said = read_foreign_metadata(png(parameters=LINES))
    assert said is not None
    assert (said.prompt, said.negative_prompt) == ("a (red:1.2) fox, \non a beach", "rain,  snow")
    assert (said.steps, said.guidance_scale, said.seed) == (25, 6.5, 1234567890)
    assert (said.width, said.height, said.base) == (64, 72, "v1-5-pruned-emaonly")
    assert said.scheduler == "EulerAncestralDiscreteScheduler"
    left = ("lora foxes:0.8", "lora bad:1", "Schedule type", "Denoising strength", "Lora hashes")
    assert said.unrecorded == left


def test_older_lines_without_a_prompt_are_read() -> None:
    said = read_foreign_metadata(png(parameters="Steps: 5, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 1"))
    assert said is not None
    assert (said.prompt, said.negative_prompt, said.steps, said.seed) == ("", None, 5, 1)
    assert (said.width, said.height) == (64, 72)  # those of the picture
    assert (said.scheduler, said.unrecorded) == ("DPMSolverMultistepScheduler", ("Karras",))


def test_comfyuis_graph_is_read() -> None:
    said = read_foreign_metadata(png(prompt=json.dumps(GRAPH), workflow="{}"))
    assert said is not None
    assert (said.prompt, said.negative_prompt, said.seed) == ("a cat", "a dog", 42)
    assert (said.steps, said.guidance_scale, said.width, said.height) == (12, 8.0, 72, 64)
    assert (said.scheduler, said.base) == ("DPMSolverMultistepScheduler", "dreamshaper_8")
    assert said.unrecorded == ("ConditioningSetArea", "LoraLoader", "scheduler karras")


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ({"prompt": "{"}, "is not valid JSON"),
        ({"prompt": "[]"}, "it should"),
        ({"prompt": '{"1": {"class_type": 3, "inputs": {}}}'}, "class_type"),
        ({"prompt": "{}"}, "has no KSampler"),
        ({"workflow": "{}"}, "workflow without what was run"),
        ({"parameters": "Steps: 1\n" + "x" * 2**18}, "characters of parameters; at most"),
    ],
)
def test_what_cannot_be_read_is_said(texts: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_foreign_metadata(png(**texts))


def test_links_in_a_circle_end() -> None:
    round_about = {"9": {"class_type": "Loop", "inputs": {"conditioning": ["9", 0]}}}
    said = read_foreign_metadata(png(prompt=json.dumps(GRAPH | round_about)))
    assert said is not None
    assert said.prompt == ""


def test_other_pictures_say_nothing() -> None:
    assert read_foreign_metadata(png(parameters="a note of mine", Title="x")) is None


def test_the_studio_takes_over_what_it_can(drawing_studio: DrawingStudio, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(parameters=LINES))
    restored = restore(tmp_path / "a.png", drawing_studio.studio)
    request = restored.request
    assert request is not None
    assert (request.prompt, request.negative_prompt) == ("a (red:1.2) fox, \non a beach", "rain,  snow")
    assert (request.steps, request.seed, request.width, request.height) == (25, 1234567890, 64, 72)
    said = " ".join(restored.differences)
    for part in (
        "made with A1111's web UI",
        "v1-5-pruned-emaonly",
        "EulerAncestralDiscrete",
        "lora foxes:0.8",
    ):
        assert part in said
    (tmp_path / "b.png").write_bytes(png(prompt="{"))
    assert restore(tmp_path / "b.png", drawing_studio.studio).request is None
