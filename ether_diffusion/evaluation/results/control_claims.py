"""Rules for the paper's claims about control images."""

from typing import Any

from ether_diffusion.evaluation.results.measured import Measured, NotMeasuredError

FAR = 0.9
"""The encoder alone is far below where it has less than this share of the best adapter's mIoU."""


def _miou(measured: Measured) -> dict[str, float]:
    """Return mIoU by method, the best of its rates where there are several."""
    rows: dict[str, Any] = measured.value("control", "rows")
    found: dict[str, float] = {}
    for row in rows:
        method = next((m for m in ("ether_plus", "ether", "lora", "oft", "none") if row.startswith(m)), None)
        if method is not None:
            value = measured.mean("control", "rows", row, "scores", "miou")
            found[method] = max(value, found.get(method, value))
    return found


def _words(found: dict[str, float]) -> str:
    return "mIoU " + ", ".join(f"{name} {value:.3f}" for name, value in found.items())


def adapters_help(measured: Measured) -> tuple[bool, str]:
    """Encoder-only is far below the best adapter."""
    found = _miou(measured)
    if "none" not in found or len(found) < 2:
        raise NotMeasuredError("control.json has no encoder-only beside an adapter")
    best = max(value for name, value in found.items() if name != "none")
    return found["none"] < FAR * best, _words(found)


def ether_plus_is_best(measured: Measured) -> tuple[bool, str]:
    """ETHER+ has the highest mIoU."""
    found = _miou(measured)
    if "ether_plus" not in found or len(found) < 3:
        raise NotMeasuredError("control.json has too few methods")
    return found["ether_plus"] == max(found.values()), _words(found)
