"""What the computation runs with."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ether_diffusion.options import option
from ether_diffusion.training.config.section import Section

MixedPrecision = Literal["no", "fp16", "bf16"]
Attention = Literal["auto", "sdpa", "eager"]


@dataclass(frozen=True)
class ComputeConfig(Section):
    """Seed, precision, memory and speed."""

    seed: int = option(
        0, "Seed of everything random; the same seed gives the same adapter.", least=0, most=2**63 - 1
    )
    mixed_precision: MixedPrecision | None = option(
        None, "Precision of the frozen parts; the adapter stays float32. Accelerate's setting if not given."
    )
    gradient_checkpointing: bool = option(False, "Less memory, about a third more time per step.")
    attention: Attention = option(
        "auto", "Attention kernels; auto: sdpa, and eager for small UNets on a CPU."
    )
    enable_xformers_memory_efficient_attention: bool = option(
        False, "Use xformers' attention; it has kernels on CUDA only."
    )
    torch_compile: bool = option(False, "Compile the UNet: slow to start, faster steps.")
    allow_tf32: bool = option(False, "Let CUDA multiply float32 in TF32: faster, less exact.")

    def contradictions(self) -> Iterator[str]:
        """Say which attention kernels exclude each other."""
        if self.enable_xformers_memory_efficient_attention and self.attention != "auto":
            yield (
                f"attention={self.attention} and enable_xformers_memory_efficient_attention ask for two "
                "kinds of kernels; give one"
            )
