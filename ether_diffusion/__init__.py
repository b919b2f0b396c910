"""ETHER adapters (Bini et al. 2024, arXiv:2405.20271) for diffusion models, as a PEFT method.

Importing this package makes ETHER known to PEFT; names are imported, and torch with them, when they are used.
"""

import lazy_loader

from ether_diffusion.registration import register_with_peft

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = "0.2.0"

register_with_peft()
