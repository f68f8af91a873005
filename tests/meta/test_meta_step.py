"""The meta step by itself: balanced meta batches, equal steps, state."""

import pytest
import torch

from lt_det.losses import LOSS_REGISTRY
from lt_det.meta import MetaReweighter, MetaStep, row_terms
from lt_det.modeling import RoIBatch

K = 4


class Predictor:
    def __init__(self):
        torch.manual_seed(0)
        self.cls_score = torch.nn.Linear(6, K + 1).double()


def make(**options):
    predictor = Predictor()
    options = {
        "optimizer": torch.optim.SGD(predictor.cls_score.parameters(), lr=0.1, momentum=0.9),
        "open_batches": lambda start: iter(range(start, 100)),
        **options,
    }
    return MetaStep(MetaReweighter(K).double(), LOSS_REGISTRY.get("Softmax")(K), **options), predictor


def rois(predictor, labels, seed=1):
    features = torch.randn(len(labels), 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return RoIBatch(predictor, features, torch.tensor(labels))


def test_balanced_meta_loss():
    """Classes of the batch count alike, background as it is: 3 foreground RoIs of 2 classes, so 3/2 for each class."""
    meta, predictor = make(balance_rois=True)
    batch = rois(predictor, [0, 0, 2, K])
    scores = predictor.cls_score(batch.features).detach()
    rows = torch.nn.functional.cross_entropy(scores, batch.gt_classes, reduction="none")
    expected = (0.75 * rows[0] + 0.75 * rows[1] + 1.5 * rows[2] + rows[3]) / 4
    assert meta._meta_loss(batch, scores).item() == pytest.approx(expected.item(), rel=1e-6)
    plain, _ = make()
    assert plain._meta_loss(batch, scores).item() == pytest.approx(rows.mean().item(), rel=1e-6)
    only_background = rois(predictor, [K, K])
    assert torch.isfinite(meta._meta_loss(only_background, predictor.cls_score(only_background.features).detach()))


def test_rates_go_where_the_meta_loss_falls():
    """A meta batch of class 1 alone: RoIs of class 1 are worth more, others of the batch less, absent ones nothing."""
    meta, predictor = make(lr=0.1)
    train, batch = rois(predictor, [0, 1, 2, 1, K]), rois(predictor, [1, 1, 1], seed=1)
    loss = LOSS_REGISTRY.get("Softmax")(K)
    terms = row_terms(
        lambda z, w, train=train: loss(z, train.gt_classes, roi_weights=w), predictor.cls_score(train.features)
    )
    meta.step([train], [terms], [meta.class_counts(train)], [batch])
    rates = meta.learner.rates
    assert rates[1] > 0.5 and rates[3] == 0.5 and rates[[0, 2]].min() < 0.5
    (weights,) = meta.roi_weights([train], [meta.class_counts(train)])
    assert weights[-1] == 1 and weights[:-1].sum().item() == pytest.approx(4)


def test_state_goes_on():
    def steps(meta, predictor, count):
        loss = LOSS_REGISTRY.get("Softmax")(K)
        for _ in range(count):
            train = rois(predictor, [0, 1, 2, 3, K], seed=meta.iteration)
            terms = row_terms(
                lambda z, w, train=train: loss(z, train.gt_classes, roi_weights=w), predictor.cls_score(train.features)
            )
            meta.step(
                [train],
                [terms],
                [meta.class_counts(train)],
                [rois(predictor, [1, 3, K], seed=100 + meta.iteration)],
            )
            meta.iteration += 1

    whole, predictor = make()
    steps(whole, predictor, 5)
    first, predictor = make()
    steps(first, predictor, 2)
    second, predictor = make(seed=9)
    second.load_state_dict(first.state_dict())
    steps(second, predictor, 3)
    torch.testing.assert_close(second.learner.logits, whole.learner.logits, rtol=1e-12, atol=0)
    assert second.seed == 0 and second.iteration == 5


@pytest.mark.parametrize("period, takes", [(1, 7), (3, 3), (7, 1)])
def test_number_of_meta_batches(period, takes):
    meta, _ = make(period=period)
    assert meta.batches_before(7) == takes and meta.batches_before(0) == 0
    due = 0
    for meta.iteration in range(7):
        due += meta.due
    assert due == takes


def test_meta_batches_go_on_where_they_stood():
    meta, _ = make(period=3)
    assert [meta.next_batch(), meta.next_batch()] == [0, 1]
    meta.iteration = 4  # of which iterations 0 and 3 took a batch
    resumed, _ = make(period=3)
    resumed.load_state_dict(meta.state_dict())
    assert resumed.next_batch() == meta.next_batch() == 2
