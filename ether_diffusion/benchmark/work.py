"""Several processes at one benchmark: each takes a run that nobody is at, until all are done."""

import logging
import multiprocessing
import os
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch

from ether_diffusion.benchmark.carry_out import carry_out, find_result
from ether_diffusion.benchmark.plan import BenchmarkRun, BenchmarkSettings
from ether_diffusion.metrics.encoders import load_encoder
from ether_diffusion.metrics.lpips import Lpips, load_lpips
from ether_diffusion.pipelines.opening import default_device

logger = logging.getLogger(__name__)

WAIT_SECONDS = 1.0


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
    lpips = find_lpips(settings)
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


def find_lpips(settings: BenchmarkSettings) -> Lpips | None:
    """Load LPIPS; without its weights it is left out, unless they were named.

    Raises:
        OSError, ValueError: the weights that were named cannot be used.
    """
    try:
        return load_lpips(settings.lpips_weights, device=default_device())
    except (OSError, ValueError) as problem:
        if settings.lpips_weights is not None:
            raise
        logger.info("LPIPS is left out: %s", problem)
        return None
