"""Rules for the paper's claims about control images."""

import math
from dataclasses import dataclass
from typing import Any

from research.measured import Measured, NotMeasuredError

FAR = 0.9
"""The encoder alone is far below where it has less than this share of the best adapter's mIoU."""


CLEAR = 2.0
"""A difference is clear above so many standard errors, those of both rows in quadrature."""


@dataclass(frozen=True)
class Row:
    """What a method came to, and its standard error."""

    mean: float
    error: float

    def clearly_above(self, other: "Row") -> bool:
        """Say whether the difference is more than chance."""
        return self.mean - other.mean > CLEAR * math.hypot(self.error, other.error)


def _miou(measured: Measured) -> dict[str, Row]:
    """Return mIoU by method, the best of its rates where there are several."""
    rows: dict[str, Any] = measured.value("control", "rows")
    found: dict[str, Row] = {}
    for row in rows:
        method = next((m for m in ("ether_plus", "ether", "lora", "oft", "none") if row.startswith(m)), None)
        if method is not None:
            score = measured.value("control", "rows", row, "scores", "miou")
            value = Row(float(score["mean"]), float(score["standard_error"] or 0.0))
            found[method] = max(value, found.get(method, value), key=lambda each: each.mean)
    return found


def _words(found: dict[str, Row]) -> str:
    return "mIoU " + ", ".join(f"{name} {row.mean:.3f} ± {row.error:.3f}" for name, row in found.items())


def adapters_help(measured: Measured) -> tuple[bool, str]:
    """Encoder-only is far, and clearly, below the best adapter."""
    found = _miou(measured)
    if "none" not in found or len(found) < 2:
        raise NotMeasuredError("control.json has no encoder-only beside an adapter")
    alone = found["none"]
    best = max((row for name, row in found.items() if name != "none"), key=lambda row: row.mean)
    return alone.mean < FAR * best.mean and best.clearly_above(alone), _words(found)


def ether_plus_is_best(measured: Measured) -> tuple[bool, str]:
    """ETHER+ has clearly the highest mIoU."""
    found = _miou(measured)
    if "ether_plus" not in found or len(found) < 3:
        raise NotMeasuredError("control.json has too few methods")
    plus = found["ether_plus"]
    others = [row for name, row in found.items() if name != "ether_plus"]
    return all(plus.clearly_above(row) for row in others), _words(found)
