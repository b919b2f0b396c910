"""The processes of a run: signals, accelerate's view of them, and trackers beside the run's own log."""

import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from types import FrameType
from typing import TypeVar

import accelerate.utils
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration
from PIL import Image

from ether_diffusion.training.config import ComputeConfig, DreamBoothConfig, OutputConfig
from ether_diffusion.wording import listed, printable

T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
AVAILABLE = {
    name: getattr(accelerate.utils, f"is_{name}_available")
    for name in ("tensorboard", "wandb", "trackio", "comet_ml")
}
_OF_LAUNCHERS = re.compile("ACCELERATE_.*|(LOCAL_|NODE_|GROUP_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)")


class InterruptedRunError(Exception):
    """The run was asked to stop; exit_code is the shell's for that signal: 130 or 143."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.args[0]).name}"


class StoppedAtOnceError(InterruptedRunError):
    """It was asked twice: what is in memory may be half done, and is not saved."""


class Interrupts:
    """While it is entered, SIGINT and SIGTERM are noted instead of ending the process; a second one ends it.

    So the step in progress ends and is saved before the process is.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._before = ExitStack()

    def __enter__(self) -> "Interrupts":
        for number in SIGNALS:
            self._before.callback(signal.signal, number, signal.signal(number, self._note))
        return self

    def __exit__(self, *error: object) -> None:
        self._before.close()

    def check(self) -> None:
        """Raise InterruptedRunError if a signal came."""
        if self.signal_number is not None:
            raise InterruptedRunError(self.signal_number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number is not None:
            raise StoppedAtOnceError(number)
        self.signal_number = number


@contextmanager
def signals_held() -> Iterator[None]:
    """Put off what this thread gets of both signals, and processes it starts until they release_signals.

    Nothing is put off where there are no signal masks, as on Windows.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def release_signals() -> None:
    """Let a process that was started while signals were held have them again."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def make_accelerator(compute: ComputeConfig, output: OutputConfig | None = None) -> Accelerator:
    """Return accelerate's view of this process, with the trackers that the output asks for.

    A ValueError says that it was launched for FSDP or DeepSpeed, which split models that are whole here, or
    which variable of the environment accelerate stumbles over.
    """
    AcceleratorState._reset_state()  # else the precision of an earlier run in this process would stay
    # a missing tracker is refused with all else that is wrong; accelerate would warn before
    log_with = None if output is None or tracker_problem(output.report_to) else output.report_to
    project = None
    if output is not None:
        folder = str(output.output_dir)
        project = ProjectConfiguration(project_dir=folder, logging_dir=f"{folder}/{output.logging_dir}")
    try:
        accelerator = Accelerator(
            mixed_precision=compute.mixed_precision,
            log_with=log_with,
            # the others wait while the main process draws class or validation images
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
            project_config=project,
        )
        torch.zeros(1, device=accelerator.device).cpu()  # a variable may name one that is not here
        if accelerator.mixed_precision not in DTYPES:
            raise ValueError(f"{accelerator.mixed_precision} is no precision of {', '.join(DTYPES)}")
    except Exception as error:  # KeyError, RuntimeError, ImportError …: accelerate raises anything
        variables = sorted(f"{n}={v}" for n, v in os.environ.items() if _OF_LAUNCHERS.fullmatch(n))
        if not variables:
            raise
        found = f"accelerate cannot start with the environment's {listed(variables, 20)}"
        raise ValueError(f"{found} ({printable(error, 300)}); correct what is wrong, or unset it") from error
    unsuitable = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if accelerator.distributed_type in unsuitable:
        kind = accelerator.distributed_type.value
        told = f"accelerate is set up for {kind}, which splits models"
        raise ValueError(f"{told}; launch without: only an adapter is trained")
    if compute.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def do_on_main(accelerator: Accelerator, work: Callable[[], None]) -> None:
    """Let the main process work while the others wait; all of them stop where it is stopped.

    The others raise the InterruptedRunError of a signal that stopped it, or a ValueError of what it raised.
    """
    stop: Exception | None = None
    if accelerator.is_main_process:
        try:
            work()
        except Exception as error:  # told to the others first, raised below
            stop = error
    told = stop
    if stop is not None and not isinstance(stop, InterruptedRunError):
        told = ValueError(f"the main process stopped: {stop}")
    told = from_main(accelerator, told)
    if told is not None:
        raise stop or told


def from_main(accelerator: Accelerator, value: T) -> T:
    """Return the main process's value in all of them."""
    several = accelerator.num_processes > 1
    told: T = accelerate.utils.broadcast_object_list([value])[0] if several else value
    return told


def stop_all_if_any(accelerator: Accelerator, signal_number: int | None) -> None:
    """Raise InterruptedRunError in all processes after the same step, whichever got a signal."""
    number = signal_number or 0
    if accelerator.num_processes > 1:
        everywhere = torch.tensor([number], device=accelerator.device)
        number = int(accelerator.gather(everywhere).max().item())
    if number:
        raise InterruptedRunError(number)


def tracker_problem(name: str | None) -> str | None:
    """Say that a tracker's package is missing, which accelerate passes over in silence."""
    if name == "all" and not any(is_available() for is_available in AVAILABLE.values()):
        return f"report_to=all finds none of {', '.join(AVAILABLE)}; pip install one, or leave it out"
    if name in AVAILABLE and not AVAILABLE[name]():
        return f"report_to={name} needs the package {name}; pip install {name}, or leave it out"
    return None


@contextmanager
def tracked(accelerator: Accelerator, config: DreamBoothConfig) -> Iterator[None]:
    """Open the trackers with the run's settings, and close them after."""
    if config.output.report_to is not None:
        plain = (bool, int, float, str)
        settings = {name: v if isinstance(v, plain) else str(v) for name, v in config.flat().items()}
        accelerator.init_trackers(config.output.tracker_project_name, config=settings)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:  # end_training would also part the processes
            tracker.finish()
        accelerator.trackers = []


def track_images(accelerator: Accelerator, rows: Sequence[Sequence[Image.Image]], step: int) -> None:
    """Give images to every tracker that takes them."""
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            arrays = np.stack([np.asarray(image) for row in rows for image in row])
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": arrays}, step=step, **options)
