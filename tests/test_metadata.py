"""Pictures say how they were made; what strangers' pictures say is read strictly and never decoded."""

import json
import struct
import time
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Log
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_pipelines import tiny_sd
from trained_adapters import CONFIGS, save_adapter

from ether_diffusion.pipelines import (
    AdapterUse,
    ImageMetadata,
    attach_metadata,
    parameters_text,
    parse_metadata,
    png_bytes,
    read_image_metadata,
)
from ether_diffusion.pipelines import EtherStableDiffusionPipeline as Pipe
from ether_diffusion.pipelines.metadata import MAX_TEXT_BYTES

METADATA = ImageMetadata(
    prompt="a sks fox, “quoted” 狐",
    negative_prompt="blurry",
    seed=2**63 - 1,
    steps=20,
    guidance_scale=7.5,
    width=8,
    height=8,
    pipeline="EtherStableDiffusionPipeline",
    scheduler="DDIMScheduler",
    scheduler_config={"clip_sample": False, "steps_offset": 1},
    base="owner/name",
    base_fingerprint="abc-def",
    adapters=(AdapterUse("fox", 0.8, {"unet": "0" * 64}), AdapterUse("cat", None, {"unet": "f" * 64})),
    options={"eta": 0.5},
    unrecorded=("latents",),
    versions={"torch": "2"},
)


def with_metadata() -> Image.Image:
    image = Image.new("RGB", (8, 8))
    attach_metadata(image, METADATA)
    return image


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(8 * 25)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def ours(text: bytes) -> bytes:
    return chunk(b"tEXt", b"ether_diffusion\0" + text)


def test_saving_a_picture_as_anybody_does_writes_what_is_read_back(tmp_path: Path) -> None:
    image = with_metadata()
    for name in ("x.png", "y.png", "z.jpg"):
        image.save(tmp_path / name)
    assert read_image_metadata(tmp_path / "x.png") == read_image_metadata(tmp_path / "y.png") == METADATA
    assert read_image_metadata((tmp_path / "x.png").read_bytes()) == METADATA
    with pytest.raises(ValueError, match=r"z\.jpg is not a PNG, or damaged"):
        read_image_metadata(tmp_path / "z.jpg")


def test_other_tools_find_the_lines_that_they_show(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png_bytes(with_metadata()))
    with Image.open(tmp_path / "x.png") as image:
        text = image.info["parameters"]
    assert text == parameters_text(METADATA)
    first, second, third = text.split("\n")
    assert first == METADATA.prompt
    assert second == "Negative prompt: blurry"
    assert third.startswith(
        "Steps: 20, Sampler: DDIMScheduler, CFG scale: 7.5, Seed: 9223372036854775807, Size: 8x8, "
        "Model: owner/name"
    )
    assert 'ETHER: "fox 0.8 (0000000000), cat by layer (ffffffffff)"' in third


def test_a_copy_is_saved_with_it_by_png_bytes() -> None:
    assert read_image_metadata(png_bytes(with_metadata().resize((16, 16)))) == METADATA
    assert read_image_metadata(png_bytes(Image.new("RGB", (8, 8)))) is None


@given(
    prompt=st.none() | st.text(st.characters(exclude_categories=["Cs"])),
    seed=st.none() | st.integers(0, 2**63 - 1),
    strength=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    options=st.dictionaries(
        st.text(max_size=5).filter(str.isascii), st.booleans() | st.integers(0, 9), max_size=3
    ),
)
def test_every_metadata_is_read_back_as_it_was_written(
    prompt: str | None, seed: int | None, strength: float | None, options: dict[str, Any]
) -> None:
    adapters = (AdapterUse("fox", strength, {"unet": "a" * 64}),)
    metadata = replace(METADATA, prompt=prompt, seed=seed, adapters=adapters, options=options)
    assert parse_metadata(metadata.to_json(), "x") == metadata


def test_a_png_of_others_says_nothing(tmp_path: Path) -> None:
    assert read_image_metadata(png()) is None
    assert read_image_metadata(png(chunk(b"tEXt", b"parameters\0ether_diffusion\0{}"))) is None
    assert read_image_metadata(png(chunk(b"tEXt", b"ether_diffusion2\0{}"))) is None


GOOD = METADATA.to_json().encode()
BOMB = zlib.compress(bytes(10**8))
ENDLESS = struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "is not a PNG"),
    "no chunk": (b"\x89PNG\r\n\x1a\n", "is not a PNG, or damaged"),
    "cut off": (png(ours(GOOD))[:60], "damaged"),
    "a bomb of our text": (png(chunk(b"zTXt", b"ether_diffusion\0\0" + BOMB)), "Decompressed data too large"),
    "a bomb of colours": (png(chunk(b"iCCP", b"x\0\0" + BOMB)), "Decompressed data too large"),
    "many bombs": (
        png(*[chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(10**6)))] * 80),
        "Too much memory used",
    ),
    "too long": (png(ours(b" " * MAX_TEXT_BYTES + b" ")), "bytes of metadata; at most"),
    "another checksum": (png(ours(GOOD)).replace(b"blurry", b"flurry"), "damaged"),
    "too many pixels": (png()[:8] + chunk(b"IHDR", ENDLESS) + ours(GOOD) + chunk(b"IDAT", b""), "hostile"),
    "endless chunks": (png(chunk(b"teSt", b"") * 10**6), "damaged"),
    "no ASCII": (png(ours("é".encode())), "is not valid JSON"),
    "no JSON": (png(ours(b"{")), "is not valid JSON"),
    "no object": (png(ours(b"[1]")), "should be an object"),
    "depth": (png(ours(b"[" * 10000)), "is nested too deeply"),
    "a key twice": (png(ours(b'{"a":1,"a":2}')), "twice"),
    "another key": (png(ours(GOOD.replace(b'"seed":', b'"seed2":'))), "seed is missing"),
    "a newer format": (
        png(ours(GOOD.replace(b'"format_version":1', b'"format_version":2'))),
        "made by a newer release",
    ),
}
USE = {"name": "fox", "strength": 1, "sha256": {"unet": "0" * 64}}
WRONG: dict[str, list[object]] = {
    "format_version": [0, True, "1", None, 1.0],
    "prompt": [1, ["a"]],
    "seed": [-1, 0.5, "0", True],
    "steps": [-1, "20"],
    "guidance_scale": ["7", True],
    "width": [0, None, 1.5],
    "pipeline": [None],
    "scheduler_config": [None, {"a": None}, {"a": [1]}],
    "adapters": [
        *(None, [1], [{"name": "fox"}], [USE | {"strength": "1"}]),
        *([USE | {"sha256": {"unet": "00"}}], [USE | {"path": "/"}]),
    ],
    "unrecorded": [None, [1]],
    "versions": [{"torch": 2}],
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_picture_is_refused_in_one_sentence_at_once(kind: str) -> None:
    data, message = HOSTILE[kind]
    start = time.monotonic()
    with pytest.raises(ValueError, match=message) as caught:
        read_image_metadata(data)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 5


@given(place=st.integers(0, len(png(ours(GOOD))) - 1), byte=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_picture_is_read_as_it_was_or_refused(place: int, byte: int, cut: bool) -> None:
    data = bytearray(png(ours(GOOD)))
    data[place] = byte
    with suppress(ValueError):
        assert read_image_metadata(bytes(data[:place] if cut else data)) in (METADATA, None)


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_an_entry_of_another_type_is_refused_by_name(name: str, value: object) -> None:
    text = json.dumps(json.loads(GOOD) | {name: value})
    with pytest.raises(ValueError, match=f"x: {name}[. ]"):
        parse_metadata(text, "x")


def test_no_number_is_out_of_range() -> None:
    for number in ("NaN", "1e999", "-Infinity", "9" * 30):
        with pytest.raises(ValueError, match="number"):
            parse_metadata(METADATA.to_json().replace("7.5", number), "x")


def test_a_file_that_is_not_there_or_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_image_metadata(tmp_path / "x.png")
    with pytest.raises(ValueError, match="is not a regular file"):
        read_image_metadata(tmp_path)


def test_metadata_that_would_not_be_read_back_is_not_attached() -> None:
    with pytest.raises(ValueError, match="shorten its prompt"):
        attach_metadata(Image.new("RGB", (8, 8)), replace(METADATA, prompt="x" * MAX_TEXT_BYTES))


@pytest.fixture
def pipe(tmp_path: Path) -> Pipe:
    save_adapter(tiny_sd(), CONFIGS["ether"], tmp_path / "fox")
    tiny_sd().save_pretrained(tmp_path / "secret-home" / "tiny-base")
    pipe = Pipe.from_pretrained(tmp_path / "secret-home" / "tiny-base")
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ether_weights(tmp_path / "fox", adapter_name="fox")
    return pipe


DRAWN: dict[str, Any] = {"num_inference_steps": 1, "height": 16, "width": 16}


def draw(pipe: Pipe, *arguments: Any, **options: Any) -> list[ImageMetadata]:
    sized = {"num_inference_steps": 2, "height": 16, "width": 24, "guidance_scale": 2.0} | options
    images = pipe(*arguments, **sized).images
    return [parse_metadata(image.info["ether_diffusion"], "x") for image in images]


def test_each_picture_of_a_call_says_its_own(pipe: Pipe) -> None:
    choice = {"adapters": [{"fox": 0.5}, None], "num_images_per_prompt": 2, "seed": 5}
    made = draw(pipe, ["abc", "xyz"], negative_prompt=["no", "not"], **choice)
    said = [("abc", "no", 5), ("abc", "no", 6), ("xyz", "not", 7), ("xyz", "not", 8)]
    assert [(m.prompt, m.negative_prompt, m.seed) for m in made] == said
    assert [[(use.name, use.strength) for use in m.adapters] for m in made] == [[("fox", 0.5)]] * 2 + [[]] * 2
    first = made[0]
    assert (first.width, first.height, first.steps, first.guidance_scale) == (24, 16, 2, 2.0)
    assert (first.scheduler, first.base) == ("DDIMScheduler", "tiny-base")
    assert first.scheduler_config == {"steps_offset": 1, "clip_sample": False}
    assert "secret" not in first.to_json()


def test_a_picture_can_be_made_again_from_what_it_says(pipe: Pipe) -> None:
    image = pipe("abc", adapters={"fox": 0.3}, **DRAWN).images[0]  # no seed given: one was drawn
    said = parse_metadata(image.info["ether_diffusion"], "x")
    assert (said.width, said.height, said.steps) == (16, 16, 1)
    adapters = {use.name: use.strength for use in said.adapters if use.strength is not None}
    options: Any = {"seed": said.seed, "guidance_scale": said.guidance_scale, "adapters": adapters}
    assert pipe(said.prompt, **options, **DRAWN).images[0].tobytes() == image.tobytes()


def test_the_scale_of_a_call_counts_and_disabled_adapters_do_not(pipe: Pipe) -> None:
    pipe.set_adapters("fox", 0.5)
    (scaled,) = draw(pipe, "abc", cross_attention_kwargs={"scale": 0.5})
    assert [use.strength for use in scaled.adapters] == [0.25]
    pipe.set_adapters("fox", {"unet": {"down": 0.5, "up": 1.0, "mid": 1.0}})
    (by_layer,) = draw(pipe, "abc")
    assert [use.strength for use in by_layer.adapters] == [None]
    pipe.disable_lora()
    assert draw(pipe, "abc")[0].adapters == ()


def test_what_cannot_be_written_down_is_named_and_numbers_of_numpy_are_numbers(pipe: Pipe) -> None:
    (said,) = draw(pipe, "abc", latents=torch.randn(1, 4, 16, 24), eta=0.5, guidance_rescale=0.1)
    assert (said.unrecorded, said.options) == (("latents",), {"eta": 0.5, "guidance_rescale": 0.1})
    numbers = {"num_inference_steps": np.int64(2), "guidance_scale": np.float32(2)}
    (said,) = draw(pipe, "abc", seed=np.int64(4), adapters={"fox": np.float32(0.5)}, **numbers)
    assert (said.seed, said.steps, said.guidance_scale) == (4, 2, 2.0)
    assert [use.strength for use in said.adapters] == [0.5]


@pytest.mark.parametrize("used", [False, True])
def test_a_generator_stands_for_its_seed_only_before_it_is_used(pipe: Pipe, used: bool) -> None:
    generator = torch.Generator().manual_seed(9)
    if used:
        torch.rand(1, generator=generator)
    assert draw(pipe, "abc", generator=generator)[0].seed == (None if used else 9)


def test_arrays_and_latents_come_as_from_diffusers_and_what_is_too_large_costs_no_picture(
    pipe: Pipe, caplog: Log
) -> None:
    for output_type in ("np", "pt", "latent"):
        assert len(pipe("abc", output_type=output_type, **DRAWN).images) == 1
    images, _ = pipe("abc", return_dict=False, **DRAWN)
    assert "ether_diffusion" in images[0].info
    image = pipe("abc " * (MAX_TEXT_BYTES // 4), **DRAWN).images[0]
    assert "ether_diffusion" not in image.info
    assert "shorten its prompt" in caplog.text
