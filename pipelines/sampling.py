"""What is to be drawn, with its bounds, and what draws it: many pictures of a pipeline, and their grid."""

import io
import itertools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

from PIL import Image, ImageOps, PngImagePlugin
from pydantic import Field

from ether_diffusion.bases import Base, Fault, fault_of
from ether_diffusion.contact_sheet import draw_contact_sheet
from ether_diffusion.pipelines.loading import Strengths
from ether_diffusion.pipelines.metadata import (
    MAX_SEED,
    MAX_TEXT_BYTES,
    ImageMetadata,
    metadata_of,
    png_bytes,
)
from ether_diffusion.prompts import Wildcards
from ether_diffusion.strict_json import Within, checked
from ether_diffusion.wording import printable

MAX_PICTURES = 1024
STEPS, GUIDANCE, SIDE = Within(1, 1000), Within(0, 100), Within(8, 4096, " px", multiple=8)
STRENGTH = Within(-10, 10, ", where 1 is as trained and 0 the base")
Strength = Annotated[float, STRENGTH]
Side = Annotated[int, SIDE]
CHANGE = Within(0, 1, ", where 1 begins with noise")
SHEET_NAME, MANIFEST_NAME, PICTURES_FOLDER = "sheet.png", "grid.json", "pictures"
GRID_KEYWORD, GRID_VERSION = "ether_diffusion_grid", 1
"""Of the text chunk in the sheet that holds the manifest, and of that."""


@checked()
class Start:
    """A picture to begin with, and how far to go from it: 1 leaves nothing but what the mask keeps.

    What is white in the mask is drawn anew, and the rest stays as it is. `name` is what people call it.
    """

    image: Image.Image
    strength: Annotated[float, CHANGE] = 0.6
    mask: Image.Image | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if not self.strength:
            raise ValueError("the strength of a start picture is above 0, which would leave it as it is")
        if self.mask is None:
            return
        (w, h), (width, height) = self.image.size, self.mask.size
        if abs(w * height - h * width) > max(w, h, width, height):
            raise ValueError(
                f"the mask has {width} × {height} px and its start picture {w} × {h} px; give it the same "
                "proportions"
            )
        if not any(self.mask.convert("L").histogram()[128:]):
            raise ValueError("nothing is white in the mask, where the picture would be drawn anew; paint it")

    def fitted(self, height: int, width: int) -> "Start":
        """Return it at a size in px, of its middle where the proportions are others."""
        size, mask = (width, height), self.mask
        image = ImageOps.fit(self.image.convert("RGB"), size, Image.Resampling.LANCZOS)
        fitted = None if mask is None else ImageOps.fit(mask.convert("L"), size, Image.Resampling.BILINEAR)
        return replace(self, image=image, mask=fitted)


@checked(kw_only=True)
class Settings:
    """What pictures that are drawn together share; a side of None is the base's own, or suits `start`."""

    steps: Annotated[int, STEPS] = 20
    guidance_scale: Annotated[float, GUIDANCE] = 3.0
    width: Side | None = None
    height: Side | None = None
    negative_prompt: str | None = None
    start: Start | None = None

    @property
    def num_steps(self) -> int:
        """About how many steps are taken: the share that a start picture leaves."""
        return self.steps if self.start is None else max(1, int(self.steps * self.start.strength))

    def size(self, base: Base) -> tuple[int, int]:
        """Return height and width (px): the base's own, or as many pixels in the start picture's shape."""
        own = (base.native_size, base.native_size)
        if self.start is not None:
            across, down = self.start.image.size
            sides = (base.native_size * math.sqrt(share) for share in (down / across, across / down))
            step = base.size_multiple
            own_height, own_width = (max(1, round(side / step)) * step for side in sides)
            own = own_height, own_width
        return self.height or own[0], self.width or own[1]


@checked()
class ControlUse:
    """An image that says where, for all pictures but the base's, and how strongly.

    `control` names the adapter whose encoder reads it; `by_prompt` has an image of its own for each prompt.
    """

    image: Image.Image
    control: str
    strength: Strength = 1.0
    by_prompt: tuple[Image.Image, ...] = ()


@checked(kw_only=True)
class Request(Settings):
    """One picture: its prompt, adapters with strengths, seed and how it is drawn.

    `negative_adapters` are those of the unconditional row, where it takes others than `adapters`; `template`
    is what the prompt was drawn from.
    """

    prompt: str
    seed: Annotated[int, Within(0, MAX_SEED)] = 0
    adapters: Mapping[str, Strength] = Field(default_factory=dict)
    negative_adapters: Mapping[str, Strength] | None = None
    scheduler: str | None = None
    control: ControlUse | None = None
    template: str | None = None


@checked()
class Sampling(Settings):
    """Every prompt with every seed and every choice: strengths by adapter, {} the base.

    With `wildcards` prompts are templates, drawn by each picture's seed.
    """

    prompts: tuple[str, ...]
    seeds: tuple[Annotated[int, Within(0, MAX_SEED)], ...]
    choices: tuple[Mapping[str, Strength], ...]
    scheduler: str | None = None
    batch_size: Annotated[int, Within(1, MAX_PICTURES)] = 1
    wildcards: Wildcards | None = None

    def __post_init__(self) -> None:
        for name in ("prompts", "seeds", "choices"):
            if not getattr(self, name):
                raise ValueError(f"found no {name}; give at least one")
        count = self.num_pictures
        if count > MAX_PICTURES:
            raise ValueError(f"this would be {count} pictures; at most {MAX_PICTURES} are drawn at once")
        self.drawn_prompts()
        self.request(0, 0, 0)

    @property
    def num_pictures(self) -> int:
        """How many pictures it asks for."""
        return len(self.prompts) * len(self.seeds) * len(self.choices)

    def drawn_prompts(self) -> list[str]:
        """Return every prompt as it is drawn, once.

        Raises:
            ValueError: a template cannot be drawn from.
        """
        if self.wildcards is None:
            return list(self.prompts)
        drawn = (self.wildcards.draw(prompt, seed) for prompt in self.prompts for seed in self.seeds)
        return list(dict.fromkeys(drawn))

    def request(self, prompt: int, seed: int, choice: int, control: ControlUse | None = None) -> Request:
        """Return the picture of a place; the base's, a choice of {}, follows no control image."""
        adapters, template, of_seed = self.choices[choice], self.prompts[prompt], self.seeds[seed]
        drawn = template if self.wildcards is None else self.wildcards.draw(template, of_seed)
        if control is not None and control.by_prompt:
            control = replace(control, image=control.by_prompt[prompt], by_prompt=())
        return Request(
            prompt=drawn,
            template=template if drawn != template else None,
            seed=of_seed,
            adapters=adapters,
            scheduler=self.scheduler,
            control=control if adapters else None,
            **{name: getattr(self, name) for name in Settings.__dataclass_fields__},
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
    engine: Any,
    sampling: Sampling,
    *,
    control: ControlUse | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Picture]:
    """Draw every prompt with every seed and choice; `on_progress` hears how many of how many are done.

    Pictures that an engine draws together are drawn bit for bit again only by as many.
    """
    sides = (sampling.choices, sampling.prompts, sampling.seeds)
    order = itertools.product(*(range(len(side)) for side in sides))
    places, pictures = [(prompt, seed, choice) for choice, prompt, seed in order], list[Picture]()
    requests = [sampling.request(*place, control) for place in places]
    for place, image in zip(places, engine.draw(requests), strict=True):
        pictures.append(Picture(*place, image))
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


def grid_files(sampling: Sampling, pictures: list[Picture]) -> dict[str, bytes]:
    """Return the files of a grid by name: the sheet, the manifest and every picture."""
    named = {f"{PICTURES_FOLDER}/{name}": p for name, p in file_names(sampling, pictures).items()}
    return sheet_files(sampling, named) | {name: picture.png() for name, picture in named.items()}


def sheet_files(sampling: Sampling, pictures: Mapping[str, Picture]) -> dict[str, bytes]:
    """Return the sheet and the manifest of the pictures of a grid, which lie beside them by these names."""
    manifest = {
        "format_version": GRID_VERSION,
        "prompts": list(sampling.prompts),
        "seeds": list(sampling.seeds),
        "choices": [dict(choice) for choice in sampling.choices],
        "pictures": [
            {
                "file": n,
                "prompt": p.prompt,
                "seed": p.seed,
                "choice": p.choice,
                "metadata": asdict(p.metadata),
            }
            for n, p in pictures.items()
        ],
    }
    chunks, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    carried = json.dumps(manifest, separators=(",", ":"), allow_nan=False)
    if len(carried) <= MAX_TEXT_BYTES:  # beyond, the file beside the sheet holds it alone
        chunks.add_text(GRID_KEYWORD, carried)
    draw_grid(sampling, list(pictures.values())).save(buffer, format="PNG", pnginfo=chunks)
    return {SHEET_NAME: buffer.getvalue(), MANIFEST_NAME: json.dumps(manifest, indent=1).encode()}


def draw_grid(sampling: Sampling, pictures: list[Picture]) -> Image.Image:
    """Draw the sheet: a column per choice, a row per prompt and seed; with one choice a column per seed."""
    images = {(p.prompt, p.seed, p.choice): p.image for p in pictures}
    prompts, seeds, choices = sampling.prompts, sampling.seeds, sampling.choices
    of_prompts, of_seeds = [p if len(prompts) > 1 else "" for p in prompts], [f"seed {s}" for s in seeds]
    if len(choices) == 1 and len(seeds) > 1:
        rows = [[images[prompt, seed, 0] for seed in range(len(seeds))] for prompt in range(len(prompts))]
        row_labels, column_labels = of_prompts, of_seeds
    else:
        places = list(itertools.product(range(len(prompts)), range(len(seeds))))
        rows = [[images[prompt, seed, choice] for choice in range(len(choices))] for prompt, seed in places]
        shown = of_seeds if len(seeds) > 1 else [""]
        row_labels = [" · ".join(filter(None, (of_prompts[prompt], shown[seed]))) for prompt, seed in places]
        column_labels = [describe_choice(choice) for choice in choices]
    said = pictures[0].metadata
    title = [
        prompts[0] if len(prompts) == 1 else "",
        describe_choice(choices[0]) if len(choices) == 1 and choices[0] else "",
        f"{said.base} · {sampling.steps} steps · guidance {sampling.guidance_scale:g}",
        said.scheduler.removesuffix("Scheduler"),
        of_seeds[0] if len(seeds) == 1 else "",
    ]
    told = " · ".join(filter(None, title))
    return draw_contact_sheet(rows, row_labels=row_labels, column_labels=column_labels, title=told)
