"""Moved to :mod:`lt_det.io`; goes when nobody imports it any more."""

from lt_det.io import cache_root, write_atomically, write_json_atomically

__all__ = ["cache_root", "write_atomically", "write_json_atomically"]
