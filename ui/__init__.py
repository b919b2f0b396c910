"""The web face of ether-diffusion."""
