"""The seam: what a base answers, whatever its family; nothing else in the house asks which that is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeAlias

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ether_diffusion.bases import images
from ether_diffusion.bases.files import load_part, load_pipeline, read_config, stored_dtype
from ether_diffusion.prompts import Fragments

Denoiser: TypeAlias = ModelMixin
Autoencoder: TypeAlias = ModelMixin
Attention = Literal["auto", "eager", "sdpa", "xformers"]


@dataclass(frozen=True)
class PromptEmbeddings:
    """What prompts become: sequence (b, tokens, width) and, of some families, pooled (b, width).

    mask (b, tokens) is true where the denoiser reads a token; None where it reads them all.
    """

    sequence: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> "PromptEmbeddings":
        """Return them on a device in a dtype."""
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        mask = None if self.mask is None else self.mask.to(device)
        return PromptEmbeddings(self.sequence.to(device, dtype), pooled, mask)

    def zeros_like(self) -> "PromptEmbeddings":
        """Return as many numbers, all zero."""
        pooled = None if self.pooled is None else torch.zeros_like(self.pooled)
        return replace(self, sequence=torch.zeros_like(self.sequence), pooled=pooled)

    def rows(self, chosen: Tensor | slice) -> "PromptEmbeddings":
        """Return those of the prompts chosen (b,)."""
        if isinstance(chosen, Tensor):
            chosen = chosen.to(self.sequence.device)
        fields = (self.sequence, self.pooled, self.mask)
        return PromptEmbeddings(*(None if each is None else each[chosen] for each in fields))  # type: ignore[arg-type]


def stack_embeddings(rows: Sequence[PromptEmbeddings]) -> PromptEmbeddings:
    """Join embeddings along the batch; of those with masks, shorter ones are filled up."""
    longest = max(row.sequence.shape[1] for row in rows)
    missing = [longest - row.sequence.shape[1] for row in rows]
    sequences = [pad(row.sequence, (0, 0, 0, n)) for row, n in zip(rows, missing, strict=True)]
    pooled = [row.pooled for row in rows if row.pooled is not None]
    masks = [pad(row.mask, (0, n)) for row, n in zip(rows, missing, strict=True) if row.mask is not None]
    assert masks or not any(missing)
    return PromptEmbeddings(
        torch.cat(sequences), torch.cat(pooled) if pooled else None, torch.cat(masks) if masks else None
    )


@dataclass(frozen=True)
class TextEncoders:
    """The text encoders of a base by their names, in a pipeline that has nothing else but tokenizers."""

    pipeline: DiffusionPipeline
    models: Mapping[str, PreTrainedModel]
    encode: Callable[[Sequence[str]], PromptEmbeddings]
    """Embeds prompts; gradients reach the text encoders where these want them."""

    def to(self, device: torch.device) -> "TextEncoders":
        """Move the models, and return self."""
        for model in self.models.values():
            model.to(device)
        return self


class Noise(ABC):
    """The noise that a base was trained with, and what it predicts of it."""

    @abstractmethod
    def draw_timestep(self, generator: torch.Generator, shape: Sequence[int]) -> Tensor:
        """Draw a timestep () of the distribution to train with, for latents of a shape (c, h, w)."""

    @abstractmethod
    def add(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return latents (b, …) with the noise of timesteps (b,)."""

    @abstractmethod
    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the denoiser should predict, in the shape of the latents."""

    def weights(self, timesteps: Tensor) -> Tensor:
        """Return the weights (b,) of the loss that go with the distribution of timesteps."""
        return torch.ones(len(timesteps))

    @abstractmethod
    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Return the weights (b,) of Min-SNR (Hang et al. 2023, arXiv:2303.09556, section 3.4).

        Raises:
            ValueError: they have no meaning for this noise.
        """


@dataclass(frozen=True)
class Base(ABC):
    """A base that is opened and not loaded: its folder, what its configs say, and its parts one at a time.

    `native_size` (px) is what it was trained at; `size_multiple` (px) divides the sides of its pictures;
    `guidance_scale` is what its pictures are usually drawn with. Latents are those that the denoiser sees
    and predicts, (b, c, h, w) whatever shape it takes them in.
    """

    name: str
    folder: Path
    is_inpainting: bool
    vae_scale_factor: int
    native_size: int
    size_multiple: int
    prediction_type: str
    guidance_scale: float
    vae_folder: Path
    tokenizer_folder: Path | None = None
    variant: str | None = None

    denoiser: ClassVar[str]
    """What a pipeline calls its denoiser, and the folder calls its files."""
    pipeline_class: ClassVar[Any]
    """The pipeline of diffusers that draws, and writes and reads LoRA files."""
    drawn_by: ClassVar[str]
    """The pipeline of ours that draws."""
    drawn_by_with_control: ClassVar[str | None]
    """The pipeline of ours that draws with control images, where the family takes any."""
    half_dtype: ClassVar[torch.dtype] = torch.float16
    """The half precision that the family holds in."""
    takes_negative_prompts: ClassVar[bool] = True
    """Whether pictures are drawn away from what they should not show."""
    takes_weights: ClassVar[bool] = False
    """Whether the words of a prompt can be weighed, by `encode_weighted`."""
    latents_dtype: ClassVar[torch.dtype | None] = None
    """What pictures are drawn in where that is not the denoiser's."""
    attention_kernels: ClassVar[Sequence[Attention]]
    """The ways in which the denoiser can compute attention."""
    has_size_ids: ClassVar[bool]
    """Whether the denoiser is told the sizes and crops of pictures."""
    text_targets: ClassVar[Sequence[str]]
    """The names of attention projections in the text encoders; none where these are not trained."""

    @property
    @abstractmethod
    def targets(self) -> Mapping[str, str | Sequence[str]]:
        """The projections of the denoiser, names or a regex, by presets: "attention" and, where its
        feed-forward layers have projections, "attention_and_feedforward".
        """

    @classmethod
    @abstractmethod
    def recognises(cls, folder: Path, index: Mapping[str, Any]) -> bool:
        """Say whether a folder with this model_index.json holds a base of the family.

        Raises:
            ValueError: its configs cannot be read.
        """

    @classmethod
    @abstractmethod
    def open(
        cls,
        name: str,
        folder: Path,
        *,
        variant: str | None,
        vae_folder: Path | None,
        tokenizer_folder: Path | None,
    ) -> Self:
        """Open a folder that holds one; a VAE and a tokenizer of other folders take the base's own place.

        Raises:
            ValueError: a part is missing, or is nothing that can be used here.
        """

    @abstractmethod
    def load_tokenizers(self) -> list[Any]:
        """Load the tokenizers alone."""

    @abstractmethod
    def load_text_encoders(self, dtype: torch.dtype = torch.float32) -> TextEncoders:
        """Load tokenizers and text encoders, frozen."""

    @abstractmethod
    def encode(self, pipeline: Any, prompts: Sequence[str]) -> PromptEmbeddings:
        """Embed prompts with the text encoders of a pipeline, as that does."""

    def encode_weighted(self, pipeline: Any, fragments: Fragments) -> PromptEmbeddings:
        """Embed a prompt whose parts have weights."""
        raise NotImplementedError

    def encode_negative(self, pipeline: Any, prompt: str | None) -> PromptEmbeddings:
        """Embed what a picture should not show, or nothing, with the text encoders of a pipeline."""
        return self.encode(pipeline, [prompt or ""])

    @abstractmethod
    def load_vae(self) -> Autoencoder:
        """Load the autoencoder, frozen, in a dtype that it holds in."""

    @abstractmethod
    def load_denoiser(self, dtype: torch.dtype = torch.float32) -> Denoiser:
        """Load the denoiser, frozen."""

    @abstractmethod
    def empty_denoiser(self) -> Denoiser:
        """Return the denoiser without weights, on the meta device: its modules' names and shapes."""

    @property
    def denoiser_dtype(self) -> torch.dtype:
        """The dtype that the denoiser is stored in."""
        return stored_dtype(self.folder / self.denoiser, self.variant)

    @abstractmethod
    def load_noise(self, weighting_scheme: str = "none", timestep_shift: str = "auto") -> Noise:
        """Return the noise that the base was trained with; scheme and shift are of flow matching.

        Raises:
            ValueError: it is of a kind that nothing is trained with here, or has no such scheme or shift.
        """

    def encode_images(self, vae: Autoencoder, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the autoencoder's posterior, as `images.encode_images`."""
        return images.encode_images(vae, pixels)

    def scale_latents(self, vae: Autoencoder, latents: Tensor) -> Tensor:
        """Map latents of the autoencoder to those of the denoiser."""
        return images.scale_latents(vae, latents)

    def decode_latents(
        self, vae: Autoencoder, latents: Tensor, check: images.Check | None = None
    ) -> list[Image.Image]:
        """Return the pictures of the denoiser's latents; see `checks`."""
        return images.decode_latents(vae, latents, check)

    @staticmethod
    @abstractmethod
    def set_attention(denoiser: Denoiser, attention: Attention, *, latent_side: int) -> None:
        """Let a denoiser compute attention in one of these ways, auto by what is fastest in training."""

    @staticmethod
    @abstractmethod
    def predict(
        denoiser: Denoiser,
        noisy: Tensor,
        timesteps: Tensor,
        embeddings: PromptEmbeddings,
        *,
        size_ids: Tensor | None = None,
        inpainting: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Return what a denoiser predicts of noisy latents (b, c, h, w), in their shape and its dtype.

        size_ids (b, 6) are what `has_size_ids` asks for: original height and width, crop top and left,
        target height and width; inpainting (b, 1 + c, h, w) is the mask and what it leaves; guidance (b,) is
        for denoisers that are told of it, which take 1 without.
        """

    @abstractmethod
    def predict_nothing(self, denoiser: Denoiser, *, batch: int, size: tuple[int, int]) -> None:
        """Call a denoiser on the meta device as a step of pictures of a size (height, width) in px does."""

    def load_pipeline(self, kind: Any = DiffusionPipeline, **options: Any) -> Any:
        """Load the whole pipeline, as `load_pipeline` does, by a class of its kind or the base's own."""
        return load_pipeline(self.folder, kind, variant=self.variant, **options)

    @abstractmethod
    def load_unchecked_pipeline(self, dtype: torch.dtype) -> Any:
        """Load the whole pipeline without what blackens pictures."""

    def load_scheduler(self) -> Any:
        """Load the scheduler that the base is drawn with."""
        kind = read_config(self.folder, "model_index.json")["scheduler"][1]
        return getattr(diffusers, kind).from_pretrained(str(self.folder), subfolder="scheduler")

    def set_timesteps(self, scheduler: Any, num_steps: int, latents: Tensor) -> None:
        """Let a scheduler draw latents (1, c, h, w) in so many steps, as the base's pipeline does."""
        scheduler.set_timesteps(num_steps, device=latents.device)

    def first_step(self, num_steps: int, strength: float) -> int:
        """Return which of so many steps is the first where a picture is changed by a strength."""
        return num_steps - min(int(num_steps * strength), num_steps)

    def draw_noise(self, denoiser: Denoiser, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Draw the latents (1, c, h, w), on the CPU, that the picture of a size (height, width) begins as."""
        sides = (side // self.vae_scale_factor for side in size)
        shape = (1, self.num_channels(denoiser), *sides)
        return torch.randn(shape, generator=generator, dtype=self.latents_dtype or denoiser.dtype)

    def num_channels(self, denoiser: Denoiser) -> int:
        """Return how many channels latents have."""
        return int(denoiser.config.out_channels if self.is_inpainting else denoiser.config.in_channels)

    def is_guided(self, denoiser: Denoiser, guidance_scale: float) -> bool:
        """Say whether a picture takes a row without its prompt, too (classifier-free guidance)."""
        return guidance_scale > 1

    def guided(self, given: Tensor, without: Tensor, guidance_scale: float) -> Tensor:
        """Return what is predicted (1, c, h, w) with a prompt, led away from what is without."""
        return without + guidance_scale * (given - without)

    def checks(self, pipeline: Any) -> images.Check | None:
        """Return what the base's whole pipeline does to a picture at last, such as its safety checker."""
        return None

    def _load(self, kind: Any, subfolder: str, *, dtype: torch.dtype) -> Any:
        part = load_part(kind, self.folder, subfolder, dtype=dtype, variant=self.variant)
        return part.requires_grad_(False)


def recompute_activations(model: PreTrainedModel) -> None:
    """Let a text encoder in training compute its activations twice instead of keeping them."""
    newer_name = "activation_checkpointing_enable"  # transformers warns of the older one where it has both
    enable = getattr(model, newer_name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
