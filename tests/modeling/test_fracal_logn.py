"""FRACAL and LogN against their equations, computed by hand and written out in float64."""

import json
import math

import pytest
import torch
from detectron2.modeling import build_model
from test_calibrators import COUNTS, STATISTICS, K, Z, close, predictor, probs, softmax

from lt_det.data import ClassStatistics
from lt_det.losses.functional import fracal_probabilities, logit_normalization
from lt_det.modeling import FRACAL, LogitMoments, LogN, box_predictors, build_calibrator
from lt_det.modeling.calibrators import moments_path, write_moments

DIMENSIONS = STATISTICS.fractal_dimension.tolist()
SHARE = [n / sum(COUNTS) for n in COUNTS]


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# ---- FRACAL


def test_fracal_by_hand():
    """Shares 1/20 and 19/20 of two classes: K f = 1/10 and 19/10, so z moves by 1 and by -log10(1.9). D = 1 and 2 at
    strength 2 divide by 1 and 4."""
    z = [[math.log(3) - 1, math.log(8) + math.log10(1.9), math.log(5)]]  # then e^z: 3, 8 / 4 and background's 5
    close(fracal_probabilities(tensor(z), [0.05, 0.95], [1.0, 2.0]), [[0.3, 0.2, 0.5]])
    # D^2 = 1 and 4 over their sum, times K: 2/5 and 8/5.
    z = [[math.log(3), math.log(1 / 4)]]
    wanted = [[0.75 * sigmoid(math.log(3) + 1 - math.log10(0.4)), 0.2 * sigmoid(-math.log(4) - math.log10(1.9 * 1.6))]]
    close(fracal_probabilities(tensor(z), [0.05, 0.95], [1.0, 2.0], sigmoid=True), wanted)


@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_fracal_as_published(strength):
    """The published steps one by one: shifted softmax, division by D^strength with background's D = 1, new sum."""
    wanted = []
    for row in Z:
        p = softmax([z - math.log10(K * f) for z, f in zip(row, SHARE)] + [row[K]])
        p = [x / d**strength for x, d in zip(p, [*DIMENSIONS, 1.0])]
        wanted.append([x / sum(p) for x in p])
    close(fracal_probabilities(tensor(Z), SHARE, DIMENSIONS, strength), wanted)
    close(probs(FRACAL(strength, statistics=STATISTICS), predictor()), wanted)

    total = sum(d**strength for d in DIMENSIONS)
    wanted = [
        [
            sigmoid(z) * sigmoid(z - math.log10(K * f) - math.log10(K * d**strength / total))
            for z, f, d in zip(row, SHARE, DIMENSIONS)
        ]
        for row in Z
    ]
    z = [row[:K] for row in Z]
    close(fracal_probabilities(tensor(z), SHARE, DIMENSIONS, strength, sigmoid=True), wanted)
    found = probs(FRACAL(strength, statistics=STATISTICS), predictor("Sigmoid"), z)
    close(found, [[*row, 0.0] for row in wanted])


def test_fracal_with_the_published_shares():
    """The published f is images of the class over images of the set: another constant on all classes but background."""
    images = 80
    published = [softmax([z - math.log10(K * n / images) for z, n in zip(row, COUNTS)] + [row[K]]) for row in Z]
    shifted = [row[:K] + [row[K] + math.log10(sum(COUNTS) / images)] for row in Z]
    close(fracal_probabilities(tensor(shifted), SHARE, [1.0] * K), published)


def test_fracal_without_frequency_and_space_is_the_model():
    uniform = fracal_probabilities(tensor(Z), [1 / K] * K, [1.7] * K, 0.0)
    torch.testing.assert_close(uniform, tensor(Z).softmax(1), rtol=1e-12, atol=0)


def test_fracal_refuses():
    z = tensor(Z)
    for share, dimensions, strength, message in [
        (COUNTS, DIMENSIONS, 2.0, "image_share must sum to 1, got 100: divide"),
        ([0.5, 0.5, 0.0, 0.0], DIMENSIONS, 2.0, "image_share must be positive"),
        (SHARE, DIMENSIONS[:3], 2.0, "dimensions has 3 entries, but there are 4 classes"),
        (SHARE, DIMENSIONS, -1.0, "strength must be finite and not negative"),
        (SHARE[:2] + [SHARE[2] + SHARE[3]], [1.0] * 3, 2.0, "4 columns for 3 classes and background, got 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            fracal_probabilities(z, share, dimensions, strength)
    flat = ClassStatistics(COUNTS, [2, 4, 30, 300], 80, tuple("abcd"))
    with pytest.raises(ValueError, match="FRACAL needs the boxes of the training set"):
        probs(FRACAL(statistics=flat), predictor())


# ---- LogN

MOMENTS = LogitMoments((-3.0, -1.0, 0.5, 2.0), (0.5, 0.7, 1.0, 2.0))


def test_logn_by_hand():
    """Means -1 and 1 with the smallest at -1, deviations 2 and 1/2: (4 - 0) / 2 and (4 - 2) * 2; background stays."""
    close(logit_normalization(tensor([[4.0, 4.0, 7.0]]), [-1.0, 1.0], [2.0, 0.5]), [[2.0, 4.0, 7.0]])
    close(logit_normalization(tensor([[4.0, 4.0]]), [-1.0, 1.0], [2.0, 0.5]), [[2.0, 4.0]])
    assert logit_normalization(torch.zeros(0, 3, dtype=torch.half), [-1.0, 1.0], [2.0, 0.5]).dtype == torch.half
    for mean, std, message in [
        ([-1.0, 1.0], [2.0, 0.0], "std must be positive"),
        ([-1.0], [2.0, 1.0], "mean must have shape"),
        ([-1.0, math.nan], [2.0, 1.0], "mean must be finite"),
        ([-1.0] * 4, [2.0] * 4, "4 columns or more, got 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            logit_normalization(torch.zeros(2, 3), mean, std)


@pytest.mark.parametrize("amount", [0.5, 1.0])
def test_logn_on_losses(amount):
    def normalised(row):
        low = min(MOMENTS.mean)
        return [(z - amount * (m - low)) / s**amount for z, m, s in zip(row, MOMENTS.mean, MOMENTS.std)]

    calibrator = LogN(amount, moments=[MOMENTS])
    close(probs(calibrator, predictor()), [softmax([*normalised(row), row[K]]) for row in Z])
    wanted = [[*map(sigmoid, normalised(row)), 0.0] for row in Z]
    close(probs(calibrator, predictor("Sigmoid"), [row[:K] for row in Z]), wanted)
    # Seesaw's two objectness scores are no class.
    z = [[*row[:K], 0.7, -0.4] for row in Z]
    objectness = softmax([0.7, -0.4])
    wanted = [[p * objectness[0] for p in softmax(normalised(row))] + objectness[1:] for row in Z]
    close(probs(calibrator, predictor("Seesaw"), z), wanted)


def test_logn_of_a_cascade(stock_cfg, swap, tmp_path):
    """Each stage has moments of its own."""
    cfg = swap(stock_cfg("cascade"), "cascade")
    stages = box_predictors(build_model(cfg))
    assert [p.cascade_stage for p in stages] == [0, 1, 2]
    moments = [LogitMoments(tuple(range(k, 20 + k)), tuple(1.0 + k + i for i in range(20))) for k in range(3)]
    calibrator = LogN(moments=moments)
    z = torch.randn(4, 21, dtype=torch.float64)
    for stage, m in zip(stages, moments):
        wanted = logit_normalization(z, m.mean, m.std).softmax(1)
        torch.testing.assert_close(calibrator(z, stage), wanted)
    with pytest.raises(ValueError, match="of 20 classes and 1 cascade stages, and the detector is of others"):
        LogN(moments=moments[:1])(z, stages[1])
    with pytest.raises(ValueError, match="does not know its stage; use LongTailCascadeROIHeads"):
        LogN(moments=[MOMENTS, MOMENTS])(tensor(Z), predictor())


def test_logn_file(tmp_path, stock_cfg, swap):
    path = tmp_path / "model_final.logn.json"
    assert moments_path(str(tmp_path / "model_final.pth")) == str(path)
    assert moments_path("detectron2://COCO/model_final.pkl") == ""
    cfg = swap(stock_cfg("standard"), "standard")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    cfg.MODEL.LONG_TAIL.CALIBRATOR.NAME = "LogN"
    layers = predictor()
    with pytest.raises(FileNotFoundError, match=r"there is no file '.*model_final.logn.json'; tools/fit_logn.py"):
        build_calibrator(cfg)(tensor(Z), layers)
    write_moments(path, [MOMENTS])
    wanted = LogN(moments=[MOMENTS])(tensor(Z), layers)
    assert torch.equal(build_calibrator(cfg)(tensor(Z), layers), wanted)
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.LONG_TAIL.CALIBRATOR.MOMENTS = str(path)
    assert torch.equal(build_calibrator(cfg)(tensor(Z), layers), wanted)
    content = json.loads(path.read_text())
    for broken in ("{", json.dumps({"format": "other"}), json.dumps({**content, "stages": [{"mean": [1.0]}]})):
        path.write_text(broken)
        with pytest.raises(ValueError, match="was not written by tools/fit_logn.py"):
            build_calibrator(cfg)(tensor(Z), layers)


def test_logn_refuses_cosines_that_the_loss_scales():
    with pytest.raises(ValueError, match="LDAM scales its cosines later"):
        predictor("LDAM", calibrator=LogN(moments=[MOMENTS]))
