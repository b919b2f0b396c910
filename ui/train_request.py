"""What shall be learned, as a visitor says it, and the command of train-dreambooth that learns it."""

import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ether_diffusion.benchmark.plan import advise, read_curves
from ether_diffusion.options import OptionsError
from ether_diffusion.strict_json import checked
from ether_diffusion.tiny_world import EMBEDDED
from ether_diffusion.training.config import DreamBoothConfig
from ether_diffusion.training.config.presets import PRESET_VALUES, PresetName, stack
from ether_diffusion.wording import printable

MAX_PROMPT, MAX_NAME, MAX_STEPS = 1000, 60, 100_000
MAX_CHECKPOINTS = 8  # of a run: what was drawn of can be used
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
TRAINER = (sys.executable, "-m", "ether_diffusion.scripts.train_dreambooth")
Preset = Literal["advised", PresetName]


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
        names, own, token = (self.subject, self.name), self.settings.get("instance_prompt", ""), self.token
        prompts = (own, *self.captions, *self.settings.get("validation_prompt", ()))
        is_word = len(token) <= 32 and len(token.split()) == 1 and token.isprintable()
        is_common = token.casefold() in self.subject.casefold().split()
        is_mute = own and "{token}" not in own and token not in own
        steps = self.settings.get("max_train_steps", 1)
        strange = ", ".join(printable(text) for text in (*names, *prompts) if not text.isprintable())
        is_long = [max(map(len, texts)) > n for texts, n in ((names, MAX_NAME), (prompts, MAX_PROMPT))]
        problems = {
            "there are no photos; add at least one, better four to ten": not self.photos,
            "the subject has no name; say what it is, as dog or teapot": not self.subject.strip(),
            "the trigger word must be one word of at most 32 characters, as sks": not is_word,
            f"the trigger word is what it is, {printable(token)}; choose a rare one, as sks": is_common,
            "the prompt of the photos has no {token} in it, so that nothing would call the subject": is_mute,
            f"Steps {steps} is out of range; use up to {MAX_STEPS}": steps > MAX_STEPS,
            f"{strange} holds control or invisible characters; type it again": strange,
            f"a name is longer than {MAX_NAME} characters; shorten it": is_long[0],
            f"a prompt is longer than {MAX_PROMPT} characters; shorten it": is_long[1],
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
        options["checkpoints_total_limit"] = MAX_CHECKPOINTS
        if base in EMBEDDED:  # which have an encoder of their own to measure by
            options |= {"eval_steps": often, "num_validation_images": 1}
        return options

    def config(self, folder: Path, base: str) -> DreamBoothConfig:
        """Return the configuration that the options make; what cannot be used is a ValueError."""
        options = self.options(folder, base)
        values = PRESET_VALUES[options.pop("preset")] if "preset" in options else {}
        try:
            return DreamBoothConfig.from_flat(stack(values, options))
        except OptionsError as error:
            raise ValueError("; ".join(map(in_labels, error.problems))) from None

    def command(self, folder: Path, base: str) -> list[str]:
        """Return the command that trains, for no shell; each value shares a word with its flag."""
        named = self.options(folder, base).items()
        each = [(name, one) for name, of in named for one in (of if isinstance(of, tuple) else [of])]
        return [*TRAINER, *(f"--{name}" if one is True else f"--{name}={one}" for name, one in each)]

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
