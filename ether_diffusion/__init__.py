"""ETHER adapters (Bini et al. 2024, arXiv:2405.20271) for diffusion models, as a PEFT method.

Names are imported, and torch with them, when they are used; the first one that is makes ETHER known to PEFT.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.2.0"
