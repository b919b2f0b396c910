"""The runs of a benchmark: trained, drawn, measured and kept, by several processes."""

import json
import logging
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from pydantic import AfterValidator, Field
from safetensors.torch import load_file

from ether_diffusion.adapters.format import TENSORS_NAME
from ether_diffusion.bases import decoded_again, open_base
from ether_diffusion.benchmark.evaluation import read_photos
from ether_diffusion.benchmark.plan import BASE, REAL, BenchmarkRun, BenchmarkSettings, method_of
from ether_diffusion.console import StoppedError
from ether_diffusion.durable_files import replace_folder, write_files
from ether_diffusion.metrics.encoders import Encoder, load_encoder
from ether_diffusion.metrics.lpips import Lpips, find_lpips
from ether_diffusion.metrics.scores import (
    DRIFT,
    OTHER_PROMPTS,
    PhotoReference,
    Sample,
    other_tiny_prompts,
    relative_drift,
    score_photos,
    score_samples,
    without_faults,
)
from ether_diffusion.pipelines.metadata import fingerprint_of, png_bytes
from ether_diffusion.pipelines.opening import default_device, default_dtype
from ether_diffusion.strict_json import Json, StrictModel, read_json
from ether_diffusion.tiny_world.concepts import find_concept
from ether_diffusion.tiny_world.networks import Features, load_outside_features
from ether_diffusion.tiny_world.pictures import generate, score_against_truth, to_images
from ether_diffusion.tiny_world.subjects import unseen_scenes
from ether_diffusion.training.config import DreamBoothConfig
from ether_diffusion.training.jobs import train_groups
from ether_diffusion.training.loop import NonFiniteError
from ether_diffusion.training.methods import attach_saved
from ether_diffusion.training.prior import read_class_images
from ether_diffusion.training.processes import InterruptedRunError, release_signals, signals_held
from ether_diffusion.training.run import train_dreambooth
from ether_diffusion.training.run_folder import LOG_NAME
from ether_diffusion.training.run_lock import FOREVER, FolderInUseError, locked
from ether_diffusion.wording import printable

logger = logging.getLogger(__name__)

Count = Annotated[int, Field(ge=0)]
RESULT_FILE = "result.json"
PICTURES, ADAPTER, OTHERS = "pictures", "adapter", "other_pictures"
SEEDS_APART = 1_000_000
"""Between the first pictures of two seeds of training."""
MAX_SEED = 2**63 // SEEDS_APART - 1
_WAIT_SECONDS = 1.0


def _known(row: str) -> str:
    if row != BASE:
        method_of(row)
    return row


class Judges(NamedTuple):
    """What pictures are measured with; `outside` sees Tiny World's alone, and needs its packages."""

    encoders: list[Encoder]
    lpips: Lpips | None
    outside: Features | None

    @classmethod
    def load(cls, settings: BenchmarkSettings, *, is_tiny: bool, device: torch.device) -> "Judges":
        """Load those that settings name, and say which are left out."""
        lpips, problem = find_lpips(settings.lpips_weights, device=device)
        if problem is not None:
            logger.info("LPIPS is left out: %s", problem)
        try:
            outside = load_outside_features() if is_tiny else None
        except ModuleNotFoundError as error:
            outside = None
            logger.info("the outside judge is left out: %s; it is of the extra evaluate", error)
        return cls([load_encoder(name, device=device) for name in settings.encoders], lpips, outside)


class Result(StrictModel):
    """What a run came to; `scores` is empty where it `diverged`, which says how.

    Of the base's own runs there are the scores of the photos, `real`, and the fingerprint of its weights.
    """

    method: Annotated[str, AfterValidator(_known)]
    subject: str
    seed: Count
    scores: dict[str, int | float]
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    parameters: Count | None = None
    bytes: Count | None = None
    steps: Count | None = None
    seconds: float | None = None
    diverged: str | None = None
    real: dict[str, int | float] | None = None
    base_fingerprint: str | None = None


def find_result(run: BenchmarkRun, root: Path) -> dict[str, Any] | None:
    """Return what a run came to, if it is done; a ValueError where its folder holds another's result."""
    file = run.folder(root) / RESULT_FILE
    if not file.is_file():
        return None
    result = read_result(file)
    asked = {"method": run.method, "subject": run.subject.name, "seed": run.seed}
    if wrong := {name: result[name] for name in asked if result[name] != asked[name]}:
        found = ", ".join(f"{name} {printable(value)}" for name, value in wrong.items())
        raise ValueError(f"{printable(file)} is of {found}; move it away, and the run is done again")
    return result


def read_result(file: Path) -> dict[str, Any]:
    """Return what a run of any row came to; a ValueError for a damaged file."""
    return read_json(file.read_bytes(), Result, printable(file)).model_dump(exclude_unset=True)


def training_config(run: BenchmarkRun, root: Path, settings: BenchmarkSettings) -> DreamBoothConfig:
    """Return the configuration of a run's training; a ValueError where the settings cannot be used."""
    subject, (method, options) = run.subject, method_of(run.method)
    asked = {**settings.training, **options}
    prior = asked.get("prior_preservation", "none")
    values: dict[str, Json] = {
        "learning_rate": settings.learning_rate(run.method),
        **asked,
        "pretrained_model_name_or_path": settings.base,
        "instance_data_dir": str(subject.photos),
        "output_dir": str(run.folder(root) / ADAPTER),
        "adapter": method,
        "seed": run.seed,
        "token": subject.identifier,
        "export_lora": False,
    }
    if asked.get("eval_steps") and "eval_prompt" not in asked:
        values["eval_prompt"] = list(subject.validation_prompts)
    if subject.class_name is not None:
        values["instance_prompt"] = subject.instance_prompt
        if prior == "class_images":
            values["class_data_dir"] = str(root / "class_images" / subject.class_name.replace(" ", "_"))
        if prior != "none":
            values["class_prompt"] = subject.class_prompt
    return DreamBoothConfig.from_flat(values)


TOGETHER = 8
"""So many adapters of a method are trained in one batch."""


def trained_together(
    runs: Sequence[BenchmarkRun], one: BenchmarkRun, settings: BenchmarkSettings
) -> list[BenchmarkRun]:
    """Return the runs that are trained together with one, and it: of its method and seed, on other subjects.

    They are the same whichever of them it is, so that those who share the work take whole groups.
    """
    method, own = (BASE, {}) if one.method == BASE else method_of(one.method)
    draws_class_images = {**settings.training, **own}.get("prior_preservation") == "class_images"
    number = 1 if method in (BASE, "full") or draws_class_images else TOGETHER
    alike = [run for run in runs if (run.method, run.seed) == (one.method, one.seed)]
    start = alike.index(one) // number * number
    return alike[start : start + number]


def _carry_out(
    runs: Sequence[BenchmarkRun], root: Path, settings: BenchmarkSettings, judges: Judges
) -> FolderInUseError | None:
    """Do runs that are trained together, going on where an earlier call was killed.

    Those that another process is at are left to it; if it is at all of them, that is returned. Where training
    diverged there are no scores, and the result says so.
    """
    with ExitStack() as held:
        ours, in_use = list[BenchmarkRun](), None
        for run in runs:
            try:
                for place in _places(run, root, settings):
                    held.enter_context(locked(place, patience=0))
                ours.append(run)
            except FolderInUseError as error:
                in_use = error
        ours = [run for run in ours if find_result(run, root) is None]
        diverged = _trained([run for run in ours if run.method != BASE], root, settings)
        for run in ours:
            result: dict[str, Json] = {"method": run.method, "subject": run.subject.name, "seed": run.seed}
            if run.method != BASE:
                result["learning_rate"] = settings.learning_rate(run.method)
            if run in diverged:
                result |= {"scores": {}, "diverged": diverged[run]}
            else:
                if run.method != BASE:
                    result |= _cost(run.folder(root) / ADAPTER)
                result |= _measure(run, root, settings, judges)
            if "diverged" in result:
                logger.warning("%s of %s: %s", run.method, run.subject.name, result["diverged"])
            text = json.dumps(result, indent=1, allow_nan=False)
            write_files(run.folder(root), {RESULT_FILE: f"{text}\n".encode()})
        for run in ours if not settings.keep_adapters else ():
            shutil.rmtree(run.folder(root) / ADAPTER, ignore_errors=True)
        return None if ours else in_use


def _places(run: BenchmarkRun, root: Path, settings: BenchmarkSettings) -> Iterator[Path]:
    """Make and give the folders where nobody else may write while a run is at work."""
    run.folder(root).mkdir(parents=True, exist_ok=True)
    yield run.folder(root)
    prior = None if run.method == BASE else training_config(run, root, settings).prior
    if prior is not None and prior.class_data_dir is not None:
        prior.class_data_dir.mkdir(parents=True, exist_ok=True)
        if len(read_class_images(prior).photos) < prior.num_class_images:
            yield prior.class_data_dir


def _trained(
    runs: Sequence[BenchmarkRun], root: Path, settings: BenchmarkSettings
) -> dict[BenchmarkRun, str]:
    """Train runs together; return why some of them diverged."""
    configs, diverged = {run: training_config(run, root, settings) for run in runs}, dict[BenchmarkRun, str]()
    code, alone = 0, list(runs)
    if len(runs) > 1:
        code, failed = train_groups([list(configs.values())], allow_changes=False, hub_token=None)
        alone = [run for run in runs if configs[run].output.output_dir in failed]  # which tells what failed
    for run in alone if not code else ():
        try:
            code = train_dreambooth(configs[run])
        except NonFiniteError as error:
            diverged[run] = str(error)
        if code:
            break
    if code:
        raise StoppedError(code, root)
    return diverged


def _cost(adapter: Path) -> dict[str, Json]:
    """Return what an adapter took: numbers trained, bytes of its files, and steps."""
    found = adapter.glob(f"**/{TENSORS_NAME}")
    files = [file for file in found if "checkpoint-" not in str(file.relative_to(adapter))]
    told = [json.loads(line) for line in (adapter / LOG_NAME).read_text(encoding="utf-8").splitlines()]
    return {
        "parameters": sum(tensor.numel() for file in files for tensor in load_file(file).values()),
        "bytes": sum(file.stat().st_size for file in files),
        "steps": sum("images_per_second" in line for line in told),
    }


def _measure(run: BenchmarkRun, root: Path, settings: BenchmarkSettings, judges: Judges) -> dict[str, Json]:
    """Draw a run's pictures, keep them, and return the mean of each score over those that show something.

    Where none does, it counts as diverged.
    """
    subject, (encoders, lpips, outside) = run.subject, judges
    prompts = [prompt for prompt in subject.prompts for _ in range(settings.num_images)]
    pipeline = _load_pipeline(run, root, settings)
    pictures = _draw(pipeline, prompts, run, settings)
    images = to_images(pictures)
    reference = PhotoReference.of(read_photos(subject.photos).usable, encoders)
    samples = [Sample(str(k), image, prompts[k], k) for k, image in enumerate(images)]
    usable = without_faults(samples).usable
    files = {f"{place:04d}.png": png_bytes(image) for place, image in enumerate(images)}
    replace_folder(run.folder(root) / PICTURES, files)
    if not usable:
        return {"scores": {}, "diverged": f"none of its {len(samples)} pictures shows anything"}
    scores: dict[str, Json] = {"num_pictures": len(usable), "num_empty": len(samples) - len(usable)}
    found = score_samples(reference, usable, encoders, lpips, identifier=subject.identifier)
    scores |= {column: each.mean for column, each in found.columns.items()}
    if subject.class_name is None:
        true = unseen_scenes(find_concept(subject.name))
        scenes = [scene for scene in true for _ in range(settings.num_images)]
        places = [int(sample.name) for sample in usable]
        scores |= score_against_truth(pictures.cpu(), scenes, places, outside=outside)
    if run.method == BASE:
        real = score_photos(reference, encoders, lpips).columns
        return {
            "scores": scores,
            REAL: {column: each.mean for column, each in real.items()},
            "base_fingerprint": fingerprint_of(pipeline.components[open_base(settings.base).denoiser]),
        }
    scores[DRIFT] = _drift(pipeline, run, root, settings, encoders[0])
    return {"scores": scores}


def _drift(
    pipeline: DiffusionPipeline, run: BenchmarkRun, root: Path, settings: BenchmarkSettings, encoder: Encoder
) -> float:
    """Return how far pictures without the subject are from the base's, which are drawn once for a seed."""
    prompts = list(other_tiny_prompts() if run.subject.class_name is None else OTHER_PROMPTS)
    kept = root / OTHERS / str(run.seed)
    kept.parent.mkdir(exist_ok=True)
    with locked(kept.parent, patience=FOREVER):  # all processes come to it at about the same time
        if not kept.is_dir():
            base = _load_pipeline(replace(run, method=BASE), root, settings)
            drawn = to_images(_draw(base, prompts, run, settings))
            replace_folder(kept, {f"{place:04d}.png": png_bytes(each) for place, each in enumerate(drawn)})
    of_base = [Image.open(file) for file in sorted(kept.iterdir())]
    drawn = to_images(_draw(pipeline, prompts, run, settings))
    ours, theirs = (encoder.embed_images(each) for each in (drawn, of_base))
    return float(relative_drift(ours, theirs, torch.arange(len(prompts))).mean())


def _load_pipeline(run: BenchmarkRun, root: Path, settings: BenchmarkSettings) -> DiffusionPipeline:
    """Load the base with a run's adapter."""
    base, device = open_base(settings.base), default_device()
    pipeline = base.load_unchecked_pipeline(default_dtype(device, base)).to(device)
    if run.method != BASE:
        attach_saved(pipeline, run.folder(root) / ADAPTER)
    return pipeline


def _draw(
    pipeline: DiffusionPipeline, prompts: list[str], run: BenchmarkRun, settings: BenchmarkSettings
) -> torch.Tensor:
    """Draw prompts: picture k is of seed k, whatever the method."""
    with decoded_again(pipeline.vae):
        pictures, _ = generate(
            pipeline,
            prompts,
            num_steps=settings.inference_steps,
            guidance_scale=open_base(settings.base).guidance_scale,
            seed=run.seed * SEEDS_APART,
            batch_size=settings.batch_size,
        )
    return pictures.nan_to_num(-1)


def do_all(
    runs: Sequence[BenchmarkRun],
    root: Path,
    settings: BenchmarkSettings,
    judges: Judges,
    *,
    num_processes: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Do all runs that are not done, in this process and in num_processes − 1 more.

    On a CPU, several processes have one thread each. Further ones, of the same command in another shell or
    on another machine with the same folder, take their share. A StoppedError says that a signal stopped a
    training; called again, it goes on.
    """
    helping = (list(runs), root, settings, os.getpid())
    spawn = multiprocessing.get_context("spawn").Process
    processes = [spawn(target=_help, args=helping, daemon=True) for _ in range(num_processes - 1)]
    with signals_held():  # which would interrupt the imports of helpers
        for process in processes:
            process.start()
    try:
        _work(runs, root, settings, judges, on_progress, [each.pid for each in processes], None)
    finally:
        for process in processes:
            process.join(timeout=_WAIT_SECONDS)
            process.terminate()
            process.join()


def _help(runs: Sequence[BenchmarkRun], root: Path, settings: BenchmarkSettings, parent: int) -> None:
    """Take runs in a process of its own, which ends quietly where it is stopped or cannot go on.

    What the user can mend stops the parent as well, which says it.
    """
    with suppress(KeyboardInterrupt, InterruptedRunError, ValueError, OSError):
        release_signals()
        is_tiny = runs[0].subject.class_name is None
        judges = Judges.load(settings, is_tiny=is_tiny, device=default_device())
        _work(runs, root, settings, judges, None, (), parent)


def _work(
    runs: Sequence[BenchmarkRun],
    root: Path,
    settings: BenchmarkSettings,
    judges: Judges,
    on_progress: Callable[[int, int], None] | None,
    helpers: Collection[int | None],
    parent: int | None,
) -> None:
    """Take runs until all are done, or `parent` was killed, whom this process helps.

    Nobody needs to be told that helpers are at what is left.
    """
    device, told = default_device(), parent is not None
    if (told or helpers) and device.type == "cpu":
        torch.set_num_threads(1)
    while left := [run for run in runs if find_result(run, root) is None]:
        for run in left:
            if parent not in (None, os.getppid()):
                return
            in_use = _carry_out(trained_together(runs, run, settings), root, settings, judges)
            if in_use is None:
                if on_progress is not None:
                    on_progress(sum(find_result(each, root) is not None for each in runs), len(runs))
                break
        else:
            assert in_use is not None
            if not told and (in_use.holder is None or in_use.holder.pid not in helpers):
                logger.warning("waiting for others, who are at what is left: %s", in_use.sentence)
                told = True
            time.sleep(_WAIT_SECONDS)
