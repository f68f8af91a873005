"""GML (Suh and Seo, ICML 2023) in training: the teacher, its keys, and the branch that learns from them."""

from .branch import MutualInformation, Projection
from .detector import MutualInformationDetector, build_mutual_information, fill_queues
from .from_yaml import check_teacher_config, teacher_from_config
from .mixture import log_mixture_likelihood
from .teacher import FollowingTeacher, FrozenTeacher, Teacher, TrainedTeacher

__all__ = [
    "FollowingTeacher",
    "FrozenTeacher",
    "MutualInformation",
    "MutualInformationDetector",
    "Projection",
    "Teacher",
    "TrainedTeacher",
    "build_mutual_information",
    "check_teacher_config",
    "fill_queues",
    "log_mixture_likelihood",
    "teacher_from_config",
]
