"""Class rates to weights: sums kept, derivatives right, draws by the rates."""

import pytest
import torch

from lt_det.meta import LEARNERS, MetaReweighter, RoISampler, build_learner


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


COUNTS = torch.tensor([5, 0, 1, 40])


@pytest.mark.parametrize("name", LEARNERS)
def test_weights_keep_the_sum(name):
    learner = build_learner(name, 4).double()
    assert torch.equal(learner.rates, torch.full((4,), 0.5, dtype=torch.float64))
    for seed in range(5):
        with torch.no_grad():
            learner.logits.normal_(std=2, generator=generator(seed))
        weights = learner.class_weights(COUNTS, generator=generator(seed))
        assert (weights * COUNTS).sum().item() == pytest.approx(46)
        assert weights[1] == 0 and (weights >= 0).all()
        # ... so moving all rates alike does nothing to the first order.
        (gradient,) = torch.autograd.grad((weights * COUNTS).sum(), learner.logits)
        assert gradient.abs().max() < 1e-9


@pytest.mark.parametrize("name", LEARNERS)
def test_batch_without_foreground(name):
    learner = build_learner(name, 4)
    weights = learner.class_weights(torch.zeros(4, dtype=torch.int64), generator=generator())
    weights.sum().backward()
    assert torch.equal(weights, torch.zeros(4)) and torch.equal(learner.logits.grad, torch.zeros(4))


def test_reweighter_is_the_official_rule():
    """BALMS's LVIS code: w_i = sigmoid(psi_yi); losses times w / sum w times their number."""
    learner = MetaReweighter(4).double()
    with torch.no_grad():
        learner.logits.copy_(torch.tensor([0.3, -1.0, 2.0, -0.5]))
    labels = torch.repeat_interleave(torch.arange(4), COUNTS)
    losses = torch.rand(len(labels), dtype=torch.float64)
    w = learner.logits.sigmoid()[labels]
    expected = (w * losses / w.sum() * len(labels)).sum()
    got = (learner.class_weights(COUNTS, generator=generator())[labels] * losses).sum()
    torch.testing.assert_close(got, expected)
    for value in (got, expected):
        value.backward(retain_graph=True)
    gradient, learner.logits.grad = learner.logits.grad / 2, None
    expected.backward()
    torch.testing.assert_close(gradient, learner.logits.grad)


def test_sampler_draws_by_the_rates():
    """Draws of class c are binomial with n_c r_c / sum n r; the straight-through derivative is of the same sign."""
    learner = RoISampler(4).double()
    with torch.no_grad():
        learner.logits.copy_(torch.tensor([2.0, 0.0, 1.0, -2.0]))
    share = COUNTS * learner.rates / (COUNTS * learner.rates).sum()
    g, trials = generator(), 400
    draws = torch.stack([learner.class_weights(COUNTS, generator=g).detach() * COUNTS for _ in range(trials)])
    torch.testing.assert_close(draws, draws.round())  # whole draws
    mean, sigma = draws.mean(dim=0), (46 * share * (1 - share) / trials).sqrt()
    assert ((mean - 46 * share).abs() <= 4 * sigma + 1e-12).all()
    draws_of_rarest = learner.class_weights(COUNTS, generator=generator())[2]
    draws_of_rarest.backward()
    assert learner.logits.grad[2] > 0 and (learner.logits.grad[[0, 3]] < 0).all() and learner.logits.grad[1] == 0


def test_straight_through_derivative_is_the_softmax():
    """With one draw: d weight_c / d psi is that of the perturbed softmax, over n_c."""
    learner = RoISampler(2, temperature=0.7).double()
    counts = torch.tensor([1, 0])
    assert learner.class_weights(counts, generator=generator()).tolist() == [1, 0]
    counts = torch.tensor([1, 1])
    weights = learner.class_weights(counts, generator=generator())
    (got,) = torch.autograd.grad(weights[0], learner.logits)
    u = torch.rand(2, 2, generator=generator(), dtype=torch.float64)
    z = (learner.logits.sigmoid().log() - (-u.log()).log()) / 0.7
    (expected,) = torch.autograd.grad(z.softmax(dim=1)[:, 0].sum(), learner.logits)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", LEARNERS)
def test_rates_already_applied(name):
    """Where the images are drawn by the rates, their RoIs count as they come, and learning still has its direction."""
    learner = build_learner(name, 4).double()
    with torch.no_grad():
        learner.logits.copy_(torch.tensor([0.3, -1.0, 2.0, -0.5]))
    equal = build_learner(name, 4).double()
    weights = learner.class_weights(COUNTS, generator=generator(), applied=True)
    torch.testing.assert_close(weights, equal.class_weights(COUNTS, generator=generator()))
    weights[2].backward()
    assert learner.logits.grad[2] > 0


def test_errors():
    with pytest.raises(ValueError, match="META.NAME is 'Reweighter'.*MetaReweighter, MetaSampler"):
        build_learner("Reweighter", 3)
    with pytest.raises(ValueError, match="num_classes"):
        MetaReweighter(0)
    with pytest.raises(ValueError, match="temperature"):
        RoISampler(3, temperature=0.0)
