"""Evaluation of long-tailed instance segmentation: exact to the LVIS API and pycocotools, fast, and small.

Names (``__init__.pyi``) are imported on first use: the metrics need neither torch nor Detectron2.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
