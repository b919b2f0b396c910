"""Training runs of a studio: each a process of its own that needs no server, known from its files alone."""

import json
import logging
import math
import os
import re
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, Field

import ether_diffusion
from ether_diffusion.adapters.format import CARD_NAME, CONFIG_NAME, TENSORS_NAME
from ether_diffusion.benchmark.plan import advise, read_curves
from ether_diffusion.durable_files import write_files
from ether_diffusion.options import OptionsError, declared
from ether_diffusion.scripts.train_dreambooth import CallFlags, parse_flags
from ether_diffusion.strict_json import StrictModel, checked, read_json
from ether_diffusion.tiny_world import EMBEDDED
from ether_diffusion.training import run_lock
from ether_diffusion.training.checkpoint import MANIFEST
from ether_diffusion.training.config import DreamBoothConfig
from ether_diffusion.training.config.presets import PRESET_VALUES, PresetName, stack
from ether_diffusion.training.result import EVALUATION_NAME, SAMPLES_FOLDER
from ether_diffusion.training.run_folder import LOG_NAME
from ether_diffusion.training.validation import BASE_FOLDER
from ether_diffusion.ui.library import MAX_SECONDS, Card, Library
from ether_diffusion.ui.words import disk_explained
from ether_diffusion.wording import listed, printable

REQUEST_NAME, WISH_NAME, LIBRARY_NAME = "request.json", "wish.json", "library.json"
PROCESS_NAME, OUTPUT_NAME, JOBS_NAME = "process.json", "output.log", "jobs.json"
GONE = "this run is no longer in the studio: its folder was deleted; refresh the page"
MAX_PROMPT, MAX_NAME, MAX_STEPS = 1000, 60, 100_000
MAX_POINTS, MAX_CHECKPOINTS = 300, 8  # of a plotted loss, and of a run
TINY_WORLD_OPTIONS: Mapping[str, Any] = {"train_batch_size": 6, "random_flip": True}
"""What a subject of the embedded base is learned with, in the short presets."""
DECLARED = DreamBoothConfig.options()
SETTINGS = (
    "token", "max_train_steps", "seed", "instance_prompt", "validation_prompt", "adapter", "learning_rate",
    "num_blocks", "rank", "target_modules", "train_text_encoder", "train_batch_size", "resolution",
    "random_flip", "center_crop", "use_aspect_ratio_buckets", "caption_dropout", "snr_gamma", "use_ema",
    "gradient_checkpointing",
)  # fmt: skip
"""Options of train-dreambooth that a visitor may give: none of them names a file or reaches a network."""
NICENESS = 10  # added to a trainer's, so that the page and pictures in between stay quick
Preset = Literal["advised", PresetName]
MAX_TOGETHER = 8  # runs that wait and are trained by one process, then
State = Literal["queued", "starting", "running", "paused", "stopped", "crashed", "finished"]
Wanted = Literal["queued", "running", "paused", "stopped"]
_RESULT = (CONFIG_NAME, TENSORS_NAME, CARD_NAME)  # what a finished run has; the card is written last
_SECONDS_UNTIL_FORGOTTEN, _TAIL_BYTES, _PACE_STEPS = 600, 16 * 2**10, 50
_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")
_ERROR_LINE = re.compile(r"(?:\w+\.)*(?P<kind>\w*(?:Error|Exception|Interrupt))(?:: (?P<text>.*))?")
_PROGRAM = "train-dreambooth: "
_TRAINER = (sys.executable, "-m", "ether_diffusion.scripts.train_dreambooth")
_ENDING = ("--max_train_steps=", "--stop_when_good", "--allow_changes")
_STOPPED = re.compile(r"stopped by SIG(?:INT|TERM);")
M = TypeVar("M", bound=StrictModel)
logger = logging.getLogger(__name__)


@checked()
class TrainRequest:
    """A subject to be learned: photos that were checked, what it is ("dog"), and how long.

    `name` is what people call it. `settings` outrank the preset; "advised" is what `ether plan` advises.
    """

    photos: tuple[Path, ...]
    subject: str
    name: str = ""
    preset: Preset = "advised"
    settings: Mapping[str, Any] = Field(default_factory=dict)
    captions: tuple[str, ...] = ()  # of the photos in their order; "" where one has none

    def __post_init__(self) -> None:
        assert self.settings.keys() <= {*SETTINGS}
        names, own = (self.subject, self.name), self.settings.get("instance_prompt", "")
        prompts = (own, *self.captions, *self.settings.get("validation_prompt", ()))
        is_word = self.token.isprintable() and len(self.token.split()) == 1 and len(self.token) <= 32
        is_common = self.token.casefold() in self.subject.casefold().split()
        steps = self.settings.get("max_train_steps", 1)
        strange = [printable(text) for text in (*names, *prompts) if not text.isprintable()]
        most = {"name": (names, MAX_NAME), "prompt": (prompts, MAX_PROMPT)}
        long = [f"a {what} is longer than {n} characters; shorten it" for what, (texts, n) in most.items()
                if max(map(len, texts)) > n]  # fmt: skip
        problems = {
            "there are no photos; add at least one, better four to ten": not self.photos,
            "the subject has no name; say what it is, as dog or teapot": not self.subject.strip(),
            "the trigger word must be one word of at most 32 characters, as sks": not is_word,
            f"the trigger word is what it is, {printable(self.token)}; choose a rare one, as sks": is_common,
            "the prompt of the photos has no {token} in it, so that nothing would call the subject": (
                own and "{token}" not in own and self.token not in own
            ),
            f"Steps {steps} is out of range; use up to {MAX_STEPS}": steps > MAX_STEPS,
            f"{', '.join(strange)} holds control or invisible characters; type it again": strange,
            "; ".join(long): long,
        }
        if any(problems.values()):
            raise ValueError("; ".join(sentence for sentence, is_one in problems.items() if is_one))

    @property
    def token(self) -> str:
        """The word that calls the subject."""
        return str(self.settings.get("token", "sks"))

    def trigger(self, base: str) -> str:
        """Return the prompt that calls the subject."""
        return self._prompt(base).replace("{token}", self.token)

    def options(self, folder: Path, base: str) -> dict[str, Any]:
        """Return the options of train-dreambooth by name; its files lie in a run's folder."""
        prompt, trigger = self._prompt(base), self.trigger(base)
        options: dict[str, Any] = {
            "pretrained_model_name_or_path": base, "token": self.token, "instance_prompt": prompt,
            "instance_data_dir": folder / "photos", "output_dir": folder / "run", "seed": 0,
            "validation_prompt": (trigger, f"{trigger} on the beach"),
        }  # fmt: skip
        advised = preset_values(self.preset, len(self.photos), base)
        options |= advised if self.preset == "advised" else {"preset": self.preset}
        if advised.get("prior_preservation") == "class_images":
            options["class_data_dir"] = folder / "class_images"
            options["class_prompt"] = prompt.replace("{token} ", "").replace("{token}", "thing")
        elif base in EMBEDDED and self.preset != "advised":
            options |= TINY_WORLD_OPTIONS
        options |= {**self.settings, "instance_prompt": prompt}
        often = max(1, options.get("max_train_steps", advised["max_train_steps"]) // 4)
        options |= dict.fromkeys(("checkpointing_steps", "validation_steps"), often)
        options["checkpoints_total_limit"] = MAX_CHECKPOINTS  # what was drawn of can be used
        if base in EMBEDDED:  # which have an encoder of their own to measure by
            options |= {"eval_steps": often, "stop_when_good": True}
        return options

    def config(self, folder: Path, base: str) -> DreamBoothConfig:
        """Return the configuration that the options make; what cannot be used is a ValueError."""
        options = self.options(folder, base)
        values = PRESET_VALUES[options.pop("preset")] if "preset" in options else {}
        try:
            return DreamBoothConfig.from_flat(stack(values, options))
        except OptionsError as error:
            raise ValueError("; ".join(map(in_labels, error.problems))) from None

    def _prompt(self, base: str) -> str:
        """Return the instance prompt with {token} in it; a world of drawings has no photos of anything."""
        made = f"a {'' if base in EMBEDDED else 'photo of '}{{token}} {self.subject.strip()}"
        return str(self.settings.get("instance_prompt", "")).strip() or made


def in_labels(sentence: str) -> str:
    """Return a sentence on an option with the label that the page has for it."""
    name, sign, rest = sentence.partition("=")
    name, sign, rest = (name, " ", rest) if sign else sentence.partition(" ")
    return f"{DECLARED[name].label}{sign}{rest}" if name in DECLARED else sentence


@lru_cache
def preset_values(preset: Preset, num_photos: int, base: str) -> Mapping[str, Any]:
    """Return what a preset sets, as options of train-dreambooth."""
    if preset != "advised":
        return PRESET_VALUES[preset]
    advice = advise(max(1, num_photos), base, read_curves())
    return {"adapter": advice.method, "learning_rate": advice.learning_rate, **advice.options}


def train_command(request: TrainRequest, folder: Path, base: str) -> list[str]:
    """Return the command that trains, for no shell; each value shares a word with its flag."""
    words = [*_TRAINER]
    for name, value in request.options(folder, base).items():
        for each in value if isinstance(value, tuple) else [value]:
            words.append(f"--{name}" if each is True else f"--{name}={each}")
    return words


class Record(StrictModel):
    """What a run was asked to do; it never changes. `batch_size` counts the images of an update."""

    name: str
    trigger: str
    num_steps: int
    batch_size: int
    command: list[str]
    created: Annotated[float, Field(ge=0, le=MAX_SECONDS)]


class Wish(StrictModel):
    """What is wanted of a run, since its process began."""

    wanted: Wanted = "running"
    asked: int = 0  # how often it was asked to end
    began: float = 0.0  # in seconds since 1970
    output_from: int = 0  # where in the output's file (bytes) the process began to write
    together: bool = False  # whether the process trains others, too


class LibraryEntry(StrictModel):
    """As what a run's adapter is, or was, in the library."""

    id: str


class LogLine(BaseModel):
    """One update: its number from 1, its loss (None where it overflowed), images per second."""

    step: int
    loss: float | None
    images_per_second: float


class Run:
    """How the run in a folder stands: every fact is read from its files once, when it is asked for."""

    def __init__(self, folder: Path) -> None:
        record = read_facts(folder / REQUEST_NAME, Record)
        if record is None:
            if not folder.is_dir():
                raise FileNotFoundError(GONE)
            lost = f"the run {folder.name} has lost its {REQUEST_NAME}, so that it cannot go on"
            raise ValueError(f"{lost}; delete it and train again")
        self.folder, self.output, self.id, self.record = folder, folder / "run", folder.name, record
        self.name, self.trigger, self.num_steps = record.name, record.trigger, record.num_steps
        self.created, self.command = datetime.fromtimestamp(record.created, UTC), record.command
        self.wish = read_facts(folder / WISH_NAME, Wish) or Wish()
        self.process = living_process(folder)
        if self.wish.together and self._has_trained and run_lock.current_holder(self.output) is None:
            self.process = None  # it trains the others

    @property
    def base(self) -> str | None:
        """The base that it is trained on, as its command says."""
        return next((word for word in self.command if word.startswith("--pretrained_model")), None)

    @property
    def _has_trained(self) -> bool:
        log = self.output / LOG_NAME
        return log.is_file() and log.stat().st_size > 0 and log.stat().st_mtime >= self.wish.began

    @property
    def library_id(self) -> str | None:
        """Names the adapter in the library, once it was put there."""
        entry = read_facts(self.folder / LIBRARY_NAME, LibraryEntry)
        return None if entry is None else entry.id

    @cached_property
    def state(self) -> State:
        if self.process is not None:
            return "running" if self._has_trained else "starting"
        if all((self.output / name).is_file() for name in _RESULT):
            return "finished"
        if self.wish.wanted != "running":
            return self.wish.wanted
        return "stopped" if any(_STOPPED.search(line) for line in self.tail[-3:]) else "crashed"

    @property
    def can_stop(self) -> bool:
        return self.process is not None or self.state in ("paused", "queued")

    @property
    def can_pause(self) -> bool:
        return self.process is not None and self.wish.asked == 0

    @property
    def can_resume(self) -> bool:
        return self.process is None and self.state not in ("finished", "queued")

    @property
    def adapter(self) -> Path | None:
        """The result's folder, once there is one."""
        return self.output if self.state == "finished" else None

    @cached_property
    def saved_steps(self) -> list[int]:
        """After which updates there are whole checkpoints."""
        whole = (path.parent.name[11:] for path in self.output.glob(f"checkpoint-*/{MANIFEST}"))
        return sorted(int(number) for number in whole if number.isdecimal())

    @property
    def saved_step(self) -> int:
        """The updates of the newest whole checkpoint; 0 where there is none."""
        return max(self.saved_steps, default=0)

    @property
    def can_use(self) -> bool:
        """Whether there is an adapter, be it of a run that ended early."""
        return self.adapter is not None or (self.process is None and self.saved_step > 0)

    @cached_property
    def lines(self) -> list[LogLine]:
        """The whole lines of the trainer's log; one that a crash cut off is passed over."""
        lines = []
        with suppress(OSError):
            for text in (self.output / LOG_NAME).read_bytes().splitlines():
                with suppress(ValueError):
                    lines.append(LogLine.model_validate_json(text))
        return lines

    @property
    def step(self) -> int:
        return self.lines[-1].step if self.lines else 0

    @property
    def losses(self) -> list[tuple[int, float]]:
        """At most MAX_POINTS means of the loss over equal stretches, at each stretch's last step."""
        known = [(line.step, line.loss) for line in self.lines if line.loss is not None]
        width = max(1, math.ceil(len(known) / MAX_POINTS))
        stretches = [known[start : start + width] for start in range(0, len(known), width)]
        return [(part[-1][0], statistics.fmean(loss for _, loss in part)) for part in stretches]

    @cached_property
    def samples(self) -> list[tuple[int, Path]]:
        """The pictures with the updates that they were drawn after, several of a step by their names."""
        found = self.output.glob(f"{SAMPLES_FOLDER}/step-*/[!.]*.png")
        return sorted((int(n), path) for path in found if (n := path.parent.name[5:]).isdecimal())

    @property
    def base_samples(self) -> list[Path]:
        """The same pictures by the base."""
        return sorted(self.output.glob(f"{SAMPLES_FOLDER}/{BASE_FOLDER}/[!.]*.png"))

    @cached_property
    def verdict(self) -> tuple[str, str]:
        """What was measured of a finished run, in a word and a sentence; nothing where nothing was."""
        try:
            found = json.loads((self.output / EVALUATION_NAME).read_bytes())
            means = {
                p["step"]: (float(p["fidelity"]["mean"]), float(p["drift"]["mean"])) for p in found["curve"]
            }
            (base, _), best = means[0], found["best_step"]
            likeness, drift = means[best or 0]
        except (OSError, ValueError, KeyError, TypeError):
            return "", ""
        measured = f"likeness to the photos {likeness:.2f} at step {best} (the base {base:.2f})"
        if best and likeness > base:
            return "Learned", f"{measured}, drift of other pictures {drift:.2f}."
        is_toy = any(f"--pretrained_model_name_or_path={name}" in self.command for name in EMBEDDED)
        real = " This base draws drawings only: for photographs of real things, change the base." * is_toy
        why = f"{measured}." if best else "no step kept the base's other pictures and the prompts."
        return "Not learned", why + real

    @property
    def images_per_second(self) -> float | None:
        """The pace of its last updates."""
        rates = [line.images_per_second for line in self.lines[-_PACE_STEPS:] if line.images_per_second > 0]
        return statistics.median(rates) if rates else None

    @property
    def seconds_left(self) -> float | None:
        """How long the updates that are left take: by the pace between two pictures, or of the last ones."""
        if self.state != "running" or not self.lines:
            return None
        left = max(0, self.num_steps - self.step)
        times = {step: path.stat().st_mtime for step, path in reversed(self.samples)}
        drawn = sorted(step for step, written in times.items() if written >= self.wish.began)
        if len(drawn) >= 2:
            return left * (times[drawn[-1]] - times[drawn[0]]) / (drawn[-1] - drawn[0])
        rate = self.images_per_second
        return left * self.record.batch_size / rate if rate else None

    @cached_property
    def sentence(self) -> str:
        """How it stands, in words, with what can be done."""
        state, step, of = self.state, self.step, self.num_steps
        if state in ("starting", "running") and self.wish.asked:
            is_pause = self.wish.wanted == "paused"
            verb, press = ("Pausing", "Press Stop") if is_pause else ("Stopping", "Press Stop again")
            return f"{verb}: the step in progress is finished and saved. {press} to end it at once."
        training = f"Training, step {step} of {of}."
        going_on: dict[State, str] = {
            "queued": "Waiting: it begins when the training in progress ends, with all that waits by then.",
            "starting": self._starting,
            "running": training if step < of else "Drawing the last pictures and writing the adapter.",
            "finished": f"Done: {self.name} was trained for {step} steps. Call it by “{self.trigger}”.",
        }
        if state in going_on:
            return going_on[state]
        saved = self.saved_step
        onward = f"Resume goes on from step {saved}." if saved else "Resume begins with the first step."
        if state == "paused":
            return f"Paused at step {saved} of {of}. {onward}"
        if state == "stopped":
            kept = f"Stopped at step {saved} of {of}. What was learned until then is kept."
            return f"{kept if saved else 'Stopped before anything was saved; the photos are kept.'} {onward}"
        said = last_error(self.tail, self.output)
        reason = f": {said.rstrip('.')}" if said else (
            " without a word: it was killed, or the memory or the machine gave out"
        )  # fmt: skip
        studio, home = self.folder.parent.parent, os.path.expanduser("~")  # noqa: PTH111 (raises without one)
        words = {self.output: "the run's folder", self.folder: "the run", studio: "the studio", home: "~"}
        for path, word in words.items():  # of this machine, and nobody's business
            reason = reason.replace(str(path), word)
        return f"Training ended at step {step}{reason}. {onward}"

    @cached_property
    def class_images(self) -> tuple[int, int]:
        """How many pictures of its class are drawn, and how many it wants first."""
        wants = any(word.startswith("--class_data_dir=") for word in self.command)
        wanted = cast(int, PRESET_VALUES["faithful"]["num_class_images"]) if wants else 0
        return len(list(self.folder.glob("class_images/*.png"))) if wants else 0, wanted

    @property
    def done(self) -> float:
        """How far it is, of 1: in the pictures of its class while those are drawn, then in its steps."""
        drawn, wanted = self.class_images
        is_first = self.state == "starting" and drawn < wanted
        return drawn / wanted if is_first else self.step / max(1, self.num_steps)

    @property
    def _starting(self) -> str:
        drawn, wanted = self.class_images
        if drawn < wanted:
            return f"Drawing pictures of its class, which keep the base's idea of it: {drawn} of {wanted}."
        return "Loading the base and looking at the photos."

    @cached_property
    def tail(self) -> list[str]:
        """The last lines of what its process wrote; progress bars are lines, too."""
        with suppress(OSError), (self.folder / OUTPUT_NAME).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(min(self.wish.output_from, size), size - _TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
            return [line.strip() for line in re.split(r"[\r\n]", text) if line.strip()]
        return []


class Runs:
    """The runs in a folder, which any number of servers may look after; `temp` takes photos before.

    One process trains at a time; runs that wait for its end are trained together, by one process, where they
    share a base. They begin within `turn`.

    FileNotFoundError where there is no run of an id; ValueError where the disk is full, or a run stands
    otherwise than what is asked of it.
    """

    def __init__(
        self,
        root: Path,
        temp: Path,
        *,
        base: str,
        turn: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.root, self.temp, self.photos, self.turn = root, temp, temp / "photos", turn
        # a run that goes on later may be started from another working directory
        self.base = str(Path(base).resolve()) if Path(base).exists() else base

    def ids(self) -> list[str]:
        """Return the ids of all runs, the newest first."""
        found = (path.name for path in self.root.glob("*") if _ID.fullmatch(path.name) and path.is_dir())
        return sorted(found, reverse=True)

    def status(self, run_id: str) -> Run:
        """Return how a run stands now."""
        return Run(self._folder(run_id))

    def all(self) -> list[Run]:
        """Return how all runs stand, the newest first; those whose request is damaged are left out."""
        found = []
        for run_id in self.ids():
            with suppress(FileNotFoundError, ValueError):
                found.append(Run(self.root / run_id))
        return found

    def start(self, request: TrainRequest) -> str:
        """Start a run in a process of its own and return its id; while another is trained, it waits."""
        photos, own = request.photos, self.temp.resolve()
        if not all(photo.resolve().is_relative_to(own) for photo in photos):
            raise ValueError("there is a photo that was not uploaded here; add the photos again")
        if gone := sum(not photo.is_file() for photo in photos):
            kept = "as uploads are kept for a while; add them again"
            raise ValueError(f"{gone} of {len(photos)} photos are gone, {kept}")
        now = datetime.now(UTC)
        folder = self.root / f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        with ExitStack() as held:
            held.enter_context(disk_explained(self.root, "starting the training"))
            self.root.mkdir(parents=True, exist_ok=True)
            held.enter_context(run_lock.guarded(self.root))
            try:
                self._prepare(folder, request, now)
                write_facts(folder, WISH_NAME, Wish(wanted="queued"))
                self._advance()
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        return folder.name

    def stop(self, run_id: str, *, wanted: Wanted = "stopped") -> None:
        """Ask a run to save and end. Asked again, it ends at once; asked a third time, it is killed.

        Those that are trained with it go on in a process anew.
        """
        folder = self._folder(run_id)
        with disk_explained(folder, "stopping the training"), run_lock.guarded(self.root):
            process, wish = living_process(folder), read_facts(folder / WISH_NAME, Wish) or Wish()
            if process is None and wish.wanted not in ("paused", "queued"):  # it ended by itself just now
                return
            if process is not None and not process.is_here:
                raise ValueError(f"this run is trained on {printable(process.host)}; stop it there")
            asked = wish.asked + (process is not None)
            write_facts(folder, WISH_NAME, wish.model_copy(update={"wanted": wanted, "asked": asked}))
            for other in self.all() if process is not None and wish.together else ():
                if other.process == process and other.id != run_id and other.wish.wanted == "running":
                    onward = other.wish.model_copy(update={"wanted": "queued"})
                    write_facts(other.folder, WISH_NAME, onward)
        if process is not None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL if asked > 2 else signal.SIGINT)

    def pause(self, run_id: str) -> None:
        """Ask a run to save and end, meaning to go on."""
        self.stop(run_id, wanted="paused")

    def resume(self, run_id: str) -> None:
        """Go on with a run that ended before its last step, as soon as none is trained."""
        folder = self._folder(run_id)
        with disk_explained(folder, "going on with the training"), run_lock.guarded(self.root):
            run = Run(folder)
            if not run.can_resume:
                ended = "training already" if run.process else "finished; there is nothing to go on with"
                raise ValueError(f"“{run.name}” is {ended}")
            write_facts(folder, WISH_NAME, Wish(wanted="queued"))
            self._advance()

    def advance(self) -> None:
        """Start what waits, unless something is being trained; where the disk is full it waits on."""
        if not any(run.state == "queued" for run in self.all()):
            return
        try:
            with self.turn(), run_lock.guarded(self.root):
                self._advance()
        except OSError as error:
            logger.warning("what waits is not trained yet: %s", error)

    def _advance(self) -> None:
        folders = [self.root / run_id for run_id in reversed(self.ids())]
        if any(living_process(folder) is not None for folder in folders):
            return
        queued = [run for run in reversed(self.all()) if run.state == "queued"]
        if queued:
            process = _launch([run for run in queued if run.base == queued[0].base][:MAX_TOGETHER])
            # a child that nobody waits for stays in the table of processes, and others wait for its end
            threading.Thread(
                target=self._follow, args=(process,), name="wait for training", daemon=True
            ).start()

    def _follow(self, process: "subprocess.Popen[bytes]") -> None:
        process.wait()
        self.advance()

    def train_on(self, run_id: str, step: int) -> str:
        """Begin another run that goes on from a step of this one, for as many steps again; return its id."""
        folder, now = self._folder(run_id), datetime.now(UTC)
        new = self.root / f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        with disk_explained(folder, "starting the training"), run_lock.guarded(self.root):
            run = Run(folder)
            _check_saved(run, step)
            num_steps = step + run.num_steps
            words = [
                word.replace(str(folder), str(new)) for word in run.command if not word.startswith(_ENDING)
            ]
            words += [f"--max_train_steps={num_steps}", "--allow_changes"]
            changes = {"name": f"{run.name}, on from step {step}", "num_steps": num_steps, "command": words}
            later = [f"checkpoint-{other}" for other in run.saved_steps if other != step]
            try:
                for part in ("photos", "class_images"):
                    if (folder / part).is_dir():
                        shutil.copytree(folder / part, new / part)
                left = shutil.ignore_patterns(*later, *_RESULT, EVALUATION_NAME, run_lock.LOCK_NAME, ".*")
                shutil.copytree(run.output, new / "run", ignore=left)
                record = run.record.model_copy(update={**changes, "created": now.timestamp()})
                write_facts(new, REQUEST_NAME, record)
                write_facts(new, WISH_NAME, Wish(wanted="queued"))
                self._advance()
            except BaseException:
                shutil.rmtree(new, ignore_errors=True)
                raise
        return new.name

    def adopt(self, run_id: str, library: Library, step: int | None = None) -> Card:
        """Put the adapter that a run made, finished or not, into a library, once however often asked.

        With a step it is that of the checkpoint then.
        """
        folder = self._folder(run_id)
        with disk_explained(folder, "keeping the adapter"), run_lock.guarded(self.root):
            run = Run(folder)
            if step is None and not run.can_use:
                raise ValueError(f"“{run.name}” has saved nothing yet; wait for its last step, or stop it")
            if step is None and run.adapter is None:
                step = run.saved_step
            if step is not None:  # it may go on: what is used now is one of its own
                _check_saved(run, step)
                name, saved = f"{run.name}, step {step}", run.output / f"checkpoint-{step}"
                known = next((card for card in library.cards() if card.name == name), None)
                return known or library.add_run_result(saved, name)
            if run.library_id is not None:
                with suppress(FileNotFoundError):  # deleted from the library since
                    return library.card(run.library_id)
            assert run.adapter is not None
            card = library.add_run_result(run.adapter, run.name)
            write_facts(folder, LIBRARY_NAME, LibraryEntry(id=card.id))
            return card

    def delete(self, run_id: str) -> None:
        """Delete a run with its photos, pictures and checkpoints."""
        folder = self._folder(run_id)
        aside = folder.with_name(f".{folder.name}.deleted")
        with disk_explained(folder, "deleting the run"), run_lock.guarded(self.root):
            if living_process(folder) is not None:
                raise ValueError("this run is training; stop it first")
            folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)

    def _prepare(self, folder: Path, request: TrainRequest, now: datetime) -> None:
        (folder / "photos").mkdir(parents=True)
        for number, photo in enumerate(request.photos, 1):
            shutil.copyfile(photo, folder / "photos" / f"photo-{number:03d}{photo.suffix}")
        for number, caption in enumerate(request.captions, 1):
            if caption:
                (folder / "photos" / f"photo-{number:03d}.txt").write_text(caption, encoding="utf-8")
        config = request.config(folder, self.base)
        num_steps, batch_size = config.optimization.max_train_steps, config.optimization.train_batch_size
        assert num_steps is not None
        record = Record(
            name=printable(request.name.strip() or request.subject.strip()), created=now.timestamp(),
            trigger=request.trigger(self.base), command=train_command(request, folder, self.base),
            num_steps=num_steps, batch_size=batch_size,
        )  # fmt: skip
        write_facts(folder, REQUEST_NAME, record)

    def _folder(self, run_id: str) -> Path:
        folder = self.root / run_id
        if not _ID.fullmatch(run_id) or not folder.is_dir():
            raise FileNotFoundError(GONE)
        return folder


def _check_saved(run: Run, step: int) -> None:
    if step not in run.saved_steps:
        kept = listed(run.saved_steps) or "none"
        raise ValueError(f"nothing was saved at step {step}; choose one of those that were: {kept}")


def _launch(runs: Sequence[Run]) -> "subprocess.Popen[bytes]":
    """Run their command in a session of its own, so that nothing that ends the server ends it."""
    command, output = _command(runs), runs[0].folder / OUTPUT_NAME
    if not Path(command[0]).exists():  # a Python that was replaced since
        command = [sys.executable, *command[1:]]
    if output.exists() and output.stat().st_nlink > 1:  # others look at it
        output.unlink()
    written = output.stat().st_size if output.exists() else 0
    wish = Wish(began=time.time(), output_from=written, together=len(runs) > 1)
    for run in runs:
        write_facts(run.folder, WISH_NAME, wish)
    variables, root = {**os.environ, "PYTHONUNBUFFERED": "1"}, Path(ether_diffusion.__file__).parent.parent
    if (root / "pyproject.toml").is_file():  # a checkout is found where it is
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    with output.open("ab") as file:
        streams: Any = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, env=variables, start_new_session=True, **streams)
    holder = run_lock.holder_of(process.pid)
    for run in runs:
        run_lock.write_holder(run.folder / PROCESS_NAME, holder)
    for run in runs[1:]:
        with suppress(OSError):  # a file system without links: what it said is in the first one's
            (run.folder / OUTPUT_NAME).unlink(missing_ok=True)
            os.link(output, run.folder / OUTPUT_NAME)
    with suppress(OSError, AttributeError):  # Windows has no such priorities
        own = os.getpriority(os.PRIO_PROCESS, 0)
        os.setpriority(os.PRIO_PROCESS, process.pid, min(own + NICENESS, 19))
    logger.info("training %s in process %d", ", ".join(run.id for run in runs), process.pid)
    return process


def _command(runs: Sequence[Run]) -> list[str]:
    """Return the command of a run, or one that trains several together, by a list beside the first."""
    if len(runs) == 1:
        return runs[0].command
    jobs = list[dict[str, Any]]()
    for run in runs:
        words = vars(parse_flags(run.command[len(_TRAINER) :]))
        own = {name: value for name, value in words.items() if name not in declared(CallFlags)}
        jobs.append(stack(PRESET_VALUES[words["preset"]] if words["preset"] else {}, own))
    write_files(runs[0].folder, {JOBS_NAME: json.dumps(jobs, indent=1, default=str).encode()})
    return [*_TRAINER, f"--jobs={runs[0].folder / JOBS_NAME}"]


def living_process(folder: Path) -> run_lock.Holder | None:
    """Return the process that trains in a run's folder; one of another machine while the files change."""
    holder, run = run_lock.read_holder(folder / PROCESS_NAME), folder / "run"
    if holder is not None and not holder.is_gone():
        paths = (folder / OUTPUT_NAME, run / LOG_NAME, run / run_lock.LOCK_NAME)
        changed = max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)
        if holder.is_here or time.time() - changed < _SECONDS_UNTIL_FORGOTTEN:
            return holder
    return run_lock.current_holder(run)


def last_error(lines: Sequence[str], output: Path) -> str | None:
    """Return the sentence that a trainer ended with, or the last line of its traceback, escaped.

    Of several runs it says each one's behind its folder.
    """
    ours, own = [line.removeprefix(_PROGRAM) for line in lines if line.startswith(_PROGRAM)], f"{output}: "
    ours = [line.removeprefix(own) for line in ours if line.startswith(own)] or ours
    if ours:
        return printable(" ".join(ours), 1000)
    found = [match for line in lines if (match := _ERROR_LINE.fullmatch(line))]
    return printable(found[-1]["text"] or found[-1]["kind"], 500) if found else None


def write_facts(folder: Path, name: str, facts: StrictModel) -> None:
    """Write one of a run's small files."""
    write_files(folder, {name: facts.model_dump_json(indent=1).encode() + b"\n"})


def read_facts(path: Path, model: type[M]) -> M | None:
    """Read one of a run's small files; None where it is not there or damaged."""
    with suppress(OSError, ValueError):
        return read_json(path.read_bytes(), model, path.name)
    return None
