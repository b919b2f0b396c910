"""The pipeline of ours that fits a base, loaded onto a device, and samplers by their short names."""

import inspect
from typing import Any

import diffusers
import torch

from ether_diffusion import pipelines
from ether_diffusion.bases import Base
from ether_diffusion.bases.stable_diffusion import NOISE
from ether_diffusion.pipelines.stable_diffusion import EtherStableDiffusionPipeline
from ether_diffusion.pipelines.stable_diffusion_xl import EtherStableDiffusionXLPipeline

EtherPipeline = EtherStableDiffusionPipeline | EtherStableDiffusionXLPipeline
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
_MUST_BE_KNOWN = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}
"""Settings that change what the UNet's output means: a scheduler without them would draw noise."""


def default_device() -> torch.device:
    """Return the accelerator if there is one, else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def find_device(name: str | None) -> torch.device:
    """Return a device by its name, or the accelerator if there is one."""
    try:
        device = torch.device(name) if name else default_device()
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise ValueError(f"there is no device {name!r} here; leave --device out, or use cpu") from None
    return device


def default_dtype(device: torch.device, base: Base | None = None) -> torch.dtype:
    """Return the dtype to draw in: float32 on the CPU, where float16 is slow, else float16 or the base's."""
    return torch.float32 if device.type == "cpu" else torch.float16 if base is None else base.half_dtype


def open_pipeline(base: Base, *, device: torch.device, dtype: torch.dtype) -> EtherPipeline:
    """Load the pipeline of a base that `open_base` opened; its VAE stays in a dtype that it holds in."""
    kind = getattr(pipelines, base.drawn_by)
    pipeline: EtherPipeline = base.load_pipeline(kind, dtype=dtype, vae=base.load_vae())
    # a hub id is a better name for people than its folder in the cache
    pipeline.register_to_config(_name_or_path=base.name)
    pipeline.to(device)
    return pipeline


def check_scheduler(name: str) -> None:
    """Refuse a name that is not in SCHEDULERS."""
    if name not in SCHEDULERS:
        raise ValueError(f"found no scheduler {name!r}; use one of {', '.join(SCHEDULERS)}")


def make_scheduler(name: str, base_scheduler: Any) -> Any:
    """Return the scheduler of a short name with the base's own noise schedule."""
    check_scheduler(name)
    if "FlowMatch" in type(base_scheduler).__name__ or base_scheduler.config.get("use_flow_sigmas"):
        raise ValueError(f"the scheduler {name} is not of flow matching, as the base is; leave it out")
    kind, config = getattr(diffusers, SCHEDULERS[name]), base_scheduler.config
    known = inspect.signature(kind.__init__).parameters
    for setting, default in _MUST_BE_KNOWN.items():
        value = config.get(setting, default)
        if value != default and setting not in known:
            needs = f"the base needs {setting}={value!r}, which {SCHEDULERS[name]} does not know"
            raise ValueError(f"{needs}; use another scheduler, or leave it out for the base's own")
    # from_config leaves out what the base has by default, where another scheduler's default may differ
    noise = {name: config[name] for name in NOISE if name in config and name in known}
    return kind.from_config(config, **noise)
