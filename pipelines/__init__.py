"""The diffusers face of ether-diffusion: pipelines that load ETHER adapters."""
