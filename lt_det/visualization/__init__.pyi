from .calibration import plot_calibration_sweep as plot_calibration_sweep
from .features import plot_features as plot_features
from .groups import plot_frequency_groups as plot_frequency_groups
from .names import short_names as short_names
from .predictions import draw_predictions as draw_predictions
