"""A training run from its configuration to its result folder, going on where an earlier call stopped."""

import errno
import hashlib
import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import diffusers
import transformers
from tqdm.auto import tqdm

from ether_diffusion.adapters.format import TENSORS_NAME
from ether_diffusion.adapters.models import base_fingerprint
from ether_diffusion.adapters.tensor_file import PEFT_PREFIX
from ether_diffusion.console import Unbroken, ran_short
from ether_diffusion.metrics.encoders import Encoder
from ether_diffusion.strict_json import Json
from ether_diffusion.training import checkpoint as checkpoints
from ether_diffusion.training import processes, result
from ether_diffusion.training.checkpoint import Checkpoint
from ether_diffusion.training.config import DreamBoothConfig, control_of
from ether_diffusion.training.config.files import write_config_file
from ether_diffusion.training.evaluation import Evaluations
from ether_diffusion.training.loop import STATE_FILES, NonFiniteError, StepReport, Work, alone, averaged
from ether_diffusion.training.methods import adapter_tensors, restore_adapter
from ether_diffusion.training.prior import draw_class_images
from ether_diffusion.training.run_folder import RunFolder
from ether_diffusion.training.setup import MIB, Run, check_run, load_run
from ether_diffusion.training.validation import Validation
from ether_diffusion.wording import printable

logger = logging.getLogger(__name__)

CONFIG_NAME = "training_config.yaml"
TRAIN, DRAW, MEASURE = "one step", "one image", "one evaluation"


def train_dreambooth(
    config: DreamBoothConfig,
    *,
    allow_changes: bool = False,
    dry_run: bool = False,
    hub_token: str | None = None,
) -> int:
    """Train an adapter and write it; return the exit code: 0, or 130 or 143 where a signal stopped it.

    A run that was stopped or killed goes on where it was, to the same bytes. `allow_changes` lets it go on
    with other settings or photos; `dry_run` does one step and one image and writes nothing. A ValueError or
    an OSError says what cannot be used, or why training cannot go on, and what to do.
    """
    config = config.resolved()
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()  # the run shows its own
    run = check_run(config, processes.make_accelerator(config.compute, config.output))
    with processes.Interrupts() as interrupts, shortages_explained(config.output.output_dir):
        run.check = interrupts.check
        try:
            if dry_run:
                _rehearse(run)
            else:
                _train(run, interrupts, allow_changes=allow_changes, hub_token=hub_token)
        except processes.InterruptedRunError as stop:
            logger.warning("%s; the same command goes on from here", stop)
            return stop.exit_code
    return 0


@contextmanager
def shortages_explained(folder: Path) -> Iterator[None]:
    """Turn a lack of memory, or of space in a run's folder, into a ValueError on what to do."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        code = error.errno if isinstance(error, OSError) else None
        if code == errno.ENOMEM or ran_short(error):
            text = str(error).splitlines()[0][:200] if str(error) else "MemoryError"
            raise ValueError(
                f"memory ran out ({text}); the last checkpoint is kept. Try --gradient_checkpointing, "
                "--mixed_precision bf16, a lower --resolution, or a smaller --train_batch_size with more "
                "--gradient_accumulation_steps, and --allow_changes to go on; --dry_run shows what it takes"
            ) from error
        if not isinstance(error, OSError) or code not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(folder).free / MIB
        raise ValueError(
            f"{error.strerror}, with {free:.1f} MiB free in {printable(folder)}; the "
            "checkpoints in it are whole: free some space, and the same command goes on from the newest"
        ) from error


def _train(run: Run, interrupts: processes.Interrupts, *, allow_changes: bool, hub_token: str | None) -> None:
    accelerator = run.accelerator
    with ExitStack() as held:
        folder = begin(run, held, {}, allow_changes=allow_changes, hub_token=hub_token)
        load_run(run)
        session = Session(run, interrupts, folder)
        session.restore(allow_changes=allow_changes)
        with run.phases.measure("train"):
            alone(session.train())
        with run.phases.measure("write the result"):
            processes.do_on_main(accelerator, lambda: session.finish(hub_token))
        for line in run.phases.lines if accelerator.is_main_process else ():
            logger.info("%s", line)
    accelerator.end_training()


def begin(
    run: Run, held: ExitStack, encoders: dict[str, Encoder], *, allow_changes: bool, hub_token: str | None
) -> RunFolder:
    """Enter the run's folder, and make what is to be there before anything is loaded.

    encoders are those that measure, by name; of several runs each is loaded once.
    """
    config, path, num_processes = run.config, run.config.output.output_dir, run.accelerator.num_processes
    settings = config.flat() | {"num_processes": num_processes}
    folder = RunFolder(path, settings, {"data": run.training.fingerprint}, allow_changes=allow_changes)
    wanted = config.output.resume_from_checkpoint
    checkpoints.named_checkpoint(path, wanted)  # refused before anything is written

    def prepare() -> None:
        if run.evaluator is not None:
            run.evaluator.load(run.accelerator.device, encoders)
        held.enter_context(folder)
        write_config_file(path / CONFIG_NAME, config)
        if config.output.push_to_hub:  # refused now rather than after hours
            result.open_repository(config.output, hub_token)
        draw_class_images(run, without=config.folders)

    processes.do_on_main(run.accelerator, prepare)
    return folder


class Session:
    """A loaded run in a process: it goes on from a checkpoint, trains, saves, draws, and writes the result.

    What it writes, the main process writes. One of several shows no bar of its own.
    """

    def __init__(
        self, run: Run, interrupts: processes.Interrupts, folder: RunFolder, *, has_bar: bool = True
    ) -> None:
        self.run, self.interrupts, self.folder = run, interrupts, folder
        self.config, self.trainer, self.accelerator = run.config, run.trainer, run.accelerator
        self.has_bar = has_bar and self.accelerator.is_main_process
        self.saved_step: int | None = None
        self.validation = Validation(run)
        self.evaluations = None if run.evaluator is None else Evaluations(run, folder)

    def restore(self, *, allow_changes: bool) -> None:
        """Go on from the checkpoint that was asked for or the newest, if there is one.

        A ValueError says that it was made on other base weights or class images, or is of another form.
        """
        path, wanted = self.folder.path, self.config.output.resume_from_checkpoint
        checkpoint = checkpoints.named_checkpoint(path, wanted) or checkpoints.newest_checkpoint(path)
        if checkpoint is not None:
            self._load(checkpoint, allow_changes=allow_changes)
            logger.info("going on from step %d of %s", checkpoint.step, checkpoint.folder)
        elif wanted is not None:
            logger.warning("%s holds no checkpoint yet; the run begins with the first step", path)
        if self.accelerator.is_main_process:
            step = self.trainer.step
            checkpoints.forget_checkpoints_after(path, step)
            # a process that was killed right after a save has left older ones
            checkpoints.prune_checkpoints(path, step, self.config.output.checkpoints_total_limit)
            self.folder.rewind(step)
            self.validation.forget(step)
            if self.evaluations is not None:
                self.evaluations.restore(checkpoint)

    def _load(self, checkpoint: Checkpoint, *, allow_changes: bool) -> None:
        state, trainer = checkpoint.state(), self.trainer
        for name, found in self._marks().items():
            if state.get(name) != found:
                sentence = f"the {name.replace('_', ' ')} changed since the checkpoint was written"
                if not allow_changes:
                    raise ValueError(f"{sentence}; give --allow_changes to go on, or another --output_dir")
                logger.warning("%s; the run goes on with what is there now", sentence)
        for part in trainer.parts:
            tensors = checkpoint.tensors(f"{part.prefix}{TENSORS_NAME}")
            shapes = {key.removeprefix(PEFT_PREFIX): tensor.shape for key, tensor in tensors.items()}
            if shapes != {key: tensor.shape for key, tensor in adapter_tensors(part.model).items()}:
                raise ValueError(
                    f"{checkpoint.folder} holds no adapter of this form for the {part.part}; give another "
                    "--output_dir, or the adapter settings and the base that it was made with"
                )
            restore_adapter(part.model, tensors)
        if trainer.control is not None:
            if not checkpoint.names.issuperset(result.CONTROL_FILES):
                raise ValueError(f"{checkpoint.folder} holds no control encoder; give another --output_dir")
            result.restore_control(trainer.control, checkpoint.folder)
        files = checkpoint.names.intersection(STATE_FILES)
        trainer.load_state({name: checkpoint.tensors(name) for name in files}, state)
        self.saved_step = checkpoint.step

    def _marks(self) -> dict[str, Json]:
        """Return what a checkpoint is only good for: the base's weights, and all that is trained on."""
        unet = self.run.unet
        adapted = [name for name, module in unet.named_modules() if hasattr(module, "base_layer")]
        found = base_fingerprint(unet, adapted or ["conv_in"])  # of encoder-only, what it is added after
        data = json.dumps(self.run.plan.fingerprint, sort_keys=True).encode()
        return {
            "weights_of_the_base": None if found is None else found.id,
            "photos_or_class_images": hashlib.sha256(data).hexdigest(),
        }

    def train(self) -> Work[None]:
        """Do all updates that are left; checkpoints, images and evaluations as often as configured.

        Where that was asked for, it ends once the run is good. What was learned is saved where an
        InterruptedRunError says that a signal came.
        """
        trainer, index = self.trainer, self.accelerator.process_index
        processes.do_on_main(self.accelerator, self._check_space)
        batches = self.run.source.batches(trainer.progress.samples(trainer.step, index))
        last = trainer.progress.num_steps
        bar = tqdm(
            total=last,
            initial=trainer.step,
            desc="training",
            unit="step",
            file=Unbroken(sys.stderr),  # nobody may be reading, and the run goes on
            disable=not self.has_bar,
        )
        with processes.tracked(self.accelerator, self.config), closing(bar):
            try:
                is_good = self._look()
                while trainer.is_unfinished and not is_good:
                    began = time.monotonic()
                    report = yield from trainer.update(batches)
                    self._report(report, bar, time.monotonic() - began)
                    if report.step % self.config.output.checkpointing_steps == 0 or report.step == last:
                        self.save()
                    processes.stop_all_if_any(self.accelerator, self.interrupts.signal_number)
                    is_good = self._look()
                if is_good:
                    self.save()
            except processes.StoppedAtOnceError:
                raise
            except (processes.InterruptedRunError, NonFiniteError):
                self.save()
                raise

    def _check_space(self) -> None:
        size = sum(map(len, result.result_files(self.run).values()))
        # weights and two moments, the average if there is one, and the result; the best there and as best/
        num_copies = 4 + (self.trainer.average is not None) + 2 * (self.evaluations is not None)
        path, needed = self.folder.path, num_copies * size / MIB
        free = shutil.disk_usage(path).free / MIB
        if free < needed:
            raise ValueError(
                f"a checkpoint and the result need {needed:.1f} MiB in {printable(path)}, and {free:.1f} MiB "
                "are free; free some, or give another --output_dir"
            )

    def _look(self) -> bool:
        """Draw and measure what this step shows; say, in all processes, whether the run is to end here."""
        step, progress, evaluations = self.trainer.step, self.trainer.progress, self.evaluations
        apart = self.config.validation.steps_between(progress.steps_per_epoch(self.run.plan.num_samples))
        if self.validation.prompts and (step % apart == 0 or step == progress.num_steps):
            processes.do_on_main(self.accelerator, lambda: self.validation.draw_step(step))
        if evaluations is None or not evaluations.is_due(step):
            return False
        processes.do_on_main(self.accelerator, evaluations.evaluate)
        stop = processes.from_main(self.accelerator, evaluations.stop)
        if stop is not None:
            logger.info("the run is finished at step %d: %s", stop.step, stop.reason)
        return stop is not None

    def _report(self, report: StepReport, bar: "tqdm[None]", seconds: float) -> None:
        if not self.accelerator.is_main_process:
            return
        rate = self.trainer.progress.effective_batch / max(seconds, 1e-9)
        numbers = {name: getattr(report, name) for name in ("loss", "grad_norm", "learning_rate")}
        # an overflow that float16's scaler passes over is no number of JSON
        logged = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self.folder.log({"step": report.step, **logged, "images_per_second": round(rate, 3)})
        self.accelerator.log(numbers, step=report.step)
        bar.set_postfix_str(f"loss {report.loss:.4f}, {rate:.1f} images/s", refresh=False)
        bar.update()

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one."""
        step = self.trainer.step
        if self.saved_step != step and step > 0:
            processes.do_on_main(self.accelerator, self._write_checkpoint)
        self.saved_step = step

    def _write_checkpoint(self) -> None:
        tensors, state = self.trainer.state()
        best = {} if self.evaluations is None else self.evaluations.files_of_checkpoint()
        self.folder.sync()
        checkpoints.save_checkpoint(
            self.folder.path,
            self.trainer.step,
            adapter_files=result.result_files(self.run) | best,
            tensors=tensors,
            state=state | self._marks(),
            num_kept=self.config.output.checkpoints_total_limit,
        )

    def finish(self, hub_token: str | None) -> None:
        """Write the result folder; the last images are drawn from the files that were written."""
        path, step, told, output = self.folder.path, self.trainer.step, list[str](), self.config.output
        with averaged(self.trainer):
            files = result.result_files(self.run)
        if self.evaluations is not None:
            told, best = self.evaluations.told(), self.evaluations.curve.best()
            if self.evaluations.result and best is not None:
                files, step = self.evaluations.result, best.step
        result.write_adapters(path, files)
        if output.export_lora:
            result.write_export(path, self.run)
        result.load_saved(path, self.run)
        result.write_card(path, self.run, self.validation.draw_final(), step, told)
        logger.info("the adapter of step %d is in %s", step, path)
        if output.push_to_hub:
            logger.info("uploaded to %s", result.upload(path, output, hub_token))


def _rehearse(run: Run) -> None:
    """Do one step and draw one image of the first prompt, and log what a whole run takes; write nothing."""
    config, accelerator = run.config, run.accelerator
    if run.num_missing:
        raise ValueError(
            f"{run.num_missing} class images are missing in {config.prior.class_data_dir}, and a dry run "
            "writes nothing; run without --dry_run, or fill the folder"
        )
    load_run(run, num_steps=1)
    batches = run.source.batches(run.trainer.progress.samples(0, accelerator.process_index))
    with run.phases.measure(TRAIN):
        next(run.trainer.steps(batches))
    if not accelerator.is_main_process:
        return
    validation, evaluator = Validation(run), run.evaluator
    if validation.prompts:
        validation.prompts, validation.seeds = validation.prompts[:1], range(1)
        with run.phases.measure(DRAW):
            validation.draw()
    if evaluator is not None:
        evaluator.load(accelerator.device, {})
        folder = RunFolder(config.output.output_dir, {}, {}, allow_changes=False)  # never entered
        with run.phases.measure(MEASURE):
            Evaluations(run, folder).measure_base()
        num_prompts = len(evaluator.prompts) + len(evaluator.other_prompts)
        logger.info("an evaluation draws %d pictures", num_prompts * config.evaluation.num_eval_images)
    for line in _costs(run):
        logger.info("%s", line)


def _costs(run: Run) -> Iterator[str]:
    """Say what was trained, and what a whole run takes of time and disk."""
    config, progress, trainer, control = run.config, run.progress, run.trainer, control_of(run.config)
    yield "dry run: nothing was written"
    method = config.adapter.adapter
    called = {"unet": run.base.denoiser.replace("_", " ")}
    trained = [
        (f"{method} on the {called.get(part.part, part.part)}", [*part.parameters], part.learning_rate)
        for part in trainer.parts
    ]
    if control is not None and trainer.control is not None:
        own, rate = list(trainer.control.parameters()), control.control_learning_rate
        trained.append(("the encoder of control images", own, rate))
    for what, parameters, rate in trained:
        yield f"trained: {what}, {sum(p.numel() for p in parameters):,} parameters, learning rate {rate:g}"
    num_steps, batch, num_samples = progress.num_steps, progress.effective_batch, run.plan.num_samples
    passes = f"{num_steps * batch / num_samples:.1f} passes over the photos"
    yield f"steps: {num_steps}, each of {batch} photo{'s' * (batch != 1)}, {passes}"
    yield from run.phases.lines
    validation, num_kept, seconds = (
        config.validation,
        config.output.checkpoints_total_limit,
        run.phases.seconds,
    )
    # before the first step, every so many steps and after the last; also the base, and the saved adapter
    drawn = -(-num_steps // validation.steps_between(progress.steps_per_epoch(num_samples))) + 3
    images = drawn * len(validation.validation_prompt) * validation.num_validation_images
    total = seconds[TRAIN] * num_steps + seconds.get(DRAW, 0.0) * images
    included = f"{images} images"
    num_copies = 3 * num_kept + 1  # weights and two moments a checkpoint; the weights again as the result
    if config.evaluation.eval_steps:  # the base, every so many steps and the last
        evaluations = -(-num_steps // config.evaluation.eval_steps) + 1
        cost = seconds.get(MEASURE, 0.0) * evaluations
        total, included = total + cost, f"{included} and {evaluations} evaluations ({cost / 60:.1f} minutes)"
        num_copies += num_kept + 1  # the best step's, in each checkpoint and as best/
    yield f"time: about {total / 60:.1f} minutes, at the pace of a first step, {included} included"
    size = sum(map(len, result.result_files(run).values())) / MIB
    yield f"disk: {size:.1f} MiB the adapter, {num_copies * size:.1f} MiB with checkpoints; images beside"
