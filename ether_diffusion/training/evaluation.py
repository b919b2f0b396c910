"""The evaluations of a run: drawn, measured, logged, and the adapter of the best step kept in best/."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

from ether_diffusion.durable_files import replace_folder, write_files
from ether_diffusion.strict_json import Json
from ether_diffusion.training.accelerator import track
from ether_diffusion.training.checkpoint import Checkpoint
from ether_diffusion.training.curve import Curve, Measured, Record, Stop
from ether_diffusion.training.loop import averaged
from ether_diffusion.training.result import CURVE_NAME, EVALUATION_NAME, metadata_of_run, result_files
from ether_diffusion.training.run_folder import RunFolder
from ether_diffusion.training.setup import LoadedRun
from ether_diffusion.training.validation import Pictures, draw

BEST = "best"
FORMAT = 1
_PLACES = 6

logger = logging.getLogger(__name__)


class Evaluations:
    """What the main process measures of a run, one record a step; the records themselves are in log.jsonl."""

    def __init__(self, run: LoadedRun, folder: RunFolder, check: Callable[[], None] = lambda: None) -> None:
        assert run.checked.evaluator is not None
        self.run, self.folder, self.check, self.evaluator = run, folder, check, run.checked.evaluator
        self.config, self.trainer = run.config.evaluation, run.trainer
        self.curve = Curve((), self.config)
        self.best_files: dict[str, bytes] = {}
        self._base_other: Pictures = []
        facts = self._facts() | {"photos": run.checked.training.fingerprint}
        self._of = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def _facts(self) -> dict[str, Json]:
        """Return what scores depend on besides adapter and photos, and what the choice of the best does."""
        return {
            "prompts": list(self.evaluator.prompts),
            "other_prompts": list(self.evaluator.other_prompts),
            "num_images": self.config.num_eval_images,
            "num_inference_steps": self.config.eval_num_inference_steps,
            "guidance_scale": self.run.base.guidance_scale,
            "seed": self.run.config.compute.seed,
            "size": list(self.run.checked.size),
            "max_drift": self.config.eval_max_drift,
            "max_prompt_loss": self.config.eval_max_prompt_loss,
            **self.evaluator.facts(),
        }

    @property
    def num_pictures(self) -> int:
        """How many pictures one evaluation draws."""
        num_prompts = len(self.evaluator.prompts) + len(self.evaluator.other_prompts)
        return num_prompts * self.config.num_eval_images

    def measure_base(self) -> Measured:
        """Score the base alone."""
        subject, self._base_other = self._draw(self.evaluator.prompts, with_adapter=False)
        return self.evaluator.measure(subject, self._base_other, self._base_other)

    def _measure(self) -> Measured:
        """Score the adapter in training, or its average where one is kept."""
        if not self._base_other:
            _, self._base_other = self._draw((), with_adapter=False)
        with averaged(self.trainer):
            subject, other = self._draw(self.evaluator.prompts)
        return self.evaluator.measure(subject, other, self._base_other)

    def _draw(self, own: tuple[str, ...], *, with_adapter: bool = True) -> tuple[Pictures, Pictures]:
        """Return the pictures of prompts with the subject, and of those without."""
        seed = self.run.config.compute.seed
        rows = draw(
            self.run,
            (*own, *self.evaluator.other_prompts),
            seeds=range(seed, seed + self.config.num_eval_images),
            num_steps=self.config.eval_num_inference_steps,
            guidance_scale=self.run.base.guidance_scale,
            with_adapter=with_adapter,
            check=self.check,
        )
        return rows[: len(own)], rows[len(own) :]

    def is_due(self, step: int) -> bool:
        """Say whether a step is measured: every so many, and the last."""
        return step % self.config.eval_steps == 0 or step == self.trainer.progress.num_steps

    def evaluate(self) -> None:
        """Measure the step that training is at, unless it was; and the base, the first time."""
        step = self.trainer.step
        if not self.curve.records:
            self._add(0, self.measure_base())
        if step not in {record.step for record in self.curve.records}:
            self._add(step, self._measure())

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
                scores = (f"{score.mean:.3f}" for score in record.scores.values())
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

    def _add(self, step: int, measured: Measured) -> None:
        values = {name: tuple(round(x, _PLACES) for x in row) for name, row in asdict(measured).items()}
        record = Record(step, Measured(**values))
        means = {f"eval_{name}": round(score.mean, _PLACES) for name, score in record.scores.items()}
        self.folder.log({"step": step, **means, "evaluation": {"of": self._of, **_as_json(values)}})
        track(self.run.checked.accelerator, means, step)
        self.curve = replace(self.curve, records=(*self.curve.records, record))
        is_best = " (the best so far)" if self.curve.best() is record else ""
        scores = ", ".join(f"{name} {score.mean:.3f}" for name, score in record.scores.items())
        logger.info("step %d: %s%s", step, scores, is_best)
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
            return
        found = {str(each.relative_to(path)): each.read_bytes() for each in path.rglob("*") if each.is_file()}
        if found != self.best_files:
            replace_folder(path, self.best_files)

    def _current_files(self, best: Record) -> dict[str, bytes]:
        with averaged(self.trainer):
            files = result_files(self.trainer, metadata_of_run(self.run))
        about = {"step": best.step, "of": self._of, **_scores(best)}
        return files | {EVALUATION_NAME: json.dumps(about, indent=1).encode()}

    def _write_report(self) -> None:
        best, stop, curve = self.curve.best(), self.stop, self.curve
        report = {
            "format": FORMAT,
            "settings": self._facts(),
            "curve": [
                {"step": record.step, **_scores(record), "is_candidate": curve.is_candidate(record)}
                for record in curve.records
            ],
            "best_step": None if best is None else best.step,
            "stopped": None if stop is None else asdict(stop),
        }
        files = {EVALUATION_NAME: json.dumps(report, indent=1).encode() + b"\n"}
        picture = self.evaluator.draw(curve)
        write_files(self.folder.path, files if picture is None else files | {CURVE_NAME: picture})

    def _record(self, line: Mapping[str, Json]) -> Record | None:
        """Read a line of the log; None where it was measured otherwise."""
        step, found = line.get("step"), line["evaluation"]
        if not isinstance(found, dict) or found.get("of") != self._of or not isinstance(step, int):
            return None
        values = {name: tuple(row) for name, row in found.items() if isinstance(row, list)}
        return Record(step, Measured(**values))  # type: ignore[arg-type]  # written by us: it has our mark


def _scores(record: Record) -> dict[str, Json]:
    return {name: asdict(score) for name, score in record.scores.items()}


def _as_json(values: Mapping[str, tuple[float, ...]]) -> dict[str, Json]:
    return {name: list(row) for name, row in values.items()}


def _described(files: Mapping[str, bytes]) -> dict[str, Json]:
    """Return what a best adapter says of itself."""
    found = json.loads(files.get(EVALUATION_NAME, b"{}"))
    return found if isinstance(found, dict) else {}
