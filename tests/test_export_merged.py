"""A merged model is the base with the adapter's weights in it, and stock diffusers loads it."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from tiny_pipelines import tiny_sd
from trained_adapters import CONFIGS, files_in, predict, relative_error, save_adapter

from ether_diffusion.adapters import load_ether
from ether_diffusion.adapters.export import export_merged


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    return save_adapter(tiny_sd(), CONFIGS["ether"], tmp_path / "adapter")


def test_a_merged_model_is_the_base_with_the_adapters_weights(trained: Path, tmp_path: Path) -> None:
    pipe = tiny_sd()
    before = predict(pipe, None)
    folder = export_merged(trained, pipe, tmp_path / "merged", scale=0.5)
    assert torch.equal(predict(pipe, None), before)
    merged = DiffusionPipeline.from_pretrained(folder)
    load_ether(pipe, trained)
    assert relative_error(predict(merged, None), predict(pipe, 0.5)) < 1e-5
    assert not list(tmp_path.glob(".*"))


def test_merging_keeps_the_dtype_and_at_scale_0_the_weights(trained: Path, tmp_path: Path) -> None:
    pipe = tiny_sd().to(torch.float16)
    export_merged(trained, pipe, tmp_path / "merged", scale=0.0)
    merged = load_file(tmp_path / "merged" / "unet" / "diffusion_pytorch_model.safetensors")
    for name, weight in pipe.unet.state_dict().items():
        assert torch.equal(merged[name], weight), name


def test_merging_into_a_folder_with_something_in_it_is_refused(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("mine")
    before = files_in(tmp_path)
    with pytest.raises(FileExistsError, match="not empty"):
        export_merged(trained, tiny_sd(), tmp_path / "full")
    assert files_in(tmp_path) == before


def test_merging_stops_at_a_scale_that_is_not_finite(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a finite number"):
        export_merged(trained, tiny_sd(), tmp_path / "merged", scale=float("nan"))


def test_a_failed_merge_leaves_nothing_behind(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_sd()
    before = pipe.unet.mid_block.attentions[0].proj_in.weight.clone()

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(pipe.vae, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        export_merged(trained, pipe, tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]
    assert torch.equal(pipe.unet.mid_block.attentions[0].proj_in.weight, before)
