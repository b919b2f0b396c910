"""Stable Diffusion 1.x, 2.x, inpainting and SDXL: what their parts may be, and what is done with them."""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import diffusers
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
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel

from ether_diffusion.bases.files import (
    check_variant,
    find_folder,
    find_part,
    find_variant,
    load_part,
    load_pipeline,
    read_config,
    stored_dtype,
)
from ether_diffusion.tiny_world import WEIGHTS_FOLDER
from ether_diffusion.wording import listed, printable

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
_SCHEDULERS = TRAINED_SCHEDULERS | {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"}
_TOKENIZERS = frozenset({"CLIPTokenizer", "CLIPTokenizerFast"})
_CLASSES = {
    "unet": ("UNet", frozenset({"UNet2DConditionModel"})),
    "vae": ("VAE", frozenset({"AutoencoderKL", "AutoencoderTiny"})),
    "text_encoder": ("text encoder", frozenset({"CLIPTextModel"})),
    "text_encoder_2": ("second text encoder", frozenset({"CLIPTextModelWithProjection"})),
    "tokenizer": ("tokenizer", _TOKENIZERS),
    "tokenizer_2": ("second tokenizer", _TOKENIZERS),
    "scheduler": ("scheduler", _SCHEDULERS),
}
"""What a part is called, and the classes of diffusers and transformers that are handled."""
_CLIP_TEXTS = ("clip", "clip_text_model")
_PLAIN_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""What transformers calls any tokenizer that is one file."""


def check_classes(folder: Path, index: Mapping[str, Any]) -> None:
    """Compare the classes that model_index.json and the parts' own configs name with those handled.

    Raises:
        ValueError: one is another; what would be loaded as ours would have random weights.
    """
    for name in _CLASSES:
        entry = index.get(name)
        if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None:
            check_class(name, entry[1], folder)
            _check_own_word(name, folder / name)


def check_class(name: str, found: object, where: Path) -> None:
    """Refuse a part of a class that is not handled.

    Raises:
        ValueError: as said.
    """
    called, classes = _CLASSES[name]
    if found not in classes:
        needed = "DDIM's, Euler's or another of that noise" if name == "scheduler" else _or(classes)
        raise ValueError(
            f"the {called} of {where} is of the class {printable(found)}, which is not handled here; use a "
            f"base whose {called} is {needed}"
        )


def check_vae(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a VAE of another class, or of other pictures or latents.

    Raises:
        ValueError: as said.
    """
    check_class("vae", config.get("_class_name", "AutoencoderKL"), folder)
    for setting, needed in (("in_channels", 3), ("out_channels", 3), ("latent_channels", 4)):
        if config.get(setting, needed) != needed:
            raise ValueError(
                f"the VAE in {folder} has {setting}={printable(config[setting])}; use one with {needed}, "
                "as Stable Diffusion's"
            )


def vae_scale_factor(config: Mapping[str, Any]) -> int:
    """Return what a VAE divides the sides of pictures by."""
    blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels") or (64,)
    return int(2 ** (len(blocks) - 1))


def check_unet(folder: Path, unet: Mapping[str, Any], texts: list[Mapping[str, Any]]) -> None:
    """Refuse a UNet that wants what no prompt gives, or text of another width than its encoders'.

    Raises:
        ValueError: as said.
    """
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
    width = sum(_text_width(text) for text in texts)
    known = unet.get("encoder_hid_dim") or unet.get("cross_attention_dim", 1280)
    known = known if isinstance(known, list) else [known]
    if any(each != width for each in known):
        raise ValueError(
            f"the UNet in {folder} reads text of width {listed(sorted(set(known)))}, and the text encoders "
            f"give {width}; fetch or save the base again"
        )


def _foreign_conditions(unet: Mapping[str, Any]) -> Iterator[str]:
    """Name the settings of a UNet that ask for more than a prompt, sizes and crops."""
    given = {"class_embed_type": (), "num_class_embeds": (), "addition_embed_type": ("text_time",)}
    given |= {"encoder_hid_dim_type": ("text_proj",)}
    for setting, values in given.items():
        value = unet.get(setting)
        if value is not None and value not in values:
            yield f"{setting}={value}"


def _text_width(text: Mapping[str, Any]) -> int:
    return int(text.get("text_config", text).get("hidden_size", 512))


def _check_own_word(name: str, folder: Path) -> None:
    """Compare what a part's own config says with what is handled, where it says it."""
    file = {"scheduler": "scheduler_config.json"}.get(name, "config.json")
    file = "tokenizer_config.json" if name.startswith("tokenizer") else file
    if not (folder / file).is_file():
        return
    config = read_config(folder, file)
    if name.startswith("text_encoder"):
        if config.get("model_type", "clip") not in _CLIP_TEXTS:
            check_class(name, (config.get("architectures") or [config["model_type"]])[0], folder)
        return
    said = config.get("tokenizer_class" if name.startswith("tokenizer") else "_class_name")
    if said is not None and said not in _PLAIN_TOKENIZERS:
        check_class(name, said, folder)


def _or(classes: frozenset[str]) -> str:
    return " or ".join(sorted(classes))


@dataclass(frozen=True)
class PromptEmbeddings:
    """Embeddings of prompts: sequence (b, tokens, width) and, of SDXL, pooled (b, width)."""

    sequence: Tensor
    pooled: Tensor | None

    def to(self, device: torch.device, dtype: torch.dtype) -> "PromptEmbeddings":
        """Return them on a device in a dtype."""
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        return PromptEmbeddings(self.sequence.to(device, dtype), pooled)


def stack_embeddings(rows: Sequence[PromptEmbeddings]) -> PromptEmbeddings:
    """Join embeddings along the batch."""
    pooled = [row.pooled for row in rows if row.pooled is not None]
    return PromptEmbeddings(torch.cat([row.sequence for row in rows]), torch.cat(pooled) if pooled else None)


class TextEncoders:
    """The tokenizers and text encoders of one base, in the order in which diffusers names them."""

    def __init__(self, tokenizers: Sequence[object], models: Sequence[PreTrainedModel]) -> None:
        self.tokenizers, self.models = list(tokenizers), list(models)
        self.pipeline = _textual_pipeline(self.tokenizers, self.models)

    def to(self, device: torch.device) -> "TextEncoders":
        """Move the models, and return self."""
        for model in self.models:
            model.to(device)
        return self

    def encode(self, prompts: Sequence[str]) -> PromptEmbeddings:
        """Embed prompts; gradients reach the text encoders where these want them."""
        device = next(self.models[0].parameters()).device
        encoded = self.pipeline.encode_prompt(
            prompt=list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return PromptEmbeddings(encoded[0], encoded[2] if len(self.models) == 2 else None)


def _textual_pipeline(tokenizers: list[object], models: list[PreTrainedModel]) -> DiffusionPipeline:
    """Return diffusers' pipeline without the parts that draw: the one that knows how prompts are encoded."""
    if len(models) == 2:
        return StableDiffusionXLPipeline(
            vae=None,
            text_encoder=models[0],
            text_encoder_2=models[1],
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=None,
            scheduler=None,
            force_zeros_for_empty_prompt=False,
            add_watermarker=False,
        )
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=models[0],
        tokenizer=tokenizers[0],
        unet=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


NOISE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
)
"""The settings of what a base was trained with."""
_OTHER_NOISE = {"use_flow_sigmas": False, "timestep_type": "discrete"}
"""Settings of the same classes under which the noise is another."""


def forward_process(folder: Path) -> DDPMScheduler:
    """Return DDPM's scheduler with the noise of a base's own.

    Raises:
        ValueError: it is of another noise, so that training would learn what the base cannot use.
    """
    config, index = (
        read_config(folder, name) for name in ("scheduler/scheduler_config.json", "model_index.json")
    )
    kind = index["scheduler"][1]
    kind = kind if kind not in TRAINED_SCHEDULERS else config.get("_class_name", kind)
    other = [f"{name}={config[name]}" for name, own in _OTHER_NOISE.items() if config.get(name, own) != own]
    if kind not in TRAINED_SCHEDULERS or other:
        found = f"{kind} with {other[0]}" if kind in TRAINED_SCHEDULERS else kind
        raise ValueError(
            f"the base in {folder} has the noise of {printable(found)}, with which pictures are drawn and "
            "nothing is trained here; train on a base with betas over discrete timesteps, as DDIM's"
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
    return scheduler


UNet: TypeAlias = UNet2DConditionModel
NoiseScheduler: TypeAlias = DDPMScheduler
Attention = Literal["auto", "eager", "sdpa", "xformers"]

SMALL_ATTENTION = 32
"""Side (latent px) up to which a CPU is faster without fused attention, whose backward is slow there."""


def set_attention(unet: UNet, attention: Attention, *, latent_side: int) -> None:
    """Let a UNet compute attention in one of these ways, auto by what is fastest in training."""
    if attention == "xformers":
        unet.enable_xformers_memory_efficient_attention()
        return
    is_small = unet.device.type == "cpu" and latent_side <= SMALL_ATTENTION
    is_eager = attention == "eager" or (attention == "auto" and is_small)
    unet.set_attn_processor(AttnProcessor() if is_eager else AttnProcessor2_0())


def recompute_activations(model: PreTrainedModel) -> None:
    """Let a text encoder in training compute its activations twice instead of keeping them."""
    newer_name = "activation_checkpointing_enable"  # transformers warns of the older one where it has both
    enable = getattr(model, newer_name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def unet_inputs(
    unet: UNet,
    noisy: Tensor,
    timesteps: Tensor,
    embeddings: PromptEmbeddings,
    *,
    size_ids: Tensor | None = None,
    inpainting: Tensor | None = None,
) -> dict[str, Any]:
    """Return a UNet's arguments for noisy latents (b, c, h, w), in its dtype and on its device.

    size_ids (b, 6) are those of SDXL; inpainting (b, 1 + c, h, w) is the mask and what it leaves.
    """
    device, dtype = unet.device, unet.dtype
    embeddings = embeddings.to(device, dtype)
    if inpainting is not None:
        noisy = torch.cat((noisy, inpainting), dim=1)
    inputs: dict[str, Any] = {
        "sample": noisy.to(device, dtype),
        "timestep": timesteps.to(device),
        "encoder_hidden_states": embeddings.sequence,
    }
    if size_ids is not None:
        conditions = {"text_embeds": embeddings.pooled, "time_ids": size_ids.to(device, dtype)}
        inputs["added_cond_kwargs"] = conditions
    return inputs


def take_rows(inputs: Mapping[str, Any], chosen: Tensor) -> dict[str, Any]:
    """Take rows (b,) of every tensor among a UNet's arguments."""
    return {
        name: take_rows(value, chosen) if isinstance(value, Mapping) else value[chosen]
        for name, value in inputs.items()
    }


Family = Literal["sd", "sdxl"]

logger = logging.getLogger(__name__)

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
