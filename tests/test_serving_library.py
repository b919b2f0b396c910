"""The adapters of a server: which are listed, what is read when, and folders that several servers share."""

import io
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from peft import HRAConfig, get_peft_model
from tiny_pipelines import tiny_sd

from ether_diffusion import EtherConfig, save_ether
from ether_diffusion.bases import open_base
from ether_diffusion.serving import library
from ether_diffusion.serving.engine import Engine, Request
from ether_diffusion.serving.library import Library


def write_adapter(folder: Path, seed: int) -> Path:
    pipe = tiny_sd()
    torch.manual_seed(seed)
    pipe.unet.add_adapter(EtherConfig(variant="ether_plus", init_weights=False), "default")
    save_ether(pipe, folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    tiny_sd().save_pretrained(folder / "base")
    for seed, name in enumerate(("fox", "cat", "other")):
        write_adapter(folder / name, seed)
    return folder


@pytest.fixture(scope="module")
def engines(made: Path) -> Iterator[Callable[[], Engine]]:
    opened: list[Engine] = []

    def another() -> Engine:
        opened.append(Engine(open_base(made / "base"), max_rows=2, num_slots=4))
        return opened[-1]

    yield another
    for engine in opened:
        engine.close()


@pytest.fixture
def adapters(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two adapters, whose state is not remembered for any time."""
    monkeypatch.setattr(library, "SECONDS", 0.0)
    for name in ("fox", "cat"):
        shutil.copytree(made / name, tmp_path / "adapters" / name)
    return tmp_path / "adapters"


def drawn(engine: Engine, name: str) -> Any:
    job = engine.submit(Request(prompt="a", seed=1, steps=2, adapters={name: 1.0}))
    return np.asarray(job.picture.result(60))


def zipped(folder: Path) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in folder.iterdir():
            packed.write(path, path.name)
    return data.getvalue()


def test_only_what_can_be_drawn_is_listed(engines: Callable[[], Engine], made: Path, adapters: Path) -> None:
    engine = engines()
    get_peft_model(tiny_sd().unet, HRAConfig(r=2, target_modules=["to_q"])).save_pretrained(adapters / "hra")
    (adapters / "empty").mkdir()
    shutil.copytree(made / "fox", adapters / "base")  # the base's name
    shutil.copytree(made / "fox", adapters / "aaa-damaged")  # of the form of the whole ones, and the first
    tensors = adapters / "aaa-damaged" / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-64] + b"\xff" * 64)
    wider = write_adapter(adapters / "wider", 0) / "adapter_model.safetensors"
    renamed = wider.read_bytes().replace(b"down_blocks.0.", b"down_blocks.7.")
    wider.write_bytes(renamed)
    served = Library(str(adapters), engine)
    assert served.names() == ["cat", "fox"]
    with pytest.raises(ValueError, match="aaa-damaged"):
        served.ready("aaa-damaged")
    shutil.rmtree(adapters / "aaa-damaged")
    shutil.copytree(made / "fox", adapters / "aaa-damaged")
    assert served.names() == ["aaa-damaged", "cat", "fox"]


def test_a_listing_looks_at_each_adapter_once(
    engines: Callable[[], Engine], made: Path, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Library(str(adapters), engines())
    looked: list[str] = []
    look = served.files.cat_ranges

    def noting(paths: list[str], *rest: Any, **more: Any) -> Any:
        looked.extend(Path(path).parent.name for path in paths)
        return look(paths, *rest, **more)

    monkeypatch.setattr(served.files, "cat_ranges", noting)
    assert served.names() == served.names() == ["cat", "fox"]
    shutil.copytree(made / "other", adapters / "dog")
    assert served.names() == ["cat", "dog", "fox"]
    assert sorted(looked) == ["cat", "cat", "dog", "dog", "fox", "fox"]  # two files each


@pytest.mark.parametrize("place", ["folder", "memory://shared"])
def test_servers_that_share_a_place_see_what_the_others_do(
    engines: Callable[[], Engine], made: Path, adapters: Path, place: str
) -> None:
    if place == "folder":
        place = str(adapters)
    else:
        files = fsspec.filesystem("memory")
        for path in adapters.rglob("*.*"):
            files.pipe_file(f"/shared/{path.parent.name}/{path.name}", path.read_bytes())
    first, second = Library(place, engines()), Library(place, engines())
    first.put("dog", zipped(made / "other"))
    for each in (first, second):
        assert each.names() == ["cat", "dog", "fox"]
        each.ready("dog")
    before = drawn(second.engine, "dog")
    assert np.array_equal(before, drawn(first.engine, "dog"))
    with pytest.raises(FileExistsError, match="there is a model dog"):
        second.put("dog", zipped(made / "cat"))
    first.delete("dog")
    with pytest.raises(KeyError):
        second.ready("dog")
    assert second.names() == ["cat", "fox"]
    first.put("dog", zipped(made / "cat"))
    second.ready("dog")
    assert not np.array_equal(before, drawn(second.engine, "dog"))
    first.delete("dog")


def test_an_upload_with_damaged_data_is_refused(
    engines: Callable[[], Engine], made: Path, adapters: Path
) -> None:
    served, data = Library(str(adapters), engines()), bytearray(zipped(made / "other"))
    for start in range(200, len(data) - 400, 97):
        data[start] ^= 0xFF
    with pytest.raises(ValueError, match="is no zip of an adapter's folder"):
        served.put("dog", bytes(data))
    assert served.names() == ["cat", "fox"]
    assert not (adapters / "dog").exists()


@pytest.mark.parametrize(
    ("place", "words"),
    [("nowhere", "nowhere is no folder"), ("nostore://bucket/x", "nostore://bucket/x cannot be read")],
)
def test_places_that_cannot_be_read_are_said(place: str, words: str) -> None:
    with pytest.raises((ValueError, OSError), match=words):
        library.open_place(place)
