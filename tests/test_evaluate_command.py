"""`ether evaluate`: an adapter of Tiny World end to end, and a sentence for what cannot be measured."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from encoder_models import save_alexnet, save_clip, save_dino, save_other_model
from method_adapters import pixels_in, save_for_tiny_world
from PIL import Image

from ether_diffusion.pipelines import read_image_metadata
from ether_diffusion.scripts import ether
from ether_diffusion.tiny_world.concepts import find_concept
from recipes.tiny_world.learned_subject import learn_subject

PROMPTS = ["a sks animal on a red background", "a sks animal in the snow"]
QUICK = ["--steps", "2", "--num_images", "2", "--batch_size", "8", "--device", "cpu"]
QUICK += ["--other_prompts", "a cat"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter of two steps, its photos, encoders and the weights of an AlexNet."""
    folder = tmp_path_factory.mktemp("made")
    learn_subject(find_concept("fox"), folder / "fox", {"max_train_steps": 2, "train_batch_size": 1})
    shutil.move(folder / "fox" / "photos", folder / "photos")
    shutil.move(folder / "fox" / "adapter", folder / "adapter")
    save_dino(folder / "dino")
    save_clip(folder / "clip")
    save_other_model(folder / "bert")
    save_alexnet(folder / "alexnet.pth")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh working directory that links to what was made, without a cache of weights."""
    for part in made.iterdir():
        (tmp_path / part.name).symlink_to(part)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no_cache"))
    return tmp_path


def evaluate(*arguments: str) -> int:
    return ether.main(["evaluate", *arguments])


def draw(*arguments: str) -> int:
    return evaluate("adapter", "--photos", "photos", *QUICK, *arguments)


def measure(*arguments: str) -> int:
    return evaluate("--photos", "photos", "--device", "cpu", *arguments)


def read(file: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
    return found


def test_an_adapter_of_another_method_is_measured_too(work: Path) -> None:
    save_for_tiny_world(work / "oft", "oft")
    command = ["oft", "--photos", "photos", *QUICK, "--prompts", "prompts.txt"]
    assert evaluate(*command, "--pictures", "pictures", "--json", "out.json") == 0
    assert read("out.json")["settings"]["adapter"] == "oft"
    base, adapted = (pixels_in(Path("pictures", row)) for row in ("base", "adapter"))
    assert base.keys() == adapted.keys()
    assert all(base[name] != adapted[name] for name in base)


def test_an_adapter_is_measured_beside_the_base(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = ["--json", "out/scores.json", "--plot", "out/plot.png", "--pictures", "out/pictures"]
    assert draw("--prompts", "prompts.txt", "--identifier", "sks", *results) == 0
    found = read("out/scores.json")
    assert found["settings"]["prompts"] == PROMPTS
    assert found["settings"]["other_prompts"] == ["a cat"]
    assert (found["settings"]["seeds"], found["settings"]["guidance_scale"]) == ([0, 1], 3.0)
    assert found["encoders"] == {"tiny": "tiny_world"}
    for row in ("base", "adapter"):
        assert set(found["scores"][row]) == {"tiny_i", "tiny_t", "diversity"}
        assert found["scores"][row]["tiny_i"]["num_values"] == 4
    assert found["scores"]["photos"]["tiny_i"]["num_values"] == 6
    assert found["drift"]["tiny"]["mean"] > 0
    assert "torch's cache" in found["left_out"]["lpips"]
    with Image.open("out/plot.png") as plot:
        assert plot.format == "PNG"
    folders = {path.name: len(list(path.iterdir())) for path in Path("out/pictures").iterdir()}
    assert folders == {"base": 4, "adapter": 4, "other_base": 2, "other_adapter": 2}
    said = read_image_metadata(Path("out/pictures/adapter/prompt2_seed1.png"))
    assert said is not None
    assert (said.prompt, said.seed) == (PROMPTS[1], 1)
    table = capsys.readouterr().out
    mean = found["scores"]["adapter"]["tiny_i"]["mean"]
    assert f"adapter  {mean:.3f} ± " in table
    assert "drift from the base on other prompts: tiny " in table


def test_the_same_command_and_the_pictures_that_it_kept_score_the_same(work: Path) -> None:
    assert draw("--prompts", *PROMPTS, "--json", "drawn.json", "--pictures", "pictures") == 0
    again = ["--generated", "pictures/adapter", "--encoder", "tiny_world", "--json", "again.json"]
    assert measure(*again) == 0
    drawn, found = read("drawn.json"), read("again.json")
    for column, expected in drawn["scores"]["adapter"].items():
        assert found["scores"]["generated"][column] == pytest.approx(expected, abs=1e-6)
    assert draw("--prompts", *PROMPTS, "--json", "same.json") == 0
    assert read("same.json") == drawn


def test_pictures_drawn_before_are_measured_by_named_encoders_and_lpips(work: Path) -> None:
    captions = [{"file_name": p.name, "text": "a fox"} for p in sorted(Path("photos").glob("*.png"))]
    Path("captions.jsonl").write_text("\n".join(json.dumps(row) for row in captions))
    encoders = ["--encoder", "./dino", "--encoder", "./clip", "--encoder_batch_size", "2"]
    pictures = ["--generated", "photos", "--captions", "captions.jsonl"]
    assert measure(*pictures, *encoders, "--lpips_weights", "alexnet.pth", "--json", "scores.json") == 0
    found = read("scores.json")
    among_them = {"diversity", "lpips_among"}
    assert set(found["scores"]["generated"]) == {"dino", "clip_i", "clip_t", "lpips_to_photos", *among_them}
    assert set(found["scores"]["photos"]) == {"dino", "clip_i", "lpips_to_photos"}
    # of six photos against themselves, a sixth of the pairs are equal
    among, to_all = (found["scores"][row]["lpips_to_photos"]["mean"] for row in ("photos", "generated"))
    assert to_all == pytest.approx(among * 5 / 6, rel=1e-5)
    assert found["scores"]["generated"]["lpips_among"]["mean"] == pytest.approx(among, rel=1e-5)
    likeness, to_all = (found["scores"][row]["dino"]["mean"] for row in ("photos", "generated"))
    assert to_all == pytest.approx((likeness * 5 + 1) / 6, abs=1e-6)
    assert found["scores"]["generated"]["diversity"]["mean"] == pytest.approx(1 - likeness, abs=1e-6)


def folder_of(name: str, *images: Image.Image) -> str:
    Path(name).mkdir()
    for number, image in enumerate(images):
        image.save(Path(name, f"{number}.png"))
    return name


def photo(number: int, side: int = 64) -> Image.Image:
    with Image.open(sorted(Path("photos").glob("*.png"))[number]) as image:
        return image.resize((side, side))


def test_black_pictures_drawn_before_are_named_and_not_averaged_in(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = folder_of("clean", photo(0), photo(1))
    dirty = folder_of(
        "dirty", photo(0), photo(1), Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64), "red")
    )
    for name in (clean, dirty):
        assert measure("--generated", name, "--encoder", "tiny_world", "--json", f"{name}.json") == 0
    assert read("dirty.json")["scores"] == read("clean.json")["scores"]
    reasons = read("dirty.json")["set_aside"]["generated"]
    assert reasons == {"2.png": "is black", "3.png": "is empty: one colour throughout"}
    assert "not scored of generated: 2.png is black" in capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one line that a command ends with, and hold that it wrote nothing."""
    before = {str(path) for path in Path().rglob("*")}
    assert evaluate(*arguments, "--json", "new/out.json", "--plot", "new/out.png") == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert {str(path) for path in Path().rglob("*")} == before
    (line,) = output.err.strip().splitlines()
    return line


DRAW = ["adapter", "--photos", "photos", *QUICK, "--prompts", "a sks animal"]
MEASURE = ["--photos", "photos", "--generated", "photos", "--encoder", "tiny_world"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--photos", "photos"], "give either an adapter to draw with, or --generated"),
        ([*MEASURE, "adapter"], "give either an adapter to draw with, or --generated"),
        (["adapter", "--photos", "photos"], "found no --prompts"),
        ([*MEASURE, "--steps", "3", "--seed", "0"], "--seed, --steps would change nothing"),
        ([*DRAW, "--captions", "c.jsonl"], "--captions would change nothing without --generated"),
        (["adapter", "--photos", "nothing", "--prompts", "a"], "there is no folder nothing"),
        (["nothing", "--photos", "photos", "--prompts", "a"], "nothing"),
        (["adapter", "--photos", "photos", "--prompts", "none.txt"], "there is no file of prompts none.txt"),
        (["adapter", "--photos", "photos", "--prompts", "a", "a"], "has 'a' twice"),
        (["adapter", "--photos", "photos", "--prompts", " "], "--prompts has an empty prompt or none"),
        ([*DRAW, "--num_images", "0"], "--num_images is from 1; found 0"),
        ([*DRAW, "--num_images", "1"], "this would be one picture"),
        ([*DRAW, "--seed", "-1"], "must be from 0 to 9223372036854775807"),
        ([*DRAW, "--steps", "0"], "steps must be from 1"),
        ([*DRAW, "--other_prompts", "a sks animal"], "among the prompts with and without the subject"),
        ([*DRAW, "--encoder", "./nothing"], "found no encoder ./nothing"),
        ([*DRAW, "--encoder", "./bert"], "model_type bert"),
        ([*DRAW, "--encoder", "./dino", "--encoder", "./dino"], "several encoders of the kind dino"),
        ([*DRAW, "--lpips_weights", "nothing.pth"], "are not in nothing.pth"),
        ([*DRAW, "--lpips_weights", "prompts.txt"], "prompts.txt holds no weights of AlexNet"),
        ([*DRAW, "--scheduler", "nothing"], "nothing"),
        ([*DRAW, "--base", "nothing"], "nothing is not the folder of a base model"),
        ([*DRAW, "--encoder_batch_size", "0"], "--encoder_batch_size is from 1; found 0"),
        ([*DRAW, "--pictures", "new/out.json"], "is named for two results"),
        ([*DRAW, "--pictures", "new"], "new is named for two results, or one lies in it; name places apart"),
        ([*MEASURE, "--captions", "nothing.jsonl"], "there is no file of captions nothing.jsonl"),
        ([*MEASURE, "--captions", "prompts.txt"], "prompts.txt line 1"),
        (["--photos", "photos", "--generated", "nothing"], "there is no folder nothing"),
    ],
)
def test_what_cannot_be_measured_ends_in_a_sentence(
    work: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert words in refused(capsys, *arguments)


def test_folders_that_cannot_be_scored_end_in_a_sentence(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed, black = [photo(0), photo(1, 32)], [Image.new("RGB", (side, side)) for side in (64, 32)]
    cases = {
        folder_of("none"): "no usable photos",
        folder_of("one", photo(0)): "found one picture to score in one; give at least two",
        folder_of("mixed", *mixed): "of the sizes 32x32, 64x64 px; score pictures of one size",
        folder_of("black", *black): "no picture to score: 0.png is black",
    }
    for name, words in cases.items():
        assert words in refused(capsys, "--photos", "photos", "--generated", name, "--encoder", "tiny_world")
    found = refused(capsys, "--photos", "one", "--generated", "photos", "--encoder", "tiny_world")
    assert "found 1 photo to compare with in one" in found
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = refused(capsys, "--photos", "photos", "--generated", "photos")
    assert "found no encoder facebook/dino-vits16" in line


def test_a_result_that_is_there_is_not_overwritten(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("old.json").write_text("mine")
    assert measure("--generated", "photos", "--encoder", "tiny_world", "--json", "old.json") == 2
    assert "old.json is there already" in capsys.readouterr().err
    assert Path("old.json").read_text() == "mine"
