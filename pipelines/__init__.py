"""Pipelines of diffusers with ETHER adapters, whose pictures say how they were made."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
