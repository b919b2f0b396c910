"""Sidecars and metadata are read in every form people keep them in, or refused by file, line or byte."""

import os
import random
from pathlib import Path

import pytest
from caption_reading import failure, prompts, read

from ether_diffusion.training.captions import decode_text


@pytest.mark.parametrize("name", ["a.txt", "a.caption", "a.jpg.txt", "a.TXT"])
def test_a_sidecar_is_found_by_the_photos_name_with_and_without_suffix(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("sks asleep")
    assert prompts(read(tmp_path, "a.jpg")) == ["sks asleep"]


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_metadata_gives_captions_as_datasets_writes_them(column: str, tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "a.jpg", "{column}": "sks, asleep"}}\n\n')
    (tmp_path / "metadata.csv").write_text(f'file_name,{column},width\r\nb.jpg,"sks, ""awake""",64\r\n')
    captions = read(tmp_path)
    assert prompts(captions) == ["sks, asleep", 'sks, "awake"']
    assert [caption.source for caption in captions.captions] == [
        "metadata.jsonl line 1",
        "metadata.csv line 2",
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_every_encoding_that_says_what_it_is_is_read(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("sks im Café 😀\r\n".encode(encoding))
    assert prompts(read(tmp_path, "a.jpg")) == ["sks im Café 😀"]


@pytest.mark.parametrize("encoding", ["utf-16-be", "utf-16-le"])
def test_utf_16_is_known_by_its_mark(encoding: str) -> None:
    assert decode_text("\ufeffé".encode(encoding)) == "é"


def test_a_caption_of_another_encoding_is_refused_with_the_byte_offset(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("sks im Café".encode("latin-1"))
    (tmp_path / "b.txt").write_bytes("sks".encode("utf-16-le"))
    said = failure(tmp_path)
    assert "a.txt is not UTF-8: byte 0xe9 at offset 10; save it as UTF-8" in said
    assert "b.txt is not plain text: byte 0x00 at offset 1; save it as UTF-8" in said


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("metadata.jsonl", "[1]", "line 1: it is [1]; it should be an object"),
        ("metadata.jsonl", '{"file_name": "a.jpg"', "line 1 is not valid JSON"),
        ("metadata.jsonl", '{"file_name": "a.jpg"}', "line 1 has the fields file_name; needed are"),
        ("metadata.jsonl", '{"file_name": "a.jpg", "text": 3}', "line 1: text is 3; it should be a"),
        ("metadata.jsonl", '{"file_name": "a.jpg", "text": "x", "prompt": "y"}', "line 1 has the fields"),
        ("metadata.csv", "file;text\na.jpg;x", "line 2 has the fields file;text; needed are file_name"),
        ("metadata.csv", "file_name,text\na.jpg,x,y", "line 2 has another number of fields than line 1"),
        ("metadata.csv", "file_name,text,text\n", "line 1 names a column twice"),
        ("metadata.csv", 'file_name,text\na.jpg,"x', "line 2 is not valid CSV"),
    ],
)
def test_metadata_that_cannot_be_read_is_refused_by_line(
    name: str, text: str, expected: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    assert f"{name} {expected}" in failure(tmp_path)


def test_captions_are_never_read_from_a_fifo_or_through_a_link(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    os.mkfifo(folder / "a.txt")
    (tmp_path / "secret").write_text("password")
    (folder / "b.txt").symlink_to(tmp_path / "secret")
    said = failure(folder)
    assert "a.txt is a FIFO, which is never opened; delete it or move it away" in said
    assert f"b.txt is a link to {tmp_path}/secret, outside the folder" in said
    assert "password" not in said


def test_a_sidecar_belongs_to_the_photo_of_its_own_normalisation_first(tmp_path: Path) -> None:
    composed, apart = "\u00e9", "e\u0301"
    (tmp_path / f"{composed}.txt").write_text("sks one")
    (tmp_path / f"{apart}.txt").write_text("sks two")
    assert prompts(read(tmp_path, f"{composed}.jpg {apart}.jpg")) == ["sks one", "sks two"]
    (tmp_path / f"{apart}.txt").unlink()
    assert prompts(read(tmp_path, f"{apart}.jpg")) == ["sks one"]


@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl", "metadata.csv"])
def test_damaged_captions_end_in_prompts_or_one_error(name: str, tmp_path: Path) -> None:
    draw = random.Random(name)
    whole = {"a.txt": "sks\n", "metadata.csv": 'file_name,text\na.jpg,"sks"\n'}.get(
        name, '{"file_name": "a.jpg", "text": "sks"}\n'
    )
    for _ in range(100):
        broken = bytearray(whole.encode())
        for _ in range(draw.randint(1, 4)):
            start = draw.randrange(len(broken) + 1)
            broken[start : start + draw.randint(0, 2)] = draw.choice(
                (b'"', b",", b"\r", b"\0", b"{", b"\xff", b"9")
            )
        (tmp_path / name).write_bytes(broken)
        try:
            said = f"captions in {len(read(tmp_path, 'a.jpg').captions)}"
        except ValueError as error:
            said = str(error)
        assert said.startswith("captions in ")
