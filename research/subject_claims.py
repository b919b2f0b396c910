"""Rules for the paper's claims about subjects, learning rates, transforms and cost."""

from collections.abc import Callable
from typing import Any

from ether_diffusion.evaluation.columns import OBJECT
from research.measured import (
    Measured,
    NotMeasuredError,
    difference_of,
    paired_difference,
)

Found = tuple[bool, str]
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
