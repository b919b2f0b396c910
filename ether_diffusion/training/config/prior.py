"""How the base's idea of the subject's class is kept."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ether_diffusion.options import option
from ether_diffusion.training.config.section import Section

PriorPreservation = Literal["none", "class_images", "frozen"]
Precision = Literal["no", "fp32", "fp16", "bf16"]


@dataclass(frozen=True)
class PriorConfig(Section):
    """Prior preservation (DreamBooth, Ruiz et al. 2023)."""

    prior_preservation: PriorPreservation = option(
        "none",
        "class_images: also train on images of the class, generated where missing. frozen: also match what "
        "the base without adapter predicts for the class prompt; needs no images.",
    )
    class_data_dir: Path | None = option(None, "Folder of class images; missing ones are generated into it.")
    class_prompt: str | None = option(None, "Prompt of the class, e.g. 'a photo of a dog'.")
    num_class_images: int = option(100, "Images the class folder is filled up to.", least=1)
    prior_loss_weight: float = option(1.0, "Weight of the class's loss beside the subject's.", least=0.0)
    sample_batch_size: int = option(4, "Class images that are generated at once.", least=1)
    prior_generation_precision: Precision | None = option(
        None, "Precision class images are generated in; the training's if not given."
    )

    def contradictions(self) -> Iterator[str]:
        """Say what class images lack."""
        if self.prior_preservation == "class_images":
            if self.class_data_dir is None:
                yield "prior_preservation=class_images needs class_data_dir, a folder of such images; give it"
            if self.class_prompt is None:
                yield "prior_preservation=class_images needs class_prompt, e.g. 'a photo of a dog'; give it"
