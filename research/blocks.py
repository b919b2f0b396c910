"""Do blocks and sides matter? Subjects of Tiny World learned with n = 1, 4, 16, on one side and on both.

ETHER, Bini et al. 2024, arXiv:2405.20271, tables 9 to 11: blocks hardly do, both sides of ETHER+ do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ether_diffusion.adapter_file.strict_json import Json
from ether_diffusion.evaluation.columns import PROMPT, RECOGNISED
from ether_diffusion.evaluation.figures import new_figure, png_of
from ether_diffusion.evaluation.likeness import Estimate
from research.kept_scores import Scores
from research.subject_scores import FIDELITY, learn_and_score, summarise

VARIANTS: Mapping[str, Mapping[str, Json]] = {
    "ETHER": {"adapter": "ether", "sides": "input"},
    "ETHER+ one-sided": {"adapter": "ether_plus", "sides": "input"},
    "ETHER+": {"adapter": "ether_plus", "sides": "both"},
}
NUM_BLOCKS = (1, 4, 16)
PANELS = {
    FIDELITY: "likeness to the true pictures",
    RECOGNISED: "share recognised",
    PROMPT: "likeness to the prompt",
}


@dataclass(frozen=True)
class BlockRun:
    """One training of the study: a variant by its name in `VARIANTS`."""

    variant: str
    num_blocks: int
    subject: str
    seed: int

    def folder(self, root: Path) -> Path:
        """Return where it lies."""
        names = self.variant, f"{self.num_blocks} blocks", f"{self.subject}_{self.seed}"
        return root.joinpath(*(name.replace(" ", "_").lower() for name in names))


def plan_runs(
    variants: Sequence[str], blocks: Sequence[int], subjects: Sequence[str], seeds: Sequence[int]
) -> list[BlockRun]:
    """Return all runs of a study."""
    return [
        BlockRun(variant, num_blocks, subject, seed)
        for subject in dict.fromkeys(subjects)
        for seed in dict.fromkeys(seeds)
        for variant in dict.fromkeys(variants)
        for num_blocks in dict.fromkeys(blocks)
    ]


def carry_out(run: BlockRun, root: Path, *, max_train_steps: int, num_inference_steps: int) -> Scores:
    """Train, draw and score one run, or read what it came to before; nothing where training diverged.

    Raises:
        ValueError: the settings cannot be used, or an earlier run had others.
        InterruptedError: a signal stopped the training; called again, it goes on.
    """
    settings = {
        **VARIANTS[run.variant],
        "num_blocks": run.num_blocks,
        "max_train_steps": max_train_steps,
    }
    asked: dict[str, Json] = {**asdict(run), "steps": max_train_steps}
    return learn_and_score(run.subject, run.seed, run.folder(root), asked, settings, num_inference_steps)


def by_blocks(results: Mapping[BlockRun, Scores]) -> dict[str, dict[int, dict[str, Estimate]]]:
    """Return estimates by variant, blocks and score."""
    summary: dict[str, dict[int, dict[str, Estimate]]] = {}
    for (variant, num_blocks), scores in summarise(
        results, lambda run: (run.variant, run.num_blocks)
    ).items():
        summary.setdefault(variant, {})[num_blocks] = scores
    return summary


def draw_bars(summary: Mapping[str, Mapping[int, Mapping[str, Estimate]]]) -> bytes:
    """Return a PNG: for each score a group of bars by variant, a bar by number of blocks.

    Raises:
        ValueError: matplotlib is not installed.
    """
    figure = new_figure(4.8 * len(PANELS), 3.6)
    blocks = sorted({num_blocks for row in summary.values() for num_blocks in row})
    width = 0.8 / len(blocks)
    for axes, (name, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for place, num_blocks in enumerate(blocks):
            there = {
                group: row[num_blocks][name]
                for group, row in enumerate(summary.values())
                if name in row.get(num_blocks, {})
            }
            axes.bar(
                [group + (place - (len(blocks) - 1) / 2) * width for group in there],
                [found.mean for found in there.values()],
                width,
                yerr=[found.standard_error or 0.0 for found in there.values()],
                capsize=3,
                label=f"n = {num_blocks}",
                color=("#9ec5fe", "#5b8ff9", "#1f3f8f", "#0b1b3f")[place % 4],
            )
        axes.set_xticks(range(len(summary)), list(summary))
        axes.set_title(title)
        axes.grid(axis="y", alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(blocks))
    return png_of(figure)
