"""Class weights beside a background class: foreground keeps its share of the gradient, whatever their scale."""

import copy
import json

import numpy as np
import pytest
import torch

from lt_det.losses import LOSS_REGISTRY

WEIGHTED = [
    ("ClassBalanced", {"base": "softmax"}),
    ("ClassBalanced", {"base": "sigmoid"}),
    ("ClassBalanced", {"base": "focal"}),
    ("LDAM", {"drw": True, "max_margin": 0.0}),
    ("PairwiseMargin", {"setting": "class_balanced"}),
]


@pytest.fixture(scope="module")
def lvis(shared_dir):
    """LVIS v1's counts of images and instances."""
    categories = json.loads((shared_dir / "data/lvis_v1_train_cat_info.json").read_text())
    counts = {k: np.array([c[k] for c in categories], dtype=np.float64) for k in ("image_count", "instance_count")}
    assert len(categories) == 1203 and counts["instance_count"].sum() == 1_270_141
    return counts


class Statistics:
    """What the losses read: counts, and those under a sampler where it has some."""

    names = None
    num_images = 100_170

    def __init__(self, image_count, instance_count, sampled_count=None):
        self.image_count, self.instance_count, self.sampled_count = image_count, instance_count, sampled_count


def foreground_share(loss, shares) -> float:
    """Foreground's share of the gradient's absolute sum over rows of equal scores: a quarter of RoIs are foreground,
    and these follow ``shares``. One row a class, with its share as weight, is the exact mean over such RoIs."""
    K = len(shares)
    scores = torch.zeros(K + 1, loss.num_outputs(K), dtype=torch.float64, requires_grad=True)
    rows = torch.cat([torch.as_tensor(shares) * 0.25, torch.tensor([0.75], dtype=torch.float64)])
    loss(scores, torch.arange(K + 1), roi_weights=rows).backward()
    by_row = scores.grad.abs().sum(dim=1)
    return float(by_row[:-1].sum() / by_row.sum())


@pytest.mark.parametrize("name, options", WEIGHTED)
def test_foreground_keeps_its_share_on_lvis_v1(name, options, lvis):
    """With weights that sum to K, the share of ClassBalanced and LDAM falls to 0.008."""
    shares = lvis["instance_count"] / lvis["instance_count"].sum()
    loss = LOSS_REGISTRY.get(name)(1203, statistics=Statistics(**lvis), **options).double()
    assert foreground_share(loss, shares) == pytest.approx(0.25, abs=1e-9)


@pytest.mark.parametrize("name, options", WEIGHTED)
def test_the_shares_are_those_of_the_sampler_in_use(name, options, lvis):
    sampled = lvis["instance_count"] ** 0.5
    loss = LOSS_REGISTRY.get(name)(1203, statistics=Statistics(**lvis, sampled_count=sampled), **options).double()
    assert foreground_share(loss, sampled / sampled.sum()) == pytest.approx(0.25, abs=1e-9)


@pytest.mark.parametrize("name, options", WEIGHTED)
def test_weights_do_not_depend_on_their_scale(name, options):
    """w_c = u_c / sum q u for (1, 3): q = (1/4, 3/4), by hand from each loss's u."""
    statistics = Statistics(np.array([1.0, 3.0]), np.array([10.0, 30.0]))
    loss = LOSS_REGISTRY.get(name)(2, statistics=statistics, **options)
    loss.prepare()
    if name == "PairwiseMargin":
        u = np.array([1 / 0.25, 1 / 0.75])
    else:
        u = np.array([(1 - 0.9999) / (1 - 0.9999**n) for n in (1, 3)])
    expected = u / (0.25 * u[0] + 0.75 * u[1])
    assert loss.class_weights.tolist() == pytest.approx([*expected, 1.0], rel=1e-9)


@pytest.mark.parametrize("name, options", WEIGHTED)
def test_shares_measured_from_the_rois_seen(name, options):
    statistics = Statistics(np.array([1.0, 3.0]), None)
    with pytest.raises(ValueError, match="ROI_SHARES .* to 'online'"):
        LOSS_REGISTRY.get(name)(2, statistics=statistics, **options).prepare()
    loss = LOSS_REGISTRY.get(name)(2, statistics=statistics, roi_shares="online", **options)
    width = loss.num_outputs(2)
    for labels in ([2, 2], [0, 1, 1, 1, 2], [1, 1, 1, 2]):
        loss(torch.zeros(len(labels), width), torch.tensor(labels))
        assert torch.isfinite(loss.class_weights).all()
    assert loss.roi_count.tolist() == [1.0, 6.0]
    assert (loss.class_weights[:-1] * torch.tensor([1 / 7, 6 / 7])).sum().item() == pytest.approx(1.0)

    # The counts are in the checkpoint, and evaluation adds nothing to them.
    other = LOSS_REGISTRY.get(name)(2, statistics=statistics, roi_shares="online", **options)
    other.load_state_dict(copy.deepcopy(loss.state_dict()))
    other.eval()
    other(torch.zeros(1, width), torch.tensor([0]))
    assert other.roi_count.tolist() == [1.0, 6.0] and other.class_weights.tolist() == loss.class_weights.tolist()


def test_bad_options_are_refused():
    for shares in ("instances", ""):
        with pytest.raises(ValueError, match="roi_shares is .*statistics, online"):
            LOSS_REGISTRY.get("LDAM")(2, roi_shares=shares)
    with pytest.raises(ValueError, match="positive sum"):
        statistics = Statistics(np.array([1.0, 3.0]), np.array([0.0, 0.0]))
        LOSS_REGISTRY.get("LDAM")(2, statistics=statistics).prepare()
