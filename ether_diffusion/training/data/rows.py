"""Rows of a batch: an encoded view, what is drawn for its visit, and how the loss weighs it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ether_diffusion.training.data.batch import Batch
from ether_diffusion.training.data.latents import EncodedView
from ether_diffusion.training.randomness import stream


@dataclass(frozen=True)
class Row:
    """One row, its latents (c, h, w) and masked latents not yet scaled; `mask` (1, h, w) weighs the loss."""

    view: EncodedView
    latents: Tensor
    masked_latents: Tensor | None
    mask: Tensor | None
    prompt: str
    visit: int
    weight: float = 1.0
    is_frozen_prior: bool = False
    follows_control: bool = False


def instance_row(
    view: EncodedView,
    *,
    prompt: str,
    visit: int,
    seed: int,
    unmasked_weight: float,
    control_dropout: float = 0.0,
) -> Row:
    """Return the row of a photo of the subject."""
    is_dropped = torch.rand((), generator=stream(seed, "control dropout", visit)).item() < control_dropout
    mask = None if view.mask is None else unmasked_weight + (1 - unmasked_weight) * view.mask
    return Row(view, *_sample(view, seed, "", visit), mask, prompt, visit, follows_control=not is_dropped)


def class_row(view: EncodedView, *, prompt: str, visit: int, seed: int, weight: float) -> Row:
    """Return the row of a class image, of which the loss sees everything."""
    return Row(view, *_sample(view, seed, "class ", visit), None, prompt, visit, weight)


def frozen_row(row: Row, *, prompt: str, weight: float) -> Row:
    """Return the row of an instance row's latents and the class prompt, whose target is the base's output."""
    return replace(row, mask=None, prompt=prompt, weight=weight, is_frozen_prior=True, follows_control=False)


def stack_rows(
    rows: Sequence[Row], scale: Callable[[Tensor], Tensor], *, has_masks: bool, has_size_ids: bool
) -> Batch:
    """Return the batch of rows of one size."""
    latents = scale(torch.stack([row.latents for row in rows]))
    masks = [torch.ones_like(row.latents[:1]) if row.mask is None else row.mask for row in rows]
    return Batch(
        latents=latents,
        prompts=tuple(row.prompt for row in rows),
        weights=torch.tensor([row.weight for row in rows], dtype=torch.float32),
        masks=torch.stack(masks) if has_masks else None,
        is_frozen_prior=torch.tensor([row.is_frozen_prior for row in rows]),
        size_ids=torch.tensor([row.view.size_ids for row in rows]) if has_size_ids else None,
        inpainting=_inpainting(rows, scale),
        visits=tuple(row.visit for row in rows),
        names=tuple(row.view.name for row in rows),
        **_controls(rows),
    )


def _sample(view: EncodedView, seed: int, kind: str, visit: int) -> tuple[Tensor, Tensor | None]:
    latents = view.posterior.sample(stream(seed, f"{kind}posterior", visit))
    if view.masked is None:
        return latents, None
    return latents, view.masked.sample(stream(seed, f"{kind}masked posterior", visit))


def _controls(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Return the control images of a batch and which rows follow theirs; nothing where no row has one."""
    found = [row.view.control for row in rows]
    given = next((control for control in found if control is not None), None)
    if given is None:
        return {}
    images = torch.stack([torch.zeros_like(given) if control is None else control for control in found])
    follows = [row.follows_control and row.view.control is not None for row in rows]
    return {"controls": images.float() / 255, "control_strengths": torch.tensor(follows).float()}


def _inpainting(rows: Sequence[Row], scale: Callable[[Tensor], Tensor]) -> Tensor | None:
    holes = [row.view.hole for row in rows if row.view.hole is not None]
    masked = [row.masked_latents for row in rows if row.masked_latents is not None]
    if not holes:
        return None
    return torch.cat((torch.stack(holes), scale(torch.stack(masked))), dim=1)
