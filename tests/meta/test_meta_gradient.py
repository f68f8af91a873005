"""The closed form against double backpropagation and finite differences, in float64."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import functional_call

from lt_det.losses import LOSS_REGISTRY
from lt_det.meta import LookAhead, WeightedRows, classifier_form, row_terms, weight_gradients
from lt_det.modeling import CosineClassifier


class Counts:
    """Long-tailed class statistics of K classes."""

    def __init__(self, k):
        self.image_count = torch.linspace(1, 5 * k, k, dtype=torch.float64).round()
        self.instance_count = self.image_count * 2
        self.num_images = 10 * k
        self.names = [f"class {i}" for i in range(k)]
        third = max(1, k // 3)
        self.frequency_groups = {"r": range(third), "c": range(third, 2 * third), "f": range(2 * third, k)}

    def prior(self, source="image_count"):
        return self.image_count / self.image_count.sum()


def problem(
    k,
    *,
    classifier="linear",
    loss="BalancedSoftmax",
    meta="Softmax",
    sgd=None,
    rows=12,
    width=6,
    steps=2,
    seed=0,
):
    """A classifier in the midst of its training, a batch and a meta batch."""
    torch.manual_seed(seed)
    losses = [LOSS_REGISTRY.get(name)(k, statistics=Counts(k)) for name in (loss, meta)]
    outputs = losses[0].num_outputs(k)
    if classifier == "linear":
        module = torch.nn.Linear(width, outputs)
    else:
        module = CosineClassifier(
            width, outputs, scale=10.0, learn_scale=classifier == "learned cosine", bias=seed % 2 == 1
        )
    module = module.double()
    optimizer = torch.optim.SGD(
        [{"params": [p], "weight_decay": 0.01 * (i + 1)} for i, p in enumerate(module.parameters())],
        **(sgd or {"lr": 0.3, "momentum": 0.9}),
    )
    batch = lambda n: (
        torch.randn(n, width, dtype=torch.float64),
        torch.randint(0, k + 1, (n,)),
    )
    for _ in range(steps):
        x, y = batch(rows)
        optimizer.zero_grad()
        losses[0](module(x), y).backward()
        optimizer.step()
    return module, optimizer, losses, batch(rows), batch(rows + 3), torch.rand(rows, dtype=torch.float64) * 2


def closed_form(module, optimizer, losses, train, meta, weights):
    (x, y), (mx, my) = train, meta
    form = classifier_form(module)
    terms = row_terms(lambda z, w: losses[0](z, y, roi_weights=w), module(x))
    ahead = LookAhead(optimizer, form.parameters)
    return weight_gradients(form, ahead, x, terms, weights, mx, lambda z: losses[1](z, my))


def meta_loss_by_definition(module, optimizer, losses, train, meta, weights):
    """The loss after a step of torch.optim.SGD, written out so that autograd goes through it."""
    (x, y), (mx, my) = train, meta
    value = losses[0](module(x), y, roi_weights=weights)
    names = [name for name, _ in module.named_parameters()]
    gradients = torch.autograd.grad(value, list(module.parameters()), create_graph=True)
    ahead = {}
    for name, p, g in zip(names, module.parameters(), gradients):
        group = next(group for group in optimizer.param_groups if any(q is p for q in group["params"]))
        g = (-g if group["maximize"] else g) + group["weight_decay"] * p
        if group["momentum"]:
            old = optimizer.state[p].get("momentum_buffer")
            buffer = g if old is None else group["momentum"] * old + (1 - group["dampening"]) * g
            g = g + group["momentum"] * buffer if group["nesterov"] else buffer
        ahead[name] = p - group["lr"] * g
    return losses[1](functional_call(module, ahead, (mx,)), my)


def check(args):
    weights = args[-1].clone().requires_grad_()
    expected_loss = meta_loss_by_definition(*args[:-1], weights)
    (expected,) = torch.autograd.grad(expected_loss, weights)
    gradients, loss = closed_form(*args)
    assert expected.abs().max() > 0
    torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-10, atol=0)
    assert (gradients - expected).norm() <= 1e-6 * expected.norm()
    return gradients


SGD = {
    "plain": {"lr": 0.5},
    "momentum": {"lr": 0.3, "momentum": 0.9},
    "nesterov": {"lr": 0.3, "momentum": 0.9, "nesterov": True},
    "dampening": {"lr": 0.3, "momentum": 0.8, "dampening": 0.3},
    "maximize": {"lr": 0.1, "momentum": 0.9, "maximize": True},
}


@pytest.mark.parametrize("sgd", SGD)
@pytest.mark.parametrize("classifier", ["linear", "cosine", "learned cosine"])
@pytest.mark.parametrize("steps", [0, 2])
def test_equals_double_backpropagation(classifier, sgd, steps):
    check(problem(5, classifier=classifier, sgd=SGD[sgd], steps=steps))


@pytest.mark.parametrize("loss, meta", [("BalancedSoftmax", "Softmax"), ("BalancedSigmoid", "Sigmoid")])
def test_lvis_size(loss, meta):
    check(problem(1203, loss=loss, meta=meta, rows=64, width=128))


@given(
    k=st.integers(1, 40), rows=st.integers(2, 30), width=st.integers(1, 20), seed=st.integers(0, 10**6),
    classifier=st.sampled_from(["linear", "cosine", "learned cosine"]), sgd=st.sampled_from(sorted(SGD)),
    losses=st.sampled_from([
        ("BalancedSoftmax", "Softmax"), ("BalancedSigmoid", "Sigmoid"), ("Softmax", "BalancedSoftmax"),
    ]),
)  # fmt: skip
def test_random_problems(k, rows, width, seed, classifier, sgd, losses):
    args = problem(
        k,
        rows=rows,
        width=width,
        seed=seed,
        classifier=classifier,
        sgd=SGD[sgd],
        loss=losses[0],
        meta=losses[1],
        steps=seed % 3,
    )
    weights = args[-1].clone().requires_grad_()
    (expected,) = torch.autograd.grad(meta_loss_by_definition(*args[:-1], weights), weights)
    gradients, _ = closed_form(*args)
    assert (gradients - expected).norm() <= 1e-6 * expected.norm() + 1e-12


# Losses with running state are compared where reading them twice gives the same: in eval mode.
ROW_LOSSES = sorted(name for name, loss in LOSS_REGISTRY if not loss.wants_features and not loss.wants_cosine)


@pytest.mark.parametrize("name", ROW_LOSSES)
def test_every_loss_splits_into_rows(name):
    """Linear in the weights, rows independent: so that (3) holds for it, and the weighted loss goes on from them."""
    torch.manual_seed(0)
    k, rows = 6, 9
    loss = LOSS_REGISTRY.get(name)(k, statistics=Counts(k)).eval()
    scores = torch.randn(rows, loss.num_outputs(k), dtype=torch.float64)
    labels, weights = torch.randint(0, k + 1, (rows,)), torch.rand(rows, dtype=torch.float64)

    def value(z, w):
        torch.manual_seed(1)  # some draw their negatives
        out = loss(z, labels, roi_weights=w)
        return sum(out.values()) if isinstance(out, dict) else out

    terms = row_terms(value, scores)
    direct, weighted = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    expected = value(direct, weights)
    expected.backward()
    got = WeightedRows.apply(weighted, terms.losses, terms.gradients, weights)
    got.backward()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(weighted.grad, direct.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("classifier", ["linear", "cosine"])
def test_finite_differences(classifier):
    module, optimizer, losses, train, meta, weights = args = problem(4, classifier=classifier)
    gradients, _ = closed_form(*args)
    eps = 1e-5
    for i in range(len(weights)):
        moved = []
        for sign in (1, -1):
            w = weights.clone()
            w[i] += sign * eps
            # A real step of a copy of the real optimizer, on a copy of the classifier.
            memo = {}
            copied, opt = copy.deepcopy(module, memo), copy.deepcopy(optimizer, memo)
            opt.zero_grad()
            losses[0](copied(train[0]), train[1], roi_weights=w).backward()
            opt.step()
            moved.append(losses[1](copied(meta[0]), meta[1]).item())
        assert gradients[i].item() == pytest.approx((moved[0] - moved[1]) / (2 * eps), rel=1e-4, abs=1e-9)


def test_looking_ahead_changes_nothing():
    module, optimizer, *rest = problem(4)
    before = [p.detach().clone() for p in module.parameters()]
    buffers = [optimizer.state[p]["momentum_buffer"].clone() for p in module.parameters()]
    closed_form(module, optimizer, *rest)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters()))
    assert all(torch.equal(b, optimizer.state[p]["momentum_buffer"]) for b, p in zip(buffers, module.parameters()))


def test_what_it_does_not_know_is_named():
    with pytest.raises(ValueError, match="linear and cosine"):
        classifier_form(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    module = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Adam"):
        LookAhead(torch.optim.Adam(module.parameters()), dict(module.named_parameters()))
    with pytest.raises(ValueError, match="'bias'"):
        LookAhead(torch.optim.SGD([module.weight], lr=0.1), dict(module.named_parameters()))
