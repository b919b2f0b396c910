"""What is drawn while the adapter is trained."""

from dataclasses import dataclass

from ether_diffusion.options import option
from ether_diffusion.training.config.section import Section


@dataclass(frozen=True)
class ValidationConfig(Section):
    """Images in between, on the same seeds each time."""

    validation_prompt: tuple[str, ...] = option(
        (), "Prompt to draw during training; may be given several times."
    )
    num_validation_images: int = option(4, "Images of each validation prompt.", least=1)
    validation_steps: int = option(100, "Updates between two sets of validation images.", least=1)
    validation_epochs: int | None = option(
        None,
        "Deprecated: the distance in epochs, whose length depends on the photos. Outranks validation_steps.",
        least=1,
    )
    validation_num_inference_steps: int = option(20, "Denoising steps of a validation image.", least=1)
    validation_guidance_scale: float | None = option(
        None, "Guidance of validation images; one that suits the base if not given.", least=0.0
    )
    validation_negative_prompt: str | None = option(None, "What validation images should not show.")

    def steps_between(self, steps_per_epoch: int) -> int:
        """Return the updates between two sets of images, where an epoch has so many updates."""
        if self.validation_epochs is None:
            return self.validation_steps
        return self.validation_epochs * steps_per_epoch
