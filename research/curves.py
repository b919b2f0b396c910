"""What of the measured files the advice of `ether plan` rests on."""

from ether_diffusion.adapter_file.strict_json import Json
from ether_diffusion.evaluation.columns import OBJECT, RECOGNISED
from research.measured import Measured, NotMeasuredError, paired_difference

WHOLE_MODEL = "full"
"""What is never advised: a file as large as the base is not what one takes for a subject."""


def curves_of(measured: Measured) -> dict[str, Json]:
    """Return the numbers that advice rests on: scores and costs by method, and usable rates."""
    curves: dict[str, Json] = {"benchmark": None, "usable_range": None, "photos": _photos_of(measured)}
    if "learning_rates" in measured.files:
        curves["usable_range"] = measured.value("learning_rates", "usable_range")
    try:
        column, _ = measured.columns()
    except NotMeasuredError:
        return curves
    summary = measured.files["benchmark"]
    rows = {
        name: row
        for name, row in summary["methods"].items()
        if name != WHOLE_MODEL and "parameters" in row and row["scores"]
    }
    if not rows:
        return curves
    best = max(rows, key=lambda name: rows[name]["scores"][column]["mean"])
    kept = ("parameters", "bytes", "seconds", "learning_rate")
    methods: dict[str, Json] = {
        name: {
            "likeness": row["scores"][column],
            "recognised": row["scores"].get(RECOGNISED),
            "is_behind": name != best and _is_behind(measured, best, name, column),
            **{each: row[each] for each in kept},
        }
        for name, row in rows.items()
    }
    curves["benchmark"] = {
        "base": summary["settings"]["base"],
        "column": column,
        "training": summary["settings"]["training"],
        "num_subjects": len(summary["subjects"]),
        "num_done": summary["num_done"],
        "num_runs": summary["num_runs"],
        "best": best,
        "methods": methods,
    }
    return curves


def _photos_of(measured: Measured) -> Json:
    """Return what the study of photos and steps found, without what advice does not say."""
    study = measured.files.get("photos")
    if study is None:
        return None
    return {
        "method": study["method"],
        "base": {name: study["base"][name] for name in (OBJECT, RECOGNISED)},
        "enough_steps": study["enough_steps"],
        "cells": {
            number: {
                steps: {name: scores[name] for name in (OBJECT, RECOGNISED) if name in scores}
                for steps, scores in row.items()
            }
            for number, row in study["photos"].items()
        },
    }


def _is_behind(measured: Measured, best: str, name: str, column: str) -> bool:
    """Say whether a method is clearly less like the photos than the best."""
    try:
        return paired_difference(measured, best, name, column).is_clear
    except NotMeasuredError:
        return False
