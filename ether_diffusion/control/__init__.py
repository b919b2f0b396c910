"""Control: a small encoder lets an image say where, added once after the frozen UNet's first convolution."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
