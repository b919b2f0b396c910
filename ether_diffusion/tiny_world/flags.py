"""Command lines from frozen dataclasses: each field is one flag with its default and one help line."""

import argparse
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol


class Dataclass(Protocol):
    """Any dataclass whose fields carry a help line in their metadata."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


def add_flags(parser: argparse.ArgumentParser, config_type: type[Dataclass]) -> None:
    """Give the parser one flag for each field of a dataclass."""
    for each in fields(config_type):
        name, help_line = f"--{each.name}", each.metadata["help"].replace("%", "%%")
        if each.type is bool:
            action = argparse.BooleanOptionalAction
            parser.add_argument(name, action=action, default=each.default, help=help_line)
        else:
            kind = each.type if each.type in (int, float, str) else Path
            parser.add_argument(name, type=kind, default=each.default, help=help_line)
