"""The public formulas against hand work and the papers' equations, evaluated class by class in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from lt_det.losses import functional as lf

COUNTS = [500.0, 40.0, 7.0, 1.0]
NUM_CLASSES = len(COUNTS)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(11, NUM_CLASSES, dtype=torch.float64, generator=generator) * 2
    labels = torch.randint(0, NUM_CLASSES, (11,), generator=generator)
    return logits, labels


def twice_differentiable(function, logits):
    logits = logits[:5].clone().requires_grad_()
    return gradcheck(function, logits) and gradgradcheck(function, logits)


# Values by hand.


def test_balanced_softmax_by_hand():
    # Equal logits: the prediction is the prior, 1/4 and 3/4.
    loss = lf.balanced_softmax_loss(torch.zeros(2, 2), torch.tensor([0, 1]), [1, 3], reduction="none")
    torch.testing.assert_close(loss, torch.tensor([math.log(4), math.log(4 / 3)]))


def test_logit_adjusted_tau_by_hand():
    # tau = 2: n^2 = 1 and 9.
    loss = lf.logit_adjusted_loss(torch.zeros(1, 2), torch.tensor([0]), [1, 3], tau=2.0)
    assert loss.item() == pytest.approx(math.log(10), rel=1e-12)


def test_ldam_margins_by_hand():
    # 16^(-1/4) = 1/2 and 1^(-1/4) = 1, scaled so that the largest is 0.5.
    torch.testing.assert_close(lf.ldam_margins([16, 1]), torch.tensor([0.25, 0.5], dtype=torch.float64))


def test_effective_number_weights_by_hand():
    # beta = 1/2: (1 - b) / (1 - b^n) = 1 for n = 1 and 2/3 for n = 2; normalised to sum 2.
    torch.testing.assert_close(
        lf.effective_number_weights([1, 2], beta=0.5), torch.tensor([1.2, 0.8], dtype=torch.float64)
    )
    torch.testing.assert_close(lf.effective_number_weights([3, 9], beta=0.0), torch.ones(2, dtype=torch.float64))


def test_effective_number_weights_keep_digits_near_one():
    # beta -> 1 gives inverse counts; 1 - beta^n written naively has lost all digits here.
    weights = lf.effective_number_weights([1, 4], beta=1 - 1e-13)
    torch.testing.assert_close(weights, torch.tensor([1.6, 0.4], dtype=torch.float64), rtol=1e-9, atol=0)


def test_balanced_sigmoid_by_hand():
    # f = 1/2 shifts nothing, f = 1/10 shifts by -log 9; the background row is not shifted.
    loss = lf.balanced_sigmoid_loss(torch.zeros(2, 2), torch.tensor([1, 2]), [0.5, 0.1])
    foreground = math.log(2) + math.log(1 + 9)  # class 0 off: log 2; class 1 on at sigmoid(-log 9) = 1/10
    assert loss.item() == pytest.approx((foreground + 2 * math.log(2)) / 2, rel=1e-12)


def test_seesaw_by_hand():
    # Equal logits; label 0 with 16 instances, class 1 with 1, class 2 with 100; p = 1/2, no compensation at
    # equal scores.
    loss = lf.seesaw_loss(torch.zeros(1, 3), torch.tensor([0]), [16, 1, 100], p=0.5, q=2.0)
    assert loss.item() == pytest.approx(math.log(1 + 0.25 + 1), rel=1e-12)


def test_pairwise_class_balance_by_hand():
    # Soft label of class 0: (0.6, 0.2) / 0.8. CE = ln 2; KL = 0.75 ln 1.5 + 0.25 ln 0.5.
    confusion = [[0.6, 0.4], [0.2, 0.8]]
    z = torch.zeros(1, 2, requires_grad=True)
    loss = lf.pairwise_class_balance_loss(z, torch.tensor([0]), confusion, alpha=0.4)
    expected = 0.6 * math.log(2) + 0.4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()  # p - 0.6 (1, 0) - 0.4 (0.75, 0.25)
    assert z.grad.flatten().tolist() == pytest.approx([0.5 - 0.9, 0.5 - 0.1], rel=1e-12)
    for bad in ([[0.6, 0.4]], [[0.0, 1.0], [0.2, 0.8]], [[-1.0, 2.0], [0.2, 0.8]]):
        with pytest.raises(ValueError, match="confusion must"):
            lf.pairwise_class_balance_loss(z, torch.tensor([0]), bad)


def test_logit_adjustment_by_hand():
    out = lf.logit_adjustment(torch.zeros(1, 2), [1, 3], tau=2.0)
    torch.testing.assert_close(out, torch.tensor([[2 * math.log(4), -2 * math.log(0.75)]]))


# The papers' equations, written out.


def test_balanced_softmax_equation(batch):
    logits, labels = batch
    n = torch.tensor(COUNTS, dtype=torch.float64)
    expected = [
        -math.log(n[y] * math.exp(z[y]) / sum(n[c] * math.exp(z[c]) for c in range(NUM_CLASSES)))
        for z, y in zip(logits, labels)
    ]
    actual = lf.balanced_softmax_loss(logits, labels, COUNTS, reduction="none")
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=1e-13)
    assert twice_differentiable(lambda z: lf.balanced_softmax_loss(z, labels[:5], COUNTS), logits)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.7])
def test_logit_adjusted_equation_and_gradient(batch, tau):
    logits, labels = batch
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    adjusted = logits + tau * torch.tensor(COUNTS, dtype=torch.float64).log()
    expected = F.cross_entropy(adjusted, labels, weight=weight)
    actual = lf.logit_adjusted_loss(logits, labels, COUNTS, tau=tau, weight=weight)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)
    assert twice_differentiable(lambda z: lf.logit_adjusted_loss(z, labels[:5], COUNTS, tau=tau, weight=weight), logits)


def test_pairwise_margin_equation(batch):
    logits, labels = batch
    generator = torch.Generator().manual_seed(1)
    delta = torch.randn(NUM_CLASSES, NUM_CLASSES, dtype=torch.float64, generator=generator)
    alpha = torch.rand(NUM_CLASSES, dtype=torch.float64, generator=generator) + 0.5
    expected = []
    for z, y in zip(logits, labels):
        others = sum(math.exp(delta[y, c] + z[c] - z[y]) for c in range(NUM_CLASSES) if c != y)
        expected.append(alpha[y] * math.log(1 + others))
    expected = torch.stack(expected)
    actual = lf.pairwise_margin_loss(logits, labels, alpha, delta, reduction="none")
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lf.pairwise_margin_loss(logits, labels, alpha, delta), expected.mean())
    assert twice_differentiable(lambda z: lf.pairwise_margin_loss(z, labels[:5], alpha, delta), logits)


def test_ldam_equation(batch):
    cosine, labels = batch[0].tanh(), batch[1]
    margins, weight, s = lf.ldam_margins(COUNTS), lf.effective_number_weights(COUNTS, 0.99), 10.0
    losses, weights = [], []
    for z, y in zip(cosine, labels):
        numerator = math.exp(s * (z[y] - margins[y]))
        others = sum(math.exp(s * z[c]) for c in range(NUM_CLASSES) if c != y)
        losses.append(-math.log(numerator / (numerator + others)))
        weights.append(weight[y].item())
    expected = sum(w * v for w, v in zip(weights, losses)) / sum(weights)
    actual = lf.ldam_loss(cosine, labels, margins, scale=s, weight=weight)
    assert actual.item() == pytest.approx(expected, rel=1e-12)
    assert twice_differentiable(lambda z: lf.ldam_loss(z, labels[:5], margins, scale=s, weight=weight), cosine)


def test_balanced_sigmoid_equation(batch):
    logits, labels = batch
    labels = labels.clone()
    labels[::3] = NUM_CLASSES
    f = [0.6, 0.3, 0.01, 0.0001]
    total = 0.0
    for z, y in zip(logits, labels):
        for c in range(NUM_CLASSES):
            shifted = z[c].item() - (math.log((1 - f[c]) / f[c]) if y < NUM_CLASSES else 0.0)
            p = 1 / (1 + math.exp(-shifted))
            total -= math.log(p if c == y else 1 - p)
    assert lf.balanced_sigmoid_loss(logits, labels, f).item() == pytest.approx(total / len(labels), rel=1e-10)
    assert twice_differentiable(lambda z: lf.balanced_sigmoid_loss(z, labels[:5], f), logits)


def seesaw_reference(logits, labels, counts, p, q, eps):
    """Eq. 2 to 6 of the paper; the seesaw weights are constants for the gradient."""
    rows = []
    probs = logits.detach().softmax(dim=1)
    for r, y in enumerate(labels.tolist()):
        total = 0
        for c in range(logits.shape[1]):
            factor = 1.0
            if c != y:
                n_c, n_y = max(counts[c], 1.0), max(counts[y], 1.0)
                mitigation = (n_c / n_y) ** p if n_c < n_y else 1.0
                ratio = probs[r, c].item() / max(probs[r, y].item(), eps)
                factor = mitigation * (ratio**q if ratio > 1 else 1.0)
            total = total + factor * torch.exp(logits[r, c])
        rows.append(-(torch.exp(logits[r, y]) / total).log())
    return torch.stack(rows)


@pytest.mark.parametrize("p, q", [(0.8, 2.0), (0.0, 2.0), (0.8, 0.0), (0.0, 0.0)])
def test_seesaw_equation_and_gradient(batch, p, q):
    logits, labels = batch
    counts = [300.0, 20.0, 0.0, 5.0]
    logits = logits.clone().requires_grad_()
    expected = seesaw_reference(logits, labels, counts, p, q, 1e-2)
    (expected_gradient,) = torch.autograd.grad(expected.mean(), logits)
    actual = lf.seesaw_loss(logits, labels, counts, p=p, q=q, reduction="none")
    (gradient,) = torch.autograd.grad(actual.mean(), logits)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)
    if q == 0:  # then nothing is held constant, and numerical differences apply
        assert twice_differentiable(lambda z: lf.seesaw_loss(z, labels[:5], counts, p=p, q=q), logits.detach())


def gml_reference(queries, labels, keys, key_labels, counts, temperature):
    losses = []
    present = sorted(set(key_labels.tolist()))
    for q, y in zip(queries, labels.tolist()):
        if y not in present:
            continue
        score = {
            c: counts[c] / sum(counts) * torch.exp(keys[key_labels == c] @ q / temperature).mean() for c in present
        }
        losses.append(-torch.log(score[y] / sum(score.values())))
    return torch.stack(losses)


def test_gaussian_mixture_likelihood_equation():
    generator = torch.Generator().manual_seed(3)
    queries = F.normalize(torch.randn(8, 5, dtype=torch.float64, generator=generator), dim=1)
    keys = F.normalize(torch.randn(10, 5, dtype=torch.float64, generator=generator), dim=1)
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 3, 3])
    key_labels = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 2, 2])  # class 3 has no key
    args = (labels, keys, key_labels, COUNTS)
    expected = gml_reference(queries, *args, 0.07)
    assert lf.gaussian_mixture_likelihood_loss(queries, *args).item() == pytest.approx(
        expected.mean().item(), rel=1e-12
    )
    rows = lf.gaussian_mixture_likelihood_loss(queries, *args, reduction="none")
    torch.testing.assert_close(rows[labels < 3], expected)
    assert (rows[labels == 3] == 0).all()
    small = lambda q: lf.gaussian_mixture_likelihood_loss(q, *args, temperature=0.5)
    assert gradcheck(small, queries.clone().requires_grad_())
    in_keys = lambda k: lf.gaussian_mixture_likelihood_loss(queries, labels, k, key_labels, COUNTS)
    assert gradcheck(in_keys, keys.clone().requires_grad_())


def test_gaussian_mixture_likelihood_without_any_key_is_zero_with_a_gradient():
    queries = torch.randn(3, 4, requires_grad=True)
    loss = lf.gaussian_mixture_likelihood_loss(
        queries, torch.tensor([0, 1, 1]), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), [1, 1]
    )
    loss.backward()
    assert loss.item() == 0 and (queries.grad == 0).all()


def test_gaussian_mixture_likelihood_far_keys_do_not_underflow():
    # Class 1's similarity lies 400 below class 0's: exp underflows unless each class has its own maximum.
    queries = torch.tensor([[1.0]])
    loss = lf.gaussian_mixture_likelihood_loss(
        queries,
        torch.tensor([1]),
        torch.tensor([[20.0], [-20.0]]),
        torch.tensor([0, 1]),
        [1, 1],
        temperature=0.1,
    )
    assert loss.item() == pytest.approx(400, rel=1e-12)


# Invariants.

counts_strategy = st.lists(st.floats(1e-3, 1e6), min_size=NUM_CLASSES, max_size=NUM_CLASSES)


@given(counts=counts_strategy, scale=st.floats(1e-4, 1e4), seed=st.integers(0, 1000), tau=st.floats(0, 3))
def test_scaling_counts_changes_nothing(counts, scale, seed, tau):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, NUM_CLASSES, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, NUM_CLASSES, (6,), generator=generator)
    scaled = [c * scale for c in counts]
    for function in (lf.balanced_softmax_loss, lambda *a: lf.logit_adjusted_loss(*a, tau=tau)):
        torch.testing.assert_close(
            function(logits, labels, counts), function(logits, labels, scaled), rtol=1e-9, atol=1e-9
        )
    torch.testing.assert_close(lf.ldam_margins(counts), lf.ldam_margins(scaled), rtol=1e-9, atol=1e-9)


@given(count=st.floats(1e-3, 1e6), seed=st.integers(0, 1000), tau=st.floats(0, 3))
def test_uniform_counts_give_cross_entropy(count, seed, tau):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, NUM_CLASSES, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, NUM_CLASSES, (6,), generator=generator)
    expected = F.cross_entropy(logits, labels)
    uniform = [count] * NUM_CLASSES
    torch.testing.assert_close(lf.logit_adjusted_loss(logits, labels, uniform, tau=tau), expected)
    torch.testing.assert_close(lf.seesaw_loss(logits, labels, uniform, q=0.0), expected)


def test_post_hoc_adjustment_undoes_the_loss(batch):
    # Training with the adjusted loss and testing plainly shifts scores as post-hoc adjustment does, up to a
    # constant.
    logits, labels = batch
    adjusted = lf.logit_adjustment(logits, COUNTS, tau=1.0)
    torch.testing.assert_close(lf.balanced_softmax_loss(adjusted, labels, COUNTS), F.cross_entropy(logits, labels))


ALL_LOSSES = {
    "balanced_softmax": lambda z, y: lf.balanced_softmax_loss(z, y, COUNTS),
    "logit_adjusted": lambda z, y: lf.logit_adjusted_loss(z, y, COUNTS, tau=1.3, weight=COUNTS),
    "pairwise_margin": lambda z, y: lf.pairwise_margin_loss(z, y, torch.ones(4), torch.ones(4, 4)),
    "ldam": lambda z, y: lf.ldam_loss(z, y, lf.ldam_margins(COUNTS), weight=torch.ones(4)),
    "balanced_sigmoid": lambda z, y: lf.balanced_sigmoid_loss(z, y, [0.5, 0.1, 0.01, 0.001]),
    "seesaw": lambda z, y: lf.seesaw_loss(z, y, COUNTS),
}


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_empty_batch_is_zero_with_a_gradient(name):
    logits = torch.zeros(0, NUM_CLASSES, requires_grad=True)
    loss = ALL_LOSSES[name](logits, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0 and logits.grad.shape == (0, NUM_CLASSES)


@pytest.mark.parametrize("name", ALL_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name, dtype, batch):
    logits = batch[0].to(dtype)
    half = logits.clone().requires_grad_()
    full = logits.float().requires_grad_()
    actual, expected = ALL_LOSSES[name](half, batch[1]), ALL_LOSSES[name](full, batch[1])
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected)
    actual.backward()
    expected.backward()
    assert half.grad.dtype == dtype
    torch.testing.assert_close(half.grad, full.grad.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_with_extreme_priors(dtype):
    # Log-priors relative to uniform from -14 to +6, beyond float16's resolution next to logits in the
    # hundreds.
    counts = torch.tensor([math.exp(-14.0), 1.0, math.exp(6.0)])
    logits = torch.tensor([[300.0, 301.0, 299.0], [-300.0, 0.0, 300.0]], dtype=dtype, requires_grad=True)
    labels = torch.tensor([0, 0])
    expected = F.cross_entropy(logits.detach().double() + counts.double().log(), labels)
    loss = lf.balanced_softmax_loss(logits, labels, counts)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-4)
    loss.backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", ALL_LOSSES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_logits_are_not_hidden(name, bad, batch):
    logits = batch[0].clone()
    logits[2, (batch[1][2] + 1) % NUM_CLASSES] = bad
    assert not torch.isfinite(ALL_LOSSES[name](logits, batch[1]))


# Bad input.


@pytest.mark.parametrize("name", ALL_LOSSES)
@pytest.mark.parametrize(
    "labels, message",
    [
        (torch.tensor([0, -1]), "must lie in"),
        (torch.tensor([0, 7]), "must lie in"),
        (torch.tensor([0]), "must have shape"),
        (torch.tensor([0.0, 1.0]), "must be int64"),
    ],
)
def test_bad_labels(name, labels, message):
    with pytest.raises(ValueError, match=message):
        ALL_LOSSES[name](torch.zeros(2, NUM_CLASSES), labels)


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_bad_logits_shape(name):
    with pytest.raises(ValueError, match="shape"):
        ALL_LOSSES[name](torch.zeros(NUM_CLASSES), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="floating point"):
        ALL_LOSSES[name](torch.zeros(2, NUM_CLASSES, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(
    "counts, message",
    [
        ([1, 2, 0, 3], r"class_counts must be positive.*2 \(0\)"),
        ([1, 2, -3, 3], r"2 \(-3\)"),
        ([1, 2, float("nan"), 3], r"2 \(nan\)"),
        ([1, 2, 3], "3 entries, but there are 4 classes"),
        ([[1, 2, 3, 4]], "must be a non-empty vector"),
    ],
)
def test_bad_counts(counts, message):
    logits, labels = torch.zeros(1, NUM_CLASSES), torch.zeros(1, dtype=torch.int64)
    for function in (lf.balanced_softmax_loss, lf.logit_adjusted_loss):
        with pytest.raises(ValueError, match=message):
            function(logits, labels, counts)
    with pytest.raises(ValueError, match=message):
        lf.logit_adjustment(logits, counts)


def test_other_bad_arguments():
    logits, labels = torch.zeros(1, NUM_CLASSES), torch.zeros(1, dtype=torch.int64)
    cases = [
        ("reduction", lambda: lf.balanced_softmax_loss(logits, labels, COUNTS, reduction="max")),
        ("weight must have", lambda: lf.balanced_softmax_loss(logits, labels, COUNTS, weight=[1.0])),
        ("alpha", lambda: lf.pairwise_margin_loss(logits, labels, torch.ones(3), torch.zeros(4, 4))),
        ("delta", lambda: lf.pairwise_margin_loss(logits, labels, torch.ones(4), torch.zeros(4, 3))),
        ("margins", lambda: lf.ldam_loss(logits, labels, torch.ones(3))),
        ("beta", lambda: lf.effective_number_weights(COUNTS, beta=1.0)),
        ("below 1", lambda: lf.balanced_sigmoid_loss(logits, labels, [0.1, 0.2, 1.0, 0.3])),
        ("accumulated_counts", lambda: lf.seesaw_loss(logits, labels, [1, 2, -1, 3])),
        ("accumulated_counts", lambda: lf.seesaw_loss(logits, labels, [1, 2, 3])),
        ("p and q", lambda: lf.seesaw_loss(logits, labels, COUNTS, p=-1)),
        (
            "dimensions",
            lambda: lf.gaussian_mixture_likelihood_loss(logits, labels, torch.ones(2, 3), labels, COUNTS),
        ),
        (
            "temperature",
            lambda: lf.gaussian_mixture_likelihood_loss(logits, labels, logits, labels, COUNTS, temperature=0),
        ),
        (
            "key_labels",
            lambda: lf.gaussian_mixture_likelihood_loss(logits, labels, logits, labels + 9, COUNTS),
        ),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()
