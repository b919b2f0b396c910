"""Another base in the studio: the one before is freed, adapters are looked at anew, and no path is probed."""

import gc
import weakref
from pathlib import Path

import pytest
from huggingface_hub.constants import HF_HUB_CACHE
from studio_folders import QUICK, add, draw, make_adapters
from tiny_pipelines import tiny_sd

from ether_diffusion.bases import found
from ether_diffusion.ui.studio import Studio


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "another one"
    tiny_sd().save_pretrained(folder)
    return folder


def test_another_base_draws_and_the_one_before_is_freed(tmp_path: Path, other: Path) -> None:
    make_adapters(tmp_path / "made")
    studio = Studio(tmp_path / "studio", base="tiny_world")
    ids = add(studio, tmp_path / "made", "fox", "alien")
    assert [studio.library.card(ids[name]).fits_base for name in ("fox", "alien")] == [True, False]
    assert studio.is_toy
    horse = "an astronaut riding a horse"
    assert horse in studio.doubts([horse, "two strawberries", ""], [])[0]
    assert studio.doubts(["two strawberries", ""], []) == studio.doubts([horse], ["fox"]) == []
    draw(studio, QUICK)
    before = weakref.ref(studio.engine.pipeline.unet)
    studio.open_base(str(other))
    gc.collect()
    assert before() is None
    assert [studio.library.card(ids[name]).fits_base for name in ("fox", "alien")] == [False, True]
    (picture,) = draw(studio, QUICK).pictures
    assert picture.metadata is not None
    assert (picture.metadata.base, picture.metadata.width) == (other.name, studio.engine.native_size)
    assert (studio.runs.base, studio.is_toy) == (str(other), False)
    studio.open_base("tiny_world_2")
    assert (studio.is_toy, studio.engine.native_size) == (True, 128)
    assert studio.doubts([horse], []) == []  # which the second world knows
    studio.open_base("tiny_world")
    assert studio.doubts([horse], [])


def test_a_base_is_kept_while_a_job_runs_and_where_the_other_is_none(tmp_path: Path, other: Path) -> None:
    studio = Studio(tmp_path / "studio", base="tiny_world")
    engine = studio.engine
    with engine.line.turn(), pytest.raises(ValueError, match="pictures are being drawn; wait"):
        studio.open_base(str(other))
    for none, words in (
        (tmp_path / "no", "cannot be opened"), (tmp_path, "model_index"), ("owner/name", "cannot be opened")
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            studio.open_base(str(none))
    assert studio.engine is engine
    studio.open_base(str(other))
    assert studio.engine is not engine


def test_visitors_of_a_shared_studio_learn_of_no_path(tmp_path: Path, other: Path) -> None:
    shared = Studio(tmp_path / "studio", base=str(other), is_shared=True)
    said = set()
    for asked in ("/etc/passwd", "/etc/none", str(other), str(other.parent), "~", "owner/name", ""):
        with pytest.raises(ValueError, match="no such base here") as refusal:
            shared.open_base(asked)
        said.add(str(refusal.value))
    assert len(said) == 1  # whatever lies there
    assert not any("/" in name for name in shared.bases())
    shared.open_base("tiny_world")
    shared.open_base(other.name)  # what it began with
    assert shared.engine.base_name == other.name


def test_what_came_from_the_hub_so_far_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path(HF_HUB_CACHE).is_absolute()
    monkeypatch.setattr(found, "HF_HUB_CACHE", str(tmp_path))
    blobs = tmp_path / "models--owner--name" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "aa").write_bytes(b"12")
    (blobs / "bb.incomplete").write_bytes(b"345")
    counted = [found.cached_bytes(name) for name in ("owner/name", "other/name", "../..", "/etc/x")]
    assert counted == [5, 0, 0, 0]
