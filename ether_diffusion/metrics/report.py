"""What an evaluation found, as JSON and as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from ether_diffusion.metrics.likeness import Estimate
from ether_diffusion.metrics.samples import SetAside
from ether_diffusion.metrics.scoring import Scores
from ether_diffusion.strict_json import Json
from ether_diffusion.wording import listed, printable

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Report:
    """Scores by row ("photos", "base", "adapter" or "generated"), and how they were come by.

    Attributes:
        settings: what was drawn or read, and how.
        encoders: where each came from, by its kind.
        drift: of the adapter from the base on prompts without the subject.
        set_aside: pictures that were not scored, by row; "other" are those of prompts without the subject.
        left_out: why a score is not there, by its column.
    """

    settings: Mapping[str, Json]
    encoders: Mapping[str, str]
    rows: Mapping[str, Scores]
    drift: Mapping[str, Estimate]
    set_aside: Mapping[str, Sequence[SetAside]]
    left_out: Mapping[str, str]

    @property
    def columns(self) -> list[str]:
        """The columns of all rows, in the order they were found."""
        return list(dict.fromkeys(name for scores in self.rows.values() for name in scores.columns))

    @property
    def sets(self) -> Mapping[str, Mapping[str, float]]:
        """The distances of whole sets, by row."""
        return {row: scores.sets for row, scores in self.rows.items() if scores.sets}

    def reasons(self) -> dict[str, str]:
        """Return why scores are not there, by column: for all rows, or for one."""
        found = dict(self.left_out)
        for scores in self.rows.values():
            found |= scores.left_out
        return found

    def to_json(self) -> dict[str, Json]:
        """Return it as an object for JSON."""
        return {
            "format_version": FORMAT_VERSION,
            "settings": dict(self.settings),
            "encoders": dict(self.encoders),
            "scores": {row: _estimates(scores.columns) for row, scores in self.rows.items()},
            "sets": {row: dict(found) for row, found in self.sets.items()},
            "by_prompt": {
                row: {prompt: dict(found) for prompt, found in scores.by_prompt.items()}
                for row, scores in self.rows.items()
                if scores.by_prompt
            },
            "drift": _estimates(self.drift),
            "set_aside": {
                row: {each.name: each.reason for each in found}
                for row, found in self.set_aside.items()
                if found
            },
            "left_out": dict(self.reasons()),
        }

    def table(self) -> str:
        """Return it as lines: a row for each kind of picture, then drift, and what is not in it."""
        lines = aligned(
            [["", *self.columns]]
            + [
                [row, *(shown_estimate(scores.columns.get(column)) for column in self.columns)]
                for row, scores in self.rows.items()
            ]
        )
        for row, found in self.sets.items():
            lines.append(f"{row}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
        if self.drift:
            drift = ", ".join(f"{name} {shown_estimate(value)}" for name, value in self.drift.items())
            lines.append(f"drift from the base on other prompts: {drift}")
        for row, aside in self.set_aside.items():
            if aside:
                reasons = [f"{printable(each.name)} {each.reason}" for each in aside]
                lines.append(f"not scored of {row}: {listed(reasons)}")
        lines += [f"{column} is left out: {reason}" for column, reason in self.reasons().items()]
        return "\n".join(lines)


def _estimates(columns: Mapping[str, Estimate]) -> dict[str, Json]:
    return {name: asdict(found) for name, found in columns.items()}


def shown_estimate(found: Estimate | None) -> str:
    if found is None:
        return "-"
    error = "" if found.standard_error is None else f" ± {found.standard_error:.3f}"
    return f"{found.mean:.3f}{error}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
