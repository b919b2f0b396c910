"""All that is decided before a model is loaded: which photos, at what sizes, in what order."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from ether_diffusion.control.images import resampling_of
from ether_diffusion.training.config import ControlConfig, DataConfig, PriorConfig
from ether_diffusion.training.data.controls import detector_of
from ether_diffusion.training.data.items import Items
from ether_diffusion.training.data.order import VisitOrder
from ether_diffusion.training.data.views import ViewMaker
from ether_diffusion.training.data.visits import Schedule, choose_sizes, warn_of_sizes

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "nearest_exact": Image.Resampling.NEAREST,  # Pillow's nearest is the exact one
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Needs:
    """What a base asks of the photos: its native size (px), what divides every side (px, the VAE's factor
    times the UNet's), and whether its UNet is told sizes (SDXL) or sees a hole and what is around it
    (inpainting).
    """

    native_size: int
    size_multiple: int
    has_size_ids: bool = False
    is_inpainting: bool = False


@dataclass(frozen=True)
class VisitPlan:
    """The visits of a run; `num_samples` are those of an epoch, with repeats and what fills up buckets'
    chunks.

    `prompts` are all that can occur.
    """

    schedule: Schedule
    maker: ViewMaker
    needs: Needs
    prior: PriorConfig
    has_masks: bool
    num_samples: int
    prompts: tuple[str, ...]
    warnings: tuple[str, ...]
    _fingerprint: tuple[tuple[str, str], ...]
    control_dropout: float = 0.0

    def fingerprint(self) -> dict[str, str]:
        """Return the SHA-256 of every photo, prompt, mask and class image by its name."""
        return dict(self._fingerprint)


def plan_visits(
    data: DataConfig,
    prior: PriorConfig,
    items: Items,
    class_items: Items | None,
    *,
    needs: Needs,
    effective_batch: int,
    seed: int,
    control: ControlConfig | None = None,
) -> VisitPlan:
    """Decide what each visit trains on; `class_items` are given if the prior is preserved by class images.

    Raises:
        ValueError: a size does not fit the base, or the class prompt is missing.
    """
    assert (class_items is not None) == (prior.prior_preservation == "class_images")
    photos, classes = items.items, () if class_items is None else class_items.items
    multiple, native = needs.size_multiple, needs.native_size
    sizes = choose_sizes(data, photos, native_size=native, size_multiple=multiple)
    numbers = {size: number for number, size in enumerate(sorted(set(sizes)))}
    buckets = [numbers[size] for size in sizes] if len(numbers) > 1 else None
    repeats = [data.repeats * item.repeats for item in photos]
    order = VisitOrder(len(photos), effective_batch, seed, buckets, repeats=repeats)
    given = (items,) if class_items is None else (items, class_items)
    return VisitPlan(
        schedule=Schedule(photos, classes, sizes, order, data, seed),
        maker=ViewMaker(
            items=photos,
            class_items=classes,
            seed=seed,
            center_crop=data.center_crop,
            mask_from_alpha=data.mask_from_alpha,
            has_holes=needs.is_inpainting,
            resampling=RESAMPLING[data.image_interpolation_mode],
            control_resampling=resampling_of(None if control is None else control.control_type),
            detector=detector_of(control),
        ),
        needs=needs,
        prior=prior,
        has_masks=data.mask_from_alpha or data.mask_data_dir is not None,
        num_samples=order.num_visits_per_epoch,
        prompts=_prompts(data, prior, [item.prompt for item in photos]),
        warnings=(
            *(warning for part in given for warning in part.warnings),
            *warn_of_sizes(photos, sizes, effective_batch),
            *_warn_of_options(data),
        ),
        _fingerprint=tuple(pair for part in given for pair in part.fingerprint.items()),
        control_dropout=0.0 if control is None else control.control_dropout,
    )


def _prompts(data: DataConfig, prior: PriorConfig, prompts: Sequence[str]) -> tuple[str, ...]:
    extra = [""] if data.caption_dropout > 0 else []
    if prior.prior_preservation != "none":
        if not prior.class_prompt:
            mode = f"prior_preservation={prior.prior_preservation}"
            raise ValueError(f"{mode} needs class_prompt, e.g. 'a photo of a dog'; give it")
        extra.append(prior.class_prompt)
    return tuple(dict.fromkeys((*prompts, *extra)))


def _warn_of_options(data: DataConfig) -> Sequence[str]:
    warnings = []
    if data.cache_latents and data.dataloader_num_workers:
        warnings.append("dataloader_num_workers has no effect with cache_latents: nothing is left to load")
    if data.resolution is not None and data.bucket_sizes:
        warnings.append("resolution has no effect on photos, as aspect_ratio_buckets lists their sizes")
    return warnings
