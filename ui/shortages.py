"""What the disk refuses, in sentences for the page: full, read-only, gone."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_CLOSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


@contextmanager
def disk_explained(folder: Path, doing: str) -> Iterator[None]:
    """Turn a full disk and missing rights inside `folder` into a ValueError; `doing` is what was tried.

    The message names no path: it is shown in a page.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise ValueError(
                f"the disk is full, so that {doing} was not possible ({_free_mib(folder)}); nothing was "
                "changed: free some space and try again"
            ) from error
        if error.errno in _CLOSED:
            raise ValueError(
                f"the studio's folder cannot be written to, so that {doing} was not possible; change its "
                "rights, or start with another --folder"
            ) from error
        raise


def _free_mib(folder: Path) -> str:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 2**20:.1f} MiB are free"
