"""Pictures for an evaluation, drawn with the models in training as they are, and their scores."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from PIL import Image

from ether_diffusion.strict_json import Json
from ether_diffusion.training.best import Measured
from ether_diffusion.training.config import ValidationConfig
from ether_diffusion.training.evaluating import Evaluator
from ether_diffusion.training.loop import averaged
from ether_diffusion.training.methods import TrainedPart, adapters_off
from ether_diffusion.training.samples import Sampler
from ether_diffusion.training.setup import LoadedRun

Pictures = list[list[Image.Image]]
"""By prompt and seed."""


class Measuring:
    """Draws the evaluator's prompts on the same seeds each time; training goes on as if it had not."""

    def __init__(
        self, evaluator: Evaluator, run: LoadedRun, accelerator: Accelerator, check: Callable[[], None]
    ) -> None:
        self.evaluator, self.run, self.accelerator, self.check = evaluator, run, accelerator, check
        self.config = run.checked.config.evaluation
        self._base_other: Pictures | None = None

    @property
    def num_pictures(self) -> int:
        """How many pictures one evaluation draws."""
        num_prompts = len(self.evaluator.prompts) + len(self.evaluator.other_prompts)
        return num_prompts * self.config.num_eval_images

    def facts(self) -> dict[str, Json]:
        """Return what scores depend on besides adapter and photos, and what the choice of the best does."""
        checked = self.run.checked
        return {
            "prompts": list(self.evaluator.prompts),
            "other_prompts": list(self.evaluator.other_prompts),
            "num_images": self.config.num_eval_images,
            "num_inference_steps": self.config.eval_num_inference_steps,
            "guidance_scale": checked.base.guidance_scale,
            "seed": checked.config.compute.seed,
            "size": list(checked.size),
            "max_drift": self.config.eval_max_drift,
            "max_prompt_loss": self.config.eval_max_prompt_loss,
            **self.evaluator.facts(),
        }

    def measure_base(self) -> Measured:
        """Score the base alone."""
        subject, self._base_other = self._draw(with_adapter=False)
        return self.evaluator.measure(subject, self._base_other, self._base_other)

    def measure(self) -> Measured:
        """Score the adapter in training, or its average where one is kept."""
        if self._base_other is None:
            _, self._base_other = self._draw(with_adapter=False, with_subject=False)
        with averaged(self.run.trainer):
            subject, other = self._draw(with_adapter=True)
        return self.evaluator.measure(subject, other, self._base_other)

    def _draw(self, *, with_adapter: bool, with_subject: bool = True) -> tuple[Pictures, Pictures]:
        """Return the pictures of the subject's prompts and of the others."""
        checked = self.run.checked
        own = self.evaluator.prompts if with_subject else ()
        settings = ValidationConfig(
            validation_prompt=(*own, *self.evaluator.other_prompts),
            num_validation_images=self.config.num_eval_images,
            validation_num_inference_steps=self.config.eval_num_inference_steps,
        )
        folder, seed = checked.config.output.output_dir, checked.config.compute.seed
        sampler = Sampler(checked.base, settings, folder, seed, checked.size)
        with (
            at_rest(self.run.trainer.parts, with_adapter=with_adapter),
            self.accelerator.autocast(),
            torch.compiler.set_stance("force_eager"),
        ):
            rows = sampler.draw(self.run.unet, self.run.encode, check=self.check)
        return rows[: len(own)], rows[len(own) :]


@contextmanager
def at_rest(parts: Sequence[TrainedPart], *, with_adapter: bool) -> Iterator[None]:
    """Switch dropout off inside, and all parts' adapters where they are not wanted."""
    before = [part.model.training for part in parts]
    for part in parts:
        part.model.eval()
    with nullcontext() if with_adapter else adapters_off(part.model for part in parts):
        try:
            yield
        finally:
            for part, was_training in zip(parts, before, strict=True):
                part.model.train(was_training)
