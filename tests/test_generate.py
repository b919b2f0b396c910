"""`ether generate`: pictures and grids from the command line, and sentences for what cannot be drawn."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from tiny_pipelines import tiny_sd, tiny_sdxl
from trained_adapters import CONFIGS, train

from ether_diffusion import load_ether, save_ether
from ether_diffusion.pipelines import ImageMetadata, read_image_metadata
from ether_diffusion.pipelines.metadata import read_png_text
from ether_diffusion.pipelines.opening import SCHEDULERS, make_scheduler
from ether_diffusion.pipelines.sampling import MAX_PICTURES
from ether_diffusion.scripts import ether
from ether_diffusion.scripts.drawing import adapter_names
from ether_diffusion.tiny_world import tiny_world_path

ROOT = Path(__file__).parent.parent
QUICK = ["--steps", "2", "--guidance_scale", "2", "--size", "16"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, another of the same architecture, an SDXL, and adapters fox and cat."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    tiny_sd().save_pretrained(folder / "base")
    tiny_sd(seed=7).save_pretrained(folder / "other")
    tiny_sdxl().save_pretrained(folder / "xl")
    for name, kind in (("fox", "ether_plus"), ("cat", "ether")):
        pipe = tiny_sd()
        train(pipe.unet, CONFIGS[kind])
        save_ether(pipe, folder / name, base_model=str(folder / "base"))
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh working directory that links to what was made."""
    for part in made.iterdir():
        (tmp_path / part.name).symlink_to(part)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def generate(*arguments: str) -> int:
    return ether.main(["generate", *QUICK, "--prompt", "abc", *arguments])


def said(path: Path) -> ImageMetadata:
    found = read_image_metadata(path)
    assert found is not None
    return found


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_a_picture_is_what_diffusers_draws_with_load_ether(work: Path) -> None:
    assert (
        generate(
            "--base", "base", "--adapter", "fox", "--strength", "0.7", "--seed", "5", "--output", "x.png"
        )
        == 0
    )
    pipe = StableDiffusionPipeline.from_pretrained(work / "base")
    pipe.set_progress_bar_config(disable=True)
    load_ether(pipe, work / "fox", adapter_name="fox")
    pipe.set_adapters(["fox"], [0.7])
    generator = torch.Generator().manual_seed(5)
    options = {"num_inference_steps": 2, "guidance_scale": 2.0, "width": 16, "height": 16}
    expected = pipe("abc", generator=generator, **options).images[0]
    assert np.array_equal(pixels(work / "x.png"), np.asarray(expected))
    metadata = said(work / "x.png")
    assert (metadata.prompt, metadata.seed, metadata.steps, metadata.base) == ("abc", 5, 2, "base")
    assert [(use.name, use.strength) for use in metadata.adapters] == [("fox", 0.7)]


def test_the_base_is_the_one_that_the_adapter_names(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("--adapter", "fox", "--output", "x.png") == 0
    assert capsys.readouterr().out == "x.png\n"
    assert said(work / "x.png").base == "base"


def test_without_a_prompt_the_trigger_is_drawn(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tiny_sd()
    train(pipe.unet, CONFIGS["ether"])
    save_ether(pipe, work / "sks", base_model=str(work / "base"), trigger="a sks")
    assert ether.main(["generate", *QUICK, "--adapter", "sks", "--output", "x.png"]) == 0
    assert said(work / "x.png").prompt == "a sks"
    assert ether.main(["generate", *QUICK, "--adapter", "fox", "--output", "y.png"]) == 2
    assert "found no --prompt, and no adapter that names its trigger" in capsys.readouterr().err


def test_several_pictures_are_a_folder_with_a_seed_each(work: Path) -> None:
    arguments = ("--adapter", "fox", "--prompt", "xyz", "--num_images", "2", "--seed", "3")
    assert generate(*arguments, "--output", "some/folder") == 0
    found = {path.name: said(path) for path in sorted((work / "some" / "folder").iterdir())}
    assert {name: (m.prompt, m.seed) for name, m in found.items()} == {
        "prompt1_seed3_fox1.png": ("abc", 3),
        "prompt1_seed4_fox1.png": ("abc", 4),
        "prompt2_seed3_fox1.png": ("xyz", 3),
        "prompt2_seed4_fox1.png": ("xyz", 4),
    }


def test_the_same_command_writes_the_same_bytes(work: Path) -> None:
    for name in ("a", "b"):
        assert generate("--adapter", "fox", "--num_images", "2", "--grid", "--output", name) == 0
    files = [sorted(path.relative_to(work / n) for path in (work / n).rglob("*.*")) for n in ("a", "b")]
    assert files[0] == files[1]
    assert all((work / "a" / name).read_bytes() == (work / "b" / name).read_bytes() for name in files[0])


@pytest.fixture
def grid(work: Path) -> Path:
    arguments = ("--prompt", "xyz", "--seed", "1", "8", "--strength", "0.5", "1", "--grid")
    assert generate("--adapter", "fox", *arguments, "--output", "grid") == 0
    return work / "grid"


def test_a_grid_is_strengths_by_prompts_and_seeds_with_the_base_beside(grid: Path) -> None:
    manifest = json.loads((grid / "grid.json").read_text())
    assert manifest["choices"] == [{}, {"fox": 0.5}, {"fox": 1.0}]
    assert manifest["seeds"] == [1, 8]
    assert len(manifest["pictures"]) == 2 * 2 * 3
    for entry in manifest["pictures"]:
        metadata = said(grid / entry["file"])
        assert json.loads(metadata.to_json()) == entry["metadata"]
        assert metadata.prompt == manifest["prompts"][entry["prompt"]]
        assert metadata.seed == manifest["seeds"][entry["seed"]]
        assert {use.name: use.strength for use in metadata.adapters} == manifest["choices"][entry["choice"]]


def test_the_sheet_shows_every_picture_of_the_grid_and_carries_the_manifest(grid: Path) -> None:
    sheet = pixels(grid / "sheet.png")
    manifest = json.loads((grid / "grid.json").read_text())
    corners = {}
    for entry in manifest["pictures"]:
        enlarged = pixels(grid / entry["file"]).repeat(11, axis=0).repeat(11, axis=1)
        height, width, _ = enlarged.shape
        places = [
            (top, left)
            for top in range(sheet.shape[0] - height + 1)
            for left in np.flatnonzero(
                (sheet[top, : sheet.shape[1] - width + 1] == enlarged[0, 0]).all(axis=1)
            )
            if np.array_equal(sheet[top : top + height, left : left + width], enlarged)
        ]
        assert len(places) == 1
        corners[entry["prompt"], entry["seed"], entry["choice"]] = places[0]
    rows = [[corners[prompt, seed, c] for c in range(3)] for prompt in range(2) for seed in range(2)]
    assert all(len({top for top, _ in row}) == 1 for row in rows)
    assert sorted(row[0][0] for row in rows) == [row[0][0] for row in rows]
    assert all(row[0][1] < row[1][1] < row[2][1] for row in rows)
    carried = read_png_text(grid / "sheet.png", "ether_diffusion_grid", "the sheet")
    assert json.loads(carried or "") == manifest


def test_the_base_can_be_left_out_of_a_grid_and_put_beside_a_picture(work: Path) -> None:
    assert generate("--adapter", "fox", "--grid", "--no-base_beside", "--output", "grid") == 0
    assert [path.name for path in (work / "grid" / "pictures").iterdir()] == ["prompt1_seed0_fox1.png"]
    assert generate("--adapter", "fox", "--base_beside", "--output", "two") == 0
    assert {path.name for path in (work / "two").iterdir()} == {
        "prompt1_seed0_base.png",
        "prompt1_seed0_fox1.png",
    }


def test_several_adapters_have_a_strength_each_or_one_for_all(work: Path) -> None:
    both = ("--adapter", "fox", "--adapter", "cat")
    assert generate(*both, "--strength", "0.5", "0.25", "--output", "x.png") == 0
    assert [(use.name, use.strength) for use in said(work / "x.png").adapters] == [
        ("fox", 0.5),
        ("cat", 0.25),
    ]
    assert generate(*both, "--strength", "0.5", "--output", "y.png") == 0
    assert [(use.name, use.strength) for use in said(work / "y.png").adapters] == [("fox", 0.5), ("cat", 0.5)]


def test_sdxl_and_a_base_alone_are_drawn_too(work: Path) -> None:
    assert generate("--base", "xl", "--num_images", "2", "--grid", "--output", "grid") == 0
    assert (
        said(work / "grid" / "pictures" / "prompt1_seed1_base.png").pipeline
        == "EtherStableDiffusionXLPipeline"
    )


def test_a_scheduler_takes_over_the_noise_of_the_base(work: Path) -> None:
    assert generate("--base", "base", "--scheduler", "euler", "--output", "x.png") == 0
    assert said(work / "x.png").scheduler == "EulerDiscreteScheduler"


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


def test_a_batch_draws_the_pictures_that_are_drawn_alone(work: Path) -> None:
    for size in ("1", "3"):
        arguments = ("--adapter", "fox", "--num_images", "3", "--batch_size", size)
        assert generate(*arguments, "--output", f"by{size}") == 0
    for path in (work / "by1").iterdir():
        difference = np.abs(pixels(path).astype(int) - pixels(work / "by3" / path.name))
        assert difference.max() <= 1  # the kernels of another batch size round otherwise


def test_a_prompt_that_is_cut_is_drawn_with_a_warning_that_shows_the_cut(
    work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert generate("--base", "base", "--prompt", "a b c d e f g h i j k l m n o p q", "--output", "out") == 0
    assert "the prompt has 19 tokens and 16 are read" in caplog.text
    assert '✂ "o p q" is lost' in caplog.text


def test_other_weights_of_the_same_architecture_are_drawn_with_a_warning(
    work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert generate("--base", "other", "--adapter", "fox", "--output", "x.png") == 0
    assert "has the same architecture and other weights" in caplog.text


def test_adapters_have_short_distinct_names() -> None:
    assert adapter_names(["a/fox", "b/fox/", "owner/fox.v2", "./…"]) == ["fox", "fox_2", "fox_v2", "adapter"]


FOX = ["--adapter", "fox"]
REFUSED: dict[str, list[str]] = {
    "strength=nan is not finite; use a list of numbers": [*FOX, "--strength", "nan"],
    "strength=inf is not finite": [*FOX, "--strength", "inf"],
    "from -10 to 10, where 1 is as trained and 0 the base; found 1000000000.0": [
        *FOX,
        "--strength",
        "1e9",
    ],
    "found 2 strengths for 1 adapters": [*FOX, "--strength", "0.5", "1"],
    "--strength is an adapter's, and there is none": ["--base", "base", "--strength", "0.5"],
    "a multiple of 8 from 8 to 4096 px; found 12": [*FOX, "--size", "12"],
    "found 8192": [*FOX, "--size", "8192x64"],
    "--size is a number of px, or two as in 512x768; found 'large'": [*FOX, "--size", "large"],
    "found no scheduler 'magic'; use one of ddim, ddpm": [*FOX, "--scheduler", "magic"],
    "there is no folder nowhere": ["--adapter", "nowhere"],
    "empty has no adapter_config.json": ["--adapter", "empty"],
    "nowhere is not the folder of a base model": [*FOX, "--base", "nowhere"],
    "the adapter was made for": [*FOX, "--base", "xl"],
    "found neither --base nor --adapter": [],
    "x.png is one picture and these are 2 pictures": [*FOX, "--num_images", "2"],
    "x.png is one picture and a grid is a folder": [*FOX, "--grid"],
    "there already; name a new folder": [*FOX, "--output", "empty"],
    "steps must be from 1 to 1000; found 0": [*FOX, "--steps", "0"],
    "guidance_scale=nan is not finite": [*FOX, "--guidance_scale", "nan"],
    "seeds.0 must be from 0": [*FOX, "--seed", "-1"],
    "1 where several seeds are given; found 2": [*FOX, "--seed", "1", "2", "--num_images", "2"],
    "--num_images is from 1, and 1 where several seeds are given; found 0": [*FOX, "--num_images", "0"],
    f"at most {MAX_PICTURES} are drawn at once": [*FOX, "--num_images", "2000", "--output", "out"],
    "batch_size must be from 1": [*FOX, "--batch_size", "0"],
    "there is no device 'abacus' here": [*FOX, "--device", "abacus"],
}


@pytest.mark.parametrize("words", REFUSED)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    words: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "empty").mkdir()
    before = sorted(work.rglob("*"))
    assert generate("--output", "x.png", *REFUSED[words]) == 2
    captured = capsys.readouterr()
    (message,) = [line for line in captured.err.splitlines() if line.startswith("ether generate: ")]
    assert words in message
    assert captured.out == ""
    assert sorted(work.rglob("*")) == before


def test_what_is_there_is_never_overwritten(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "x.png").write_text("mine")
    (work / "dangling.png").symlink_to(work / "nowhere.png")
    for name in ("x.png", "dangling.png"):
        assert generate("--base", "base", "--output", name) == 2
        assert f"{name} is there already; name a new folder or file" in capsys.readouterr().err
    assert (work / "x.png").read_text() == "mine"
    assert not (work / "nowhere.png").exists()


def test_a_run_that_breaks_leaves_nothing(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    before = sorted(work.rglob("*"))
    assert generate("--base", "base", "--output", "x.png") == 2
    assert generate("--base", "base", "--grid", "--output", "grid") == 2
    assert sorted(work.rglob("*")) == before


def test_an_adapter_of_a_base_that_is_elsewhere_asks_for_it(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = tiny_sd()
    train(pipe.unet, CONFIGS["ether"])
    for name, base in (("named", "my-base"), ("nameless", None)):
        save_ether(pipe, work / name, base_model=base)
    assert generate("--adapter", "named", "--output", "x.png") == 2
    assert "named was made for 'my-base'; say with --base where that is" in capsys.readouterr().err
    assert generate("--adapter", "nameless", "--output", "x.png") == 2
    assert "nameless does not say what its base is; give --base" in capsys.readouterr().err


def test_a_process_prints_the_path_alone_and_nothing_else(work: Path) -> None:
    arguments = ("--prompt", "abc", "--adapter", "fox", "--grid", "--output", "grid")
    done = subprocess.run(
        [sys.executable, "-m", "ether_diffusion.scripts.ether", "generate", *QUICK, *arguments],
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "grid/sheet.png\n", "")


@pytest.mark.parametrize(("base", "usual"), [("tiny_world", 3.0), ("base", 7.5), ("xl", 5.0)])
def test_guidance_is_the_bases_usual_unless_given(work: Path, base: str, usual: float) -> None:
    asked = ["generate", "--base", base, "--prompt", "abc", "--steps", "2", "--size", "16"]
    assert ether.main([*asked, "--output", "usual.png"]) == 0
    assert said(Path("usual.png")).guidance_scale == usual
    assert ether.main([*asked, "--guidance_scale", "2", "--output", "given.png"]) == 0
    assert said(Path("given.png")).guidance_scale == 2
