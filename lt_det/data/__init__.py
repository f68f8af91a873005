"""Data: class statistics, data sets, samplers and a train loader that resumes where it stopped.

Names (``__init__.pyi``) are imported on first use: the statistics and the converters need neither torch nor Detectron2.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
