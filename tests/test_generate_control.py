"""`ether generate --control_image`: pictures that follow an image, and sentences for what cannot."""

import json
import shutil
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
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


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
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


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "work"))
    return tmp_path / "work"


def test_a_picture_is_what_the_pipeline_draws_with_the_image(work: Path) -> None:
    command = ["--adapter", "follow", "--control_image", "map.png", "--control_strength", "0.5"]
    assert generate(*command, "--output", "x.png") == 0
    pipe = EtherControlPipeline.from_pretrained(work / "base")
    pipe.set_progress_bar_config(disable=True)
    pipe.load_control_weights(work / "follow")
    with Image.open("map.png") as image:
        expected = pipe(
            "abc",
            control_image=image,
            control_strength=0.5,
            num_inference_steps=2,
            guidance_scale=2,
            width=16,
            height=16,
            seed=0,
        ).images[0]
        assert said(Path("x.png")).options["control_image_sha256"] == control_image_sha256(image)
    assert np.array_equal(pixels(Path("x.png")), np.asarray(expected))
    assert said(Path("x.png")).options["control_strength"] == 0.5


def test_the_base_beside_it_sees_no_control(work: Path) -> None:
    assert generate("--adapter", "follow", "--control_image", "map.png", "--grid", "--output", "grid") == 0
    assert generate("--base", "base", "--output", "base.png") == 0
    base = next(path for path in Path("grid/pictures").iterdir() if path.stem.endswith("base"))
    assert np.array_equal(pixels(base), pixels(Path("base.png")))


def test_a_subject_joins_the_control(work: Path) -> None:
    command = ["--adapter", "follow", "--control_image", "map.png"]
    assert generate(*command, "--adapter", "cat", "--output", "both.png") == 0
    assert generate(*command, "--output", "one.png") == 0
    assert {use.name for use in said(Path("both.png")).adapters} == {"follow", "cat"}
    assert not np.array_equal(pixels(Path("both.png")), pixels(Path("one.png")))


def test_without_an_image_a_warning_says_that_the_adapter_follows_one(
    work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert generate("--adapter", "follow", "--output", "x.png") == 0
    assert "follow follows a control image, and there is none; give --control_image" in caplog.text


def test_a_detector_draws_the_control_image_from_a_photo_at_the_pictures_size(work: Path) -> None:
    photo = Image.fromarray(np.random.default_rng(1).integers(0, 256, (4, 4, 3), dtype=np.uint8))
    photo.resize((32, 32), Image.Resampling.BICUBIC).save("photo.png")
    with Image.open("photo.png") as image:
        small = np.asarray(image.resize((16, 16), Image.Resampling.LANCZOS))
    Image.fromarray(cv2.Canny(small, 50, 150)).save("edges.png")
    command = ["--adapter", "follow", "--control_image"]
    canny = ["--control_detector", "canny", "--canny_thresholds", "50", "150"]
    assert generate(*command, "photo.png", *canny, "--output", "x.png") == 0
    assert generate(*command, "edges.png", "--output", "y.png") == 0
    assert cv2.Canny(small, 50, 150).any()
    assert np.array_equal(pixels(Path("x.png")), pixels(Path("y.png")))


def test_a_silhouette_is_taken_from_the_alpha_of_a_photo(work: Path) -> None:
    layer = Image.new("RGBA", (16, 16))
    layer.paste((255, 0, 0, 255), (4, 4, 12, 12))
    layer.save("cut.png")
    shape = Image.new("L", (16, 16))
    shape.paste(255, (4, 4, 12, 12))
    shape.save("shape.png")
    command = ["--adapter", "follow", "--control_image"]
    assert generate(*command, "cut.png", "--control_detector", "silhouette", "--output", "x.png") == 0
    assert generate(*command, "shape.png", "--output", "y.png") == 0
    assert np.array_equal(pixels(Path("x.png")), pixels(Path("y.png")))


def test_a_detector_of_another_type_than_was_trained_with_is_said(
    work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = work / "follow" / "control_config.json"
    path.write_text(path.read_text().replace('"control_type": null', '"control_type": "silhouette"'))
    command = ["--adapter", "follow", "--control_image", "map.png", "--control_detector", "canny"]
    assert generate(*command, "--output", "x.png") == 0
    assert "follow was trained to follow images of type silhouette, not canny" in caplog.text


@pytest.mark.parametrize("method", ["lora", "boft", "none"])
def test_a_control_adapter_of_another_method_draws_as_the_pipeline_does(work: Path, method: str) -> None:
    save_method(work / "other", method)
    command = ["--adapter", "other", "--control_image", "map.png", "--base", "base", "--base_beside"]
    assert generate(*command, "--output", "x") == 0
    pipe = EtherControlPipeline.from_pretrained(work / "base")
    pipe.set_progress_bar_config(disable=True)
    pipe.load_control_weights(work / "other")
    options = {"num_inference_steps": 2, "guidance_scale": 2, "width": 16, "height": 16, "seed": 0}
    with Image.open("map.png") as image:
        expected = pipe("abc", control_image=image, **options).images[0]
    assert np.array_equal(pixels(Path("x/prompt1_seed0_other1.png")), np.asarray(expected))
    pipe.unload()
    assert np.array_equal(
        pixels(Path("x/prompt1_seed0_base.png")), np.asarray(pipe("abc", **options).images[0])
    )


@pytest.mark.parametrize(
    ("method", "flags", "words"),
    [
        ("oft", ["--strength", "0.5"], "other is an adapter of OFT, which has no strengths"),
        ("none", ["--strength", "0.5"], "use --control_strength, not --strength"),
        (
            "lora",
            ["--base", "base", "--adapter", "cat"],
            "adapters of two methods do not work together; found other (LoRA), cat",
        ),
    ],
)
def test_what_a_method_cannot_do_is_said_before_anything_is_loaded(
    work: Path, method: str, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_method(work / "other", method)
    command = ["--adapter", "other", "--control_image", "map.png", "--base", "nowhere"]
    assert generate(*command, *flags, "--output", "x.png") == 2
    assert words in capsys.readouterr().err


def test_an_encoder_by_itself_without_an_image_is_refused(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_method(work / "other", "none")
    assert generate("--adapter", "other", "--base", "base", "--output", "x.png") == 2
    assert "other is a control encoder by itself; give --control_image" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["hra", "none"])
def test_inspect_tells_of_the_adapter_and_the_encoder(
    work: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_method(work / "other", method)
    assert ether.main(["inspect", "other", "--json"]) == 0
    said_of = json.loads(capsys.readouterr().out)
    assert said_of["control"]["scale_factor"] == 1
    assert said_of["control"]["parameters"] == sum(p.numel() for p in read_control("other").parameters())
    if method == "none":
        assert list(said_of) == ["control"]
    else:
        assert (said_of["unet"]["method"], said_of["unet"]["settings"]) == ("HRA", {"r": 4})
        saved = json.loads(Path("other/control_config.json").read_text())
        assert said_of["unet"]["sha256"] == saved["adapter_sha256"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--adapter", "cat", "--base", "base", "--control_image", "map.png"],
            "needs one --adapter that follows",
        ),
        (["--adapter", "follow", "--control_strength", "1"], "give --control_image"),
        (["--adapter", "follow", "--control_image", "none.png"], "none.png"),
        (
            ["--adapter", "follow", "--control_image", "map.png", "--control_strength", "99"],
            "from -10 to 10",
        ),
        (
            ["--adapter", "follow", "--control_image", "map.png", "--size", "16x32"],
            "crop it to the same proportions",
        ),
        (
            ["--adapter", "follow", "--control_image", "map.png", "--control_detector", "cany"],
            "did you mean canny?",
        ),
        (
            ["--adapter", "follow", "--control_image", "map.png", "--control_detector", "silhouette"],
            "map.png has no transparent parts to take a silhouette from",
        ),
        (["--adapter", "follow", "--control_detector", "canny"], "looks at a photo, and there is none"),
        (
            ["--adapter", "follow", "--control_image", "map.png", "--canny_thresholds", "1", "2"],
            "give --control_detector canny",
        ),
        (
            [
                *("--adapter", "follow", "--control_image", "map.png"),
                *("--control_detector", "canny", "--canny_thresholds", "2", "1"),
            ],
            "two numbers from 0, the lower first",
        ),
    ],
)
def test_what_cannot_be_drawn_is_said(
    work: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(*flags, "--output", "x.png") == 2
    assert words in capsys.readouterr().err
    assert not Path("x.png").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--base", "base", "--adapter", "cat"],
        ["--base", "base", "--adapter", "cat", "--adapter", "follow", "--control_image", "map.png"],
        ["--adapter", "follow", "--control_image", "map.png", "--control_detector", "canny"],
        ["--base", "base", "--adapter", "lora"],
        ["--base", "base", "--adapter", "lora", "--control_image", "map.png"],
    ],
    ids=" ".join,
)
def test_each_file_of_an_adapter_is_opened_once(work: Path, arguments: list[str], opens: list[Path]) -> None:
    save_method(work / "lora", "lora")
    opens.clear()
    assert generate(*arguments, "--output", "x.png") == 0
    adapters = [value for name, value in pairwise(arguments) if name == "--adapter"]
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
