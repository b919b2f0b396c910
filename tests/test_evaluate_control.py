"""`ether evaluate --control_pairs`: an adapter that follows maps, and sentences for what cannot."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from method_adapters import pixels_in, save_for_tiny_world
from PIL import Image
from test_evaluate_command import evaluate, read
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessorPil

from ether_diffusion.benchmark.evaluation import read_control_pairs
from ether_diffusion.control import read_control
from ether_diffusion.metrics.control_scores import load_finder
from ether_diffusion.tiny_world import WEIGHTS_FOLDER
from ether_diffusion.tiny_world.networks import load_segmenter
from ether_diffusion.tiny_world.pictures import draw_scenes
from ether_diffusion.tiny_world.world import CLASSES
from recipes.tiny_world.control_pairs import (
    ControlType,
    class_map,
    sample_pairs,
    validation_concepts,
    write_pairs,
)
from research import BASE
from research.study_control import RUN_FOLDER, StudyRun, StudySettings, carry_out

QUICK = ["--steps", "2", "--batch_size", "4", "--device", "cpu"]
LABELS = ("wall", "sky", "tree")


def write(folder: Path, control_type: ControlType, number: int = 4) -> None:
    write_pairs(sample_pairs(validation_concepts(), number, control_type=control_type, seed=5), folder)


def save_segformer(folder: Path) -> None:
    """Save a segmentation model of a few thousand random weights and three labels."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = SegformerConfig(
            hidden_sizes=[8, 8, 16, 16],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 1, 2, 2],
            decoder_hidden_size=16,
            id2label=dict(enumerate(LABELS)),
            label2id={name: number for number, name in enumerate(LABELS)},
        )
        model = SegformerForSemanticSegmentation(config)
    model.save_pretrained(folder)
    SegformerImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter of two steps, pairs of two types, and a segmentation model."""
    folder = tmp_path_factory.mktemp("made")
    settings = StudySettings(num_pairs=4, steps=2, batch_size=2, scenes_per_concept=1, inference_steps=1)
    carry_out(StudyRun("ether_plus", None, 0), folder / "study", settings)
    shutil.copytree(folder / "study" / "ether_plus_0" / RUN_FOLDER, folder / "follow")
    write(folder / "palette", "palette")
    write(folder / "silhouette", "silhouette")
    save_segformer(folder / "segformer")
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh working directory that links to what was made."""
    for part in made.iterdir():
        (tmp_path / part.name).symlink_to(part)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    before = sorted(Path().rglob("*"))
    assert evaluate(*arguments) == 2
    assert sorted(Path().rglob("*")) == before
    found = capsys.readouterr().err
    assert found.startswith("ether evaluate: ")
    assert found.count("\n") == 1
    return found


def test_an_adapter_is_measured_beside_the_base_and_the_photos(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = ["--json", "out.json", "--plot", "out.png", "--pictures", "pictures"]
    assert evaluate("follow", "--control_pairs", "palette", *QUICK, *results) == 0
    found = read("out.json")
    assert found["settings"]["control_type"] == "palette"
    assert found["encoders"] == {"segmenter": "tiny_world", "tiny": "tiny_world"}
    columns = {"miou", "accuracy", "object_iou", "canny_iou", "canny_f1"}
    assert {row: set(scores) for row, scores in found["scores"].items()} == dict.fromkeys(
        ("photos", "base", "adapter"), columns
    )
    assert found["scores"]["photos"]["canny_f1"]["mean"] == 1.0
    assert "needs more than" in found["left_out"]["fid_tiny"]
    assert {path.name: len(list(path.iterdir())) for path in Path("pictures").iterdir()} == {
        "base": 4,
        "adapter": 4,
    }
    assert f"{found['scores']['adapter']['miou']['mean']:.3f}" in capsys.readouterr().out
    with Image.open("out.png") as plot:
        assert plot.format == "PNG"


def test_an_adapter_of_another_method_is_measured_too(work: Path) -> None:
    save_for_tiny_world(work / "lora", "lora", read_control("follow"), BASE)
    command = ["lora", "--control_pairs", "palette", *QUICK, "--pictures", "pictures"]
    assert evaluate(*command, "--json", "out.json") == 0
    assert set(read("out.json")["scores"]) == {"photos", "base", "adapter"}
    base, adapted = (pixels_in(Path("pictures", row)) for row in ("base", "adapter"))
    assert all(base[name] != adapted[name] for name in base)


def test_an_encoder_by_itself_is_measured_too(work: Path) -> None:
    Path("encoder").mkdir()
    for name in ("control_config.json", "control_encoder.safetensors"):
        shutil.copy(Path("follow") / name, "encoder")
    config = json.loads(Path("encoder/control_config.json").read_text())
    Path("encoder/control_config.json").write_text(json.dumps(config | {"adapter_sha256": None}))
    given = ["encoder", "--control_pairs", "palette", "--base", BASE, *QUICK]
    assert evaluate(*given, "--json", "out.json") == 0
    assert read("out.json")["scores"]["adapter"]["miou"]["num_values"] == 4


def test_the_pictures_that_were_kept_score_the_same_when_read_again(work: Path) -> None:
    pairs = ["--control_pairs", "palette"]
    assert evaluate("follow", *pairs, *QUICK, "--json", "drawn.json", "--pictures", "pictures") == 0
    again = ["--generated", "pictures/adapter", "--control_type", "palette", "--segmenter", "tiny_world"]
    assert evaluate(*pairs, *again, "--json", "again.json") == 0
    assert read("again.json")["scores"]["generated"] == read("drawn.json")["scores"]["adapter"]


def test_photos_are_scored_as_torchmetrics_scores_their_classes(work: Path) -> None:
    assert evaluate("--control_pairs", "palette", "--generated", "palette", "--control_type", "palette",
                    "--segmenter", "tiny_world", "--json", "out.json") == 0  # fmt: skip
    scenes = [pair.scene for pair in sample_pairs(validation_concepts(), 4, control_type="palette", seed=5)]
    found = load_segmenter(WEIGHTS_FOLDER).segment(draw_scenes(scenes))
    expected = torch.from_numpy(np.stack([class_map(scene) for scene in scenes]))
    scores = read("out.json")["scores"]["generated"]
    iou = MulticlassJaccardIndex(len(CLASSES))(found, expected)
    assert scores["miou"]["mean"] == pytest.approx(iou.item())
    accuracy = MulticlassAccuracy(len(CLASSES), average="micro")(found, expected)
    assert scores["accuracy"]["mean"] == pytest.approx(accuracy.item())


def test_silhouettes_are_measured_by_object_and_background(work: Path) -> None:
    given = ["--generated", "silhouette", "--control_type", "silhouette", "--segmenter", "tiny_world"]
    assert evaluate("--control_pairs", "silhouette", *given, "--json", "out.json") == 0
    assert read("out.json")["scores"]["generated"]["object_iou"]["mean"] > 0.8


def test_a_named_segmentation_model_measures_maps_in_a_palette_of_its_labels(work: Path) -> None:
    finder = load_finder("./segformer")
    pictures = [Image.open(path).convert("RGB") for path in sorted(Path("palette").glob("*.png"))]
    colours = np.array([[10, 0, 0], [0, 200, 0], [0, 0, 99]], dtype=np.uint8)
    maps = [colours[each.numpy()] for each in finder.find_classes(pictures)]  # what it finds is the truth
    shutil.copytree("palette", "own")
    for path, found in zip(sorted(Path("own/conditioning_images").iterdir()), maps, strict=True):
        Image.fromarray(found).save(path)
    Path("colours.json").write_text(json.dumps(dict(zip(LABELS, colours.tolist(), strict=True))))
    given = ["--control_type", "palette", "--segmenter", "./segformer", "--palette", "colours.json"]
    assert evaluate("--control_pairs", "own", "--generated", "own", *given, "--json", "out.json") == 0
    scores = read("out.json")["scores"]["generated"]
    assert scores["miou"]["mean"] == scores["accuracy"]["mean"] == 1.0
    assert read("out.json")["encoders"]["segmenter"] == "./segformer"


def test_a_segmentation_model_finds_what_transformers_finds(work: Path) -> None:
    picture = Image.open(next(Path("palette").glob("*.png"))).convert("RGB").resize((96, 80))
    model = SegformerForSemanticSegmentation.from_pretrained("segformer").eval()
    processor = SegformerImageProcessorPil.from_pretrained("segformer")
    with torch.no_grad():
        outputs = model(**processor(images=picture, return_tensors="pt"))
    oracle = processor.post_process_semantic_segmentation(outputs, target_sizes=[(80, 96)])[0]
    (found,) = load_finder("./segformer").find_classes([picture])
    assert torch.equal(found, oracle)


def test_black_pictures_are_reported_and_not_averaged_in(work: Path) -> None:
    Path("drawn").mkdir()
    for number, path in enumerate(sorted(Path("palette").glob("*.png"))):
        image = Image.open(path) if number else Image.new("RGB", (64, 64))
        image.save(Path("drawn") / path.name)
    given = ["--generated", "drawn", "--control_type", "palette", "--segmenter", "tiny_world"]
    assert evaluate("--control_pairs", "palette", *given, "--json", "out.json") == 0
    found = read("out.json")
    assert list(found["set_aside"]["generated"].values()) == ["is black"]
    assert found["scores"]["generated"]["miou"]["num_values"] == 3


def test_what_control_knows_nothing_of_is_refused(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = ["--control_pairs", "palette"]
    found = refused(capsys, "follow", *pairs, "--photos", "palette", "--prompts", "a fox")
    assert "--photos, --prompts would change nothing with --control_pairs" in found
    found = refused(capsys, "follow", "--photos", "palette", "--prompts", "x", "--segmenter", "tiny_world")
    assert "--segmenter would change nothing without --control_pairs" in found
    assert "give --photos, or --control_pairs" in refused(capsys, "follow")
    found = refused(capsys, *pairs, "--generated", "palette", "--steps", "3")
    assert "--steps would change nothing" in found
    assert "--num_images is from 1; found 0" in refused(capsys, "follow", *pairs, "--num_images", "0")
    assert "face-alignment" in refused(capsys, "follow", *pairs, "--landmarks")


def test_segmenters_and_palettes_that_do_not_serve_are_refused(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--control_pairs", "palette", "--generated", "palette", "--control_type", "palette"]
    assert "found no segmenter ./nothing" in refused(capsys, *given, "--segmenter", "./nothing")
    assert "need its colours; give --palette" in refused(capsys, *given, "--segmenter", "./segformer")
    Path("colours.json").write_text('{"sofa": [1, 2, 3]}')
    wrong = ["--segmenter", "tiny_world", "--palette", "colours.json"]
    assert "has sofa, which the segmenter does not know" in refused(capsys, *given, *wrong)
    shapes = ["--control_pairs", "silhouette", "--generated", "silhouette", "--control_type", "silhouette"]
    assert "tells things from background" in refused(capsys, *shapes, "--segmenter", "./segformer")
    shutil.copytree("segformer", "damaged")
    Path("damaged/model.safetensors").write_bytes(b"nothing")
    assert "the segmenter ./damaged is not whole" in refused(capsys, *given, "--segmenter", "./damaged")


def test_every_map_off_the_palette_is_named_before_anything_is_drawn(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("palette", "wrong")
    for path in sorted(Path("wrong/conditioning_images").iterdir())[:2]:
        Image.new("RGB", (64, 64), (77, 66, 55)).save(path)
    found = refused(capsys, "follow", "--control_pairs", "wrong", *QUICK)
    assert found.count("off the palette of Tiny World") == 2


def test_pictures_of_no_pair_are_refused(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("others").mkdir()
    for name in ("one", "two"):
        Image.open(next(Path("palette").glob("*.png"))).save(Path("others") / f"{name}.png")
    found = refused(capsys, "--control_pairs", "palette", "--generated", "others")
    assert "one, two are pictures of no pair" in found


def test_pairs_that_cannot_be_used_are_all_named(tmp_path: Path) -> None:
    write(tmp_path, "palette", 3)
    lines = (tmp_path / "metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    (tmp_path / rows[1]["conditioning_image_file_name"]).unlink()
    Image.new("RGB", (64, 32)).save(tmp_path / rows[2]["conditioning_image_file_name"])
    bad = [{"file_name": "a.png"}, {**rows[0], "file_name": "../secret.png"}, rows[0]]
    (tmp_path / "metadata.jsonl").write_text("\n".join([*lines, *map(json.dumps, bad), "no json"]))
    with pytest.raises(ValueError, match="has pairs that cannot be used") as stop:
        read_control_pairs(tmp_path)
    for part in (
        "line 2 names",
        "has 64 × 32 px and the picture 64 × 64 px",
        "line 4 cannot be read: conditioning_image_file_name is missing",
        "line 5 names",
    ):
        assert part in str(stop.value)
    assert "is named twice" in str(stop.value)


def test_one_pair_or_no_list_of_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="write a line for each pair"):
        read_control_pairs(tmp_path)
    write(tmp_path, "palette", 1)
    with pytest.raises(ValueError, match=r"found 1 pair in .*; give at least two"):
        read_control_pairs(tmp_path)
