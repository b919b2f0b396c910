"""Command lines from options: each is one flag with its default and one help line."""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from ether_diffusion.options import Kind, Options, declared

Flags = argparse.ArgumentParser | argparse._ArgumentGroup
_METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


def add_flags(
    parser: Flags, options: type[Options], *, only_given: bool = False, names: Iterable[str] | None = None
) -> None:
    """Give the parser, or a group of its help, one flag for each option of a model, or for the named ones.

    With `only_given` the result of parsing holds the flags that were given, and the help names the defaults.
    """
    for name in declared(options) if names is None else names:
        each = declared(options)[name]
        default = argparse.SUPPRESS if only_given else each.default
        text = each.help + _default_words(each.default) * only_given
        if each.is_positional:
            parser.add_argument(name, nargs=None if each.is_required else "?", help=text.replace("%", "%%"))
        else:
            more = {"repeated": each.is_repeated, "required": each.is_required}
            kind = replace(each.kind, is_many=each.kind.is_many or each.is_spread)
            add_flag(parser, name, kind, text, default, **more)


def add_flag(
    parser: Flags, name: str, kind: Kind, said: str | None, default: Any, repeated: bool = False, **more: Any
) -> None:
    """Give the parser one flag; without help it is not shown. A `repeated` one takes its values by itself."""
    text, flag = argparse.SUPPRESS if said is None else said.replace("%", "%%"), name.rstrip("_")
    if kind.base is bool:
        off = (f"--no-{flag}", f"--no_{flag}")
        parser.add_argument(f"--{flag}", dest=name, action="store_true", default=default, help=text)
        parser.add_argument(*off, dest=name, action="store_false", default=default, help=argparse.SUPPRESS)
        return
    if kind.is_many:
        more |= {"action": _Several, "nargs": None if repeated else "+"}
    metavar = "{" + ",".join(kind.choices) + "}" if kind.choices else _METAVARS[kind.base]
    more |= {"type": _reader(kind), "default": default, "metavar": metavar, "help": text}
    parser.add_argument(f"--{flag}", dest=name, **more)


class _Several(argparse.Action):
    """Collect the values of a flag that may be given again; they take the place of its default, a tuple."""

    def __call__(self, parser: object, namespace: object, values: Any, flag: object = None) -> None:
        before = getattr(namespace, self.dest, ())
        given = values if isinstance(values, list) else [values]
        setattr(namespace, self.dest, [*(before if isinstance(before, list) else []), *given])


class FlagParser(argparse.ArgumentParser):
    """A parser without abbreviations whose errors are one line, and exit with 2."""

    def __init__(self, prog: str, usage: str, description: str, epilog: str) -> None:
        super().__init__(prog, usage=usage, description=description, epilog=epilog, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Print what is wrong, not the whole usage."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _reader(kind: Kind) -> Callable[[str], object]:
    def read(text: str) -> object:
        try:
            return kind.read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def _default_words(default: object) -> str:
    if default is None or default is False or default == ():
        return ""
    if default is True:
        return " Default: on."
    return f" Default: {default:g}." if isinstance(default, float) else f" Default: {default}."
