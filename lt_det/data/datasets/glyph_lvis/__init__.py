"""
glyph_lvis, the embedded data set: in LVIS v1 format, rendered on first use from matplotlib's type faces.

Categories are characters, each printed on a solid body whose silhouette says nothing of the category, with exact masks
of what is visible, federated annotations and image counts as long-tailed as those of LVIS. It is synthetic: numbers on
it compare methods with each other, and with nothing measured on photographs.
"""

from .build import GlyphPaths, build_glyph_dataset, cache_root, ensure_glyph_dataset, ensure_glyph_lvis
from .spec import PREDEFINED_SPECS, GlyphSpec, long_tailed_image_counts, lvis_v1_image_counts

__all__ = [
    "PREDEFINED_SPECS",
    "GlyphPaths",
    "GlyphSpec",
    "build_glyph_dataset",
    "cache_root",
    "ensure_glyph_dataset",
    "ensure_glyph_lvis",
    "long_tailed_image_counts",
    "lvis_v1_image_counts",
]
