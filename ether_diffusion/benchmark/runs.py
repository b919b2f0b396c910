"""The runs of a benchmark: each trained, drawn, measured and kept as result.json, by several processes."""

import json
import logging
import math
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ether_diffusion.adapters.format import TENSORS_NAME
from ether_diffusion.bases import decoded_again, open_base
from ether_diffusion.benchmark.evaluation import read_photos
from ether_diffusion.benchmark.plan import BASE, BenchmarkRun, BenchmarkSettings
from ether_diffusion.durable_files import replace_folder, write_files
from ether_diffusion.metrics.encoders import Encoder, load_encoder
from ether_diffusion.metrics.lpips import Lpips, find_lpips
from ether_diffusion.metrics.scores import PhotoReference, Sample, find_fault, score_photos, score_samples
from ether_diffusion.pipelines.metadata import png_bytes
from ether_diffusion.pipelines.opening import default_device, default_dtype
from ether_diffusion.strict_json import Json, read_json
from ether_diffusion.tiny_world.concepts import find_concept
from ether_diffusion.tiny_world.pictures import generate, to_images
from ether_diffusion.tiny_world.recognition import score_against_truth
from ether_diffusion.tiny_world.subjects import unseen_scenes
from ether_diffusion.training.config import DreamBoothConfig
from ether_diffusion.training.loop import NonFiniteError
from ether_diffusion.training.methods import attach_saved
from ether_diffusion.training.prior import count_missing
from ether_diffusion.training.run import train_dreambooth
from ether_diffusion.training.run_folder import LOG_NAME
from ether_diffusion.training.run_lock import FolderInUseError, locked
from ether_diffusion.wording import printable

logger = logging.getLogger(__name__)

RESULT_FILE = "result.json"
PICTURES, ADAPTER = "pictures", "adapter"
WAIT_SECONDS = 1.0
REAL = "real"


def find_result(run: BenchmarkRun, root: Path) -> dict[str, Any] | None:
    """Return what a run came to, if it is done."""
    file = run.folder(root) / RESULT_FILE
    if not file.is_file():
        return None
    return read_json(file.read_bytes(), dict[str, Any], printable(file))


def carry_out(
    run: BenchmarkRun,
    root: Path,
    settings: BenchmarkSettings,
    encoders: list[Encoder],
    lpips: Lpips | None,
) -> FolderInUseError | None:
    """Do a run, going on where an earlier call was killed; where another process is at it, return that.

    Where training diverged there are no scores, and the result says so.

    Raises:
        ValueError: the settings cannot be used.
        InterruptedError: a signal stopped the training.
    """
    folder = run.folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        for place in _places(run, root, settings):
            try:
                held.enter_context(locked(place, patience=0))
            except FolderInUseError as in_use:
                return in_use
        if find_result(run, root) is None:
            result = _train_and_measure(run, root, settings, encoders, lpips)
            text = json.dumps(result, indent=1, allow_nan=False)
            write_files(folder, {RESULT_FILE: f"{text}\n".encode()})
        if not settings.keep_adapters:
            shutil.rmtree(folder / ADAPTER, ignore_errors=True)
    return None


def _train_and_measure(
    run: BenchmarkRun,
    root: Path,
    settings: BenchmarkSettings,
    encoders: list[Encoder],
    lpips: Lpips | None,
) -> dict[str, Json]:
    result: dict[str, Json] = {"method": run.method, "subject": run.subject.name, "seed": run.seed}
    adapter = None
    if run.method != BASE:
        adapter = run.folder(root) / ADAPTER
        config = training_config(run, root, settings)
        result["learning_rate"] = config.learning_rate
        try:
            if train_dreambooth(config) != 0:
                raise InterruptedError(f"training was stopped; the same command goes on in {root}")
        except NonFiniteError as error:
            logger.warning("%s of %s: %s", run.method, run.subject.name, error)
            return {**result, "scores": {}, "diverged": str(error)}
        result |= _cost(adapter, config.optimization.train_batch_size)
    pictures = _draw(run, settings, adapter)
    reference = PhotoReference.of(read_photos(run.subject.photos).usable, encoders)
    result["scores"] = _measure(run, settings, pictures, reference, encoders, lpips)
    if run.method == BASE:
        real = score_photos(reference, encoders, lpips).columns
        result[REAL] = {column: found.mean for column, found in real.items()}
    files = {f"{number:04d}.png": png_bytes(image) for number, image in enumerate(to_images(pictures))}
    replace_folder(run.folder(root) / PICTURES, files)
    return result


def training_config(run: BenchmarkRun, root: Path, settings: BenchmarkSettings) -> DreamBoothConfig:
    """Return the configuration of a run's training.

    Raises:
        ValueError: the settings cannot be used.
    """
    subject = run.subject
    values: dict[str, Json] = {
        **settings.training,
        "pretrained_model_name_or_path": settings.base,
        "instance_data_dir": str(subject.photos),
        "output_dir": str(run.folder(root) / ADAPTER),
        "adapter": run.method,
        "learning_rate": settings.learning_rate(run.method),  # type: ignore[arg-type]  # checked before
        "seed": run.seed,
        "token": subject.identifier,
        "export_lora": False,
    }
    if subject.instance_prompt is not None:
        values["instance_prompt"] = subject.instance_prompt
        if settings.training.get("prior_preservation") == "class_images":
            place = root / "class_images" / str(subject.class_name).replace(" ", "_")
            values["class_data_dir"] = str(place)
        if settings.training.get("prior_preservation", "none") != "none":
            values["class_prompt"] = subject.class_prompt
    return DreamBoothConfig.from_flat(values)


def _places(run: BenchmarkRun, root: Path, settings: BenchmarkSettings) -> Iterator[Path]:
    """Return the folders that nobody else may write to meanwhile: the run's, and that of its class images."""
    yield run.folder(root)
    if run.method == BASE:
        return
    prior = training_config(run, root, settings).prior
    if prior.class_data_dir is None:
        return
    prior.class_data_dir.mkdir(parents=True, exist_ok=True)
    if count_missing(prior.class_data_dir, prior.num_class_images):
        yield prior.class_data_dir


def _cost(adapter: Path, batch_size: int) -> dict[str, Json]:
    """Return what an adapter took: numbers trained, bytes of its files, seconds of its steps.

    The log knows how fast each step was, so an interruption counts nothing.
    """
    parameters, size = 0, 0
    for file in sorted(adapter.glob(f"**/{TENSORS_NAME}")):
        if not any(part.startswith("checkpoint-") for part in file.relative_to(adapter).parts):
            size += file.stat().st_size
            with safe_open(file, framework="pt") as tensors:
                parameters += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
    lines = [json.loads(line) for line in (adapter / LOG_NAME).read_text(encoding="utf-8").splitlines()]
    seconds = sum(batch_size / line["images_per_second"] for line in lines)
    return {"parameters": parameters, "bytes": size, "seconds": round(seconds, 3)}


def _draw(run: BenchmarkRun, settings: BenchmarkSettings, adapter: Path | None) -> torch.Tensor:
    """Draw the subject's prompts, each as often as asked: picture k is of seed k, whatever the method."""
    base = open_base(settings.base)
    device = default_device()
    pipeline = base.load_unchecked_pipeline(default_dtype(device)).to(device)
    if adapter is not None:
        attach_saved(pipeline, adapter)
    with decoded_again(pipeline.vae):
        pictures, _ = generate(
            pipeline,
            _prompts(run, settings),
            num_steps=settings.num_inference_steps,
            guidance_scale=base.guidance_scale,
            seed=run.seed * 1_000_000,
            batch_size=settings.batch_size,
        )
    return pictures.nan_to_num(-1)


def _prompts(run: BenchmarkRun, settings: BenchmarkSettings) -> list[str]:
    return [prompt for prompt in run.subject.prompts for _ in range(settings.num_images)]


def _measure(
    run: BenchmarkRun,
    settings: BenchmarkSettings,
    pictures: torch.Tensor,
    reference: PhotoReference,
    encoders: Sequence[Encoder],
    lpips: Lpips | None,
) -> dict[str, Json]:
    """Return the mean of each score over the pictures that show something, and how many do not."""
    prompts = _prompts(run, settings)
    samples = [
        Sample(str(number), image, prompt, number)
        for number, (image, prompt) in enumerate(zip(to_images(pictures), prompts, strict=True))
    ]
    usable = [sample for sample in samples if find_fault(sample.image) is None]
    scores: dict[str, Json] = {"num_pictures": len(usable), "num_empty": len(samples) - len(usable)}
    if usable:
        found = score_samples(reference, usable, encoders, lpips, identifier=run.subject.identifier)
        scores |= {column: each.mean for column, each in found.columns.items()}
    if run.subject.class_name is None:
        concept = find_concept(run.subject.name)
        scenes = [scene for scene in unseen_scenes(concept) for _ in range(settings.num_images)]
        scores |= score_against_truth(pictures.cpu(), scenes, [int(sample.name) for sample in usable])
    return scores


def do_all(
    runs: Sequence[BenchmarkRun],
    root: Path,
    settings: BenchmarkSettings,
    *,
    num_processes: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Do all runs that are not done, in this process and in num_processes − 1 more.

    On a CPU, several processes have one thread each. Further ones, of the same command in another shell or
    on another machine with the same folder, take their share.

    Raises:
        ValueError, OSError: a run cannot be done.
        InterruptedError: a signal stopped a training; called again, it goes on.
    """
    context = multiprocessing.get_context("spawn")
    if num_processes > 1 and default_device().type == "cpu":
        torch.set_num_threads(1)
    helpers = [
        context.Process(target=_help, args=(list(runs), root, settings, os.getpid()), daemon=True)
        for _ in range(num_processes - 1)
    ]
    for helper in helpers:
        helper.start()
    try:
        own = {helper.pid for helper in helpers}
        _work(runs, root, settings, on_progress=on_progress, own=own)
    finally:
        for helper in helpers:
            helper.join(timeout=WAIT_SECONDS)
            helper.terminate()
            helper.join()


def _help(runs: list[BenchmarkRun], root: Path, settings: BenchmarkSettings, parent: int) -> None:
    if default_device().type == "cpu":
        torch.set_num_threads(1)
    # when the main process was killed, nobody waits for this one
    _work(runs, root, settings, go_on=lambda: os.getppid() == parent)


def _work(
    runs: Sequence[BenchmarkRun],
    root: Path,
    settings: BenchmarkSettings,
    *,
    go_on: Callable[[], bool] = lambda: True,
    on_progress: Callable[[int, int], None] | None = None,
    own: Collection[int | None] | None = None,
) -> None:
    """Take runs until all are done; `own` are the helpers, whom nobody needs to be told of."""
    device = default_device()
    encoders = [load_encoder(name, device=device) for name in settings.encoders]
    lpips, problem = find_lpips(settings.lpips_weights, device=device)
    if problem is not None:
        logger.info("LPIPS is left out: %s", problem)
    while go_on():
        left = [run for run in runs if find_result(run, root) is None]
        if not left:
            return
        for run in left:
            if not go_on():
                return
            in_use = carry_out(run, root, settings, encoders, lpips)
            if in_use is None:
                if on_progress is not None:
                    on_progress(sum(find_result(each, root) is not None for each in runs), len(runs))
                break
        else:
            assert in_use is not None
            if own is not None and (in_use.holder is None or in_use.holder.pid not in own):
                logger.warning("waiting for others, who are at what is left: %s", in_use.sentence)
                own = None
            time.sleep(WAIT_SECONDS)
