"""The names that people give adapters: shown and stored, and never part of a path as they are."""

import json
import re
import unicodedata
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ether_diffusion.adapters.format import CONFIG_NAME
from ether_diffusion.durable_files import write_files
from ether_diffusion.strict_json import parse_json
from ether_diffusion.training.plain_files import read_plain_file
from ether_diffusion.wording import printable

NAME_FILE = "studio.json"
MAX_CHARACTERS = 80
MAX_SECONDS = 253e9
"""Since 1970, until the end of 9986."""
_MAX_FILE_BYTES = 4096


@dataclass(frozen=True)
class Label:
    """What a studio notes of an adapter beside its files: its name, escaped, and when it came."""

    name: str
    created: datetime

    def to_bytes(self) -> bytes:
        """Return the file's content."""
        return json.dumps({"name": self.name, "created": self.created.isoformat()}).encode()


def check_name(name: str) -> str:
    """Return a name as it is kept: without outer spaces, with invisible characters escaped.

    Raises:
        ValueError: nothing is left of it, or it is too long.
    """
    plain = printable(" ".join(unicodedata.normalize("NFC", name).split()), 10 * MAX_CHARACTERS)
    if not plain:
        raise ValueError("the name is empty; type one")
    if len(plain) > MAX_CHARACTERS:
        raise ValueError(f"the name has {len(plain)} characters; use at most {MAX_CHARACTERS}")
    return plain


def write_label(folder: Path, label: Label) -> None:
    """Write the label of an adapter."""
    write_files(folder, {NAME_FILE: label.to_bytes()})


def read_label(folder: Path) -> Label:
    """Return the label of an adapter; one without is called as its folder, and as old as its files."""
    try:
        data = read_plain_file(folder / NAME_FILE, inside=folder, max_bytes=_MAX_FILE_BYTES)
        found = parse_json(data, NAME_FILE)
        if isinstance(found, dict) and found.keys() == Label.__dataclass_fields__.keys():
            name, created = check_name(str(found["name"])), datetime.fromisoformat(str(found["created"]))
            return Label(name, _in_range(created.timestamp()))
    except (OSError, ValueError, OverflowError):  # not there, or nobody's label
        pass
    return Label(printable(folder.name), _age(folder))


def file_stem(name: str, otherwise: str) -> str:
    """Return the name of a download: the plain letters and digits of a name, or another word."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9]+", "-", plain).strip("-")[:40] or otherwise


def _age(folder: Path) -> datetime:
    for path in (folder / CONFIG_NAME, folder):
        if path.exists():
            return _in_range(path.stat().st_mtime)
    return _in_range(0)


def _in_range(seconds: float) -> datetime:
    """Return a time in seconds since 1970 as one that can be shown everywhere."""
    return datetime.fromtimestamp(min(max(seconds, 0), MAX_SECONDS), UTC)
