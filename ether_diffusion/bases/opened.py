"""A Stable Diffusion base that is opened but not loaded: its parts come into memory one at a time."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ether_diffusion.bases.loading import find_folder, find_part, load_pipeline
from ether_diffusion.bases.parts import (
    check_classes,
    check_unet,
    check_vae,
    read_config,
    vae_scale_factor,
)
from ether_diffusion.bases.prompts import PromptEmbeddings, TextEncoders
from ether_diffusion.bases.schedule import forward_process
from ether_diffusion.bases.weights import check_variant, find_variant, load_part, stored_dtype
from ether_diffusion.tiny_world import WEIGHTS_FOLDER

logger = logging.getLogger(__name__)

Family = Literal["sd", "sdxl"]

GUIDANCE: dict[Family, float] = {"sd": 7.5, "sdxl": 5.0}
"""The defaults of diffusers' pipelines."""
TINY_WORLD_GUIDANCE = 3.0


@dataclass(frozen=True)
class Base:
    """The folder of a base in diffusers' layout, and what its configs say of it.

    `native_size` (px) is what it was trained at; `size_multiple` (px) divides the sides of its pictures;
    `guidance_scale` is what its pictures are usually drawn with.
    """

    name: str
    folder: Path
    family: Family
    is_inpainting: bool
    vae_scale_factor: int
    native_size: int
    size_multiple: int
    prediction_type: str
    guidance_scale: float
    vae_folder: Path | None = None
    tokenizer_folder: Path | None = None
    variant: str | None = None

    def load_unet(self, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
        """Load the UNet, frozen."""
        return self._load(UNet2DConditionModel, "unet", dtype=dtype).requires_grad_(False)

    def empty_unet(self) -> UNet2DConditionModel:
        """Return the UNet without weights, on the meta device: its modules' names and shapes."""
        with torch.device("meta"):
            config = UNet2DConditionModel.load_config(str(self.folder), subfolder="unet")
            return UNet2DConditionModel.from_config(config)

    @property
    def unet_dtype(self) -> torch.dtype:
        """The dtype that the UNet is stored in."""
        return stored_dtype(self.folder / "unet", self.variant)

    def load_vae(self) -> AutoencoderKL | AutoencoderTiny:
        """Load the autoencoder, frozen, in float32: SDXL's gives NaN in float16."""
        folder = self.vae_folder or self.folder / "vae"
        kind = _VAE_CLASSES[read_config(folder, "config.json").get("_class_name", "AutoencoderKL")]
        vae = load_part(kind, folder, dtype=torch.float32, variant=self.variant)
        return vae.requires_grad_(False).eval()

    def load_text_encoders(self, dtype: torch.dtype = torch.float32) -> TextEncoders:
        """Load tokenizers and text encoders, frozen."""
        kinds = {"text_encoder": CLIPTextModel}
        if self.family == "sdxl":
            kinds["text_encoder_2"] = CLIPTextModelWithProjection
        models = [
            self._load(kind, name, dtype=dtype).requires_grad_(False).eval() for name, kind in kinds.items()
        ]
        return TextEncoders(self.load_tokenizers(), models)

    def load_tokenizers(self) -> list[CLIPTokenizer]:
        """Load the tokenizers alone."""
        names = ["tokenizer", "tokenizer_2"][: 2 if self.family == "sdxl" else 1]
        folders = [self.folder / name for name in names]
        if self.tokenizer_folder:
            folders[0] = self.tokenizer_folder
        for folder in folders:  # of none, transformers makes a tokenizer without words
            _check_part(folder, ("tokenizer.json", "vocab.json"), "tokenizer")
        return [CLIPTokenizer.from_pretrained(str(folder)) for folder in folders]

    def load_noise_scheduler(self) -> DDPMScheduler:
        """Return the forward process of the base's scheduler: its betas and what its UNet predicts.

        Raises:
            ValueError: the base was trained with noise of another kind.
        """
        return forward_process(self.folder)

    def load_pipeline(self, kind: Any = DiffusionPipeline, **options: Any) -> Any:
        """Load the whole pipeline, as `load_pipeline` does, by a class of its kind or the base's own."""
        return load_pipeline(self.folder, kind, variant=self.variant, **options)

    def load_unchecked_pipeline(self, dtype: torch.dtype) -> Any:
        """Load the whole pipeline without a safety checker, which blackens pictures."""
        has_none = self.family == "sdxl"
        return self.load_pipeline(
            dtype=dtype, **({} if has_none else {"safety_checker": None, "requires_safety_checker": False})
        )

    @property
    def lora_writer(self) -> Any:
        """What of diffusers writes a LoRA of this base: save_lora_weights of its pipeline."""
        kind = StableDiffusionXLPipeline if self.family == "sdxl" else StableDiffusionPipeline
        return kind.save_lora_weights

    def pipeline_around(self, unet: UNet2DConditionModel) -> DiffusionPipeline:
        """Return the base's pipeline around a UNet, without what embeddings replace."""
        absent: dict[str, None] = {"text_encoder": None, "tokenizer": None}
        if self.family == "sdxl":
            absent |= {"text_encoder_2": None, "tokenizer_2": None}
        else:
            absent |= {"safety_checker": None, "feature_extractor": None}
        vae = self.load_vae().to(unet.device)
        pipeline: DiffusionPipeline = self.load_pipeline(unet=unet, vae=vae, **absent)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def draw_latents(
        self,
        pipeline: DiffusionPipeline,
        embeddings: PromptEmbeddings,
        *,
        size: tuple[int, int],
        num_steps: int,
        guidance_scale: float,
        seed: int,
        check: Callable[[], None],
    ) -> Tensor:
        """Return the latents (1, c, h, w) of a picture of size (height, width) in px.

        embeddings are those of the prompt and of what it should not show; check may raise between two steps.
        """

        def interruptible(_: object, step: int, timestep: object, values: dict[str, Any]) -> dict[str, Any]:
            check()
            return values

        embedded = embeddings.to(pipeline.unet.device, pipeline.unet.dtype)
        arguments: dict[str, Any] = {
            "prompt_embeds": embedded.sequence[:1],
            "negative_prompt_embeds": embedded.sequence[1:],
        }
        if embedded.pooled is not None:
            arguments["pooled_prompt_embeds"] = embedded.pooled[:1]
            arguments["negative_pooled_prompt_embeds"] = embedded.pooled[1:]
        height, width = size
        latents: Tensor = pipeline(
            **arguments,
            height=height,
            width=width,
            num_inference_steps=num_steps,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            callback_on_step_end=interruptible,
        ).images
        return latents

    def _load(self, kind: Any, subfolder: str, *, dtype: torch.dtype) -> Any:
        return load_part(kind, self.folder, subfolder, dtype=dtype, variant=self.variant)


def open_base(
    name: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    vae: str | None = None,
    tokenizer: str | None = None,
    local_files_only: bool = False,
) -> Base:
    """Open a Stable Diffusion base: a folder in diffusers' layout, a hub id or the alias "tiny_world".

    Raises:
        FileNotFoundError: there is none.
        OSError: the Hub does not give it.
        ValueError: it is not a Stable Diffusion of the families SD 1.x, SD 2.x and SDXL.
    """
    folder = find_folder(name, revision=revision, variant=variant, local_files_only=local_files_only)
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} holds no model_index.json; name a folder in diffusers' layout")
    index, unet = read_config(folder, "model_index.json"), read_config(folder, "unet/config.json")
    check_classes(folder, index)
    vae_config = read_config(folder, "vae/config.json")
    scheduler = read_config(folder, "scheduler/scheduler_config.json")
    family: Family = "sdxl" if unet.get("addition_embed_type") == "text_time" else "sd"
    channels = unet.get("in_channels", 4)
    prediction_type = scheduler.get("prediction_type", "epsilon")
    _check_family(folder, index, family, channels, prediction_type)
    encoders = ("text_encoder", "text_encoder_2")[: 2 if family == "sdxl" else 1]
    if variant is not None:
        check_variant(folder, variant)
    for part in ("unet", *encoders, *(() if vae else ("vae",))):
        find_variant(folder / part, variant)
    check_unet(folder, unet, [read_config(folder, f"{name}/config.json") for name in encoders])
    check_vae(folder / "vae", vae_config)
    vae_folder = tokenizer_folder = None
    factor = vae_scale_factor(vae_config)
    if vae is not None:
        vae_folder = find_part(vae, _VAE_FILES, local_files_only=local_files_only)
        factor = _factor_of_other(vae_folder, factor)
    if tokenizer is not None:
        tokenizer_folder = find_part(
            tokenizer, ("*.json", "*.txt"), revision=revision, local_files_only=local_files_only
        )
    size = unet.get("sample_size", 64)
    return Base(
        name=str(name),
        folder=folder,
        family=family,
        is_inpainting=channels == 9,
        vae_scale_factor=factor,
        native_size=int(min(size) if isinstance(size, list) else size) * factor,
        size_multiple=factor * 2 ** (len(unet["block_out_channels"]) - 1),
        prediction_type=str(prediction_type),
        guidance_scale=TINY_WORLD_GUIDANCE if folder == WEIGHTS_FOLDER else GUIDANCE[family],
        vae_folder=vae_folder,
        tokenizer_folder=tokenizer_folder,
        variant=variant,
    )


def _factor_of_other(folder: Path, own_factor: int) -> int:
    """Check a VAE that takes the place of the base's, and return what it divides sides by."""
    _check_part(folder, ("config.json",), "VAE")
    config = read_config(folder, "config.json")
    check_vae(folder, config)
    factor = vae_scale_factor(config)
    if factor != own_factor:
        logger.warning(
            "the VAE in %s divides sides by %d, and the base's own by %d: it was made for another base",
            *(folder, factor, own_factor),
        )
    return factor


_VAE_FILES = ("config.json", "diffusion_pytorch_model*.safetensors")
_VAE_CLASSES = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}


def _check_part(folder: Path, files: Sequence[str], what: str) -> None:
    """Refuse a folder that has none of these files."""
    if not any((folder / name).is_file() for name in files):
        raise ValueError(
            f"{folder} holds no {what}: it has no {' and no '.join(files)}; name a folder of one"
        )


def _check_family(
    folder: Path, index: Mapping[str, Any], family: Family, channels: object, prediction_type: object
) -> None:
    encoders = [index.get(name) for name in ("text_encoder", "text_encoder_2")]
    has_encoders = [isinstance(entry, list) and entry[0] is not None for entry in encoders]
    if has_encoders != [True, family == "sdxl"]:
        found = index.get("_class_name", "an unknown pipeline")
        raise ValueError(f"{folder} is a {found}; use Stable Diffusion 1.x, 2.x or a whole SDXL base")
    if channels not in (4, 9):
        raise ValueError(
            f"the UNet in {folder} takes {channels} channels; use one of 4 (pictures) or 9 (inpainting)"
        )
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"the base in {folder} predicts {prediction_type!r}; use one of epsilon or v_prediction"
        )
