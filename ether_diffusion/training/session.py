"""One call's share of a run: it goes on from a checkpoint, trains, saves, draws, and writes the result."""

import logging
import math
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ether_diffusion.adapters.format import TENSORS_NAME
from ether_diffusion.console import Unbroken
from ether_diffusion.durable_files import delete
from ether_diffusion.training.checkpoint import (
    Checkpoint,
    newer_checkpoints,
    prune_checkpoints,
    save_checkpoint,
)
from ether_diffusion.training.config import control_of
from ether_diffusion.training.control import restore_from, validation_controls
from ether_diffusion.training.evaluations import Evaluations
from ether_diffusion.training.interrupts import InterruptedRunError, Interrupts, StoppedAtOnceError
from ether_diffusion.training.loop import STATE_FILES, NonFiniteError, StepReport, averaged
from ether_diffusion.training.measuring import Measuring
from ether_diffusion.training.methods import adapters_off, restore_adapter
from ether_diffusion.training.processes import do_on_main, from_main
from ether_diffusion.training.restoring import compare_marks, marks_of, stored_tensors
from ether_diffusion.training.result import (
    draw_final,
    load_saved,
    metadata_of_run,
    result_files,
    upload,
    write_adapters,
    write_card,
    write_export,
)
from ether_diffusion.training.run_folder import RunFolder
from ether_diffusion.training.samples import BASE_FOLDER, CONTROL_FOLDER, Sampler, step_name
from ether_diffusion.training.setup import LoadedRun
from ether_diffusion.training.shortages import check_space
from ether_diffusion.training.trackers import track, track_images

logger = logging.getLogger(__name__)


class Session:
    """A loaded run in a process; what it writes, the main process writes."""

    def __init__(
        self, run: LoadedRun, accelerator: Accelerator, interrupts: Interrupts, folder: RunFolder
    ) -> None:
        self.run, self.accelerator, self.interrupts, self.folder = run, accelerator, interrupts, folder
        self.config, self.trainer = run.checked.config, run.trainer
        self.saved_step: int | None = None
        self.sampler = Sampler(
            run.checked.base,
            self.config.validation,
            folder.path,
            self.config.compute.seed,
            run.checked.size,
            None if run.trainer.control is None else run.trainer.control.encoder,
            validation_controls(control_of(self.config), run.checked.size),
        )
        evaluator = run.checked.evaluator
        self.evaluations: Evaluations | None = None
        if evaluator is not None:
            self.evaluations = Evaluations(Measuring(evaluator, run, accelerator, interrupts.check), folder)
        per_epoch = self.trainer.progress.steps_per_epoch(run.plan.num_samples)
        self.validation_steps = self.config.validation.steps_between(per_epoch)

    def restore(self, checkpoint: Checkpoint | None, *, allow_changes: bool) -> None:
        """Go on from a checkpoint, if there is one.

        Raises:
            ValueError: it was made on other base weights or other class images.
        """
        main = self.accelerator.is_main_process
        if checkpoint is not None:
            state = checkpoint.state()
            compare_marks(state, marks_of(self.run), allow_changes=allow_changes)
            for part in self.trainer.parts:
                prefix = "" if part.part == "unet" else f"{part.part}/"
                restore_adapter(part.model, stored_tensors(part, checkpoint, f"{prefix}{TENSORS_NAME}"))
            if self.trainer.control is not None:
                restore_from(self.trainer.control, checkpoint)
            files = [name for name in STATE_FILES if checkpoint.has(name)]
            self.trainer.load_state({name: checkpoint.tensors(name) for name in files}, state)
            self.saved_step = checkpoint.step
            logger.info("going on from step %d of %s", checkpoint.step, checkpoint.folder)
        if main:
            for newer in newer_checkpoints(self.folder.path, self.trainer.step):
                logger.warning("%s is later than where this run goes on from; it is deleted", newer)
                delete(newer)
            # a process that was killed right after a save has left them
            limit = self.config.output.checkpoints_total_limit
            prune_checkpoints(self.folder.path, self.trainer.step, limit)
            self.folder.rewind(self.trainer.step)
            self.sampler.forget(self.trainer.step)
            if self.evaluations is not None:
                self.evaluations.restore(checkpoint)

    def train(self) -> None:
        """Do all updates that are left; checkpoints, images and evaluations as often as configured.

        Where that was asked for, it ends once the run is good.

        Raises:
            InterruptedRunError: a signal came; what was learned is saved.
        """
        do_on_main(self.accelerator, self._check_space)
        samples = self.trainer.progress.samples(self.trainer.step, self.accelerator.process_index)
        last = self.trainer.progress.num_steps
        bar = tqdm(
            total=last,
            initial=self.trainer.step,
            desc="training",
            unit="step",
            file=Unbroken(sys.stderr),  # nobody may be reading, and the run goes on
            disable=not self.accelerator.is_main_process,
        )
        try:
            is_good = self._look()
            began = time.monotonic()
            for report in () if is_good else self.trainer.steps(self.run.source.batches(samples)):
                self._report(report, bar, time.monotonic() - began)
                if report.step % self.config.output.checkpointing_steps == 0 or report.step == last:
                    self.save()
                self._stop_if_asked()
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

    def _look(self) -> bool:
        """Draw and measure what this step shows; say, in all processes, whether the run is to end here."""
        self._validate_if_due()
        evaluations = self.evaluations
        if evaluations is None or not evaluations.is_due(self.trainer.step):
            return False
        do_on_main(self.accelerator, evaluations.evaluate)
        stop = from_main(self.accelerator, evaluations.stop)
        if stop is not None:
            logger.info("the run is finished at step %d: %s", stop.step, stop.reason)
        return stop is not None

    def _check_space(self) -> None:
        size = sum(map(len, result_files(self.trainer, metadata_of_run(self.run)).values()))
        # weights and two moments, the average if there is one, and the result; the best there and as best/
        num_copies = 4 + (self.trainer.average is not None) + 2 * (self.evaluations is not None)
        check_space(self.folder.path, num_copies * size)

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

    def _stop_if_asked(self) -> None:
        """Stop all processes after the same step, whichever got the signal."""
        number = torch.tensor(self.interrupts.signal_number or 0, device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            number = self.accelerator.gather(number.reshape(1)).max()
        if number.item():
            raise InterruptedRunError(int(number.item()))

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
            state=state | marks_of(self.run),
            num_kept=self.config.output.checkpoints_total_limit,
        )

    def _validate_if_due(self) -> None:
        """Draw the images of this step, if it has any and they are not there yet."""
        step, prompts = self.trainer.step, self.config.validation.validation_prompt
        is_due = step % self.validation_steps == 0 or step == self.trainer.progress.num_steps
        if prompts and is_due:
            do_on_main(self.accelerator, self._validate)

    def _validate(self) -> None:
        step = self.trainer.step
        if self.sampler.has(step_name(step)):
            return
        unet, check = self.run.unet, self.interrupts.check
        with self.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            if self.sampler.controls and not self.sampler.has(CONTROL_FOLDER):
                self.sampler.save(self.sampler.control_rows(), CONTROL_FOLDER)
            if not self.sampler.has(BASE_FOLDER):
                with adapters_off(part.model for part in self.trainer.parts):
                    base = self.sampler.draw(unet, self.run.encode, check=check, with_control=False)
                self.sampler.save(base, BASE_FOLDER)
            with averaged(self.trainer):
                rows = self.sampler.draw(unet, self.run.encode, check=check)
        self.sampler.save(rows, step_name(step))
        self.sampler.write_sheet()
        track_images(self.accelerator, rows, step)

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
        with self.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            pictures = draw_final(self.run, self.sampler, self.interrupts.check)
        step, told = self.trainer.step, []
        if self.evaluations is not None:
            step, told = self.evaluations.result_step, self.evaluations.told()
        write_card(path, self.run, pictures, step, told)
        logger.info("the adapter of step %d is in %s", step, path)
        if self.config.output.push_to_hub:
            logger.info("uploaded to %s", upload(path, self.config.output, hub_token))
