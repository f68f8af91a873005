"""The gradient of a look-ahead loss with respect to the weights of RoIs, in closed form.

BALMS's meta step asks how a class-balanced loss M *after* one optimizer step of the classifier depends on the
weight of each RoI *in* that step. With row losses l_i(z_i), scores z_i = f(theta, x_i), weights w_i and one
step of SGD,

    g = d/dtheta (1/R) sum_i w_i l_i                                        (1)  what the optimizer is given
    theta' = theta - lr * u(g),  du/dg = c                                  (2)  its step; c is a number
    dM/dw_i = -(1/R) dl_i/dz_i . J_i[lr * c * G],  G = dM/dtheta' at theta' (3)

where J_i[V] is the change of z_i along the direction V. For a linear classifier J_i[V] = V x_i. So one meta
step costs three more matrix products of the classifier's size: no second-order autograd, no copy of the
model. Equation (3) is exact: it equals double backpropagation through (1) and (2). The problem is that of
the Meta Sampler in Ren et al., Balanced Meta-Softmax, NeurIPS 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lt_det.modeling.classifiers import CosineClassifier

__all__ = ["LookAhead", "RowTerms", "WeightedRows", "classifier_form", "row_terms", "weight_gradients"]

Parameters = dict[str, Tensor]


# ------------------------------------------------------------------------------------------ rows of a loss


class RowTerms(NamedTuple):
    """A loss ``sum_i w_i losses_i`` over R rows, at w = 1.

    Attributes:
        losses: ``(R,)``, each row's part of the loss (so l_i / R for a mean).
        gradients: ``(R, C)``, derivative of each row's part with respect to its scores.
    """

    losses: Tensor
    gradients: Tensor


def row_terms(loss: Callable[[Tensor, Tensor], Tensor], scores: Tensor) -> RowTerms:
    """Split a loss into its rows.

    The loss is evaluated once, so that one which draws at random or keeps running counts behaves as in
    ordinary training.

    Args:
        loss: from scores ``(R, C)`` and row weights ``(R,)`` to a scalar that is linear in the weights and
            whose rows do not depend on each other's scores, as a ``ClassificationLoss`` does with
            ``roi_weights``.
        scores: ``(R, C)``; their graph is not touched.
    """
    with torch.enable_grad():
        z = scores.detach().requires_grad_()
        weights = torch.ones(z.shape[0], dtype=z.dtype, device=z.device, requires_grad=True)
        value = loss(z, weights)
        losses, gradients = torch.autograd.grad(value, (weights, z), allow_unused=True)
    return RowTerms(
        torch.zeros_like(weights).detach() if losses is None else losses,
        torch.zeros_like(z).detach() if gradients is None else gradients,
    )


class WeightedRows(torch.autograd.Function):
    """``apply(scores, losses, gradients, weights)``: the loss ``sum_i weights_i losses_i`` with its gradient
    to ``scores``.

    Continues the graph of the scores from :class:`RowTerms`, so that the loss need not be evaluated again.
    """

    @staticmethod
    def forward(ctx, scores: Tensor, losses: Tensor, gradients: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(gradients, weights)
        ctx.dtype = scores.dtype
        return (weights * losses).sum()

    @staticmethod
    def backward(ctx, grad: Tensor):
        gradients, weights = ctx.saved_tensors
        return (grad * weights[:, None] * gradients).to(ctx.dtype), None, None, None


# ------------------------------------------------------------------------------------------ classifiers


class LinearForm:
    """Scores of ``nn.Linear``, z = x W^T + b, and their first derivatives."""

    def __init__(self, module: nn.Linear):
        self.parameters: dict[str, nn.Parameter] = dict(module.named_parameters())

    def scores(self, theta: Parameters, x: Tensor) -> Tensor:
        """``(R, C)`` scores of features ``(R, D)``."""
        return F.linear(x, theta["weight"], theta.get("bias"))

    def pull_back(self, theta: Parameters, x: Tensor, g: Tensor) -> Parameters:
        """Gradient of the parameters, given that of the scores, ``(R, C)``."""
        out = {"weight": g.T @ x}
        if "bias" in theta:
            out["bias"] = g.sum(dim=0)
        return out

    def push_forward(self, theta: Parameters, x: Tensor, direction: Parameters) -> Tensor:
        """``(R, C)``: derivative of the scores along a direction of the parameters."""
        return F.linear(x, direction["weight"], direction.get("bias"))


class CosineForm:
    """Scores of :class:`~lt_det.modeling.CosineClassifier`, z = s cos(x, w) [+ b], and their first derivatives."""

    def __init__(self, module: CosineClassifier):
        self.parameters: dict[str, nn.Parameter] = dict(module.named_parameters())
        self._scale = module.scale

    def _unit(self, theta: Parameters) -> tuple[Tensor, Tensor]:
        norm = theta["weight"].norm(dim=1, keepdim=True).clamp_min(1e-12)
        return theta["weight"] / norm, norm

    def _scale_of(self, theta: Parameters) -> Tensor | float:
        return theta.get("scale", self._scale)

    @staticmethod
    def _tangent(unit: Tensor, norm: Tensor, v: Tensor) -> Tensor:
        # d(w / |w|)[v]; a symmetric map, so it serves both directions.
        return (v - unit * (unit * v).sum(dim=1, keepdim=True)) / norm

    def scores(self, theta: Parameters, x: Tensor) -> Tensor:
        return self._scale_of(theta) * (F.normalize(x, dim=1) @ self._unit(theta)[0].T) + theta.get("bias", 0.0)

    def pull_back(self, theta: Parameters, x: Tensor, g: Tensor) -> Parameters:
        x = F.normalize(x, dim=1)
        unit, norm = self._unit(theta)
        to_unit = g.T @ x
        out = {"weight": self._scale_of(theta) * self._tangent(unit, norm, to_unit)}
        if "scale" in theta:
            out["scale"] = (to_unit * unit).sum()
        if "bias" in theta:
            out["bias"] = g.sum(dim=0)
        return out

    def push_forward(self, theta: Parameters, x: Tensor, direction: Parameters) -> Tensor:
        x = F.normalize(x, dim=1)
        unit, norm = self._unit(theta)
        out = self._scale_of(theta) * (x @ self._tangent(unit, norm, direction["weight"]).T)
        if "scale" in theta:
            out = out + direction["scale"] * (x @ unit.T)
        return out + direction.get("bias", 0.0)


def classifier_form(module: nn.Module) -> LinearForm | CosineForm:
    """The closed form of a classifier.

    Raises:
        ValueError: for one that is neither ``nn.Linear`` nor ``CosineClassifier``.
    """
    if isinstance(module, CosineClassifier):
        return CosineForm(module)
    if isinstance(module, nn.Linear):
        return LinearForm(module)
    raise ValueError(
        f"META.NAME: the meta-gradient is known for linear and cosine classifiers, not for {type(module).__name__}; "
        'set META.NAME "", or MODEL.LONG_TAIL.CLASSIFIER.NAME to "linear" or "cosine"'
    )


# ----------------------------------------------------------------------------- the optimizer's step


class LookAhead:
    """What the next step of an SGD optimizer would make of some of its parameters; changes neither.

    Weight decay, momentum with the present momentum buffers, dampening and Nesterov's form are those of
    ``torch.optim.SGD``. Gradient clipping (``SOLVER.CLIP_GRADIENTS``) is left out of the look-ahead.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]):
        """
        Raises:
            ValueError: if the optimizer is not ``torch.optim.SGD`` or does not train a parameter.
        """
        if not isinstance(optimizer, torch.optim.SGD):
            raise ValueError(f"META.NAME: the inner step is one of torch.optim.SGD, not of {type(optimizer).__name__}")
        self._parameters = parameters
        self._options = {}
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in parameters.items():
            if id(parameter) not in groups:
                raise ValueError(f"META.NAME: the optimizer does not train the classifier's {name!r}")
            buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
            self._options[name] = (groups[id(parameter)], buffer)

    def __call__(self, gradients: Parameters) -> Parameters:
        """theta' (equation 2), given the loss's gradient."""
        out = {}
        for name, parameter in self._parameters.items():
            group, buffer = self._options[name]
            theta = parameter.detach()
            d = gradients[name].to(theta.dtype)
            if group["maximize"]:
                d = -d
            if group["weight_decay"]:
                d = d + group["weight_decay"] * theta
            if group["momentum"]:
                # torch.optim.SGD starts its buffer with the first gradient as it is.
                moved = d if buffer is None else group["momentum"] * buffer + (1 - group["dampening"]) * d
                d = d + group["momentum"] * moved if group["nesterov"] else moved
            out[name] = theta - group["lr"] * d
        return out

    def scale(self, gradients: Parameters) -> Parameters:
        """lr * c * G of equation 3: minus the derivative of theta' with respect to the loss's gradient, times G."""
        out = {}
        for name in self._parameters:
            group, buffer = self._options[name]
            c = 1.0
            if group["momentum"]:
                c = 1.0 if buffer is None else 1.0 - group["dampening"]
                if group["nesterov"]:
                    c = 1.0 + group["momentum"] * c
            factor = float(group["lr"]) * (-c if group["maximize"] else c)
            out[name] = factor * gradients[name]
        return out


# ------------------------------------------------------------------------------------------ the meta-gradient


def weight_gradients(
    form: LinearForm | CosineForm,
    look_ahead: LookAhead,
    features: Tensor,
    terms: RowTerms,
    weights: Tensor,
    meta_features: Tensor,
    meta_loss: Callable[[Tensor], Tensor],
    *,
    reduce: Callable[[Tensor], Tensor] = lambda x: x,
) -> tuple[Tensor, Tensor]:
    """Equation 3: how the meta loss after the next optimizer step depends on the weight of each row in it.

    Args:
        form: the classifier's, from :func:`classifier_form`.
        look_ahead: the optimizer's next step for its parameters.
        features: ``(R, D)`` detached features of the training batch.
        terms: its rows at the present parameters.
        weights: ``(R,)``, w_i.
        meta_features: ``(M, D)`` features of the meta batch.
        meta_loss: from ``(M, C)`` scores to a scalar.
        reduce: mean over ranks of a tensor, so that the step is the one that all ranks take together.

    Returns:
        The ``(R,)`` derivatives of this rank's rows, and the scalar meta loss (of this rank).
    """
    with torch.no_grad():
        theta = {name: p.detach() for name, p in form.parameters.items()}
        gradient = form.pull_back(theta, features, weights[:, None] * terms.gradients)
        ahead = look_ahead({name: reduce(g) for name, g in gradient.items()})
        meta_scores = form.scores(ahead, meta_features)
        with torch.enable_grad():
            z = meta_scores.requires_grad_()
            value = meta_loss(z)
            (dz,) = torch.autograd.grad(value, z)
        meta_gradient = form.pull_back(ahead, meta_features, dz)
        direction = look_ahead.scale({name: reduce(g) for name, g in meta_gradient.items()})
        change = form.push_forward(theta, features, direction)
        return -(terms.gradients * change).sum(dim=1), value.detach()
