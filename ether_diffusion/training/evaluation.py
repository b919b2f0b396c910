"""Evaluation in training: pictures are drawn and measured, and the adapter of the best step kept in best/."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from PIL import Image

from ether_diffusion.adapters.models import shareable_name
from ether_diffusion.bases import Base
from ether_diffusion.durable_files import replace_folder, write_files
from ether_diffusion.metrics import scores as metrics
from ether_diffusion.metrics.encoders import Encoder, check_encoder, load_encoder
from ether_diffusion.strict_json import Json
from ether_diffusion.tiny_world import ALIAS, embedded_name
from ether_diffusion.training.checkpoint import Checkpoint
from ether_diffusion.training.config import DreamBoothConfig
from ether_diffusion.training.curve import MEASURES, Curve, Record, Scores, Stop, draw_curve
from ether_diffusion.training.loop import averaged
from ether_diffusion.training.photos import Photo, PhotoFolder
from ether_diffusion.training.result import CURVE_NAME, EVALUATION_NAME, result_files
from ether_diffusion.training.run_folder import RunFolder
from ether_diffusion.training.validation import draw

if TYPE_CHECKING:
    from ether_diffusion.training.setup import Run

BEST = "best"
MAX_PHOTOS, NUM_OTHER = 32, 4
PLACES = ("in the snow", "on a beach", "on a red background", "in a forest")
"""Contexts like those of DreamBooth's own prompts, of which Tiny World draws each, too."""

Pictures = Sequence[Sequence[Image.Image]]
"""By prompt and seed."""

logger = logging.getLogger(__name__)


def open_evaluator(config: DreamBoothConfig, base: Base, training: PhotoFolder) -> "SubjectEvaluator":
    """Return the evaluator of a run, checked but not loaded.

    A ValueError or a FileNotFoundError says which encoder is missing, or cannot be used.
    """
    is_tiny, offline = embedded_name(base.folder) is not None, config.base.local_files_only
    encoders = config.evaluation.eval_encoder or ((ALIAS,) if is_tiny else ())
    if not encoders:
        raise ValueError(
            "eval_steps needs eval_encoder with this base: clip, or a folder or hub id of one, and before it "
            "dino or dinov2 for the likeness to the photos"
        )
    readers = [name for name in encoders if check_encoder(name, offline=offline) in ("clip", "tiny")]
    if not readers:
        found = f"eval_encoder {', '.join(encoders)} reads no texts"
        raise ValueError(f"{found}, which likeness to prompts needs; give a further eval_encoder, as clip")
    if find_spec("matplotlib") is None:
        logger.warning("no curve is drawn: pip install 'ether-diffusion[evaluate]' for matplotlib")
    others = metrics.other_tiny_prompts() if is_tiny else metrics.OTHER_PROMPTS
    prompts = config.subject_prompts or tuple(f"{config.trigger} {place}" for place in PLACES)
    return SubjectEvaluator(
        prompts,
        tuple(each for each in others if each not in prompts)[:: len(others) // NUM_OTHER][:NUM_OTHER],
        encoders[0],
        readers[0],
        config.data.token,
        training.photos[:: -(-len(training.photos) // MAX_PHOTOS)],  # spread over all
        offline,
    )


@dataclass(eq=False)
class SubjectEvaluator:
    """Compares pictures with a subject's photos, with their prompts, and with what the base draws."""

    prompts: tuple[str, ...]
    other_prompts: tuple[str, ...]
    viewer_name: str
    reader_name: str
    identifier: str | None
    photos: Sequence[Photo]
    offline: bool

    def facts(self) -> dict[str, Json]:
        """Return what scores depend on besides the pictures."""
        names = {"likeness_by": self.viewer_name, "prompts_by": self.reader_name}
        shared = {name: shareable_name(each) for name, each in names.items()}
        return {**shared, "identifier": self.identifier, "num_photos": len(self.photos)}

    def load(self, device: torch.device, loaded: dict[str, Encoder]) -> None:
        """Load the encoders, unless they are by name; embed the photos and the prompts."""
        self._device, names = device, (self.viewer_name, self.reader_name)
        for name in names:
            if name not in loaded:
                loaded[name] = load_encoder(name, offline=self.offline)
        self._viewer, self._reader = (loaded[name] for name in names)
        texts = [metrics.without_identifier(prompt, self.identifier) for prompt in self.prompts]
        with self._at_work():
            self._seen = self._viewer.view([each.decode().rgb for each in self.photos]).subjects
            self._texts = self._reader.embed_texts(texts)

    def measure(self, subject: Pictures, other: Pictures, base_other: Pictures) -> Scores:
        """Score pictures, one a prompt and seed."""
        pictures = [picture for row in subject for picture in row]
        with self._at_work():
            seen = self._viewer.view(pictures)
            read = seen.whole if self._reader is self._viewer else self._reader.embed_images(pictures)
            flat = ([each for row in rows for each in row] for rows in (other, base_other))
            drawn, base = map(self._viewer.embed_images, flat)
            drift = metrics.relative_drift(drawn, base, torch.arange(len(base)) // len(other[0]))
        texts = self._texts.repeat_interleave(len(subject[0]), dim=0)
        found = (
            metrics.likeness_to(self._seen, seen.subjects),
            metrics.likeness_of_pairs(read, texts),
            drift,
        )
        return {name: values.tolist() for name, values in zip(MEASURES, found, strict=True)}

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Have the encoders on the device inside; between evaluations its memory is the training's."""
        models = [each.model for each in (self._viewer, self._reader) if each.kind != "tiny"]
        for model in models:
            model.to(self._device)
        try:
            yield
        finally:
            for model in models:
                model.to("cpu")


class Evaluations:
    """What the main process measures of a run, one record a step; the records themselves are in log.jsonl."""

    def __init__(self, run: "Run", folder: RunFolder) -> None:
        assert run.evaluator is not None
        self.run, self.folder, self.evaluator, self.config = run, folder, run.evaluator, run.config.evaluation
        self.curve = Curve((), self.config)
        self.best_files: dict[str, bytes] = {}
        self._base_other: Pictures = []
        # what scores depend on besides the adapter, and what the choice of the best does
        self.facts: dict[str, Json] = {
            "prompts": list(self.evaluator.prompts),
            "other_prompts": list(self.evaluator.other_prompts),
            "num_images": self.config.num_eval_images,
            "num_inference_steps": self.config.eval_num_inference_steps,
            "guidance_scale": run.base.guidance_scale,
            "seed": run.config.compute.seed,
            "size": list(run.size),
            "max_drift": self.config.eval_max_drift,
            "max_prompt_loss": self.config.eval_max_prompt_loss,
            **self.evaluator.facts(),
        }
        facts = json.dumps(self.facts | {"photos": run.training.fingerprint}, sort_keys=True)
        self._of = hashlib.sha256(facts.encode()).hexdigest()[:16]

    def measure_base(self) -> Scores:
        """Score the base alone."""
        subject, self._base_other = self._draw(self.evaluator.prompts, with_adapter=False)
        return self.evaluator.measure(subject, self._base_other, self._base_other)

    def _draw(self, own: tuple[str, ...], *, with_adapter: bool = True) -> tuple[Pictures, Pictures]:
        """Return the pictures of prompts with the subject, and of those without."""
        seed, guidance = self.run.config.compute.seed, self.run.base.guidance_scale
        rows = draw(
            self.run,
            (*own, *self.evaluator.other_prompts),
            seeds=range(seed, seed + self.config.num_eval_images),
            num_steps=self.config.eval_num_inference_steps,
            guidance_scale=guidance,
            with_adapter=with_adapter,
        )
        return rows[: len(own)], rows[len(own) :]

    def is_due(self, step: int) -> bool:
        """Say whether a step is measured: every so many, and the last."""
        return step % self.config.eval_steps == 0 or step == self.run.trainer.progress.num_steps

    def evaluate(self) -> None:
        """Measure the adapter in training, or its average, unless that was; and the base, the first time."""
        step = self.run.trainer.step
        if not self.curve.records:
            self._add(0, self.measure_base())
        if step in {record.step for record in self.curve.records}:
            return
        if not self._base_other:
            _, self._base_other = self._draw((), with_adapter=False)
        with averaged(self.run.trainer):
            subject, other = self._draw(self.evaluator.prompts)
        self._add(step, self.evaluator.measure(subject, other, self._base_other))

    def _add(self, step: int, measured: Scores) -> None:
        scores = {name: [round(value, 6) for value in values] for name, values in measured.items()}
        record = Record(step, scores)
        line: dict[str, Json] = {"of": self._of, **scores}  # type: ignore[dict-item]  # lists of floats
        means = {f"eval_{name}": round(record.mean(name), 6) for name in MEASURES}
        self.folder.log({"step": step, **means, "evaluation": line})
        self.run.accelerator.log(means, step=step)
        self.curve = replace(self.curve, records=(*self.curve.records, record))
        is_best = " (the best so far)" if self.curve.best() is record else ""
        told = ", ".join(f"{name} {record.mean(name):.3f}" for name in MEASURES)
        logger.info("step %d: %s%s", step, told, is_best)
        self._keep()

    @property
    def stop(self) -> Stop | None:
        """Where and why the run ends early, if it was asked to and is good."""
        return self.curve.stop() if self.config.stop_when_good and self.curve.records else None

    def restore(self, checkpoint: Checkpoint | None) -> None:
        """Go on from the records in the log and the best adapter in the checkpoint."""
        lines = [line for line in self.folder.lines() if "evaluation" in line]
        found = [record for line in lines if (record := self._record(line)) is not None]
        if len(found) < len(lines):
            logger.warning("the run was evaluated otherwise before: its curve begins anew, and its best step")
        records = sorted(found, key=lambda record: record.step)
        if records and records[0].step > 0:  # a power cut took the base's line
            records = []
        if len(records) < len(lines):
            self.folder.keep_lines(lambda line: "evaluation" not in line or self._record(line) in records)
        files = {} if checkpoint is None else checkpoint.inside(BEST)
        self.best_files = files if _described(files).get("of") == self._of else {}
        self.curve = replace(self.curve, records=tuple(records))
        if records:
            self._keep()

    def _record(self, line: Mapping[str, Json]) -> Record | None:
        """Read a line of the log; None where it was measured otherwise."""
        step, found = line.get("step"), line["evaluation"]
        if not isinstance(found, dict) or found.get("of") != self._of or not isinstance(step, int):
            return None
        return Record(step, {name: found[name] for name in MEASURES})  # type: ignore[misc]  # it has our mark

    @property
    def result(self) -> dict[str, bytes]:
        """The files of the best step's adapter, if that was asked for; none for the last step's."""
        files = {name: data for name, data in self.best_files.items() if name != EVALUATION_NAME}
        return files if self.config.stop_when_good or self.config.keep == "best" else {}

    def told(self) -> list[str]:
        """Return lines for the model card on what was found."""
        best, base, last = self.curve.best(), self.curve.records[0], self.curve.records[-1]
        lines = ["| step | likeness to the photos | to the prompts | drift |", "|---|---|---|---|"]
        for name, record in (("the base", base), ("best", best), ("last", last)):
            if record is not None:
                label = name if record is base else f"{record.step} ({name})"
                lines.append(f"| {label} | {' | '.join(f'{record.mean(each):.3f}' for each in MEASURES)} |")
        if best is None:
            lines += ["", "No step kept to the bounds on drift and likeness to the prompts."]
        if self.stop is not None:
            lines += ["", f"Training ended at step {self.stop.step}: {self.stop.reason}."]
        is_drawn = (self.folder.path / CURVE_NAME).is_file()
        return [*lines, *(["", f"![scores by step]({CURVE_NAME})"] if is_drawn else [])]

    def files_of_checkpoint(self) -> dict[str, bytes]:
        """Return what a checkpoint holds of the best step: going on from it goes on with that, too."""
        return {f"{BEST}/{name}": data for name, data in self.best_files.items()}

    def _keep(self) -> None:
        """Bring best/ and the report to what the records say."""
        best, path, step = self.curve.best(), self.folder.path / BEST, self.run.trainer.step
        if best is None or _described(self.best_files).get("step") != best.step:
            self.best_files = {}
        if best is not None and not self.best_files and best.step == step:
            with averaged(self.run.trainer):
                files = result_files(self.run)
            about = {"step": step, "of": self._of, **best.estimates()}
            self.best_files = files | {EVALUATION_NAME: json.dumps(about, indent=1).encode()}
        elif best is not None and not self.best_files:  # best/ is of later steps then
            logger.warning("the adapter of step %d, the best so far, is not there any more", best.step)
            self.curve = replace(self.curve, records=self.curve.records[:1])
            self.folder.keep_lines(lambda line: "evaluation" not in line or line["step"] == 0)
        there = {str(each.relative_to(path)): each.read_bytes() for each in path.rglob("*") if each.is_file()}
        if not self.best_files:
            shutil.rmtree(path, ignore_errors=True)
        elif self.best_files != there:
            replace_folder(path, self.best_files)
        curve, best, stop = self.curve, self.curve.best(), self.stop
        report = {
            "format": 1,
            "settings": self.facts,
            "curve": [
                {"step": record.step, **record.estimates(), "is_candidate": curve.is_candidate(record)}
                for record in curve.records
            ],
            "best_step": None if best is None else best.step,
            "stopped": None if stop is None else stop._asdict(),
        }
        files = {EVALUATION_NAME: json.dumps(report, indent=1).encode() + b"\n"}
        if find_spec("matplotlib") is not None:
            files[CURVE_NAME] = draw_curve(curve)
        write_files(self.folder.path, files)


def _described(files: Mapping[str, bytes]) -> dict[str, Json]:
    """Return what a best adapter says of itself."""
    found = json.loads(files.get(EVALUATION_NAME, b"{}"))
    return found if isinstance(found, dict) else {}
