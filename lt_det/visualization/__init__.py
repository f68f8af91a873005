"""Pictures: AP by frequency group, predictions beside the ground truth, features in the plane.

Names (``__init__.pyi``) are imported on first use: only drawn predictions need Detectron2.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
