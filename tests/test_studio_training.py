"""What the tab Train rests on: photos that a browser says it added, small pictures, and who may start."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from photo_files import photo
from PIL import Image
from studio_trainers import StandInRuns, request, set_fate, wait_until

from ether_diffusion.ui.events import StopToken
from ether_diffusion.ui.photo_shelf import add_photos, note_photos, recall_photos
from ether_diffusion.ui.studio import Studio
from ether_diffusion.ui.tabs.train_looks import loss_points, samples_html
from ether_diffusion.ui.thumbnails import Thumbnails
from ether_diffusion.ui.uploads import IntakeReport, take_photos


def take(tmp_path: Path, **files: bytes) -> IntakeReport:
    sent = tmp_path / "sent"
    sent.mkdir(exist_ok=True)
    for name, data in files.items():
        (sent / f"{name}.png").write_bytes(data)
    return take_photos([sent / f"{name}.png" for name in files], tmp_path / "photos")


def test_photos_are_found_again_by_what_the_browser_kept(tmp_path: Path) -> None:
    photos = list(take(tmp_path, a=photo(seed=1), b=photo(seed=2)).accepted)
    assert recall_photos(note_photos(photos), tmp_path / "photos") == photos
    photos[0].path.unlink()
    assert recall_photos(note_photos(photos), tmp_path / "photos") == photos[1:]


@pytest.mark.parametrize(
    "kept",
    [
        None,
        "x",
        {},
        [None],
        [["a"]],
        [[1, 2, 3, 4]],
        [["..", "secret.png", "x", ""]],
        [["{own}/../..", "secret.png", "x", ""]],
        [["{own}", "../../secret.png", "x", ""]],
        [["{own}", "secret.png", "x", ""]],
        [["{own}", "photo-001.png/../../../secret.png", "x", ""]],
        [["{own}", "photo-001.png\n", "x", ""]],
        [["{own}\n", "photo-001.png", "x", ""]],
    ],
)
def test_whatever_a_browser_says_no_other_file_is_reached(tmp_path: Path, kept: object) -> None:
    (accepted,) = take(tmp_path, a=photo()).accepted
    for place in (tmp_path, tmp_path / "photos", accepted.path.parent):
        (place / "secret.png").write_bytes(photo())
    if isinstance(kept, list):
        own = accepted.path.parent.name
        kept = [
            [word.replace("{own}", own) if isinstance(word, str) else word for word in each]
            if isinstance(each, list)
            else each
            for each in kept
        ]
    assert recall_photos(kept, tmp_path / "photos") == []


def test_a_photo_that_is_there_is_not_taken_again(tmp_path: Path) -> None:
    first = take(tmp_path, a=photo(seed=1), b=photo(seed=2))
    both = add_photos(first.accepted, take(tmp_path, c=photo(seed=2), d=photo(seed=3)))
    assert [each.name for each in both.accepted] == ["a.png", "b.png", "d.png"]
    assert [(each.name, each.reason) for each in both.refused] == [
        ("c.png", "is the same picture as b.png, which was added before")
    ]


def test_a_thumbnail_is_the_picture_made_small_and_follows_its_file(tmp_path: Path) -> None:
    path, thumbnails = tmp_path / "x.png", Thumbnails(16)
    assert thumbnails.address(path) is None
    for colour in ((250, 10, 10), (10, 10, 250)):
        Image.new("RGB", (64, 32), colour).save(path)
        address = thumbnails.address(path)
        assert address is not None
        data = base64.b64decode(address.removeprefix("data:image/webp;base64,"))
        with Image.open(io.BytesIO(data)) as image:
            assert image.size == (16, 8)
            found = np.asarray(image.convert("RGB"))[4, 8].astype(int)
        assert np.abs(found - colour).max() < 12  # WebP loses some
        path.unlink()
    path.write_bytes(b"half a picture")
    assert thumbnails.address(path) is None


def test_the_curve_holds_every_point_and_its_running_mean() -> None:
    points = loss_points([(step, float(step)) for step in range(1, 31)])
    rows = points["data"]
    assert isinstance(rows, list)
    assert [row[:2] for row in rows[:30]] == [[step, float(step)] for step in range(1, 31)]
    assert rows[-1][1] == pytest.approx(sum(range(19, 31)) / 12)


def test_pictures_stand_by_prompt_with_those_of_the_base_first_and_names_are_escaped(tmp_path: Path) -> None:
    runs = StandInRuns(tmp_path / "runs", tmp_path / "temp", base="tiny_world")
    runs.fate = "fine"
    run_id = runs.start(request(runs))
    wait_until(runs, run_id, lambda each: each.state == "finished")
    for folder in ("base", "step-000000", "step-000005"):
        for name in ("prompt-00_seed-0.png", "prompt-00_seed-1.png", "prompt-01_seed-0.png"):
            path = runs.root / run_id / "run" / "samples" / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(photo())
    status = runs.status(run_id)
    status.command[:] = ["x", "--validation_prompt=a <b> fox", "--validation_prompt=two"]
    found = samples_html(status, Thumbnails(16), is_small=True)
    captions = [part.split("<")[0] for part in found.split("<figcaption>")[1:]]
    assert captions == ["Base", "Step 0", "Step 5"] * 3
    assert "<b>" not in found
    assert found.index("two") < found.index("The same from other seeds")


def test_on_an_accelerator_no_training_starts_while_pictures_are_drawn(tmp_path: Path) -> None:
    studio = Studio(tmp_path / "studio")
    runs = StandInRuns(studio.runs.root, studio.temp, base="tiny_world")
    studio.runs = runs
    asked = request(runs)
    studio.engine.machine.device = torch.device("meta")  # any that is not the CPU
    with studio.engine.machine.line.turn(StopToken(), lambda place: None):
        with pytest.raises(ValueError, match="pictures are being drawn on the accelerator; wait"):
            studio.train(asked)
        assert runs.all() == []
    run_id = studio.train(asked)
    assert studio.engine.is_free
    wait_until(runs, run_id, lambda each: each.step == 3)
    runs.pause(run_id)
    wait_until(runs, run_id, lambda each: each.state == "paused")
    drawing = studio.engine.machine.line.turn(StopToken(), lambda place: None)
    with drawing, pytest.raises(ValueError, match="pictures are being drawn"):
        studio.resume(run_id)
    studio.engine.machine.device = torch.device("cpu")
    set_fate(runs.root / run_id, "fine")
    with studio.engine.machine.line.turn(StopToken(), lambda place: None):
        studio.resume(run_id)  # on the CPU it yields to what is drawn
    wait_until(runs, run_id, lambda each: each.state == "finished")


def test_a_finished_run_that_cannot_be_read_does_not_stop_the_page(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    studio = Studio(tmp_path / "studio")
    runs = StandInRuns(studio.runs.root, studio.temp, base="tiny_world")
    runs.fate = "fine"  # which leaves an adapter of nothing
    studio.runs = runs
    run_id = studio.train(request(runs))
    wait_until(runs, run_id, lambda each: each.state == "finished")
    assert studio.keep_finished() == []
    assert "Fox is not in the library yet" in caplog.text
    assert studio.library.cards() == []
