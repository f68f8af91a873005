"""lt_det: long-tailed instance segmentation on LVIS, as a Detectron2 extension."""

__version__ = "0.2.0"
