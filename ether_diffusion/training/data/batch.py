"""What one micro-batch of training is made of."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of a micro-batch: the instance rows, then with prior preservation one class row for each.

    latents (b, c, h, w) are float32, sampled from the VAE's posterior and scaled; prompts are those after
    caption dropout. weights (b,) are those of the rows in the loss, 1 or prior_loss_weight; masks (b, 1, h,
    w) in [0, 1] those of the latents' pixels, None where all are 1. Where is_frozen_prior (b,) is true, the
    target is the base's own prediction. size_ids (b, 6) are SDXL's: original height and width, crop top and
    left, target height and width, all in px. inpainting (b, 1 + c, h, w), for UNets that see it, is the
    mask (1 where something is to be painted) and the scaled latents of the masked image. A class row
    carries the number of its instance row's visit; names are the photos' files. controls (b, 3, H, W) in
    [0, 1] are control images at the size of the photos, and control_strengths (b,) 1 for rows that follow
    them and 0 for the others: those dropped, and all rows of a prior.
    """

    latents: Tensor
    prompts: tuple[str, ...]
    weights: Tensor
    masks: Tensor | None
    is_frozen_prior: Tensor
    size_ids: Tensor | None
    inpainting: Tensor | None
    visits: tuple[int, ...]
    names: tuple[str, ...]
    controls: Tensor | None = None
    control_strengths: Tensor | None = None
