"""Pictures: AP by frequency group, predictions beside the ground truth, features in the plane."""

from .calibration import plot_calibration_sweep
from .features import plot_features
from .groups import plot_frequency_groups
from .names import short_name
from .predictions import draw_predictions

__all__ = [
    "draw_predictions",
    "plot_calibration_sweep",
    "plot_features",
    "plot_frequency_groups",
    "short_name",
]
