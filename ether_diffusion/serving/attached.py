"""Adapters of any method in the models of a pipeline, of which one choice works at a time."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from ether_diffusion.adapters import Adapter
from ether_diffusion.adapters.models import Match
from ether_diffusion.serving.bank import Choice


class AttachedAdapters:
    """What pictures take together: they are drawn to the bit as by the pipelines."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline, self._count, self._in_force = pipeline, 0, ExitStack()
        self._choice: Choice = {}
        self._held: dict[str, str] = {}
        """By name: what an adapter is called in the models, which could not bear every name."""

    def add(self, name: str, adapter: Adapter) -> Match:
        """Attach an adapter, and say how its base compares.

        Raises:
            ValueError: it does not fit the models, or those that are there.
        """
        self._leave()
        self._count += 1
        report = self._pipeline.load_adapter_weights(adapter, adapter_name=f"a{self._count}", activate=False)
        self._held[name] = f"a{self._count}"
        match: Match = report.base_match
        return match

    def remove(self, name: str) -> None:
        """Take an adapter out."""
        self._leave()
        self._pipeline.unload(self._held.pop(name))

    def check(self, rows: Sequence[Choice]) -> None:
        """Take rows of one picture, whatever adapters they take."""

    def takes(self, pictures: Sequence[Sequence[Choice]]) -> bool:
        """Say whether the rows of pictures can be drawn together: of those that take the same adapters."""
        taken = [(rows[0], rows[-1]) for rows in pictures]
        return all(each == taken[0] for each in taken)

    def kind(self, choice: Choice) -> object:
        """Return by what rows are told apart that cannot go through the denoiser at once: their adapters."""
        return frozenset(choice.items())

    def use_for_texts(self, choice: Choice) -> None:
        """Let the text encoders take these adapters."""
        self._choose(choice)

    def use(self, rows: Sequence[Choice]) -> None:
        """Let the rows of the next batches take these adapters, until told otherwise."""
        self._choose(rows[0])

    def _choose(self, choice: Choice) -> None:
        if choice != self._choice:
            self._leave()
            here = {self._held[name]: strength for name, strength in choice.items() if name in self._held}
            self._in_force.enter_context(self._pipeline.chosen(here))
            self._choice = choice

    def _leave(self) -> None:
        self._in_force.close()
        self._choice = {}
