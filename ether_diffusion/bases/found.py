"""The bases that lie on this machine: the embedded ones, those that the Hub gave, and those in folders."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import scan_cache_dir
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import CacheNotFound
from safetensors import SafetensorError, safe_open

from ether_diffusion.bases.files import read_config
from ether_diffusion.bases.opening import open_base
from ether_diffusion.bases.single_file import holds_unet
from ether_diffusion.tiny_world import EMBEDDED


@dataclass(frozen=True)
class FoundBase:
    """A base by the name that commands take: its kind, its size in bytes, and what is wrong with it."""

    name: str
    kind: str
    num_bytes: int
    problem: str | None = None


def find_bases(folders: Iterable[Path] = ()) -> list[FoundBase]:
    """Return the embedded bases, those in the Hub's cache, and those in these folders and right below them.

    Raises:
        FileNotFoundError: one of these is no folder.
    """
    found = [_described(name, folder) for name, folder in EMBEDDED.items()]
    try:
        cached = sorted(scan_cache_dir().repos, key=lambda repository: repository.repo_id)
    except CacheNotFound:
        cached = []
    for repository in cached:
        newest = max(repository.revisions, key=lambda each: each.last_modified, default=None)
        if newest is not None and (newest.snapshot_path / "model_index.json").is_file():
            found.append(_described(repository.repo_id, newest.snapshot_path))
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder; name one that holds bases")
        found += _within(folder)
    return found


def cached_bytes(repository: str) -> int:
    """Return the bytes that the Hub's cache has of a repository, of downloads in progress, too."""
    blobs = Path(HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "blobs"
    return sum(path.stat().st_size for path in blobs.glob("*"))


def _within(folder: Path) -> Iterator[FoundBase]:
    for path in (folder, *sorted(folder.iterdir())):
        if (path / "model_index.json").is_file():
            yield _described(str(path), path)
        elif path.suffix == ".safetensors" and path.is_file():
            try:
                with safe_open(path, framework="pt") as file:
                    is_base = holds_unet(file.keys())
            except (SafetensorError, OSError):
                continue  # of what it is nobody can say
            if is_base:
                yield FoundBase(str(path), "single file", path.stat().st_size)


def _described(name: str, folder: Path) -> FoundBase:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    kind, problem = "unknown", None
    try:
        kind = str(read_config(folder, "model_index.json").get("_class_name", kind))
        base = open_base(folder)
        kind = f"{kind}, {base.native_size} px"
    except (ValueError, OSError) as error:
        problem = str(error)
    return FoundBase(name, kind, size, problem)
