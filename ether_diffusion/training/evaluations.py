"""The evaluations of a run: drawn, measured, logged, and the adapter of the best step kept in best/."""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from ether_diffusion.durable_files import replace_folder, write_files
from ether_diffusion.strict_json import Json
from ether_diffusion.training.best import Curve, Measured, Record, Score, Stop
from ether_diffusion.training.checkpoint import Checkpoint
from ether_diffusion.training.loop import averaged
from ether_diffusion.training.measuring import Measuring
from ether_diffusion.training.result import CURVE_NAME, EVALUATION_NAME, metadata_of_run, result_files
from ether_diffusion.training.run_folder import RunFolder
from ether_diffusion.training.trackers import track

BEST = "best"
FORMAT = 1
_PLACES = 6

logger = logging.getLogger(__name__)


class Evaluations:
    """What the main process measures of a run, one record a step; the records themselves are in log.jsonl."""

    def __init__(self, measuring: Measuring, folder: RunFolder) -> None:
        self.measuring, self.folder, self.run = measuring, folder, measuring.run
        self.config, self.trainer = measuring.config, self.run.trainer
        self.curve = Curve((), self.config)
        self.best_files: dict[str, bytes] = {}
        facts = measuring.facts() | {"photos": self.run.checked.training.fingerprint}
        self._of = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def is_due(self, step: int) -> bool:
        """Say whether a step is measured: every so many, and the last."""
        return step % self.config.eval_steps == 0 or step == self.trainer.progress.num_steps

    @property
    def stop(self) -> Stop | None:
        """Where and why the run ends early, if it was asked to and is good."""
        return self.curve.stop() if self.config.stop_when_good and self.curve.records else None

    def restore(self, checkpoint: Checkpoint | None) -> None:
        """Go on from the records in the log and the best adapter in the checkpoint."""
        lines = [line for line in self.folder.lines() if "evaluation" in line]
        records = [record for line in lines if (record := self._record(line)) is not None]
        if len(records) < len(lines):
            logger.warning("the run was evaluated otherwise before: its curve begins anew, and its best step")
            self.folder.keep_lines(lambda line: "evaluation" not in line or self._record(line) is not None)
        if not any(record.step == 0 for record in records):  # a power cut took the base's line
            records = []
            self.folder.keep_lines(lambda line: "evaluation" not in line)
        files = {} if checkpoint is None else checkpoint.inside(BEST)
        self.best_files = files if _described(files).get("of") == self._of else {}
        self.curve = Curve(tuple(sorted(records, key=lambda record: record.step)), self.config)
        if self.curve.records:
            self._keep_best()
            self._write_report()

    @property
    def result(self) -> dict[str, bytes] | None:
        """The files of the best step's adapter, if that was asked for; None for the last step's."""
        files = {name: data for name, data in self.best_files.items() if name != EVALUATION_NAME}
        return files if files and self.config.stop_when_good else None

    @property
    def result_step(self) -> int:
        """The step whose adapter is the result."""
        best = self.curve.best()
        return self.trainer.step if best is None or self.result is None else best.step

    def told(self) -> list[str]:
        """Return lines for the model card on what was found."""
        best, base = self.curve.best(), self.curve.base
        lines = ["| step | likeness to the photos | to the prompts | drift |", "|---|---|---|---|"]
        for name, record in (("the base", base), ("best", best), ("last", self.curve.records[-1])):
            if record is not None:
                scores = (f"{score.mean:.3f}" for score in _scores(record).values())
                label = name if record is base else f"{record.step} ({name})"
                lines.append(f"| {label} | {' | '.join(scores)} |")
        if best is None:
            lines += ["", "No step kept to the bounds on drift and likeness to the prompts."]
        if self.stop is not None:
            lines += ["", f"Training ended at step {self.stop.step}: {self.stop.reason}."]
        is_drawn = (self.folder.path / CURVE_NAME).is_file()
        return [*lines, *(["", f"![scores by step]({CURVE_NAME})"] if is_drawn else [])]

    def files_of_checkpoint(self) -> dict[str, bytes]:
        """Return what a checkpoint holds of the best step: going on from it goes on with that, too."""
        return {f"{BEST}/{name}": data for name, data in self.best_files.items()}

    def evaluate(self) -> None:
        """Measure the step that training is at, unless it was; and the base, the first time."""
        step = self.trainer.step
        if not self.curve.records:
            self._add(0, self.measuring.measure_base())
        if step not in {record.step for record in self.curve.records}:
            self._add(step, self.measuring.measure())

    def _add(self, step: int, measured: Measured) -> None:
        values = {name: tuple(round(x, _PLACES) for x in row) for name, row in asdict(measured).items()}
        record = Record(step, Measured(**values))
        means = {f"eval_{name}": round(score.mean, _PLACES) for name, score in _scores(record).items()}
        listed = {name: list(row) for name, row in values.items()}
        self.folder.log({"step": step, **means, "evaluation": {"of": self._of, **listed}})
        track(self.measuring.accelerator, means, step)
        self.curve = replace(self.curve, records=(*self.curve.records, record))
        best = self.curve.best()
        logger.info(
            "step %d: fidelity %.3f, prompt %.3f, drift %.3f%s",
            *(step, record.fidelity.mean, record.prompt.mean, record.drift.mean),
            " (the best so far)" if best is record else "",
        )
        self._keep_best()
        self._write_report()

    def _keep_best(self) -> None:
        """Bring best/ to what the records say."""
        best, path = self.curve.best(), self.folder.path / BEST
        if best is not None and _described(self.best_files).get("step") != best.step:
            self.best_files = self._current_files(best) if best.step == self.trainer.step else {}
            if not self.best_files:  # measured, and never kept: best/ is of later steps then
                logger.warning("the adapter of step %d, the best so far, is not there any more", best.step)
                self.curve = replace(self.curve, records=self.curve.records[:1])
                self.folder.keep_lines(lambda line: "evaluation" not in line or line["step"] == 0)
        if best is None:
            self.best_files = {}
        if not self.best_files:
            shutil.rmtree(path, ignore_errors=True)
        elif not _holds(path, self.best_files):
            replace_folder(path, self.best_files)

    def _current_files(self, best: Record) -> dict[str, bytes]:
        with averaged(self.trainer):
            files = result_files(self.trainer, metadata_of_run(self.run))
        about = {"step": best.step, "of": self._of, **_as_json(_scores(best))}
        return files | {EVALUATION_NAME: json.dumps(about, indent=1).encode()}

    def _write_report(self) -> None:
        best, stop = self.curve.best(), self.stop
        report = {
            "format": FORMAT,
            "settings": self.measuring.facts(),
            "curve": [
                {
                    "step": record.step,
                    **_as_json(_scores(record)),
                    "is_candidate": self.curve.is_candidate(record),
                }
                for record in self.curve.records
            ],
            "best_step": None if best is None else best.step,
            "stopped": None if stop is None else asdict(stop),
        }
        files = {EVALUATION_NAME: json.dumps(report, indent=1).encode() + b"\n"}
        picture = self.measuring.evaluator.draw(self.curve)
        if picture is not None:
            files[CURVE_NAME] = picture
        write_files(self.folder.path, files)

    def _record(self, line: Mapping[str, Json]) -> Record | None:
        """Read a line of the log; None where it was measured otherwise."""
        step, found = line.get("step"), line["evaluation"]
        if not isinstance(found, dict) or found.get("of") != self._of or not isinstance(step, int):
            return None
        values = {name: tuple(row) for name, row in found.items() if isinstance(row, list)}
        return Record(step, Measured(**values))  # type: ignore[arg-type]  # written by us: it has our mark


def _scores(record: Record) -> dict[str, Score]:
    return {"fidelity": record.fidelity, "prompt": record.prompt, "drift": record.drift}


def _as_json(scores: Mapping[str, Score]) -> dict[str, Json]:
    return {name: asdict(score) for name, score in scores.items()}


def _described(files: Mapping[str, bytes]) -> dict[str, Json]:
    """Return what a best adapter says of itself."""
    found = json.loads(files.get(EVALUATION_NAME, b"{}"))
    return found if isinstance(found, dict) else {}


def _holds(folder: Path, files: Mapping[str, bytes]) -> bool:
    """Say whether a folder holds these files and no others."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return found == files.keys() and all((folder / name).read_bytes() == files[name] for name in found)
