"""The claims of the paper (ETHER, Bini et al. 2024, arXiv:2405.20271), each with a rule that can fail.

"More" means: the paired difference over the same subjects is above zero by more than two standard errors.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ether_diffusion.tiny_world.pictures import OBJECT
from research.measured import Measured, NotMeasuredError, difference_of, paired_difference

Verdict = Literal["reproduced", "not reproduced", "not testable here", "not measured yet"]
Found = tuple[bool, str]
"""Whether a claim holds of what was measured, and the numbers in words."""


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, where it stands, and how it is held against what was measured here.

    `rule` is None for what cannot be tested here, and `reason` says why.
    """

    statement: str
    source: str
    rule: Callable[[Measured], Found] | None = None
    reason: str = ""

    def judge(self, measured: Measured) -> tuple[Verdict, str]:
        """Return the verdict and its numbers."""
        if self.rule is None:
            return "not testable here", self.reason
        try:
            holds, numbers = self.rule(measured)
        except NotMeasuredError as missing:
            return "not measured yet", str(missing)
        return ("reproduced" if holds else "not reproduced"), numbers


RANGES_OF_THE_PAPER = ("ether", "lora", "oft")
"""What its figures 5, 6 and 8 compare with ETHER+, besides Naive, which is not offered for training."""
NEUTRAL = 0.05
"""Blocks hardly matter where no number of them scores more than this share below the best."""


def _parameters(measured: Measured, name: str) -> int:
    return int(measured.value("cost", "methods", name, "parameters"))


def fewer_than_oft(name: str, factor: int) -> Callable[[Measured], Found]:
    """Return the rule that a method has at least `factor` times fewer parameters than OFT on SD 1.5."""

    def rule(measured: Measured) -> Found:
        own, oft = _parameters(measured, name), _parameters(measured, "PEFT OFT 4 blocks")
        return oft / own >= factor, f"{own:,} and {oft:,}: {oft / own:.1f} times (SD 1.5's UNet)"

    return rule


def half_of_lora(measured: Measured) -> Found:
    """ETHER+ has half of LoRA's parameters or fewer."""
    own, lora = _parameters(measured, "ETHER+"), _parameters(measured, "PEFT LoRA r=4")
    return 2 * own <= lora, f"{own:,} and {lora:,} (SD 1.5's UNet)"


def truer_than(other: str, *, one: str = "ether_plus") -> Callable[[Measured], Found]:
    """Return the rule that one method's pictures are more like the subject than another's."""

    def rule(measured: Measured) -> Found:
        column, _ = measured.columns()
        found = paired_difference(measured, one, other, column)
        return found.mean > 0 and found.is_clear, f"{column} {found}{_unclear(found.is_clear)}"

    return rule


def ether_is_least_true(measured: Measured) -> Found:
    """Every other method is more like the subject than ETHER."""
    column, _ = measured.columns()
    return _against_all(measured, column, sign=-1)


def ether_follows_prompts(measured: Measured) -> Found:
    """ETHER is more like the prompts than every other method."""
    _, column = measured.columns()
    return _against_all(measured, column, sign=1)


def _against_all(measured: Measured, column: str, *, sign: int) -> Found:
    others = ("full", "lora", "oft", "ether_plus")
    found = {name: paired_difference(measured, "ether", name, column) for name in others}
    holds = all(sign * each.mean > 0 and each.is_clear for each in found.values())
    words = ", ".join(
        f"{each.mean:+.3f} ± {each.standard_error:.3f} to {name}" for name, each in found.items()
    )
    return holds, f"{column} of ETHER: {words}"


def both_sides(measured: Measured) -> Found:
    """ETHER+ scores clearly more on both sides than on one, at four blocks."""
    found = {}
    for variant in ("ETHER+", "ETHER+ one-sided"):
        found[variant] = {
            (run["subject"], run["seed"]): run["scores"][OBJECT]
            for run in measured.value("blocks", "runs")
            if run["variant"] == variant and run["num_blocks"] == 4 and OBJECT in run["scores"]
        }
    two, one = found.values()
    pairs = [two[key] - one[key] for key in two if key in one]
    if len(pairs) < 2:
        raise NotMeasuredError("blocks.json has no two subjects of ETHER+ on one side and on both")
    gain = difference_of(pairs)
    return gain.mean > 0 and gain.is_clear, f"{OBJECT} {gain}{_unclear(gain.is_clear)}"


def blocks_hardly_matter(measured: Measured) -> Found:
    """No number of ETHER's blocks scores more than 5 % below the best."""
    row: dict[str, Any] = measured.value("blocks", "variants", "ETHER")
    means = {blocks: measured.mean("blocks", "variants", "ETHER", blocks, OBJECT) for blocks in row}
    best = max(means.values())
    words = ", ".join(f"n={blocks} {_shown(row[blocks][OBJECT])}" for blocks in means)
    return all(best - mean <= NEUTRAL * abs(best) for mean in means.values()), f"{OBJECT} {words}"


def widest_range(measured: Measured) -> Found:
    """No other range of usable rates is as wide as ETHER+'s, of those that the paper compares."""
    ranges: dict[str, Any] = measured.value("learning_rates", "usable_range")
    there = {name: found["ratio"] for name, found in ranges.items() if found is not None}
    if "ether_plus" not in there or there.keys().isdisjoint(RANGES_OF_THE_PAPER):
        raise NotMeasuredError("learning_rates.json has too few methods")
    words = ", ".join(
        f"{name} {'≥ ' if ranges[name]['is_open'] else ''}{round(ratio, 1):g}"
        for name, ratio in there.items()
    )
    others = [ratio for name, ratio in there.items() if name in RANGES_OF_THE_PAPER]
    unlike = ", ".join(name for name in there if name not in (*RANGES_OF_THE_PAPER, "ether_plus"))
    told = f"highest ÷ lowest usable rate: {words}" + (f"; these figures have no {unlike}" if unlike else "")
    return there["ether_plus"] > max(others), told


def bounded_distance(measured: Measured) -> Found:
    """OFT's weights go further than ETHER's and ETHER+'s, and ten times as far as at the lowest rate."""
    growth = {}
    for name in ("ether", "ether_plus", "oft"):
        rates: dict[str, Any] = measured.value("learning_rates", "methods", name)
        there = {
            float(rate): found["weight_distance"]["mean"]
            for rate, found in rates.items()
            if "weight_distance" in found
        }
        if len(there) < 2:
            raise NotMeasuredError(f"learning_rates.json has too few distances of {name}")
        growth[name] = (there[min(there)], there[max(there)])
    words = ", ".join(f"{name} {low:.3g} → {high:.3g}" for name, (low, high) in growth.items())
    ratio = {name: high / low for name, (low, high) in growth.items()}
    holds = max(growth["ether"][1], growth["ether_plus"][1]) < growth["oft"][1] and ratio["oft"] > 10
    return holds, f"‖W' − W‖ / ‖W‖ at the lowest and the highest rate: {words}"


def random_transforms(measured: Measured) -> Found:
    """At every strength ETHER+ keeps more than half of the base's recognised share; OFT at some keeps less.

    Not at the greatest alone: towards −I, where OFT ends, the signs of q and k, v and out cancel.
    """
    fewest, last = {}, {}
    for name in ("ether", "ether_plus", "oft"):
        row: dict[str, Any] = measured.value("transforms", "methods", name)
        shares = {s: measured.mean("transforms", "methods", name, s, "recognised") for s in row}
        fewest[name], last[name] = min(shares.values()), shares[max(row, key=float)]
    base = measured.mean("transforms", "base", "recognised")
    words = ", ".join(f"{name} {share:.2f}" for name, share in fewest.items())
    holds = fewest["ether_plus"] > base / 2 > fewest["oft"]
    return holds, (
        f"fewest recognised over the strengths: {words}; base {base:.2f}; OFT near its end, −I, which the "
        f"signs of q and k cancel, {last['oft']:.2f} again"
    )


def energy(measured: Measured) -> Found:
    """Energy changes most under ETHER+, and under ETHER and OFT by less than a hundredth of that."""
    rows: dict[str, Any] = measured.value("energy", "methods")
    changes = {_plain(name): measured.mean("energy", "methods", name, "absolute_change") for name in rows}
    for name in ("ether", "ether_plus", "oft"):
        if name not in changes:
            raise NotMeasuredError(f"energy.json has no {name}")
    words = ", ".join(f"{name} {change:.2g}" for name, change in changes.items())
    plus = changes["ether_plus"]
    kept = max(changes["ether"], changes["oft"]) < plus / 100
    told = f"mean |ΔHE| / HE: {words}; PEFT's OFT is a Neumann series, orthogonal only nearly"
    return kept and plus == max(changes.values()), told


def _plain(name: str) -> str:
    return name.lower().replace("+", "_plus").replace(" ", "_")


def _shown(found: dict[str, Any]) -> str:
    error = found.get("standard_error")
    return f"{found['mean']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _unclear(is_clear: bool) -> str:
    return "" if is_clear else "; within two standard errors of zero"


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


_LANGUAGE = "another model and other data; this package is about diffusion models"
_NO_SD_15 = "no weights of SD 1.5, no data and no GPU where this was measured; "

CLAIMS: tuple[Claim, ...] = (
    Claim("ETHER has about 120 times fewer parameters than OFT n=4", "§5.1", fewer_than_oft("ETHER", 100)),
    Claim("ETHER+ has about 30 times fewer parameters than OFT n=4", "§5.1", fewer_than_oft("ETHER+", 25)),
    Claim("ETHER+ has half of LoRA r=4's parameters (0.4 M and 0.8 M)", "Table 2", half_of_lora),
    Claim("ETHER+ is truer to the subject than LoRA (DINO 0.666, 0.660)", "Table 2", truer_than("lora")),
    Claim("ETHER+ is truer to the subject than OFT (0.666, 0.652)", "Table 2", truer_than("oft")),
    Claim("ETHER+ is truer to the subject than DreamBooth (0.666, 0.644)", "Table 2", truer_than("full")),
    Claim(
        "LoRA is truer to the subject than DreamBooth (0.660, 0.644)",
        "Table 2",
        truer_than("full", one="lora"),
    ),
    Claim("ETHER is the least true to the subject (DINO 0.567)", "Table 2", ether_is_least_true),
    Claim("ETHER follows the prompt best (CLIP-T 0.256)", "Table 2", ether_follows_prompts),
    Claim(
        "the figures of Table 2: SD 1.5, 30 subjects × 25 prompts × 4 pictures",
        "Table 2",
        reason=_NO_SD_15 + "`ether benchmark --data … --base …` is that protocol",
    ),
    Claim(
        "orthogonality matters little: Naive is as good as OFT",
        "Table 6",
        reason="Naive is not offered for training",
    ),
    Claim("ETHER+ on both sides is truer than on one (DINO 0.666, 0.618)", "Table 11", both_sides),
    Claim("the number of blocks hardly matters (n = 1, 4, 16)", "Table 9", blocks_hardly_matter),
    Claim("ETHER+ has the widest range of learning rates", "Fig. 5, 6, 8", widest_range),
    Claim(
        "the weights' distance is bounded for ETHER and ETHER+, and OFT's grows with the rate",
        "Fig. 4",
        bounded_distance,
    ),
    Claim("pictures survive ETHER+ at any strength, and not OFT", "Fig. 3", random_transforms),
    Claim("hyperspherical energy is kept by OFT and ETHER, and changed most by ETHER+", "Fig. 7", energy),
    Claim(
        "more blocks cost fewer operations (Llama-2: −52 %, −68 % at n = 4, 32)",
        "Table 1",
        reason="H is never built here: n does not decide the cost; see speed.md",
    ),
    Claim("an encoder alone is far below encoder and adapter (mIoU 8.2, 24.6)", "Table 3", adapters_help),
    Claim("ETHER+ follows a map best (mIoU 27.3, OFT 24.5, ETHER 24.6)", "Table 3", ether_plus_is_best),
    Claim("re-fitting magnitudes adds little to OFT", "Table 3", reason="re-fitting is not offered"),
    Claim(
        "the figures of Table 3: ADE20K, UperNet-101",
        "Table 3",
        reason=_NO_SD_15 + "`train-control` is the command",
    ),
    Claim("GLUE: ETHER+ 90.10 on average, OFT 89.77", "Table 4", reason=_LANGUAGE),
    Claim("instruction tuning: ETHER+ n=32 is best of all", "Tables 5, 8, 10", reason=_LANGUAGE),
    Claim("VTAB: ETHER+ is the best adapter on three of six", "Table 12", reason=_LANGUAGE),
)
