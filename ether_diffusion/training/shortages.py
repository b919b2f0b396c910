"""Running out of memory or disk, in sentences on what to lower or free."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ether_diffusion.console import ran_short
from ether_diffusion.wording import printable

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
MIB = 2**20


@contextmanager
def shortages_explained(folder: Path) -> Iterator[None]:
    """Turn a lack of memory, or of space in a run's folder, into a ValueError on what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not ran_short(error):
            raise
        text = str(error).splitlines()[0][:200] if str(error) else "MemoryError"
        raise ValueError(
            f"memory ran out ({text}); the last checkpoint is kept. Try --gradient_checkpointing, "
            "--mixed_precision bf16, a smaller --train_batch_size with more --gradient_accumulation_steps, "
            "or a lower --resolution, with --allow_changes to go on so; --dry_run shows what it takes"
        ) from error
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise ValueError(f"memory ran out ({error}); the last checkpoint is kept") from error
        if error.errno not in NO_SPACE:
            raise
        raise ValueError(
            f"{error.strerror}, with {_free(folder) / MIB:.1f} MiB free in {printable(folder)}; the "
            "checkpoints in it are whole: free some space, and the same command goes on from the newest"
        ) from error


def check_space(folder: Path, num_bytes: int) -> None:
    """Refuse a run whose next checkpoint and result do not fit.

    Raises:
        ValueError: there is less space than they need.
    """
    free = _free(folder)
    if free < num_bytes:
        raise ValueError(
            f"a checkpoint and the result need {num_bytes / MIB:.1f} MiB in {printable(folder)}, and "
            f"{free / MIB:.1f} MiB are free; free some, or give another --output_dir"
        )


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free
