"""The studio's library: what a card says, what an upload becomes, and what a download is."""

import errno
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from control_encoders import random_encoder
from diffusers import UNet2DConditionModel
from hostile_files import good_adapter
from PIL import Image
from safetensors.torch import load_file, save
from small_models import small_unet
from studio_files import Entry, plain_zip, raw_zip, save_tiny_world_adapter

from ether_diffusion import EtherConfig
from ether_diffusion.adapters import load_ether, read_adapter, save_ether
from ether_diffusion.adapters.format import CONTROL_CONFIG_NAME, ENCODER_NAME, content_hash
from ether_diffusion.bases import load_base, open_base
from ether_diffusion.control import load_control, save_control
from ether_diffusion.export import export_lora
from ether_diffusion.mixing import Ingredient, mix_adapters
from ether_diffusion.ui.library import Card, Label, Library, read_label, thumbnail

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ENCODER_FILES = (CONTROL_CONFIG_NAME, ENCODER_NAME)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the embedded base, as a finished run leaves it."""
    folder = save_tiny_world_adapter(tmp_path_factory.mktemp("saved") / "run")
    (folder / "samples" / "final").mkdir(parents=True)
    Image.new("RGB", (512, 384), "teal").save(folder / "samples" / "final" / "prompt-00_seed-0.png")
    (folder / "run.json").write_text("{}")
    return folder


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "adapters", tmp_path / "temp", open_base("tiny_world"))


@pytest.fixture
def card(library: Library, saved: Path) -> Card:
    return library.add_run_result(saved, "My fox")


def unet() -> UNet2DConditionModel:
    return open_base("tiny_world").load_denoiser()


def kept(library: Library) -> list[str]:
    return sorted(str(path.relative_to(library.root)) for path in library.root.rglob("*"))


def contents(saved: Path) -> tuple[bytes, bytes]:
    return (saved / TENSORS).read_bytes(), (saved / CONFIG).read_bytes()


def test_a_card_says_what_the_adapter_file_says(library: Library, card: Card, saved: Path) -> None:
    adapter, folder = read_adapter(saved), library.folder(card.id)
    expected = ("My fox", "subject", "ETHER+", "tiny_world")
    assert (card.name, card.kind, card.method, card.base_name) == expected
    assert (card.trigger, card.steps, card.hash) == ("a sks animal", 200, content_hash(adapter.tensors))
    assert card.num_parameters == sum(tensor.numel() for tensor in adapter.tensors.values())
    assert (card.fits_base, card.match, card.why_not) == (True, "same", "")
    assert card.thumbnail is not None
    with Image.open(card.thumbnail) as thumbnail:
        assert thumbnail.size == (256, 192)
        assert thumbnail.convert("RGB").getpixel((5, 5)) == (0, 128, 128)
    assert card.num_bytes == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert not (folder / "run.json").exists()
    newer = library.add_run_result(saved, "newer")
    other = Library(library.root, library.temp, open_base("tiny_world"))
    assert other.cards() == library.cards() == [newer, card]
    (folder / TENSORS).write_bytes(b"")  # it is read again
    assert not library.card(card.id).fits_base
    assert "safetensors" in library.card(card.id).why_not


def test_a_card_fits_exactly_where_load_ether_takes_the_adapter(library: Library, tmp_path: Path) -> None:
    """The oracle is load_ether itself with require_same_base, on the loaded base."""
    assert library.cards() == []
    weights = unet()
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter.mul_(1.01)
    for name, model in {"same": unet(), "weights": weights, "architecture": small_unet()}.items():
        model.add_adapter(EtherConfig(init_weights=False, num_blocks=2))
        save_ether(model, library.root / name, base_model=name)
    damaged = good_adapter(library.root / "damaged") / TENSORS
    damaged.write_bytes(damaged.read_bytes()[:-1])
    cards = {card.id: card for card in library.cards()}
    assert cards.keys() == {"same", "weights", "architecture", "damaged"}
    for name, card in cards.items():
        fits = True
        try:
            load_ether(unet(), library.root / name, require_same_base=True)
        except ValueError:
            fits = False
        assert (card.fits_base, card.why_not == "") == (fits, fits)
    assert [name for name, card in cards.items() if card.fits_base] == ["same"]
    assert cards["weights"].match == "other weights"
    assert "weights" in cards["weights"].why_not
    assert "tiny_world" in cards["weights"].why_not
    assert cards["damaged"].hash == ""
    assert str(tmp_path) not in cards["damaged"].why_not
    with pytest.raises(ValueError, match="base"):
        library.lora_file("architecture")
    assert not (library.root / "architecture" / "pytorch_lora_weights.safetensors").exists()


NAMES = {
    "  The   fox 🦊 ": "The fox 🦊", "fox\u202egnp.exe": "fox\\u202egnp.exe", "a\x1b[31mred": "a\\x1b[31mred",
    "../../etc/passwd": "../../etc/passwd", "<img src=x onerror=alert(1)>": "<img src=x onerror=alert(1)>",
    "e\u0301": "é", "": None, " \n\t ": None, "x" * 81: None, "\u202e" * 20: None,
}  # fmt: skip


def test_a_name_is_kept_escaped_and_is_no_path_or_refused(library: Library, card: Card) -> None:
    for given, shown in NAMES.items():
        if shown is None:
            before = library.card(card.id)
            with pytest.raises(ValueError, match="the name"):
                library.rename(card.id, given)
            assert library.card(card.id) == before
            continue
        renamed = library.rename(card.id, given)
        assert renamed == replace(card, name=shown, num_bytes=renamed.num_bytes) == library.card(card.id)
        assert [path.name for path in library.root.iterdir()] == [card.id]
        download = library.native_zip(card.id)
        assert download.parent == library.temp / "adapters" / card.id
        assert download.name.isascii()


def test_an_adapter_that_was_deleted_or_never_was_is_said_to_be(library: Library, card: Card) -> None:
    for adapter_id in ("", ".", "..", "../adapters", "/etc", "a\x00b", "unknown"):
        for call in (library.folder, library.card, library.delete):
            with pytest.raises(FileNotFoundError, match="no longer in the library"):
                call(adapter_id)
    library.delete(card.id)
    assert kept(library) == []
    calls: list[Callable[[str], object]] = [library.native_zip, library.lora_file, library.card]
    for each in (*calls, lambda adapter_id: library.rename(adapter_id, "x")):
        with pytest.raises(FileNotFoundError, match="no longer in the library"):
            each(card.id)


def test_a_folder_that_a_hand_put_there_has_a_card_and_others_have_none(
    library: Library, saved: Path
) -> None:
    library.root.mkdir()
    save_tiny_world_adapter(library.root / "mein Fuchs (2)", seed=3)
    (library.root / "notes").mkdir()
    (library.root / "link").symlink_to(saved)
    (card,) = library.cards()
    assert card.name == "mein Fuchs (2)"
    assert card.id.isalnum()
    assert library.folder(card.id) == library.root / "mein Fuchs (2)"


def test_a_download_loads_and_is_uploaded_again_as_the_same_adapter(
    library: Library, saved: Path, tmp_path: Path
) -> None:
    card = library.add_run_result(saved, "Füchsin 🦊")
    download = library.native_zip(card.id)
    assert download.name == "Fuchsin.zip"
    with zipfile.ZipFile(download) as archive:
        archive.extractall(tmp_path / "out")
    assert load_ether(unet(), tmp_path / "out" / "Fuchsin").base_match == "same"
    again = library.import_upload([download])
    assert again.id != card.id
    assert again.thumbnail is not None
    own = {name: getattr(card, name) for name in ("id", "created", "num_bytes", "thumbnail")}
    assert replace(again, **own) == card
    for name, data in zip((TENSORS, CONFIG), contents(saved), strict=True):
        assert (library.folder(again.id) / name).read_bytes() == data


def test_a_lora_download_is_what_export_writes_on_the_loaded_base(
    library: Library, card: Card, saved: Path, tmp_path: Path
) -> None:
    stored = open_base("tiny_world")
    expected = export_lora(saved, stored.load_denoiser(stored.denoiser_dtype), tmp_path / "expected")
    found = library.lora_file(card.id)
    assert found.name == "My-fox.safetensors"
    tensors, wanted = load_file(found), load_file(expected)
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors.items())


def send(folder: Path, files: dict[str, bytes]) -> list[Path]:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in files]


def test_the_two_files_of_an_adapter_are_taken_whatever_the_browser_calls_them(
    library: Library, saved: Path, tmp_path: Path
) -> None:
    for number, names in enumerate(((TENSORS, CONFIG), ("fox (1).safetensors", "config (3).json"))):
        paths = send(tmp_path / f"sent-{number}", dict(zip(names, contents(saved), strict=True)))
        card = library.import_upload(paths)
        assert card.fits_base
        assert card.hash == content_hash(read_adapter(saved).tensors)
    assert [card.name for card in library.cards()] == ["fox (1)", "a sks animal"]


def refused(library: Library, paths: list[Path]) -> str:
    before = kept(library)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the sentence is returned)
        library.import_upload(paths)
    assert kept(library) == before
    assert not list(library.temp.glob("*"))
    sentence = str(caught.value)
    assert str(library.temp) not in sentence
    assert "\n" not in sentence
    return sentence


def test_what_is_no_adapter_is_refused_named_and_leaves_nothing(
    library: Library, saved: Path, control_folder: Path, tmp_path: Path
) -> None:
    tensors, config = contents(saved)
    lora = save({"unet.x.lora_A.weight": torch.ones(8, 4), "unet.x.lora_B.weight": torch.ones(4, 8)})
    broken = load_file(saved / TENSORS)
    broken[sorted(broken)[0]][0, 0] = float("nan")
    spoiled = json.dumps(json.loads(config) | {"num_blocks": 10**9}).encode()
    two = {f"{n}/{f}": d for n in "xy" for f, d in ((TENSORS, tensors), (CONFIG, config))}
    mixed = {path.name: path.read_bytes() for path in control_folder.iterdir()}
    mixed |= {TENSORS: tensors, CONFIG: config}
    evil = raw_zip([Entry("../../canary", data=config), Entry(TENSORS, data=tensors)])
    cases: list[tuple[dict[str, bytes], str]] = [
        ({"fox.safetensors": tensors}, "no whole adapter"),
        ({"lora.safetensors": lora}, "this is a LoRA"),
        ({"a.safetensors": b"\x80\x04pickle", "a.json": config}, "not"),
        ({"a.safetensors": save(broken, {"format": "pt"}), "a.json": config}, "holds NaN"),
        ({"a.safetensors": tensors, "a.json": spoiled}, "num_blocks"),
        ({"a.safetensors": tensors, "a.json": b"{}"}, "of the method None"),
        ({"photo.png": b"\x89PNG"}, "no whole adapter"),
        ({"a.zip": evil}, "../../canary"),
        ({"a.zip": plain_zip(two)}, "2 adapters (x, y)"),
        ({"a.zip": plain_zip({"readme.txt": b"hello"})}, CONFIG),
        ({"a.zip": plain_zip(mixed)}, "not saved together"),
        ({"a.zip": plain_zip({"d/kohya.safetensors": lora, "d/i.json": b"{}"})}, "this is a LoRA"),
        ({CONFIG: config}, "no whole adapter"),
        ({}, "nothing was uploaded"),
    ]
    for number, (files, words) in enumerate(cases):
        assert words in refused(library, send(tmp_path / f"case-{number}", files))
    assert not list(tmp_path.rglob("canary"))
    assert "sent twice" in refused(library, 2 * send(tmp_path / "twice", {TENSORS: tensors, CONFIG: config}))


def test_nothing_of_an_upload_is_kept_but_the_adapter(library: Library, saved: Path, tmp_path: Path) -> None:
    tensors, config = contents(saved)
    files = {
        f"fox/{TENSORS}": tensors,
        f"fox/{CONFIG}": config,
        "fox/README.md": b"<script>alert(1)</script>",
        "fox/evil.py": b"print()",
        "fox/pytorch_lora_weights.safetensors": b"not checked",
        "fox/thumbnail.png": b"no picture",
    }
    (tmp_path / "fox.zip").write_bytes(plain_zip(files))
    card = library.import_upload([tmp_path / "fox.zip"])
    assert (card.name, card.thumbnail) == ("fox", None)
    folder = library.folder(card.id)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", CONFIG, TENSORS, "studio.json"]
    assert "script" not in (folder / "README.md").read_text()


def test_a_run_that_drew_no_last_picture_is_shown_by_its_newest(tmp_path: Path) -> None:
    for step, colour in (("step-000005", "red"), ("step-000010", "blue")):
        (tmp_path / "samples" / step).mkdir(parents=True)
        Image.new("RGB", (8, 8), colour).save(tmp_path / "samples" / step / "0.png")
    with Image.open(io.BytesIO(thumbnail(tmp_path)["thumbnail.png"])) as shown:
        assert shown.getpixel((0, 0)) == (0, 0, 255)


@pytest.fixture(scope="module")
def control_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("control")
    model = unet()
    model.add_adapter(EtherConfig(variant="ether_plus"))
    save_ether(model, folder / "adapter", base_model="tiny_world")
    save_control(folder / "whole", random_encoder(unet()), adapter=read_adapter(folder / "adapter").first)
    return folder / "whole"


def test_a_control_adapter_is_told_apart_and_makes_the_round(
    library: Library, control_folder: Path, tmp_path: Path
) -> None:
    save_control(tmp_path / "Shapes", random_encoder(unet()))  # an encoder alone
    sent = {f"Shapes/{name}": (tmp_path / "Shapes" / name).read_bytes() for name in ENCODER_FILES}
    (tmp_path / "Shapes.zip").write_bytes(plain_zip(sent))
    alone = library.import_upload([tmp_path / "Shapes.zip"])
    assert (alone.name, alone.kind) == ("Shapes", "control")
    card = library.add_run_result(control_folder, "silhouette")
    assert (card.kind, card.fits_base) == ("control", True)
    again = library.import_upload([library.native_zip(card.id)])
    assert (again.kind, again.hash, again.num_parameters) == ("control", card.hash, card.num_parameters)
    assert load_control(unet(), library.folder(again.id)).report is not None
    with pytest.raises(ValueError, match="more than a LoRA"):
        library.lora_file(card.id)


def test_a_full_disk_is_said_and_leaves_the_library_as_it_was(
    library: Library, card: Card, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = kept(library)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    attempts: list[Callable[[], object]] = [
        lambda: library.add_run_result(saved, "again"),
        lambda: library.rename(card.id, "other"),
        lambda: library.native_zip(card.id),
    ]
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        for attempt in attempts:
            with pytest.raises(ValueError, match="the disk is full"):
                attempt()
    assert kept(library) == before
    assert library.cards() == [card]


def test_spoiled_labels_and_strange_dates_hide_no_adapter(library: Library, card: Card, saved: Path) -> None:
    label = library.folder(card.id) / Label.name_of_file
    for spoiled in (b"{", b"[]", b'{"name": "", "created": "x"}', b"x" * 10_000):
        label.write_bytes(spoiled)
        assert library.card(card.id).name == card.id
        assert library.card(card.id).fits_base
    for created in (
        "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "1969-01-01T00:00:00+00:00",
        "2026-01-01T00:00:00", "not a time", "", "1" * 5000, 7,
    ):  # fmt: skip
        label.write_text(json.dumps({"name": "Strange", "created": created}))
        assert 1970 <= library.card(card.id).created.astimezone().year < 9999
    for number, seconds in enumerate((-(2**40), 2**40, 2**33)):
        folder = library.root / f"timed{number}"
        shutil.copytree(saved, folder)
        for path in (*folder.iterdir(), folder):
            os.utime(path, (seconds, seconds))
    assert len(library.cards()) == 4
    assert all(1970 <= each.created.astimezone().year < 9999 for each in library.cards())
    label.unlink()
    os.mkfifo(label)  # which holds nobody up
    assert read_label(label.parent).name == card.id


def test_a_mix_is_kept_as_an_adapter_that_says_what_it_is_of(library: Library, tmp_path: Path) -> None:
    ids = {name: library.add_run_result(save_tiny_world_adapter(tmp_path / name, seed=n), name).id
           for n, name in enumerate(("fox", "owl"))}  # fmt: skip
    card = library.mix({ids["fox"]: 0.8, ids["owl"]: 0.5}, "both of them")
    assert (card.name, card.method, card.fits_base, card.match) == ("both of them", "LoRA", True, "same")
    found = [Ingredient(n, read_adapter(tmp_path / n), s) for n, s in (("fox", 0.8), ("owl", 0.5))]
    expected = mix_adapters(found, load_base("tiny_world"))
    assert card.hash == next(iter(expected.hashes.values()))
    assert "fox at 0.8" in (library.folder(card.id) / "README.md").read_text(encoding="utf-8")
    before = kept(library)
    with pytest.raises(FileNotFoundError, match="no longer in the library"):
        library.mix({ids["fox"]: 1.0, "a0": 1.0}, "gone")
    with pytest.raises(ValueError, match="the name has 0 characters"):
        library.mix({ids["fox"]: 1.0, ids["owl"]: 1.0}, " ")
    assert kept(library) == before


def test_adapters_of_a_transformer_fit_its_base_and_are_mixed_and_exported(tmp_path: Path) -> None:
    base = open_base("tiny_world_flow")
    for seed, name in enumerate(("one", "two")):
        denoiser = base.load_denoiser()
        torch.manual_seed(seed)
        denoiser.add_adapter(EtherConfig(num_blocks=2))
        save_ether(denoiser, tmp_path / name, base_model="tiny_world_flow")
    library = Library(tmp_path / "adapters", tmp_path / "temp", base)
    cards = [library.add_run_result(tmp_path / name, name) for name in ("one", "two")]
    cards.append(library.mix({card.id: 0.5 for card in cards}, "both"))
    assert [(card.fits_base, card.match, card.why_not) for card in cards] == [(True, "same", "")] * 3
    assert library.lora_file(cards[0].id).stat().st_size > 1000
