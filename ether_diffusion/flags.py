"""Command lines from frozen dataclasses: each field is one flag with its default and one help line."""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

from ether_diffusion.options import Dataclass, Kind, kinds_of, shown

Flags = argparse.ArgumentParser | argparse._ArgumentGroup


def add_flags(
    parser: Flags,
    config_type: type[Dataclass],
    *,
    only_given: bool = False,
    names: Iterable[str] | None = None,
) -> None:
    """Give the parser, or a group of its help, one flag for each field of a dataclass, or for the named ones.

    With `only_given` the result of parsing holds the flags that were given, and the help names the defaults.
    """
    chosen = None if names is None else set(names)
    for each in fields(config_type):
        if chosen is not None and each.name not in chosen:
            continue
        default = argparse.SUPPRESS if only_given else each.default
        help_line = each.metadata["help"]
        if only_given:
            help_line += _default_words(each.default)
        add_flag(parser, each.name, kinds_of(config_type)[each.name], help_line, default)


def add_flag(parser: Flags, name: str, kind: Kind, help_line: str | None, default: object) -> None:
    """Give the parser one flag; without a help line the help does not show it."""
    text = argparse.SUPPRESS if help_line is None else help_line.replace("%", "%%")
    if kind.base is bool:
        off = (f"--no-{name}", f"--no_{name}")
        parser.add_argument(f"--{name}", action="store_true", default=default, help=text)
        parser.add_argument(*off, dest=name, action="store_false", default=default, help=argparse.SUPPRESS)
        return
    parser.add_argument(
        f"--{name}",
        type=_reader(kind),
        action="extend" if kind.is_many else "store",
        nargs="+" if kind.is_many else None,
        default=default,
        metavar="{" + ",".join(kind.choices) + "}" if kind.choices else _METAVARS[kind.base],
        help=text,
    )


class FlagParser(argparse.ArgumentParser):
    """A parser without abbreviations whose errors are one line, and exit with 2."""

    def __init__(self, prog: str, usage: str, description: str, epilog: str) -> None:
        super().__init__(prog, usage=usage, description=description, epilog=epilog, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Print what is wrong, not the whole usage."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


_METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


def _reader(kind: Kind) -> Callable[[str], object]:
    def read(text: str) -> object:
        if kind.is_optional and kind.base in (int, float) and text.lower() == "none":
            return None
        try:
            if kind.choices:
                return _choose(kind, text)
            if kind.base is Path:
                if not text:
                    raise ValueError("empty")
                return Path(text)
            return kind.base(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{shown(text)} does not fit; use {kind.words}") from None

    return read


def _choose(kind: Kind, text: str) -> str | None:
    if text.lower() in kind.choices:
        return text.lower()
    if kind.is_optional and text.lower() == "none":
        return None
    raise ValueError(text)


def _default_words(default: object) -> str:
    if default is None or default == () or default is False:
        return ""
    return " Default: on." if default is True else f" Default: {_plain(default)}."


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
