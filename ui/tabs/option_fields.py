"""Fields of a form made of what is declared of options: label, help, choices; an empty one says nothing."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import gradio as gr

from ether_diffusion.options import Declared
from ether_diffusion.ui.requests import MAX_TEXT, read_lines
from ether_diffusion.ui.tabs.page import Field

AS_ABOVE = ("as above", "")


def option_field(each: Declared, *, is_told: bool = True) -> Field:
    """Return what makes the field of an option, with its help where that `is_told`."""
    look: dict[str, Any] = {"label": each.label, "min_width": 130}
    look |= {"info": each.help, "min_width": 170} if is_told else {}
    if choices := each.kind.choices or ("on", "off") * (each.kind.base is bool):
        return partial(gr.Dropdown, [AS_ABOVE, *((word, word) for word in choices)], value="", **look)
    many = {"lines": 2, "info": "One a line."} if each.kind.is_many else {}
    return partial(gr.Textbox, **{**look, **many}, max_lines=6 if many else 1, max_length=MAX_TEXT)


def read_options(named: Mapping[str, Any], declared: Mapping[str, Declared]) -> dict[str, Any]:
    """Return the values of the fields that say something; what is none is refused by its label."""
    found = dict[str, Any]()
    for name, each in declared.items():
        try:
            lines = read_lines(named[name] or "") if each.kind.is_many else [(named[name] or "").strip()]
            values = tuple(each.kind.read(line) for line in lines if line)
        except ValueError as error:
            raise ValueError(f"{each.label} {error}") from None
        if values:
            found[name] = values if each.kind.is_many else values[0]
    return found


def used_words(value: object) -> str:
    """Return a value that an empty field stands for, as it shows it."""
    if value is None or isinstance(value, bool):
        return {None: "", True: "on", False: "off"}[value]
    if isinstance(value, list | tuple):
        return "\n".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
