"""What is measured while the adapter is trained, and when that is enough."""

from collections.abc import Iterator
from dataclasses import dataclass

from ether_diffusion.options import option
from ether_diffusion.training.config.section import Section


@dataclass(frozen=True)
class EvaluationConfig(Section):
    """Scores in between, on the same prompts and seeds each time, and the rule that finds the best step."""

    eval_steps: int = option(
        0, "Updates between two evaluations, which keep the best adapter in best/; 0 for none.", least=0
    )
    eval_encoder: tuple[str, ...] = option(
        (),
        "Folder or hub id of what measures, or dino, dinov2, clip; the first measures likeness, the first "
        "CLIP the prompts. The embedded base has its own.",
    )
    eval_prompt: tuple[str, ...] = option(
        (),
        "Prompt with the subject to measure on; may be given several times (validation_prompt, else the "
        "instance prompt in four places).",
    )
    num_eval_images: int = option(2, "Images of each prompt that is measured.", least=1)
    eval_num_inference_steps: int = option(10, "Denoising steps of a measured image.", least=1)
    eval_max_drift: float = option(
        0.3,
        "A step is no candidate for the best above this drift on prompts without the subject: 0 the base's "
        "pictures, 1 as far from them as those of other prompts.",
        above=0.0,
    )
    eval_max_prompt_loss: float = option(
        0.1,
        "Nor is it if it loses more than this share of the base's likeness to the prompts.",
        above=0.0,
        most=1.0,
    )
    eval_patience: int = option(
        3, "Evaluations without a rise of fidelity above its standard error until a run is good.", least=1
    )
    stop_when_good: bool = option(
        False, "End the run once it is good; its result is then the adapter of the best step."
    )

    def contradictions(self) -> Iterator[str]:
        """Say which options exclude or lack each other."""
        if self.stop_when_good and not self.eval_steps:
            yield "stop_when_good needs to know what is good; give eval_steps, e.g. 50"
