"""`ether generate --control_image`: pictures that follow an image, and sentences for what cannot."""

import json
import shutil
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from conftest import Capture, Factory, Log, Patch
from control_encoders import random_encoder
from method_adapters import save_method
from PIL import Image
from test_generate import generate, pixels, said
from tiny_pipelines import tiny_sd
from trained_adapters import CONFIGS, save_adapter, train

from ether_diffusion.adapters import AdapterMetadata, detach_adapter
from ether_diffusion.control import control_image_sha256, read_control, save_control
from ether_diffusion.pipelines import EtherControlPipeline
from ether_diffusion.scripts import ether

FOLLOW, CAT = "--adapter follow", "--adapter cat --base base"
MAP = f"{FOLLOW} --control_image map.png"
DRAWN = {"num_inference_steps": 2, "guidance_scale": 2, "width": 16, "height": 16, "seed": 0}


@pytest.fixture(scope="module")
def made(tmp_path_factory: Factory) -> Path:
    """A folder with a base, an adapter with control, a plain one, and a control image."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    tiny_sd().save_pretrained(folder / "base")
    pipe = tiny_sd()
    train(pipe.unet, CONFIGS["ether_plus"])
    metadata = AdapterMetadata(base_model=str(folder / "base"))
    adapter = detach_adapter(pipe.unet, "default", metadata=metadata)
    save_control(folder / "follow", random_encoder(pipe.unet, factor=1), adapter=adapter)
    save_adapter(tiny_sd(), CONFIGS["ether"], folder / "cat")
    values = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(values).save(folder / "map.png")
    return folder


@pytest.fixture(autouse=True)
def work(made: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "work"))


def opened(folder: str) -> Any:
    pipe = EtherControlPipeline.from_pretrained("base")
    pipe.set_progress_bar_config(disable=True)
    pipe.load_control_weights(folder)
    return pipe


def equal(path: str, other: Any) -> bool:
    return np.array_equal(pixels(path), pixels(other) if isinstance(other, str) else np.asarray(other))


def test_a_picture_is_what_the_pipeline_draws_with_the_image() -> None:
    assert generate(f"{MAP} --control_strength 0.5") == 0
    with Image.open("map.png") as image:
        expected = opened("follow")("abc", control_image=image, control_strength=0.5, **DRAWN).images[0]
        assert said("x.png").options["control_image_sha256"] == control_image_sha256(image)
    assert equal("x.png", expected)
    assert said("x.png").options["control_strength"] == 0.5


def test_the_base_beside_it_sees_no_control_and_a_subject_joins_it() -> None:
    assert generate(f"{MAP} --grid", output="grid") == 0
    assert generate("--base base", output="base.png") == 0
    assert equal("grid/pictures/prompt1_seed0_base.png", "base.png")
    assert generate(f"{MAP} --adapter cat", output="both.png") == 0
    assert {use.name for use in said("both.png").adapters} == {"follow", "cat"}
    assert not equal("both.png", "grid/pictures/prompt1_seed0_follow1.png")


def test_what_is_doubtful_is_said(caplog: Log) -> None:
    assert generate(FOLLOW) == 0
    assert "follow follows a control image, and there is none; give --control_image" in caplog.text
    path = Path("follow", "control_config.json")
    path.write_text(path.read_text().replace('"control_type": null', '"control_type": "silhouette"'))
    assert generate(f"{MAP} --control_detector canny", output="y.png") == 0
    assert "follow was trained to follow images of type silhouette, not canny" in caplog.text


def test_a_detector_draws_the_control_image_from_a_photo_at_the_pictures_size() -> None:
    photo = Image.fromarray(np.random.default_rng(1).integers(0, 256, (4, 4, 3), dtype=np.uint8))
    photo.resize((32, 32), Image.Resampling.BICUBIC).save("photo.png")
    with Image.open("photo.png") as image:
        small = np.asarray(image.resize((16, 16), Image.Resampling.LANCZOS))
    Image.fromarray(cv2.Canny(small, 50, 150)).save("edges.png")
    canny = "--control_detector canny --canny_thresholds 50 150"
    assert generate(f"{FOLLOW} --control_image photo.png {canny}") == 0
    assert generate(f"{FOLLOW} --control_image edges.png", output="y.png") == 0
    assert cv2.Canny(small, 50, 150).any()
    assert equal("x.png", "y.png")


def test_a_silhouette_is_taken_from_the_alpha_of_a_photo() -> None:
    layer, shape = Image.new("RGBA", (16, 16)), Image.new("L", (16, 16))
    layer.paste((255, 0, 0, 255), (4, 4, 12, 12))
    layer.save("cut.png")
    shape.paste(255, (4, 4, 12, 12))
    shape.save("shape.png")
    assert generate(f"{FOLLOW} --control_image cut.png --control_detector silhouette") == 0
    assert generate(f"{FOLLOW} --control_image shape.png", output="y.png") == 0
    assert equal("x.png", "y.png")


@pytest.mark.parametrize("method", ["lora", "boft", "none"])
def test_a_control_adapter_of_another_method_draws_as_the_pipeline_does(method: str) -> None:
    save_method(Path("other"), method)
    command = "--adapter other --control_image map.png --base base --base_beside"
    assert generate(command, output="x") == 0
    pipe = opened("other")
    with Image.open("map.png") as image:
        assert equal("x/prompt1_seed0_other1.png", pipe("abc", control_image=image, **DRAWN).images[0])
    pipe.unload()
    assert equal("x/prompt1_seed0_base.png", pipe("abc", **DRAWN).images[0])


@pytest.mark.parametrize("method", ["hra", "none"])
def test_inspect_tells_of_the_adapter_and_the_encoder(method: str, capsys: Capture) -> None:
    save_method(Path("other"), method)
    assert ether.main(["inspect", "other", "--json"]) == 0
    said_of = json.loads(capsys.readouterr().out)
    assert said_of["control"]["scale_factor"] == 1
    assert said_of["control"]["parameters"] == sum(p.numel() for p in read_control("other").parameters())
    assert list(said_of) == (["control"] if method == "none" else ["unet", "control"])
    if method != "none":
        assert (said_of["unet"]["method"], said_of["unet"]["settings"]) == ("HRA", {"r": 4})
        saved = json.loads(Path("other/control_config.json").read_text())
        assert said_of["unet"]["sha256"] == saved["adapter_sha256"]


REFUSED: list[tuple[str, str, str]] = [
    # the method of an adapter `other`, the command, what is said before anything is loaded
    ("oft", "--control_image map.png --strength 0.5", "other is an adapter of OFT, which has no strengths"),
    ("none", "--control_image map.png --strength 0.5", "use --control_strength, not --strength"),
    ("hra", "--adapter cat", "past adapters of other methods; found other (HRA), cat (ETHER)"),
    ("none", "--base base", "other is a control encoder by itself; give --control_image"),
    ("", f"{CAT} --control_image map.png", "needs one --adapter that follows"),
    ("", f"{FOLLOW} --control_strength 1", "give --control_image"),
    ("", f"{FOLLOW} --control_image none.png", "none.png"),
    ("", f"{MAP} --control_strength 99", "from -10 to 10"),
    ("", f"{MAP} --size 16x32", "crop it to the same proportions"),
    ("", f"{MAP} --control_detector cany", "did you mean canny?"),
    (
        "",
        f"{MAP} --control_detector silhouette",
        "map.png has no transparent parts to take a silhouette from",
    ),
    ("", f"{FOLLOW} --control_detector canny", "looks at a photo, and there is none"),
    ("", f"{MAP} --canny_thresholds 1 2", "give --control_detector canny"),
    ("", f"{MAP} --control_detector canny --canny_thresholds 2 1", "two numbers from 0, the lower first"),
]


@pytest.mark.parametrize(("method", "command", "words"), REFUSED)
def test_what_cannot_be_drawn_is_said(method: str, command: str, words: str, capsys: Capture) -> None:
    if method:
        save_method(Path("other"), method)
        command = f"--adapter other --base nowhere {command}"
    assert generate(command) == 2
    assert words in capsys.readouterr().err
    assert not Path("x.png").exists()


@pytest.mark.parametrize(
    "command",
    [
        CAT,
        f"{CAT} {MAP}",
        f"{MAP} --control_detector canny",
        "--base base --adapter lora",
        "--base base --adapter lora --control_image map.png",
        "--base base --adapter lora --adapter cat",
    ],
)
def test_each_file_of_an_adapter_is_opened_once(command: str, opens: list[Path]) -> None:
    save_method(Path("lora"), "lora")
    opens.clear()
    assert generate(command) == 0
    adapters = [value for name, value in pairwise(command.split()) if name == "--adapter"]
    files = {path.resolve() for name in adapters for path in Path(name).iterdir() if path.suffix != ".md"}
    assert sorted(path for path in opens if path.parent.name in adapters) == sorted(files)


@pytest.fixture
def opens() -> Iterator[list[Path]]:
    """Every path that is opened for reading, as Python itself reports it."""
    found: list[Path] = []
    is_on = [True]

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if is_on and event == "open" and isinstance(arguments[0], str):
            found.append(Path(arguments[0]).resolve())

    sys.addaudithook(hook)
    yield found
    is_on.clear()  # a hook stays for good
