"""`ether plan`: what to train with and for how long, and what that advice rests on."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ether_diffusion.bases.distilled import distilled_doubt
from ether_diffusion.benchmark.plan import PAPER_TRAINING, TINY_TRAINING
from ether_diffusion.benchmark.results import LABELS
from ether_diffusion.metrics.likeness import Estimate
from ether_diffusion.strict_json import Json, StrictModel, read_json
from ether_diffusion.tiny_world import ALIAS
from ether_diffusion.tiny_world.recognition import OBJECT, RECOGNISED
from ether_diffusion.tiny_world.subjects import NUM_PHOTOS
from ether_diffusion.training.config import DEFAULT_LEARNING_RATES, AdapterMethod

CURVES_FILE = Path(__file__).with_name("curves.json")
FALLBACK: AdapterMethod = "ether_plus"
PAPER_PHOTOS = (4, 6)
"""How many photos the subjects of the DreamBooth data set have."""


class MethodCurve(StrictModel):
    """What the benchmark found of a method; `is_behind` says that it is clearly less true than the best."""

    likeness: Estimate
    recognised: Estimate | None
    is_behind: bool
    parameters: int
    bytes: int
    seconds: float
    learning_rate: float


class BenchmarkCurves(StrictModel):
    """What the benchmark found on one base."""

    base: str
    column: str
    training: dict[str, bool | int | float | str]
    num_subjects: int
    num_done: int
    num_runs: int
    best: AdapterMethod
    methods: dict[AdapterMethod, MethodCurve]


class UsableRange(StrictModel):
    """The learning rates that came close to a method's best."""

    best: float
    lowest: float
    highest: float
    ratio: float
    is_open: bool
    missed: list[float]


class PhotoCurves(StrictModel):
    """What trainings with fewer photos and steps found; cells are by number of photos, then of steps."""

    method: AdapterMethod
    base: dict[str, float]
    enough_steps: dict[str, int | None]
    cells: dict[str, dict[str, dict[str, Estimate]]]


class Curves(StrictModel):
    """What of the measured files advice rests on; `research/write_results.py` writes it."""

    benchmark: BenchmarkCurves | None
    usable_range: dict[AdapterMethod, UsableRange | None] | None
    photos: PhotoCurves | None


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
        return asdict(self)

    def flags(self) -> list[str]:
        """Return the flags of train-dreambooth that it comes to."""
        values = {"adapter": self.method, "learning_rate": f"{self.learning_rate:g}", **self.options}
        return [
            f"--{name}" if value is True else f"--{name} {value}"
            for name, value in values.items()
            if value is not False
        ]


def read_curves(file: Path = CURVES_FILE) -> Curves:
    """Read what was measured when this package was made."""
    return read_json(file.read_bytes(), Curves, file.name)


def advise(num_photos: int, base: str, curves: Curves) -> Advice:
    """Return what to do with so many photos on a base.

    On the base that was measured it is the adapter with the fewest parameters of those that are not clearly
    behind the best adapter; elsewhere it is the paper's.

    Raises:
        ValueError: there is no photo.
    """
    if num_photos < 1:
        raise ValueError(f"a subject needs photos; found {num_photos}")
    if curves.benchmark is not None and base == curves.benchmark.base:
        return _measured_advice(num_photos, curves.benchmark, curves)
    doubts = [f"nothing was measured here on {base}: no fidelity and no time can be promised"]
    distilled = distilled_doubt(base, Path(base) if Path(base).is_dir() else None)
    doubts += [] if distilled is None else [distilled]
    rate = DEFAULT_LEARNING_RATES[FALLBACK]
    if base == ALIAS:
        basis = "the short form's setting; its benchmark was not done when this package was made"
        return Advice(FALLBACK, rate, TINY_TRAINING, (), (basis,), tuple(doubts))
    basis = "the setting of the ETHER paper (arXiv:2405.20271, 5.1.1, C.1), 1200 steps on SD 1.5"
    doubts.append("train-dreambooth --dry_run does one step on your machine; multiply its time by the steps")
    doubts += _doubts_of_photos(num_photos, *PAPER_PHOTOS)
    return Advice(FALLBACK, rate, PAPER_TRAINING, (), (basis,), tuple(doubts))


def _measured_advice(num_photos: int, found: BenchmarkCurves, curves: Curves) -> Advice:
    able = [name for name, row in found.methods.items() if not row.is_behind]
    method = min(able, key=lambda name: found.methods[name].parameters)
    row, training = found.methods[method], dict(found.training)
    basis = [
        f"{found.num_done} of {found.num_runs} runs of the benchmark, {found.num_subjects} subjects "
        f"with {NUM_PHOTOS} photos each: likeness {_shown(row.likeness)}"
    ]
    if method != found.best:
        best = found.methods[found.best]
        basis.append(
            f"{LABELS[found.best]} had {_shown(best.likeness)} with {best.parameters:,} "
            "parameters, which is not clearly more"
        )
    seconds = row.seconds / float(training["max_train_steps"])
    studied = curves.photos if curves.photos is not None and curves.photos.method == method else None
    enough = {int(n): steps for n, steps in (studied.enough_steps if studied else {}).items() if steps}
    if studied is None or not enough:
        expected = [f"likeness to the subject {_shown(row.likeness)} by {found.column}"]
        if row.recognised is not None:
            expected.append(f"{row.recognised.mean:.0%} of the pictures recognised as the subject")
        doubts = _doubts_of_photos(num_photos, NUM_PHOTOS, NUM_PHOTOS)
    else:  # the trainings with as many photos, or the next fewer
        number = max((each for each in enough if each <= num_photos), default=min(enough))
        scores = studied.cells[str(number)][str(enough[number])]
        training["max_train_steps"] = enough[number]
        expected = [
            f"likeness of the object to the true picture {_shown(scores[OBJECT])}; the base alone "
            f"{studied.base[OBJECT]:.3f}",
            f"{scores[RECOGNISED].mean:.0%} of the pictures recognised as the subject; the base alone "
            f"{studied.base[RECOGNISED]:.0%}",
        ]
        basis.append(
            "the fewest steps within 5 % of the best, of trainings with "
            + ("one photo" if number == 1 else f"{number} photos")
        )
        doubts = _doubts_of_photos(num_photos, min(enough), max(enough))
    expected += [
        f"{seconds * float(training['max_train_steps']):.0f} s of training steps on the machine that was "
        "measured",
        f"a file of {row.bytes / 1024:.0f} KiB, {row.parameters:,} parameters",
    ]
    usable = (curves.usable_range or {}).get(method)
    if usable is not None:
        basis.append(f"rates from {usable.lowest:g} to {usable.highest:g} came within 5 % of its best")
    return Advice(method, row.learning_rate, training, tuple(expected), tuple(basis), tuple(doubts))


def _shown(found: Estimate) -> str:
    error = found.standard_error
    return f"{found.mean:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _doubts_of_photos(num_photos: int, least: int, most: int) -> list[str]:
    if least <= num_photos <= most:
        return []
    measured = f"{least}" if least == most else f"{least} to {most}"
    less = "; expect less variety" if num_photos < least else ""
    return [f"{num_photos} photos: what this rests on had {measured}, and the steps are kept{less}"]
