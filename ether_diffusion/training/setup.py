"""From a checked run to one that trains: parts are loaded one at a time, used, and leave memory again."""

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta

import diffusers
import torch
import transformers
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from transformers import PreTrainedModel

from ether_diffusion.bases import (
    Base,
    PromptEmbeddings,
    TextEncoders,
    decoded_again,
    encode_images,
    scale_latents,
    stack_embeddings,
)
from ether_diffusion.durable_files import delete_unfinished
from ether_diffusion.training.batches import BatchSource, Codec
from ether_diffusion.training.checks import CheckedRun, folders_of
from ether_diffusion.training.config import ComputeConfig, control_of
from ether_diffusion.training.control import new_control
from ether_diffusion.training.denoising import Denoising, Encode
from ether_diffusion.training.loop import Trainer
from ether_diffusion.training.methods import Part, TrainedPart, attach_new, peft_config
from ether_diffusion.training.phases import Phases
from ether_diffusion.training.prior import generate_class_images
from ether_diffusion.training.sample_plan import SamplePlan
from ether_diffusion.training.trackers import tracker_problem
from ether_diffusion.wording import listed, printable

logger = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SMALL_ATTENTION = 32
"""Side (latent px) up to which a CPU is faster without fused attention, whose backward is slow there."""

_OF_LAUNCHERS = re.compile("ACCELERATE_.*|(LOCAL_|NODE_|GROUP_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)")

Check = Callable[[], None]


@dataclass(frozen=True)
class LoadedRun:
    """All that trains: the trainer, its batches, and what embeds prompts."""

    checked: CheckedRun
    plan: SamplePlan
    source: BatchSource
    trainer: Trainer
    unet: UNet2DConditionModel
    encode: Encode


def draw_class_images(checked: CheckedRun, accelerator: Accelerator, check: Check) -> None:
    """Draw the class images that are missing, by the base alone."""
    config, base = checked.config, checked.base
    prior = config.prior
    if prior.class_data_dir is not None:
        delete_unfinished(prior.class_data_dir, is_shared=True)
    if not checked.num_missing:
        return
    assert prior.class_data_dir is not None
    assert config.class_prompt is not None
    precision = prior.prior_generation_precision or accelerator.mixed_precision
    logger.info("drawing %d class images into %s", checked.num_missing, prior.class_data_dir)
    pipeline = base.load_pipeline(dtype=DTYPES[precision], **_no_safety_checker(base)).to(accelerator.device)
    pipeline.set_progress_bar_config(disable=True)

    def report(done: int, wanted: int) -> None:
        logger.info("class images: %d of %d", done, wanted)
        check()

    with decoded_again(pipeline.vae):
        generate_class_images(
            pipeline,
            prior.class_data_dir,
            class_prompt=config.class_prompt,
            num_class_images=prior.num_class_images,
            sample_batch_size=prior.sample_batch_size,
            seed=config.compute.seed,
            follow_symlinks=config.data.follow_symlinks,
            without=folders_of(config),
            on_progress=report,
        )


def load_run(
    checked: CheckedRun,
    accelerator: Accelerator,
    phases: Phases,
    check: Check,
    *,
    num_steps: int | None = None,
) -> LoadedRun:
    """Encode photos and prompts, then load the UNet and attach the adapters; num_steps may cut the run short.

    Raises:
        ValueError: a photo's latents are not finite, or an adapter does not fit the model.
    """
    config, base, plan = checked.config, checked.base, checked.plan()
    progress = checked.progress(plan.num_samples)
    progress = progress if num_steps is None else replace(progress, num_steps=num_steps)
    dtype, device = DTYPES[accelerator.mixed_precision], accelerator.device
    with phases.measure("encode photos"):
        source = _load_source(
            checked, plan, progress.num_steps * progress.effective_batch, accelerator, check
        )
    with phases.measure("encode prompts"):
        encoders = base.load_text_encoders(dtype).to(device)
        parts = _text_parts(checked, encoders) if config.adapter.train_text_encoder else []
        encode: Encode = encoders.encode
        if config.data.pre_compute_text_embeddings:
            prompts = {*plan.prompts, *config.validation.validation_prompt, *_evaluated_prompts(checked)}
            negative = {"", config.validation.validation_negative_prompt or ""}
            encode = remember(encoders, sorted(prompts | negative))
            del encoders
    check()
    with phases.measure("load the UNet"):
        unet = base.load_unet(dtype).to(device)
        _prepare_unet(unet, config.compute, device, max(checked.size) // base.vae_scale_factor)
        parts = [*_unet_parts(checked, unet), *parts]
        unet.train()
        if config.compute.torch_compile:
            unet.compile_repeated_blocks()  # block by block: a whole UNet compiles wrongly on CPUs
    settings, wanted = config.optimization, control_of(config)
    control = None if wanted is None else new_control(wanted, base, unet, seed=config.compute.seed)
    trainer = Trainer(
        accelerator,
        parts,
        Denoising(
            unet,
            encode,
            base.load_noise_scheduler(),
            config.compute.seed,
            snr_gamma=settings.snr_gamma,
            noise_offset=settings.noise_offset,
            text_encoders=[part.model for part in parts if part.part != "unet"],
            control=None if control is None else control.encoder,
        ),
        config=settings,
        progress=progress,
        seed=config.compute.seed,
        control=control,
    )
    return LoadedRun(checked, plan, source, trainer, unet, encode)


def _evaluated_prompts(checked: CheckedRun) -> tuple[str, ...]:
    evaluator = checked.evaluator
    return () if evaluator is None else (*evaluator.prompts, *evaluator.other_prompts)


def _load_source(
    checked: CheckedRun, plan: SamplePlan, num_samples: int, accelerator: Accelerator, check: Check
) -> BatchSource:
    vae = checked.base.load_vae().to(accelerator.device)
    codec = Codec(lambda images: encode_images(vae, images), lambda latents: scale_latents(vae, latents))
    source = BatchSource(plan, codec, num_samples=num_samples, on_progress=lambda done, of: check())
    if checked.config.data.cache_latents:
        vae.to("meta")  # its config still says how latents are scaled
    return source


@torch.no_grad()
def remember(encoders: TextEncoders, prompts: Sequence[str]) -> Encode:
    """Embed prompts once; what is returned knows these and no others."""
    table = {prompt: encoders.encode([prompt]).to(torch.device("cpu"), torch.float32) for prompt in prompts}

    def recall(wanted: Sequence[str]) -> PromptEmbeddings:
        return stack_embeddings([table[prompt] for prompt in wanted])

    return recall


def _unet_parts(checked: CheckedRun, unet: UNet2DConditionModel) -> list[TrainedPart]:
    """Attach the UNet's adapter, if the run trains one."""
    config = checked.config
    if config.adapter.adapter == "none":
        unet.requires_grad_(False)
        return []
    adapter = peft_config(config.adapter, "unet")
    added = attach_new(unet, adapter, seed=config.compute.seed, part="unet")
    return [TrainedPart("unet", unet, adapter, added, config.learning_rate)]


def _text_parts(checked: CheckedRun, encoders: TextEncoders) -> list[TrainedPart]:
    """Attach adapters to the text encoders."""
    config = checked.config
    names: tuple[Part, Part] = ("text_encoder", "text_encoder_2")
    parts = []
    for name, model in zip(names, encoders.models, strict=False):
        adapter = peft_config(config.adapter, name)
        added = attach_new(model, adapter, seed=config.compute.seed, part=name)
        parts.append(TrainedPart(name, model, adapter, added, config.text_encoder_learning_rate))
        model.train()
        if config.compute.gradient_checkpointing:
            _recompute_activations(model)
    return parts


def _recompute_activations(model: PreTrainedModel) -> None:
    newer_name = "activation_checkpointing_enable"  # transformers warns of the older one where it has both
    enable = getattr(model, newer_name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _prepare_unet(
    unet: UNet2DConditionModel, compute: ComputeConfig, device: torch.device, latent_side: int
) -> None:
    if compute.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if compute.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
        return
    is_small = device.type == "cpu" and latent_side <= SMALL_ATTENTION
    is_eager = compute.attention == "eager" or (compute.attention == "auto" and is_small)
    unet.set_attn_processor(AttnProcessor() if is_eager else AttnProcessor2_0())


def _no_safety_checker(base: Base) -> dict[str, object]:
    return {} if base.family == "sdxl" else {"safety_checker": None, "requires_safety_checker": False}


def silence_loading() -> None:
    """Switch off the bars of diffusers and transformers: the run shows its own."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def make_accelerator(
    compute: ComputeConfig, *, report_to: str | None, folder: str, logging_dir: str
) -> Accelerator:
    """Return accelerate's view of this process.

    Raises:
        ValueError: it was launched for FSDP or DeepSpeed, which split models that are whole here, or a
            variable of the environment says what accelerate cannot do.
    """
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration

    AcceleratorState._reset_state()  # else the precision of an earlier run in this process would stay
    # the others wait while the main process draws class or validation images
    patience = InitProcessGroupKwargs(timeout=timedelta(days=1))
    with _variables_named():
        accelerator = Accelerator(
            mixed_precision=compute.mixed_precision,
            # a missing tracker is refused with all else that is wrong; accelerate would warn before
            log_with=report_to if tracker_problem(report_to) is None else None,
            kwargs_handlers=[patience],
            project_config=ProjectConfiguration(project_dir=folder, logging_dir=f"{folder}/{logging_dir}"),
        )
        if accelerator.mixed_precision not in DTYPES:
            raise ValueError(f"{accelerator.mixed_precision} is no precision of {', '.join(DTYPES)}")
    unsuitable = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if accelerator.distributed_type in unsuitable:
        raise ValueError(
            f"accelerate is set up for {accelerator.distributed_type.value}, which splits models; "
            "launch without: only an adapter is trained, and its optimizer is small"
        )
    if compute.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


@contextmanager
def _variables_named() -> Iterator[None]:
    """Name the variables of the environment that accelerate stumbles over, which it raises anything at."""
    try:
        yield
    except Exception as error:  # KeyError, RuntimeError, ImportError …; nothing but accelerate runs inside
        given = {
            name: value
            for name, value in sorted(os.environ.items())
            if _OF_LAUNCHERS.fullmatch(name) and value
        }
        if not given:
            raise
        said = str(error)
        meant = {
            name: value
            for name, value in given.items()
            if name in said or re.search(rf"(?<!\w){re.escape(value)}(?!\w)", said, re.IGNORECASE)
        }
        shown = listed(f"{name}={value}" for name, value in (meant or given).items())
        raise ValueError(
            f"accelerate cannot start with the environment's {shown} ({printable(said, 300)}); "
            "correct what is wrong, or unset it"
        ) from error
