"""Captions in every form people keep them in become prompts; what is wrong or doubtful is said by name."""

import os
import random
from dataclasses import dataclass
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
from ether_diffusion.training.photos import Findings, Photo
from recipes.tiny_world.tokenizer import IDENTIFIERS, train_tokenizer


@dataclass
class Read:
    prompts: list[str]
    warnings: list[str]


def read(
    folder: Path, names: str = "a.jpg b.jpg", prompt: str | None = "a photo of {token} dog", **options: Any
) -> Read:
    """Read the captions of photos, which need not exist for that; nothing on disk may change by it."""
    photos = [
        Photo(
            path=folder / name,
            name=name,
            sha256="",
            width=64,
            height=64,
            pixels_sha256="",
            has_alpha=False,
            notes=(),
        )
        for name in names.split()
    ]
    before = photo_files.snapshot(folder)
    options = {"instance_data_dir": folder, "instance_prompt": prompt, "token": "sks", **options}
    findings = Findings()
    try:
        found = caption_photos(
            photos, *read_caption_files(folder), DataConfig(**options), findings, where="here"
        )
        return Read([photo.prompt for photo in found], findings.warnings)
    finally:
        assert photo_files.snapshot(folder) == before


def failure(folder: Path, names: str = "a.jpg b.jpg", **options: Any) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read(folder, names, **options)
    return str(caught.value)


# files


@pytest.mark.parametrize("name", ["a.txt", "a.caption", "a.jpg.txt", "a.TXT"])
def test_a_text_file_is_found_by_the_photos_name_with_and_without_suffix(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("sks asleep")
    assert read(tmp_path, "a.jpg").prompts == ["sks asleep"]


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_metadata_gives_captions_as_datasets_writes_them(column: str, tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "a.jpg", "{column}": "sks, asleep"}}\n\n')
    (tmp_path / "metadata.csv").write_text(f'file_name,{column},width\r\nb.jpg,"sks, ""awake""",64\r\n')
    captions = read(tmp_path)
    assert captions.prompts == ["sks, asleep", 'sks, "awake"']


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_every_encoding_that_says_what_it_is_is_read(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("sks im Café 😀\r\n".encode(encoding))
    assert read(tmp_path, "a.jpg").prompts == ["sks im Café 😀"]


@pytest.mark.parametrize("encoding", ["utf-16-be", "utf-16-le"])
def test_utf_16_is_known_by_its_mark(encoding: str) -> None:
    assert decode_text("\ufeffé".encode(encoding)) == "é"


def test_a_caption_of_another_encoding_is_refused_with_the_byte_offset(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("sks im Café".encode("latin-1"))
    (tmp_path / "b.txt").write_bytes("sks".encode("utf-16-le"))
    said = failure(tmp_path)
    assert "a.txt is not UTF-8: byte 0xe9 at offset 10" in said
    assert "b.txt is not plain text: byte 0x00 at offset 1" in said


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("metadata.jsonl", "[1]", "line 1: it is [1]; it should be an object"),
        ("metadata.jsonl", '{"file_name": "a.jpg"', "line 1 is not valid JSON"),
        ("metadata.jsonl", '{"file_name": "a.jpg"}', "line 1: has the fields file_name; needed are"),
        ("metadata.jsonl", '{"file_name": "a.jpg", "text": 3}', "line 1: text is 3; it should be a"),
        ("metadata.jsonl", '{"file_name": "a.jpg", "text": "x", "prompt": "y"}', "line 1: has the fields"),
        ("metadata.csv", "file;text\na.jpg;x", "line 2: has the fields file;text; needed are file_name"),
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
    assert "a.txt is a FIFO" in said
    assert f"b.txt is a link to {tmp_path}/secret, outside the folder" in said
    assert "password" not in said


def test_a_text_file_belongs_to_the_photo_of_its_own_normalisation_first(tmp_path: Path) -> None:
    composed, apart = "\u00e9", "e\u0301"
    (tmp_path / f"{composed}.txt").write_text("sks one")
    (tmp_path / f"{apart}.txt").write_text("sks two")
    assert read(tmp_path, f"{composed}.jpg {apart}.jpg").prompts == ["sks one", "sks two"]
    (tmp_path / f"{apart}.txt").unlink()
    assert read(tmp_path, f"{apart}.jpg").prompts == ["sks one"]


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
        said = "captions in "
        try:
            read(tmp_path, "a.jpg")
        except ValueError as error:
            said = str(error)
        assert said.startswith("captions in ")


# prompts


def test_photos_without_a_caption_get_the_instance_prompt_and_are_counted(tmp_path: Path) -> None:
    assert read(tmp_path) == Read(["a photo of sks dog"] * 2, [])
    (tmp_path / "a.txt").write_text("sks on a beach\n")
    captions = read(tmp_path)
    assert captions.prompts == ["sks on a beach", "a photo of sks dog"]
    (warning,) = captions.warnings
    assert warning.startswith("1 of 2 photos have no caption")
    assert warning.endswith(": b.jpg")
    assert "b.jpg has no caption, and there is no instance prompt" in failure(tmp_path, prompt=None)


def test_captions_that_contradict_each_other_are_named_both(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("sks asleep")
    (tmp_path / "a.caption").write_text("sks  asleep\n")
    assert read(tmp_path, "a.jpg").prompts == ["sks asleep"]
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
    assert read(tmp_path, "a.jpg a.png").warnings == [
        "a.txt is the caption of 2 photos: a.jpg, a.png",
        "2 captions belong to no usable photo: c.jpg (metadata.csv line 2), readme.txt",
    ]


def test_an_empty_caption_is_none_and_several_lines_are_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.txt").write_bytes(b"sks\r\nasleep\r\n")
    captions = read(tmp_path)
    assert captions.prompts == ["a photo of sks dog", "sks asleep"]
    said = "\n".join(captions.warnings)
    assert "a.txt: empty" in said
    assert "b.txt: of several lines" in said


def test_the_token_is_filled_in_everywhere_and_other_braces_stay(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("{token} in {red|blue}")
    captions = read(tmp_path, caption_template="{caption}, photo of {token}")
    assert captions.prompts == ["sks in {red|blue}, photo of sks", "a photo of sks dog, photo of sks"]
    said = failure(tmp_path, prompt="a dog", token=None)
    assert "a.txt asks for {token}, and none is given" in said
    assert "has {captoin}" in failure(tmp_path, caption_template="{captoin}")


def test_words_that_are_not_used_and_words_that_are_absent_are_warned_of(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a dog that asks")
    assert 'the trigger word "sks" is absent from 1 of 2 prompts: a.jpg' in read(tmp_path).warnings
    captions = read(tmp_path, "a.jpg", caption_template="photo of {token}", prompt=None)
    assert captions.prompts == ["photo of sks"]
    (warning,) = captions.warnings
    assert "the captions of 1 photos are not used" in warning


def test_a_prompt_of_2_mb_is_refused(tmp_path: Path) -> None:
    assert "is longer than 10000 characters" in failure(tmp_path, prompt="x" * 2**21)
    (tmp_path / "a.txt").write_bytes(b"x" * 2**21)
    (tmp_path / "b.txt").write_bytes(b"x" * 20_000)
    said = failure(tmp_path)
    assert "a.txt has more than 0.0625 MiB" in said
    assert "b.txt makes a prompt of 20000 characters" in said


def test_control_characters_and_overrides_are_shown_escaped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("sks \u202egnp \x1b[31m")
    (tmp_path / "b.txt").write_text("sks 👩\u200d👧")
    (warning,) = read(tmp_path).warnings
    assert warning.endswith('"sks \\u202egnp \\x1b[31m"')
    (tmp_path / "\x1b[31m").mkdir()
    (tmp_path / "\x1b[31m" / "metadata.jsonl").write_text("{}")
    assert failure(tmp_path).replace("\n", "").isprintable()


# tokens

RANKS = {"a": 320, "photo": 1125, "of": 539, "dog": 1929, "on": 525, "the": 518, "beach": 2117, "sks": 48136}


class WordTokenizer:
    """A stand-in with a token per word, numbered as CLIP numbers them."""

    vocab_size = 49408

    def __init__(self, limit: int = 8) -> None:
        self.model_max_length = limit

    def encode(self, text: str, *, verbose: bool) -> list[int]:
        return [49406, *(RANKS[word] for word in text.split()), 49407]

    def decode(self, token_ids: list[int]) -> str:
        words = {rank: word for word, rank in RANKS.items()}
        return " ".join(words[token_id] for token_id in token_ids)


def test_a_prompt_is_shown_with_the_place_of_its_cut() -> None:
    assert find_cut("a photo of sks dog on", WordTokenizer()) is None
    assert find_cut("a photo", WordTokenizer(limit=10**30)) is None
    cut = find_cut("a photo of sks dog on the beach", WordTokenizer())
    assert cut is not None
    assert (cut.kept, cut.lost) == ("a photo of sks dog on", "the beach")
    assert 'has 10 tokens and 8 are read: "…a photo of sks dog on" ✂ "the beach" is lost' in str(cut)


def test_a_common_or_long_trigger_word_is_doubted() -> None:
    assert doubt_token("sks", WordTokenizer()) is None
    assert '"dog" is common' in str(doubt_token("dog", WordTokenizer()))
    assert '"sks on the beach" is read as 4' in str(doubt_token("sks on the beach", WordTokenizer()))


def test_a_clip_tokenizer_loses_what_lies_past_its_limit() -> None:
    tokenizer = train_tokenizer(["a photo of a dog"] * 10, ["dog"])
    room = tokenizer.model_max_length - 2
    assert find_cut(" ".join(["dog"] * room), tokenizer) is None
    cut = find_cut(" ".join(["dog"] * room + ["photo", "of"]), tokenizer)
    assert cut is not None
    assert (cut.num_tokens, cut.max_tokens, cut.lost) == (room + 4, room + 2, "photo of")
    assert [doubt_token(identifier, tokenizer) for identifier in IDENTIFIERS] == [None] * 3
