"""Long-tail classification losses: formulas in :mod:`functional`, box-head losses in ``LOSS_REGISTRY``.

A loss stands in the file of its config node's name, in lower case: ``EQLv2`` in ``eqlv2.py``.
"""

from . import functional as functional
from .acsl import ACSL as ACSL
from .bags import BAGS as BAGS
from .balanced_sigmoid import BalancedSigmoid as BalancedSigmoid
from .balanced_softmax import BalancedSoftmax as BalancedSoftmax
from .base import LOSS_REGISTRY as LOSS_REGISTRY
from .base import PRIOR_SOURCES as PRIOR_SOURCES
from .base import ClassificationLoss as ClassificationLoss
from .class_balanced import ClassBalanced as ClassBalanced
from .drop_loss import DropLoss as DropLoss
from .ecm import ECM as ECM
from .eql import EQL as EQL
from .eqlv2 import EQLv2 as EQLv2
from .federated import Federated as Federated
from .focal import Focal as Focal
from .gml import GML as GML
from .gol import GOL as GOL
from .gumbel_sigmoid import GumbelSigmoid as GumbelSigmoid
from .ldam import LDAM as LDAM
from .loce import LOCE as LOCE
from .logit_adjusted import LogitAdjusted as LogitAdjusted
from .pairwise_margin import PairwiseMargin as PairwiseMargin
from .prior_adjusted import BACKGROUND_RULES as BACKGROUND_RULES
from .prior_adjusted import PriorAdjustedLoss as PriorAdjustedLoss
from .seesaw import Seesaw as Seesaw
from .seesaw_pcb import SeesawPCB as SeesawPCB
from .sigmoid import Sigmoid as Sigmoid
from .softmax import Softmax as Softmax
from .softmax_pcb import SoftmaxPCB as SoftmaxPCB
