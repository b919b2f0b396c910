"""A folder's photos are found in order, under whatever names and in whatever subfolders they have.

What is no usable photo is refused by what it is, all of it at once; nothing hangs, crashes or changes.
"""

import json
import os
import random
import socket
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import photo_files
import pytest
from accelerate import Accelerator
from photo_files import noise, photo
from PIL import Image
from training_runs import config

from ether_diffusion.tiny_world.concepts import find_concept
from ether_diffusion.tiny_world.subjects import write_photos
from ether_diffusion.training.config import ControlConfig, DataConfig, PriorConfig
from ether_diffusion.training.dataset import read_training_data
from ether_diffusion.training.decoding import Decoded, decode_bytes
from ether_diffusion.training.photos import PhotoFolder, find_photos
from ether_diffusion.training.plain_files import MAX_DEPTH
from ether_diffusion.training.prior import read_class_images
from ether_diffusion.training.setup import check_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


def fill(folder: Path, **files: bytes) -> None:
    for name, data in files.items():
        stem, _, suffix = name.rpartition("_")
        (folder / f"{stem}.{suffix}").write_bytes(data)


def check(folder: Path, **options: bool | int) -> PhotoFolder:
    """Find photos; nothing on disk may change by it."""
    before = photo_files.snapshot(folder.parent)
    found = find_photos(folder, **options)  # type: ignore[arg-type]
    assert photo_files.snapshot(folder.parent) == before
    return found


def refusals(folder: Path, **options: bool | int) -> list[str]:
    """What is said of the bad files beside one good photo."""
    fill(folder, zz_png=photo(seed=99))
    found = check(folder, **options)
    assert [each.name for each in found.photos] == ["zz.png"]
    return [refusal.sentence for refusal in found.refused]


def test_a_heic_photo_is_decoded_where_the_plugin_is_installed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for pillow-heif, whose pixels are blue."""
    (tmp_path / "pillow_heif.py").write_text(
        "from PIL import Image, ImageFile\n"
        "class Heif(ImageFile.ImageFile):\n"
        "    format = 'HEIF'\n"
        "    def _open(self): self._size, self._mode = (80, 70), 'RGB'\n"
        "    def load(self): self.im = Image.new('RGB', self.size, 'blue').im; self.tile = []\n"
        "def register_heif_opener():\n"
        "    Image.register_open('HEIF', Heif, lambda prefix: prefix[4:8] == b'ftyp')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    Image.init()  # Pillow registers its own formats once, and not into the copies below
    monkeypatch.setattr(Image, "ID", [*Image.ID])
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    fill(folder, a_heic=b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    try:
        assert check(folder).photos[0].size == (70, 80)
    finally:
        sys.modules.pop("pillow_heif", None)


def test_exif_that_cannot_be_read_leaves_the_photo_as_it_is_stored(folder: Path) -> None:
    fill(folder, a_png=photo_files.encode(photo_files.noise(90, 70), "PNG", exif=b"Exif\0\0nonsense"))
    found = check(folder)
    assert found.warnings == ("a.png: has EXIF data that cannot be read; it is taken as upright",)
    assert found.photos[0].size == (70, 90)


def test_a_photo_knows_its_upright_size_at_any_scale_of_decoding(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    fill(folder, a_jpg=photo_files.encode(Image.new("L", (4300, 4200), 90), "JPEG", exif=exif))
    (found,) = check(folder).photos
    assert (found.width, found.height, found.has_alpha) == (4200, 4300, False)


def test_doubled_photos_are_warned_of_in_pairs(folder: Path) -> None:
    picture = photo_files.noise()
    fill(folder, a_png=photo_files.encode(picture, "PNG"), b_png=photo_files.encode(picture, "PNG"))
    fill(folder, c_tif=photo_files.encode(picture, "TIFF"), d_png=photo(seed=5))
    said = [warning.partition(";")[0] for warning in check(folder).warnings]
    assert said == [f"a.png and {name} are the same picture" for name in ("b.png", "c.tif")]


def test_what_is_no_photo_by_its_name_is_passed_over(folder: Path) -> None:
    for name in (
        ".DS_Store",
        "._a.png",
        "Thumbs.db",
        "desktop.ini",
        "a.txt",
        "metadata.jsonl",
        "metadata.csv",
    ):
        (folder / name).write_bytes(b"whatever")
    (folder / "more").mkdir()
    fill(folder / "more", b_png=photo())
    assert refusals(folder) == []


def test_strange_names_work_in_their_order_and_are_shown_escaped(folder: Path) -> None:
    names = ["-rf.png", "10.png", "9.png", "B.png", "a.png", "two\nlines.png", "x" * 251 + ".png", "ä ö.png"]
    names += ["\u202egnp.exe.png", "😀.png"]
    for seed, name in enumerate(names):
        (folder / name).write_bytes(photo(seed=seed))
        (folder / f"bad{name}"[:255]).write_bytes(b"")
    (folder / os.fsdecode(b"bad\xff.png")).write_bytes(b"")
    found = check(folder)
    assert [each.name for each in found.photos] == names
    said = "".join(refusal.sentence for refusal in found.refused)
    assert said.isprintable()
    assert all(
        each in said for each in ("badtwo\\nlines.png is empty", "\\u202e", "bad\\udcff.png", "x" * 250)
    )


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a_svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", 'begins with b"<svg xmlns='),
        ("a_heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is a HEIC photo; install pillow-heif or convert"),
        ("a_mp4", b"\0\0\0\x18ftypisom\0\0\0\0isommp41", "is no image that can be read (jpg, png, "),
        ("a_nef", photo(kind="TIFF"), "is a camera raw file, which is not read; export it as JPEG"),
        ("a_zip", b"PK\x03\x04" + bytes(50), "it begins with b'PK"),
        ("a_bin", bytes(range(128, 256)), "it begins with b'\\x80\\x81"),
    ],
)
def test_a_file_that_is_no_photo_is_refused_by_what_it_is(
    name: str, data: bytes, reason: str, folder: Path
) -> None:
    fill(folder, **{name: data})
    (said,) = refusals(folder)
    assert said.startswith(f"{name.replace('_', '.')} is ")
    assert reason in said


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "AVIF", "BMP"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_truncated_photo_is_found_by_decoding_it_whole(kind: str, share: float, folder: Path) -> None:
    data = photo(kind=kind)
    fill(folder, a_img=data[: int(len(data) * share)])
    (said,) = refusals(folder)
    assert said.startswith(("a.img is cut short or damaged (", "a.img is no image that can be read"))


def test_an_animation_that_breaks_off_after_its_first_frame_is_refused(folder: Path) -> None:
    frames = [Image.fromarray(photo_files.noise(seed=seed)).quantize(16) for seed in range(2)]
    whole = photo_files.encode(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=100)
    second = whole.rindex(b"\x21\xf9\x04")  # the graphic control extension before the last frame
    fill(folder, a_gif=whole[: second + 1])
    (said,) = refusals(folder)
    assert said.startswith("a.gif is cut short or damaged (")


def test_links_are_followed_only_inside_or_when_allowed_and_never_in_circles(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere.png").write_bytes(photo())
    (folder / "a.png").symlink_to(tmp_path / "elsewhere.png")
    (said,) = refusals(folder)
    assert said.startswith(f"a.png is a link to {tmp_path}/elsewhere.png, outside the folder; ")
    assert [each.name for each in check(folder, follow_symlinks=True).photos] == ["a.png", "zz.png"]
    (folder / "a.png").unlink()
    for name, target in {"a.png": "b.png", "b.png": "a.png", "c.png": "gone.png", "d": "."}.items():
        (folder / name).symlink_to(target)
    circle = "is a link that leads back to itself; delete it"
    expected = [f"a.png {circle}", f"b.png {circle}", "c.png is a link to nothing; delete it"]
    assert refusals(folder, follow_symlinks=True) == expected


def test_fifos_sockets_and_devices_are_never_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)  # a socket's path must be short
    os.mkfifo("a.png")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("b.png")
        (folder / "c.png").symlink_to("/dev/zero")
        rest = "which is never opened; delete it or move it away"
        expected = [f"a.png is a FIFO, {rest}", f"b.png is a socket, {rest}", f"c.png is a device, {rest}"]
        assert refusals(folder, follow_symlinks=True) == expected


def damaged(data: bytes, draw: random.Random) -> bytes:
    broken = bytearray(data)
    for _ in range(draw.randint(1, 6)):
        start, length = draw.randrange(len(broken)), draw.choice((1, 1, 2, 4, 30))
        kind = draw.randrange(4)
        if kind == 0:
            broken[start : start + length] = draw.randbytes(length)
        elif kind == 1:
            broken[start : start + length] = draw.choice((b"\0", b"\xff")) * length
        elif kind == 2:
            del broken[start : start + length]
        else:
            broken[start:start] = broken[: draw.randrange(40)]
    return bytes(broken or b"\0")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "GIF", "BMP"])
def test_damage_ends_in_a_refusal_or_a_photo_and_in_nothing_else(kind: str, folder: Path) -> None:
    draw, exif = random.Random(kind), Image.Exif()
    exif[0x0112] = 5
    options = {} if kind in ("GIF", "BMP") else {"exif": exif, "icc_profile": photo_files.adobe_rgb_profile()}
    whole = photo_files.encode(photo_files.noise(16, 12), kind, **options)
    for number in range(60):
        (folder / f"{number}.img").write_bytes(damaged(whole, draw))
    (folder / "whole.img").write_bytes(whole)
    found = check(folder, min_side=1)
    assert len(found.photos) + len(found.refused) == 61
    assert "whole.img" in {each.name for each in found.photos}
    assert all(refusal.sentence.isprintable() for refusal in found.refused)


# subfolders


def write(root: Path, *names: str) -> Path:
    """Write different photos by names with subfolders."""
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(photo(seed=seed))
    return root


def prompts(root: Path, instance_prompt: str = "x") -> tuple[dict[str, tuple[str, int]], str]:
    """Return the prompt and repeats of each photo by its name, and what is said."""
    found = read_training_data(DataConfig(instance_data_dir=root, instance_prompt=instance_prompt))
    by_name = {each.name: (each.prompt, (each.named_repeats or (1,))[0]) for each in found.photos}
    return by_name, "\n".join(found.warnings)


def test_kohyas_folders_say_how_often_and_what(tmp_path: Path) -> None:
    root = write(tmp_path, "10_sks dog/a.png", "10_sks dog/b.png", "1_my_cat/a.png", "0_dog/c.png")
    (root / "10_sks dog" / "b.txt").write_text("sks asleep")
    found, said = prompts(root, "a dog")
    assert found == {
        "10_sks dog/a.png": ("sks dog", 10),
        "10_sks dog/b.png": ("sks asleep", 10),
        "1_my_cat/a.png": ("my_cat", 1),
    }
    assert "10_sks dog, as its name says: 2 photos, 10 times an epoch each; 1 without a caption get" in said
    assert 'get "sks dog" instead of the instance prompt' in said
    assert "not looked into: 0_dog (0 repeats)" in said


def test_other_folders_are_just_folders(tmp_path: Path) -> None:
    names = [f"{name}/a.png" for name in ("images", "2024_holiday", "_dog", "10 dog", "train/10", "10_")]
    assert prompts(write(tmp_path, *names), "a dog")[0] == dict.fromkeys(names, ("a dog", 1))


def test_an_epoch_has_each_photo_as_often_as_its_folder_says(tmp_path: Path) -> None:
    write(tmp_path / "photos", "3_sks/a.png", "3_sks/b.png", "2_cat/c.png", "d.png")
    plan = check_run(config(tmp_path, instance_prompt="x", repeats=2), Accelerator()).plan
    assert plan.num_samples == 2 * (3 + 3 + 2 + 1)
    names = Counter(plan.photos[plan.sample(n)[1][0].photo].name for n in range(plan.num_samples))
    assert names == {"3_sks/a.png": 6, "3_sks/b.png": 6, "2_cat/c.png": 4, "d.png": 2}


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
    assert prompts(root)[0] == {"a.png": ("x", 1), "images/a.png": ("asleep", 1)}


def test_captions_and_photos_in_subfolders_find_each_other_or_are_named(tmp_path: Path) -> None:
    root = write(tmp_path, "images/a.png", "images/b.png", "one/a.png", "two/a.png")
    (root / "one" / "a.txt").write_text("awake")
    (root / "two" / "a.png.txt").write_text("asleep")
    rows = [{"file_name": name, "text": "x"} for name in ("a.png", "images/c.png", "/images/a.png")]
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "images" / "d.txt").write_text("x")
    found, said = prompts(root)
    assert (found["one/a.png"], found["two/a.png"]) == (("awake", 1), ("asleep", 1))
    assert "4 captions belong to no usable photo: " in said
    for name in ("images/c.png (metadata.jsonl line 2)", "images/d.txt", "/images/a.png (metadata"):
        assert name in said
    assert "2 of 4 photos have no caption and get the instance prompt: images/a.png, images/b.png" in said


def test_folders_that_are_not_looked_into_are_named(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    hidden = (".git/b.png", "__MACOSX/c.png", "x/.ipynb_checkpoints/d.png")
    root = write(tmp_path / "photos", "a.png", *hidden, "run/e.png")
    (root / "run" / "run.json").write_text("{}")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    found = find_photos(root, without=())
    assert [each.name for each in found.photos] == ["a.png"]
    assert found.warnings == (
        "not looked into: .git (hidden), __MACOSX (of a system), link (a link; follow_symlinks looks into "
        "it), run (a training run), x/.ipynb_checkpoints (hidden)",
    )


def test_loops_of_links_depth_and_number_have_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deepest = "/".join(["d"] * MAX_DEPTH)
    root = write(tmp_path, "a.png", "x/b.png", f"{deepest}/c.png", "d/e.png", f"{deepest}/d/f.png")
    (root / "x" / "again").symlink_to(root)
    (root / "x" / "twice").symlink_to(root / "x")
    found = find_photos(root, without=(), follow_symlinks=True)
    assert {each.path.name for each in found.photos} == {"a.png", "b.png", "c.png", "e.png"}
    assert "x/again (the same folder once more)" in found.warnings[0]
    assert f"(more than {MAX_DEPTH} folders deep)" in found.warnings[0]
    monkeypatch.setattr("ether_diffusion.training.plain_files.MAX_FILES", 3)
    with pytest.raises(ValueError, match="holds more than 3 files; give the folder of the photos"):
        find_photos(root, without=())


def test_what_a_run_reads_and_writes_inside_the_photos_folder_is_no_photo_and_all_is_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[bytes] = []

    def counted(data: bytes, *options: Any, **more: Any) -> Decoded:
        decoded.append(data)
        return decode_bytes(data, *options, **more)

    monkeypatch.setattr("ether_diffusion.training.photos.decode_bytes", counted)
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
    assert [each.name for each in run.training.photos] == ["a.png"]
    assert run.num_missing == 0
    assert len(run.plan.class_photos) == 1
    assert len(decoded) == 2


def test_masks_and_control_images_lie_in_folders_of_the_same_names(tmp_path: Path) -> None:
    root = write(tmp_path / "photos", "one/a.png", "two/a.png")
    for folder in ("masks", "maps"):
        write(tmp_path / folder, "two/a.png", "one/a.png")
    data = DataConfig(instance_data_dir=root, instance_prompt="x", mask_data_dir=tmp_path / "masks")
    control = ControlConfig(conditioning_data_dir=tmp_path / "maps")
    found = read_training_data(data, control=control).photos
    names = ("one/a.png", "two/a.png")
    assert [each.mask.path for each in found if each.mask] == [tmp_path / "masks" / name for name in names]
    assert [each.control.path for each in found if each.control] == [tmp_path / "maps" / n for n in names]
    (tmp_path / "maps" / "two" / "a.png").rename(tmp_path / "maps" / "one" / "a.jpg")
    with pytest.raises(ValueError, match=r"no control image: two/a\.png") as caught:
        read_training_data(data, control=control)
    assert "one/a.jpg, one/a.png in maps are control images of one photo; keep one" in str(caught.value)


def test_class_images_in_subfolders_count_and_their_names_are_told_of(tmp_path: Path) -> None:
    write(tmp_path / "reg", "1_dog/a.png", "1_dog/b.png", "c.png")
    prior = PriorConfig(
        prior_preservation="class_images", class_data_dir=tmp_path / "reg", class_prompt="a dog"
    )
    found = read_class_images(prior)
    assert [each.name for each in found.photos] == ["1_dog/a.png", "1_dog/b.png", "c.png"]
    assert found.warnings == ("1_dog: neither repeats nor words are taken from these names",)


def test_doubtful_photos_are_named_and_others_are_not(tmp_path: Path) -> None:
    sharp = Image.fromarray(noise(8, 8, seed=1)).resize((256, 192), Image.Resampling.NEAREST)
    files = {
        "black.png": Image.new("RGB", (64, 64)), "long.png": Image.fromarray(noise(400, 80, seed=2)),
        "sharp.png": sharp, "blurred.png": Image.fromarray(noise(8, 8, seed=3)).resize((512, 512)),
        "turned.jpg": sharp.transpose(Image.Transpose.TRANSVERSE).resize((96, 128)),
        "noise.png": Image.fromarray(noise(seed=4)),
    }  # fmt: skip
    for name, image in files.items():
        image.save(tmp_path / name)
    said = "\n".join(find_photos(tmp_path).warnings)
    assert "turned.jpg like sharp.png: looks like another photo" in said
    for name, words in (("black", "one colour"), ("long", "three times as long"), ("blurred", "blurred")):
        assert f"{name}.png: " in said
        assert words in said
    assert "noise" not in said
    assert len(said.splitlines()) == 4


def test_the_shipped_photos_are_not_doubtful(tmp_path: Path) -> None:
    for name in ("fox", "teapot", "guitar"):
        write_photos(find_concept(name), tmp_path / name)
        assert find_photos(tmp_path / name).warnings == ()
