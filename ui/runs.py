"""Training runs of a studio: each a process of its own that needs no server, watched through its files."""

import logging
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ether_diffusion
from ether_diffusion.strict_json import Within
from ether_diffusion.tiny_world import ALIAS
from ether_diffusion.training.config.presets import PRESET_VALUES, PresetName
from ether_diffusion.training.run_lock import guarded, holder_of, write_holder
from ether_diffusion.ui.errors import disk_explained
from ether_diffusion.ui.library import Card, Library
from ether_diffusion.ui.requests import SEED
from ether_diffusion.ui.run_status import (
    GONE,
    LIBRARY_NAME,
    OUTPUT_NAME,
    PROCESS_NAME,
    REQUEST_NAME,
    WISH_NAME,
    LibraryEntry,
    Record,
    Run,
    Wanted,
    Wish,
    living_process,
    read_facts,
    write_facts,
)
from ether_diffusion.wording import printable

STEPS = Within(1, 100_000)
MAX_PROMPT_CHARACTERS = 1000
MAX_NAME_CHARACTERS = 60
TINY_WORLD_OPTIONS: Mapping[str, Any] = {"train_batch_size": 6, "random_flip": True}
"""What a subject of the embedded base is learned with, in the short presets."""
NICENESS = 10
"""Added to a trainer's, so that the page and pictures in between stay quick."""
_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainRequest:
    """A subject to be learned: photos that were checked, what it is ("dog"), and how long.

    `name` is what people call it, the subject if not given. `instance_prompt` may hold {token}; without it,
    it is made of token and subject. `steps` outranks the preset's number of updates. Without
    `validation_prompts` the instance prompt and the subject on a beach are drawn in between.

    Raises:
        ValueError: something cannot be used; all problems are said.
    """

    photos: tuple[Path, ...]
    subject: str
    name: str = ""
    token: str = "sks"
    instance_prompt: str = ""
    preset: PresetName = "fast"
    steps: int | None = None
    seed: int = 0
    validation_prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names, prompts = (self.subject, self.name), (self.instance_prompt, *self.validation_prompts)
        is_word = self.token.isprintable() and len(self.token.split()) == 1 and len(self.token) <= 32
        strange = [printable(text) for text in (*names, *prompts) if not text.isprintable()]
        *presets, last = PRESET_VALUES
        problems = {
            "there are no photos; add at least one, better four to ten": not self.photos,
            "the subject has no name; say what it is, as dog or teapot": not self.subject.strip(),
            "the trigger word must be one word of at most 32 characters, as sks": not is_word,
            f"{', '.join(strange)} holds control or invisible characters; type it again": strange,
            f"the name is longer than {MAX_NAME_CHARACTERS} characters; shorten it": (
                max(map(len, names)) > MAX_NAME_CHARACTERS
            ),
            f"a prompt is longer than {MAX_PROMPT_CHARACTERS} characters; shorten it": (
                max(map(len, prompts)) > MAX_PROMPT_CHARACTERS
            ),
            f"there is no preset {printable(self.preset)}; choose {', '.join(presets)} or {last}": (
                self.preset not in [*presets, last]
            ),
            f"{self.steps} steps are out of range; choose {STEPS.least} to {STEPS.most}": (
                self.steps is not None and not STEPS.holds(self.steps)
            ),
            f"the seed {self.seed} is out of range; choose {SEED.least} to {SEED.most}": (
                not SEED.holds(self.seed)
            ),
        }
        if any(problems.values()):
            raise ValueError("; ".join(sentence for sentence, is_one in problems.items() if is_one))

    @property
    def shown_name(self) -> str:
        """What people call it."""
        return self.name.strip() or self.subject.strip()

    def trigger(self, base: str) -> str:
        """Return the prompt that calls the subject."""
        return self._prompt(base).replace("{token}", self.token)

    def options(self, folder: Path, base: str) -> dict[str, Any]:
        """Return the options of train-dreambooth by name; its files lie in a run's folder."""
        preset, prompt, trigger = PRESET_VALUES[self.preset], self._prompt(base), self.trigger(base)
        options: dict[str, Any] = {
            "preset": self.preset,
            "pretrained_model_name_or_path": base,
            "instance_data_dir": folder / "photos",
            "token": self.token,
            "instance_prompt": prompt,
            "output_dir": folder / "run",
            "seed": self.seed,
        }
        if preset.get("prior_preservation") == "class_images":
            options["class_data_dir"] = folder / "class_images"
            options["class_prompt"] = prompt.replace("{token} ", "").replace("{token}", "thing")
        elif base == ALIAS:
            options |= TINY_WORLD_OPTIONS
        if self.steps is not None:
            often = max(1, self.steps // 4)
            options |= {
                "max_train_steps": self.steps,
                "checkpointing_steps": often,
                "validation_steps": often,
            }
        options["validation_prompt"] = self.validation_prompts or (trigger, f"{trigger} on the beach")
        return options

    def _prompt(self, base: str) -> str:
        """Return the instance prompt with {token} in it; a world of drawings has no photos of anything."""
        made = f"a {'' if base == ALIAS else 'photo of '}{{token}} {self.subject.strip()}"
        return self.instance_prompt.strip() or made


def train_command(request: TrainRequest, folder: Path, base: str) -> list[str]:
    """Return the command that trains: a program and its arguments, for no shell.

    Each value stands in one word with its flag, so that none is taken for a flag.
    """
    words = [sys.executable, "-m", "ether_diffusion.scripts.train_dreambooth"]
    for name, value in request.options(folder, base).items():
        for each in value if isinstance(value, tuple) else [value]:
            words.append(f"--{name}" if each is True else f"--{name}={each}")
    return words


class Runs:
    """The runs in a folder; `temp` takes photos until a run has its own copies, and `base` is learned on.

    Any number of servers may look after one folder: what is known lies on disk. Wherever an id is given:
    FileNotFoundError where there is no such run, or no longer. Whatever writes raises ValueError where the
    disk is full.
    """

    def __init__(self, root: Path, temp: Path, *, base: str) -> None:
        self.root, self.temp = root, temp
        self.photos = temp / "photos"
        # a run that goes on later may be started from another working directory
        self.base = str(Path(base).resolve()) if Path(base).is_dir() else base

    def ids(self) -> list[str]:
        """Return the ids of all runs, the newest first."""
        found = (path.name for path in self.root.glob("*") if _ID.fullmatch(path.name) and path.is_dir())
        return sorted(found, reverse=True)

    def status(self, run_id: str) -> Run:
        """Return how a run stands now.

        Raises:
            ValueError: its request is damaged.
        """
        return Run(self._folder(run_id))

    def all(self) -> list[Run]:
        """Return how all runs stand, the newest first; those whose request is damaged are left out."""
        found = []
        for run_id in self.ids():
            with suppress(FileNotFoundError, ValueError):
                found.append(Run(self.root / run_id))
        return found

    def start(self, request: TrainRequest) -> str:
        """Start a run in a process of its own and return its id.

        Raises:
            ValueError: another run is training, or a photo is none that was checked here.
        """
        own = self.temp.resolve()
        if not all(photo.resolve().is_relative_to(own) for photo in request.photos):
            raise ValueError("there is a photo that was not uploaded here; add the photos again")
        gone = [photo for photo in request.photos if not photo.is_file()]
        if gone:
            raise ValueError(
                f"{len(gone)} of {len(request.photos)} photos are gone, as uploads are kept for a while; "
                "add them again"
            )
        now = datetime.now(UTC)
        folder = self.root / f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        with ExitStack() as held:
            held.enter_context(disk_explained(self.root, "starting the training"))
            self.root.mkdir(parents=True, exist_ok=True)
            held.enter_context(guarded(self.root))
            self._check_alone()
            try:
                self._prepare(folder, request, now)
                _launch(folder)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        return folder.name

    def stop(self, run_id: str, *, wanted: Wanted = "stopped") -> None:
        """Ask a run to save and end. Asked again, it ends at once; asked a third time, it is killed.

        Raises:
            ValueError: its process is on another machine.
        """
        folder = self._folder(run_id)
        with disk_explained(folder, "stopping the training"), guarded(self.root):
            process, wish = living_process(folder), read_facts(folder / WISH_NAME, Wish) or Wish()
            if process is None and wish.wanted != "paused":  # it ended by itself just now
                return
            if process is not None and not process.is_here:
                raise ValueError(f"this run is trained on {printable(process.host)}; stop it there")
            asked = wish.asked + (process is not None)
            write_facts(folder, WISH_NAME, wish.model_copy(update={"wanted": wanted, "asked": asked}))
        if process is not None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL if asked > 2 else signal.SIGINT)

    def pause(self, run_id: str) -> None:
        """Ask a run to save and end, meaning to go on; errors are as `stop`'s."""
        self.stop(run_id, wanted="paused")

    def resume(self, run_id: str) -> None:
        """Go on with a run that ended before its last step, by the same command.

        Raises:
            ValueError: it is training or finished, or another one is training.
        """
        folder = self._folder(run_id)
        with disk_explained(folder, "going on with the training"), guarded(self.root):
            run = Run(folder)
            if run.process is not None:
                raise ValueError(f"{run.name} is training already")
            if run.state == "finished":
                raise ValueError(f"{run.name} is finished; there is nothing to go on with")
            self._check_alone()
            _launch(folder)

    def adopt(self, run_id: str, library: Library) -> Card:
        """Put the adapter that a finished run made into a library, once however often it is asked for.

        Raises:
            ValueError: it is not finished.
        """
        folder = self._folder(run_id)
        with disk_explained(folder, "keeping the adapter"), guarded(self.root):
            run = Run(folder)
            if run.adapter is None:
                raise ValueError(f"{run.name} is not finished; wait for its last step")
            if run.library_id is not None:
                with suppress(FileNotFoundError):  # deleted from the library since
                    return library.card(run.library_id)
            card = library.add_run_result(run.adapter, run.name)
            write_facts(folder, LIBRARY_NAME, LibraryEntry(id=card.id))
            return card

    def delete(self, run_id: str) -> None:
        """Delete a run with its photos, pictures and checkpoints.

        Raises:
            ValueError: it is training.
        """
        folder = self._folder(run_id)
        aside = folder.with_name(f".{folder.name}.deleted")
        with disk_explained(folder, "deleting the run"), guarded(self.root):
            if living_process(folder) is not None:
                raise ValueError("this run is training; stop it first")
            folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)

    def _prepare(self, folder: Path, request: TrainRequest, now: datetime) -> None:
        (folder / "photos").mkdir(parents=True)
        for number, photo in enumerate(request.photos, 1):
            shutil.copyfile(photo, folder / "photos" / f"photo-{number:03d}{photo.suffix}")
        options = PRESET_VALUES[request.preset] | request.options(folder, self.base)
        record = Record(
            name=printable(request.shown_name),
            trigger=request.trigger(self.base),
            num_steps=options["max_train_steps"],
            batch_size=options["train_batch_size"],
            command=train_command(request, folder, self.base),
            created=now.timestamp(),
        )
        write_facts(folder, REQUEST_NAME, record)

    def _check_alone(self) -> None:
        """Refuse a second training: two share the memory and are both slower."""
        for folder in map(self._folder, self.ids()):
            if living_process(folder) is not None:
                record = read_facts(folder / REQUEST_NAME, Record)
                name = "another subject" if record is None else record.name
                raise ValueError(
                    f"{name} is being trained, and one training runs at a time; wait for it, or pause it"
                )

    def _folder(self, run_id: str) -> Path:
        folder = self.root / run_id
        if not _ID.fullmatch(run_id) or not folder.is_dir():
            raise FileNotFoundError(GONE)
        return folder


def _launch(folder: Path) -> None:
    """Run a run's command in a session of its own, so that nothing that ends the server ends it."""
    command, output = Run(folder).command, folder / OUTPUT_NAME
    if not Path(command[0]).exists():  # a Python that was replaced since
        command = [sys.executable, *command[1:]]
    written = output.stat().st_size if output.exists() else 0
    write_facts(folder, WISH_NAME, Wish(began=time.time(), output_from=written))
    variables, root = {**os.environ, "PYTHONUNBUFFERED": "1"}, Path(ether_diffusion.__file__).parent.parent
    if (root / "pyproject.toml").is_file():  # a checkout is found where it is
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    with output.open("ab") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=variables,
            start_new_session=True,
        )
    write_holder(folder / PROCESS_NAME, holder_of(process.pid))
    with suppress(OSError, AttributeError):  # Windows has no such priorities
        own = os.getpriority(os.PRIO_PROCESS, 0)
        os.setpriority(os.PRIO_PROCESS, process.pid, min(own + NICENESS, 19))
    # a child that nobody waits for stays in the table of processes
    threading.Thread(target=process.wait, name=f"wait for {folder.name}", daemon=True).start()
    logger.info("training %s in process %d", folder.name, process.pid)
