"""A section of the configuration: options of one concern that are checked together."""

from collections.abc import Iterator
from dataclasses import dataclass

from ether_diffusion.options import OptionsError, find_problems


@dataclass(frozen=True)
class Section:
    """Base of the dataclasses whose fields are options.

    Raises:
        OptionsError: values that cannot be used; all are listed.
    """

    def __post_init__(self) -> None:
        problems = list(find_problems(self)) or list(self.contradictions())
        if problems:
            raise OptionsError(problems)

    def contradictions(self) -> Iterator[str]:
        """Say which options, each fine by itself, exclude or lack each other."""
        yield from ()
