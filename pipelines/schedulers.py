"""Samplers by the short names that people use, made from a base's own scheduler."""

import inspect
from typing import Any

import diffusers

from ether_diffusion.bases.schedule import NOISE

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
_MUST_BE_KNOWN = ("prediction_type", "rescale_betas_zero_snr")
"""Settings that change what the UNet's output means: a scheduler without them would draw noise."""


def check_scheduler(name: str) -> None:
    """Refuse a name that is not in SCHEDULERS.

    Raises:
        ValueError: as said.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"found no scheduler {name!r}; use one of {', '.join(SCHEDULERS)}")


def make_scheduler(name: str, base_scheduler: Any) -> Any:
    """Return the scheduler of a short name with the base's own noise schedule.

    Raises:
        ValueError: the name is unknown, or the scheduler cannot do what this base needs.
    """
    check_scheduler(name)
    kind, config = getattr(diffusers, SCHEDULERS[name]), base_scheduler.config
    known = inspect.signature(kind.__init__).parameters
    defaults = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
    for setting in _MUST_BE_KNOWN:
        value = config.get(setting, defaults[setting])
        if value != defaults[setting] and setting not in known:
            raise ValueError(
                f"the base needs {setting}={value!r}, which {SCHEDULERS[name]} does not know; "
                "use another scheduler, or leave it out for the base's own"
            )
    # from_config leaves out what the base has by default, where another scheduler's default may differ
    noise = {name: config[name] for name in NOISE if name in config and name in known}
    return kind.from_config(config, **noise)
