"""What was drawn in a folder, found in its files whatever else happened to them."""

import os
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from ether_diffusion.pipelines import AdapterUse, ImageMetadata, attach_metadata, png_bytes
from ether_diffusion.ui.outputs import STARRED, Outputs

SAID = ImageMetadata(
    "a red fox on a beach", "rain", 7, 20, 3.0, 8, 8, "EtherControlPipeline", "DDIMScheduler"
)
FOX, CAT = AdapterUse("fox", 1.0, {"unet": "a" * 64}), AdapterUse("cat", 0.5, {})


def save(outputs: Path, second: int, *, kind: str = "i00", said: ImageMetadata | None = SAID) -> Path:
    """Write a picture of a job that was drawn at a second of a day."""
    job = f"20261123-{second:06d}000-abcdef"
    path = outputs / "2026-11-23" / (job if kind.startswith("c") else "") / f"{job}-{kind}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", (8, 8), (second % 256, 0, 0))
    if said is not None:
        attach_metadata(picture, said)
    path.write_bytes(png_bytes(picture))
    return path


def found(history: Outputs, **search: object) -> list[str]:
    return [picture.id.split("-", 1)[1] for picture in history.pictures(**search)]  # type: ignore[arg-type]


def test_the_newest_stand_first_and_each_before_its_base(tmp_path: Path) -> None:
    for second, kind in ((1, "i00"), (3, "c001"), (2, "i00-base"), (2, "i00"), (2, "i01"), (3, "c002")):
        save(tmp_path, second, kind=kind)
    expected = ["3-c002", "3-c001", "2-i01", "2-i00", "2-i00-base", "1-i00"]
    assert [name.replace("000-abcdef", "").lstrip("0") for name in found(Outputs(tmp_path))] == expected


@pytest.mark.parametrize(
    ("search", "seconds"),
    [
        ({}, [5, 4, 3, 2, 1]),
        ({"text": "FOX beach"}, [2, 1]),
        ({"text": "rain"}, [3, 2, 1]),
        ({"text": "straße"}, [3]),
        ({"text": "STRASSE"}, [3]),
        ({"text": "none"}, []),
        ({"adapter": "fox"}, [2]),
        ({"adapter": "fo"}, []),
        ({"text": "fox", "adapter": "fox"}, [2]),
        ({"with_base": False}, [4, 3, 2, 1]),
    ],
)
def test_pictures_are_found_by_words_adapter_and_seed(
    tmp_path: Path, search: dict[str, object], seconds: list[int]
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2, said=replace(SAID, adapters=(FOX, CAT)))
    save(tmp_path, 3, said=replace(SAID, prompt="Eine Straße", seed=0))
    save(tmp_path, 4, said=None)
    save(tmp_path, 5, kind="i00-base", said=None)
    assert [int(name[:6]) for name in found(Outputs(tmp_path), **search)] == seconds
    assert Outputs(tmp_path).adapters() == ["cat", "fox"]


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    ours = save(tmp_path, 1)
    day = ours.parent
    secret = tmp_path.parent / f"{tmp_path.name}-secret.png"
    shutil.copy(ours, secret)
    (day / "holiday.png").write_bytes(ours.read_bytes())
    (day / "Thumbs.db").write_bytes(b"\0")
    (day / ".20261123-000009000-abcdef-i00.png.1.part").write_bytes(b"half")
    (day / "20261123-000002000-abcdef-i00.png").symlink_to(secret)
    (day / "20261123-000003000-abcdef-i00.png").mkdir()
    os.mkfifo(day / "20261123-000004000-abcdef-i00.png")
    (tmp_path / "elsewhere").symlink_to(tmp_path.parent)
    (tmp_path / "1" / "2" / "3" / "4").mkdir(parents=True)
    shutil.copy(ours, tmp_path / "1" / "2" / "3" / "4" / "20261123-000005000-abcdef-i00.png")
    assert [picture.path for picture in Outputs(tmp_path).pictures()] == [ours]


@pytest.mark.parametrize("data", [b"", b"no picture", b"\x89PNG\r\n\x1a\n\0\0\0\0IEND"])
def test_a_damaged_picture_says_nothing_and_hides_no_other(tmp_path: Path, data: bytes) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2).write_bytes(data)
    pictures = Outputs(tmp_path).pictures()
    assert [picture.metadata is None for picture in pictures] == [True, False]


def test_no_picture_is_read_twice_until_it_is_deleted_or_changed_by_hand(tmp_path: Path) -> None:
    history = Outputs(tmp_path)
    paths = [save(tmp_path, second) for second in range(1, 51)]
    pictures = history.pictures()
    assert len(pictures) == 50
    assert all(new is old for new, old in zip(history.pictures(), pictures, strict=True))
    paths[0].unlink()
    picture = Image.new("RGB", (8, 8))
    attach_metadata(picture, replace(SAID, prompt="another prompt"))
    paths[1].write_bytes(png_bytes(picture))
    assert found(history, text="another") == ["000002000-abcdef-i00"]
    shutil.rmtree(tmp_path)
    assert (history.pictures(), history.adapters()) == ([], [])


def test_a_picture_is_found_by_its_id_only(tmp_path: Path) -> None:
    history, path = Outputs(tmp_path), save(tmp_path, 1)
    assert history.picture(path.stem).path == path
    for wrong in (str(path), f"../{path.stem}", "", f"{path.stem}.png", "20261123-000002000-abcdef-i00"):
        with pytest.raises(FileNotFoundError, match="no longer there"):
            history.picture(wrong)


def test_a_zip_holds_the_files_as_they_are_and_of_none_there_is_none(tmp_path: Path) -> None:
    history = Outputs(tmp_path / "outputs")
    paths = [save(tmp_path / "outputs", 1), save(tmp_path / "outputs", 2, kind="c001")]
    pictures = history.pictures()
    save(tmp_path / "outputs", 3)  # after the search
    target = history.write_zip(pictures, tmp_path / "temp" / "all.zip")
    with zipfile.ZipFile(target) as file:
        assert file.testzip() is None
        inside = {name: file.read(name) for name in file.namelist()}
    assert inside == {p.relative_to(tmp_path / "outputs").as_posix(): p.read_bytes() for p in paths}
    assert [path.name for path in target.parent.iterdir()] == ["all.zip"]
    for path in (*paths, target):
        path.unlink()
    for gone in (pictures, []):
        with pytest.raises(ValueError, match="no picture to download"):
            history.write_zip(gone, target)
    assert list(target.parent.iterdir()) == []


def test_boards_are_kept_beside_the_pictures_and_follow_them(tmp_path: Path) -> None:
    history = Outputs(tmp_path)
    ids = [save(tmp_path, second).stem for second in (1, 2, 3)]
    base = save(tmp_path, 2, kind="i00-base").stem
    history.put(STARRED, ids[:2])
    history.put("  Sea  side ", [ids[2], base])
    again = Outputs(tmp_path)  # a server that was started later
    assert again.boards() == {STARRED: set(ids[:2]), "Sea side": {ids[2], base}}
    assert [picture.id for picture in again.pictures(board=STARRED)] == ids[1::-1]
    assert [p.id for p in again.pictures(board="Sea side", with_base=False)] == [ids[2], base]
    assert again.pictures(board="none") == []
    history.put(STARRED, ids[:1], is_on=False)
    assert again.boards()[STARRED] == {ids[1]}
    again.delete([ids[1], ids[2]])
    assert history.boards() == {"Sea side": {base}}  # an empty board goes
    assert [picture.id for picture in history.pictures()] == [base, ids[0]]
    for name in ("", "x" * 81):
        with pytest.raises(ValueError, match="characters; use 1 to 80"):
            history.put(name, ids)


def test_two_servers_lose_no_star(tmp_path: Path) -> None:
    ids = [f"20261123-{number:09d}-abcdef-i00" for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda each: Outputs(tmp_path).put(STARRED, [each]), ids))
    assert Outputs(tmp_path).boards() == {STARRED: set(ids)}


@pytest.mark.parametrize("data", [b"", b"[]", b'{"boards": {"a": 1}}', b"\xff"])
def test_a_file_of_boards_that_cannot_be_read_hides_nothing_and_is_not_replaced(
    tmp_path: Path, data: bytes
) -> None:
    history, path = Outputs(tmp_path), save(tmp_path, 1)
    (tmp_path / "boards.json").write_bytes(data)
    assert ([picture.path for picture in history.pictures()], history.boards()) == ([path], {})
    with pytest.raises(ValueError, match=r"boards\.json"):
        history.put(STARRED, [path.stem])
    assert (tmp_path / "boards.json").read_bytes() == data
