"""LOCE's memory: what it keeps, what it draws, and what that adds to the loss."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lt_det.losses import LOSS_REGISTRY

K, D = 3, 2
pytestmark = pytest.mark.filterwarnings("error")


def build(**options):
    loss = LOSS_REGISTRY.get("LOCE")(K, **options)
    loss.remember_features(D)
    return loss


def classifier(dtype=torch.float64):
    linear = nn.Linear(D, K + 1, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.5], [0.5, -1.0]]))
        linear.bias.zero_()
    return linear


def call(loss, features, labels, classify):
    return loss(classify(features), labels, features=features, classify=classify)


def only(label):
    """Mean scores under which the drawn classes are as good as surely ``label``."""
    scores = torch.ones(K)
    scores[label] = 1e-12
    return scores


def test_loss_is_the_mean_over_the_batch_and_the_memory():
    loss = build(sampled_classes=2, sampled_features=3, memory_size=5).double()
    classify, generator = classifier(), torch.Generator().manual_seed(0)
    kept = torch.tensor([[0.5, -2.0]], dtype=torch.float64)  # bfloat16 holds it exactly
    call(loss, kept.repeat(2, 1), torch.tensor([1, 1]), classify)
    loss.mean_score.copy_(only(1))
    # The next batch has no RoI of class 1: all six drawn rows are the kept one.
    features = torch.randn(4, D, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 2, 2, K])
    value = call(loss, features, labels, classify)

    rows = torch.cat([features, kept.repeat(6, 1)])
    all_labels = torch.cat([labels, torch.full((6,), 1)])
    scores = rows @ classify.weight.T
    probs = scores.softmax(dim=1)
    wanted = [0.9 * s + 0.1 * probs[all_labels == c, c].mean().item() for c, s in enumerate([1.0, 1e-12, 1.0])]
    torch.testing.assert_close(loss.mean_score, torch.tensor(wanted, dtype=torch.float64))
    shift = torch.tensor([*wanted, 0.01], dtype=torch.float64).log()
    torch.testing.assert_close(value, F.cross_entropy(scores + shift, all_labels))


def test_gradient_of_the_memory_reaches_the_classifier_alone():
    loss = build(sampled_classes=1, sampled_features=2).double()
    classify = classifier()
    features = torch.tensor([[0.5, -2.0]], dtype=torch.float64, requires_grad=True)
    call(loss, features, torch.tensor([1]), classify)
    loss.mean_score.copy_(only(1))
    # Scores that the classifier has no part in: what it gets comes from the memory.
    scores = torch.zeros(3, K + 1, dtype=torch.float64)
    labels = torch.full((3,), K)
    loss(scores, labels, features=torch.zeros(3, D, dtype=torch.float64), classify=classify).backward()
    assert features.grad is None
    kept = features.detach()
    shift = torch.cat([loss.mean_score, torch.tensor([0.01], dtype=torch.float64)]).log()
    residual = (kept @ classify.weight.T + shift).softmax(dim=1)
    residual[0, 1] -= 1
    # Two equal rows among five.
    torch.testing.assert_close(classify.weight.grad, 2 / 5 * residual.T @ kept)


def test_a_class_without_features_is_not_drawn():
    loss, plain = build(), LOSS_REGISTRY.get("LOCE")(K)
    loss.double(), plain.double()
    classify = classifier()
    call(loss, torch.ones(1, D, dtype=torch.float64), torch.tensor([0]), classify)
    loss.mean_score.copy_(only(1))
    plain.mean_score.copy_(only(1))
    features, labels = torch.ones(2, D, dtype=torch.float64), torch.tensor([2, K])
    torch.testing.assert_close(call(loss, features, labels, classify), plain(classify(features), labels))
    # No RoI at all, and nothing drawn: zero, with a gradient.
    scores = torch.zeros(0, K + 1, dtype=torch.float64, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.int64)
    value = loss(scores, empty, features=torch.zeros(0, D, dtype=torch.float64), classify=classify)
    value.backward()
    assert value.item() == 0 and scores.grad.shape == scores.shape


def test_classes_are_drawn_by_their_scores_and_features_evenly():
    loss = build(memory_size=2, sampled_classes=3000, sampled_features=2)
    drawn = []

    def classify(features):
        drawn.append(features)
        return torch.zeros(len(features), K + 1)

    labels = torch.arange(K).repeat_interleave(2)
    features = torch.stack([labels.float(), torch.arange(6) % 2], dim=1)
    loss.mean_score.copy_(torch.tensor([0.1, 0.2, 0.4]))
    torch.manual_seed(0)
    loss(torch.zeros(6, K + 1), labels, features=features, classify=classify)
    label, slot = drawn[0].unbind(dim=1)
    assert len(label) == 6000
    share = torch.bincount(label.long(), minlength=K) / 6000
    torch.testing.assert_close(share, torch.tensor([4.0, 2.0, 1.0]) / 7, atol=0.03, rtol=0)
    assert abs(slot.mean().item() - 0.5) < 0.03
    # Classes are drawn, not features: those of one draw stand together.
    assert (label.view(-1, 2)[:, 0] == label.view(-1, 2)[:, 1]).all()


@pytest.mark.float32
def test_only_foreground_is_kept_and_only_in_training():
    loss, classify = build(memory_size=2), classifier(torch.float32)
    labels = torch.tensor([0, K, 0, 0, 2])
    features = torch.arange(5.0)[:, None].expand(5, D)
    call(loss, features, labels, classify)
    keys, offsets, _ = loss.memory.contents()
    assert offsets.tolist() == [0, 2, 2, 3]
    assert sorted(keys[:2, 0].tolist()) == [2.0, 3.0] and keys[2, 0] == 4.0  # the oldest of class 0 made room
    state = copy.deepcopy(loss.state_dict())
    value = loss.eval()(classify(features), labels)  # needs neither features nor classifier
    assert torch.isfinite(value)
    torch.testing.assert_close(loss.state_dict(), state)


@pytest.mark.float32
def test_resumes_with_its_memory():
    classify, generator = classifier(torch.float32), torch.Generator().manual_seed(1)
    batches = [(torch.randn(9, D, generator=generator), torch.arange(9) % (K + 1)) for _ in range(4)]

    def run(loss, part):
        values = []
        for step, (features, labels) in part:
            torch.manual_seed(step)
            values.append(call(loss, features, labels, classify).item())
        return values

    steps = list(enumerate(batches))
    whole = run(build(memory_size=3), steps)
    first = build(memory_size=3)
    run(first, steps[:2])
    second = build(memory_size=3)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert run(second, steps[2:]) == whole[2:]
    assert len(set(whole)) == 4


def test_without_a_memory():
    for loss in (LOSS_REGISTRY.get("LOCE")(K), build(memory_size=0)):
        assert not loss.wants_features and set(loss.state_dict()) == {"mean_score"}
        assert "no memory" in loss.describe()
    loss = build()
    assert loss.wants_features and "80 features a class" in loss.describe()
    with pytest.raises(ValueError, match="MEMORY_SIZE"):
        loss(torch.zeros(2, K + 1), torch.tensor([0, K]))
    for options in ({"memory_size": -1}, {"sampled_classes": 0}, {"sampled_features": 0}):
        with pytest.raises(ValueError, match="LOCE: "):
            build(**options)
