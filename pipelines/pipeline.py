"""What diffusers loads where `custom_pipeline` names this folder; for SDXL name stable_diffusion_xl.py."""

from ether_diffusion.pipelines.stable_diffusion import EtherStableDiffusionPipeline

__all__ = ["EtherStableDiffusionPipeline"]
