"""Text-to-image with a control image: an image says where, a prompt says what; SD 1.x, 2.x and SDXL."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from PIL import Image
from torch import Tensor

from ether_diffusion.adapters import Adapter, LoadReport
from ether_diffusion.adapters.format import Fact, content_hash
from ether_diffusion.adapters.load import Attaching, read_for
from ether_diffusion.control import (
    ControlEncoder,
    ControlImage,
    control_batch,
    control_image_sha256,
    controlled,
    load_control,
)
from ether_diffusion.control.conditioning import check_encoder, encoder_of
from ether_diffusion.control.images import listed_images
from ether_diffusion.pipelines.loading import Choice, EtherLoaderMixin, loaded_adapters
from ether_diffusion.pipelines.metadata import Call, attach_metadata, metadata_of
from ether_diffusion.pipelines.stable_diffusion import EtherStableDiffusionPipeline
from ether_diffusion.pipelines.stable_diffusion_xl import EtherStableDiffusionXLPipeline
from ether_diffusion.wording import listed


class EtherControlMixin(EtherLoaderMixin):
    """Adds control encoders to a pipeline of ours; without a control image it is that pipeline."""

    vae_scale_factor: int
    _execution_device: torch.device
    _encoders: Mapping[str, ControlEncoder] | None = None

    def load_control_weights(
        self,
        adapter: str | Path | Adapter,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        **how: Unpack[Attaching],
    ) -> LoadReport | None:
        """Load an adapter and its control encoder, as `load_control` does; None for an encoder by itself.

        The adapter alone is then active, as with `load_ether_weights`; both go by `adapter_name`, "control"
        where none is given.
        """
        name = how.setdefault("adapter_name", "control")
        if name in self.controls:
            raise ValueError(f"there already is a control encoder named {name!r}; unload it, or name another")
        where: Any = {"revision": revision, "local_files_only": local_files_only}
        found = read_for(self, adapter, with_encoder=True, **where)
        check_encoder(self.components["unet"], encoder_of(found), self.vae_scale_factor)
        loaded = load_control(self, found, **how)
        self._encoders = {**self.controls, name: loaded.encoder}
        return loaded.report

    @property
    def controls(self) -> Mapping[str, ControlEncoder]:
        """The control encoders by name, in the order of loading."""
        return self._encoders or {}

    def unload(self, adapter_names: str | Sequence[str] | None = None) -> None:
        """Take adapters and control encoders out, by default all of them."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if names is not None:
            alone = self.controls.keys() - loaded_adapters(self).keys()
            rest = [name for name in names if name not in alone]
        if names is None or rest:
            super().unload(None if names is None else rest)
        self._encoders = {n: one for n, one in self.controls.items() if names is not None and n not in names}

    def __call__(
        self,
        *args: Any,
        control_image: ControlImage | Sequence[ControlImage] | None = None,
        control_strength: float = 1.0,
        control: str | None = None,
        adapters: Choice | None = None,
        seed: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Make pictures that follow a control image; all other arguments are as without.

        Args:
            adapters: may name encoders by themselves, too, which change nothing in the models.
            control_image: PIL, or a tensor in [0, 1]; one for all prompts, or a list with one for each. It
                is resized to the picture, which must have its proportions.
            control_strength: what the encoder's features are multiplied by: 1 is as trained, 0 is without.
                It is apart from the strength of the adapter, which `adapters` or `set_adapters` say.
            control: which encoder, where several are loaded.
        """
        if isinstance(adapters, Mapping):
            alone = self.controls.keys() - loaded_adapters(self).keys()
            adapters = {name: strength for name, strength in adapters.items() if name not in alone}
        call = self._bind(args, kwargs, seed)
        if control_image is None:
            if control is not None or control_strength != 1.0:
                raise ValueError("control and control_strength need a control_image; give one")
            return self._draw(call, adapters)
        strength = float(control_strength)
        encoder, images, facts = self._plan(call, control_image, strength, control)
        guided = controlled(self.components["unet"], encoder, images, strength=strength)
        with torch.no_grad(), guided:
            output = self._draw(call, adapters)
        pictures = output[0] if isinstance(output, tuple) else output.images
        for picture, further in zip(pictures, facts, strict=False):  # arrays and latents carry nothing
            known = metadata_of(picture) if isinstance(picture, Image.Image) else None
            if known is not None:
                attach_metadata(picture, replace(known, options={**known.options, **further}))
        return output

    def _plan(
        self,
        call: Call,
        image: ControlImage | Sequence[ControlImage],
        strength: float,
        control: str | None,
    ) -> tuple[ControlEncoder, Tensor, list[dict[str, Fact]]]:
        """Return what a call does with images (pictures, 3, height, width), and what its pictures say."""
        if not math.isfinite(strength):
            raise ValueError(f"control_strength={strength} is not a finite number; 1 is as trained")
        name = next(iter(self.controls)) if control is None and len(self.controls) == 1 else control
        if name is None or name not in self.controls:
            loaded = listed(self.controls) or "none, use load_control_weights"
            raise ValueError(f"found no control encoder with control={control!r}; loaded are {loaded}")
        encoder, size = self.controls[name], self.components["unet"].config.sample_size
        # the size of the pictures in px, as diffusers' pipelines choose it
        height, width = (size, size) if isinstance(size, int) else size
        height = call.arguments["height"] or height * self.vae_scale_factor
        width = call.arguments["width"] or width * self.vae_scale_factor
        kind = encoder.config.control_type
        images = control_batch(image, height=height, width=width, control_type=kind)
        num_prompts, each = call.num_prompts, call.images_per_prompt
        if len(images) not in (1, num_prompts):
            raise ValueError(
                f"found {len(images)} control images for {num_prompts} prompts; give one for each"
            )
        hashes = [control_image_sha256(one) for one in listed_images(image)]
        common: dict[str, Fact] = {
            "control": name,
            "control_strength": strength,
            "control_encoder_sha256": content_hash(encoder.state_dict()),
        }
        per_prompt = hashes * (num_prompts if len(hashes) == 1 else 1)
        facts = [{**common, "control_image_sha256": one} for one in per_prompt for _ in range(each)]
        if len(images) > 1:
            images = images.repeat_interleave(each, dim=0)
        return encoder.to(self._execution_device), images, facts


class EtherControlPipeline(EtherControlMixin, EtherStableDiffusionPipeline):
    """Stable Diffusion 1.x and 2.x with ETHER adapters and control images."""


class EtherControlXLPipeline(EtherControlMixin, EtherStableDiffusionXLPipeline):
    """Stable Diffusion XL with ETHER adapters and control images."""
