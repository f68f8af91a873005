"""GML (Suh and Seo, ICML 2023) in training: the teacher, its keys, and the branch that learns from them."""

from .branch import MutualInformation, Projection
from .detector import MutualInformationDetector, Teacher
from .mixture import log_mixture_likelihood

__all__ = ["MutualInformation", "MutualInformationDetector", "Projection", "Teacher", "log_mixture_likelihood"]
