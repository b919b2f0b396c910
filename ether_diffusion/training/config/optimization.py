"""How far and how fast the adapter moves."""

from dataclasses import dataclass
from typing import Literal

from ether_diffusion.options import option
from ether_diffusion.training.config.section import Section

DEFAULT_STEPS = 800

LRScheduler = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
]
OptimizerName = Literal["adamw", "adamw8bit", "prodigy"]


@dataclass(frozen=True)
class OptimizationConfig(Section):
    """Steps, batches, learning rates, optimizer and loss."""

    learning_rate: float | None = option(
        None,
        "Learning rate; the method's own if not given: 6e-3 for ether and ether_plus, 6e-4 lora, 6e-5 oft, "
        "1e-4 hra and boft, 1e-3 delora, 5e-6 full; 1 with prodigy.",
        above=0.0,
    )
    text_encoder_lr: float | None = option(
        None, "Learning rate of the text encoder's adapter; learning_rate if not given.", above=0.0
    )
    scale_lr: bool = option(False, "Multiply the rates by accumulation steps, batch size and processes.")
    train_batch_size: int = option(1, "Photos of a forward pass and process.", least=1)
    gradient_accumulation_steps: int = option(1, "Forward passes of one update.", least=1)
    max_train_steps: int | None = option(
        None, f"Updates; {DEFAULT_STEPS} if neither they nor epochs are given. Outranks epochs.", least=1
    )
    num_train_epochs: int | None = option(
        None, "Passes over all photos, instead of a number of updates.", least=1
    )
    lr_scheduler: LRScheduler = option("constant", "How the learning rate goes on.")
    lr_warmup_steps: int = option(0, "Updates over which the rate rises from 0; not with constant.", least=0)
    lr_num_cycles: int = option(1, "Restarts of cosine_with_restarts.", least=1)
    lr_power: float = option(1.0, "Power of polynomial.", above=0.0)
    optimizer: OptimizerName = option(
        "adamw", "adamw8bit needs bitsandbytes and a GPU, prodigy needs prodigyopt."
    )
    adam_beta1: float = option(0.9, "Decay of the optimizer's first moment.", least=0.0, below=1.0)
    adam_beta2: float = option(0.999, "Decay of the optimizer's second moment.", least=0.0, below=1.0)
    adam_weight_decay: float = option(0.0, "Weight decay; ETHER's vectors need none.", least=0.0)
    adam_epsilon: float = option(1e-8, "Epsilon of the optimizer.", above=0.0)
    max_grad_norm: float = option(1.0, "Norm that gradients are clipped to.", above=0.0)
    snr_gamma: float | None = option(
        None, "Gamma of min-SNR weighting (Hang et al. 2023), e.g. 5; no weighting if not given.", above=0.0
    )
    noise_offset: float = option(
        0.0, "Strength of noise that is constant over each channel, e.g. 0.1.", least=0.0
    )
    use_ema: bool = option(False, "Keep a moving average of the adapter, and save that.")
    ema_decay: float = option(0.999, "Decay of the moving average.", least=0.0, below=1.0)
