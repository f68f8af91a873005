"""Classifiers of the box head. Each keeps its weight under ``weight``, so ``cls_score.weight`` stays its name."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSIFIERS = ("linear", "cosine")


class CosineClassifier(nn.Module):
    """Scores are ``scale * cos(feature, class weight)``, and a bias if asked (Gidaris & Komodakis, CVPR 2018, eq. 4).

    Args:
        in_features: width of the features.
        num_outputs: number of classes, background included where the loss has one.
        scale: the factor on the cosine; 1.0 gives the cosine itself.
        learn_scale: make the scale a parameter.
        bias: add a bias to each score, as Seesaw loss (Wang et al., CVPR 2021) does.
    """

    def __init__(
        self,
        in_features: int,
        num_outputs: int,
        *,
        scale: float = 20.0,
        learn_scale: bool = False,
        bias: bool = False,
    ):
        super().__init__()
        if scale <= 0:
            raise ValueError(f"the scale of a cosine classifier must be positive, not {scale}")
        self.in_features = in_features
        self.out_features = num_outputs
        self.eps = 1e-12  # the smallest norm that is divided by
        self.weight = nn.Parameter(torch.empty(num_outputs, in_features))
        nn.init.normal_(self.weight, std=0.01)
        self.bias = nn.Parameter(torch.zeros(num_outputs)) if bias else None
        if learn_scale:
            self.scale = nn.Parameter(torch.tensor(float(scale)))
        else:
            self.scale = float(scale)

    def forward(self, x: Tensor) -> Tensor:
        """``(R, in_features)`` features to ``(R, num_outputs)`` scores."""
        # The norms divide the products: with 13,000 classes the weight is larger than the scores, and its normalised
        # copy and the gradient of that would be two more of its size.
        factors = self.scale / torch.linalg.vector_norm(self.weight, dim=1).clamp(min=self.eps)
        scores = F.linear(F.normalize(x, dim=-1, eps=self.eps), self.weight) * factors
        return scores if self.bias is None else scores + self.bias

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """A checkpoint that has the weight and no bias is of a classifier without one: its bias is 0."""
        if self.bias is not None and f"{prefix}weight" in state_dict:
            state_dict.setdefault(f"{prefix}bias", torch.zeros_like(self.bias))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, scale={self.scale}, "
            f"bias={self.bias is not None}"
        )


def build_classifier(
    name: str,
    in_features: int,
    num_outputs: int,
    *,
    scale: float = 20.0,
    learn_scale: bool = False,
    bias: bool = False,
) -> nn.Module:
    """A classifier by name: ``"linear"`` (Detectron2's) or ``"cosine"``, which alone takes the options.

    Raises:
        ValueError: for an unknown name.
    """
    if name == "linear":
        layer = nn.Linear(in_features, num_outputs)
        nn.init.normal_(layer.weight, std=0.01)
        nn.init.zeros_(layer.bias)
        return layer
    if name == "cosine":
        return CosineClassifier(in_features, num_outputs, scale=scale, learn_scale=learn_scale, bias=bias)
    raise ValueError(f"MODEL.LONG_TAIL.CLASSIFIER.NAME is {name!r}; it must be one of {CLASSIFIERS}")
