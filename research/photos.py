"""How many photos, and how many steps? Subjects of Tiny World learned from few and more, for long or not."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ether_diffusion.adapter_file.strict_json import Json
from ether_diffusion.evaluation.benchmark.summary import LABELS
from ether_diffusion.evaluation.columns import PROMPT, RECOGNISED
from ether_diffusion.evaluation.figures import new_figure, png_of
from ether_diffusion.evaluation.likeness import Estimate
from research.kept_scores import Scores
from research.learning_rates import TOLERANCE
from research.subject_scores import FIDELITY, learn_and_score, summarise

NUM_PHOTOS = (1, 2, 4, 6)
STEPS = (50, 100, 200, 400)
PANELS = {
    FIDELITY: "likeness to the true pictures",
    RECOGNISED: "share recognised as the subject",
    PROMPT: "likeness to the prompt",
    "drift": "drift on prompts without the subject",
}

Summary = Mapping[int, Mapping[int, Mapping[str, Estimate]]]
"""By number of photos, steps and score."""


@dataclass(frozen=True)
class PhotoRun:
    """One training of the study."""

    method: str
    learning_rate: float
    num_photos: int
    steps: int
    subject: str
    seed: int

    def folder(self, root: Path) -> Path:
        """Return where it lies."""
        name = f"{self.subject.replace(' ', '_')}_{self.seed}"
        return root / f"{self.num_photos}_photos" / f"{self.steps}_steps" / name

    def carry_out(self, root: Path, num_inference_steps: int) -> Scores:
        """Train, draw and score it, or read what it came to before.

        Raises:
            ValueError: the settings cannot be used, or an earlier run had others.
            InterruptedError: a signal stopped the training; called again, it goes on.
        """
        settings: dict[str, Json] = {
            "adapter": self.method,
            "learning_rate": self.learning_rate,
            "max_train_steps": self.steps,
        }
        return learn_and_score(
            self.subject,
            self.seed,
            self.folder(root),
            asdict(self),
            settings,
            num_inference_steps,
            num_photos=self.num_photos,
        )


def by_photos(results: Mapping[PhotoRun, Scores]) -> Summary:
    """Return estimates by number of photos, steps and score."""
    summary: dict[int, dict[int, dict[str, Estimate]]] = {}
    for (num_photos, steps), scores in summarise(results, lambda run: (run.num_photos, run.steps)).items():
        summary.setdefault(num_photos, {})[steps] = scores
    return summary


def enough_steps(row: Mapping[int, Mapping[str, Estimate]], least_prompt: float) -> int | None:
    """Return the fewest steps whose fidelity is within 5 % of the best that keeps the prompt.

    None where none keeps it.
    """
    means = {
        steps: found[FIDELITY].mean
        for steps, found in row.items()
        if FIDELITY in found and found[PROMPT].mean >= least_prompt
    }
    if not means:
        return None
    best = max(means.values())
    return min(steps for steps, mean in means.items() if mean >= best - TOLERANCE * abs(best))


def draw_curves(summary: Summary, base: Mapping[str, float], method: str) -> bytes:
    """Return a PNG: a panel for each score over steps, a curve for each number of photos.

    Raises:
        ValueError: matplotlib is not installed.
    """
    figure = new_figure(11, 7.4)
    figure.suptitle(LABELS.get(method, method))
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        if name in base:
            axes.axhline(base[name], color="black", linestyle="--", linewidth=1, label=LABELS["base"])
        for num_photos, row in summary.items():
            there = {steps: found[name] for steps, found in row.items() if name in found}
            axes.errorbar(
                list(there),
                [found.mean for found in there.values()],
                yerr=[found.standard_error or 0.0 for found in there.values()],
                marker="o",
                capsize=3,
                label=f"{num_photos} photo{'s' if num_photos > 1 else ''}",
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(_steps_of(summary), [str(steps) for steps in _steps_of(summary)])
        axes.set_title(title)
        axes.set_xlabel("steps")
        axes.grid(alpha=0.3)
        if name == FIDELITY:
            figure.legend(loc="outside lower center", ncols=len(summary) + 1)
    return png_of(figure)


def _steps_of(summary: Summary) -> Sequence[int]:
    return sorted({steps for row in summary.values() for steps in row})
