"""A training run from its configuration to its result folder, going on where an earlier call stopped."""

import hashlib
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import diffusers
import transformers
from torch import Tensor
from tqdm.auto import tqdm

from ether_diffusion.adapters.format import TENSORS_NAME
from ether_diffusion.adapters.models import base_fingerprint
from ether_diffusion.adapters.tensor_file import PEFT_PREFIX
from ether_diffusion.console import Unbroken
from ether_diffusion.durable_files import delete
from ether_diffusion.strict_json import Json
from ether_diffusion.training.accelerator import (
    do_on_main,
    from_main,
    make_accelerator,
    stop_all_if_any,
    track,
    track_images,
    tracked,
)
from ether_diffusion.training.checkpoint import (
    Checkpoint,
    named_checkpoint,
    newer_checkpoints,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from ether_diffusion.training.config import DreamBoothConfig
from ether_diffusion.training.config.files import write_config_file
from ether_diffusion.training.control import CONTROL_FILES, restore_control
from ether_diffusion.training.evaluation import Evaluations
from ether_diffusion.training.interrupts import InterruptedRunError, Interrupts, StoppedAtOnceError
from ether_diffusion.training.loop import STATE_FILES, NonFiniteError, StepReport, averaged
from ether_diffusion.training.methods import TrainedPart, adapter_tensors, restore_adapter
from ether_diffusion.training.resources import MIB, Phases, check_space, shortages_explained
from ether_diffusion.training.result import (
    load_saved,
    metadata_of_run,
    open_repository,
    result_files,
    upload,
    write_adapters,
    write_card,
    write_export,
)
from ether_diffusion.training.run_folder import RunFolder
from ether_diffusion.training.setup import CheckedRun, LoadedRun, check_run, draw_class_images, load_run
from ether_diffusion.training.validation import Validation

logger = logging.getLogger(__name__)

CONFIG_NAME = "training_config.yaml"


def train_dreambooth(
    config: DreamBoothConfig,
    *,
    allow_changes: bool = False,
    dry_run: bool = False,
    hub_token: str | None = None,
) -> int:
    """Train an adapter and write it; return the exit code: 0, or 130 or 143 where a signal stopped it.

    A run that was stopped or killed goes on where it was, to the same bytes. `allow_changes` lets it go on
    with other settings or photos; `dry_run` does one step and one image and writes nothing.

    Raises:
        ValueError: something cannot be used, or training cannot go on; the message says what to do.
        OSError: a file cannot be read or written.
    """
    config = config.resolved()
    output = config.output
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()  # the run shows its own
    accelerator = make_accelerator(
        config.compute,
        report_to=output.report_to,
        folder=str(output.output_dir),
        logging_dir=output.logging_dir,
    )
    checked = check_run(config, accelerator)
    with Interrupts() as interrupts, shortages_explained(output.output_dir):
        try:
            if dry_run:
                _rehearse(checked, interrupts)
            else:
                _run(checked, interrupts, allow_changes=allow_changes, hub_token=hub_token)
        except InterruptedRunError as stop:
            logger.warning("%s; the same command goes on from here", stop)
            return stop.exit_code
    return 0


def _run(checked: CheckedRun, interrupts: Interrupts, *, allow_changes: bool, hub_token: str | None) -> None:
    config, accelerator, path = checked.config, checked.accelerator, checked.config.output.output_dir
    settings = config.flat() | {"num_processes": accelerator.num_processes}
    folder = RunFolder(path, settings, {"data": checked.training.fingerprint}, allow_changes=allow_changes)
    wanted = config.output.resume_from_checkpoint
    named_checkpoint(path, wanted)  # refused before anything is written
    with ExitStack() as held:

        def begin() -> None:
            if checked.evaluator is not None:
                checked.evaluator.load(accelerator.device)
            held.enter_context(folder)
            write_config_file(path / CONFIG_NAME, config)
            if config.output.push_to_hub:  # refused now rather than after hours
                open_repository(config.output, hub_token)
            draw_class_images(checked, interrupts.check)

        do_on_main(accelerator, begin)
        phases = Phases(accelerator.device)
        session = Session(load_run(checked, interrupts.check, phases), interrupts, folder)
        checkpoint = named_checkpoint(path, wanted) or newest_checkpoint(path)
        if checkpoint is None and wanted is not None:
            logger.warning("%s holds no checkpoint yet; the run begins with the first step", path)
        session.restore(checkpoint, allow_changes=allow_changes)
        with tracked(accelerator, config), phases.measure("train"):
            session.train()
        with phases.measure("write the result"):
            do_on_main(accelerator, lambda: session.finish(hub_token))
        for phase in phases.found if accelerator.is_main_process else ():
            logger.info("%s", phase)
    accelerator.end_training()


class Session:
    """A loaded run in a process: it goes on from a checkpoint, trains, saves, draws, and writes the result.

    What it writes, the main process writes.
    """

    def __init__(self, run: LoadedRun, interrupts: Interrupts, folder: RunFolder) -> None:
        self.run, self.interrupts, self.folder = run, interrupts, folder
        self.config, self.trainer, self.accelerator = run.config, run.trainer, run.checked.accelerator
        self.saved_step: int | None = None
        self.validation = Validation(run, folder.path, interrupts.check)
        self.evaluations: Evaluations | None = None
        if run.checked.evaluator is not None:
            self.evaluations = Evaluations(run, folder, interrupts.check)

    def restore(self, checkpoint: Checkpoint | None, *, allow_changes: bool) -> None:
        """Go on from a checkpoint, if there is one.

        Raises:
            ValueError: it was made on other base weights or other class images, or is of another form.
        """
        trainer = self.trainer
        if checkpoint is not None:
            state = checkpoint.state()
            _compare_marks(state, _marks_of(self.run), allow_changes=allow_changes)
            for part in trainer.parts:
                restore_adapter(part.model, _stored_tensors(part, checkpoint))
            if trainer.control is not None:
                if not all(map(checkpoint.has, CONTROL_FILES)):
                    raise ValueError(
                        f"{checkpoint.folder} holds no control encoder; give another --output_dir"
                    )
                restore_control(trainer.control, checkpoint.folder)
            files = [name for name in STATE_FILES if checkpoint.has(name)]
            trainer.load_state({name: checkpoint.tensors(name) for name in files}, state)
            self.saved_step = checkpoint.step
            logger.info("going on from step %d of %s", checkpoint.step, checkpoint.folder)
        if self.accelerator.is_main_process:
            for newer in newer_checkpoints(self.folder.path, trainer.step):
                logger.warning("%s is later than where this run goes on from; it is deleted", newer)
                delete(newer)
            # a process that was killed right after a save has left them
            prune_checkpoints(self.folder.path, trainer.step, self.config.output.checkpoints_total_limit)
            self.folder.rewind(trainer.step)
            self.validation.forget(trainer.step)
            if self.evaluations is not None:
                self.evaluations.restore(checkpoint)

    def train(self) -> None:
        """Do all updates that are left; checkpoints, images and evaluations as often as configured.

        Where that was asked for, it ends once the run is good.

        Raises:
            InterruptedRunError: a signal came; what was learned is saved.
        """
        trainer = self.trainer
        do_on_main(self.accelerator, self._check_space)
        samples = trainer.progress.samples(trainer.step, self.accelerator.process_index)
        last = trainer.progress.num_steps
        bar = tqdm(
            total=last,
            initial=trainer.step,
            desc="training",
            unit="step",
            file=Unbroken(sys.stderr),  # nobody may be reading, and the run goes on
            disable=not self.accelerator.is_main_process,
        )
        try:
            is_good = self._look()
            began = time.monotonic()
            for report in () if is_good else trainer.steps(self.run.source.batches(samples)):
                self._report(report, bar, time.monotonic() - began)
                if report.step % self.config.output.checkpointing_steps == 0 or report.step == last:
                    self.save()
                stop_all_if_any(self.accelerator, self.interrupts.signal_number)
                if self._look():
                    self.save()
                    break
                began = time.monotonic()
        except StoppedAtOnceError:
            raise
        except (InterruptedRunError, NonFiniteError):
            self.save()
            raise
        finally:
            bar.close()

    def _check_space(self) -> None:
        size = sum(map(len, result_files(self.trainer, metadata_of_run(self.run)).values()))
        # weights and two moments, the average if there is one, and the result; the best there and as best/
        num_copies = 4 + (self.trainer.average is not None) + 2 * (self.evaluations is not None)
        check_space(self.folder.path, num_copies * size)

    def _look(self) -> bool:
        """Draw and measure what this step shows; say, in all processes, whether the run is to end here."""
        step, progress, evaluations = self.trainer.step, self.trainer.progress, self.evaluations
        apart = self.config.validation.steps_between(progress.steps_per_epoch(self.run.plan.num_samples))
        if self.validation.prompts and (step % apart == 0 or step == progress.num_steps):
            do_on_main(self.accelerator, self._validate)
        if evaluations is None or not evaluations.is_due(step):
            return False
        do_on_main(self.accelerator, evaluations.evaluate)
        stop = from_main(self.accelerator, evaluations.stop)
        if stop is not None:
            logger.info("the run is finished at step %d: %s", stop.step, stop.reason)
        return stop is not None

    def _validate(self) -> None:
        rows = self.validation.draw_step(self.trainer.step)
        if rows is not None:
            track_images(self.accelerator, rows, self.trainer.step)

    def _report(self, report: StepReport, bar: "tqdm[None]", seconds: float) -> None:
        if not self.accelerator.is_main_process:
            return
        rate = self.trainer.progress.effective_batch / max(seconds, 1e-9)
        numbers = {
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "learning_rate": report.learning_rate,
        }
        # an overflow that float16's scaler passes over is no number of JSON
        logged = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self.folder.log({"step": report.step, **logged, "images_per_second": round(rate, 3)})
        track(self.accelerator, numbers, report.step)
        bar.set_postfix_str(f"loss {report.loss:.4f}, {rate:.1f} images/s", refresh=False)
        bar.update()

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one."""
        step = self.trainer.step
        if self.saved_step != step and step > 0:
            do_on_main(self.accelerator, self._write_checkpoint)
        self.saved_step = step

    def _write_checkpoint(self) -> None:
        tensors, state = self.trainer.state()
        files = result_files(self.trainer, metadata_of_run(self.run))
        if self.evaluations is not None:
            files |= self.evaluations.files_of_checkpoint()
        self.folder.sync()
        save_checkpoint(
            self.folder.path,
            self.trainer.step,
            adapter_files=files,
            tensors=tensors,
            state=state | _marks_of(self.run),
            num_kept=self.config.output.checkpoints_total_limit,
        )

    def finish(self, hub_token: str | None) -> None:
        """Write the result folder; the last images are drawn from the files that were written."""
        path: Path = self.folder.path
        best = None if self.evaluations is None else self.evaluations.result
        with averaged(self.trainer):
            files = best or result_files(self.trainer, metadata_of_run(self.run))
        write_adapters(path, files)
        if self.config.output.export_lora:
            write_export(path, self.run)
        load_saved(path, self.run)
        pictures = self.validation.draw_final()
        step, told = self.trainer.step, []
        if self.evaluations is not None:
            step, told = self.evaluations.result_step, self.evaluations.told()
        write_card(path, self.run, pictures, step, told)
        logger.info("the adapter of step %d is in %s", step, path)
        if self.config.output.push_to_hub:
            logger.info("uploaded to %s", upload(path, self.config.output, hub_token))


def _marks_of(run: LoadedRun) -> dict[str, Json]:
    """Return what a checkpoint is only good for: the base's weights, and all that is trained on."""
    adapted = [name for name, module in run.unet.named_modules() if hasattr(module, "base_layer")]
    found = base_fingerprint(run.unet, adapted or ["conv_in"])  # of encoder-only, what it is added after
    data = json.dumps(run.plan.fingerprint, sort_keys=True).encode()
    return {
        "weights_of_the_base": None if found is None else found.id,
        "photos_or_class_images": hashlib.sha256(data).hexdigest(),
    }


def _compare_marks(state: Mapping[str, Json], marks: Mapping[str, Json], *, allow_changes: bool) -> None:
    for name, found in marks.items():
        if state.get(name) == found:
            continue
        sentence = f"the {name.replace('_', ' ')} changed since the checkpoint was written"
        if not allow_changes:
            raise ValueError(f"{sentence}; give --allow_changes to go on, or another --output_dir")
        logger.warning("%s; the run goes on with what is there now", sentence)


def _stored_tensors(part: TrainedPart, checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    """Return an adapter's tensors, which are those that the part trains now."""
    name = f"{part.prefix}{TENSORS_NAME}"
    now = {key: tensor.shape for key, tensor in adapter_tensors(part.model).items()}
    found = checkpoint.tensors(name) if checkpoint.has(name) else {}
    if {key.removeprefix(PEFT_PREFIX): tensor.shape for key, tensor in found.items()} != now:
        raise ValueError(
            f"{checkpoint.folder} holds no adapter of this form for the {part.part}; give another "
            "--output_dir, or the adapter settings and the base that it was made with"
        )
    return found


TRAIN, DRAW, MEASURE = "one step", "one image", "one evaluation"


def _rehearse(checked: CheckedRun, interrupts: Interrupts) -> None:
    """Do one step and draw one image of the first prompt, and log what a whole run takes; write nothing."""
    config, accelerator, check = checked.config, checked.accelerator, interrupts.check
    if checked.num_missing:
        raise ValueError(
            f"{checked.num_missing} class images are missing in {config.prior.class_data_dir}, and a dry run "
            "writes nothing; run without --dry_run, or fill the folder"
        )
    phases = Phases(accelerator.device)
    run = load_run(checked, check, phases, num_steps=1)
    batches = run.source.batches(run.trainer.progress.samples(0, accelerator.process_index))
    with phases.measure(TRAIN):
        next(run.trainer.steps(batches))
    if not accelerator.is_main_process:
        return
    folder = RunFolder(config.output.output_dir, {}, {}, allow_changes=False)  # never entered
    validation = Validation(run, folder.path, check)
    if validation.prompts:
        validation.prompts, validation.seeds = validation.prompts[:1], range(1)
        with phases.measure(DRAW):
            validation.draw()
    if checked.evaluator is not None:
        checked.evaluator.load(accelerator.device)
        evaluations = Evaluations(run, folder, check)
        with phases.measure(MEASURE):
            evaluations.measure_base()
        logger.info("an evaluation draws %d pictures", evaluations.num_pictures)
    for line in _summary(run, phases):
        logger.info("%s", line)


def _summary(run: LoadedRun, phases: Phases) -> Iterator[str]:
    config, trainer = run.config, run.trainer
    progress = run.checked.progress(run.plan.num_samples)
    seconds = {phase.name: phase.seconds for phase in phases.found}
    yield "dry run: nothing was written"
    method = config.adapter.adapter
    trained = [
        (f"{method} on the {each.part}", each.parameters, each.learning_rate) for each in trainer.parts
    ]
    if (control := trainer.control) is not None:
        trained.append(("the encoder of control images", control.parameters, control.learning_rate))
    for what, parameters, rate in trained:
        count = sum(parameter.numel() for parameter in parameters)
        yield f"trained: {what}, {count:,} parameters, learning rate {rate:g}"
    num_photos = progress.num_steps * progress.effective_batch
    yield (
        f"steps: {progress.num_steps} of {progress.effective_batch} photos, "
        f"{num_photos / run.plan.num_samples:.1f} passes over them"
    )
    yield from map(str, phases.found)
    validation, per_epoch = config.validation, progress.steps_per_epoch(run.plan.num_samples)
    # before the first step, every so many steps and after the last; also the base, and the saved adapter
    drawn = -(-progress.num_steps // validation.steps_between(per_epoch)) + 3
    images = drawn * len(validation.validation_prompt) * validation.num_validation_images
    total = seconds[TRAIN] * progress.num_steps + seconds.get(DRAW, 0.0) * images
    included, num_kept = f"{images} images", config.output.checkpoints_total_limit
    # weights and two moments a checkpoint; the weights again as the result
    num_copies = 3 * num_kept + 1
    if config.evaluation.eval_steps:  # the base, every so many steps and the last
        evaluations = -(-progress.num_steps // config.evaluation.eval_steps) + 1
        cost = seconds.get(MEASURE, 0.0) * evaluations
        total, included = total + cost, f"{included} and {evaluations} evaluations ({cost / 60:.1f} minutes)"
        num_copies += num_kept + 1  # the best step's, in each checkpoint and as best/
    yield f"time: about {total / 60:.1f} minutes, at the pace of a first step, {included} included"
    size = sum(map(len, result_files(trainer, metadata_of_run(run)).values())) / MIB
    yield f"disk: {size:.1f} MiB the adapter, {num_copies * size:.1f} MiB with checkpoints; images beside"
