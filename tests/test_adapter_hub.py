"""Adapters of the Hub are read from downloads, sized first, and named when missing."""

import shutil
import warnings
from pathlib import Path

import pytest
from huggingface_hub import DryRunFileInfo
from huggingface_hub.errors import EntryNotFoundError
from small_models import adapted_unet, exactly_equal, output, pipeline, small_unet

from ether_diffusion.adapters import load_ether, read_adapter, save_ether


@pytest.fixture(autouse=True)
def no_offline_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the stand-in be asked, whatever HF_HUB_OFFLINE says where the tests run."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the Hub as a download leaves it, with the adapter somebody/dog."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    revision = "0" * 40
    repository = tmp_path / "hub" / "models--somebody--dog"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    save_ether(adapted_unet(), repository / "snapshots" / revision)
    return tmp_path / "hub"


def test_an_adapter_of_the_hub_is_read_from_what_was_downloaded(hub_cache: Path) -> None:
    unet = small_unet()
    load_ether(unet, "somebody/dog", local_files_only=True)
    assert exactly_equal(output(unet), output(adapted_unet()))


def test_an_adapter_that_was_not_downloaded_is_named(hub_cache: Path) -> None:
    with pytest.raises(FileNotFoundError, match="of somebody/cat has not been downloaded"):
        read_adapter("somebody/cat", local_files_only=True)


def test_a_folder_is_taken_before_the_hub(
    hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(next(hub_cache.glob("*/snapshots/*")), tmp_path / "somebody" / "cat")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_adapter("somebody/cat").projections()) == 32


def test_a_pipeline_loads_offline_what_was_downloaded(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert load_ether(pipeline(), "somebody/dog").components == {"unet": 32}


class StandInHub:
    """A Hub with one model, whose files have the sizes given; what it gives out is counted."""

    def __init__(self, folder: Path, **sizes: int) -> None:
        self.folder, self.sizes, self.fetched = folder, sizes, list[str]()

    def download(
        self, repo_id: str, filename: str, *, subfolder: str | None, dry_run: bool = False, **_: object
    ) -> str | DryRunFileInfo:
        path = self.folder / (subfolder or "") / filename
        if not path.exists():
            raise EntryNotFoundError(f"no {filename}")
        if dry_run:
            size = self.sizes.get(path.stem, path.stat().st_size)
            return DryRunFileInfo("0" * 40, size, filename, str(path), is_cached=False, will_download=True)
        self.fetched.append(filename)
        return str(path)


def test_a_hub_adapter_is_fetched_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_ether(adapted_unet(), tmp_path)
    hub = StandInHub(tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.download)
    assert load_ether(pipeline(), "somebody/dog").components == {"unet": 32}
    assert hub.fetched == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_file_of_the_hub_that_is_too_large_is_not_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_ether(adapted_unet(), tmp_path)
    hub = StandInHub(tmp_path, adapter_model=10**9)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.download)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors has 1000000000 bytes"):
        load_ether(small_unet(), "somebody/dog")
    assert hub.fetched == ["adapter_config.json"]


def test_a_lora_of_the_hub_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", StandInHub(tmp_path).download)
    monkeypatch.setattr(
        "huggingface_hub.file_exists", lambda _, name, **__: name == "pytorch_lora_weights.safetensors"
    )
    with pytest.raises(ValueError, match=r"this is a LoRA; use pipe\.load_lora_weights"):
        load_ether(small_unet(), "somebody/lora")
