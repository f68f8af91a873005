"""Long-tail classification losses: formulas in :mod:`functional`, box-head losses in ``LOSS_REGISTRY``."""

from . import functional
from .base import BACKGROUND_RULES, LOSS_REGISTRY, PRIOR_SOURCES, ClassificationLoss, PriorAdjustedLoss
from .effective_margin import ECM, LOCE
from .equalization import ACSL, EQL, DropLoss, EQLv2
from .gml import GML
from .groups import BAGS
from .gumbel import GOL, GumbelSigmoid
from .margin import LDAM, PairwiseMargin
from .reweighting import ClassBalanced, Federated, Focal
from .seesaw import Seesaw
from .sigmoid import BalancedSigmoid, Sigmoid
from .softmax import BalancedSoftmax, LogitAdjusted, Softmax

__all__ = [
    "ACSL",
    "BACKGROUND_RULES",
    "BAGS",
    "ECM",
    "EQL",
    "GML",
    "GOL",
    "LDAM",
    "LOCE",
    "LOSS_REGISTRY",
    "PRIOR_SOURCES",
    "BalancedSigmoid",
    "BalancedSoftmax",
    "ClassBalanced",
    "ClassificationLoss",
    "DropLoss",
    "EQLv2",
    "Federated",
    "Focal",
    "GumbelSigmoid",
    "LogitAdjusted",
    "PairwiseMargin",
    "PriorAdjustedLoss",
    "Seesaw",
    "Sigmoid",
    "Softmax",
    "functional",
]
