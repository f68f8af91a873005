"""Calibrators against the papers' equations written out in float64, on every loss, and in whole detectors."""

import math

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.utils.events import EventStorage
from hypothesis import given
from hypothesis import strategies as st

from lt_det.data import ClassStatistics
from lt_det.losses import LOSS_REGISTRY
from lt_det.modeling import (
    CALIBRATOR_REGISTRY,
    LogitAdjustment,
    LogitMoments,
    LongTailOutputLayers,
    NorCal,
    TauNorm,
    build_calibrator,
)

K, D = 4, 8
COUNTS = [1, 4, 20, 75]
STATISTICS = ClassStatistics(COUNTS, [2, 4, 30, 300], 80, tuple("abcd"), fractal_dimension=[1.0, 1.0, 1.5, 1.9])
MOMENTS = (LogitMoments((-3.0, -1.0, 0.5, 2.0), (0.5, 0.7, 1.0, 2.0)),)
Z = [[0.3, -1.0, 2.0, 0.1, 1.5], [-2.0, 0.5, 0.0, 1.0, -0.5]]


def predictor(loss="Softmax", **kwargs):
    torch.manual_seed(0)
    return LongTailOutputLayers(
        ShapeSpec(channels=D),
        box2box_transform=Box2BoxTransform(weights=(10, 10, 5, 5)),
        num_classes=K,
        loss=loss,
        class_statistics=STATISTICS,
        **kwargs,
    )


def softmax(z):
    e = [math.exp(x) for x in z]
    return [x / sum(e) for x in e]


def probs(calibrator, layers, z=Z):
    return calibrator(torch.tensor(z, dtype=torch.float64), layers)


def close(found, wanted):
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=found.dtype), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_logit_adjustment_on_softmax(tau):
    """z_c - tau log(K pi_c), background's score as it is."""
    shift = [math.log(K * n / sum(COUNTS)) for n in COUNTS] + [0.0]
    wanted = [softmax([x - tau * a for x, a in zip(row, shift)]) for row in Z]
    close(probs(LogitAdjustment(tau, statistics=STATISTICS), predictor()), wanted)


@pytest.mark.parametrize("gamma", [0.4, 1.0])
def test_norcal_on_softmax(gamma):
    """exp(z_c) / N_c^gamma over the sum of all and exp(z_bg): the counts themselves, not shares."""
    wanted = []
    for row in Z:
        e = [math.exp(x) / n**gamma for x, n in zip(row, COUNTS)] + [math.exp(row[K])]
        wanted.append([x / sum(e) for x in e])
    close(probs(NorCal(gamma, statistics=STATISTICS), predictor()), wanted)


def test_norcal_by_hand():
    """Counts 1, 4, 9, 16 and gamma 1/2 divide by 1, 2, 3 and 4."""
    norcal = NorCal(0.5, statistics=ClassStatistics([1, 4, 9, 16], [1, 4, 9, 16], 80, tuple("abcd")))
    z = [[math.log(x) for x in (2, 4, 3, 8, 5)]]  # 2, 4/2, 3/3, 8/4 and background 5: 12 in all
    close(probs(norcal, predictor(), z), [[2 / 12, 2 / 12, 1 / 12, 2 / 12, 5 / 12]])
    # A score of 3/4 stands against a background of 1/4: 3/4 / 2 over 3/4 / 2 + 1/4 is 3/5.
    close(probs(norcal, predictor("Sigmoid"), [[math.log(3)] * K]), [[3 / 4, 3 / 5, 1 / 2, 3 / 7, 0]])


def test_on_sigmoids():
    """A class against its own background: sigmoid(z_c + log w_c)."""
    z = [row[:K] for row in Z]
    norcal = [[1 / (1 + math.exp(-x) * n**0.5) for x, n in zip(row, COUNTS)] + [0.0] for row in z]
    close(probs(NorCal(0.5, statistics=STATISTICS), predictor("Sigmoid"), z), norcal)
    share = [K * n / sum(COUNTS) for n in COUNTS]
    adjusted = [[1 / (1 + math.exp(-x) * s) for x, s in zip(row, share)] + [0.0] for row in z]
    close(probs(LogitAdjustment(1.0, statistics=STATISTICS), predictor("Sigmoid"), z), adjusted)


def test_cosine_scores_are_adjusted_after_their_scale():
    layers = predictor("LDAM")
    shift = [math.log(K * n / sum(COUNTS)) for n in COUNTS] + [0.0]
    z = [[0.1, 0.2, -0.1, 0.15, 0.12]]
    wanted = [softmax([30 * x - a for x, a in zip(z[0], shift)])]
    close(probs(LogitAdjustment(1.0, statistics=STATISTICS), layers, z), wanted)


def test_background_rules():
    layers, calibrator = predictor(), NorCal(1.0, statistics=STATISTICS, background="objectness")
    found = probs(calibrator, layers)
    trained = torch.tensor(Z, dtype=torch.float64).softmax(dim=1)
    assert torch.equal(found[:, -1], trained[:, -1])
    torch.testing.assert_close(found.sum(dim=1), torch.ones(2, dtype=torch.float64))
    weights = 1 / torch.tensor(COUNTS, dtype=torch.float64)
    ratio = found[:, 1:K] / found[:, :1]
    torch.testing.assert_close(ratio, trained[:, 1:K] / trained[:, :1] * weights[1:] / weights[0])
    with pytest.raises(ValueError, match="(?s)BACKGROUND 'objectness'.*Sigmoid decides each class by itself"):
        predictor("Sigmoid", calibrator=calibrator)


def test_prior_sources():
    sampled = STATISTICS.with_sampled_counts([3.0, 3.0, 3.0, 3.0])
    trained = torch.tensor(Z, dtype=torch.float64).softmax(dim=1)
    torch.testing.assert_close(probs(LogitAdjustment(1.0, statistics=sampled, prior="sampled"), predictor()), trained)
    found = probs(NorCal(1.0, statistics=STATISTICS, prior="instance_count"), predictor())
    e = [math.exp(x) / n for x, n in zip(Z[0], [2, 4, 30, 300])] + [math.exp(Z[0][K])]
    close(found[0], [x / sum(e) for x in e])


@given(
    st.lists(st.integers(1, 10**6), min_size=K, max_size=K),
    st.floats(0, 3),
    st.lists(st.floats(-15, 15), min_size=K + 1, max_size=K + 1),
)
def test_stays_a_distribution_and_favours_the_rare(counts, tau, z):
    statistics = ClassStatistics(counts, counts, 10**6, tuple("abcd"))
    layers = predictor()
    trained = layers.loss.activation(torch.tensor([z], dtype=torch.float64))[0]
    for calibrator in (LogitAdjustment(tau, statistics=statistics), NorCal(tau, statistics=statistics)):
        found = probs(calibrator, layers, [z])[0]
        assert found.sum().item() == pytest.approx(1) and (found >= 0).all()
        gain = (found / trained)[:K]
        order = np.argsort(counts)
        assert (gain[order][:-1] >= gain[order][1:] * (1 - 1e-9)).all()


def test_uniform_counts_change_nothing():
    uniform = ClassStatistics([7] * K, [9] * K, 10, tuple("abcd"))
    trained = torch.tensor(Z, dtype=torch.float64).softmax(dim=1)
    torch.testing.assert_close(probs(LogitAdjustment(1.5, statistics=uniform), predictor()), trained)


# ---- tau-norm


def trained_predictor(loss="Softmax", **kwargs):
    layers = predictor(loss, **kwargs)
    with torch.no_grad():
        scale = torch.linspace(0.2, 3, layers.cls_score.out_features)
        layers.cls_score.weight.copy_(torch.randn_like(layers.cls_score.weight) * scale[:, None])
        layers.cls_score.bias.copy_(torch.randn(len(scale)))
    return layers


@pytest.mark.parametrize("tau", [0.3, 1.0])
@pytest.mark.parametrize("background", ["keep", "normalize"])
@pytest.mark.parametrize("drop_bias", [False, True])
def test_tau_norm(tau, background, drop_bias):
    """The scores that a classifier with the normalised weights gives."""
    layers = trained_predictor()
    x = torch.randn(3, D)
    w, b = layers.cls_score.weight.double().clone(), layers.cls_score.bias.double().clone()
    norms = [math.sqrt(sum(v * v for v in row)) for row in w.tolist()]
    if background == "keep":
        mean = math.exp(sum(map(math.log, norms[:K])) / K)
        norms = [n / mean for n in norms[:K]] + [1.0]
    w = torch.stack([row / n**tau for row, n in zip(w, norms)])
    if drop_bias:
        b[: K + (background == "normalize")] = 0
    wanted = (x.double() @ w.T + b).softmax(dim=1)
    calibrator = TauNorm(tau, background=background, drop_bias=drop_bias)
    found = calibrator(layers.cls_score(x), layers)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)


def test_tau_norm_ranks_classes_alike_under_both_rules():
    layers = trained_predictor()
    scores = layers.cls_score(torch.randn(50, D))
    a, b = (TauNorm(1.0, background=rule, drop_bias=True)(scores, layers) for rule in ("keep", "normalize"))
    assert torch.equal(a[:, :K].argmax(1), b[:, :K].argmax(1))


def test_tau_norm_needs_a_linear_classifier():
    with pytest.raises(ValueError, match="no effect on a cosine classifier"):
        predictor("LDAM", calibrator=TauNorm())
    with pytest.raises(ValueError, match="no effect on a cosine classifier"):
        predictor(classifier="cosine", calibrator=TauNorm())
    with pytest.raises(ValueError, match="needs a linear classifier"):
        predictor(classifier=lambda d, k: torch.nn.Sequential(torch.nn.Linear(d, k)), calibrator=TauNorm())


# ---- every calibrator on every loss


@pytest.mark.parametrize("loss", sorted(name for name, _ in LOSS_REGISTRY))
def test_every_loss(loss):
    """0 is the model as trained, bit for bit; other values change it; the form that the loss states is right."""
    layers = predictor(loss)
    layers.loss.prepare()
    scores = torch.randn(6, layers.loss.num_outputs(K), generator=torch.Generator().manual_seed(1))
    trained = layers.loss.activation(scores)
    if layers.loss.mutually_exclusive:
        torch.testing.assert_close(trained.sum(dim=1), torch.ones(6))
    else:
        assert ((trained.sum(dim=1) - 1).abs() > 1e-3).any()
    for name, calibrator_class in CALIBRATOR_REGISTRY:
        options = {"statistics": STATISTICS} if calibrator_class.uses_statistics else {}
        options |= {"moments": MOMENTS} if name == "LogN" else {}
        if name in ("TauNorm", "LogN") and layers.loss.wants_cosine:
            continue
        assert torch.equal(calibrator_class(0.0, **options)(scores, layers), trained)
        found = calibrator_class(1.0, **options)(scores, layers)
        assert found.shape == (6, K + 1) and ((found >= 0) & (found <= 1)).all()
        assert not torch.allclose(found, trained)
        assert calibrator_class(1.0, **options)(scores[:0], layers).shape == (0, K + 1)


def test_half_precision():
    """Log weights of -14 to 6 do not overflow."""
    statistics = ClassStatistics([1, 10, 1000, 10**6], [1, 10, 1000, 10**6], 10**6, tuple("abcd"))
    for dtype in (torch.float16, torch.bfloat16):
        found = NorCal(2.0, statistics=statistics)(torch.tensor(Z).to(dtype) * 10, predictor())
        assert torch.isfinite(found).all() and found.dtype == torch.float32


# ---- in detectors


@pytest.mark.parametrize("kind", ["standard", "cascade", "c4"])
def test_stock_checkpoint(kind, stock_cfg, swap, batch, statistics_file, tmp_path):
    """A model of stock Detectron2 is calibrated by config keys alone; in a cascade each stage before the average."""
    cfg = stock_cfg(kind)
    torch.manual_seed(0)
    stock = build_model(cfg).eval()
    if kind == "cascade":  # an untrained cascade's stages agree too well to tell the order of average and weights
        for scale, layers in zip((1, 30, 300), stock.roi_heads.box_predictor):
            layers.cls_score.weight.data *= scale
    DetectionCheckpointer(stock, str(tmp_path)).save("stock")
    cfg = swap(cfg, kind)
    cfg.MODEL.LONG_TAIL.STATISTICS = statistics_file
    cfg.MODEL.LONG_TAIL.CALIBRATOR.NAME = "NorCal"
    cfg.MODEL.LONG_TAIL.CALIBRATOR.GAMMA = 0.5
    ours = build_model(cfg).eval()
    assert set(ours.state_dict()) == set(stock.state_dict())
    DetectionCheckpointer(ours).load(str(tmp_path / "stock.pth"))

    recorded = []
    heads = stock.roi_heads.box_predictor if kind == "cascade" else [stock.roi_heads.box_predictor]
    for layers in heads:
        layers.register_forward_hook(lambda module, args, out: recorded.append(out[0]))
    with torch.no_grad():
        stock(batch)
        results = ours(batch)
    counts = np.round(np.geomspace(1, 1000, 20))
    weights = torch.tensor(counts**-0.5)
    stages = []
    for scores in recorded:
        e = scores.double().exp()
        e[:, :20] *= weights
        stages.append(e / e.sum(dim=1, keepdim=True))
    possible = (sum(stages) / len(stages))[:, :20].flatten()
    found = torch.cat([r["instances"].scores for r in results])
    assert len(found) > 0
    distance = (found.double()[:, None] - possible).abs().min(dim=1).values
    assert (distance < 1e-6).all()
    assert not torch.isin(found, torch.cat([r["instances"].scores for r in stock(batch)])).all()


def test_training_is_not_calibrated(stock_cfg, swap, batch, statistics_file):
    losses = []
    for name in ("", "LogitAdjustment"):
        cfg = swap(stock_cfg("standard"), "standard")
        cfg.MODEL.LONG_TAIL.STATISTICS = statistics_file
        cfg.MODEL.LONG_TAIL.CALIBRATOR.NAME = name
        torch.manual_seed(0)
        model = build_model(cfg)
        torch.manual_seed(1)
        with EventStorage():
            losses.append({k: v.item() for k, v in model(batch).items()})
    assert losses[0] == losses[1]


def test_every_key_has_an_effect(stock_cfg, swap, statistics_file):
    cfg = swap(stock_cfg("standard"), "standard")
    cfg.MODEL.LONG_TAIL.STATISTICS = statistics_file
    layers = trained_predictor()
    layers.num_classes = 20
    torch.manual_seed(0)
    layers.cls_score = torch.nn.Linear(D, 21)
    scores = layers.cls_score(torch.randn(5, D) * 3)

    def result(*changes):
        changed = cfg.clone()
        changed.merge_from_list([x for k, v in zip(changes[::2], changes[1::2]) for x in (f"MODEL.LONG_TAIL.{k}", v)])
        calibrator = build_calibrator(changed)
        return None if calibrator is None else calibrator(scores, layers)

    assert result() is None
    adjusted = ("CALIBRATOR.NAME", "LogitAdjustment")
    tau_norm = ("CALIBRATOR.NAME", "TauNorm")
    for base, change in [
        (adjusted, ("CALIBRATOR.TAU", 0.5)),
        (adjusted, ("CALIBRATOR.BACKGROUND", "objectness")),
        (adjusted, ("CALIBRATOR.PRIOR", "instance_count")),
        (adjusted, ("MIN_COUNT", 50)),
        (("CALIBRATOR.NAME", "NorCal"), ("CALIBRATOR.GAMMA", 0.3)),
        (tau_norm, ("CALIBRATOR.TAU", 0.5)),
        (tau_norm, ("CALIBRATOR.BACKGROUND", "normalize")),
        (tau_norm, ("CALIBRATOR.DROP_BIAS", True)),
    ]:
        same = "PRIOR" in change[0]  # the file's instance counts are twice its image counts: the same shares
        assert torch.allclose(result(*base), result(*base, *change), rtol=1e-4) == same, change
    norcal = ("CALIBRATOR.NAME", "NorCal")
    assert not torch.allclose(result(*norcal), result(*norcal, "CALIBRATOR.PRIOR", "instance_count"))


def test_options_that_a_calibrator_does_not_have(stock_cfg, swap, statistics_file):
    cfg = swap(stock_cfg("standard"), "standard")
    cfg.MODEL.LONG_TAIL.STATISTICS = statistics_file
    node = cfg.MODEL.LONG_TAIL.CALIBRATOR
    node.NAME, node.TAU = "NorCal", 0.5
    with pytest.raises(
        ValueError, match="CALIBRATOR: NorCal has no option TAU.* Its options: BACKGROUND, GAMMA, PRIOR"
    ):
        build_calibrator(cfg)
    # Of the config's own calibrator: what a sweep of another one passes over.
    node.NAME = "TauNorm"
    assert build_calibrator(cfg, name="NorCal", value=0.2).value == 0.2
    node.GAMMA = 0.3
    with pytest.raises(ValueError, match="TauNorm has no option GAMMA"):
        build_calibrator(cfg)
    # As a config that an earlier version wrote has it: every key, at its default but for the calibrator's own.
    node = CfgNode({"NAME": "NorCal", "TAU": 1.0, "GAMMA": 0.4, "PRIOR": "image_count", "BACKGROUND": "keep"})
    old = CfgNode({"MODEL": {"LONG_TAIL": {"CALIBRATOR": {**node, "DROP_BIAS": False}}}})
    cfg = swap(stock_cfg("standard"), "standard")
    cfg.merge_from_other_cfg(old)
    assert build_calibrator(cfg).value == 0.4


def test_bad_settings(stock_cfg, swap):
    cfg = swap(stock_cfg("standard"), "standard")
    for key, value, message in [
        ("NAME", "Norcal", r"NAME is 'Norcal'.*did you mean NorCal or .*\? Known: .*LogitAdjustment, NorCal"),
        ("GAMMA", -1.0, "GAMMA .* must be finite and not negative"),
        ("GAMMA", float("nan"), "GAMMA .* must be finite"),
        ("PRIOR", "online", "PRIOR .* is 'online'; choose one of image_count"),
        ("BACKGROUND", "drop", "BACKGROUND .* is 'drop'; choose one of keep, objectness"),
    ]:
        bad = cfg.clone()
        bad.MODEL.LONG_TAIL.CALIBRATOR.NAME = "NorCal"
        bad.MODEL.LONG_TAIL.CALIBRATOR[key] = value
        with pytest.raises(ValueError, match=message):
            build_calibrator(bad)
    empty = ClassStatistics([0, 4, 20, 75], [0, 4, 30, 300], 80, ("ant", "b", "c", "d"))
    with pytest.raises(ValueError, match="ant"):
        probs(NorCal(0.5, statistics=empty), predictor())
    close(
        probs(NorCal(0.5, statistics=empty, min_count=1), predictor()),
        probs(NorCal(0.5, statistics=STATISTICS), predictor()).tolist(),
    )
    with pytest.raises(ValueError, match="needs class statistics"):
        probs(NorCal(0.5), predictor())
    with pytest.raises(ValueError, match="NUM_CLASSES is 4"):
        probs(NorCal(0.5, statistics=ClassStatistics([1, 2], [1, 2], 5, ("a", "b"))), predictor())
