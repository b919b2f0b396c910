"""The studio's library: what a card says, what an upload becomes, and what a download is."""

import errno
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
from safetensors.torch import load_file, save_file
from small_models import small_unet
from studio_files import Entry, plain_zip, raw_zip, save_tiny_world_adapter

from ether_diffusion import EtherConfig
from ether_diffusion.adapters import load_ether, read_adapter, save_ether
from ether_diffusion.adapters.format import content_hash
from ether_diffusion.bases import open_base
from ether_diffusion.control import load_control, save_control
from ether_diffusion.export import export_lora
from ether_diffusion.ui.labels import LABEL_NAME, read_label
from ether_diffusion.ui.library import Library

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


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


def unet() -> UNet2DConditionModel:
    return open_base("tiny_world").load_denoiser()


def kept(library: Library) -> list[str]:
    return sorted(str(path.relative_to(library.root)) for path in library.root.rglob("*"))


def test_an_empty_library_has_no_cards(library: Library) -> None:
    assert library.cards() == []


def test_a_card_says_what_the_adapter_file_says(library: Library, saved: Path) -> None:
    card = library.add_run_result(saved, "My fox")
    adapter = read_adapter(saved)
    assert (card.name, card.kind, card.method, card.base_name) == (
        "My fox",
        "subject",
        "ETHER+",
        "tiny_world",
    )
    assert (card.trigger, card.steps, card.hash) == ("a sks animal", 200, content_hash(adapter.tensors))
    assert card.num_parameters == sum(tensor.numel() for tensor in adapter.tensors.values())
    assert (card.fits_base, card.match, card.why_not) == (True, "same", "")
    assert card.thumbnail is not None
    with Image.open(card.thumbnail) as thumbnail:
        assert thumbnail.size == (256, 192)
        assert thumbnail.convert("RGB").getpixel((5, 5)) == (0, 128, 128)
    folder = library.folder(card.id)
    assert card.num_bytes == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert not (folder / "run.json").exists()
    assert library.cards() == [card] == [library.card(card.id)]


def test_the_newest_card_comes_first_and_a_second_library_sees_the_same(
    library: Library, saved: Path
) -> None:
    names = [library.add_run_result(saved, name).name for name in ("first", "second", "third")]
    other = Library(library.root, library.temp, open_base("tiny_world"))
    assert [card.name for card in other.cards()] == names[::-1]
    assert other.cards() == library.cards()


def other_weights() -> UNet2DConditionModel:
    changed = unet()
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1.01)
    return changed


def test_a_card_fits_exactly_where_load_ether_takes_the_adapter(library: Library, tmp_path: Path) -> None:
    """The oracle is load_ether itself with require_same_base, on the loaded base."""
    bases = {"same": unet(), "weights": other_weights(), "architecture": small_unet()}
    for name, model in bases.items():
        model.add_adapter(EtherConfig(init_weights=False, num_blocks=2))
        save_ether(model, library.root / name, base_model=name)
    damaged = good_adapter(library.root / "damaged") / TENSORS
    damaged.write_bytes(damaged.read_bytes()[:-1])
    cards = {card.id: card for card in library.cards()}
    assert cards.keys() == {"same", "weights", "architecture", "damaged"}
    for name, card in cards.items():
        try:
            load_ether(unet(), library.root / name, require_same_base=True)
        except ValueError:
            assert not card.fits_base
            assert card.why_not
        else:
            assert card.fits_base
            assert not card.why_not
    assert [name for name, card in cards.items() if card.fits_base] == ["same"]
    assert cards["weights"].match == "other weights"
    assert "weights" in cards["weights"].why_not
    assert "tiny_world" in cards["weights"].why_not
    assert cards["damaged"].hash == ""
    assert str(tmp_path) not in cards["damaged"].why_not


def test_a_card_is_read_again_when_its_files_change(library: Library, saved: Path) -> None:
    card = library.add_run_result(saved, "fox")
    (library.folder(card.id) / TENSORS).write_bytes(b"")
    assert not library.card(card.id).fits_base
    assert "safetensors" in library.card(card.id).why_not


def test_renaming_keeps_the_id_the_folder_and_the_date(library: Library, saved: Path) -> None:
    card = library.add_run_result(saved, "fox")
    renamed = library.rename(card.id, "  The   fox 🦊 ")
    assert renamed == replace(card, name="The fox 🦊", num_bytes=renamed.num_bytes)
    assert library.card(card.id) == renamed


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("fox\u202egnp.exe", "fox\\u202egnp.exe"),
        ("a\x1b[31mred", "a\\x1b[31mred"),
        ("../../etc/passwd", "../../etc/passwd"),
        ("<img src=x onerror=alert(1)>", "<img src=x onerror=alert(1)>"),
        ("e\u0301", "é"),
    ],
)
def test_a_name_is_shown_escaped_and_is_no_path(
    library: Library, saved: Path, given: str, shown: str
) -> None:
    card = library.add_run_result(saved, "fox")
    assert library.rename(card.id, given).name == shown
    assert [path.name for path in library.root.iterdir()] == [card.id]
    download = library.native_zip(card.id)
    assert download.parent == library.temp / "adapters" / card.id
    assert download.name.isascii()


@pytest.mark.parametrize("name", ["", " \n\t ", "x" * 81, "\u202e" * 20])
def test_an_empty_or_endless_name_is_refused(library: Library, saved: Path, name: str) -> None:
    card = library.add_run_result(saved, "fox")
    with pytest.raises(ValueError, match="the name"):
        library.rename(card.id, name)
    assert library.card(card.id).name == "fox"


def test_a_label_that_somebody_spoiled_does_not_hide_the_adapter(library: Library, saved: Path) -> None:
    card = library.add_run_result(saved, "fox")
    for label in (b"{", b"[]", b'{"name": "", "created": "x"}', b"x" * 10_000):
        (library.folder(card.id) / "studio.json").write_bytes(label)
        assert library.card(card.id).name == card.id
        assert library.card(card.id).fits_base


def test_an_adapter_that_was_deleted_meanwhile_is_said_to_be(library: Library, saved: Path) -> None:
    card = library.add_run_result(saved, "fox")
    library.delete(card.id)
    assert kept(library) == []
    calls = (
        library.card, library.folder, library.delete, library.native_zip, library.lora_file,
        lambda adapter_id: library.rename(adapter_id, "x"),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(FileNotFoundError, match="no longer in the library"):
            call(card.id)


@pytest.mark.parametrize("adapter_id", ["", ".", "..", "../adapters", "/etc", "a\x00b", "unknown"])
def test_an_id_that_is_none_reaches_no_folder(library: Library, saved: Path, adapter_id: str) -> None:
    library.add_run_result(saved, "fox")
    for call in (library.folder, library.card, library.delete):
        with pytest.raises(FileNotFoundError, match="no longer in the library"):
            call(adapter_id)


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


def test_a_download_is_uploaded_again_as_the_same_adapter(library: Library, saved: Path) -> None:
    card = library.add_run_result(saved, "Füchsin 🦊")
    again = library.import_upload([library.native_zip(card.id)])
    assert again.id != card.id
    same = replace(
        again, id=card.id, created=card.created, num_bytes=card.num_bytes, thumbnail=card.thumbnail
    )
    assert same == card
    assert again.thumbnail is not None
    assert len(library.cards()) == 2
    for name in (TENSORS, CONFIG):
        assert (library.folder(again.id) / name).read_bytes() == (saved / name).read_bytes()


def test_a_native_download_holds_the_adapter_and_loads(library: Library, saved: Path, tmp_path: Path) -> None:
    card = library.add_run_result(saved, "My fox")
    path = library.native_zip(card.id)
    assert path.name == "My-fox.zip"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "out")
    assert load_ether(unet(), tmp_path / "out" / "My-fox").base_match == "same"


def test_a_lora_download_is_what_export_writes_on_the_loaded_base(
    library: Library, saved: Path, tmp_path: Path
) -> None:
    card = library.add_run_result(saved, "My fox")
    stored = open_base("tiny_world")
    expected = export_lora(saved, stored.load_denoiser(stored.denoiser_dtype), tmp_path / "expected")
    found = library.lora_file(card.id)
    assert found.name == "My-fox.safetensors"
    tensors, wanted = load_file(found), load_file(expected)
    assert tensors.keys() == wanted.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, wanted[name])


def test_a_lora_file_of_an_adapter_for_another_base_is_refused(library: Library) -> None:
    good_adapter_folder = library.root / "other"
    library.root.mkdir()
    good_adapter(good_adapter_folder)
    with pytest.raises(ValueError, match="base"):
        library.lora_file("other")
    assert not (good_adapter_folder / "pytorch_lora_weights.safetensors").exists()


def upload_folder(folder: Path, files: dict[str, bytes]) -> list[Path]:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in files]


def test_the_two_files_of_an_adapter_are_taken_whatever_the_browser_calls_them(
    library: Library, saved: Path, tmp_path: Path
) -> None:
    tensors, config = (saved / TENSORS).read_bytes(), (saved / CONFIG).read_bytes()
    for number, names in enumerate(((TENSORS, CONFIG), ("fox (1).safetensors", "config (3).json"))):
        paths = upload_folder(tmp_path / f"sent-{number}", dict(zip(names, (tensors, config), strict=True)))
        card = library.import_upload(paths)
        assert card.fits_base
        assert card.hash == content_hash(read_adapter(saved).tensors)
    assert [card.name for card in library.cards()] == ["fox (1)", "a sks animal"]


def refused(library: Library, paths: list[Path]) -> str:
    before = kept(library) if library.root.exists() else []
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        library.import_upload(paths)
    assert (kept(library) if library.root.exists() else []) == before
    assert not list(library.temp.glob("*")) if library.temp.exists() else True
    sentence = str(caught.value)
    assert str(library.temp) not in sentence
    assert "\n" not in sentence
    return sentence


def test_what_is_no_adapter_is_refused_and_named(library: Library, saved: Path, tmp_path: Path) -> None:
    tensors, config = (saved / TENSORS).read_bytes(), (saved / CONFIG).read_bytes()
    lora = tmp_path / "lora.safetensors"
    save_file({"unet.x.lora_A.weight": torch.ones(8, 4), "unet.x.lora_B.weight": torch.ones(4, 8)}, lora)
    nan = tmp_path / "nan.safetensors"
    broken = load_file(saved / TENSORS)
    broken[sorted(broken)[0]][0, 0] = float("nan")
    save_file(broken, nan, {"format": "pt"})
    spoiled = json.dumps(json.loads(config) | {"num_blocks": 10**9}).encode()
    cases: list[tuple[dict[str, bytes], str]] = [
        ({"fox.safetensors": tensors}, "no whole adapter"),
        ({"lora.safetensors": lora.read_bytes()}, "this is a LoRA of rank 8"),
        ({"a.safetensors": b"\x80\x04pickle", "a.json": config}, "not"),
        ({"a.safetensors": nan.read_bytes(), "a.json": config}, "holds NaN"),
        ({"a.safetensors": tensors, "a.json": spoiled}, "num_blocks"),
        ({"a.safetensors": tensors, "a.json": b"{}"}, "peft_type"),
        ({"photo.png": b"\x89PNG"}, "no whole adapter"),
    ]
    for number, (files, words) in enumerate(cases):
        paths = upload_folder(tmp_path / f"case-{number}", files)
        assert words in refused(library, paths)
    assert "nothing was uploaded" in refused(library, [])


def test_hostile_and_senseless_zips_leave_nothing(library: Library, saved: Path, tmp_path: Path) -> None:
    tensors, config = (saved / TENSORS).read_bytes(), (saved / CONFIG).read_bytes()
    two = {f"{n}/{f}": d for n in "xy" for f, d in ((TENSORS, tensors), (CONFIG, config))}
    for data, words in (
        (raw_zip([Entry("../../canary", data=config), Entry(TENSORS, data=tensors)]), "../../canary"),
        (plain_zip(two), "2 adapters"),
        (plain_zip({"readme.txt": b"hello"}), CONFIG),
    ):
        (tmp_path / "a.zip").write_bytes(data)
        assert words in refused(library, [tmp_path / "a.zip"])
    assert not list(tmp_path.rglob("canary"))


def test_nothing_of_an_upload_is_kept_but_the_adapter(library: Library, saved: Path, tmp_path: Path) -> None:
    files = {
        f"fox/{TENSORS}": (saved / TENSORS).read_bytes(),
        f"fox/{CONFIG}": (saved / CONFIG).read_bytes(),
        "fox/README.md": b"<script>alert(1)</script>",
        "fox/evil.py": b"print()",
        "fox/pytorch_lora_weights.safetensors": b"not checked",
        "fox/thumbnail.png": b"no picture",
    }
    (tmp_path / "fox.zip").write_bytes(plain_zip(files))
    card = library.import_upload([tmp_path / "fox.zip"])
    assert card.name == "fox"
    assert card.thumbnail is None
    folder = library.folder(card.id)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", CONFIG, TENSORS, "studio.json"]
    assert "script" not in (folder / "README.md").read_text()


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
    card = library.add_run_result(control_folder, "silhouette")
    assert (card.kind, card.fits_base) == ("control", True)
    again = library.import_upload([library.native_zip(card.id)])
    assert (again.kind, again.hash, again.num_parameters) == ("control", card.hash, card.num_parameters)
    assert load_control(unet(), library.folder(again.id)).report is not None
    with pytest.raises(ValueError, match="more than a LoRA"):
        library.lora_file(card.id)


def test_an_encoder_beside_another_adapter_is_refused(
    library: Library, control_folder: Path, saved: Path, tmp_path: Path
) -> None:
    files = {path.name: path.read_bytes() for path in control_folder.iterdir()}
    files |= {name: (saved / name).read_bytes() for name in (TENSORS, CONFIG)}
    (tmp_path / "a.zip").write_bytes(plain_zip(files))
    assert "not saved together" in refused(library, [tmp_path / "a.zip"])


def test_a_full_disk_is_said_and_leaves_the_library_as_it_was(
    library: Library, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = library.add_run_result(saved, "fox")
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


CREATED = [
    "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "1969-01-01T00:00:00+00:00",
    "2026-01-01T00:00:00", "not a time", "", "1" * 5000, 7,
]  # fmt: skip


def test_strange_dates_and_times_of_files_do_not_break_the_library(library: Library, saved: Path) -> None:
    for number, created in enumerate(CREATED):
        folder = library.folder(library.add_run_result(saved, f"dated {number}").id)
        (folder / "studio.json").write_text(json.dumps({"name": "Strange", "created": created}))
    for number, seconds in enumerate((-(2**40), 2**40, 2**33)):
        folder = library.root / f"timed{number}"
        shutil.copytree(saved, folder)
        for path in (*folder.iterdir(), folder):
            os.utime(path, (seconds, seconds))
    cards = library.cards()
    assert len(cards) == len(CREATED) + 3
    assert all(1970 <= card.created.astimezone().year < 9999 for card in cards)


def test_a_pipe_in_place_of_a_label_holds_nobody_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / LABEL_NAME)
    assert read_label(tmp_path).name == tmp_path.name
