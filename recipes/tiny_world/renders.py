"""Fetching the 3D emoji renders that Tiny World is composed from."""

import json
import logging
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

logger = logging.getLogger(__name__)

# pathlib's own raises where there is neither HOME nor an entry for the user; this leaves the ~
DEFAULT_RUN_FOLDER = Path(os.path.expanduser("~/.cache/ether_diffusion/tiny_world"))  # noqa: PTH111
# Versions are pinned so that the same concepts give the same pictures.
NPM_PACKAGES = (
    "@lobehub/fluent-emoji-3d@1.1.0",
    "unicode-emoji-json@0.9.0",
    "emojibase-data@17.0.0",
)
RENDERS_ARCHIVE = "lobehub-fluent-emoji-3d-1.1.0.tgz"
NAMES_ARCHIVE = "unicode-emoji-json-0.9.0.tgz"
NAMES_MEMBER = "package/data-by-emoji.json"


def fetch_renders(run_folder: Path) -> Path:
    """Download the npm packages once and unpack the renders; return their folder.

    Raises:
        FileNotFoundError: npm is not installed and the archives are not there.
    """
    npm_folder = run_folder / "npm"
    renders = npm_folder / "renders"
    if renders.is_dir():
        return renders
    npm_folder.mkdir(parents=True, exist_ok=True)
    if not (npm_folder / RENDERS_ARCHIVE).is_file():
        _download_packages(npm_folder)
    unfinished = npm_folder / "renders.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    with tarfile.open(npm_folder / RENDERS_ARCHIVE) as archive:
        for member in archive.getmembers():
            if member.isfile() and member.name.endswith(".webp"):
                member.name = Path(member.name).name
                archive.extract(member, unfinished, filter="data")
    unfinished.rename(renders)
    logger.info("unpacked %d renders into %s", len(list(renders.iterdir())), renders)
    return renders


def _download_packages(npm_folder: Path) -> None:
    if shutil.which("npm") is None:
        raise FileNotFoundError(
            f"npm was not found and {npm_folder / RENDERS_ARCHIVE} does not exist; install Node.js, or put "
            f"the archives of {', '.join(NPM_PACKAGES)} into {npm_folder}"
        )
    logger.info("fetching %s", ", ".join(NPM_PACKAGES))
    subprocess.run(["npm", "pack", "--silent", *NPM_PACKAGES], cwd=npm_folder, check=True)


def read_emoji_names(run_folder: Path) -> list[str]:
    """Read the Unicode names of all emoji but flags from the fetched packages."""
    return [row["name"] for row in _read_emoji_rows(run_folder).values() if row["group"] != "Flags"]


def read_emoji_table(run_folder: Path) -> list[tuple[str, str, str]]:
    """Read name, render and group of every emoji that has a render in the fetched packages."""
    renders = {path.stem for path in fetch_renders(run_folder).iterdir()}
    table = []
    for emoji, row in _read_emoji_rows(run_folder).items():
        code_points = [f"{ord(character):x}" for character in emoji]
        for render in ("-".join(code_points), "-".join(code_points) + "-fe0f"):
            if render in renders:
                table.append((row["name"], render, row["group"]))
                break
    return table


def _read_emoji_rows(run_folder: Path) -> dict[str, dict[str, str]]:
    with tarfile.open(run_folder / "npm" / NAMES_ARCHIVE) as archive:
        member = archive.extractfile(NAMES_MEMBER)
        assert member is not None, f"{NAMES_ARCHIVE} is pinned and has {NAMES_MEMBER}"
        rows: dict[str, dict[str, str]] = json.load(member)
    return rows
