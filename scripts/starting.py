"""What a command does before it imports torch."""

import gc
import logging
import os


def start_command() -> None:
    """Let a process share its cores with others, and start quickly; a command calls it first of all.

    OpenMP's threads wait for each other by spinning, unless OMP_WAIT_POLICY says otherwise when torch is
    loaded: beside a busy neighbour they spin for whole time slices. What the user has set stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # importing makes many objects and no garbage: at Python's threshold of 700 a seventh of it is collecting
    gc.set_threshold(100_000, 50, 100)
    # as diffusers is imported, transformers says that torchvision is missing, which nothing here uses
    logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)
