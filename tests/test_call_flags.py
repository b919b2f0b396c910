"""Flags about one call: what each does to a real run by the command line."""

import re
from collections.abc import Iterator
from pathlib import Path

import photo_files
import pytest
from flag_runs import DRAWN, Outcome, World, command, listening, made_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with made_world(tmp_path_factory.mktemp("world")) as made:
        yield made


def test_a_dry_run_says_what_the_run_takes_and_writes_nothing(world: World, tmp_path: Path) -> None:
    flags = DRAWN | {"validation_prompt": "a sks cat", "validation_steps": 2, "checkpointing_steps": 1}
    flags |= {"output_dir": str(tmp_path / "run")}
    before = photo_files.snapshot(world.folder)
    with listening() as said:
        assert command(world, **flags, dry_run=True) == 0
    assert list(tmp_path.iterdir()) == []
    assert photo_files.snapshot(world.folder) == before
    assert "dry run: nothing was written" in said
    count = sum(tensor.numel() for tensor in world.run().tensors.values())
    assert f"trained: ether_plus on the unet, {count:,} parameters, learning rate 0.006" in said
    assert "steps: 3, each of 1 photo, 1.0 passes over the photos" in said
    phases = [line.split(":")[0] for line in said if re.search(r": \d+\.\d s, peak memory \d+ MiB$", line)]
    assert phases == ["encode photos", "encode prompts", "load the denoiser", "one step", "one image"]
    (images,) = re.findall(r"time: about \d+\.\d minutes, .* (\d+) images included", "\n".join(said))
    assert re.search(r"disk: \d+\.\d MiB the adapter, \d+\.\d MiB with checkpoints", "\n".join(said))
    assert command(world, **flags) == 0
    assert len(list((tmp_path / "run" / "samples").glob("*/*.png"))) == int(images)


def test_a_file_and_a_preset_stand_behind_the_flags(world: World, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("learning_rate: 3e-3\nadapter: lora\n")
    flags = DRAWN | {"validation_prompt": "a cat", "validation_num_inference_steps": 1, "adapter": "ether"}
    del flags["num_validation_images"]
    assert command(world, **flags, output_dir="@filed", config=str(tmp_path / "run.yaml"), preset="fast") == 0
    run = Outcome(world.folder / "filed", "")
    assert (run.rates, run.adapter_config["variant"]) == ([0.5] * 3, "ether")
    assert len(run.names("samples/final/*.png")) == 2  # of preset fast


def test_changes_are_refused_unless_allowed(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(world, output_dir="@changed") == 0
    assert command(world, output_dir="@changed", seed=1, max_train_steps=4) == 2
    assert re.search("seed +0 -> 1", capsys.readouterr().err)
    assert command(world, output_dir="@changed", seed=1, max_train_steps=4, allow_changes=True) == 0
    with pytest.raises(ValueError, match=r"seed +1 -> 2"):
        command(world, output_dir="@changed", seed=2, max_train_steps=4, debug=True)
