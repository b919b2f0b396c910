"""The UNet families: Stable Diffusion 1.x, 2.x and their inpainting bases, and Stable Diffusion XL."""

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Self

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.training_utils import compute_snr
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel

from ether_diffusion.bases.base import Attention, Base, Noise, PromptEmbeddings, TextEncoders
from ether_diffusion.bases.files import check_variant, find_variant, load_part, read_config
from ether_diffusion.bases.images import Check, vae_scale_factor
from ether_diffusion.prompts import Fragments
from ether_diffusion.tiny_world import GUIDANCE_SCALE, embedded_name
from ether_diffusion.tuner import TARGET_PRESETS
from ether_diffusion.wording import listed, printable

logger = logging.getLogger(__name__)

SMALL_ATTENTION = 32
"""Side (latent px) up to which a CPU is faster without fused attention, whose backward is slow there."""

NOISE = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    "prediction_type",
)
"""The settings of a scheduler that say what a base was trained with."""
_OTHER_NOISE = {"use_flow_sigmas": False, "timestep_type": "discrete"}
"""Settings of the same classes under which the noise is another."""
TRAINED_SCHEDULERS = frozenset(
    f"{name}Scheduler"
    for name in (
        *("DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep"),
        *("DPMSolverMultistep", "DPMSolverMultistepInverse", "DPMSolverSDE", "DPMSolverSinglestep"),
        *("EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete"),
        *("KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM", "SASolver", "TCD", "UniPCMultistep"),
    )
)
"""Of the noise of DDPM: variance-preserving, by betas over discrete timesteps (Ho et al. 2020)."""

_VAES = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
_TOKENIZERS = frozenset({"CLIPTokenizer", "CLIPTokenizerFast"})
_CLASSES: dict[str, tuple[str, frozenset[str]]] = {
    "unet": ("UNet", frozenset({"UNet2DConditionModel"})),
    "vae": ("VAE", frozenset(_VAES)),
    "text_encoder": ("text encoder", frozenset({"CLIPTextModel"})),
    "text_encoder_2": ("second text encoder", frozenset({"CLIPTextModelWithProjection"})),
    "tokenizer": ("tokenizer", _TOKENIZERS),
    "tokenizer_2": ("second tokenizer", _TOKENIZERS),
    "scheduler": (
        "scheduler",
        TRAINED_SCHEDULERS | {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"},
    ),
}
"""What a part is called, and the classes of diffusers and transformers that are handled."""
_CLIP_TEXTS = ("clip", "clip_text_model")
_PLAIN_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""What transformers calls any tokenizer that is one file."""
_CONDITIONS = {
    "class_embed_type": (),
    "num_class_embeds": (),
    "addition_embed_type": ("text_time",),
    "encoder_hid_dim_type": ("text_proj",),
}
"""Settings of a UNet that ask for more than a prompt, sizes and crops, but for these values."""


@dataclass(frozen=True)
class DiscreteNoise(Noise):
    """The noise of DDPM, over discrete timesteps, of which the UNet predicts epsilon or velocity."""

    scheduler: DDPMScheduler

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Return that of a base's own scheduler, by that class's own defaults.

        Raises:
            ValueError: it is of another noise, so that training would learn what the base cannot use.
        """
        config = read_config(folder, "scheduler/scheduler_config.json")
        kind = read_config(folder, "model_index.json")["scheduler"][1]
        kind = kind if kind not in TRAINED_SCHEDULERS else config.get("_class_name", kind)
        other = [
            f"{name}={config[name]}" for name, own in _OTHER_NOISE.items() if config.get(name, own) != own
        ]
        if kind not in TRAINED_SCHEDULERS or other:
            found = f"{kind} with {other[0]}" if kind in TRAINED_SCHEDULERS else kind
            raise ValueError(
                f"the base in {folder} has the noise of {printable(found)}, with which pictures are drawn "
                "and nothing is trained here; train on a base with betas over discrete timesteps, as DDIM's"
            )
        known = inspect.signature(getattr(diffusers, kind).__init__).parameters
        noise = {name: config.get(name, known[name].default) for name in NOISE if name in known}
        try:
            scheduler = DDPMScheduler.from_config(config, **noise)
        except (NotImplementedError, TypeError, ValueError) as error:
            raise ValueError(f"the scheduler of {folder} has noise that DDPM has not: {error}") from None
        if len(scheduler.betas) != scheduler.config.num_train_timesteps:
            raise ValueError(
                f"the scheduler of {folder} has {len(scheduler.betas)} trained_betas for num_train_timesteps="
                f"{scheduler.config.num_train_timesteps}; fetch or save the base again"
            )
        return cls(scheduler)

    def draw_timestep(self, generator: torch.Generator, shape: Sequence[int]) -> Tensor:
        """Draw one, uniform from 0 to below num_train_timesteps."""
        return torch.randint(self.scheduler.config.num_train_timesteps, (), generator=generator)

    def add(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return noisy latents (Ho et al. 2020, eq. 4)."""
        noisy: Tensor = self.scheduler.add_noise(latents, noise, timesteps)
        return noisy

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the noise, or the velocity (Salimans and Ho 2022, eq. 12)."""
        if not self._is_velocity:
            return noise
        velocity: Tensor = self.scheduler.get_velocity(latents, noise, timesteps)
        return velocity

    def min_snr_weights(self, timesteps: Tensor, gamma: float) -> Tensor:
        """Return min(SNR, gamma) / SNR for noise prediction, min(SNR, gamma) / (SNR + 1) for velocity."""
        snr: Tensor = compute_snr(self.scheduler, timesteps)
        clipped = snr.clamp(max=gamma)
        if self._is_velocity:
            return clipped / (snr + 1)
        return torch.where(snr > 0, clipped / snr.clamp(min=torch.finfo(snr.dtype).tiny), 1.0)

    @property
    def _is_velocity(self) -> bool:
        return bool(self.scheduler.config.prediction_type == "v_prediction")


class UNetBase(Base):
    """What the families of Stable Diffusion have in common: a UNet, CLIP's texts, latents of 4 channels."""

    denoiser = "unet"
    takes_weights = True
    targets = TARGET_PRESETS
    attention_kernels = ("auto", "eager", "sdpa", "xformers")
    text_targets = ("q_proj", "k_proj", "v_proj", "out_proj")  # of transformers' CLIP

    usual_guidance: ClassVar[float]
    """The default of diffusers' pipeline."""
    text_encoders: ClassVar[Mapping[str, type[PreTrainedModel]]]
    unchecked: ClassVar[Mapping[str, Any]]
    """What leaves the safety checker out of the pipeline."""
    bare: ClassVar[Mapping[str, Any]]
    """What else the pipeline is told where it only encodes prompts."""

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
        """Open a folder after a look at every part's config and files."""
        index, unet = read_config(folder, "model_index.json"), read_config(folder, "unet/config.json")
        _check_classes(folder, index)
        own_vae = read_config(folder, "vae/config.json")
        scheduler = read_config(folder, "scheduler/scheduler_config.json")
        prediction_type = scheduler.get("prediction_type", "epsilon")
        channels = unet.get("in_channels", 4)
        cls._check_form(folder, index, channels, prediction_type)
        if variant is not None:
            check_variant(folder, variant)
        for part in ("unet", *cls.text_encoders, *(() if vae_folder else ("vae",))):
            find_variant(folder / part, variant)
        _check_unet(folder, unet, [read_config(folder, f"{each}/config.json") for each in cls.text_encoders])
        _check_vae(folder / "vae", own_vae)
        factor = vae_scale_factor(own_vae)
        if vae_folder is not None:
            factor = _factor_of_other(vae_folder, factor)
        size = unet.get("sample_size", 64)
        return cls(
            name=name,
            folder=folder,
            is_inpainting=channels == 9,
            vae_scale_factor=factor,
            native_size=int(min(size) if isinstance(size, list) else size) * factor,
            size_multiple=factor * 2 ** (len(unet["block_out_channels"]) - 1),
            prediction_type=str(prediction_type),
            guidance_scale=GUIDANCE_SCALE if embedded_name(folder) else cls.usual_guidance,
            vae_folder=vae_folder or folder / "vae",
            tokenizer_folder=tokenizer_folder,
            variant=variant,
        )

    @classmethod
    def _check_form(
        cls, folder: Path, index: Mapping[str, Any], channels: object, prediction_type: object
    ) -> None:
        given = [index.get(each) for each in ("text_encoder", "text_encoder_2")]
        if [isinstance(entry, list) and entry[0] is not None for entry in given] != [True, cls.has_size_ids]:
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

    def load_denoiser(self, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
        """Load the UNet, frozen."""
        return self._load(UNet2DConditionModel, "unet", dtype=dtype)

    def empty_denoiser(self) -> UNet2DConditionModel:
        """Return the UNet without weights."""
        with torch.device("meta"):
            config = UNet2DConditionModel.load_config(str(self.folder), subfolder="unet")
            return UNet2DConditionModel.from_config(config)

    def load_vae(self) -> AutoencoderKL | AutoencoderTiny:
        """Load the autoencoder, frozen, in float32: SDXL's gives NaN in float16."""
        kind = _VAES[read_config(self.vae_folder, "config.json").get("_class_name", "AutoencoderKL")]
        vae = load_part(kind, self.vae_folder, dtype=torch.float32, variant=self.variant)
        return vae.requires_grad_(False).eval()

    def load_tokenizers(self) -> list[CLIPTokenizer]:
        """Load the tokenizers alone."""
        folders = [self.folder / name for name in self._tokenizer_names]
        folders[0] = self.tokenizer_folder or folders[0]
        for folder in folders:  # of none, transformers makes a tokenizer without words
            _check_there(folder, ("tokenizer.json", "vocab.json"), "tokenizer")
        return [CLIPTokenizer.from_pretrained(str(folder)) for folder in folders]

    def load_text_encoders(self, dtype: torch.dtype = torch.float32) -> TextEncoders:
        """Load tokenizers and text encoders, frozen."""
        models = {
            name: self._load(kind, name, dtype=dtype).eval() for name, kind in self.text_encoders.items()
        }
        tokenizers = dict(zip(self._tokenizer_names, self.load_tokenizers(), strict=True))
        absent = dict.fromkeys(("vae", "unet", "scheduler"))
        pipeline = self.pipeline_class(**models, **tokenizers, **absent, **self.bare)
        return TextEncoders(pipeline, models, partial(self.encode, pipeline))

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> PromptEmbeddings:
        """Embed prompts as the pipeline does."""
        device = next(pipeline.text_encoder.parameters()).device
        encoded = pipeline.encode_prompt(
            prompt=list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return PromptEmbeddings(encoded[0], encoded[2] if self.has_size_ids else None)

    def encode_weighted(self, pipeline: Any, fragments: Fragments) -> PromptEmbeddings:
        """Embed a prompt whose parts have weights, as compel does; its pooled text has none."""
        compel, (texts, weights) = import_module("compel.embeddings_provider"), zip(*fragments, strict=True)
        kind = compel.ReturnedEmbeddingsType
        kind = (
            kind.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
            if self.has_size_ids
            else kind.LAST_HIDDEN_STATES_NORMALIZED
        )
        sequences = []
        for tokenizer, model in zip(self._tokenizer_names, self.text_encoders, strict=True):
            parts = (pipeline.components[tokenizer], pipeline.components[model])
            provider = compel.EmbeddingsProvider(*parts, returned_embeddings_type=kind)
            how = {"device": parts[1].device}
            sequences.append(
                provider.get_embeddings_for_weighted_prompt_fragments([list(texts)], [list(weights)], **how)
            )
        pooled = self.encode(pipeline, ["".join(texts)]).pooled if self.has_size_ids else None
        return PromptEmbeddings(torch.cat(sequences, dim=-1), pooled)

    @property
    def _tokenizer_names(self) -> list[str]:
        return [name.replace("text_encoder", "tokenizer") for name in self.text_encoders]

    def load_noise(self, weighting_scheme: str = "none", timestep_shift: str = "auto") -> DiscreteNoise:
        """Return the noise of the base's own scheduler."""
        for name, found in (("weighting_scheme", weighting_scheme), ("timestep_shift", timestep_shift)):
            if found not in ("none", "auto"):
                raise ValueError(
                    f"{name}={found} is of flow matching, and the base in {self.folder} was trained with the "
                    "noise of DDPM; leave it out, or use snr_gamma"
                )
        return DiscreteNoise.of(self.folder)

    @staticmethod
    def set_attention(denoiser: Any, attention: Attention, *, latent_side: int) -> None:
        """Let a UNet compute attention in one of these ways, auto by what is fastest in training."""
        if attention == "xformers":
            denoiser.enable_xformers_memory_efficient_attention()
            return
        is_small = denoiser.device.type == "cpu" and latent_side <= SMALL_ATTENTION
        is_eager = attention == "eager" or (attention == "auto" and is_small)
        denoiser.set_attn_processor(AttnProcessor() if is_eager else AttnProcessor2_0())

    @staticmethod
    def predict(
        denoiser: Any,
        noisy: Tensor,
        timesteps: Tensor,
        embeddings: PromptEmbeddings,
        *,
        size_ids: Tensor | None = None,
        inpainting: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Return what a UNet predicts; the mask and what it leaves are further channels of what it sees."""
        device, dtype = denoiser.device, denoiser.dtype
        embeddings = embeddings.to(device, dtype)
        if inpainting is not None:
            noisy = torch.cat((noisy, inpainting), dim=1)
        further: dict[str, Any] = {}
        if size_ids is not None:
            conditions = {"text_embeds": embeddings.pooled, "time_ids": size_ids.to(device, dtype)}
            further["added_cond_kwargs"] = conditions
        if (
            guidance is not None and denoiser.config.time_cond_proj_dim is not None
        ):  # of one that was distilled
            told = StableDiffusionPipeline.get_guidance_scale_embedding(
                None, (guidance - 1).cpu(), denoiser.config.time_cond_proj_dim
            )
            further["timestep_cond"] = told.to(device, dtype)
        prediction: Tensor = denoiser(
            sample=noisy.to(device, dtype),
            timestep=timesteps.to(device),
            encoder_hidden_states=embeddings.sequence,
            **further,
        ).sample
        return prediction

    def predict_nothing(self, denoiser: Any, *, batch: int, size: tuple[int, int]) -> None:
        """Call a UNet on the meta device as a step of pictures of a size (height, width) in px does."""
        config, (height, width) = denoiser.config, (side // self.vae_scale_factor for side in size)
        with torch.device("meta"):
            pooled = size_ids = None
            if self.has_size_ids:
                numbers = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
                pooled, size_ids = torch.empty(batch, numbers), torch.empty(batch, 6)
            embeddings = PromptEmbeddings(torch.empty(batch, 77, config.cross_attention_dim), pooled)
            latents = torch.empty(batch, config.in_channels, height, width)
            self.predict(denoiser, latents, torch.empty(()), embeddings, size_ids=size_ids)

    def load_unchecked_pipeline(self, dtype: torch.dtype) -> Any:
        """Load the whole pipeline without a safety checker, which blackens pictures."""
        return self.load_pipeline(dtype=dtype, **self.unchecked)

    def is_guided(self, denoiser: Any, guidance_scale: float) -> bool:
        """Say whether a picture takes a row without its prompt, which distilled UNets do not."""
        return guidance_scale > 1 and denoiser.config.time_cond_proj_dim is None


class StableDiffusion(UNetBase):
    """Stable Diffusion 1.x and 2.x, and their bases for inpainting."""

    pipeline_class = StableDiffusionPipeline
    drawn_by, drawn_by_with_control = "EtherStableDiffusionPipeline", "EtherControlPipeline"
    has_size_ids = False
    usual_guidance = 7.5
    text_encoders: ClassVar = {"text_encoder": CLIPTextModel}
    unchecked: ClassVar = {
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    bare = unchecked

    @classmethod
    def recognises(cls, folder: Path, index: Mapping[str, Any]) -> bool:
        """Say whether there is a UNet that is not told of sizes."""
        return "unet" in index and not SDXL.recognises(folder, index)

    def checks(self, pipeline: Any) -> Check | None:
        """Return the safety checker, where the base has one."""
        if pipeline.safety_checker is None:
            return None
        return lambda decoded: pipeline.run_safety_checker(decoded, decoded.device, pipeline.unet.dtype)


class SDXL(UNetBase):
    """Stable Diffusion XL: two text encoders, and a UNet that is told how pictures were sized and cropped."""

    pipeline_class = StableDiffusionXLPipeline
    drawn_by, drawn_by_with_control = "EtherStableDiffusionXLPipeline", "EtherControlXLPipeline"
    has_size_ids = True
    usual_guidance = 5.0
    text_encoders: ClassVar = {
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    unchecked: ClassVar = {}
    bare: ClassVar = {"force_zeros_for_empty_prompt": False, "add_watermarker": False}

    @classmethod
    def recognises(cls, folder: Path, index: Mapping[str, Any]) -> bool:
        """Say whether there is a UNet that is told of sizes."""
        if "unet" not in index:
            return False
        return bool(read_config(folder, "unet/config.json").get("addition_embed_type") == "text_time")

    def encode_negative(self, pipeline: Any, prompt: str | None) -> PromptEmbeddings:
        """Embed what a picture should not show; where nothing is said, as zeros if it was trained so."""
        embedded = super().encode_negative(pipeline, prompt)
        zeros = prompt is None and pipeline.config.get("force_zeros_for_empty_prompt")
        return embedded.zeros_like() if zeros else embedded

    def checks(self, pipeline: Any) -> Check | None:
        """Return what puts a watermark into pictures, where that is installed."""
        if pipeline.watermark is None:
            return None
        return lambda decoded: (pipeline.watermark.apply_watermark(decoded), None)


def _check_classes(folder: Path, index: Mapping[str, Any]) -> None:
    """Compare the classes that model_index.json and the parts' own configs name with those handled.

    Raises:
        ValueError: one is another; what would be loaded as ours would have random weights.
    """
    for name in _CLASSES:
        entry = index.get(name)
        if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None:
            _check_class(name, entry[1], folder)
            _check_own_word(name, folder / name)


def _check_class(name: str, found: object, where: Path) -> None:
    called, classes = _CLASSES[name]
    if found not in classes:
        is_noise = name == "scheduler"
        needed = "DDIM's, Euler's or another of that noise" if is_noise else " or ".join(sorted(classes))
        raise ValueError(
            f"the {called} of {where} is of the class {printable(found)}, which is not handled here; use a "
            f"base whose {called} is {needed}"
        )


def _check_own_word(name: str, folder: Path) -> None:
    """Compare what a part's own config says with what is handled, where it says it."""
    kind = name.partition("_")[0] if name.startswith("tokenizer") else name
    file = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}.get(
        kind, "config.json"
    )
    if not (folder / file).is_file():
        return
    config = read_config(folder, file)
    if name.startswith("text_encoder"):
        if config.get("model_type", "clip") not in _CLIP_TEXTS:
            _check_class(name, (config.get("architectures") or [config["model_type"]])[0], folder)
        return
    said = config.get("tokenizer_class" if kind == "tokenizer" else "_class_name")
    if said is not None and said not in _PLAIN_TOKENIZERS:
        _check_class(name, said, folder)


def _check_vae(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a VAE of another class, or of other pictures or latents."""
    _check_class("vae", config.get("_class_name", "AutoencoderKL"), folder)
    for setting, needed in (("in_channels", 3), ("out_channels", 3), ("latent_channels", 4)):
        if config.get(setting, needed) != needed:
            raise ValueError(
                f"the VAE in {folder} has {setting}={printable(config[setting])}; use one with {needed}, "
                "as Stable Diffusion's"
            )


def _factor_of_other(folder: Path, own_factor: int) -> int:
    """Check a VAE that takes the place of the base's, and return what it divides sides by."""
    _check_there(folder, ("config.json",), "VAE")
    config = read_config(folder, "config.json")
    _check_vae(folder, config)
    factor = vae_scale_factor(config)
    if factor != own_factor:
        logger.warning(
            "the VAE in %s divides sides by %d, and the base's own by %d: it was made for another base",
            *(folder, factor, own_factor),
        )
    return factor


def _check_there(folder: Path, files: Sequence[str], what: str) -> None:
    """Refuse a folder that has none of these files."""
    if not any((folder / name).is_file() for name in files):
        raise ValueError(
            f"{folder} holds no {what}: it has no {' and no '.join(files)}; name a folder of one"
        )


def _check_unet(folder: Path, unet: Mapping[str, Any], texts: list[dict[str, Any]]) -> None:
    """Refuse a UNet that wants what no prompt gives, or text of another width than its encoders'."""
    wanted = list(_foreign_conditions(unet))
    if wanted:
        raise ValueError(
            f"the UNet in {folder} wants {listed(wanted)}, which nothing here gives; use Stable Diffusion "
            "1.x, 2.x or SDXL"
        )
    if unet.get("out_channels", 4) != 4:
        raise ValueError(f"the UNet in {folder} gives {unet['out_channels']} channels; use one of 4")
    if unet.get("addition_embed_type") == "text_time":
        found = unet.get("projection_class_embeddings_input_dim")
        needed = 6 * (unet.get("addition_time_embed_dim") or 0) + texts[-1].get("projection_dim", 512)
        if found != needed:
            raise ValueError(
                f"the UNet in {folder} reads {found} numbers of sizes and pooled text, and there are "
                f"{needed}; use a whole SDXL base, not a refiner"
            )
    width = sum(int(text.get("text_config", text).get("hidden_size", 512)) for text in texts)
    known = unet.get("encoder_hid_dim") or unet.get("cross_attention_dim", 1280)
    known = known if isinstance(known, list) else [known]
    if any(each != width for each in known):
        raise ValueError(
            f"the UNet in {folder} reads text of width {listed(sorted(set(known)))}, and the text encoders "
            f"give {width}; fetch or save the base again"
        )


def _foreign_conditions(unet: Mapping[str, Any]) -> Iterator[str]:
    for setting, values in _CONDITIONS.items():
        value = unet.get(setting)
        if value is not None and value not in values:
            yield f"{setting}={value}"
