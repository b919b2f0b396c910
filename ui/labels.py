"""What a studio notes of an adapter beside its files: its name, never part of a path, and its date."""

import json
import re
import unicodedata
from datetime import UTC, datetime
from pathlib import Path

from ether_diffusion.adapters.format import CONFIG_NAME
from ether_diffusion.durable_files import write_files
from ether_diffusion.strict_json import StrictModel, read_json
from ether_diffusion.training.plain_files import read_plain_file
from ether_diffusion.wording import printable

LABEL_NAME = "studio.json"
MAX_CHARACTERS = 80
MAX_SECONDS = 253e9
"""Since 1970, until the end of 9986."""


class Label(StrictModel):
    """An adapter's name, with invisible characters escaped, and when it came."""

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
    write_files(folder, {LABEL_NAME: label.to_bytes()})


def read_label(folder: Path) -> Label:
    """Return the label of an adapter; one without is called as its folder, and as old as its files."""
    try:
        data = read_plain_file(folder / LABEL_NAME, inside=folder, max_bytes=4096)
        found = read_json(data, Label, LABEL_NAME)
        return Label(name=check_name(found.name), created=_in_range(found.created.timestamp()))
    except (OSError, ValueError, OverflowError):  # not there, or nobody's label
        dated = next((path for path in (folder / CONFIG_NAME, folder) if path.exists()), None)
        created = _in_range(0 if dated is None else dated.stat().st_mtime)
        return Label(name=printable(folder.name), created=created)


def file_stem(name: str, otherwise: str) -> str:
    """Return the name of a download: the plain letters and digits of a name, or another word."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9]+", "-", plain).strip("-")[:40] or otherwise


def _in_range(seconds: float) -> datetime:
    """Return a time in seconds since 1970 as one that can be shown everywhere."""
    return datetime.fromtimestamp(min(max(seconds, 0), MAX_SECONDS), UTC)
