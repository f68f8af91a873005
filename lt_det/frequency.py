"""LVIS's frequency groups, by the number of training images of a category. Source: Gupta et al., LVIS, CVPR 2019."""

GROUP_NAMES = {"r": "rare", "c": "common", "f": "frequent"}
FREQUENCY_GROUPS = tuple(GROUP_NAMES)
CURVE_NAMES = {**GROUP_NAMES, "": "all"}
"""Of what charts show: the groups, and all categories together (or those of unknown group)."""
GROUP_COLOURS = {"r": "#c44e52", "c": "#dd8452", "f": "#4c72b0", "": "#777777"}
"""In charts; keys as ``CURVE_NAMES``."""
GROUP_LIMITS = (10, 100)
"""Most training images of a rare and of a common category; frequent ones have more."""
