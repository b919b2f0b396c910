"""A training run: all that is wrong with it is said at once, then its parts are loaded one by one."""

import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.util import find_spec
from typing import TypeVar

import psutil
import torch
from accelerate import Accelerator
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn

from ether_diffusion import bases
from ether_diffusion.bases import Base, Denoiser, Noise, PromptEmbeddings, TextEncoders, open_base
from ether_diffusion.control import new_encoder
from ether_diffusion.options import shown
from ether_diffusion.training.batches import BatchSource, Codec, SamplePlan
from ether_diffusion.training.captions import doubt_token, find_cut
from ether_diffusion.training.config import DEFAULT_STEPS, DreamBoothConfig, control_of
from ether_diffusion.training.dataset import read_training_data
from ether_diffusion.training.evaluation import SubjectEvaluator, open_evaluator
from ether_diffusion.training.loop import Progress, Trainer, find_optimizer
from ether_diffusion.training.methods import TrainedPart, attach_new, peft_config
from ether_diffusion.training.objective import Denoising, Encode
from ether_diffusion.training.photos import PhotoFolder, Scaling
from ether_diffusion.training.prior import read_class_images
from ether_diffusion.training.processes import DTYPES, tracker_problem
from ether_diffusion.training.randomness import stream
from ether_diffusion.training.validation import validation_controls
from ether_diffusion.tuner.quantized import MULTIPLE, quantize, quantizer_of
from ether_diffusion.tuner.together import share_weights
from ether_diffusion.wording import printable

logger = logging.getLogger(__name__)

T = TypeVar("T")

MIB = 2**20
_INTERVAL_SECONDS = 0.02


class Phases:
    """Measures phases one after the other: their seconds by name, and a line on each.

    Memory is the peak of the GPU's, or of the process's where there is none.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.lines = device, dict[str, float](), list[str]()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measure what is done inside."""
        began, peak, is_over, process = time.monotonic(), 0, threading.Event(), psutil.Process()

        def watch() -> None:
            nonlocal peak
            while not is_over.wait(_INTERVAL_SECONDS):
                peak = max(peak, process.memory_info().rss)

        has_gpu = self.device.type == "cuda"
        watcher = threading.Thread(target=watch, daemon=True)
        if has_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            watcher.start()
        try:
            yield
        finally:
            is_over.set()
            if has_gpu:
                torch.cuda.synchronize(self.device)
                peak = torch.cuda.max_memory_allocated(self.device)
            else:
                watcher.join()
                peak = max(peak, process.memory_info().rss)
            self.seconds[name] = time.monotonic() - began
            self.lines.append(f"{name}: {self.seconds[name]:.1f} s, peak memory {peak / MIB:.0f} MiB")


@dataclass(eq=False)
class Run:
    """A run whose base, photos and settings can be used; `load_run` adds all that trains.

    num_missing class images are to be drawn. controls are the control images (1, 3, height, width) of the
    validation prompts, if there are any; evaluator measures in between, where that was asked for. check is
    called now and then, and raises where a signal came.
    """

    config: DreamBoothConfig
    accelerator: Accelerator
    base: Base
    training: PhotoFolder
    num_missing: int
    class_images: PhotoFolder = field(default_factory=PhotoFolder)
    controls: tuple[Tensor, ...] = ()
    evaluator: SubjectEvaluator | None = None
    check: Callable[[], None] = lambda: None
    source: BatchSource = field(init=False)
    trainer: Trainer = field(init=False)
    unet: Denoiser = field(init=False)
    encode: Encode = field(init=False)

    @cached_property
    def phases(self) -> Phases:
        """What each part of the run took."""
        return Phases(self.accelerator.device)

    @cached_property
    def plan(self) -> SamplePlan:
        """What every sample shows; class images must be there by now, and a ValueError says what is not."""
        config = self.config
        if self.num_missing:  # they are drawn since
            scaling, without = Scaling.of(config.data, self.base), config.folders
            self.class_images = read_class_images(config.prior, config.data, without=without, scaling=scaling)
            if not self.class_images.photos:
                found = f"what {self.base.name} drew as class images cannot be used"
                why = "; ".join(self.class_images.warnings)
                raise ValueError(
                    f"{found}: {why}; fill the folder with {config.prior.num_class_images} others"
                )
        return SamplePlan(
            config.data,
            config.prior.replace(class_prompt=config.class_prompt),
            self.training,
            self.class_images,
            base=self.base,
            effective_batch=math.prod(self._split),
            seed=config.compute.seed,
            control=control_of(config),
        )

    @cached_property
    def progress(self) -> Progress:
        """How far the run goes."""
        settings = self.config.optimization
        num_steps = settings.max_train_steps
        if num_steps is None and settings.num_train_epochs is not None:
            epoch = Progress(0, *self._split).steps_per_epoch(self.plan.num_samples)
            num_steps = settings.num_train_epochs * epoch
        return Progress(num_steps or DEFAULT_STEPS, *self._split)

    @property
    def _split(self) -> tuple[int, int, int]:
        settings = self.config.optimization
        num_processes = self.accelerator.num_processes
        return settings.train_batch_size, settings.gradient_accumulation_steps, num_processes

    @property
    def size(self) -> tuple[int, int]:
        """Height and width (px) of what is drawn."""
        side = self.config.data.resolution or self.base.native_size
        return side, side

    @property
    def prompts(self) -> list[str]:
        """All prompts that are trained on or drawn in between, with no words at all among them."""
        validation, evaluator = self.config.validation, self.evaluator
        drawn = {*validation.validation_prompt, "", validation.validation_negative_prompt or ""}
        measured = () if evaluator is None else (*evaluator.prompts, *evaluator.other_prompts)
        return sorted({*self.plan.prompts, *drawn, *measured})


def check_run(config: DreamBoothConfig, accelerator: Accelerator) -> Run:
    """Open the base, decode every photo, read every caption, and look for what the settings need.

    All that cannot be used is one ValueError, a problem a line.
    """
    problems: list[str] = []
    control, prior, data = control_of(config), config.prior, config.data

    def collect(find: Callable[[], T]) -> T | None:
        try:
            return find()
        except (ValueError, OSError) as error:
            problems.append(str(error))
            return None

    base = collect(lambda: _open(config))
    scaling = None if base is None else Scaling.of(data, base)
    training = collect(
        lambda: read_training_data(data, control=control, scaling=scaling, without=config.folders)
    )
    class_images = collect(lambda: read_class_images(prior, data, without=config.folders, scaling=scaling))
    num_missing = 0
    if prior.prior_preservation == "class_images" and class_images is not None:
        num_missing = max(0, prior.num_class_images - len(class_images.photos))
    collect(lambda: find_optimizer(config.optimization))
    if base is not None:
        problems += _unfitting_wishes(config, base)
        collect(lambda: _try_adapter(base, config))
    problems += _environment_problems(config)
    if base is not None and training is not None:
        run = Run(config, accelerator, base, training, num_missing, class_images or PhotoFolder())
        run.controls = collect(lambda: validation_controls(control, run.size)) or ()
        prompts, every = config.validation.validation_prompt, config.evaluation.eval_steps
        asked = ["validation_prompt"] * bool(prompts) + ["eval_steps"] * bool(every)
        if base.is_inpainting and asked:
            found = "an inpainting base draws no picture from a prompt alone"
            problems.append(f"{found}; leave {' and '.join(asked)} out")
        elif every:
            run.evaluator = collect(lambda: open_evaluator(config, base, training))
        plan = None if num_missing else collect(lambda: run.plan)
        warnings = () if plan is None else plan.warnings
        for warning in (*warnings, *(collect(lambda: _prompt_warnings(config, base, training)) or ())):
            logger.warning("%s", warning)
    if problems:
        raise ValueError("\n".join(problems))
    return run


def _open(config: DreamBoothConfig) -> Base:
    settings = config.base
    base = open_base(
        settings.pretrained_model_name_or_path,
        revision=settings.revision,
        variant=settings.variant,
        vae=settings.pretrained_vae_model_name_or_path,
        tokenizer=settings.tokenizer_name,
        local_files_only=settings.local_files_only,
    )
    _load_noise(base, config)  # refused now where the base has noise of another kind
    return base


def _load_noise(base: Base, config: DreamBoothConfig) -> Noise:
    settings = config.optimization
    noise = base.load_noise(settings.weighting_scheme, settings.timestep_shift)
    if settings.snr_gamma is not None:
        noise.min_snr_weights(torch.zeros(1, dtype=torch.long), settings.snr_gamma)
    return noise


def _unfitting_wishes(config: DreamBoothConfig, base: Base) -> Iterator[str]:
    """Say what a run asks for that its base's family has not."""
    kind = re.sub(r"(?<=[a-z])(?=[A-Z\d])", " ", type(base).__name__)  # Stable Diffusion 3
    compute = config.compute
    if control_of(config) is not None and base.drawn_by_with_control is None:
        yield f"control images are for Stable Diffusion 1.x, 2.x and SDXL, and the base is of {kind}"
    if config.adapter.train_text_encoder and not base.text_targets:
        yield f"train_text_encoder is for Stable Diffusion 1.x, 2.x and SDXL, and the base is of {kind}"
    if config.validation.validation_negative_prompt and not base.takes_negative_prompts:
        yield f"validation_negative_prompt has no effect on a base of {kind}; leave it out"
    if compute.torch_compile and not getattr(base.empty_denoiser(), "_repeated_blocks", None):
        yield f"torch_compile is not for a base of {kind}, whose blocks diffusers does not name; leave it out"
    if compute.attention not in base.attention_kernels:
        known = ", ".join(base.attention_kernels)
        yield f"attention={compute.attention} is not for a base of {kind}; use one of {known}"
    if config.quantize is not None and quantizer_of(config.quantize) is None:
        install = 'pip install "ether-diffusion[quantized]"'
        yield f"quantize={config.quantize} needs bitsandbytes, which is not installed: {install}"
    is_xformers = compute.enable_xformers_memory_efficient_attention
    if is_xformers and "xformers" not in base.attention_kernels:
        yield f"xformers' attention is not for a base of {kind}; leave it out for SDPA"


def _try_adapter(base: Base, config: DreamBoothConfig) -> None:
    """Attach the adapter to a UNet without weights."""
    if config.adapter.adapter == "none":
        return
    try:
        attach_new(base.empty_denoiser(), peft_config(config.adapter, "unet", base), seed=0, part="unet")
    except NoMatchingPeftModuleError:
        found = f"target_modules={shown(config.adapter.target_modules)} matches no module of the base"
        remedy = f"use {', '.join(base.targets)}, or names like to_q,to_v"
        raise ValueError(f"{found}; {remedy}") from None
    except RuntimeError:  # BOFT looks at values; its settings are checked before
        assert config.adapter.adapter == "boft"


def _environment_problems(config: DreamBoothConfig) -> Iterator[str]:
    compute, has_gpu = config.compute, torch.cuda.is_available()
    if compute.enable_xformers_memory_efficient_attention and not has_gpu:
        yield "xformers has kernels on CUDA only, and there is no CUDA GPU; leave it out for SDPA"
    elif compute.enable_xformers_memory_efficient_attention and find_spec("xformers") is None:
        yield "xformers is not installed; pip install 'ether-diffusion[xformers]', or leave it out"
    if (problem := tracker_problem(config.output.report_to)) is not None:
        yield problem
    if compute.allow_tf32 and not has_gpu:
        logger.warning("allow_tf32 has no effect: there is no CUDA GPU")


def _prompt_warnings(config: DreamBoothConfig, base: Base, training: PhotoFolder) -> list[str]:
    """Say which prompts are cut, and what is doubtful about the trigger word."""
    tokenizer, token = base.load_tokenizers()[0], config.data.token
    prompts = [each.prompt for each in training.photos]
    prompts += [prompt for prompt in (config.class_prompt, *config.validation.validation_prompt) if prompt]
    cuts = {prompt: find_cut(prompt, tokenizer) for prompt in dict.fromkeys(prompts)}
    found = [f'"{printable(prompt[:40])}…": {cut}' for prompt, cut in cuts.items() if cut is not None]
    doubt = None if token is None else doubt_token(token, tokenizer)
    return [*found, *filter(None, [doubt])]


def load_run(run: Run, *, num_steps: int | None = None) -> Run:
    """Load all that a run trains, as `load_runs`, and return it."""
    load_runs([run], num_steps=num_steps)
    return run


def load_runs(
    runs: Sequence[Run],
    *,
    num_steps: int | None = None,
    part_of: Callable[[Run], AbstractContextManager[None]] = lambda run: nullcontext(),
) -> Denoiser:
    """Encode photos and prompts, then load the UNet and attach the adapters; num_steps may cut runs short.

    The parts are loaded one at a time, used, and leave memory again. Several runs have one base, precision
    and size; each has a copy of the UNet that is returned, which shares its weights. What is done of a run is
    done in `part_of`, and one that fails there is left out. A ValueError says that a photo's latents are not
    finite, or that an adapter does not fit the model.
    """
    first, left = runs[0], list(runs)
    base, phases, dtype = first.base, first.phases, DTYPES[first.accelerator.mixed_precision]
    compute, device = first.config.compute, first.accelerator.device

    def each(work: Callable[[Run], object]) -> None:
        done = list[Run]()
        for run in left:
            with part_of(run):
                work(run)
                done.append(run)
        left[:] = done

    with phases.measure("encode photos"):
        vae = base.load_vae().to(device)
        codec = Codec(
            lambda images: base.encode_images(vae, images), lambda latents: base.scale_latents(vae, latents)
        )
        each(lambda run: _encode_photos(run, codec, num_steps))
        if all(run.config.data.cache_latents for run in runs):  # what is left of it still scales latents
            vae.encoder.to("meta")
            vae.decoder.to("meta")
    texts = dict[Run, list[TrainedPart]]()
    with phases.measure("encode prompts"):
        encoders = base.load_text_encoders(dtype).to(device)
        each(partial(_encode_prompts, encoders=encoders, texts=texts))
        del encoders
    first.check()
    with phases.measure("load the denoiser"):
        unet = base.load_denoiser(dtype)
        kind = first.config.quantize
        if kind is not None and not quantize(unet, kind, dtype):
            raise ValueError(
                f"quantize={kind} finds no layer in the base whose inputs {MULTIPLE} divides; leave it out"
            )
        unet.to(device)
        if compute.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        wants_xformers = compute.enable_xformers_memory_efficient_attention
        side = max(first.size) // base.vae_scale_factor
        base.set_attention(unet, "xformers" if wants_xformers else compute.attention, latent_side=side)
        is_alone = len(runs) == 1
        if not is_alone:
            unet.train()
        each(lambda run: _attach(run, unet if is_alone else share_weights(unet), texts[run], num_steps))
    return unet


def _progress(run: Run, num_steps: int | None) -> Progress:
    return run.progress if num_steps is None else replace(run.progress, num_steps=num_steps)


def _encode_photos(run: Run, codec: Codec, num_steps: int | None) -> None:
    progress = _progress(run, num_steps)
    num_samples = progress.num_steps * progress.effective_batch
    run.source = BatchSource(
        run.plan, codec, num_samples=num_samples, on_progress=lambda done, of: run.check()
    )


def _encode_prompts(run: Run, encoders: TextEncoders, texts: dict[Run, list[TrainedPart]]) -> None:
    """Embed the prompts, once where they are kept, and attach the adapters of the text encoders."""
    config, parts = run.config, texts.setdefault(run, [])
    for name, model in encoders.models.items() if config.adapter.train_text_encoder else ():
        parts.append(_attached(run, name, model, config.text_encoder_learning_rate))
        model.train()
        if config.compute.gradient_checkpointing:
            bases.recompute_activations(model)
    is_kept = config.data.pre_compute_text_embeddings
    run.encode = remember(encoders, run.prompts) if is_kept else encoders.encode


def _attached(run: Run, part: str, model: nn.Module, learning_rate: float) -> TrainedPart:
    adapter, seed = peft_config(run.config.adapter, part, run.base), run.config.compute.seed
    return TrainedPart(part, model, adapter, attach_new(model, adapter, seed=seed, part=part), learning_rate)


def _attach(run: Run, unet: Denoiser, parts: list[TrainedPart], num_steps: int | None) -> None:
    """Attach the adapter and the encoder of control images, and make what trains them."""
    config, base, encoder, rate = run.config, run.base, None, 0.0
    seed, wanted, run.unet = config.compute.seed, control_of(config), unet
    if config.adapter.adapter != "none":
        parts = [_attached(run, "unet", unet, config.learning_rate), *parts]
    unet.train()
    if config.compute.torch_compile:
        unet.compile_repeated_blocks()  # block by block: a whole UNet compiles wrongly on CPUs
    if wanted is not None:
        drawn, factor = stream(seed, "control encoder").initial_seed(), base.vae_scale_factor
        encoder = new_encoder(unet, vae_scale_factor=factor, seed=drawn, control_type=wanted.control_type)
        encoder.train()
        rate = wanted.control_learning_rate
    denoising = Denoising(
        unet,
        base,
        run.encode,
        _load_noise(base, config),
        config.optimization,
        seed,
        text_encoders=[part.model for part in parts if part.part != "unet"],
        control=encoder,
    )
    progress = _progress(run, num_steps)
    run.trainer = Trainer(run.accelerator, parts, denoising, progress, control_learning_rate=rate)


@torch.no_grad()
def remember(encoders: TextEncoders, prompts: Sequence[str]) -> Encode:
    """Embed prompts once; what is returned knows these and no others."""
    table = {prompt: encoders.encode([prompt]).to(torch.device("cpu"), torch.float32) for prompt in prompts}

    def recall(wanted: Sequence[str]) -> PromptEmbeddings:
        return bases.stack_embeddings([table[prompt] for prompt in wanted])

    return recall
