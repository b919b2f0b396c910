"""The claims of the paper (ETHER, Bini et al. 2024, arXiv:2405.20271), each with a rule that can fail.

"More" means: the paired difference over the same subjects is above zero by more than two standard errors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from research import control_claims, subject_claims
from research.measured import Measured, NotMeasuredError

Verdict = Literal["reproduced", "not reproduced", "not testable here", "not measured yet"]
Rule = Callable[[Measured], tuple[bool, str]]
"""Says whether a claim holds of what was measured, and the numbers in words."""


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, where it stands, and how it is held against what was measured here.

    `rule` is None for what cannot be tested here, and `reason` says why.
    """

    statement: str
    source: str
    rule: Rule | None = None
    reason: str = ""

    def judge(self, measured: Measured) -> tuple[Verdict, str]:
        """Return the verdict and its numbers."""
        if self.rule is None:
            return "not testable here", self.reason
        try:
            holds, numbers = self.rule(measured)
        except NotMeasuredError as missing:
            return "not measured yet", str(missing)
        return ("reproduced" if holds else "not reproduced"), numbers


_LANGUAGE = "another model and other data; this package is about diffusion models"
_NO_SD_15 = "no weights of SD 1.5, no data and no GPU where this was measured; "

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "ETHER has about 120 times fewer parameters than OFT n=4",
        "§5.1",
        subject_claims.fewer_than_oft("ETHER", 100),
    ),
    Claim(
        "ETHER+ has about 30 times fewer parameters than OFT n=4",
        "§5.1",
        subject_claims.fewer_than_oft("ETHER+", 25),
    ),
    Claim(
        "ETHER+ has half of LoRA r=4's parameters (0.4 M and 0.8 M)", "Table 2", subject_claims.half_of_lora
    ),
    Claim(
        "ETHER+ is truer to the subject than LoRA (DINO 0.666, 0.660)",
        "Table 2",
        subject_claims.truer_than("lora"),
    ),
    Claim(
        "ETHER+ is truer to the subject than OFT (0.666, 0.652)", "Table 2", subject_claims.truer_than("oft")
    ),
    Claim(
        "ETHER+ is truer to the subject than DreamBooth (0.666, 0.644)",
        "Table 2",
        subject_claims.truer_than("full"),
    ),
    Claim(
        "LoRA is truer to the subject than DreamBooth (0.660, 0.644)",
        "Table 2",
        subject_claims.truer_than("full", one="lora"),
    ),
    Claim(
        "ETHER is the least true to the subject (DINO 0.567)", "Table 2", subject_claims.ether_is_least_true
    ),
    Claim("ETHER follows the prompt best (CLIP-T 0.256)", "Table 2", subject_claims.ether_follows_prompts),
    Claim(
        "the figures of Table 2: SD 1.5, 30 subjects × 25 prompts × 4 pictures",
        "Table 2",
        reason=_NO_SD_15 + "`ether benchmark --data … --base …` is that protocol",
    ),
    Claim(
        "orthogonality matters little: Naive is as good as OFT",
        "Table 6",
        reason="Naive is not offered for training",
    ),
    Claim(
        "ETHER+ on both sides is truer than on one (DINO 0.666, 0.618)", "Table 11", subject_claims.both_sides
    ),
    Claim(
        "the number of blocks hardly matters (n = 1, 4, 16)", "Table 9", subject_claims.blocks_hardly_matter
    ),
    Claim("ETHER+ has the widest range of learning rates", "Fig. 5, 6, 8", subject_claims.widest_range),
    Claim(
        "the weights' distance is bounded for ETHER and ETHER+, and OFT's grows with the rate",
        "Fig. 4",
        subject_claims.bounded_distance,
    ),
    Claim("pictures survive ETHER+ at any strength, and not OFT", "Fig. 3", subject_claims.random_transforms),
    Claim(
        "hyperspherical energy is kept by OFT and ETHER, and changed most by ETHER+",
        "Fig. 7",
        subject_claims.energy,
    ),
    Claim(
        "more blocks cost fewer operations (Llama-2: −52 %, −68 % at n = 4, 32)",
        "Table 1",
        reason="H is never built here: n does not decide the cost; see speed.md",
    ),
    Claim(
        "an encoder alone is far below encoder and adapter (mIoU 8.2, 24.6)",
        "Table 3",
        control_claims.adapters_help,
    ),
    Claim(
        "ETHER+ follows a map best (mIoU 27.3, OFT 24.5, ETHER 24.6)",
        "Table 3",
        control_claims.ether_plus_is_best,
    ),
    Claim("re-fitting magnitudes adds little to OFT", "Table 3", reason="re-fitting is not offered"),
    Claim(
        "the figures of Table 3: ADE20K, UperNet-101",
        "Table 3",
        reason=_NO_SD_15 + "`train-control` is the command",
    ),
    Claim("GLUE: ETHER+ 90.10 on average, OFT 89.77", "Table 4", reason=_LANGUAGE),
    Claim("instruction tuning: ETHER+ n=32 is best of all", "Tables 5, 8, 10", reason=_LANGUAGE),
    Claim("VTAB: ETHER+ is the best adapter on three of six", "Table 12", reason=_LANGUAGE),
)
