"""The committed files of the studies, and how their numbers are looked up and compared."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ether_diffusion.metrics.scores import PROMPT
from ether_diffusion.tiny_world.pictures import OBJECT

FILES = (
    *("benchmark", "rates", "learning_rates", "photos", "strength", "steps", "taken_out", "unconditional"),
    *("timesteps", "blocks", "energy", "transforms", "cost"),
    *("control", "control_silhouette", "control_edges"),
)
"""Names of the studies' files in docs/results, without .json."""


class NotMeasuredError(LookupError):
    """A number that no file has: its study was not run, or without this method."""


@dataclass(frozen=True)
class Measured:
    """All files of studies by their names; those that are not there are left out."""

    files: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> "Measured":
        """Read the files of a folder.

        Raises:
            ValueError: one is no JSON.
        """
        found = {name: folder / f"{name}.json" for name in FILES}
        return cls({name: json.loads(file.read_bytes()) for name, file in found.items() if file.is_file()})

    def value(self, file: str, *path: str) -> Any:
        """Return what lies under these keys of a file.

        Raises:
            NotMeasuredError: it is not there.
        """
        if file not in self.files:
            raise NotMeasuredError(f"{file}.json is not there yet")
        found: Any = self.files[file]
        for key in path:
            if not isinstance(found, Mapping) or key not in found:
                raise NotMeasuredError(f"{file}.json has no {' / '.join(path)}")
            found = found[key]
        return found

    def mean(self, file: str, *path: str) -> float:
        """Return the mean of an estimate.

        Raises:
            NotMeasuredError: it is not there.
        """
        return float(self.value(file, *path, "mean"))

    def by_subject(self, method: str, column: str) -> dict[tuple[str, int], float]:
        """Return a score of the benchmark by subject and seed.

        Raises:
            NotMeasuredError: the method was not run.
        """
        found = {
            (run["subject"], run["seed"]): float(run["scores"][column])
            for run in self.value("benchmark", "runs")
            if run["method"] == method and column in run["scores"]
        }
        if not found:
            raise NotMeasuredError(f"benchmark.json has no {column} of {method}")
        return found

    def columns(self) -> tuple[str, str]:
        """Return the benchmark's columns of likeness to the subject and to the prompts.

        Raises:
            NotMeasuredError: there are none.
        """
        rows = self.value("benchmark", "methods")
        names = {name for row in rows.values() for name in row["scores"]}
        for pair in (("dino", "clip_t"), (OBJECT, PROMPT)):
            if names.issuperset(pair):
                return pair
        raise NotMeasuredError("benchmark.json has no likeness to subjects and prompts")


@dataclass(frozen=True)
class Difference:
    """How much more one method scores than another on the same subjects; the error is that of the mean."""

    mean: float
    standard_error: float
    num_pairs: int

    @property
    def is_clear(self) -> bool:
        """Whether it is more than two standard errors from zero."""
        return abs(self.mean) > 2 * self.standard_error

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.standard_error:.3f} over {self.num_pairs} pairs"


def paired_values(measured: Measured, one: str, other: str, column: str) -> list[float]:
    """Return how much more one method of the benchmark scores than another, by subject.

    The seeds that both have of a subject are averaged first: they are not independent.

    Raises:
        NotMeasuredError: fewer than two subjects have both.
    """
    first, second = measured.by_subject(one, column), measured.by_subject(other, column)
    of: dict[str, list[float]] = {}
    for subject, seed in first:
        if (subject, seed) in second:
            of.setdefault(subject, []).append(first[subject, seed] - second[subject, seed])
    if len(of) < 2:
        raise NotMeasuredError(f"benchmark.json has no two subjects of both {one} and {other}")
    return [math.fsum(each) / len(each) for each in of.values()]


def paired_difference(measured: Measured, one: str, other: str, column: str) -> Difference:
    """Compare two methods of the benchmark subject by subject: d_i = x_i − y_i, SE = s_d / √N.

    Raises:
        NotMeasuredError: fewer than two subjects have both.
    """
    return difference_of(paired_values(measured, one, other, column))


def difference_of(values: Sequence[float]) -> Difference:
    """Return the mean of differences and its standard error."""
    mean = math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return Difference(mean, math.sqrt(squares / (len(values) - 1) / len(values)), len(values))
