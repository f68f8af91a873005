"""Learned class rates (BALMS): the exact meta-gradient, the learners, and the meta step of decoupled training."""

from .from_yaml import build_meta_loss, build_meta_step, check_meta_config, meta_loader_config
from .gradient import LookAhead, RowTerms, WeightedRows, classifier_form, row_terms, weight_gradients
from .learners import LEARNERS, ClassRateLearner, MetaReweighter, RoISampler, build_learner
from .report import plot_rates, rates_by_group, summary_of_rates, write_rates
from .step import MetaDecoupledClassifier, MetaStep, check_rows

__all__ = [
    "LEARNERS",
    "ClassRateLearner",
    "LookAhead",
    "MetaDecoupledClassifier",
    "MetaReweighter",
    "MetaStep",
    "RoISampler",
    "RowTerms",
    "WeightedRows",
    "build_learner",
    "build_meta_loss",
    "build_meta_step",
    "check_meta_config",
    "check_rows",
    "classifier_form",
    "meta_loader_config",
    "plot_rates",
    "rates_by_group",
    "row_terms",
    "summary_of_rates",
    "weight_gradients",
    "write_rates",
]
