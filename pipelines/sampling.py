"""Many pictures from one pipeline: every prompt with every seed and every choice of adapters."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ether_diffusion.bases import Fault, fault_of
from ether_diffusion.pipelines.choice import Strengths
from ether_diffusion.pipelines.metadata import KEYWORD, ImageMetadata, parse_metadata, png_bytes
from ether_diffusion.pipelines.seeds import MAX_SEED
from ether_diffusion.pipelines.watching import OnStep, StepWatcher
from ether_diffusion.wording import printable

MAX_STRENGTH = 10.0
MAX_PICTURES = 1024
MAX_SIDE_PX = 4096
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0
SIDE_MULTIPLE_PX = 8


@dataclass(frozen=True)
class Sampling:
    """What to draw: choices are strengths by adapter, {} the base; a side (px) of None is the base's own."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    choices: tuple[Strengths, ...]
    steps: int
    guidance_scale: float
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        for name in ("prompts", "seeds", "choices"):
            if not getattr(self, name):
                raise ValueError(f"found no {name}; give at least one")
        num_pictures = len(self.prompts) * len(self.seeds) * len(self.choices)
        if num_pictures > MAX_PICTURES:
            raise ValueError(
                f"this would be {num_pictures} pictures; at most {MAX_PICTURES} are drawn at once"
            )
        for seed in self.seeds:
            if not 0 <= seed <= MAX_SEED:
                raise ValueError(f"a seed is a whole number from 0 to 2^63 - 1; found {seed}")
        for strength in (value for choice in self.choices for value in choice.values()):
            if not abs(strength) <= MAX_STRENGTH:
                raise ValueError(
                    f"a strength is from -{MAX_STRENGTH:g} to {MAX_STRENGTH:g}, where 1 is as trained and "
                    f"0 the base; found {strength}"
                )
        if not 1 <= self.steps <= MAX_STEPS:
            raise ValueError(f"steps are from 1 to {MAX_STEPS}; found {self.steps}")
        if not (math.isfinite(self.guidance_scale) and 0 <= self.guidance_scale <= MAX_GUIDANCE):
            raise ValueError(f"guidance_scale is from 0 to {MAX_GUIDANCE:g}; found {self.guidance_scale}")
        for side in (side for side in (self.width, self.height) if side is not None):
            if side % SIDE_MULTIPLE_PX or not SIDE_MULTIPLE_PX <= side <= MAX_SIDE_PX:
                raise ValueError(
                    f"a side of a picture is a multiple of {SIDE_MULTIPLE_PX} from {SIDE_MULTIPLE_PX} to "
                    f"{MAX_SIDE_PX} px; found {side}"
                )
        if self.batch_size < 1:
            raise ValueError(f"batch_size is from 1; found {self.batch_size}")


@dataclass(frozen=True)
class ControlUse:
    """An image that says where, for all pictures but the base's, and how strongly.

    `control` names the encoder where several are loaded.
    """

    image: Image.Image
    strength: float = 1.0
    control: str | None = None

    def __post_init__(self) -> None:
        if not abs(self.strength) <= MAX_STRENGTH:
            raise ValueError(
                f"the strength of control is from -{MAX_STRENGTH:g} to {MAX_STRENGTH:g}, where 1 is as "
                f"trained and 0 without; found {self.strength}"
            )


@dataclass(frozen=True)
class Picture:
    """A drawn picture, and its place: indices into the prompts, seeds and choices."""

    prompt: int
    seed: int
    choice: int
    image: Image.Image

    @property
    def metadata(self) -> ImageMetadata:
        """What it says of itself."""
        return parse_metadata(self.image.info[KEYWORD], "the metadata of a picture")

    @property
    def fault(self) -> Fault | None:
        """Why it shows nothing, where something went wrong."""
        return fault_of(self.image)

    def png(self) -> bytes:
        """Return it as a PNG with its metadata."""
        return png_bytes(self.image)


def draw_pictures(
    pipeline: Any,
    sampling: Sampling,
    *,
    control: ControlUse | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_step: OnStep | None = None,
) -> list[Picture]:
    """Draw every prompt with every seed and choice; `on_progress` hears how many of how many are done.

    Pictures of a batch are drawn together, and only a batch of the same size gives them bit for bit.
    `on_step` hears of each denoising step of a batch; what it raises ends the drawing.
    """
    watched: dict[str, Any] = {} if on_step is None else {"callback_on_step_end": StepWatcher(on_step)}
    pictures: list[Picture] = []
    total = len(sampling.prompts) * len(sampling.seeds) * len(sampling.choices)
    for choice, batch in _batches(sampling):
        further = dict(watched)
        if control is not None and sampling.choices[choice]:
            further |= {
                "control_image": control.image,
                "control_strength": control.strength,
                "control": control.control,
            }
        images = pipeline(
            [sampling.prompts[prompt] for prompt, _ in batch],
            negative_prompt=None
            if sampling.negative_prompt is None
            else [sampling.negative_prompt] * len(batch),
            seed=[sampling.seeds[seed] for _, seed in batch],
            adapters=sampling.choices[choice],
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            width=sampling.width,
            height=sampling.height,
            **further,
        ).images
        pictures += [Picture(*place, choice, image) for place, image in zip(batch, images, strict=True)]
        if on_progress is not None:
            on_progress(len(pictures), total)
    return pictures


def describe_choice(choice: Strengths) -> str:
    """Return a choice in words, e.g. "fox 0.8 + cat 0.3", or "base"."""
    return " + ".join(f"{printable(name)} {strength:g}" for name, strength in choice.items()) or "base"


def file_names(sampling: Sampling, pictures: list[Picture]) -> Mapping[str, Picture]:
    """Return pictures by file names that say what they are, e.g. prompt1_seed0_fox0.8.png."""
    return {
        f"prompt{picture.prompt + 1}_seed{sampling.seeds[picture.seed]}_"
        f"{describe_choice(sampling.choices[picture.choice]).replace(' ', '')}.png": picture
        for picture in pictures
    }


def _batches(sampling: Sampling) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    places = list(itertools.product(range(len(sampling.prompts)), range(len(sampling.seeds))))
    for choice in range(len(sampling.choices)):
        for start in range(0, len(places), sampling.batch_size):
            yield choice, places[start : start + sampling.batch_size]
