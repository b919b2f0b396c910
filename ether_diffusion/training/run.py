"""A training run from its configuration to its result folder, going on where an earlier call stopped."""

import logging
from contextlib import ExitStack
from pathlib import Path

from accelerate import Accelerator

from ether_diffusion.training.checkpoint import Checkpoint, newest_checkpoint, open_checkpoint
from ether_diffusion.training.checks import CheckedRun, check_run
from ether_diffusion.training.config import DreamBoothConfig, OutputConfig
from ether_diffusion.training.config.files import write_config_file
from ether_diffusion.training.dry_run import run_dry
from ether_diffusion.training.evaluating import OpenEvaluator
from ether_diffusion.training.interrupts import InterruptedRunError, Interrupts
from ether_diffusion.training.phases import Phases
from ether_diffusion.training.processes import do_on_main
from ether_diffusion.training.result import open_repository
from ether_diffusion.training.run_folder import RunFolder
from ether_diffusion.training.session import Session
from ether_diffusion.training.setup import draw_class_images, load_run, make_accelerator, silence_loading
from ether_diffusion.training.shortages import shortages_explained
from ether_diffusion.training.trackers import tracked

logger = logging.getLogger(__name__)

CONFIG_NAME = "training_config.yaml"


def train_dreambooth(
    config: DreamBoothConfig,
    *,
    allow_changes: bool = False,
    dry_run: bool = False,
    hub_token: str | None = None,
    open_evaluator: OpenEvaluator | None = None,
) -> int:
    """Train an adapter and write it; return the exit code: 0, or 130 or 143 where a signal stopped it.

    A run that was stopped or killed goes on where it was, to the same bytes. `allow_changes` lets it go on
    with other settings or photos; `dry_run` does one step and one image and writes nothing. What eval_steps
    asks for is measured by what `open_evaluator` returns.

    Raises:
        ValueError: something cannot be used, or training cannot go on; the message says what to do.
        OSError: a file cannot be read or written.
    """
    config = config.resolved()
    output = config.output
    silence_loading()
    accelerator = make_accelerator(
        config.compute,
        report_to=output.report_to,
        folder=str(output.output_dir),
        logging_dir=output.logging_dir,
    )
    checked = check_run(config, num_processes=accelerator.num_processes, open_evaluator=open_evaluator)
    with Interrupts() as interrupts, shortages_explained(output.output_dir):
        try:
            if dry_run:
                run_dry(checked, accelerator, interrupts.check)
            else:
                _run(checked, accelerator, interrupts, allow_changes=allow_changes, hub_token=hub_token)
        except InterruptedRunError as stop:
            logger.warning("%s; the same command goes on from here", stop)
            return stop.exit_code
    return 0


def _run(
    checked: CheckedRun,
    accelerator: Accelerator,
    interrupts: Interrupts,
    *,
    allow_changes: bool,
    hub_token: str | None,
) -> None:
    config, path = checked.config, checked.config.output.output_dir
    settings = config.flat() | {"num_processes": accelerator.num_processes}
    folder = RunFolder(path, settings, {"data": checked.training.fingerprint}, allow_changes=allow_changes)
    _asked_checkpoint(config.output)  # refused before anything is written
    with ExitStack() as held:

        def begin() -> None:
            if checked.evaluator is not None:
                checked.evaluator.load(accelerator.device)
            held.enter_context(folder)
            write_config_file(path / CONFIG_NAME, config)
            if config.output.push_to_hub:  # refused now rather than after hours
                open_repository(config.output, hub_token)
            draw_class_images(checked, accelerator, interrupts.check)

        do_on_main(accelerator, begin)
        phases = Phases(accelerator.device)
        run = load_run(checked, accelerator, phases, interrupts.check)
        session = Session(run, accelerator, interrupts, folder)
        checkpoint = _asked_checkpoint(config.output) or newest_checkpoint(path)
        if checkpoint is None and config.output.resume_from_checkpoint is not None:
            logger.warning("%s holds no checkpoint yet; the run begins with the first step", path)
        session.restore(checkpoint, allow_changes=allow_changes)
        with tracked(accelerator, config), phases.measure("train"):
            session.train()
        with phases.measure("write the result"):
            do_on_main(accelerator, lambda: session.finish(hub_token))
        for phase in phases.found if accelerator.is_main_process else ():
            logger.info("%s: %.1f s, peak %.0f MiB", phase.name, phase.seconds, phase.peak_bytes / 2**20)
    accelerator.end_training()


def _asked_checkpoint(output: OutputConfig) -> Checkpoint | None:
    """Return the checkpoint that the run is to go on from, if one was asked for by name.

    Raises:
        FileNotFoundError: there is no such checkpoint in the run's folder.
        ValueError: it is not whole.
    """
    wanted = output.resume_from_checkpoint
    if wanted is None or wanted == "latest":
        return None
    path = Path(wanted) if Path(wanted).is_dir() else output.output_dir / wanted
    if path.resolve().parent != output.output_dir.resolve():
        raise ValueError(
            f"{path} is no checkpoint of {output.output_dir}; give that run's folder as --output_dir, "
            "or a checkpoint in this one"
        )
    return open_checkpoint(path)
