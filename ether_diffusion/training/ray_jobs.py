"""Jobs on a Ray cluster, by Ray Core's tasks, each of which trains its share of the jobs together.

Ray Data streams rows through functions without a memory, and would give each job's photos to whichever worker
is free. A job is one long call that writes a folder and goes on from there: a task, started anew where its
worker is lost.
"""

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ether_diffusion.training.config import DreamBoothConfig
from ether_diffusion.training.processes import InterruptedRunError, Interrupts
from ether_diffusion.wording import printable

logger = logging.getLogger(__name__)

RETRIES = 4
"""How often a share is started anew whose worker or machine was lost."""
_POLL_SECONDS = 0.5


def train_with_ray(groups: Sequence[Sequence[DreamBoothConfig]], **flags: Any) -> tuple[int, dict[Path, str]]:
    """Train groups as `train_groups`, on the cluster of RAY_ADDRESS or one that is started on this machine.

    A GPU each, or a core each where there are none, gets a share of the jobs of one group. Their folders are
    those of this machine, and must be there on all.
    """
    try:
        import ray
    except ImportError:
        found = "ray spreads jobs over a cluster, and Ray is not installed"
        raise ValueError(f'{found}: pip install "ether-diffusion[ray]"') from None
    is_ours = not ray.is_initialized()
    if is_ours:
        ray.init(logging_level=logging.ERROR)
    try:
        with Interrupts() as interrupts:
            return _trained(ray, groups, interrupts, flags)
    except InterruptedRunError as stop:
        logger.warning("%s; the same command goes on from the newest checkpoints", stop)
        return stop.exit_code, {}
    finally:
        if is_ours:
            ray.shutdown()


def _trained(
    ray: Any, groups: Sequence[Sequence[DreamBoothConfig]], interrupts: Interrupts, flags: dict[str, Any]
) -> tuple[int, dict[Path, str]]:
    resources = ray.cluster_resources()
    num_cpus, num_gpus = (int(resources.get(name, 0)) for name in ("CPU", "GPU"))
    size = math.ceil(sum(map(len, groups)) / max(1, num_gpus or num_cpus))
    shares = [group[start : start + size] for group in groups for start in range(0, len(group), size)]
    needs = {"num_cpus": max(1, num_cpus // len(shares)), "num_gpus": min(1, num_gpus)}
    task = ray.remote(max_retries=RETRIES, **needs)(_train_share)
    running = {task.remote(list(share), str(Path.cwd()), flags): share for share in shares}
    logger.info("%d jobs are trained in %d tasks of Ray", sum(map(len, groups)), len(shares))
    failed, codes = dict[Path, str](), [0]
    try:
        while running:
            interrupts.check()
            for done in ray.wait([*running], timeout=_POLL_SECONDS)[0]:
                share = running.pop(done)
                try:
                    code, why = ray.get(done)
                except ray.exceptions.RayError as error:
                    said = printable(
                        str(getattr(error, "cause", None) or error).strip().splitlines()[-1], 500
                    )
                    code, why = 0, dict.fromkeys((each.output.output_dir for each in share), said)
                codes.append(code)
                failed |= why
    finally:
        for left in running:
            ray.cancel(left)
    return max(codes), failed


def _train_share(
    share: Sequence[DreamBoothConfig], folder: str, flags: dict[str, Any]
) -> tuple[int, dict[Path, str]]:
    """Train a share of the jobs in a worker, in the folder that their paths are of."""
    from ether_diffusion.training.jobs import train_groups

    os.chdir(folder)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    return train_groups([share], **flags)
