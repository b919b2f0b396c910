"""Captions in every form people keep them in become prompts; what is wrong or doubtful is said by name."""

import os
import random
from contextlib import suppress
from pathlib import Path
from typing import Any

import photo_files
import pytest

from ether_diffusion.training.captions import (
    caption_photos,
    decode_text,
    doubt_token,
    find_cut,
    read_caption_files,
)
from ether_diffusion.training.config import DataConfig
from ether_diffusion.training.photos import Photo
from recipes.tiny_world.tokenizer import IDENTIFIERS, train_tokenizer


def read(
    folder: Path, names: str = "a.jpg b.jpg", prompt: str | None = "a photo of {token} dog", **options: Any
) -> tuple[list[str], list[str]]:
    """Return prompts and warnings of photos, which need not exist for that; nothing on disk may change."""
    facts: dict[str, Any] = {"width": 64, "height": 64, "pixels_sha256": "", "has_alpha": False, "notes": ()}
    photos = [Photo(path=folder / name, name=name, sha256="", **facts) for name in names.split()]
    before, warnings = photo_files.snapshot(folder), list[str]()
    found, problems = read_caption_files(folder)
    data = DataConfig(instance_data_dir=folder, **{"instance_prompt": prompt, "token": "sks", **options})
    photos = caption_photos(photos, found, data, problems, warnings)
    assert photo_files.snapshot(folder) == before
    if problems:
        raise ValueError("\n".join(problems))
    return [photo.prompt for photo in photos], warnings


def failure(folder: Path, names: str = "a.jpg b.jpg", **options: Any) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read(folder, names, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.txt", "a.caption", "a.jpg.txt", "a.TXT"])
def test_a_text_file_is_found_by_the_photos_name_with_and_without_suffix(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("sks asleep")
    assert read(tmp_path, "a.jpg")[0] == ["sks asleep"]


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_metadata_gives_captions_as_datasets_writes_them(column: str, tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "a.jpg", "{column}": "sks, asleep"}}\n\n')
    (tmp_path / "metadata.csv").write_text(f'file_name,{column},width\r\nb.jpg,"sks, ""awake""",64\r\n')
    assert read(tmp_path)[0] == ["sks, asleep", 'sks, "awake"']


def test_a_row_of_csv_ends_where_its_line_does(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text('file_name,text\na.jpg,sks\u2028\x85 one\nb.jpg,"sks\ntwo"\n')
    found, warnings = read(tmp_path)
    assert found == ["sks one", "sks two"]
    assert "metadata.csv line 4: of several lines, which are read as one caption" in warnings


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_every_encoding_that_says_what_it_is_is_read(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("sks im Café 😀\r\n".encode(encoding))
    assert read(tmp_path, "a.jpg")[0] == ["sks im Café 😀"]
    assert [decode_text("\ufeffé".encode(f"utf-16-{end}")) for end in ("be", "le")] == ["é", "é"]


def test_a_caption_of_another_encoding_is_refused_with_the_byte_offset(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("sks im Café".encode("latin-1"))
    (tmp_path / "b.txt").write_bytes("sks".encode("utf-16-le"))
    said = failure(tmp_path)
    assert "a.txt is not UTF-8: byte 0xe9 at offset 10" in said
    assert "b.txt is not UTF-8: byte 0x00 at offset 1" in said


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("metadata.jsonl", "[1]", "line 1 needs file_name and one of text, caption, prompt"),
        ("metadata.jsonl", '{"file_name": "a.jpg"', "line 1 is not valid JSON"),
        ("metadata.jsonl", '{"file_name": "a.jpg"}', "line 1 needs"),
        ("metadata.jsonl", '{"file_name": "a.jpg", "text": 3}', "line 1 needs"),
        ("metadata.jsonl", '{"file_name": "a.jpg", "text": "x", "prompt": "y"}', "line 1 needs"),
        ("metadata.csv", "file;text\na.jpg;x", "line 2 needs"),
        ("metadata.csv", "file_name,text\na.jpg,x,y", "line 2 needs"),
        ("metadata.csv", "file_name,text,text\na.jpg,x,y", "line 2 needs"),
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
    assert "a.txt is a FIFO" in said
    assert f"b.txt is a link to {tmp_path}/secret, outside the folder" in said
    assert "password" not in said


def test_a_text_file_belongs_to_the_photo_of_its_own_normalisation_first(tmp_path: Path) -> None:
    composed, apart = "\u00e9", "e\u0301"
    (tmp_path / f"{composed}.txt").write_text("sks one")
    (tmp_path / f"{apart}.txt").write_text("sks two")
    assert read(tmp_path, f"{composed}.jpg {apart}.jpg")[0] == ["sks one", "sks two"]
    (tmp_path / f"{apart}.txt").unlink()
    assert read(tmp_path, f"{apart}.jpg")[0] == ["sks one"]


@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl", "metadata.csv"])
def test_damaged_captions_end_in_prompts_or_one_error(name: str, tmp_path: Path) -> None:
    draw = random.Random(name)
    whole = {"a.txt": "sks\n", "metadata.csv": 'file_name,text\na.jpg,"sks"\n'}.get(
        name, '{"file_name": "a.jpg", "text": "sks"}\n'
    )
    for _ in range(100):
        broken = bytearray(whole.encode())
        for _ in range(draw.randint(1, 4)):
            start, noise = draw.randrange(len(broken) + 1), (b'"', b",", b"\r", b"\0", b"{", b"\xff", b"9")
            broken[start : start + draw.randint(0, 2)] = draw.choice(noise)
        (tmp_path / name).write_bytes(broken)
        with suppress(ValueError):
            read(tmp_path, "a.jpg")


def test_photos_without_a_caption_get_the_instance_prompt_and_are_counted(tmp_path: Path) -> None:
    assert read(tmp_path) == (["a photo of sks dog"] * 2, [])
    (tmp_path / "a.txt").write_text("sks on a beach\n")
    found, (warning,) = read(tmp_path)
    assert found == ["sks on a beach", "a photo of sks dog"]
    assert warning.startswith("1 of 2 photos have no caption")
    assert warning.endswith(": b.jpg")
    assert "b.jpg has no caption, and there is no instance prompt" in failure(tmp_path, prompt=None)


def test_captions_that_contradict_each_other_are_named_both(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("sks asleep")
    (tmp_path / "a.caption").write_text("sks  asleep\n")
    assert read(tmp_path, "a.jpg")[0] == ["sks asleep"]
    (tmp_path / "a.caption").write_text("sks awake")
    (tmp_path / "b.txt").write_text("sks awake")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.jpg", "text": "sks runs"}')
    said = failure(tmp_path)
    assert 'a.jpg has different captions, "sks awake" in a.caption and "sks asleep" in a.txt' in said
    assert '"sks awake" in b.txt and "sks runs" in metadata.jsonl line 1' in said


def test_one_caption_for_two_photos_and_one_for_none_are_warned_of(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("sks asleep")
    (tmp_path / "readme.txt").write_text("hello")
    (tmp_path / "metadata.csv").write_text("file_name,text\nc.jpg,sks\n")
    assert read(tmp_path, "a.jpg a.png")[1] == [
        "a.txt is the caption of 2 photos: a.jpg, a.png",
        "2 captions belong to no usable photo: c.jpg (metadata.csv line 2), readme.txt",
    ]


def test_an_empty_caption_is_none_and_several_lines_are_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.txt").write_bytes(b"sks\r\nasleep\r\n")
    found, warnings = read(tmp_path)
    assert found == ["a photo of sks dog", "sks asleep"]
    assert "1 of 2 photos have no caption and get the instance prompt: a.jpg" in warnings
    assert "b.txt: of several lines, which are read as one caption" in warnings


def test_the_token_is_filled_in_everywhere_and_other_braces_stay(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("{token} in {red|blue}")
    found, _ = read(tmp_path, caption_template="{caption}, photo of {token}")
    assert found == ["sks in {red|blue}, photo of sks", "a photo of sks dog, photo of sks"]
    assert "a.txt asks for {token}, and none is given" in failure(tmp_path, prompt="a dog", token=None)
    assert "has {captoin}" in failure(tmp_path, caption_template="{captoin}")


def test_words_that_are_not_used_absent_or_unseen_are_warned_of(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a dog that asks")
    assert 'the trigger word "sks" is absent from 1 of 2 prompts: a.jpg' in read(tmp_path)[1]
    found, (warning,) = read(tmp_path, "a.jpg", caption_template="photo of {token}", prompt=None)
    assert found == ["photo of sks"]
    assert "the captions of 1 photos are not used" in warning
    (tmp_path / "a.txt").write_text("sks \u202egnp \x1b[31m")
    (tmp_path / "b.txt").write_text("sks 👩\u200d👧")
    _, (warning,) = read(tmp_path)
    assert warning.endswith('"sks \\u202egnp \\x1b[31m"')
    (tmp_path / "\x1b[31m").mkdir()
    (tmp_path / "\x1b[31m" / "metadata.jsonl").write_text("{}")
    assert failure(tmp_path).replace("\n", "").isprintable()


def test_a_prompt_of_2_mb_is_refused(tmp_path: Path) -> None:
    assert "is longer than 10000 characters" in failure(tmp_path, prompt="x" * 2**21)
    (tmp_path / "a.txt").write_bytes(b"x" * 2**21)
    (tmp_path / "b.txt").write_bytes(b"x" * 20_000)
    said = failure(tmp_path)
    assert "a.txt has more than 0.0625 MiB" in said
    assert "b.txt makes a prompt of 20000 characters" in said


def test_a_clip_tokenizer_loses_what_lies_past_its_limit() -> None:
    tokenizer = train_tokenizer(["a photo of a dog"] * 10, ["dog"])
    room = tokenizer.model_max_length - 2
    assert find_cut(" ".join(["dog"] * room), tokenizer) is None
    cut = find_cut(" ".join(["dog"] * room + ["photo", "of"]), tokenizer)
    assert cut is not None
    assert (cut.num_tokens, cut.max_tokens, cut.lost) == (room + 4, room + 2, "photo of")
    assert f'has {room + 4} tokens and {room + 2} are read: "…' in str(cut)
    assert 'dog dog" ✂ "photo of" is lost' in str(cut)
    tokenizer.model_max_length = 10**30
    assert find_cut(" ".join(["dog"] * 100), tokenizer) is None
    assert [doubt_token(identifier, tokenizer) for identifier in IDENTIFIERS] == [None] * 3
    assert "is read as" in str(doubt_token("sks on the beach", tokenizer))


def test_a_common_trigger_word_is_doubted() -> None:
    class Words:
        """A stand-in with a token per word, numbered as CLIP numbers them."""

        vocab_size = 49408

        def encode(self, text: str, *, verbose: bool) -> list[int]:
            return [49406, *({"dog": 1929, "sks": 48136}[word] for word in text.split()), 49407]

    clip: Any = Words()
    assert doubt_token("sks", clip) is None
    assert '"dog" is common' in str(doubt_token("dog", clip))
