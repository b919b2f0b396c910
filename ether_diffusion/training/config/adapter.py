"""What is trained: an adapter of one of several methods."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ether_diffusion.options import option, shown
from ether_diffusion.training.config.section import Section

AdapterMethod = Literal["ether", "ether_plus", "lora", "oft", "hra", "delora", "boft", "full", "none"]
Sides = Literal["input", "output", "both"]

DEFAULT_LEARNING_RATES: dict[AdapterMethod, float] = {
    # ETHER, Bini et al. 2024, arXiv:2405.20271, section 5.1.1 and appendix C.1: subject-driven generation
    "ether": 6e-3,
    "ether_plus": 6e-3,
    "lora": 6e-4,
    # in the paper's own parametrisation of OFT; PEFT's may want more, its image benchmark takes 1e-4
    "oft": 6e-5,
    # PEFT's benchmark method_comparison/image-gen, the published setting of each
    "hra": 1e-4,
    "delora": 1e-3,
    "boft": 1e-4,
    "full": 5e-6,  # ETHER, appendix C.1, as DreamBooth
    "none": 1e-4,  # of nothing: control's encoder has a rate of its own
}
"""The learning rate of each method where none is given."""

_WITH_TARGETS: frozenset[AdapterMethod] = frozenset(DEFAULT_LEARNING_RATES.keys() - {"full", "none"})

METHODS_WITH: dict[str, frozenset[AdapterMethod]] = {
    "num_blocks": frozenset({"ether", "ether_plus", "oft", "boft"}),  # those with block-diagonal matrices
    "sides": frozenset({"ether", "ether_plus"}),
    "rank": frozenset({"lora", "hra", "delora"}),
    "lora_alpha": frozenset({"lora"}),
    "dropout": frozenset({"ether", "ether_plus", "lora", "oft", "delora", "boft"}),
    "target_modules": _WITH_TARGETS,  # full trains all there are
}
"""The methods that know an option; for the others it has no effect."""


@dataclass(frozen=True)
class AdapterConfig(Section):
    """The adapter, and the modules it adapts."""

    adapter: AdapterMethod = option(
        "ether_plus",
        "Method of the adapter; full trains every weight, and stores the differences; none, with control "
        "images, trains their encoder alone.",
    )
    num_blocks: int = option(
        4, "Diagonal blocks of ether, ether_plus, oft and boft; divides the widths.", least=1
    )
    sides: Sides | None = option(
        None, "Side of the weights that ether and ether_plus transform: input for ether, both for ether_plus."
    )
    target_modules: str = option(
        "attention",
        "Modules to adapt: attention, attention_and_feedforward, a regex, or names with commas between.",
    )
    rank: int = option(4, "Rank of lora, hra and delora.", least=1)
    lora_alpha: int | None = option(None, "Strength of lora times its rank; the rank if not given.", least=1)
    dropout: float = option(
        0.0, "Share of an adapted layer's inputs zeroed in training.", least=0.0, below=1.0
    )
    train_text_encoder: bool = option(False, "Adapt the text encoder's attention, too.")

    def contradictions(self) -> Iterator[str]:
        """Say which targets are neither names nor a regex."""
        if any(not name.strip() for name in self.target_modules.split(",")):
            yield f"target_modules={shown(self.target_modules)} has an empty name; delete a comma"
        try:
            re.compile(self.target_modules)
        except re.error as error:
            yield f"target_modules={shown(self.target_modules)} is no regex ({error}); mend it or give names"
