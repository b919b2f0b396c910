"""What a page or a script asks to be drawn: one job's settings, read as they are typed, checked when made."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from PIL import Image
from pydantic import AfterValidator, BeforeValidator, Field

from ether_diffusion.pipelines.loading import Strengths
from ether_diffusion.pipelines.sampling import GUIDANCE, SIDE, STEPS, STRENGTH, Sampling, Settings
from ether_diffusion.strict_json import Within, checked
from ether_diffusion.wording import listed, printable

SEED = Within(0, 2**32 - 1)  # what a field of a page holds without rounding, and what people type
NUM_IMAGES = Within(1, 32)
MAX_CELLS = 400
MAX_ADAPTERS = 8  # in one picture, and in one grid
MAX_PROMPT, MAX_TEXT = 2000, 4000  # characters of a prompt, and of a list of numbers
_MAX_DIGITS = 24
_RANGE = re.compile(r"(\d{1,10})\s*(?:-|–|…|\.\.\.?)\s*(\d{1,10})", re.ASCII)


def read_number(value: object, *, whole: bool = False) -> float:
    """Return a number as pages and scripts send it."""
    text = str(value).strip() if isinstance(value, int | float | str) and not isinstance(value, bool) else ""
    try:
        number = float(text) if len(text) <= _MAX_DIGITS else math.inf
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or (whole and number != int(number)):
        found = "nothing" if value in (None, "") else printable(value, 40)
        raise ValueError(f"must be a {'whole ' * whole}number; found {found}")
    return int(number) if whole else number


def read_whole(value: object) -> int:
    """Return a whole number as pages and scripts send it."""
    return int(read_number(value, whole=True))


def read_lines(text: object) -> Any:
    """Return the lines of a text that hold something."""
    lines = text.splitlines() if isinstance(text, str) else None
    return text if lines is None else tuple(line.strip() for line in lines if line.strip())


def _words(value: object) -> Any:
    """Return what stands between the commas and spaces of a text."""
    if not isinstance(value, str | None):
        return value
    text = value or ""
    if len(text) > MAX_TEXT:
        raise ValueError(f"have {len(text)} characters; up to {MAX_TEXT} are read")
    return tuple(filter(None, re.split(r"[,;\s]+", text)))


def _seeds(value: object) -> Any:
    """Return the numbers in a text, in its order; 0-3 is 0, 1, 2, 3."""
    seeds: list[object] = []
    for word in _words(_RANGE.sub(r"\1-\2", value) if isinstance(value, str) else value):
        ends = _RANGE.fullmatch(str(word))
        first, last = (int(end) for end in ends.groups()) if ends else (0, 0)
        if not 0 <= last - first < MAX_CELLS - len(seeds):
            raise ValueError(f"hold too many or none in {printable(word, 40)}; up to {MAX_CELLS} are drawn")
        seeds += range(first, last + 1) if ends else [word]
    return tuple(seeds)


def _strengths(value: object) -> object:
    if not isinstance(value, Mapping | None):
        raise ValueError('are given as {id: strength}, for example {"fox": 0.8}')
    return value or {}


def _prompt(text: str) -> str:
    if len(text) > MAX_PROMPT:
        raise ValueError(f"has up to {MAX_PROMPT} characters; found {len(text)}")
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"holds half a character ({printable(text, 40)}); type it again")
    return text


def _few(ids: Any) -> Any:
    if len(ids) > MAX_ADAPTERS:
        raise ValueError(f"are up to {MAX_ADAPTERS} at once; found {listed(ids)}")
    return ids


Prompt = Annotated[str, AfterValidator(_prompt)]
PageSeed = Annotated[int, BeforeValidator(read_whole), SEED]
# pages send 0 for a field that was never touched
Side = Annotated[Annotated[int, SIDE] | None, BeforeValidator(lambda side: read_whole(side or 0) or None)]
PageStrength = Annotated[float, BeforeValidator(read_number), STRENGTH]
Chosen = Annotated[Mapping[str, PageStrength], BeforeValidator(_strengths), AfterValidator(_few)]
Ids = Annotated[tuple[str, ...], BeforeValidator(lambda ids: tuple(ids or ())), AfterValidator(_few)]


@checked(kw_only=True)
class Asked(Settings):
    """What both kinds of requests have."""

    steps: Annotated[int, BeforeValidator(read_whole), STEPS] = 20
    guidance_scale: Annotated[float, BeforeValidator(read_number), GUIDANCE] = 3.0
    width: Side = None
    height: Side = None
    negative_prompt: Annotated[Prompt, BeforeValidator(lambda text: "" if text is None else text)] = ""
    keep_metadata: bool = True  # write into the files how they were made

    def _sampling(self, prompts: Sequence[str], seeds: Sequence[int], *choices: Strengths) -> Sampling:
        shared = {name: getattr(self, name) for name in Settings.__dataclass_fields__}
        shared["negative_prompt"] = self.negative_prompt or None
        return Sampling(tuple(prompts), tuple(seeds), choices, **shared)


@checked()
class GenerateRequest(Asked):
    """Pictures of one prompt with seed, seed + 1, … by adapters, library ids with their strengths."""

    prompt: Prompt
    adapters: Chosen = Field(default_factory=dict)
    seed: PageSeed = 0
    num_images: Annotated[int, BeforeValidator(read_whole), NUM_IMAGES] = 1
    compare_with_base: bool = True  # draw each seed without adapters and control, too
    control_image: Image.Image | None = None
    control_strength: PageStrength = 1.0

    def __post_init__(self) -> None:
        if not SEED.holds(self.seed + self.num_images - 1):
            raise ValueError(f"the last seed would be beyond {SEED.most}; give a smaller one")

    def sampling(self) -> Sampling:
        """Return what is to be drawn: the choice of adapters, then the base unless that is the same."""
        base: list[Strengths] = [{}] if self.compare_with_base and self.adapters else []
        seeds = range(self.seed, self.seed + self.num_images)
        return self._sampling([self.prompt], seeds, self.adapters, *base)


@checked()
class GridRequest(Asked):
    """Every prompt with every seed, by the base and by each adapter at each strength; lists may be text."""

    prompts: Annotated[tuple[Prompt, ...], BeforeValidator(read_lines)]
    seeds: Annotated[tuple[PageSeed, ...], BeforeValidator(_seeds)] = (0,)
    adapters: Ids = ()
    strengths: Annotated[tuple[PageStrength, ...], BeforeValidator(_words)] = (1.0,)
    with_base: bool = True

    def __post_init__(self) -> None:
        for name in ("prompts", "seeds", "adapters", "strengths"):
            values = getattr(self, name)
            twice = [value for value in dict.fromkeys(values) if values.count(value) > 1]
            if twice:
                raise ValueError(f"found {printable(twice[0])} twice among the {name}; give each once")
            if not values and name != "adapters":
                raise ValueError(f"found no {name}; give at least one")
        if not self.adapters and not self.with_base:
            raise ValueError("found neither an adapter nor the base; choose what to draw with")
        cells = len(self.prompts) * len(self.seeds) * len(self.choices)
        if cells > MAX_CELLS:
            raise ValueError(f"this grid has {cells} pictures; at most {MAX_CELLS} are drawn at once")

    @property
    def choices(self) -> tuple[Strengths, ...]:
        """The columns."""
        base: tuple[Strengths, ...] = ({},) if self.with_base else ()
        return base + tuple({name: s} for name in self.adapters for s in self.strengths)

    def sampling(self) -> Sampling:
        """Return what is to be drawn."""
        return self._sampling(self.prompts, self.seeds, *self.choices)
