"""Several processes of one run: the main one writes, and what stops it stops the others."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ether_diffusion.training.interrupts import InterruptedRunError, StoppedAtOnceError

T = TypeVar("T")


class MainStoppedError(ValueError):
    """The main process cannot go on, and says why itself."""


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
    if accelerator.num_processes > 1:
        told = broadcast_object_list([_as_told(stop)])[0]
        if stop is None and isinstance(told, int):
            raise StoppedAtOnceError(-told) if told < 0 else InterruptedRunError(told)
        if stop is None and told is not None:
            raise MainStoppedError(told)
    if stop is not None:
        raise stop


def from_main(accelerator: Accelerator, value: T) -> T:
    """Return the main process's value in all of them."""
    told: T = broadcast_object_list([value])[0] if accelerator.num_processes > 1 else value
    return told


def _as_told(stop: Exception | None) -> int | str | None:
    """Return the number of a signal, negative if it came twice, or the words of another error."""
    if isinstance(stop, StoppedAtOnceError):
        return 128 - stop.exit_code
    if isinstance(stop, InterruptedRunError):
        return stop.exit_code - 128
    return None if stop is None else f"the main process stopped: {stop}"
