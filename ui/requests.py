"""What the page asks to be drawn: one job's settings, checked when they are made."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from PIL import Image

from ether_diffusion.pipelines.choice import Strengths
from ether_diffusion.pipelines.sampling import ControlUse, Sampling
from ether_diffusion.wording import listed, printable

MAX_SEED = 2**32 - 1
"""What a field of a page holds without rounding, and what people type."""
MAX_IMAGES = 32
MAX_CELLS = 400
MAX_ADAPTERS = 8
"""In one picture, and in one grid."""
MAX_PROMPT = 2000
"""Characters."""


@dataclass(frozen=True)
class GenerateRequest:
    """Pictures of one prompt with seed, seed + 1, …

    Attributes:
        adapters: library ids with the strength of each: 1 as trained, 0 the base.
        width, height: px; None is what the base was trained at.
        compare_with_base: draw each seed without adapters and control, too.
        keep_metadata: write into the files how they were made.
        allow_other_base: use adapters of other weights of the same architecture, too.
    """

    prompt: str
    adapters: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    steps: int = 20
    guidance_scale: float = 3.0
    width: int | None = None
    height: int | None = None
    num_images: int = 1
    negative_prompt: str = ""
    compare_with_base: bool = True
    control_image: Image.Image | None = None
    control_strength: float = 1.0
    keep_metadata: bool = True
    allow_other_base: bool = False

    def __post_init__(self) -> None:
        _check_prompts([self.prompt, self.negative_prompt])
        _check_seeds([self.seed])
        if not 1 <= self.num_images <= MAX_IMAGES:
            raise ValueError(f"the number of images is from 1 to {MAX_IMAGES}; found {self.num_images}")
        _check_seeds([self.seed + self.num_images - 1])
        _check_adapters(list(self.adapters))
        self.sampling()
        ControlUse(self.control_image or Image.new("RGB", (1, 1)), self.control_strength)  # checks it

    def sampling(self) -> Sampling:
        """Return what is to be drawn: the choice of adapters first, then the base where it is compared."""
        base: tuple[Strengths, ...] = ({},) if self.draws_base else ()
        return Sampling(
            prompts=(self.prompt,),
            seeds=tuple(range(self.seed, self.seed + self.num_images)),
            choices=(_as_floats(self.adapters), *base),
            steps=self.steps,
            guidance_scale=float(self.guidance_scale),
            negative_prompt=self.negative_prompt or None,
            width=self.width,
            height=self.height,
        )

    @property
    def draws_base(self) -> bool:
        """Whether the base is drawn beside: not where the pictures are the base's own."""
        return self.compare_with_base and bool(self.adapters)


@dataclass(frozen=True)
class GridRequest:
    """Every prompt with every seed, by the base and by each adapter at each strength.

    Attributes:
        adapters: library ids; each has columns of its own.
        with_base: a column of the base, which stands first.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    adapters: tuple[str, ...] = ()
    strengths: tuple[float, ...] = (1.0,)
    with_base: bool = True
    steps: int = 20
    guidance_scale: float = 3.0
    width: int | None = None
    height: int | None = None
    negative_prompt: str = ""
    keep_metadata: bool = True
    allow_other_base: bool = False

    def __post_init__(self) -> None:
        _check_prompts([*self.prompts, self.negative_prompt])
        _check_seeds(self.seeds)
        _check_adapters(list(self.adapters))
        for name in ("prompts", "seeds", "adapters", "strengths"):
            values = getattr(self, name)
            twice = [value for value in dict.fromkeys(values) if values.count(value) > 1]
            if twice:
                raise ValueError(f"found {printable(twice[0])} twice among the {name}; give each once")
        if self.adapters and not self.strengths:
            raise ValueError("found no strengths; give at least one")
        if not self.adapters and not self.with_base:
            raise ValueError("found neither an adapter nor the base; choose what to draw with")
        if self.num_cells > MAX_CELLS:
            raise ValueError(
                f"this grid has {self.num_cells} pictures; at most {MAX_CELLS} are drawn at once"
            )
        self.sampling()

    @property
    def choices(self) -> tuple[Strengths, ...]:
        """The columns."""
        base: tuple[Strengths, ...] = ({},) if self.with_base else ()
        return base + tuple({name: float(s)} for name in self.adapters for s in self.strengths)

    @property
    def num_cells(self) -> int:
        """How many pictures it has."""
        return len(self.prompts) * len(self.seeds) * len(self.choices)

    def sampling(self) -> Sampling:
        """Return what is to be drawn."""
        return Sampling(
            prompts=self.prompts,
            seeds=self.seeds,
            choices=self.choices,
            steps=self.steps,
            guidance_scale=float(self.guidance_scale),
            negative_prompt=self.negative_prompt or None,
            width=self.width,
            height=self.height,
        )

    def cost(self, seconds_per_step: float | None) -> "GridCost":
        """Return what it will cost; None where no step was measured yet."""
        num_steps = self.num_cells * self.steps
        return GridCost(
            self.num_cells, num_steps, None if seconds_per_step is None else num_steps * seconds_per_step
        )


@dataclass(frozen=True)
class GridCost:
    """How many pictures and denoising steps a grid takes, and how long where steps were measured."""

    num_cells: int
    num_steps: int
    seconds: float | None


def _check_prompts(prompts: list[str]) -> None:
    for prompt in prompts:
        if len(prompt) > MAX_PROMPT:
            raise ValueError(f"a prompt has up to {MAX_PROMPT} characters; found {len(prompt)}")
        if not prompt.isascii() and any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise ValueError(f"the prompt holds half a character ({printable(prompt, 40)}); type it again")


def _check_seeds(seeds: list[int] | tuple[int, ...]) -> None:
    wrong = [seed for seed in seeds if not (type(seed) is int and 0 <= seed <= MAX_SEED)]
    if wrong:
        raise ValueError(f"a seed is a whole number from 0 to {MAX_SEED}; found {printable(wrong[0])}")


def _check_adapters(ids: list[str]) -> None:
    if len(ids) > MAX_ADAPTERS:
        raise ValueError(f"up to {MAX_ADAPTERS} adapters are used at once; found {listed(ids)}")


def _as_floats(adapters: Mapping[str, float]) -> Strengths:
    return {name: float(strength) for name, strength in adapters.items()}
