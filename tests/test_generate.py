"""`ether generate`: pictures and grids from the command line, and sentences for what cannot be drawn."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Capture, Factory, Log, Patch
from diffusers import StableDiffusionPipeline
from PIL import Image
from tiny_pipelines import tiny_sd, tiny_sdxl
from trained_adapters import CONFIGS, train

from ether_diffusion import load_ether, save_ether
from ether_diffusion.bases import open_base
from ether_diffusion.pipelines import ImageMetadata, read_image_metadata
from ether_diffusion.pipelines.opening import SCHEDULERS, make_scheduler
from ether_diffusion.pipelines.sampling import Start
from ether_diffusion.scripts import ether
from ether_diffusion.scripts.drawing import adapter_names
from ether_diffusion.serving.engine import Engine, Request
from ether_diffusion.tiny_world import tiny_world_path

ROOT = Path(__file__).parent.parent
QUICK = "--steps 2 --guidance_scale 2 --size 16"


def save_fox(folder: Path, kind: str, **facts: Any) -> None:
    pipe = tiny_sd()
    train(pipe.unet, CONFIGS[kind])
    save_ether(pipe, folder, **facts)


@pytest.fixture(scope="module")
def made(tmp_path_factory: Factory) -> Path:
    """A folder with a base, another of the same architecture, an SDXL, and adapters fox and cat."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    tiny_sd().save_pretrained(folder / "base")
    tiny_sd(seed=7).save_pretrained(folder / "other")
    tiny_sdxl().save_pretrained(folder / "xl")
    for name, kind in (("fox", "ether_plus"), ("cat", "ether")):
        save_fox(folder / name, kind, base_model=str(folder / "base"))
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: Patch) -> Path:
    """A fresh working directory that links to what was made."""
    for part in made.iterdir():
        (tmp_path / part.name).symlink_to(part)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def generate(command: str, *, prompt: str = "--prompt abc", output: str = "x.png") -> int:
    return ether.main(f"generate {QUICK} {prompt} --output {output} {command}".split())


def said(path: str | Path) -> ImageMetadata:
    found = read_image_metadata(path)
    assert found is not None
    return found


def uses(path: str) -> list[tuple[str, float | None]]:
    return [(use.name, use.strength) for use in said(path).adapters]


def pixels(path: str | Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.usefixtures("work")
def test_a_picture_is_what_diffusers_draws_with_load_ether() -> None:
    assert generate("--base base --adapter fox --strength 0.7 --seed 5") == 0
    pipe = StableDiffusionPipeline.from_pretrained("base")
    pipe.set_progress_bar_config(disable=True)
    load_ether(pipe, "fox", adapter_name="fox")
    pipe.set_adapters(["fox"], [0.7])
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "width": 16, "height": 16}
    expected = pipe("abc", generator=torch.Generator().manual_seed(5), **options).images[0]
    assert np.array_equal(pixels("x.png"), np.asarray(expected))
    metadata = said("x.png")
    assert (metadata.prompt, metadata.seed, metadata.steps, metadata.base) == ("abc", 5, 2, "base")
    assert uses("x.png") == [("fox", 0.7)]


def test_base_and_prompt_are_those_that_the_adapter_names(work: Path, capsys: Capture) -> None:
    save_fox(work / "sks", "ether", base_model=str(work / "base"), trigger="a sks")
    assert generate("--adapter sks", prompt="") == 0
    assert capsys.readouterr().out == "x.png\n"
    assert (said("x.png").base, said("x.png").prompt) == ("base", "a sks")
    assert generate("--adapter fox", prompt="", output="y.png") == 2
    assert "found no --prompt, and no adapter that names its trigger" in capsys.readouterr().err
    for name, base in (("named", "my-base"), ("nameless", None)):
        save_fox(work / name, "ether", base_model=base)
        assert generate(f"--adapter {name}", output="y.png") == 2
    told = capsys.readouterr().err
    assert "named was made for 'my-base'; say with --base where that is" in told
    assert "nameless does not say what its base is; give --base" in told


@pytest.mark.usefixtures("work")
def test_several_pictures_are_a_folder_with_a_seed_each() -> None:
    assert generate("--adapter fox --prompt xyz --num_images 2 --seed 3", output="some/folder") == 0
    found = {path.name: said(path) for path in Path("some/folder").iterdir()}
    assert {name: (m.prompt, m.seed) for name, m in found.items()} == {
        f"prompt{place}_seed{seed}_fox1.png": (prompt, seed)
        for place, prompt in ((1, "abc"), (2, "xyz"))
        for seed in (3, 4)
    }


def test_the_same_command_writes_the_same_bytes(work: Path) -> None:
    for name in ("a", "b"):
        assert generate("--adapter fox --num_images 2 --grid", output=name) == 0
    files = [{p.relative_to(n): p.read_bytes() for p in Path(n).rglob("*.*")} for n in ("a", "b")]
    assert files[0] == files[1]


def test_a_grid_is_strengths_by_prompts_and_seeds_with_the_base_beside(work: Path) -> None:
    assert generate("--adapter fox --prompt xyz --seed 1 8 --strength 0.5 1 --grid", output="grid") == 0
    grid = work / "grid"
    manifest = json.loads((grid / "grid.json").read_text())
    assert (manifest["choices"], manifest["seeds"]) == ([{}, {"fox": 0.5}, {"fox": 1.0}], [1, 8])
    assert len(manifest["pictures"]) == 2 * 2 * 3
    sheet, corners = pixels(grid / "sheet.png"), {}
    for entry in manifest["pictures"]:
        metadata = said(grid / entry["file"])
        assert json.loads(metadata.to_json()) == entry["metadata"]
        assert metadata.prompt == manifest["prompts"][entry["prompt"]]
        assert metadata.seed == manifest["seeds"][entry["seed"]]
        assert {use.name: use.strength for use in metadata.adapters} == manifest["choices"][entry["choice"]]
        enlarged = pixels(grid / entry["file"]).repeat(11, axis=0).repeat(11, axis=1)
        height, width, _ = enlarged.shape
        windows = np.lib.stride_tricks.sliding_window_view(sheet[..., 0], (height, width))
        rough = np.argwhere((windows[..., 0, :] == enlarged[0, :, 0]).all(axis=-1))
        places = [(y, x) for y, x in rough if (sheet[y : y + height, x : x + width] == enlarged).all()]
        assert len(places) == 1
        corners[entry["prompt"], entry["seed"], entry["choice"]] = places[0]
    rows = [[corners[prompt, seed, c] for c in range(3)] for prompt in range(2) for seed in range(2)]
    assert all(len({top for top, _ in row}) == 1 for row in rows)
    assert sorted(row[0][0] for row in rows) == [row[0][0] for row in rows]
    assert all(row[0][1] < row[1][1] < row[2][1] for row in rows)
    with Image.open(grid / "sheet.png") as image:
        assert json.loads(image.info["ether_diffusion_grid"]) == manifest


@pytest.mark.usefixtures("work")
def test_the_base_can_be_left_out_of_a_grid_and_put_beside_a_picture() -> None:
    assert generate("--adapter fox --grid --no-base_beside", output="grid") == 0
    assert [path.name for path in Path("grid/pictures").iterdir()] == ["prompt1_seed0_fox1.png"]
    assert generate("--adapter fox --base_beside", output="two") == 0
    assert sorted(path.stem for path in Path("two").iterdir()) == ["prompt1_seed0_base", "prompt1_seed0_fox1"]


@pytest.mark.usefixtures("work")
def test_several_adapters_have_a_strength_each_or_one_for_all() -> None:
    assert generate("--adapter fox --adapter cat --strength 0.5 0.25") == 0
    assert uses("x.png") == [("fox", 0.5), ("cat", 0.25)]
    assert generate("--adapter fox --adapter cat --strength 0.5", output="y.png") == 0
    assert uses("y.png") == [("fox", 0.5), ("cat", 0.5)]


@pytest.mark.usefixtures("work")
def test_sdxl_alone_and_a_scheduler_with_the_noise_of_the_base_are_drawn_too() -> None:
    assert generate("--base xl --num_images 2 --grid", output="grid") == 0
    assert said("grid/pictures/prompt1_seed1_base.png").pipeline == "EtherStableDiffusionXLPipeline"
    assert generate("--base base --scheduler euler") == 0
    assert said("x.png").scheduler == "EulerDiscreteScheduler"


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_fits_a_plain_base_and_is_refused_where_it_would_draw_noise(name: str) -> None:
    scheduler = make_scheduler(name, tiny_sd().scheduler)
    assert scheduler.config.beta_schedule == tiny_sd().scheduler.config.beta_schedule
    zero_snr = StableDiffusionPipeline.from_pretrained(tiny_world_path()).scheduler
    if "rescale_betas_zero_snr" in type(scheduler)().config:
        assert make_scheduler(name, zero_snr).config.rescale_betas_zero_snr
    else:
        with pytest.raises(ValueError, match="needs rescale_betas_zero_snr=True"):
            make_scheduler(name, zero_snr)


@pytest.mark.usefixtures("work")
def test_a_batch_draws_the_pictures_that_are_drawn_alone() -> None:
    for size in ("1", "3"):
        assert generate(f"--adapter fox --num_images 3 --batch_size {size}", output=f"by{size}") == 0
    for path in Path("by1").iterdir():
        difference = np.abs(pixels(path).astype(int) - pixels(Path("by3", path.name)))
        assert difference.max() <= 1  # the kernels of another batch size round otherwise


@pytest.mark.usefixtures("work")
def test_a_cut_prompt_and_other_weights_are_drawn_with_a_warning(caplog: Log) -> None:
    letters = "a b c d e f g h i j k l m n o p q"
    command = ["generate", *QUICK.split(), "--base", "other", "--adapter", "fox", "--prompt", letters]
    assert ether.main([*command, "--output", "x.png"]) == 0
    for words in (
        "has 19 tokens and 16 are read",
        '✂ "o p q" is lost',
        "same architecture and other weights",
    ):
        assert words in caplog.text


def test_adapters_have_short_distinct_names() -> None:
    assert adapter_names(["a/fox", "b/fox/", "owner/fox.v2", "./…"]) == ["fox", "fox_2", "fox_v2", "adapter"]


REFUSED = {
    "--adapter fox --strength nan": "strength=nan is not finite; use a list of numbers",
    "--adapter fox --strength 1e9": "from -10 to 10, where 1 is as trained and 0 the base; found 1",
    "--adapter fox --strength 0.5 1": "found 2 strengths for 1 adapters",
    "--base base --strength 0.5": "--strength is an adapter's, and there is none",
    "--adapter fox --size 12": "a multiple of 8 from 8 to 4096 px; found 12",
    "--adapter fox --size 8192x64": "found 8192",
    "--adapter fox --size large": "--size is a number of px, or two as in 512x768; found 'large'",
    "--adapter fox --scheduler magic": "found no scheduler 'magic'; use one of ddim, ddpm",
    "--adapter nowhere": "there is no folder nowhere",
    "--adapter empty": "empty has no adapter_config.json",
    "--adapter fox --base nowhere": "nowhere is not the folder of a base model",
    "--adapter fox --base xl": "the adapter was made for",
    "": "found neither --base nor --adapter",
    "--adapter fox --num_images 2": "x.png is one picture and these are 2 pictures",
    "--adapter fox --grid": "x.png is one picture and a grid is a folder",
    "--adapter fox --output empty": "there already; name a new folder",
    "--adapter fox --steps 0": "steps must be from 1 to 1000; found 0",
    "--adapter fox --guidance_scale nan": "guidance_scale=nan is not finite",
    "--adapter fox --seed -1": "seeds.0 must be from 0",
    "--adapter fox --seed 1 2 --num_images 2": "1 where several seeds are given; found 2",
    "--adapter fox --num_images 0": "--num_images is from 1, and 1 where several seeds are given; found 0",
    "--adapter fox --num_images 2000 --output out": "at most 1024 are drawn at once",
    "--adapter fox --batch_size 0": "batch_size must be from 1",
    "--adapter fox --device abacus": "there is no device 'abacus' here",
}


@pytest.mark.parametrize("command", REFUSED)
def test_bad_input_is_one_sentence_and_nothing_is_written(command: str, work: Path, capsys: Capture) -> None:
    (work / "empty").mkdir()
    before = sorted(work.rglob("*"))
    assert generate(command) == 2
    captured = capsys.readouterr()
    (message,) = [line for line in captured.err.splitlines() if line.startswith("ether generate: ")]
    assert REFUSED[command] in message
    assert captured.out == ""
    assert sorted(work.rglob("*")) == before


def test_what_is_there_is_never_overwritten_and_a_run_that_breaks_leaves_nothing(
    work: Path, capsys: Capture, monkeypatch: Patch
) -> None:
    (work / "x.png").write_text("mine")
    (work / "dangling.png").symlink_to(work / "nowhere.png")
    for name in ("x.png", "dangling.png"):
        assert generate("--base base", output=name) == 2
        assert f"{name} is there already; name a new folder or file" in capsys.readouterr().err
    assert (work / "x.png").read_text() == "mine"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    before = sorted(work.rglob("*"))
    assert generate("--base base", output="y.png") == generate("--base base --grid", output="grid") == 2
    assert sorted(work.rglob("*")) == before


def test_a_process_prints_the_path_alone_and_nothing_else(work: Path) -> None:
    command = f"-m ether_diffusion.scripts.ether generate {QUICK} --prompt abc --adapter fox --grid"
    done = subprocess.run(
        [sys.executable, *command.split(), "--output", "grid"],
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "grid/sheet.png\n", "")


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize(("base", "usual"), [("tiny_world", 3.0), ("base", 7.5), ("xl", 5.0)])
def test_guidance_is_the_bases_usual_unless_given(base: str, usual: float) -> None:
    asked = f"generate --base {base} --prompt abc --steps 1 --size 16"
    assert ether.main(f"{asked} --output usual.png".split()) == 0
    assert said("usual.png").guidance_scale == usual
    assert ether.main(f"{asked} --guidance_scale 2 --output given.png".split()) == 0
    assert said("given.png").guidance_scale == 2


def photo_and_mask(folder: Path) -> tuple[Image.Image, Image.Image]:
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    photo.save(folder / "photo.png")
    mask.save(folder / "mask.png")
    return photo, mask


def test_a_start_picture_is_drawn_from_as_the_engine_does(work: Path) -> None:
    photo, mask = photo_and_mask(work)
    given = "--base base --image photo.png --image_strength 0.5 --steps 4"
    assert generate(f"{given} --mask mask.png --seed 2") == 0
    engine = Engine(open_base("base"))
    how: Any = {
        "steps": 4,
        "guidance_scale": 2.0,
        "width": 16,
        "height": 16,
        "start": Start(photo, 0.5, mask),
    }
    (expected,) = engine.draw([Request(prompt="abc", seed=2, **how)])
    assert np.array_equal(pixels("x.png"), np.asarray(expected))
    assert said("x.png").options["start_image"] == "photo.png"
    assert generate(f"{given} --num_images 2 --adapter fox --grid", output="grid") == 0
    assert said("grid/pictures/prompt1_seed1_base.png").options["start_strength"] == 0.5


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("--image_strength 0.5", "--image_strength is of a picture to begin with"),
        ("--mask mask.png", "--mask is of a picture to begin with"),
        ("--image photo.png --image_strength 7", "strength must be from 0 to 1"),
        ("--image missing.png", "missing.png"),
        ("--image photo.png --mask photo.txt", "photo.txt"),
    ],
)
def test_start_pictures_that_cannot_be_used_are_one_sentence(
    command: str, sentence: str, work: Path, capsys: Capture
) -> None:
    photo_and_mask(work)
    (work / "photo.txt").write_text("no picture")
    assert generate(f"--base base {command}") == 2
    found = capsys.readouterr().err.strip()
    assert sentence in found
    assert "\n" not in found
    assert not (work / "x.png").exists()


def test_prompts_are_drawn_from_wildcards_by_the_seed(work: Path, capsys: Capture) -> None:
    (work / "words").mkdir()
    (work / "words" / "letter.txt").write_text("a\nb\nc\n", encoding="utf-8")
    command = "--base base --wildcards words --prompt __letter__{x|y} --num_images 8"
    assert generate(command, prompt="", output="drawn") == 0
    prompts = []
    for seed in range(8):
        found = said(f"drawn/prompt1_seed{seed}_base.png")
        assert found.options["template"] == "__letter__{x|y}"
        prompts.append(found.prompt)
    assert set(prompts) <= {f"{letter}{end}" for letter in "abc" for end in "xy"}
    assert len(set(prompts)) > 2
    assert generate(f"--base base --seed 3 --prompt {prompts[3]}", prompt="", output="again.png") == 0
    assert np.array_equal(pixels("again.png"), pixels("drawn/prompt1_seed3_base.png"))
    for wrong, sentence in (
        ("--prompt __letter__", "there is no folder of wildcards for __letter__"),
        ("--prompt __word__ --wildcards words", "there is no wildcard __word__; those there are: letter"),
        ("--prompt a --wildcards missing", "there is no folder missing of wildcards"),
    ):
        assert generate(f"--base base {wrong}", prompt="", output="no.png") == 2
        assert sentence in capsys.readouterr().err
