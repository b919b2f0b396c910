"""What the commands of `ether` are told: each field is one flag; nothing here waits for torch.

The docstring of a command's options is its help.
"""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ether_diffusion.options import Numbers, Options, Wholes, Words, needed, option

Dtype = Literal["float32", "float16", "bfloat16"]


def several(help: str) -> Words:
    """Declare an option whose values are given one by one."""
    return option((), help, is_repeated=True)


class Inspect(Options):
    """Say what an adapter holds; loads no model."""

    adapter: str = needed("folder or hub id of an adapter", is_positional=True)
    json_: bool = option(False, "print JSON instead of lines")


class _Written(Options):
    """Of the commands that write an adapter in another form."""

    adapter: str = needed("folder or hub id of an adapter", is_positional=True)
    base: str = needed("folder or hub id of the base model, or tiny_world_2")
    rebake: bool = option(False, "apply the reflections to other weights than those trained on")


class Export(_Written):
    """Write an adapter as a LoRA file, exactly, for other tools."""

    output: Path | None = option(None, "folder to write into (default: the adapter's own)")
    dtype: Literal["float16", "float32"] = option("float16", "numbers in the file (float16)")
    export_name: str | None = option(
        None, "file name (pytorch_lora_weights.safetensors, which diffusers finds by itself)"
    )


class Merge(_Written):
    """Write a whole model with the adapter merged into its weights."""

    output: Path = needed("new folder for the model")
    scale: float = option(1.0, "strength: 1 as trained (default), 0 the base")


class Convert(Options):
    """Turn a language-model checkpoint of ETHER's authors into an adapter."""

    checkpoint: str = needed("lit_model_ether_finetuned.pth of their training", is_positional=True)
    output: Path = needed("new folder for the adapter")
    architecture: Literal["llama", "phi"] = needed(
        "whose module names to use; llama also for Mistral and Gemma"
    )
    side: Literal["input", "output"] | None = option(None, "take the projections of one side only")
    base_model: str | None = option(None, "folder or hub id of the base, to be noted in the adapter")


class _Drawn(Options):
    title: ClassVar = "what to draw"
    prompt: Words = several(
        "(word:1.3) is weighed, {red|blue} drawn by the seed; several times (the trigger of the adapter)"
    )
    negative_prompt: str | None = option(None, "what the pictures should not show")
    wildcards: Path | None = option(
        None, "folder with animal.txt, of which a prompt's __animal__ takes a line by the picture's seed"
    )
    seed: Wholes = option((), "of the first picture (0), or several seeds")
    num_images: int = option(1, "pictures per prompt, with seed, seed + 1, … (1)")
    image: Path | None = option(None, "picture to begin with, instead of noise")
    image_strength: float | None = option(
        None, "how far from --image: from just above 0 to 1, nothing of it (0.6)"
    )
    mask: Path | None = option(None, "picture that is white where --image is drawn anew; the rest is kept")
    control_image: Path | None = option(None, "picture that says where, for an adapter with control")
    control_strength: float | None = option(None, "of the control image: 1 as trained (default), 0 without")
    control_detector: str | None = option(
        None,
        "draw what says where from the photo --control_image: canny, silhouette (of its alpha channel), "
        "palette (as it is), or a model of controlnet-aux, e.g. depth_midas",
    )
    canny_thresholds: Numbers = option((), "LOW and HIGH of canny, as in OpenCV (100 200)")


class _Strengths(Options):
    title: ClassVar = "adapters"
    adapter: Words = several("folder or hub id; may be given several times")
    strength: Numbers = option(
        (), "1 as trained (default), 0 the base; one per adapter or for all; with --grid, a column each"
    )


class Mix(Options):
    """Write several adapters as one: a LoRA that draws what they draw together."""

    adapter: Words = several("folder or hub id; may be given several times")
    strength: Numbers = option((), "1 as trained (default), 0 the base; one per adapter or for all")
    output: Path = needed("new folder for the adapter")
    base: str | None = option(None, "folder or hub id of the base (the one that the adapters name)")
    rebake: bool = option(False, "mix on other weights than those that an adapter was trained on")


class How(Options):
    """Of the commands that draw."""

    title: ClassVar = "how to draw"
    base: str | None = option(None, "folder, hub id or tiny_world_2 (the base that the adapter names)")
    size: str | None = option(
        None, "width and height in px, as 512 or 512x768 (the base's own, in the shape of --image)"
    )
    steps: int | None = option(None, "denoising steps (30)")
    guidance_scale: float | None = option(None, "how closely to follow the prompt (the base's usual)")
    scheduler: str | None = option(None, "sampler, e.g. ddim, dpm++, euler (the base's own)")
    batch_size: int | None = option(None, "pictures drawn at once (1)")
    device: str | None = option(None, "cpu, cuda, … (the accelerator if there is one)")
    dtype: Dtype | None = option(None, "(float32 on the CPU, else float16)")


class _Result(Options):
    title: ClassVar = "result"
    output: Path = needed(
        "new folder, or new .png file for a single picture; what is there is never overwritten"
    )
    grid: bool = option(False, "also a labelled sheet: strengths across, prompts and seeds down")
    base_beside: bool | None = option(None, "draw the base on the same seeds too (with --grid)")


class Generate(_Drawn, _Strengths, How, _Result):
    """Draw pictures with an adapter, with their settings inside."""


class _Measured(Options):
    title: ClassVar = "what to measure"
    adapter: str | None = option(None, "folder or hub id of an adapter to draw with", is_positional=True)
    photos: Path | None = option(None, "folder of real photos of the subject")
    prompts: Words | None = option(None, "file with a prompt a line, or prompts, that name the subject")
    other_prompts: Words | None = option(
        None, "the same without the subject, for drift (ten of everyday things)"
    )
    generated: Path | None = option(None, "folder of pictures drawn before, instead of an adapter")
    captions: Path | None = option(
        None, 'JSON Lines with their prompts, {"file_name": …, "text": …} (what PNGs of ours say themselves)'
    )


class _Yardsticks(Options):
    title: ClassVar = "measured with"
    encoder: Words = several(
        "dino, dinov2, clip or tiny_world, a folder or a hub id; may be given several times (tiny_world for "
        "the embedded base, else dino, dinov2 and clip)"
    )
    lpips_weights: Path | None = option(
        None, "file with torchvision's weights of AlexNet (that in torch's cache, or no LPIPS)"
    )
    identifier: str | None = option(
        None, "a made-up word of the prompts, e.g. sks, that CLIP is not to compare with"
    )
    encoder_batch_size: int = option(16, "pictures encoded at once (16)")


class _Following(Options):
    title: ClassVar = "adapters that follow a control image"
    control_pairs: Path | None = option(
        None, "instead of --photos: folder of photos, control images and their metadata.jsonl"
    )
    control_type: str | None = option(None, "palette, silhouette, canny, … (what the adapter says)")
    segmenter: str | None = option(
        None, "tiny_world, or folder or hub id of a semantic segmentation model (tiny_world for its base)"
    )
    palette: Path | None = option(None, 'JSON with the colour of each class, {"wall": [120, 120, 120]}')
    landmarks: bool | None = option(None, "measure faces, too; needs face-alignment")


class _Pictures(Options):
    title: ClassVar = "what is drawn"
    seed: int | None = option(None, "of the first picture of each prompt (0)")
    num_images: int | None = option(None, "pictures per prompt, with seed, seed + 1, … (4)")


class _Report(Options):
    title: ClassVar = "result (new files; what is there is never overwritten)"
    json_: Path | None = option(None, "file for all numbers")
    plot: Path | None = option(None, "PNG with the scores and their standard errors")
    pictures: Path | None = option(
        None, "folder for what is drawn: base/, adapter/, other_base/, other_adapter/"
    )


class Evaluate(_Measured, _Yardsticks, _Following, _Pictures, How, _Report):
    """Measure an adapter: likeness to the photos and the prompts, drift from the base."""


class _Compared(Options):
    title: ClassVar = "what to compare"
    output_dir: Path = needed("folder of the runs and the results")
    data: Path | None = option(
        None,
        "folder of the DreamBooth data set with its prompts_and_classes.txt: 25 prompts × 4 pictures, 1200 "
        "steps (without it the short form, on subjects of an embedded base)",
    )
    base: str = option("tiny_world_2", "folder or hub id (tiny_world_2)")
    methods: Words = option(
        (), "methods of train-dreambooth, also with options: lora:rank=1,learning_rate=0.003 (seven)"
    )
    subjects: Words = option((), "(all of --data, or twenty-four)")
    seeds: Wholes = option((0,), "of training (0)")


class _Comparison(Options):
    title: ClassVar = "how"
    train: Words = option((), "OPTION=VALUE of train-dreambooth for all methods, e.g. max_train_steps=600")
    num_images: int | None = option(None, "pictures of each prompt (4, short 2)")
    inference_steps: int | None = option(None, "of each picture (25, short 15)")
    batch_size: int | None = option(None, "pictures drawn at once (4, short 16)")
    encoder: Words = several("dino, dinov2, clip, tiny_world, a folder or a hub id; repeatable")
    lpips_weights: Path | None = option(None, "file with torchvision's weights of AlexNet")
    num_processes: int = option(1, "runs at once; one CPU thread each (1)")
    keep_adapters: bool = option(False, "keep what was trained, too")
    plan: bool = option(False, "say what would be done, and do nothing")
    merge: Words = option((), "folders of results of several machines: put them together, and run nothing")


class Benchmark(_Compared, _Comparison):
    """Compare methods: each learns several subjects, and is measured as in the ETHER paper.

    Train every method on every subject, draw the protocol's prompts, and print the paper's table. Stopped or
    killed anywhere, the same command goes on; started several times with one --output_dir, as on several
    GPUs, they share the work.
    """


class Plan(Options):
    """Say what to train with and for how long, and what that rests on."""

    photos: str = needed("folder of the subject's photos, or their number")
    base: str = option("tiny_world_2", "folder or hub id (tiny_world_2)")
    json_: bool = option(False, "print an object for programs")


class Ui(Options):
    """Open the studio in a browser: train, draw and compare without commands."""

    folder: Path = option(
        Path("~/ether-studio"), "where adapters, pictures and runs are kept (~/ether-studio)"
    )
    base: str = option("tiny_world_2", "folder or hub id of the base (tiny_world_2)")
    port: Annotated[int, Field(ge=1, le=65535)] | None = option(
        None, "of the page (the first free one from 7860)"
    )
    listen: bool = option(False, "let other machines in, too; needs --auth (this machine only)")
    auth: str | None = option(
        None, "NAME:PASSWORD to ask for a login; @FILE reads it from the first line of a file"
    )
    open: bool = option(False, "open the page in a new tab")


class Bases(Options):
    """List the bases that lie on this machine."""

    folder: Words = several(
        "also look into this folder, for folders and single files; may be given several times"
    )
    json_: bool = option(False, "print JSON instead of lines")


class Doctor(Options):
    """Say what this machine has and can do: packages, memory, devices, the Hub, and a step of training."""

    base: Words = several("base to do a step with (tiny_world_2); may be given several times")
