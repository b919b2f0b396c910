"""The one reader and writer of adapters: format, metadata, the base's fingerprint, caps on hostile files."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
