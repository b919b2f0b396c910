"""What a visitor asks to be trained, and the command of train-dreambooth that does it."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from ether_diffusion.strict_json import Json
from ether_diffusion.tiny_world import ALIAS
from ether_diffusion.training.config.presets import PRESET_VALUES, PresetName
from ether_diffusion.wording import printable

MAX_STEPS = 100_000
MAX_SEED = 2**32 - 1
MAX_PROMPT_CHARACTERS = 1000
MAX_NAME_CHARACTERS = 60
TINY_WORLD_OPTIONS: Mapping[str, Json] = {"train_batch_size": 6, "random_flip": True}
"""What a subject of the embedded base is learned with, in the short presets (evaluation/tiny_subjects.py)."""


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
        problems = []
        if not self.photos:
            problems.append("there are no photos; add at least one, better four to ten")
        if not self.subject.strip():
            problems.append("the subject has no name; say what it is, as dog or teapot")
        if not self.token.isprintable() or len(self.token.split()) != 1 or len(self.token) > 32:
            problems.append("the trigger word must be one word of at most 32 characters, as sks")
        for text in (self.subject, self.name, self.instance_prompt, *self.validation_prompts):
            if not text.isprintable():
                problems.append(f"{printable(text)} holds control or invisible characters; type it again")
        if max(len(self.subject), len(self.name)) > MAX_NAME_CHARACTERS:
            problems.append(f"the name is longer than {MAX_NAME_CHARACTERS} characters; shorten it")
        if max(map(len, (self.instance_prompt, *self.validation_prompts))) > MAX_PROMPT_CHARACTERS:
            problems.append(f"a prompt is longer than {MAX_PROMPT_CHARACTERS} characters; shorten it")
        if self.preset not in get_args(PresetName):
            problems.append(
                f"there is no preset {printable(self.preset)}; choose {_or(get_args(PresetName))}"
            )
        if self.steps is not None and not 1 <= self.steps <= MAX_STEPS:
            problems.append(f"{self.steps} steps are out of range; choose 1 to {MAX_STEPS}")
        if not 0 <= self.seed <= MAX_SEED:
            problems.append(f"the seed {self.seed} is out of range; choose 0 to {MAX_SEED}")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def shown_name(self) -> str:
        """What people call it."""
        return self.name.strip() or self.subject.strip()

    @property
    def num_steps(self) -> int:
        """Updates in all: those given, or the preset's."""
        steps = PRESET_VALUES[self.preset]["max_train_steps"] if self.steps is None else self.steps
        assert isinstance(steps, int)
        return steps

    def batch_size(self, base: str) -> int:
        """Return how many images an update learns from."""
        size = {**PRESET_VALUES[self.preset], **_options_of_base(self, base)}["train_batch_size"]
        assert isinstance(size, int)
        return size

    def prompt(self, base: str) -> str:
        """Return the instance prompt with {token} in it; a world of drawings has no photos of anything."""
        if self.instance_prompt.strip():
            return self.instance_prompt.strip()
        return f"a {'' if base == ALIAS else 'photo of '}{{token}} {self.subject.strip()}"

    def trigger(self, base: str) -> str:
        """Return the prompt that calls the subject."""
        return self.prompt(base).replace("{token}", self.token)


def train_options(request: TrainRequest, folder: Path, base: str) -> dict[str, Json]:
    """Return the options of train-dreambooth for a request whose files lie in a run's folder, by name."""
    preset = PRESET_VALUES[request.preset]
    options: dict[str, Json] = {
        "preset": request.preset,
        "pretrained_model_name_or_path": base,
        "instance_data_dir": str(photos_folder(folder)),
        "token": request.token,
        "instance_prompt": request.prompt(base),
        "output_dir": str(output_folder(folder)),
        "seed": request.seed,
    }
    if preset.get("prior_preservation") == "class_images":
        options["class_data_dir"] = str(folder / "class_images")
        options["class_prompt"] = request.prompt(base).replace("{token} ", "").replace("{token}", "thing")
    options |= _options_of_base(request, base)
    if request.steps is not None:
        often = max(1, request.steps // 4)
        options |= {
            "max_train_steps": request.steps,
            "checkpointing_steps": often,
            "validation_steps": often,
        }
    trigger = request.trigger(base)
    options["validation_prompt"] = list(request.validation_prompts) or [trigger, f"{trigger} on the beach"]
    return options


def train_command(request: TrainRequest, folder: Path, base: str) -> list[str]:
    """Return the command that trains: a program and its arguments, for no shell.

    Each value stands in one word with its flag, so that none is taken for a flag.
    """
    words = [sys.executable, "-m", "ether_diffusion.scripts.train_dreambooth"]
    for name, value in train_options(request, folder, base).items():
        for each in value if isinstance(value, list) else [value]:
            words.append(f"--{name}" if each is True else f"--{name}={each}")
    return words


def _options_of_base(request: TrainRequest, base: str) -> Mapping[str, Json]:
    is_short = PRESET_VALUES[request.preset].get("prior_preservation") is None
    return TINY_WORLD_OPTIONS if base == ALIAS and is_short else {}


def photos_folder(folder: Path) -> Path:
    """Return where a run keeps the photos that it learns from."""
    return folder / "photos"


def output_folder(folder: Path) -> Path:
    """Return where a run's trainer writes."""
    return folder / "run"


def _or(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
