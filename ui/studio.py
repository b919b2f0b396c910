"""The studio's work: a folder with adapters, pictures and training runs, and what draws and trains in it."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ether_diffusion.tiny_world import control_adapter_path, tiny_world_path
from ether_diffusion.ui.engine import Engine
from ether_diffusion.ui.jobs import StopToken
from ether_diffusion.ui.library import Library
from ether_diffusion.ui.runs import Runs, TrainRequest
from ether_diffusion.ui.words import disk_explained

logger = logging.getLogger(__name__)

ADAPTERS, OUTPUTS, RUNS, TEMP = "adapters", "outputs", "runs", "temp"
SHIPPED = "Shapes"  # what the shipped control adapter is called


class Studio:
    """Everything that a page offers, without the page; nobody else may read `temp`.

    `reading` is held while an upload is decoded, as the largest photo that is taken needs 1.4 GB meanwhile.
    """

    def __init__(self, folder: Path, *, base: str = "tiny_world", temp: Path | None = None) -> None:
        """Open a studio in a folder, which is made where there is none; `temp` is inside it if not given."""
        self.folder = folder.expanduser().absolute()
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file; name a folder for the studio")
        self.reading, self.temp = threading.Lock(), temp or self.folder / TEMP
        self.engine = Engine(
            base,
            outputs=self.folder / OUTPUTS,
            folder_of=lambda adapter_id: self.library.folder(adapter_id),
            name_of=lambda adapter_id: self.library.card(adapter_id).name,
            check_free=self._check_free,
        )
        with disk_explained(self.folder, "opening the studio"):
            for name in (ADAPTERS, OUTPUTS, RUNS):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            self.temp.mkdir(exist_ok=True, mode=0o700)
            self.temp.chmod(0o700)
        self.library = Library(self.folder / ADAPTERS, self.temp, self.engine.base)
        self.history = self.engine.outputs
        self.runs = Runs(self.folder / RUNS, self.temp, base=base)

    def add_shipped(self) -> None:
        """Put what is shipped for the embedded base into the library: an adapter that fills drawn shapes."""
        if self.engine.base.folder.resolve() == tiny_world_path().resolve():
            self.library.add_run_result(control_adapter_path(), SHIPPED)

    def close(self) -> None:
        """Stop what is being drawn; training goes on."""
        self.engine.close()

    def train(self, request: TrainRequest) -> str:
        """Start a training run and return its id, where no pictures are being drawn on the accelerator."""
        with self._accelerator_free():
            return self.runs.start(request)

    def resume(self, run_id: str) -> None:
        """Go on with a training run, as `train`."""
        with self._accelerator_free():
            self.runs.resume(run_id)

    def keep_finished(self) -> list[str]:
        """Put what finished runs made into the library, once each; return the ids of what is new there.

        A run whose adapter cannot be read, or for which the disk has no room, is left for later.
        """
        new = []
        for run in self.runs.all():
            if run.adapter is not None and run.library_id is None:
                try:
                    new.append(self.runs.adopt(run.id, self.library).id)
                except (ValueError, FileNotFoundError) as error:
                    logger.warning("%s is not in the library yet: %s", run.name, error)
        return new

    @contextmanager
    def _accelerator_free(self) -> Iterator[None]:
        """Keep pictures from being drawn while a run starts on the same accelerator."""
        if self.engine.device.type == "cpu":
            yield
        elif not self.engine.is_free:
            drawing = "pictures are being drawn on the accelerator"
            raise ValueError(f"{drawing}; wait until they are done, or stop them, and start again")
        else:
            with self.engine.line.turn(StopToken()):
                yield

    def _check_free(self, device: torch.device) -> None:
        """Let pictures be drawn beside training on the CPU, where it yields; an accelerator has no room."""
        training = [run.name for run in self.runs.all() if run.state in ("starting", "running")]
        if training and device.type != "cpu":
            raise ValueError(
                f"{training[0]} is training on the accelerator; wait until it is done, or pause it"
            )
