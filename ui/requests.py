"""What the page asks to be drawn: one job's settings, checked when they are made."""

from collections.abc import Mapping, Sequence
from typing import Annotated

from PIL import Image
from pydantic import AfterValidator, Field

from ether_diffusion.pipelines.loading import Strengths
from ether_diffusion.pipelines.sampling import Sampling, Settings, Strength
from ether_diffusion.strict_json import Within, checked
from ether_diffusion.wording import listed, printable

SEED = Within(0, 2**32 - 1)
"""What a field of a page holds without rounding, and what people type."""
NUM_IMAGES = Within(1, 32)
MAX_CELLS = 400
MAX_ADAPTERS = 8
"""In one picture, and in one grid."""
MAX_PROMPT = 2000
"""Characters."""


def _prompt(text: str) -> str:
    if len(text) > MAX_PROMPT:
        raise ValueError(f"has up to {MAX_PROMPT} characters; found {len(text)}")
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"holds half a character ({printable(text, 40)}); type it again")
    return text


def _few(ids: Sequence[str] | Mapping[str, float]) -> Sequence[str] | Mapping[str, float]:
    if len(ids) > MAX_ADAPTERS:
        raise ValueError(f"are up to {MAX_ADAPTERS} at once; found {listed(ids)}")
    return ids


Prompt = Annotated[str, AfterValidator(_prompt)]
PageSeed = Annotated[int, SEED]


@checked(kw_only=True)
class Asked(Settings):
    """What both kinds of requests have.

    Attributes:
        keep_metadata: write into the files how they were made.
        allow_other_base: use adapters of other weights of the same architecture, too.
    """

    negative_prompt: Prompt = ""
    keep_metadata: bool = True
    allow_other_base: bool = False

    def _sampling(
        self, prompts: Sequence[str], seeds: Sequence[int], choices: Sequence[Strengths]
    ) -> Sampling:
        shared = {name: getattr(self, name) for name in Settings.__dataclass_fields__}
        shared["negative_prompt"] = self.negative_prompt or None
        return Sampling(tuple(prompts), tuple(seeds), tuple(choices), **shared)


@checked()
class GenerateRequest(Asked):
    """Pictures of one prompt with seed, seed + 1, …

    Attributes:
        adapters: library ids with the strength of each: 1 as trained, 0 the base.
        compare_with_base: draw each seed without adapters and control, too.
    """

    prompt: Prompt
    adapters: Annotated[Mapping[str, Strength], AfterValidator(_few)] = Field(default_factory=dict)
    seed: PageSeed = 0
    num_images: Annotated[int, NUM_IMAGES] = 1
    compare_with_base: bool = True
    control_image: Image.Image | None = None
    control_strength: Strength = 1.0

    def __post_init__(self) -> None:
        if not SEED.holds(self.seed + self.num_images - 1):
            raise ValueError(f"the last seed would be beyond {SEED.most}; give a smaller one")

    def sampling(self) -> Sampling:
        """Return what is to be drawn: the choice of adapters, then the base unless that is the same."""
        is_compared = self.compare_with_base and bool(self.adapters)
        choices = (self.adapters, {}) if is_compared else (self.adapters,)
        return self._sampling([self.prompt], range(self.seed, self.seed + self.num_images), choices)


@checked()
class GridRequest(Asked):
    """Every prompt with every seed, by the base and by each adapter at each strength.

    Attributes:
        adapters: library ids; each has columns of its own.
        with_base: a column of the base, which stands first.
    """

    prompts: tuple[Prompt, ...]
    seeds: tuple[PageSeed, ...] = (0,)
    adapters: Annotated[tuple[str, ...], AfterValidator(_few)] = ()
    strengths: tuple[Strength, ...] = (1.0,)
    with_base: bool = True

    def __post_init__(self) -> None:
        for name in ("prompts", "seeds", "adapters", "strengths"):
            values = getattr(self, name)
            twice = [value for value in dict.fromkeys(values) if values.count(value) > 1]
            if twice:
                raise ValueError(f"found {printable(twice[0])} twice among the {name}; give each once")
        if self.adapters and not self.strengths:
            raise ValueError("found no strengths; give at least one")
        if not self.adapters and not self.with_base:
            raise ValueError("found neither an adapter nor the base; choose what to draw with")
        cells = len(self.prompts) * len(self.seeds) * len(self.choices)
        if cells > MAX_CELLS:
            raise ValueError(f"this grid has {cells} pictures; at most {MAX_CELLS} are drawn at once")
        self.sampling()

    @property
    def choices(self) -> tuple[Strengths, ...]:
        """The columns."""
        base: tuple[Strengths, ...] = ({},) if self.with_base else ()
        return base + tuple({name: s} for name in self.adapters for s in self.strengths)

    def sampling(self) -> Sampling:
        """Return what is to be drawn."""
        return self._sampling(self.prompts, self.seeds, self.choices)
