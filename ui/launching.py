"""Starting a trainer as a process that outlives whoever started it."""

import logging
import os
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import ether_diffusion
from ether_diffusion.training.run_lock import holder_of, write_holder
from ether_diffusion.ui.run_record import OUTPUT_NAME, PROCESS_NAME, new_wish, read_record, write_wish

NICENESS = 10
"""Added to a trainer's, so that the page and pictures in between stay quick."""

logger = logging.getLogger(__name__)


def launch(folder: Path) -> None:
    """Run the command in a session of its own, so that nothing that ends the server ends it."""
    command, wish = read_record(folder).command, new_wish(folder)
    if not Path(command[0]).exists():  # a Python that was replaced since
        command = [sys.executable, *command[1:]]
    write_wish(folder, wish)
    with (folder / OUTPUT_NAME).open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(),
            start_new_session=True,
        )
    write_holder(folder / PROCESS_NAME, holder_of(process.pid))
    with suppress(OSError, AttributeError):  # Windows has no such priorities
        own = os.getpriority(os.PRIO_PROCESS, 0)
        os.setpriority(os.PRIO_PROCESS, process.pid, min(own + NICENESS, 19))
    # a child that nobody waits for stays in the table of processes
    threading.Thread(target=process.wait, name=f"wait for {folder.name}", daemon=True).start()
    logger.info("training %s in process %d", folder.name, process.pid)


def _environment() -> dict[str, str]:
    """Return this process's variables; in a checkout, with the place that the package is found at."""
    root = Path(ether_diffusion.__file__).parent.parent
    variables = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if (root / "pyproject.toml").is_file():
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    return variables
