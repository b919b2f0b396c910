"""What the transformer families share: flow matching, and the parts around a transformer."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from torch import Tensor

from ether_diffusion.bases.base import Attention, Base, PromptEmbeddings, TextEncoders
from ether_diffusion.bases.base import Noise as BaseNoise
from ether_diffusion.bases.files import check_variant, find_variant, load_part, read_config
from ether_diffusion.bases.images import vae_scale_factor
from ether_diffusion.tiny_world import GUIDANCE_SCALE, embedded_name
from ether_diffusion.wording import printable

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
_TRAINED = (
    *("num_train_timesteps", "shift", "use_dynamic_shifting", "base_shift", "max_shift"),
    *("base_image_seq_len", "max_image_seq_len", "shift_terminal", "time_shift_type"),
)
"""The settings of that scheduler that say what a base was trained with; the others say how it draws."""
_DENSITY = {"logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29}  # diffusers' scripts' defaults
LATENT_SIDE = 128
"""Of the pictures that diffusers' pipelines draw where the transformer has no size of its own."""


@dataclass(frozen=True)
class FlowNoise(BaseNoise):
    """Noise on straight lines from pictures, z_t = (1 - σ) z + σ ε with t = 1000 σ, whose velocity ε - z is
    predicted (Lipman et al. 2023, arXiv:2210.02747; Esser et al. 2024, arXiv:2403.03206).

    `patch` is the side of the transformer's patches in latent pixels, by which tokens are counted.
    """

    scheduler: FlowMatchEulerDiscreteScheduler
    weighting_scheme: str
    patch: int

    @classmethod
    def of(cls, folder: Path, weighting_scheme: str, timestep_shift: str, *, patch: int) -> Self:
        """Return that of a base; the shift is its scheduler's (auto), none, or a number.

        Raises:
            ValueError: its scheduler is not of flow matching.
        """
        config = read_config(folder, "scheduler/scheduler_config.json")
        kind = config.get("_class_name")
        known = {name: config[name] for name in _TRAINED if name in config}
        if config.get("use_flow_sigmas"):  # a solver's words for a static shift, as Sana's
            known["shift"] = config.get("flow_shift", 1.0)
        elif kind != SCHEDULER or config.get("invert_sigmas"):
            raise ValueError(
                f"the scheduler of {folder} is {printable(kind)}, whose noise nothing is trained with here; "
                f"use a base with {SCHEDULER}"
            )
        if timestep_shift != "auto":
            shift = 1.0 if timestep_shift == "none" else float(timestep_shift)
            known = {"num_train_timesteps": known.get("num_train_timesteps", 1000), "shift": shift}
        return cls(FlowMatchEulerDiscreteScheduler.from_config(known), weighting_scheme, patch)

    def sigmas(self, shape: Sequence[int]) -> Tensor:
        """Return σ of all timesteps, falling from 1, for latents of a shape (c, h, w).

        A dynamic shift is exp(μ) with μ linear in the tokens, or as the scheduler's config says.
        """
        config = self.scheduler.config
        if config.use_dynamic_shifting:
            tokens = shape[-2] * shape[-1] // self.patch**2
            ends = (config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
            self.scheduler.set_timesteps(config.num_train_timesteps, mu=calculate_shift(tokens, *ends))
        sigmas: Tensor = self.scheduler.sigmas[: config.num_train_timesteps]
        return sigmas

    def draw_timestep(self, generator: torch.Generator, shape: Sequence[int]) -> Tensor:
        """Draw one by the weighting scheme's density, as diffusers' scripts do, of the shifted ones."""
        share = compute_density_for_timestep_sampling(
            self.weighting_scheme, 1, **_DENSITY, generator=generator
        )
        sigmas = self.sigmas(shape)
        timestep: Tensor = sigmas[(share[0] * len(sigmas)).long().clamp(max=len(sigmas) - 1)] * len(sigmas)
        return timestep

    def add(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return (1 - σ) z + σ ε."""
        sigmas = self._sigmas_of(timesteps).view(-1, 1, 1, 1).to(latents)
        return (1 - sigmas) * latents + sigmas * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the velocity ε - z."""
        return noise - latents

    def weights(self, timesteps: Tensor) -> Tensor:
        """Return the weights of the scheme, as diffusers' scripts: 1, but for cosmap and sigma_sqrt."""
        weights: Tensor = compute_loss_weighting_for_sd3(self.weighting_scheme, self._sigmas_of(timesteps))
        return weights

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Refuse; see the reason.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "snr_gamma weighs the noise levels of DDPM, and this base was trained by flow matching, whose "
            "velocity needs no such weights; leave it out, or use weighting_scheme"
        )

    def _sigmas_of(self, timesteps: Tensor) -> Tensor:
        sigmas: Tensor = timesteps / self.scheduler.config.num_train_timesteps
        return sigmas


@dataclass(frozen=True)
class FlowBase(Base):
    """A transformer that predicts velocities, with the pipeline that diffusers draws it with.

    `settings` are the config of the transformer.
    """

    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)

    denoiser = "transformer"
    has_size_ids = False
    half_dtype = torch.bfloat16
    drawn_by_with_control = None
    attention_kernels = ("auto", "sdpa")
    text_targets = ()

    classes: ClassVar[Mapping[str, type]]
    """The classes of the parts that have weights, by their names; the transformer's first."""
    optional: ClassVar[frozenset[str]] = frozenset()
    """Parts that a base may lack."""
    packed: ClassVar[int] = 1
    """Side (latent px) of the patches that the pipeline packs before the transformer sees them."""
    num_text_tokens: ClassVar[int]
    """Tokens of a prompt in the pipeline."""
    text_width: ClassVar[str] = "joint_attention_dim"
    """The transformer's setting for the width of its text."""
    has_own_sigmas: ClassVar[bool] = False
    """Whether the pipeline leaves it to the scheduler at which noise levels it steps."""
    size_step: ClassVar[int] = 1
    """What else divides the sides of pictures (px)."""
    usual_guidance: ClassVar[float]
    """The default of diffusers' pipeline."""
    attention: ClassVar[str]
    """A regex for the full names of the attention projections."""
    feedforward: ClassVar[str | None]
    """A regex for those of the feed-forward layers, where they are Linear."""
    unused: ClassVar[str | None] = None
    """A regex for projections in the last block whose output nothing reads: they get no gradient."""

    @classmethod
    def recognises(cls, folder: Path, index: Mapping[str, Any]) -> bool:
        """Say whether a folder is of the family's pipeline."""
        return bool(index.get("_class_name") == cls.pipeline_class.__name__)

    @classmethod
    def open(
        cls,
        name: str,
        folder: Path,
        *,
        variant: str | None,
        vae_folder: Path | None,
        tokenizer_folder: Path | None,
    ) -> Self:
        """Open a folder after a look at every part's class and files."""
        index = read_config(folder, "model_index.json")
        parts = [
            each for each in cls.classes if not (each in cls.optional and _class_of(index, each) is None)
        ]
        for part in parts:
            _check_class(cls.classes[part], _class_of(index, part), f"the {part} of {folder}")
        reader = str(_class_of(index, "tokenizer"))
        if reader.endswith("Processor") and find_spec("torchvision") is None:
            raise ValueError(
                f"{folder} reads prompts with a {printable(reader)}, which needs torchvision, and it is not "
                "installed: pip install torchvision"
            )
        if variant is not None:
            check_variant(folder, variant)
        for part in parts if vae_folder is None else [each for each in parts if each != "vae"]:
            find_variant(folder / part, variant)
        if tokenizer_folder is not None:
            raise ValueError(
                f"the base in {folder} reads prompts with the tokenizers that it was trained with; leave "
                "tokenizer_name out"
            )
        settings, vae = (read_config(folder, f"{each}/config.json") for each in ("transformer", "vae"))
        if vae_folder is not None:
            vae = read_config(vae_folder, "config.json")
            _check_class(cls.classes["vae"], vae.get("_class_name"), f"the VAE in {vae_folder}")
        factor = vae_scale_factor(vae)
        return cls(
            name=name,
            folder=folder,
            is_inpainting=False,
            vae_scale_factor=factor,
            native_size=settings.get("sample_size", LATENT_SIDE) * factor,
            size_multiple=max(factor * cls._patch(settings), cls.size_step),
            prediction_type="flow",
            guidance_scale=GUIDANCE_SCALE if embedded_name(folder) else cls.usual_guidance,
            vae_folder=vae_folder or folder / "vae",
            variant=variant,
            settings=settings,
        )

    @classmethod
    def _patch(cls, settings: Mapping[str, Any]) -> int:
        """Return the side (latent px) of what becomes one token."""
        own: list[int] = settings.get("all_patch_size") or [settings.get("patch_size", 1)]
        return cls.packed if cls.packed > 1 else own[0]

    @property
    def targets(self) -> Mapping[str, str]:
        """The regexes of the projections, but for those that get no gradient."""
        unused = "" if self.unused is None else f"(?!{self.unused.format(last=self.num_blocks - 1)})"
        found = {"attention": f"{unused}{self.attention}"}
        if self.feedforward is not None:
            found["attention_and_feedforward"] = f"{unused}(?:{self.attention}|{self.feedforward})"
        return found

    @property
    def num_blocks(self) -> int:
        """How many joint blocks the transformer has."""
        return int(self.settings["num_layers"])

    def load_tokenizers(self) -> list[Any]:
        """Load the tokenizers alone; the first is that of the text encoder that reads most."""
        index = read_config(self.folder, "model_index.json")
        found = {part: _class_of(index, part) for part in index if part.startswith("tokenizer")}
        loaded = [
            getattr(transformers, kind, transformers.AutoTokenizer).from_pretrained(str(self.folder / part))
            for part, kind in sorted(found.items(), reverse=True)
            if kind is not None
        ]
        return [getattr(each, "tokenizer", each) for each in loaded]  # a processor reads pictures too

    def load_text_encoders(self, dtype: torch.dtype = torch.float32) -> TextEncoders:
        """Load tokenizers and text encoders, frozen."""
        pipeline = self.load_pipeline(self.pipeline_class, dtype=dtype, transformer=None, vae=None)
        found = {name: pipeline.components[name] for name in self.classes if name.startswith("text_encoder")}
        models = {name: model.requires_grad_(False).eval() for name, model in found.items() if model}
        return TextEncoders(pipeline, models, partial(self.encode, pipeline))

    def load_vae(self) -> Any:
        """Load the autoencoder, frozen, in float32."""
        kind, folder = self.classes["vae"], self.vae_folder
        return load_part(kind, folder, dtype=torch.float32, variant=self.variant).requires_grad_(False).eval()

    def load_denoiser(self, dtype: torch.dtype = torch.float32) -> Any:
        """Load the transformer, frozen."""
        return self._load(self.classes["transformer"], "transformer", dtype=dtype)

    def empty_denoiser(self) -> Any:
        """Return the transformer without weights."""
        kind: Any = self.classes["transformer"]
        with torch.device("meta"):
            return kind.from_config(kind.load_config(str(self.folder), subfolder="transformer"))

    def load_noise(self, weighting_scheme: str = "none", timestep_shift: str = "auto") -> FlowNoise:
        """Return the noise of the base's own scheduler, weighed and shifted."""
        patch = self._patch(self.settings)
        return FlowNoise.of(self.folder, weighting_scheme, timestep_shift, patch=patch)

    @staticmethod
    def set_attention(denoiser: Any, attention: Attention, *, latent_side: int) -> None:
        """Leave the transformer's attention fused, as diffusers has it."""

    @classmethod
    def predict(
        cls,
        denoiser: Any,
        noisy: Tensor,
        timesteps: Tensor,
        embeddings: PromptEmbeddings,
        *,
        size_ids: Tensor | None = None,
        inpainting: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Return the velocity of noisy latents (b, c, h, w) at timesteps (b,) from 0 to 1000."""
        device, dtype = denoiser.device, denoiser.dtype
        told: dict[str, Any] = {}
        if denoiser.config.get("guidance_embeds"):
            told["guidance"] = torch.ones_like(timesteps) if guidance is None else guidance
            told["guidance"] = told["guidance"].to(device, torch.float32)
        embeddings = embeddings.to(device, dtype)
        return cls._velocity(denoiser, noisy.to(device, dtype), timesteps.to(device), embeddings, **told)

    @staticmethod
    @abstractmethod
    def _velocity(
        denoiser: Any, noisy: Tensor, timesteps: Tensor, embeddings: PromptEmbeddings, **told: Tensor
    ) -> Tensor:
        """Ask a transformer as the pipeline does; all is on its device and in its dtype.

        It may be told of "guidance" (b,): at 1, as in training, that changes nothing.
        """

    def num_channels(self, denoiser: Any) -> int:
        """Return how many channels latents have."""
        return int(denoiser.config.in_channels) // self.packed**2

    def set_timesteps(self, scheduler: Any, num_steps: int, latents: Tensor) -> None:
        """Let a scheduler draw latents (1, c, h, w) in so many steps, as the pipeline does."""
        tokens = latents.shape[-2] * latents.shape[-1] // self._patch(self.settings) ** 2
        has_own = self.has_own_sigmas or scheduler.config.get("use_flow_sigmas")
        sigmas = {} if has_own else {"sigmas": np.linspace(1.0, 1 / num_steps, num_steps)}
        is_shifted = scheduler.config.get("use_dynamic_shifting")
        shift = {"mu": self._shift(scheduler.config, tokens, num_steps)} if is_shifted else {}
        scheduler.set_timesteps(num_steps, device=latents.device, **sigmas, **shift)

    def first_step(self, num_steps: int, strength: float) -> int:
        """Return which step is the first; of half steps these pipelines take one more."""
        return int(num_steps - min(num_steps * strength, num_steps))

    def _shift(self, config: Mapping[str, Any], tokens: int, num_steps: int) -> float:
        """Return the μ that a dynamic shift takes; others leave it alone."""
        ends = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        return float(calculate_shift(tokens, *(config.get(end, usual) for end, usual in ends.items())))

    def predict_nothing(self, denoiser: Any, *, batch: int, size: tuple[int, int]) -> None:
        """Call a transformer on the meta device as a step of pictures of a size (height, width) in px."""
        config, (height, width) = denoiser.config, (side // self.vae_scale_factor for side in size)
        with torch.device("meta"):
            pooled = config.get("pooled_projection_dim")
            embeddings = PromptEmbeddings(
                torch.empty(batch, self.num_text_tokens, config[self.text_width]),
                None if pooled is None else torch.empty(batch, pooled),
            )
            latents = torch.empty(batch, config.in_channels // self.packed**2, height, width)
            self.predict(denoiser, latents, torch.empty(batch), embeddings)

    def load_unchecked_pipeline(self, dtype: torch.dtype) -> Any:
        """Load the whole pipeline."""
        return self.load_pipeline(self.pipeline_class, dtype=dtype)


def pack(latents: Tensor) -> Tensor:
    """Return patches of 2 × 2 as tokens: (b, c, h, w) to (b, h / 2 · w / 2, 4 c)."""
    b, c, h, w = latents.shape
    patches = latents.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, h * w // 4, 4 * c)


def unpack(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """Return tokens of `pack` as latents of a shape (…, h, w)."""
    b, _, c = tokens.shape
    h, w = shape[-2:]
    patches = tokens.reshape(b, h // 2, w // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(b, c // 4, h, w)


def _class_of(index: Mapping[str, Any], part: str) -> str | None:
    entry = index.get(part)
    return entry[1] if isinstance(entry, list) and len(entry) == 2 else None


def _check_class(needed: type, found: object, what: str) -> None:
    if found != needed.__name__:
        raise ValueError(
            f"{what} is of the class {printable(found)}, which is not handled here; use one of "
            f"{needed.__name__}"
        )
