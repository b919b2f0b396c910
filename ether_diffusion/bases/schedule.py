"""The noise that a base was trained with: what its scheduler's config says, by that class's own defaults."""

import inspect
from pathlib import Path

import diffusers
from diffusers import DDPMScheduler

from ether_diffusion.bases.parts import TRAINED_SCHEDULERS, read_config
from ether_diffusion.wording import printable

NOISE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
)
"""The settings of what a base was trained with."""
_OTHER_NOISE = {"use_flow_sigmas": False, "timestep_type": "discrete"}
"""Settings of the same classes under which the noise is another."""


def forward_process(folder: Path) -> DDPMScheduler:
    """Return DDPM's scheduler with the noise of a base's own.

    Raises:
        ValueError: it is of another noise, so that training would learn what the base cannot use.
    """
    config, index = (
        read_config(folder, name) for name in ("scheduler/scheduler_config.json", "model_index.json")
    )
    kind = index["scheduler"][1]
    kind = kind if kind not in TRAINED_SCHEDULERS else config.get("_class_name", kind)
    other = [f"{name}={config[name]}" for name, own in _OTHER_NOISE.items() if config.get(name, own) != own]
    if kind not in TRAINED_SCHEDULERS or other:
        found = f"{kind} with {other[0]}" if kind in TRAINED_SCHEDULERS else kind
        raise ValueError(
            f"the base in {folder} has the noise of {printable(found)}, with which pictures are drawn and "
            "nothing is trained here; train on a base with betas over discrete timesteps, as DDIM's"
        )
    known = inspect.signature(getattr(diffusers, kind).__init__).parameters
    noise = {name: config.get(name, known[name].default) for name in NOISE if name in known}
    try:
        scheduler = DDPMScheduler.from_config(config, **noise)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(f"the scheduler of {folder} has noise that DDPM has not: {error}") from None
    if len(scheduler.betas) != scheduler.config.num_train_timesteps:
        raise ValueError(
            f"the scheduler of {folder} has {len(scheduler.betas)} trained_betas for num_train_timesteps="
            f"{scheduler.config.num_train_timesteps}; fetch or save the base again"
        )
    return scheduler
