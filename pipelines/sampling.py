"""What is to be drawn, with its bounds, and the function that draws it: many pictures from one pipeline."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from PIL import Image

from ether_diffusion.bases import Fault, fault_of
from ether_diffusion.pipelines.call import MAX_SEED, OnStep, StepWatcher
from ether_diffusion.pipelines.in_use import Strengths
from ether_diffusion.pipelines.metadata import ImageMetadata, metadata_of, png_bytes
from ether_diffusion.strict_json import Within, checked
from ether_diffusion.wording import printable

MAX_PICTURES = 1024
STEPS, GUIDANCE, SIDE = Within(1, 1000), Within(0, 100), Within(8, 4096, " px", multiple=8)
STRENGTH = Within(-10, 10, ", where 1 is as trained and 0 the base")
Strength = Annotated[float, STRENGTH]
Side = Annotated[int, SIDE]


@checked(kw_only=True)
class Settings:
    """What pictures that are drawn together share; a side of None is the base's own."""

    steps: Annotated[int, STEPS] = 20
    guidance_scale: Annotated[float, GUIDANCE] = 3.0
    width: Side | None = None
    height: Side | None = None
    negative_prompt: str | None = None


@checked()
class Sampling(Settings):
    """Every prompt with every seed and every choice: strengths by adapter, {} the base."""

    prompts: tuple[str, ...]
    seeds: tuple[Annotated[int, Within(0, MAX_SEED)], ...]
    choices: tuple[Mapping[str, Strength], ...]
    batch_size: Annotated[int, Within(1, MAX_PICTURES)] = 1

    def __post_init__(self) -> None:
        for name in ("prompts", "seeds", "choices"):
            if not getattr(self, name):
                raise ValueError(f"found no {name}; give at least one")
        if self.num_pictures > MAX_PICTURES:
            raise ValueError(
                f"this would be {self.num_pictures} pictures; at most {MAX_PICTURES} are drawn at once"
            )

    @property
    def num_pictures(self) -> int:
        """How many pictures it asks for."""
        return len(self.prompts) * len(self.seeds) * len(self.choices)


@checked()
class ControlUse:
    """An image that says where, for all pictures but the base's, and how strongly.

    `control` names the encoder where several are loaded.
    """

    image: Image.Image
    strength: Strength = 1.0
    control: str | None = None


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
        found = metadata_of(self.image)
        if found is None:
            raise ValueError("the picture carries no metadata, which was too large; shorten its prompt")
        return found

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
    negative, pictures = sampling.negative_prompt, list[Picture]()
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
            negative_prompt=None if negative is None else [negative] * len(batch),
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
            on_progress(len(pictures), sampling.num_pictures)
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
