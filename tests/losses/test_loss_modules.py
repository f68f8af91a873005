"""What every loss in LOSS_REGISTRY must do, whatever its formula."""

import copy
import math

import pytest
import torch

from lt_det import losses
from lt_det.losses import BACKGROUND_RULES, LOSS_REGISTRY, PRIOR_SOURCES
from lt_det.losses.sigmoid import SigmoidLoss

K = 6
NAMES = sorted(name for name, _ in LOSS_REGISTRY)
pytestmark = pytest.mark.filterwarnings("error")


def build(name, statistics, **options):
    loss = LOSS_REGISTRY.get(name)(K, statistics=statistics, **options)
    loss.prepare()
    return loss


def draw(loss, num_rows=40, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(num_rows, loss.num_outputs(K), generator=generator, dtype=torch.float64) * 2
    if loss.wants_cosine:
        scores = scores.tanh()
    labels = torch.randint(0, K, (num_rows,), generator=generator)
    labels[torch.rand(num_rows, generator=generator) < 0.5] = K
    return scores.to(dtype).requires_grad_(), labels


def total(value):
    return sum(value.values()) if isinstance(value, dict) else value


def evaluate(loss, scores, labels, **kwargs):
    torch.manual_seed(0)
    return total(loss(scores, labels, **kwargs))


def test_a_loss_stands_in_the_file_of_its_name():
    for name, cls in LOSS_REGISTRY:
        assert cls.__module__ == f"lt_det.losses.{cls.config_node.lower()}" and getattr(losses, name) is cls
    exported = {v for v in vars(losses).values() if isinstance(v, type) and issubclass(v, losses.ClassificationLoss)}
    assert {cls.__name__ for cls in exported if cls.config_node} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_contract(name, class_statistics):
    loss = build(name, class_statistics)
    assert loss.config_node == loss.config_node.upper() != ""
    width = loss.num_outputs(K)
    bias = loss.initial_bias(K)
    assert bias.shape == (width,) and torch.isfinite(bias).all()
    scores, labels = draw(loss)
    value = evaluate(loss, scores, labels)
    assert value.shape == () and value.dtype == scores.dtype and torch.isfinite(value)
    value.backward()
    assert scores.grad.shape == scores.shape and scores.grad.abs().sum() > 0
    line = loss.describe()
    assert "\n" not in line and line.startswith(name)


@pytest.mark.parametrize("name", NAMES)
def test_activation(name, class_statistics):
    loss = build(name, class_statistics)
    scores, _ = draw(loss)
    probs = loss.activation(scores)
    assert probs.shape == (40, K + 1)
    assert (probs >= 0).all() and (probs <= 1).all()
    if loss.mutually_exclusive:
        torch.testing.assert_close(probs.sum(dim=1), torch.ones(40))
    elif type(loss).activation is SigmoidLoss.activation:
        torch.testing.assert_close(probs[:, :K], scores.sigmoid())
        assert (probs[:, K] == 0).all()
    assert loss.activation(scores[:0]).shape == (0, K + 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("labels", [torch.empty(0), torch.empty(0, dtype=torch.int64)], ids=["float", "int64"])
def test_empty_batch(name, labels, class_statistics):
    loss = build(name, class_statistics)
    scores = torch.zeros(0, loss.num_outputs(K), requires_grad=True)
    state = copy.deepcopy(loss.state_dict())
    value = evaluate(loss, scores, labels)
    value.backward()
    assert value.item() == 0 and scores.grad.shape == scores.shape
    torch.testing.assert_close(loss.state_dict(), state)


@pytest.mark.parametrize("name", NAMES)
def test_batches_of_background_or_of_foreground_only(name, class_statistics):
    for label in (K, 0):
        loss = build(name, class_statistics)
        scores, _ = draw(loss)
        value = evaluate(loss, scores, torch.full((40,), label))
        value.backward()
        assert torch.isfinite(value) and torch.isfinite(scores.grad).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name, dtype, class_statistics):
    loss = build(name, class_statistics)
    half, labels = draw(loss, dtype=dtype)
    full = half.detach().float().requires_grad_()
    expected = evaluate(copy.deepcopy(loss), full, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = evaluate(loss, half, labels)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected)
    actual.backward()
    expected.backward()
    assert half.grad.dtype == dtype
    torch.testing.assert_close(half.grad, full.grad.to(dtype))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_with_a_steep_prior_stays_finite(name, dtype, statistics_with):
    # LVIS v1 spans log-priors relative to uniform of about -6 to +4; this one -14 to +1.8, next to large
    # logits.
    statistics = statistics_with(
        [1, 10, 100, 1000, 10_000, 5_000_000], [1, 10, 100, 1000, 10_000, 9_000_000], 6_000_000
    )
    loss = build(name, statistics)
    scores, labels = draw(loss, dtype=dtype)
    big = (scores.detach() * (1 if loss.wants_cosine else 100)).requires_grad_()
    value = evaluate(loss, big, labels)
    value.backward()
    assert torch.isfinite(value) and torch.isfinite(big.grad).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_scores_make_the_loss_not_finite(name, bad, class_statistics):
    # Detectron2's trainer stops at a loss that is not finite; hiding it would train on garbage.
    loss = build(name, class_statistics)
    scores, labels = draw(loss)
    scores = scores.detach()
    labels[0], labels[1] = 3, K
    scores[:2] = bad
    assert not torch.isfinite(evaluate(loss, scores, labels))


@pytest.mark.parametrize("name", NAMES)
def test_roi_weights(name, class_statistics):
    loss = build(name, class_statistics).eval()
    scores, labels = draw(loss)
    plain = evaluate(loss, scores, labels)
    torch.testing.assert_close(evaluate(loss, scores, labels, roi_weights=torch.ones(40)), plain)
    torch.testing.assert_close(evaluate(loss, scores, labels, roi_weights=torch.full((40,), 0.5)), plain / 2)
    # A row of weight 0 has no gradient.
    weights = torch.ones(40)
    weights[7] = 0
    (gradient,) = torch.autograd.grad(evaluate(loss, scores, labels, roi_weights=weights), scores)
    assert (gradient[7] == 0).all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
def test_gradient_in_float64(name, class_statistics):
    loss = build(name, class_statistics, **({"q": 0.0} if name.startswith("Seesaw") else {})).double()
    scores, labels = draw(loss, dtype=torch.float64)
    evaluate(loss, scores, labels)  # some statistics to go by
    loss.eval()
    scores, labels = scores.detach()[:4].requires_grad_(), labels[:4]

    def function(z):
        return evaluate(loss, z, labels)

    assert torch.autograd.gradcheck(function, scores)
    assert torch.autograd.gradgradcheck(function, scores)


@pytest.mark.parametrize("name", NAMES)
def test_bad_arguments(name, class_statistics):
    loss = build(name, class_statistics)
    scores, labels = draw(loss)
    width = loss.num_outputs(K)
    bad = labels.clone()
    for value in (-1, K + 1):
        bad[3] = value
        with pytest.raises(ValueError, match=rf"{name}: labels must lie in \[0, {K}\]"):
            loss(scores, bad)
    with pytest.raises(ValueError, match="labels must be int64"):
        loss(scores, labels.float())
    with pytest.raises(ValueError, match="labels must have shape"):
        loss(scores, labels[:-1])
    with pytest.raises(ValueError, match=rf"scores must have shape \(R, {width}\)"):
        loss(torch.zeros(40, width + 3), labels)
    with pytest.raises(ValueError, match="roi_weights must have shape"):
        loss(scores, labels, roi_weights=torch.ones(3))


@pytest.mark.parametrize("name", NAMES)
def test_settings_that_a_loss_does_not_know(name, class_statistics):
    cls = LOSS_REGISTRY.get(name)
    with pytest.raises(ValueError, match=r"MODEL.LONG_TAIL.PRIOR.*'median'"):
        cls(K, statistics=class_statistics, prior="median")
    for rule in set(BACKGROUND_RULES) - set(cls.background_rules):
        with pytest.raises(ValueError, match="MODEL.LONG_TAIL.BACKGROUND"):
            cls(K, statistics=class_statistics, background=rule)
    for source in set(PRIOR_SOURCES) - set(cls.prior_sources):
        with pytest.raises(ValueError, match="MODEL.LONG_TAIL.PRIOR"):
            cls(K, statistics=class_statistics, prior=source)
    with pytest.raises(ValueError, match="num_classes"):
        cls(0, statistics=class_statistics)


@pytest.mark.parametrize("name", NAMES)
def test_every_named_setting_works(name, class_statistics):
    cls = LOSS_REGISTRY.get(name)
    for rule in cls.background_rules:
        for source in cls.prior_sources:
            loss = build(name, class_statistics, prior=source, background=rule)
            scores, labels = draw(loss)
            assert torch.isfinite(evaluate(loss, scores, labels))
            assert name in loss.describe()


@pytest.mark.parametrize("name", NAMES)
def test_statistics_are_read_lazily_and_once(name, class_statistics):
    calls = []

    def load():
        calls.append(1)
        return class_statistics

    loss = LOSS_REGISTRY.get(name)(K, statistics=load)
    assert not calls, "building a loss must not read the training annotations"
    loss.activation(torch.zeros(2, loss.num_outputs(K)))
    assert not calls or name == "BAGS", "nor must inference"
    scores, labels = draw(loss)
    evaluate(loss, scores, labels)
    evaluate(loss, scores, labels)
    assert len(calls) == (1 if loss.uses_statistics else 0)


@pytest.mark.parametrize("name", NAMES)
def test_missing_and_unfitting_statistics(name, statistics_with):
    cls = LOSS_REGISTRY.get(name)
    loss = cls(K)
    if not loss.uses_statistics:
        loss.prepare()
        return
    with pytest.raises(ValueError, match="needs class statistics"):
        loss.prepare()
    with pytest.raises(ValueError, match="NUM_CLASSES is 6"):
        cls(K, statistics=statistics_with([1, 2, 3], [1, 2, 3])).prepare()


@pytest.mark.parametrize("name", NAMES)
def test_zero_counts(name, statistics_with):
    statistics = statistics_with([0, 4, 11, 0, 150, 900], [0, 9, 30, 0, 1500, 4000])
    cls = LOSS_REGISTRY.get(name)
    loss = cls(K, statistics=statistics)
    if name in ("EQL", "DropLoss", "GOL", "ACSL", "BAGS", "Federated") or not loss.uses_statistics:
        loss.prepare()  # a class without images is a rare class
    else:
        with pytest.raises(ValueError, match=r"0 \(thing0\), 3 \(thing3\).*MIN_COUNT"):
            loss.prepare()
        loss = cls(K, statistics=statistics, min_count=1)
    scores, labels = draw(loss)
    assert torch.isfinite(evaluate(loss, scores, labels))


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints(name, class_statistics):
    """Priors are not in the checkpoint, accumulated statistics are, and make the loss what it was."""
    loss = build(name, class_statistics)
    scores, labels = draw(loss, num_rows=200)
    evaluate(loss, scores, labels)
    state = loss.state_dict()
    accumulated = {
        "Seesaw": {"accumulated_count"},
        "SeesawPCB": {"accumulated_count", "confusion", "batches"},
        "SoftmaxPCB": {"confusion", "batches"},
        "EQLv2": {"positive_gradient", "negative_gradient"},
        "LOCE": {"mean_score"},
        "BAGS": {"group"},
    }
    assert set(state) == accumulated.get(name, set())
    other = build(name, class_statistics)
    other.load_state_dict(copy.deepcopy(state))
    loss.eval(), other.eval()
    torch.testing.assert_close(evaluate(other, scores, labels), evaluate(loss, scores, labels), rtol=0, atol=0)


def test_bags_infers_from_a_checkpoint_alone(class_statistics):
    trained = build("BAGS", class_statistics)
    scores, _ = draw(trained)
    loss = LOSS_REGISTRY.get("BAGS")(K)
    loss.load_state_dict(trained.state_dict())
    torch.testing.assert_close(loss.activation(scores), trained.activation(scores))


def test_options_mirror_the_signature():
    assert LOSS_REGISTRY.get("Seesaw").options() == {"p": 0.8, "q": 2.0, "eps": 1e-2}
    assert LOSS_REGISTRY.get("Softmax").options() == {}
    assert LOSS_REGISTRY.get("BalancedSoftmax").options() == {"background_fraction": 0.0}
    nodes = [cls.config_node for _, cls in LOSS_REGISTRY]
    assert len(set(nodes)) == len(nodes)


@pytest.mark.parametrize("name", [n for n in NAMES if "bias_prior" in LOSS_REGISTRY.get(n).options()])
def test_bias_prior(name, class_statistics):
    options = {"base": "sigmoid"} if name == "ClassBalanced" else {}
    loss = build(name, class_statistics, bias_prior=0.02, **options)
    bias = loss.initial_bias(K)
    probability = loss.activation(bias[None])[0, :K] if name in ("GOL", "GumbelSigmoid") else bias.sigmoid()
    torch.testing.assert_close(probability, torch.full_like(probability, 0.02))
    assert (build(name, class_statistics, bias_prior=0.0, **options).initial_bias(K) == 0).all()
    with pytest.raises(ValueError, match="bias_prior"):
        build(name, class_statistics, bias_prior=1.0)


def test_bad_options(class_statistics):
    cases = [
        ("PairwiseMargin", {"setting": "none"}, "setting"),
        ("ClassBalanced", {"base": "hinge"}, "base"),
        ("Seesaw", {"p": -1.0}, "p and q"),
        ("EQL", {"rare_frequency": 2.0}, "rare_frequency"),
        ("ACSL", {"threshold": 1.0}, "threshold"),
        ("ACSL", {"rare_fraction": 1.5}, "fractions"),
        ("BAGS", {"bin_edges": (10, 5)}, "bin_edges"),
        ("BAGS", {"others_ratio": -1.0}, "others_ratio"),
        ("Focal", {"alpha": 2.0}, "alpha"),
        ("Federated", {"num_sampled": 0}, "num_sampled"),
        ("ECM", {"background_ratio": 0.0}, "background_ratio"),
        ("LOCE", {"momentum": 1.0}, "momentum"),
        ("LOCE", {"background_score": 0.0}, "scores must lie"),
        ("LogitAdjusted", {"background_fraction": 1.0}, "background_fraction"),
    ]
    for name, options, message in cases:
        with pytest.raises(ValueError, match=message):
            LOSS_REGISTRY.get(name)(K, statistics=class_statistics, **options)


def test_impossible_image_counts(statistics_with):
    statistics = statistics_with(num_images=10)
    with pytest.raises(ValueError, match="num_images 10"):
        LOSS_REGISTRY.get("BalancedSigmoid")(K, statistics=statistics).prepare()
    # A class in every image stays finite.
    loss = build("BalancedSigmoid", statistics_with(num_images=900))
    assert math.isclose(loss.log_odds[-1].item(), math.log(0.5 / 899.5), rel_tol=1e-5)
