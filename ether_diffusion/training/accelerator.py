"""What accelerate does for a run: its processes, their precision, and trackers beside the run's own log."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    is_comet_ml_available,
    is_tensorboard_available,
    is_trackio_available,
    is_wandb_available,
)
from PIL import Image

from ether_diffusion.training.config import ComputeConfig, DreamBoothConfig
from ether_diffusion.training.interrupts import InterruptedRunError, StoppedAtOnceError
from ether_diffusion.wording import listed, printable

T = TypeVar("T")

DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
AVAILABLE = {
    "tensorboard": is_tensorboard_available,
    "wandb": is_wandb_available,
    "trackio": is_trackio_available,
    "comet_ml": is_comet_ml_available,
}
_OF_LAUNCHERS = re.compile("ACCELERATE_.*|(LOCAL_|NODE_|GROUP_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)")


class MainStoppedError(ValueError):
    """The main process cannot go on, and says why itself."""


def make_accelerator(
    compute: ComputeConfig, *, report_to: str | None = None, folder: str = ".", logging_dir: str = "logs"
) -> Accelerator:
    """Return accelerate's view of this process.

    Raises:
        ValueError: it was launched for FSDP or DeepSpeed, which split models that are whole here, or a
            variable of the environment says what accelerate cannot do.
    """
    AcceleratorState._reset_state()  # else the precision of an earlier run in this process would stay
    # the others wait while the main process draws class or validation images
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
    with _variables_named():
        accelerator = Accelerator(
            mixed_precision=compute.mixed_precision,
            # a missing tracker is refused with all else that is wrong; accelerate would warn before
            log_with=report_to if tracker_problem(report_to) is None else None,
            kwargs_handlers=[patience],
            project_config=ProjectConfiguration(project_dir=folder, logging_dir=f"{folder}/{logging_dir}"),
        )
        if accelerator.mixed_precision not in DTYPES:
            raise ValueError(f"{accelerator.mixed_precision} is no precision of {', '.join(DTYPES)}")
    unsuitable = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if accelerator.distributed_type in unsuitable:
        raise ValueError(
            f"accelerate is set up for {accelerator.distributed_type.value}, which splits models; "
            "launch without: only an adapter is trained, and its optimizer is small"
        )
    if compute.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


@contextmanager
def _variables_named() -> Iterator[None]:
    """Name the variables of the environment that accelerate stumbles over, which it raises anything at."""
    try:
        yield
    except Exception as error:  # KeyError, RuntimeError, ImportError …; nothing but accelerate runs inside
        given = {
            name: value
            for name, value in sorted(os.environ.items())
            if _OF_LAUNCHERS.fullmatch(name) and value
        }
        if not given:
            raise
        said = str(error)
        meant = {
            name: value
            for name, value in given.items()
            if name in said or re.search(rf"(?<!\w){re.escape(value)}(?!\w)", said, re.IGNORECASE)
        }
        shown = listed(f"{name}={value}" for name, value in (meant or given).items())
        raise ValueError(
            f"accelerate cannot start with the environment's {shown} ({printable(said, 300)}); "
            "correct what is wrong, or unset it"
        ) from error


def do_on_main(accelerator: Accelerator, work: Callable[[], None]) -> None:
    """Let the main process work while the others wait; all of them stop where it is stopped.

    Raises:
        InterruptedRunError: a signal stopped the main process.
        MainStoppedError: in the others, it raised anything else.
    """
    stop: Exception | None = None
    if accelerator.is_main_process:
        try:
            work()
        except Exception as error:  # told to the others first, raised below
            stop = error
    told = from_main(accelerator, _as_told(stop))
    if stop is not None:
        raise stop
    if isinstance(told, int):
        raise StoppedAtOnceError(-told) if told < 0 else InterruptedRunError(told)
    if told is not None:
        raise MainStoppedError(told)


def _as_told(stop: Exception | None) -> int | str | None:
    """Return the number of a signal, negative if it came twice, or the words of another error."""
    if isinstance(stop, InterruptedRunError):
        number = stop.exit_code - 128
        return -number if isinstance(stop, StoppedAtOnceError) else number
    return None if stop is None else f"the main process stopped: {stop}"


def from_main(accelerator: Accelerator, value: T) -> T:
    """Return the main process's value in all of them."""
    told: T = broadcast_object_list([value])[0] if accelerator.num_processes > 1 else value
    return told


def stop_all_if_any(accelerator: Accelerator, signal_number: int | None) -> None:
    """Stop all processes after the same step, whichever got a signal.

    Raises:
        InterruptedRunError: one did.
    """
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
        settings = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in config.flat().items()
        }
        accelerator.init_trackers(config.output.tracker_project_name, config=settings)
    try:
        yield
    finally:
        for tracker in accelerator.trackers:  # end_training would also part the processes
            tracker.finish()
        accelerator.trackers = []


def track(accelerator: Accelerator, values: Mapping[str, float], step: int) -> None:
    """Give numbers to every tracker."""
    if accelerator.trackers:
        accelerator.log(dict(values), step=step)


def track_images(accelerator: Accelerator, rows: Sequence[Sequence[Image.Image]], step: int) -> None:
    """Give images to every tracker that takes them."""
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            arrays = np.stack([np.asarray(image) for row in rows for image in row])
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": arrays}, step=step, **options)
