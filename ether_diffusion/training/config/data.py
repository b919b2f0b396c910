"""What is trained on: photos, their prompts, and how they become latents."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ether_diffusion.options import option, shown
from ether_diffusion.training.config.section import Section

SIZE_STEP = 8
"""Sides of photos divide by it: one latent stands for so many pixels of a side."""
MAX_SIDE = 8192
"""Of what is trained at (px): beyond every base, and short of what no memory holds."""

InterpolationMode = Literal["nearest", "nearest_exact", "box", "bilinear", "hamming", "bicubic", "lanczos"]


@dataclass(frozen=True)
class DataConfig(Section):
    """Photos and prompts."""

    instance_data_dir: Path | None = option(
        None, "Folder of the subject's photos, with subfolders; captions may lie beside them."
    )
    dataset_name: str | None = option(None, "Instead of a folder: a dataset's hub id or local path.")
    dataset_config_name: str | None = option(None, "Configuration of the dataset.")
    image_column: str = option("image", "Column of the dataset that holds the photos.")
    caption_column: str | None = option(
        None, "Column of the dataset that holds the captions; without it every photo gets --instance_prompt."
    )
    max_train_samples: int | None = option(
        None, "Photos to train on where there are more, drawn at random, the same ones each time.", least=1
    )
    instance_prompt: str | None = option(
        None, "Prompt of photos without a caption, e.g. 'a photo of sks dog'."
    )
    token: str | None = option(None, "Trigger word, e.g. sks: it fills {token} in prompts and captions.")
    caption_template: str = option(
        "{caption}", "What a photo's prompt is made of, e.g. 'a photo of {token}, {caption}'."
    )
    resolution: int | None = option(
        None,
        "Side of the square photos are brought to (px); the base's own if not given.",
        least=8,
        most=MAX_SIDE,
        multiple_of=8,
    )
    center_crop: bool = option(False, "Crop photos in the middle instead of anywhere.")
    random_flip: bool = option(False, "Mirror half of the samples left to right.")
    crops_per_photo: int = option(
        4, "Random crops of a photo that are encoded when latents are cached.", least=1
    )
    repeats: int = option(1, "Times each photo occurs in an epoch.", least=1)
    caption_dropout: float = option(
        0.0, "Share of samples that are trained with the empty prompt.", least=0.0, most=1.0
    )
    use_aspect_ratio_buckets: bool = option(
        False, "Keep photos' proportions: sort them into sizes of about equal area."
    )
    aspect_ratio_buckets: str | None = option(
        None, "The buckets' sizes (px) as 'height,width;height,width'; it switches the buckets on."
    )
    mask_from_alpha: bool = option(False, "Weigh the loss by the photos' alpha channel.")
    mask_data_dir: Path | None = option(
        None, "Folder of masks with the photos' names: white counts, black does not."
    )
    unmasked_weight: float = option(0.0, "Weight in the loss of what a mask leaves out.", least=0.0, most=1.0)
    image_interpolation_mode: InterpolationMode = option("lanczos", "How photos are resized.")
    cache_latents: bool = option(True, "Encode the photos once, before training; the VAE then leaves memory.")
    pre_compute_text_embeddings: bool = option(
        True, "Encode the prompts once, before training; not while the text encoder is trained."
    )
    dataloader_num_workers: int = option(0, "Processes that load samples; 0: the main one.", least=0)
    strict: bool = option(False, "Stop if any file of the folder is unusable, instead of leaving it out.")
    follow_symlinks: bool = option(False, "Read photos that are links to somewhere outside their folder.")

    def contradictions(self) -> Iterator[str]:
        """Say which options exclude each other."""
        if self.instance_data_dir is None and self.dataset_name is None:
            yield "there is nothing to train on; give instance_data_dir, a folder of photos, or dataset_name"
        if self.instance_data_dir is not None and self.dataset_name is not None:
            yield "instance_data_dir and dataset_name are two sources of photos; give one"
        if self.mask_from_alpha and self.mask_data_dir is not None:
            yield "mask_from_alpha and mask_data_dir are two sources of masks; give one"
        unknown = set(re.findall(r"\{\w*\}", self.caption_template)) - {"{token}", "{caption}"}
        if unknown:
            yield (
                f"caption_template={shown(self.caption_template)} has {', '.join(sorted(unknown))}; "
                "use {token} and {caption}"
            )
        for name, text in (
            ("instance_prompt", self.instance_prompt),
            ("caption_template", self.caption_template),
        ):
            if self.token is None and text is not None and "{token}" in text:
                yield f"{name}={shown(text)} asks for {{token}}; give the trigger word as token"
        if self.aspect_ratio_buckets is not None:
            yield from self._bucket_problems(self.aspect_ratio_buckets)

    def _bucket_problems(self, text: str) -> Iterator[str]:
        if not self.use_aspect_ratio_buckets:
            yield "aspect_ratio_buckets lists sizes and use_aspect_ratio_buckets is off; switch it on"
        if not re.fullmatch(r"\s*\d+\s*,\s*\d+\s*(;\s*\d+\s*,\s*\d+\s*)*;?\s*", text):
            yield f"aspect_ratio_buckets={shown(text)} is not a list of sizes; write 'height,width;…'"
        elif any(side < SIZE_STEP or side % SIZE_STEP for size in self.bucket_sizes for side in size):
            yield f"aspect_ratio_buckets={shown(text)} has sides not divisible by {SIZE_STEP} px; round them"
        elif any(side > MAX_SIDE for size in self.bucket_sizes for side in size):
            yield f"aspect_ratio_buckets={shown(text)} has sides over {MAX_SIDE} px; give smaller ones"

    @property
    def bucket_sizes(self) -> tuple[tuple[int, int], ...]:
        """The sizes of `aspect_ratio_buckets`, (height, width) in px; none where the option is not given."""
        sizes = (self.aspect_ratio_buckets or "").split(";")
        pairs = (size.split(",") for size in sizes if size.strip())
        return tuple((int(height), int(width)) for height, width in pairs)
