"""A rehearsal: one real step and one image, then what the run would take; nothing is written."""

import logging
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator

from ether_diffusion.training.checks import CheckedRun
from ether_diffusion.training.config import control_of
from ether_diffusion.training.control import validation_controls
from ether_diffusion.training.measuring import Measuring
from ether_diffusion.training.phases import Phases
from ether_diffusion.training.result import metadata_of_run, result_files
from ether_diffusion.training.samples import Sampler
from ether_diffusion.training.setup import LoadedRun, load_run

logger = logging.getLogger(__name__)

TRAIN, DRAW, MEASURE = "one step", "one image", "one evaluation"


def run_dry(checked: CheckedRun, accelerator: Accelerator, check: Callable[[], None]) -> None:
    """Do one step and draw one image of the first prompt, and log what a whole run takes.

    Raises:
        ValueError: class images are missing, which a rehearsal does not draw.
    """
    if checked.num_missing:
        raise ValueError(
            f"{checked.num_missing} class images are missing in {checked.config.prior.class_data_dir}, and a "
            "dry run writes nothing; run without --dry_run, or fill the folder"
        )
    phases = Phases(accelerator.device)
    run = load_run(checked, accelerator, phases, check, num_steps=1)
    batches = run.source.batches(run.trainer.progress.samples(0, accelerator.process_index))
    with phases.measure(TRAIN):
        next(run.trainer.steps(batches))
    prompts = checked.config.validation.validation_prompt
    if prompts and accelerator.is_main_process:
        one = checked.config.validation.replace(validation_prompt=prompts[:1], num_validation_images=1)
        control = run.trainer.control
        sampler = Sampler(
            checked.base,
            one,
            checked.config.output.output_dir,
            0,
            checked.size,
            None if control is None else control.encoder,
            validation_controls(control_of(checked.config), checked.size),
        )
        with phases.measure(DRAW), accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            sampler.draw(run.unet, run.encode, check=check)
    if checked.evaluator is not None and accelerator.is_main_process:
        checked.evaluator.load(accelerator.device)
        measuring = Measuring(checked.evaluator, run, accelerator, check)
        with phases.measure(MEASURE):
            measuring.measure_base()
        logger.info("an evaluation draws %d pictures", measuring.num_pictures)
    if accelerator.is_main_process:
        for line in _summary(run, phases):
            logger.info("%s", line)


def _summary(run: LoadedRun, phases: Phases) -> Iterator[str]:
    config = run.checked.config
    progress = run.checked.progress(run.plan.num_samples)
    seconds = {phase.name: phase.seconds for phase in phases.found}
    yield "dry run: nothing was written"
    for part in run.trainer.parts:
        count = sum(parameter.numel() for parameter in part.parameters)
        method, rate = config.adapter.adapter, part.learning_rate
        yield f"trained: {method} on the {part.part}, {count:,} parameters, learning rate {rate:g}"
    control = run.trainer.control
    if control is not None:
        count = sum(parameter.numel() for parameter in control.parameters)
        yield (
            f"trained: the encoder of control images, {count:,} parameters, learning rate "
            f"{control.learning_rate:g}"
        )
    yield (
        f"steps: {progress.num_steps} of {progress.effective_batch} photos, "
        f"{progress.num_steps * progress.effective_batch / run.plan.num_samples:.1f} passes over them"
    )
    for phase in phases.found:
        yield f"{phase.name}: {phase.seconds:.1f} s, peak memory {phase.peak_bytes / 2**20:.0f} MiB"
    validation, per_epoch = config.validation, progress.steps_per_epoch(run.plan.num_samples)
    # before the first step, every so many steps and after the last; also the base, and the saved adapter
    drawn = -(-progress.num_steps // validation.steps_between(per_epoch)) + 3
    images = drawn * len(validation.validation_prompt) * validation.num_validation_images
    total = seconds[TRAIN] * progress.num_steps + seconds.get(DRAW, 0.0) * images
    included = f"{images} images"
    if config.evaluation.eval_steps:  # the base, every so many steps and the last
        evaluations = -(-progress.num_steps // config.evaluation.eval_steps) + 1
        cost = seconds.get(MEASURE, 0.0) * evaluations
        total, included = total + cost, f"{included} and {evaluations} evaluations ({cost / 60:.1f} minutes)"
    yield f"time: about {total / 60:.1f} minutes, at the pace of a first step, {included} included"
    size = sum(map(len, result_files(run.trainer, metadata_of_run(run)).values()))
    # weights and two moments a checkpoint; the weights again as the result
    disk = size * (3 * config.output.checkpoints_total_limit + 1)
    if config.evaluation.eval_steps:  # the best step's, in each checkpoint and as best/
        disk += size * (config.output.checkpoints_total_limit + 1)
    yield f"disk: {size / 2**20:.1f} MiB the adapter, {disk / 2**20:.1f} MiB with checkpoints; images beside"
