"""The studio's work: a folder with adapters, pictures and training runs, and what draws and trains in it."""

import gc
import logging
import threading
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from ether_diffusion.bases.found import FoundBase, find_bases
from ether_diffusion.console import give_memory_back
from ether_diffusion.tiny_world import (
    SECOND_ALIAS,
    control_adapter_path,
    embedded_name,
    fox_adapter_path,
    world_of,
)
from ether_diffusion.tiny_world.concepts import Concept, trained_concepts
from ether_diffusion.ui.engine import Engine
from ether_diffusion.ui.library import Library
from ether_diffusion.ui.runs import Runs
from ether_diffusion.ui.words import disk_explained
from ether_diffusion.wording import printable

logger = logging.getLogger(__name__)

ADAPTERS, OUTPUTS, RUNS, TEMP = "adapters", "outputs", "runs", "temp"
SHIPPED, EXAMPLE = "Shapes", "Example fox"  # what the shipped adapters are called


class Studio:
    """Everything that a page offers, without the page; nobody else may read `temp`.

    `reading` is held while an upload is decoded, as the largest photo that is taken needs 1.4 GB meanwhile.
    """

    def __init__(
        self, folder: Path, *, base: str = SECOND_ALIAS, temp: Path | None = None, is_shared: bool = False
    ) -> None:
        """Open a studio in a folder, which is made where there is none; `temp` is inside it if not given.

        Visitors of one that `is_shared` open only the bases that are found: no path or hub id of theirs.
        """
        self.folder = folder.expanduser().absolute()
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file; name a folder for the studio")
        self.reading, self.temp = threading.Lock(), temp or self.folder / TEMP
        self.is_shared, self._own_base, self._opening = is_shared, base, threading.Lock()
        self.engine = self._engine_of(base)
        with disk_explained(self.folder, "opening the studio"):
            for name in (ADAPTERS, OUTPUTS, RUNS):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            self.temp.mkdir(exist_ok=True, mode=0o700)
            self.temp.chmod(0o700)
        self.library = Library(self.folder / ADAPTERS, self.temp, self.engine.base)
        self.history = self.engine.outputs
        self.runs = Runs(self.folder / RUNS, self.temp, base=base, turn=self._beside_drawing)

    def _engine_of(self, base: str) -> Engine:
        return Engine(
            base, outputs=self.folder / OUTPUTS, check_free=self._check_free,
            folder_of=lambda adapter: self.library.folder(adapter),
            name_of=lambda adapter: self.library.card(adapter).name,
        )  # fmt: skip

    @property
    def is_toy(self) -> bool:
        """Whether the base is an embedded one."""
        return embedded_name(self.engine.base.folder) is not None

    @property
    def has_examples(self) -> bool:
        """Whether what is shipped, adapters and pictures, was made for the base."""
        return embedded_name(self.engine.base.folder) == SECOND_ALIAS

    @property
    def known(self) -> tuple[Concept, ...]:
        """What an embedded base draws."""
        return trained_concepts(world_of(embedded_name(self.engine.base.folder)))

    def doubts(self, prompts: Sequence[str], adapters: Collection[str]) -> list[str]:
        """Say which prompts the embedded base alone knows nothing of."""
        known = [concept.name.removesuffix("y") for concept in self.known]  # strawberries, too
        asked = prompts if self.is_toy and not adapters else ()
        strange = [p for p in asked if p.strip() and not any(name in p.casefold() for name in known)]
        draws = f"draws {len(known)} things, as a cat, an apple or a rocket, and nothing else"
        return [
            f"“{printable(prompt, 60)}” names nothing that this base knows: it {draws}." for prompt in strange
        ]

    def bases(self) -> dict[str, FoundBase]:
        """Return the bases that lie on this machine by what they are called: names, and of paths the end."""
        found, own = find_bases(), Path(self._own_base)
        if own.exists():
            found.append(FoundBase(str(own), "as the studio began", 0))
        return {Path(each.name).name if Path(each.name).is_absolute() else each.name: each for each in found}

    def open_base(self, name: str) -> None:
        """Draw with and train for another base: the one before is freed, and adapters are looked at anew.

        It is one of `bases()`; or a path or a hub id, where the studio is not shared. A job that runs keeps
        the base: ValueError, as where there is none.
        """
        known = self.bases()
        if self.is_shared and name not in known:
            raise ValueError("there is no such base here; choose one of those offered")
        if not self._opening.acquire(blocking=False):
            raise ValueError("another base is being opened; wait until it is there")
        try:
            self._check_idle()
            try:
                wanted = known[name].name if name in known else name
                wanted = str(Path(wanted).expanduser()) if wanted.startswith("~") else wanted
                engine = self._engine_of(wanted)
            except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
                why = printable(str(error).splitlines()[0], 300)
                raise ValueError(f"“{printable(name, 80)}” cannot be opened: {why}") from None
            self._check_idle()  # a download takes long
            self.engine = engine
            self.library.use(engine.base)
            self.runs.base = wanted
        finally:
            self._opening.release()
        gc.collect()
        give_memory_back()

    def _check_idle(self) -> None:
        busy = ["pictures are being drawn"] * (not self.engine.line.is_free)
        busy += [f"“{run.name}” is training" for run in self.runs.all() if run.process is not None]
        if busy:
            raise ValueError(f"{busy[0]}; wait until that is done, or stop it, and open the base then")

    def add_shipped(self) -> None:
        """Put what is shipped for its base into the library: what fills drawn shapes, and a fox."""
        if self.has_examples:
            self.library.add_run_result(control_adapter_path(), SHIPPED)
            self.library.add_run_result(fox_adapter_path(), EXAMPLE)

    def close(self) -> None:
        """Stop what is being drawn; training goes on."""
        self.engine.close()

    def keep_finished(self) -> list[str]:
        """Put what finished runs made into the library, once each; return the ids of what is new there.

        What waited for their end is started. A run whose adapter cannot be read, or for which the disk has no
        room, is left for later.
        """
        new = []
        if self.engine.line.is_free:
            self.runs.advance()
        for run in self.runs.all():
            if run.adapter is not None and run.library_id is None:
                try:
                    new.append(self.runs.adopt(run.id, self.library).id)
                except (ValueError, FileNotFoundError) as error:
                    logger.warning("%s is not in the library yet: %s", run.name, error)
        return new

    def _beside_drawing(self, waits: bool) -> AbstractContextManager[None]:
        """Keep pictures off the accelerator, once those in work are done; refuse, where it shall not wait."""
        if self.engine.device.type == "cpu":
            return nullcontext()
        if not waits and not self.engine.line.is_free:
            drawing = "pictures are being drawn on the accelerator"
            raise ValueError(f"{drawing}; wait until they are done, or stop them, and start again")
        return self.engine.line.turn()

    def _check_free(self, device: torch.device) -> None:
        """Let pictures be drawn beside training on the CPU, where it yields; an accelerator has no room."""
        training = [run.name for run in self.runs.all() if run.state in ("starting", "running")]
        if training and device.type != "cpu":
            remedy = "wait until it is done, or pause it"
            raise ValueError(f"“{training[0]}” is training on the accelerator; {remedy}")
