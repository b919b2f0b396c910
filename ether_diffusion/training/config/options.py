"""Every option of training, declared once: what flags, files, checks and saved configurations come from."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from ether_diffusion.control.detectors import CANNY_THRESHOLDS, detector_problem
from ether_diffusion.options import Count, Options, PathText, Positive, Share, Text, Texts, option, shown

SIZE_STEP = 8
"""Sides of photos divide by it: one latent stands for so many pixels of a side."""
MAX_SIDE = 8192
"""Of what is trained at (px): beyond every base, and short of what no memory holds."""
MAX_ENCODER_RATE = 1e-4
"""ETHER, Bini et al. 2024, arXiv:2405.20271, appendix C.2: the encoder learns at 1e-4 at most."""
DEFAULT_STEPS = 800

Side = Annotated[int, Field(ge=SIZE_STEP, le=MAX_SIDE, multiple_of=SIZE_STEP)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
WholeNumber = Annotated[int, Field(ge=0)]
NotNegative = Annotated[float, Field(ge=0.0)]
PositiveShare = Annotated[float, Field(gt=0.0, le=1.0)]
ShareBelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
EncoderRate = Annotated[float, Field(gt=0.0, le=MAX_ENCODER_RATE)]
AdapterMethod = Literal["ether", "ether_plus", "lora", "oft", "hra", "delora", "boft", "ia3", "full", "none"]
ShiftText = Annotated[
    Text, BeforeValidator(lambda given: str(given) if type(given) in (int, float) else given)
]
Precision = Literal["no", "fp32", "fp16", "bf16"]
InterpolationMode = Literal["nearest", "nearest_exact", "box", "bilinear", "hamming", "bicubic", "lanczos"]
LRScheduler = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
]


class BaseConfig(Options, group="base model"):
    """The frozen model that an adapter is trained for."""

    pretrained_model_name_or_path: Text = "tiny_world_2"
    """Folder or hub id of a pipeline in diffusers' layout, or one that is built in: tiny_world_2,
    tiny_world or tiny_world_flow."""
    revision: Text | None = option(None, "Branch, tag or commit of the base and its tokenizer on the hub.")
    variant: Text | None = option(None, "Variant of the base's files, e.g. fp16.")
    pretrained_vae_model_name_or_path: Text | None = None
    """Folder or hub id of another VAE, e.g. one that holds in float16 for SDXL."""
    tokenizer_name: Text | None = option(None, "Folder or hub id of another tokenizer than the base's own.")
    local_files_only: bool = option(False, "Never ask the hub: use only files that are here.", free=True)


class DataConfig(Options, group="photos and prompts"):
    """Photos and prompts."""

    instance_data_dir: PathText | None = option(None, instead_of="dataset_name", free=True)
    """Folder of the subject's photos, with subfolders; captions may lie beside them."""
    # free: the photos and prompts in it are compared themselves
    dataset_name: Text | None = option(None, instead_of="instance_data_dir")
    """Instead of a folder: a dataset's hub id or local path."""
    dataset_config_name: Text | None = option(None, "Configuration of the dataset.", needs="dataset_name")
    image_column: Text = option("image", "Column of the dataset that holds the photos.", needs="dataset_name")
    caption_column: Text | None = option(None, needs="dataset_name")
    """Column of the dataset that holds the captions; without it every photo gets --instance_prompt."""
    max_train_samples: Count | None = None
    """Photos to train on where there are more, drawn at random, the same ones each time."""
    instance_prompt: Text | None = option(None, label="Prompt of the photos")
    """Prompt of photos without a caption, e.g. 'a photo of sks dog'."""
    token: Text | None = option(None, label="Trigger word")
    """Trigger word, e.g. sks: it fills {token} in prompts and captions."""
    caption_template: Text = "{caption}"
    """What a photo's prompt is made of, e.g. 'a photo of {token}, {caption}'."""
    resolution: Side | None = option(None, theirs=512)
    """Side of the square photos are brought to (px); the base's own if not given."""
    center_crop: bool = option(False, "Crop photos in the middle instead of anywhere.")
    random_flip: bool = option(False, "Mirror half of the samples left to right.")
    crops_per_photo: Count = option(4, needs="cache_latents, no center_crop")
    """Random crops of a photo that are encoded when latents are cached."""
    repeats: Count = option(1, "Times each photo occurs in an epoch.")
    caption_dropout: Share = option(0.0, "Share of samples that are trained with the empty prompt.")
    use_aspect_ratio_buckets: bool = False
    """Keep photos' proportions: sort them into sizes of about equal area."""
    aspect_ratio_buckets: Text | None = option(None, implies={"use_aspect_ratio_buckets": True})
    """The buckets' sizes (px) as 'height,width;height,width'; it switches the buckets on."""
    mask_from_alpha: bool = option(False, instead_of="mask_data_dir")
    """Weigh the loss by the photos' alpha channel."""
    mask_data_dir: PathText | None = option(None, instead_of="mask_from_alpha")
    """Folder of masks with the photos' names: white counts, black does not."""
    unmasked_weight: Share = option(0.0, needs="mask_from_alpha or mask_data_dir")
    """Weight in the loss of what a mask leaves out."""
    image_interpolation_mode: InterpolationMode = option("lanczos", "How photos are resized.")
    cache_latents: bool = option(True, "Encode the photos once, before training; the VAE then leaves memory.")
    pre_compute_text_embeddings: bool = option(True, theirs=False)
    """Encode the prompts once, before training; not while the text encoder is trained."""
    dataloader_num_workers: WholeNumber = option(0, free=True)
    """Processes that load samples; 0: the main one."""
    strict: bool = option(False, free=True)
    """Stop if any file of the folder is unusable, instead of leaving it out."""
    follow_symlinks: bool = option(False, "Read photos that are links to somewhere outside their folder.")

    def _contradictions(self) -> Iterator[str]:
        if self.instance_data_dir is None and self.dataset_name is None:
            yield "there is nothing to train on; give instance_data_dir, a folder of photos, or dataset_name"
        if None not in (self.instance_data_dir, self.dataset_name):
            yield "instance_data_dir and dataset_name are two sources of photos; give one"
        if self.mask_from_alpha and self.mask_data_dir is not None:
            yield "mask_from_alpha and mask_data_dir are two sources of masks; give one"
        template, buckets = self.caption_template, self.aspect_ratio_buckets
        if unknown := sorted(set(re.findall(r"\{\w*\}", template)) - {"{token}", "{caption}"}):
            found = f"caption_template={shown(template)} has {', '.join(unknown)}"
            yield f"{found}; use {{token}} and {{caption}}"
        for name, text in {"instance_prompt": self.instance_prompt, "caption_template": template}.items():
            if self.token is None and "{token}" in (text or ""):
                yield f"{name}={shown(text)} asks for {{token}}; give the trigger word as token"
        if buckets is None:
            return
        found = f"aspect_ratio_buckets={shown(buckets)}"
        if not self.use_aspect_ratio_buckets:
            yield "aspect_ratio_buckets lists sizes and use_aspect_ratio_buckets is off; switch it on"
        if not re.fullmatch(r"\s*\d+\s*,\s*\d+\s*(;\s*\d+\s*,\s*\d+\s*)*;?\s*", buckets):
            yield f"{found} is not a list of sizes; write 'height,width;…'"
        elif any(side < SIZE_STEP or side % SIZE_STEP for size in self.bucket_sizes for side in size):
            yield f"{found} has sides not divisible by {SIZE_STEP} px; round them"
        elif any(side > MAX_SIDE for size in self.bucket_sizes for side in size):
            yield f"{found} has sides over {MAX_SIDE} px; give smaller ones"

    @property
    def has_masks(self) -> bool:
        """Whether the loss is weighed by masks."""
        return self.mask_from_alpha or self.mask_data_dir is not None

    @property
    def bucket_sizes(self) -> tuple[tuple[int, int], ...]:
        """The sizes of `aspect_ratio_buckets`, (height, width) in px; none where the option is not given."""
        pairs = (size.split(",") for size in (self.aspect_ratio_buckets or "").split(";") if size.strip())
        return tuple((int(height), int(width)) for height, width in pairs)


class PriorConfig(Options, group="prior preservation"):
    """Prior preservation (DreamBooth, Ruiz et al. 2023): how the base's idea of the class is kept."""

    prior_preservation: Literal["none", "class_images", "frozen"] = "none"
    """class_images: also train on images of the class, generated where missing. frozen: also match what the
    base without adapter predicts for the class prompt; needs no images."""
    class_data_dir: PathText | None = option(None, needs="prior_preservation=class_images")
    """Folder of class images; missing ones are generated into it."""
    class_prompt: Text | None = option(None, needs="prior_preservation=class_images|frozen")
    """Prompt of the class, e.g. 'a photo of a dog'."""
    num_class_images: Count = option(100, needs="prior_preservation=class_images")
    """Images the class folder is filled up to."""
    prior_loss_weight: NotNegative = option(1.0, needs="prior_preservation=class_images|frozen")
    """Weight of the class's loss beside the subject's."""
    sample_batch_size: Count = option(4, needs="prior_preservation=class_images", free=True)
    """Class images that are generated at once."""
    prior_generation_precision: Precision | None = option(None, needs="prior_preservation=class_images")
    """Precision class images are generated in; the training's if not given."""

    def _contradictions(self) -> Iterator[str]:
        if self.prior_preservation == "class_images":
            if self.class_data_dir is None:
                yield "prior_preservation=class_images needs class_data_dir, a folder of such images; give it"
            if self.class_prompt is None:
                yield "prior_preservation=class_images needs class_prompt, e.g. 'a photo of a dog'; give it"


class AdapterConfig(Options, group="adapter"):
    """The adapter, and the modules it adapts."""

    adapter: AdapterMethod = "ether_plus"
    """Method of the adapter; full trains every weight, and stores the differences; none, with control images,
    trains their encoder alone."""
    num_blocks: Count | None = option(None, needs="adapter=ether|ether_plus|oft|boft")
    """Diagonal blocks of ether, ether_plus, oft and boft; divides the widths. 1 for ether_plus and 4 for the
    others if not given."""
    sides: Literal["input", "output", "both"] | None = option(None, needs="adapter=ether|ether_plus")
    """Side of the weights that ether and ether_plus transform: input for ether, both for ether_plus."""
    target_modules: Text = option("attention", needs="adapter=ether|ether_plus|lora|oft|hra|delora|boft|ia3")
    """Modules to adapt: attention, attention_and_feedforward, a regex, or names with commas between."""
    rank: Count = option(4, "Rank of lora, hra and delora.", needs="adapter=lora|hra|delora")
    lora_alpha: Count | None = option(None, needs="adapter=lora")
    """Strength of lora times its rank; the rank if not given."""
    dropout: ShareBelowOne = option(0.0, needs="adapter=ether|ether_plus|lora|oft|delora|boft")
    """Share of an adapted layer's inputs zeroed in training."""
    train_text_encoder: bool = option(False, implies={"pre_compute_text_embeddings": False})
    """Adapt the text encoder's attention, too."""

    @property
    def blocks(self) -> int:
        """The diagonal blocks: those given, or the method's own."""
        return self.num_blocks or (1 if self.adapter == "ether_plus" else 4)

    def _contradictions(self) -> Iterator[str]:
        found = f"target_modules={shown(self.target_modules)}"
        if any(not name.strip() for name in self.target_modules.split(",")):
            yield f"{found} has an empty name; delete a comma"
        try:
            re.compile(self.target_modules)
        except re.error as error:
            yield f"{found} is no regex ({error}); mend it or give names"


class OptimizationConfig(Options, group="optimization"):
    """Steps, batches, learning rates, optimizer and loss."""

    learning_rate: Positive | None = option(None, theirs=5e-4, is_spread=True)
    """Learning rate; the method's own if not given: 6e-3 for ether and ether_plus, 6e-4 lora, 6e-5 oft, 1e-4
    hra and boft, 1e-3 delora, 3e-3 ia3, 5e-6 full; 1 with prodigy. Several are a run each, in folders of
    output_dir."""
    text_encoder_lr: Positive | None = option(None, needs="train_text_encoder")
    """Learning rate of the text encoder's adapter; learning_rate if not given."""
    scale_lr: bool = option(False, "Multiply the rates by accumulation steps, batch size and processes.")
    train_batch_size: Count = option(1, "Photos of a forward pass and process.", theirs=4)
    gradient_accumulation_steps: Count = option(1, "Forward passes of one update.")
    max_train_steps: Count | None = option(
        None,
        f"Updates; {DEFAULT_STEPS} if neither they nor epochs are given. Outranks epochs.",
        instead_of="num_train_epochs",
        theirs="1 epoch",
        label="Steps",
    )
    num_train_epochs: Count | None = option(None, needs="no max_train_steps", instead_of="max_train_steps")
    """Passes over all photos, instead of a number of updates."""
    lr_scheduler: LRScheduler = option("constant", "How the learning rate goes on.")
    lr_warmup_steps: WholeNumber = option(
        0, needs="lr_scheduler=constant_with_warmup|linear|cosine|cosine_with_restarts|polynomial", theirs=500
    )
    """Updates over which the rate rises from 0; not with constant."""
    lr_num_cycles: Count = option(1, needs="lr_scheduler=cosine_with_restarts")
    """Restarts of cosine_with_restarts."""
    lr_power: Positive = option(1.0, "Power of polynomial.", needs="lr_scheduler=polynomial")
    optimizer: Literal["adamw", "adamw8bit", "prodigy"] = "adamw"
    """adamw8bit needs bitsandbytes and a GPU, prodigy needs prodigyopt."""
    adam_beta1: ShareBelowOne = option(0.9, "Decay of the optimizer's first moment.")
    adam_beta2: ShareBelowOne = option(0.999, "Decay of the optimizer's second moment.")
    adam_weight_decay: NotNegative = option(0.0, "Weight decay; ETHER's vectors need none.", theirs=0.01)
    adam_epsilon: Positive = option(1e-8, "Epsilon of the optimizer.")
    max_grad_norm: Positive = option(1.0, "Norm that gradients are clipped to.")
    snr_gamma: Positive | None = None
    """Gamma of min-SNR weighting (Hang et al. 2023), e.g. 5; no weighting if not given."""
    weighting_scheme: Literal["none", "logit_normal", "mode", "cosmap", "sigma_sqrt"] = "none"
    """Of flow matching: what is drawn more (logit_normal, mode) or weighs more (cosmap, sigma_sqrt)."""
    timestep_shift: ShiftText = "auto"
    """Of flow matching: auto: as the base was trained; none; or a number, above 1 for more noise."""
    noise_offset: NotNegative = option(0.0, "Strength of noise that is constant over each channel, e.g. 0.1.")
    use_ema: bool = option(False, "Keep a moving average of the adapter, and save that.")
    ema_decay: ShareBelowOne = option(0.999, "Decay of the moving average.", needs="use_ema")

    def _contradictions(self) -> Iterator[str]:
        """Say which shift is none."""
        if not re.fullmatch(r"auto|none|(?=[\d.]*[1-9])\d{0,6}(\.\d{0,6})?", self.timestep_shift):
            found = shown(self.timestep_shift)
            yield f"timestep_shift={found} is no shift; use auto, none or a number above 0, as 3.0"


class ComputeConfig(Options, group="compute"):
    """Seed, precision, memory and speed."""

    seed: Seed = option(0, "Seed of everything random; the same seed gives the same adapter.", theirs="none")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the frozen parts; the adapter stays float32. Accelerate's setting if not given."""
    gradient_checkpointing: bool = option(False, "Less memory, about a third more time per step.")
    quantize: Literal["nf4", "int8"] | None = option(None, needs="adapter=ether|ether_plus")
    """Keep frozen weights in 4 or 8 bits, by bitsandbytes, int8 also by torchao; adapters learn beside."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention kernels; auto: sdpa, and eager for small UNets on a CPU."""
    enable_xformers_memory_efficient_attention: bool = False
    """Use xformers' attention; it has kernels on CUDA only."""
    torch_compile: bool = option(False, "Compile the UNet: slow to start, faster steps.")
    allow_tf32: bool = option(False, "Let CUDA multiply float32 in TF32: faster, less exact.")

    def _contradictions(self) -> Iterator[str]:
        if self.enable_xformers_memory_efficient_attention and self.attention != "auto":
            yield f"attention={self.attention} and xformers' attention are two kinds of kernels; give one"


class ValidationConfig(Options, group="validation images", free=True, needs="validation_prompt"):
    """Images in between, on the same seeds each time."""

    validation_prompt: Texts = option((), label="Pictures to draw in between")
    """Prompt to draw during training; may be given several times."""
    num_validation_images: Count = option(4, "Images of each validation prompt.")
    validation_steps: Count = option(
        100, needs="no validation_epochs", instead_of="validation_epochs", theirs="50 epochs"
    )
    """Updates between two sets of validation images."""
    validation_epochs: Count | None = option(None, instead_of="validation_steps")
    """Deprecated: the distance in epochs, whose length depends on the photos. Outranks validation_steps."""
    validation_num_inference_steps: Count = option(20, "Denoising steps of a validation image.")
    validation_guidance_scale: NotNegative | None = None
    """Guidance of validation images; one that suits the base if not given."""
    validation_negative_prompt: Text | None = option(None, "What validation images should not show.")

    def steps_between(self, steps_per_epoch: int) -> int:
        """Return the updates between two sets of images, where an epoch has so many updates."""
        epochs = self.validation_epochs
        return self.validation_steps if epochs is None else epochs * steps_per_epoch


class EvaluationConfig(Options, group="evaluation in training", free=True, needs="eval_steps"):
    """Scores in between, on the same prompts and seeds each time, and the rule that finds the best step."""

    eval_steps: WholeNumber = 0
    """Updates between two evaluations, which keep the best adapter in best/; 0 for none."""
    eval_encoder: Texts = ()
    """Folder or hub id of what measures, or dino, dinov2, clip; the first measures likeness, the first CLIP
    the prompts. The embedded base has its own."""
    eval_prompt: Texts = ()
    """Prompt with the subject to measure on; may be given several times (validation_prompt, else the instance
    prompt in four places)."""
    num_eval_images: Count = option(2, "Images of each prompt that is measured.")
    eval_num_inference_steps: Count = option(10, "Denoising steps of a measured image.")
    eval_max_drift: Positive = 0.3
    """A step is no candidate for the best above this drift on prompts without the subject: 0 the base's
    pictures, 1 as far from them as those of other prompts."""
    eval_max_prompt_loss: PositiveShare = 0.1
    """Nor is it if it loses more than this share of the base's likeness to the prompts."""
    eval_patience: Count = option(3, needs="stop_when_good")
    """Evaluations without a rise of fidelity above its standard error until a run is good."""
    keep: Literal["last", "best"] = "last"
    """Which adapter is the result: that of the last step, or of the best one; of several learning rates the
    best's, in output_dir itself."""
    stop_when_good: bool = False
    """End the run once it is good; its result is then the adapter of the best step."""

    def _contradictions(self) -> Iterator[str]:
        if self.stop_when_good and not self.eval_steps:
            yield "stop_when_good needs to know what is good; give eval_steps, e.g. 50"
        if self.keep == "best" and not self.eval_steps:
            yield "keep=best needs to know what is best; give eval_steps, e.g. 50"


class OutputConfig(Options, group="result, checkpoints, trackers, hub", free=True):
    """The run's folder, its checkpoints, trackers and the hub: none of it changes what is trained."""

    output_dir: PathText = Path("dreambooth-adapter")
    """Folder of the result, its samples and checkpoints."""
    checkpointing_steps: Count = option(100, "Updates between two checkpoints.", theirs=500)
    checkpoints_total_limit: Count = option(2, theirs="no limit")
    """Checkpoints to keep; older ones are deleted after a new one is whole."""
    resume_from_checkpoint: Text | None = None
    """'latest', or a checkpoint's name or path; a run in output_dir goes on from its newest without it."""
    export_lora: bool = True
    """Also write pytorch_lora_weights.safetensors, which diffusers, ComfyUI and WebUIs load."""
    report_to: Literal["tensorboard", "wandb", "trackio", "comet_ml", "all"] | None = option(
        None, theirs="tensorboard"
    )
    """Tracker of loss and images, beside log.jsonl; none if not given."""
    logging_dir: Text = option("logs", "Folder of the tracker's files, inside output_dir.", needs="report_to")
    tracker_project_name: Text = option("train-dreambooth", needs="report_to")
    """Project the tracker files the run under."""
    push_to_hub: bool = option(False, "Upload the result to the hub; log in first with `hf auth login`.")
    hub_model_id: Text | None = option(None, needs="push_to_hub")
    """Repository on the hub, owner/name; the folder's name if not given."""
    hub_private_repo: bool = option(False, "Make the repository private.", needs="push_to_hub")

    def _contradictions(self) -> Iterator[str]:
        if self.hub_model_id is not None and not re.fullmatch(r"([\w.-]+/)?[\w.-]+", self.hub_model_id):
            yield f"hub_model_id={shown(self.hub_model_id)} is not a repository of the hub; use owner/name"


class ControlConfig(Options, group="control images and their encoder"):
    """Control images and their encoder."""

    conditioning_data_dir: PathText | None = None
    """Folder of control images with the photos' names: what says where."""
    conditioning_image_column: Text = option(
        "conditioning_image", needs="detector=none|palette, no conditioning_data_dir, dataset_name"
    )
    """Or the column of the dataset that holds them."""
    detector: Text | None = None
    """Or what draws them from the photos: canny, silhouette (of the alpha channel), or a model of
    controlnet-aux, e.g. depth_midas; palette: the images given are segmentation maps."""
    canny_low_threshold: NotNegative = option(CANNY_THRESHOLDS[0], needs="detector=canny")
    """Gradient from which on canny continues an edge, as in OpenCV."""
    canny_high_threshold: NotNegative = option(CANNY_THRESHOLDS[1], needs="detector=canny")
    """Gradient from which on canny begins an edge, as in OpenCV."""
    control_type: Text | None = None
    """What they show, e.g. silhouette or edges; the detector's if not given. Colours of a palette are never
    blended."""
    palette: Text | None = option(None, needs="control_type=palette")
    """Classes and colours that control_type=palette is checked against: tiny_world, or a JSON file {"sky":
    [0, 128, 255], …}."""
    control_learning_rate: EncoderRate = option(MAX_ENCODER_RATE, "Learning rate of the control encoder.")
    control_dropout: Share = option(0.0, "Share of samples that are trained without their control image.")
    validation_image: Texts = option((), free=True)
    """Control image of a validation prompt, or the photo that the detector draws it from; one for each prompt
    in their order, or one for all."""

    @property
    def is_detected(self) -> bool:
        """Whether control images are drawn from the photos."""
        return self.detector not in (None, "palette")

    def _contradictions(self) -> Iterator[str]:
        low, high, kind = self.canny_low_threshold, self.canny_high_threshold, self.control_type
        problem = None if self.detector is None else detector_problem(self.detector)
        if problem is not None:
            yield problem
        elif self.is_detected and self.conditioning_data_dir is not None:
            yield f"conditioning_data_dir and detector={self.detector} both give control images; give one"
        if low > high:
            yield f"canny_low_threshold={low:g} is above canny_high_threshold={high:g}; exchange them"
        if kind is not None and not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", kind):
            yield f"control_type={shown(kind)} is no name; use letters, digits, _ and -"
        if "palette" in (self.detector, kind) and len({self.detector, kind} - {None}) > 1:
            yield f"detector={self.detector} and control_type={kind} contradict each other; leave one out"
