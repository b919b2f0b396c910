"""`ether plan`: what to train with and for how long, and what that advice rests on."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ether_diffusion.benchmark.plan import PAPER_TRAINING, TINY_TRAINING
from ether_diffusion.benchmark.summary import LABELS
from ether_diffusion.strict_json import Json
from ether_diffusion.tiny_world import ALIAS
from ether_diffusion.tiny_world.recognition import OBJECT, RECOGNISED
from ether_diffusion.tiny_world.subjects import NUM_PHOTOS
from ether_diffusion.training.config import DEFAULT_LEARNING_RATES, AdapterMethod

CURVES_FILE = Path(__file__).with_name("curves.json")
"""What of the measured files advice rests on; `research/write_results.py` writes it."""
FALLBACK: AdapterMethod = "ether_plus"
PAPER_PHOTOS = (4, 6)
"""How many photos the subjects of the DreamBooth data set have."""


@dataclass(frozen=True)
class Advice:
    """What to train with; `expected` and `basis` are sentences, `doubts` what was never measured."""

    method: AdapterMethod
    learning_rate: float
    options: Mapping[str, Json]
    expected: tuple[str, ...]
    basis: tuple[str, ...]
    doubts: tuple[str, ...]

    def to_json(self) -> dict[str, Json]:
        """Return it as an object for JSON."""
        return {
            "method": self.method,
            "learning_rate": self.learning_rate,
            "options": dict(self.options),
            "expected": list(self.expected),
            "basis": list(self.basis),
            "doubts": list(self.doubts),
        }

    def flags(self) -> list[str]:
        """Return the flags of train-dreambooth that it comes to."""
        values = {"adapter": self.method, "learning_rate": f"{self.learning_rate:g}", **self.options}
        return [
            f"--{name}" if value is True else f"--{name} {value}"
            for name, value in values.items()
            if value is not False
        ]


def read_curves(file: Path = CURVES_FILE) -> Mapping[str, Any]:
    """Read what was measured when this package was made."""
    curves: Mapping[str, Any] = json.loads(file.read_bytes())
    return curves


def advise(num_photos: int, base: str, curves: Mapping[str, Any]) -> Advice:
    """Return what to do with so many photos on a base.

    On the base that was measured it is the adapter with the fewest parameters of those that are not clearly
    behind the best adapter; elsewhere it is the paper's.

    Raises:
        ValueError: there is no photo.
    """
    if num_photos < 1:
        raise ValueError(f"a subject needs photos; found {num_photos}")
    found = curves["benchmark"]
    if found is not None and base == found["base"]:
        return _measured_advice(num_photos, found, curves["usable_range"] or {}, curves.get("photos"))
    is_tiny = base == ALIAS
    training = TINY_TRAINING if is_tiny else PAPER_TRAINING
    basis = [
        "the setting of the ETHER paper (arXiv:2405.20271, 5.1.1, C.1), 1200 steps on SD 1.5"
        if not is_tiny
        else "the short form's setting; its benchmark was not done when this package was made"
    ]
    doubts = [f"nothing was measured here on {base}: no fidelity and no time can be promised"]
    if not is_tiny:
        doubts.append(
            "train-dreambooth --dry_run does one step on your machine; multiply its time by the steps"
        )
        doubts += _doubts_of_photos(num_photos, *PAPER_PHOTOS)
    return Advice(FALLBACK, DEFAULT_LEARNING_RATES[FALLBACK], training, (), tuple(basis), tuple(doubts))


def _measured_advice(
    num_photos: int, found: Mapping[str, Any], ranges: Mapping[str, Any], photos: Mapping[str, Any] | None
) -> Advice:
    methods = found["methods"]
    able = [name for name, row in methods.items() if not row["is_behind"]]
    method = min(able, key=lambda name: methods[name]["parameters"])
    row, best, training = methods[method], found["best"], dict(found["training"])
    seconds = row["seconds"] / training["max_train_steps"]
    measured = _nearest_study(num_photos, method, photos)
    if measured is None:
        expected = [f"likeness to the subject {_estimate(row['likeness'])} by {found['column']}"]
        if row["recognised"] is not None:
            expected.append(f"{row['recognised']['mean']:.0%} of the pictures recognised as the subject")
        doubts = _doubts_of_photos(num_photos, NUM_PHOTOS, NUM_PHOTOS)
    else:
        training["max_train_steps"], expected = measured.steps, measured.sentences
        doubts = _doubts_of_photos(num_photos, measured.least, measured.most)
    expected.append(
        f"{seconds * training['max_train_steps']:.0f} s of training steps on the machine that was measured"
    )
    expected.append(f"a file of {row['bytes'] / 1024:.0f} KiB, {row['parameters']:,} parameters")
    basis = [
        f"{found['num_done']} of {found['num_runs']} runs of the benchmark, {found['num_subjects']} subjects "
        f"with {NUM_PHOTOS} photos each: likeness {_estimate(row['likeness'])}"
    ]
    if method != best:
        basis.append(
            f"{LABELS[best]} had {_estimate(methods[best]['likeness'])} with {methods[best]['parameters']:,} "
            "parameters, which is not clearly more"
        )
    if measured is not None:
        basis.append(
            "the fewest steps within 5 % of the best, of trainings with "
            + ("one photo" if measured.num_photos == 1 else f"{measured.num_photos} photos")
        )
    usable = ranges.get(method)
    if usable is not None:
        basis.append(f"rates from {usable['lowest']:g} to {usable['highest']:g} came within 5 % of its best")
    return Advice(method, row["learning_rate"], training, tuple(expected), tuple(basis), tuple(doubts))


@dataclass(frozen=True)
class _Nearest:
    """The trainings of the study of photos with as many photos, or the next fewer."""

    num_photos: int
    steps: int
    sentences: list[str]
    least: int
    most: int


def _nearest_study(num_photos: int, method: str, photos: Mapping[str, Any] | None) -> _Nearest | None:
    """Return what was found with as many photos; None if this method was not studied."""
    if photos is None or photos["method"] != method:
        return None
    enough = {int(number): steps for number, steps in photos["enough_steps"].items() if steps is not None}
    if not enough:
        return None
    number = max((each for each in enough if each <= num_photos), default=min(enough))
    steps = enough[number]
    scores, base = photos["cells"][str(number)][str(steps)], photos["base"]
    sentences = [
        f"likeness of the object to the true picture {_estimate(scores[OBJECT])}; the base alone "
        f"{base[OBJECT]:.3f}",
        f"{scores[RECOGNISED]['mean']:.0%} of the pictures recognised as the subject; the base alone "
        f"{base[RECOGNISED]:.0%}",
    ]
    return _Nearest(number, steps, sentences, min(enough), max(enough))


def _estimate(found: Mapping[str, Any]) -> str:
    error = found["standard_error"]
    return f"{found['mean']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _doubts_of_photos(num_photos: int, least: int, most: int) -> list[str]:
    if least <= num_photos <= most:
        return []
    measured = f"{least}" if least == most else f"{least} to {most}"
    less = "; expect less variety" if num_photos < least else ""
    return [f"{num_photos} photos: what this rests on had {measured}, and the steps are kept{less}"]
