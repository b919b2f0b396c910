"""Photos in subfolders: kohya's, which say how often and what, and others, which are just folders."""

import json
import os
from collections import Counter
from pathlib import Path

import photo_files
import pytest
from accelerate import Accelerator
from training_runs import config

from ether_diffusion.training.config import ControlConfig, DataConfig, PriorConfig
from ether_diffusion.training.dataset import read_class_images, read_training_data
from ether_diffusion.training.photos import find_photos
from ether_diffusion.training.plain_files import MAX_DEPTH, MAX_FILES
from ether_diffusion.training.prior import count_missing
from ether_diffusion.training.sample_plan import SampleOrder
from ether_diffusion.training.setup import check_run


def write(root: Path, *names: str) -> Path:
    """Write different photos by names with subfolders."""
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(photo_files.photo(seed=seed))
    return root


def prompts(root: Path, instance_prompt: str | None = None) -> dict[str, tuple[str, int]]:
    """Return the prompt and repeats of each photo by its name."""
    found = read_training_data(DataConfig(instance_data_dir=root, instance_prompt=instance_prompt))
    return {item.name: (item.prompt, item.repeats) for item in found.photos}


def warnings(root: Path, instance_prompt: str = "x") -> str:
    return "\n".join(
        read_training_data(DataConfig(instance_data_dir=root, instance_prompt=instance_prompt)).warnings
    )


def test_kohyas_folders_say_how_often_and_what(tmp_path: Path) -> None:
    root = write(tmp_path, "10_sks dog/a.png", "10_sks dog/b.png", "1_my_cat/a.png")
    (root / "10_sks dog" / "b.txt").write_text("sks asleep")
    assert prompts(root) == {
        "10_sks dog/a.png": ("sks dog", 10),
        "10_sks dog/b.png": ("sks asleep", 10),
        "1_my_cat/a.png": ("my_cat", 1),
    }
    said = warnings(root, "a dog")
    assert "10_sks dog, as its name says: 2 photos, 10 times an epoch each; 1 without a caption get" in said
    assert 'get "sks dog" instead of the instance prompt' in said


def test_photos_beside_kohyas_folders_are_trained_on_too(tmp_path: Path) -> None:
    root = write(tmp_path, "a.png", "3_sks/more/b.png")
    assert prompts(root, "a dog") == {"a.png": ("a dog", 1), "3_sks/more/b.png": ("sks", 3)}


@pytest.mark.parametrize("folder", ["images", "2024_holiday", "_dog", "10 dog", "train/10", "10_"])
def test_other_folders_are_just_folders(tmp_path: Path, folder: str) -> None:
    assert prompts(write(tmp_path, f"{folder}/a.png"), "a dog") == {f"{folder}/a.png": ("a dog", 1)}


def test_a_folder_of_no_repeats_is_left_out_with_a_word(tmp_path: Path) -> None:
    root = write(tmp_path, "0_dog/a.png", "b.png")
    assert set(prompts(root, "x")) == {"b.png"}
    assert "not looked into: 0_dog (0 repeats)" in warnings(root)


def test_an_epoch_has_each_photo_as_often_as_its_folder_says(tmp_path: Path) -> None:
    write(tmp_path / "photos", "3_sks/a.png", "3_sks/b.png", "2_cat/c.png", "d.png")
    plan = check_run(config(tmp_path, instance_prompt="x", repeats=2), Accelerator()).plan()
    assert plan.num_samples == 2 * (3 + 3 + 2 + 1)
    names = Counter(plan.photo(plan.sample(n).crops[0].photo).name for n in range(plan.num_samples))
    assert names == {"3_sks/a.png": 6, "3_sks/b.png": 6, "2_cat/c.png": 4, "d.png": 2}


@pytest.mark.parametrize("buckets", [None, [0, 1, 0, 1, 0]])
def test_equal_repeats_of_their_own_change_no_order(buckets: list[int] | None) -> None:
    one = SampleOrder(5, 2, seed=3, buckets=buckets, repeats=4)
    other = SampleOrder(5, 2, seed=3, buckets=buckets, repeats=[4] * 5)
    samples = range(3 * one.num_samples)
    assert [one.photo(each) for each in samples] == [other.photo(each) for each in samples]


@pytest.mark.parametrize(
    ("place", "row"),
    [
        ("metadata.jsonl", "images/a.png"),
        ("metadata.jsonl", ".\\images\\a.png"),
        ("metadata.jsonl", "./images//a.png"),
        ("images/metadata.jsonl", "a.png"),
        ("images/metadata.jsonl", "../images/a.png"),
        ("metadata.csv", "images/a.png"),
    ],
)
def test_rows_find_their_photos_in_subfolders(tmp_path: Path, place: str, row: str) -> None:
    root = write(tmp_path, "images/a.png", "a.png")
    is_csv = place.endswith(".csv")
    text = f"file_name,text\n{row},asleep\n" if is_csv else json.dumps({"file_name": row, "text": "asleep"})
    (root / place).write_text(text)
    assert prompts(root, "x") == {"a.png": ("x", 1), "images/a.png": ("asleep", 1)}
    assert "1 of 2 photos have no caption and get the instance prompt: a.png" in warnings(root)


@pytest.mark.parametrize("suffix", [".txt", ".caption", ".png.txt"])
def test_sidecars_belong_to_the_photo_in_their_own_folder(tmp_path: Path, suffix: str) -> None:
    root = write(tmp_path, "one/a.png", "two/a.png")
    (root / "one" / f"a{suffix}").write_text("awake")
    (root / "two" / f"a{suffix}").write_text("asleep")
    assert prompts(root) == {"one/a.png": ("awake", 1), "two/a.png": ("asleep", 1)}


def test_captions_without_photos_and_photos_without_captions_are_named(tmp_path: Path) -> None:
    root = write(tmp_path, "images/a.png", "images/b.png")
    rows = [{"file_name": name, "text": "x"} for name in ("a.png", "images/c.png", "/images/a.png")]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "images" / "d.txt").write_text("x")
    said = warnings(root)
    assert "4 captions belong to no usable photo: " in said
    for name in ("images/c.png (metadata.jsonl line 2)", "images/d.txt", "/images/a.png (metadata"):
        assert name in said
    assert "2 of 2 photos have no caption and get the instance prompt: images/a.png, images/b.png" in said


def test_folders_that_are_not_looked_into_are_named(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    hidden = (".git/b.png", "__MACOSX/c.png", "x/.ipynb_checkpoints/d.png")
    root = write(tmp_path / "photos", "a.png", *hidden, "run/e.png")
    (root / "run" / "run.json").write_text("{}")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    found = find_photos(root, without=())
    assert [photo.name for photo in found.photos] == ["a.png"]
    assert found.warnings == (
        "not looked into: .git (hidden), __MACOSX (of a system), link (a link; follow_symlinks looks into "
        "it), run (a training run), x/.ipynb_checkpoints (hidden)",
    )


def test_loops_of_links_and_depth_have_an_end(tmp_path: Path) -> None:
    deepest = "/".join(["d"] * MAX_DEPTH)
    root = write(tmp_path, "a.png", "x/b.png", f"{deepest}/c.png", "d/e.png", f"{deepest}/d/f.png")
    (root / "x" / "again").symlink_to(root)
    (root / "x" / "twice").symlink_to(root / "x")
    found = find_photos(root, without=(), follow_symlinks=True)
    assert {photo.path.name for photo in found.photos} == {"a.png", "b.png", "c.png", "e.png"}
    assert "x/again (the same folder once more)" in found.warnings[0]
    assert f"(more than {MAX_DEPTH} folders deep)" in found.warnings[0]


def test_a_whole_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, listdir = write(tmp_path, "x/a.png"), os.listdir
    names = [f"{number}.png" for number in range(MAX_FILES + 1)]
    monkeypatch.setattr(os, "listdir", lambda path: names if Path(path).name == "x" else listdir(path))
    with pytest.raises(ValueError, match=f"holds more than {MAX_FILES} files; give the folder of the photos"):
        find_photos(root, without=())


def test_what_a_run_reads_and_writes_inside_the_photos_folder_is_no_photo(tmp_path: Path) -> None:
    root = write(tmp_path / "photos", "a.png", "masks/a.png", "classes/b.png", "mine/samples/c.png")
    made = config(
        tmp_path,
        instance_prompt="x",
        output_dir=str(root / "mine"),
        mask_data_dir=str(root / "masks"),
        prior_preservation="class_images",
        class_data_dir=str(root / "classes"),
        class_prompt="y",
        num_class_images=1,
    )
    run = check_run(made, Accelerator())
    assert [item.name for item in run.training.photos] == ["a.png"]
    assert run.num_missing == 0


def test_masks_and_control_images_lie_in_folders_of_the_same_names(tmp_path: Path) -> None:
    root = write(tmp_path / "photos", "one/a.png", "two/a.png")
    for folder in ("masks", "maps"):
        write(tmp_path / folder, "two/a.png", "one/a.png")
    data = DataConfig(instance_data_dir=root, instance_prompt="x", mask_data_dir=tmp_path / "masks")
    control = ControlConfig(conditioning_data_dir=tmp_path / "maps")
    items = read_training_data(data, control=control).photos
    assert [item.mask.name for item in items if item.mask] == ["one/a.png", "two/a.png"]
    assert [item.control.name for item in items if item.control] == ["one/a.png", "two/a.png"]
    (tmp_path / "maps" / "two" / "a.png").unlink()
    with pytest.raises(ValueError, match=r"1 photos have no control image in .*: two/a\.png"):
        read_training_data(data, control=control)


def test_class_images_in_subfolders_count_and_their_names_are_told_of(tmp_path: Path) -> None:
    write(tmp_path / "reg", "1_dog/a.png", "1_dog/b.png", "c.png")
    assert count_missing(tmp_path / "reg", 5) == 2
    prior = PriorConfig(
        prior_preservation="class_images", class_data_dir=tmp_path / "reg", class_prompt="a dog"
    )
    found = read_class_images(DataConfig(instance_data_dir=tmp_path), prior)
    assert [item.prompt for item in found.photos] == ["a dog"] * 3
    assert "class images: 1_dog: neither repeats nor words are taken from these names" in found.warnings


def test_photos_of_one_name_in_two_folders_have_fingerprints_of_their_own(tmp_path: Path) -> None:
    root = write(tmp_path, "one/a.png", "two/a.png", "a.png")
    assert set(find_photos(root, without=()).fingerprint()) == {"a.png", "one/a.png", "two/a.png"}
