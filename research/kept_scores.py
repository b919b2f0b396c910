"""Scores of runs that take minutes, kept in the run's folder, so that a study that was stopped goes on."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from ether_diffusion.adapter_file.strict_json import Json
from ether_diffusion.durable_files import write_files

SCORES_FILE = "scores.json"
Scores = Mapping[str, float]


def kept_scores(folder: Path, asked: Mapping[str, Json], measure: Callable[[], Scores]) -> Scores:
    """Return what was measured in a folder before for the same settings, or measure it and keep it there.

    Raises:
        ValueError: an earlier run had other settings.
    """
    file = folder / SCORES_FILE
    if file.is_file():
        stored = json.loads(file.read_bytes())
        if stored["run"] != asked:
            raise ValueError(f"{folder} holds a run of other settings; name another folder for this study")
        found: dict[str, float] = stored["scores"]
        return found
    scores = measure()
    folder.mkdir(parents=True, exist_ok=True)
    data = json.dumps({"run": asked, "scores": scores}, indent=1, allow_nan=False)
    write_files(folder, {SCORES_FILE: f"{data}\n".encode()})
    return scores
