"""The branch beside the detector that trains it by GML: queues of a teacher's features, two projections, L_GML.

Suh and Seo, ICML 2023. The loss that stays at inference is ``lt_det.losses.GML``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lt_det.losses.distributed import all_reduce_sum, world_size
from lt_det.losses.gml import GML, MIN_TEMPERATURE
from lt_det.losses.kernels import compute_dtype, mixture_cross_entropy
from lt_det.losses.queues import ClassQueues, queue_sizes

from .mixture import log_mixture_likelihood


class Projection(nn.Module):
    """Linear, norm, ReLU, Linear, and L2 normalisation: features to unit vectors.

    Args:
        in_features, hidden, out_features: widths.
        norm: "BN" or "LN". Batch norm takes the rows of this rank alone, as the published code does; with
            fewer than two rows, which have no variance, it takes its running statistics.
    """

    norms = {"BN": nn.BatchNorm1d, "LN": nn.LayerNorm}

    def __init__(self, in_features: int, hidden: int, out_features: int, norm: str = "BN"):
        super().__init__()
        self.hidden = nn.Linear(in_features, hidden, bias=False)  # the norm has a bias
        self.norm = self.norms[norm](hidden)
        self.out = nn.Linear(hidden, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_features) to (N, out_features) in float32 (float64 for float64), under autocast too."""
        hidden = self.hidden(x)
        norm = self.norm
        if isinstance(norm, nn.BatchNorm1d) and x.shape[0] < 2:
            hidden = F.batch_norm(
                hidden, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
            )
        else:
            hidden = norm(hidden)
        # In place: over all keys it is as large as the queues, and no norm's backward pass reads its output.
        out = self.out(F.relu(hidden, inplace=True))
        return F.normalize(out.to(compute_dtype(out.dtype)), dim=1)


class MutualInformation(nn.Module):
    """What GML adds to training: queues of teacher features, two projections, L_GML and distillation.

    L_GML (Suh and Seo, ICML 2023), over foreground RoIs: CE(log S_c + log pi_c, y) with S_c the mean over the
    keys of class c of exp(q . k / T_c). Queries q are projected features of the student; keys are features of
    the teacher, kept in the queues as they are and projected at use, so that the key projection is trained on
    all of them. Which of them a RoI sees is GML's option ``own_keys``. A class of which it sees no key is left out of
    the sum; a RoI whose own class is such has no loss. Both losses are sums over foreground RoIs, divided by the number
    of all RoIs.

    It is not part of the detector: inference does not need it, and its state dict (queues included) is kept
    apart. It holds no reference to the loss, whose settings it copies.

    For the trainer:

    * Under ``DistributedDataParallel`` pass ``broadcast_buffers=False`` (as Detectron2 does by default): all
      ranks hold the same queues anyway. Every parameter gets a gradient in every iteration, be it zero.
    * Losses are divided so that the mean over ranks of their gradients is what one process would have had
      with all rows (batch norm apart, which is by rank).
    * Parameters in ``no_weight_decay`` should have none, e.g. by ``overrides={name: {"weight_decay": 0.0}}``
      of Detectron2's ``get_default_optimizer_params``: decay would pull the temperatures towards 1.

    Args:
        loss: supplies options and class counts.
        in_features: D, width of the student's features.
        key_features: width of the teacher's.
    """

    no_weight_decay = ("log_temperature",)

    def __init__(self, loss: GML, in_features: int, key_features: int):
        super().__init__()
        counts = loss.branch_counts()
        self.num_classes = loss.num_classes
        self.beta, self.alpha = loss.beta, loss.alpha
        self.hides_own_keys = loss.own_keys == "hidden"
        self.supervised_temperature = loss.supervised_temperature
        self.distillation_temperature = loss.distillation_temperature
        dim, norm = loss.projection_dim, loss.projection_norm
        self.query_projection = Projection(in_features, loss.hidden_dim or in_features, dim, norm)
        self.key_projection = Projection(key_features, loss.hidden_dim or key_features, dim, norm)
        sizes = queue_sizes(counts, loss.queue_size, loss.queue_base)
        self.queues = ClassQueues(sizes, key_features, dtype=GML.queue_dtypes[loss.queue_dtype])
        self.register_buffer("log_prior", (counts / counts.sum()).log(), persistent=False)
        # The logarithm is learned: steps are then relative, and the temperature stays positive.
        width = self.num_classes if loss.learn_temperature == "class" else 1
        log_temperature = torch.full((width,), math.log(loss.temperature))
        if loss.learn_temperature:
            self.log_temperature = nn.Parameter(log_temperature)
        else:
            self.register_buffer("log_temperature", log_temperature, persistent=False)

    @property
    def temperature(self) -> Tensor:
        """(K,) or (1,) temperatures T_c."""
        return self.log_temperature.exp()

    @property
    def distils(self) -> bool:
        """Whether ``forward`` wants scores and the teacher's logits."""
        return self.alpha > 0

    def describe(self) -> str:
        """One line for the log."""
        sizes, temperature = self.queues.sizes, self.temperature
        return (
            f"MutualInformation: {self.queues.keys.shape[0]} keys in queues of {int(sizes.min())} to"
            f" {int(sizes.max())} a class, {int(self.queues.filled.sum())} filled,"
            f" {self.queues.megabytes:.1f} MB ({str(self.queues.keys.dtype).split('.')[1]}), T from"
            f" {temperature.min().item():.3g} to {temperature.max().item():.3g}"
        )

    def insert(self, features: Tensor, labels: Tensor, box_ids: Tensor) -> None:
        """Put the teacher's features of ground-truth boxes into the queues, over all ranks.

        Collective, see :meth:`ClassQueues.insert`.

        Args:
            features: (N, key_features). labels: (N,) int64 in [0, K).
            box_ids: (N,) int64, not -1: the same box of the same image has the same id in ``forward``.
        """
        self.queues.insert(features, labels, box_ids)

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        box_ids: Tensor,
        *,
        scores: Tensor | None = None,
        teacher_logits: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """
        Args:
            features: (R, D) of the student's RoIs.
            labels: (R,) int64 in [0, K], K = background.
            box_ids: (R,) int64, the id of each RoI's ground-truth box (any for background; -1: none).
            scores: (R, K + 1) cosines of the student; only read if it distils.
            teacher_logits: (R, K + 1), of which the teacher takes a softmax, for each RoI's ground-truth box
                (any for background); likewise. For a teacher trained with L_cls that is its cosines over T_s.

        Returns:
            ``loss_gml``, times beta, and with alpha > 0 ``loss_distill``, times alpha.

        Raises:
            ValueError: if shapes disagree, or scores are missing.
        """
        self._check(features, labels, box_ids, scores, teacher_logits)
        foreground = ((labels >= 0) & (labels < self.num_classes)).nonzero().squeeze(1)
        # Detectron2 divides the losses of boxes and classes by the number of all RoIs. So that gamma, beta and alpha
        # weigh a RoI's losses against each other, as in the paper, these must be divided likewise: means over
        # foreground RoIs would count four times as much, and take the trunk from boxes and masks.
        rois = all_reduce_sum(torch.full((), labels.numel(), device=features.device))
        rois = rois.clamp(min=1) / world_size()  # so that the mean over ranks is that over all RoIs
        total = self.mixture_loss(features[foreground], labels[foreground], box_ids[foreground])
        losses = {"loss_gml": self.beta * total / rois}
        if self.distils:
            total = self.distillation_loss(scores[foreground], teacher_logits[foreground])
            losses["loss_distill"] = self.alpha * total / rois
        return losses

    def mixture_loss(self, features: Tensor, labels: Tensor, box_ids: Tensor) -> Tensor:
        """L_GML of (R, D) foreground RoIs, summed.

        As the published code: q and k have the gradient of L_GML over all keys, T that of L_GML without the keys of a
        query's own box (for classification: image). It adds the values of both; here the second has a gradient alone,
        so that the loss in the logs is L_GML. With own keys hidden both are one function, which is evaluated once.
        """
        if isinstance(self.log_temperature, nn.Parameter):
            # Projected descent: a clamp within the graph would take the gradient, and with it the way back,
            # from a temperature that has once crossed the limit.
            with torch.no_grad():
                self.log_temperature.clamp_(min=math.log(MIN_TEMPERATURE))
        keys, offsets, key_box_ids = self.queues.contents()
        if self.beta == 0 or labels.numel() == 0 or keys.shape[0] == 0:
            parameters = [p.sum() for p in self.parameters()]
            return sum(parameters) * 0.0 + features.sum() * 0.0
        weight = self.key_projection.hidden.weight
        q, k = self.query_projection(features), self.key_projection(keys.to(weight.dtype))
        others = {"query_box_ids": box_ids, "key_box_ids": key_box_ids}
        if self.hides_own_keys:
            return self._mixture_cross_entropy(q, k, offsets, self.temperature, labels, **others)
        loss = self._mixture_cross_entropy(q, k, offsets, self.temperature.detach(), labels)
        if isinstance(self.log_temperature, nn.Parameter):
            by_t = self._mixture_cross_entropy(q.detach(), k.detach(), offsets, self.temperature, labels, **others)
            loss = loss + (by_t - by_t.detach())
        return loss

    def _mixture_cross_entropy(self, q: Tensor, k: Tensor, offsets: Tensor, temperature: Tensor, labels: Tensor, **ids):
        log_s = log_mixture_likelihood(q, k, offsets, temperature, **ids)
        with torch.autocast(device_type=q.device.type, enabled=False):
            return mixture_cross_entropy(log_s, self.log_prior, labels)[0].sum()

    def distillation_loss(self, scores: Tensor, teacher_logits: Tensor) -> Tensor:
        """T^2 KL(softmax(t / T) || softmax(s / (T_s T))) of the student's cosines s, the teacher's logits t.

        Hinton et al., 2015; the factor keeps gradients comparable whatever T. Summed over R rows.
        """
        with torch.autocast(device_type=scores.device.type, enabled=False):
            dtype, temperature = compute_dtype(scores.dtype), self.distillation_temperature
            student = F.log_softmax(scores.to(dtype) / (self.supervised_temperature * temperature), dim=1)
            teacher = F.log_softmax(teacher_logits.detach().to(dtype) / temperature, dim=1)
            divergence = F.kl_div(student, teacher, reduction="sum", log_target=True)
            return temperature**2 * divergence

    def _check(self, features, labels, box_ids, scores, teacher_logits) -> None:
        num_rows, width = labels.shape[0], self.query_projection.hidden.in_features
        wanted = [("features", features, (num_rows, width)), ("box_ids", box_ids, (num_rows,))]
        if self.distils:
            if scores is None or teacher_logits is None:
                raise ValueError("distillation (MODEL.LONG_TAIL.GML.ALPHA above 0) needs scores and teacher_logits")
            shape = (num_rows, self.num_classes + 1)
            wanted += [("scores", scores, shape), ("teacher_logits", teacher_logits, shape)]
        for name, tensor, shape in wanted:
            if tuple(tensor.shape) != shape:
                raise ValueError(f"MutualInformation: {name} must have shape {shape}, got {tuple(tensor.shape)}")
