"""The training loop that all stages of Tiny World share: resumable, pausable, bounded in time."""

import logging
import signal
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator

from ether_diffusion.options import Options, PathText, Positive, Share, Text, option
from ether_diffusion.tiny_world import WEIGHTS_FOLDER
from recipes.tiny_world.average import Average
from recipes.tiny_world.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from recipes.tiny_world.clock import Clock
from recipes.tiny_world.compiling import compile_blocks
from recipes.tiny_world.renders import DEFAULT_RUN_FOLDER

logger = logging.getLogger(__name__)

LOG_EVERY = 100
BATCHES_AHEAD = 4
"""Batches that are made beside an accelerator's work."""

Batch = dict[str, torch.Tensor]


class RunConfig(Options):
    """How long, where and with what a stage is trained."""

    run_folder: PathText = option(DEFAULT_RUN_FOLDER, "Folder of data, cached latents and checkpoints.")
    time_budget_minutes: Positive = option(
        60.0, "Stop, after a checkpoint, when this call has trained so many minutes."
    )
    max_steps: int = option(10_000_000, "Stop, after a checkpoint, at this step of the stage.")
    batch_size: int = option(0, "Samples of a step and process; 0 takes the stage's own.")
    learning_rate: float = option(0.0, "Peak learning rate; 0 takes the stage's own.")
    decay_fraction: Share = option(
        0.0, "Last part of the budget over which the rate falls to 5 %; 0: constant."
    )
    checkpoint_minutes: float = option(4.0, "Minutes between checkpoints.")
    sheet_minutes: float = option(12.0, "Minutes between sample sheets.")
    num_threads: int = option(0, "CPU threads of this process; 0 leaves torch's choice.")
    mixed_precision: Text = option("bf16", "Autocast of accelerate: bf16, fp16 or no.")
    seed: int = option(0, "Seed of the data, of the initial weights and of every draw.")
    pause_file: PathText | None = option(None, "While this file exists, training waits between steps.")
    compiled: bool = option(False, "Compile the blocks: minutes at first, then 1.2 times faster on a CPU.")
    average_decay: float = option(0.0, "Decay of the averaged weights; 0 takes the stage's own.")
    world: int = option(1, "World whose concepts the UNet stage draws: 1 is shipped, 2 is next.")
    composites_per_concept: int = option(1024, "Composites of each concept that the UNet stage sees.")
    num_pictures: int = option(65536, "Pictures that the pictures stage draws beforehand.")
    num_drawers: int = option(1, "Processes that draw pictures.")
    init_from: PathText | None = option(None, "Exported pipeline that the UNet stage starts from.")
    export_folder: PathText = option(WEIGHTS_FOLDER, "Folder that the export stage writes.")


class Stage(Protocol):
    """What the loop asks of a stage."""

    name: str
    batch_size: int
    learning_rate: float
    average_decay: float

    @property
    def model(self) -> torch.nn.Module:
        """The module whose forward is the loss of a batch; its whole state is saved."""

    def parameter_groups(self, learning_rate: float) -> list[dict[str, object]]:
        """Return AdamW's groups, each with its "lr"."""

    def make_batch(self, batch_size: int, generator: torch.Generator) -> Batch:
        """Draw a batch on the CPU; everything random comes from the generator."""

    def write_sheet(self, path: Path, device: torch.device) -> None:
        """Draw a sample sheet with the weights that the model now has."""


def step_generator(seed: int, step: int, process_index: int) -> torch.Generator:
    """Return the CPU generator of one step: a function of its arguments, so that resuming needs no state."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) * 1_009 + process_index)


def _learning_rate_factor(step: int, elapsed: float, decay_fraction: float) -> float:
    """Linear warm-up over 100 steps, then constant; linear fall to 5 % over the last part of the budget.

    elapsed is the used part of the time budget, in [0, 1].
    """
    factor = min(1.0, (step + 1) / 100)
    if decay_fraction > 0 and elapsed > 1 - decay_fraction:
        factor *= max(0.05, (1 - elapsed) / decay_fraction)
    return factor


class Trainer:
    """One stage in training: its wrapped model, optimizer, average, step and clocks."""

    def __init__(self, stage: Stage, config: RunConfig) -> None:
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        self.stage, self.config = stage, config
        torch.backends.cudnn.benchmark = True  # every batch of a stage has the same shape
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision)
        self.folder = config.run_folder / stage.name
        self.batch_size = config.batch_size or stage.batch_size
        groups = stage.parameter_groups(config.learning_rate or stage.learning_rate)
        self.base_rates = [float(str(group["lr"])) for group in groups]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.model, self.optimizer = self.accelerator.prepare(stage.model, optimizer)
        if config.compiled:
            compile_blocks(stage.model)
        self.average = Average(stage.model, config.average_decay or stage.average_decay)
        self.step, self.samples, self.train_seconds, self.stopping = 0, 0, 0.0, False
        self.losses: list[torch.Tensor] = []
        self.makers, self.ahead = ThreadPoolExecutor(BATCHES_AHEAD), dict[int, Future[Batch]]()
        checkpoint = newest_checkpoint(self.folder)
        if checkpoint is not None:
            state = load_checkpoint(checkpoint, stage.model, average=self.average, optimizer=optimizer)
            self.step, self.samples = int(state["step"]), int(state["samples"])
            self.train_seconds = float(state["train_seconds"])
            logger.info("%s goes on from step %d", stage.name, self.step)

    def ask_to_stop(self, *_: object) -> None:
        """Let the current step end, then save and stop; the handler of SIGTERM and SIGINT."""
        self.stopping = True

    def make_batch(self, step: int) -> Batch:
        """Draw the batch of a step and bring it to the device."""
        generator = step_generator(self.config.seed, step, self.accelerator.process_index)
        batch = self.stage.make_batch(self.batch_size, generator)
        return {key: value.to(self.accelerator.device) for key, value in batch.items()}

    def next_batch(self) -> Batch:
        """Return this step's batch; beside an accelerator, threads make those of the next steps meanwhile."""
        if self.accelerator.device.type == "cpu":
            return self.make_batch(self.step)
        for step in range(self.step, self.step + BATCHES_AHEAD):
            if step not in self.ahead:
                self.ahead[step] = self.makers.submit(self.make_batch, step)
        return self.ahead.pop(self.step).result()

    def train_step(self, elapsed: float) -> torch.Tensor:
        """Do one optimizer step; elapsed is the used part of the budget. Returns the loss."""
        factor = _learning_rate_factor(self.step, elapsed, self.config.decay_fraction)
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor
        batch = self.next_batch()
        with self.accelerator.autocast():
            loss = self.model(**batch)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.samples += self.batch_size * self.accelerator.num_processes
        self.average.update(self.stage.model, self.step)
        detached: torch.Tensor = loss.detach()
        return detached

    def save(self) -> None:
        """Write a checkpoint from the main process."""
        if self.accelerator.is_main_process:
            state: dict[str, int | float | str] = {
                "step": self.step,
                "samples": self.samples,
                "train_seconds": round(self.train_seconds, 1),
                "batch_size": self.batch_size,
            }
            save_checkpoint(
                self.folder, self.stage.model, average=self.average, optimizer=self.optimizer, state=state
            )

    def write_sheet(self) -> None:
        """Draw the averaged model's sample sheet from the main process."""
        if self.accelerator.is_main_process:
            path = self.folder / "sheets" / f"step-{self.step:08d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            # Sheets have other batch sizes, for which compiling would take minutes.
            with self.average.swapped_in(self.stage.model), torch.compiler.set_stance("force_eager"):
                self.stage.model.eval()
                self.stage.write_sheet(path, self.accelerator.device)
                self.stage.model.train()

    def run(self) -> None:
        """Train until the budget or max_steps is used up, then save a checkpoint and a sheet."""
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self.ask_to_stop)
        config, clock = self.config, Clock(self.config.time_budget_minutes)
        while self.step < config.max_steps and not self.stopping:
            clock.wait_while_exists(config.pause_file)
            if clock.elapsed() >= 1:
                break
            began = time.monotonic()
            self.losses.append(self.train_step(clock.elapsed()))
            self.train_seconds += time.monotonic() - began
            if self.step % LOG_EVERY == 0:
                self.log(clock.lap("log"))
            if clock.is_due("save", config.checkpoint_minutes):
                self.save()
            if clock.is_due("sheet", config.sheet_minutes):
                self.write_sheet()
                clock.lap("sheet")  # a busy machine must not draw sheets all the time
        self.save()
        self.write_sheet()

    def log(self, seconds: float) -> None:
        """Log the mean loss and the speed of the last LOG_EVERY steps, which took so many seconds."""
        rate = len(self.losses) * self.batch_size * self.accelerator.num_processes / seconds
        loss = float(torch.stack(self.losses).mean())
        form = "%s step %d samples %d loss %.4f %.1f samples/s %.1f min"
        minutes = self.train_seconds / 60
        logger.info(form, self.stage.name, self.step, self.samples, loss, rate, minutes)
        self.losses.clear()


def trainable(parameters: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """Return the parameters that are to be trained, as a list."""
    return [parameter for parameter in parameters if parameter.requires_grad]
