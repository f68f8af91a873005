"""The CUDA paths, run without a GPU on fake tensors: no two devices meet, and where the host waits is in the documents.

What only a GPU can show (kernels, speed, NCCL, mixed precision by autocast) is not shown here.
"""

import copy
import re
from unittest import mock

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model, poolers
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from fake_cuda import Waits, fake_cuda
from torch import nn

from lt_det.data import ClassStatistics
from lt_det.engine import get_lt_det_cfg
from lt_det.gml import MutualInformation, Teacher, build_mutual_information
from lt_det.losses import LOSS_REGISTRY
from lt_det.meta import MetaDecoupledClassifier, MetaStep, build_learner
from lt_det.modeling import (
    CALIBRATOR_REGISTRY,
    DecoupledClassifier,
    LongTailMaskHead,
    LongTailOutputLayers,
    box_predictors,
    build_classifier,
)
from lt_det.modeling.calibrators.logn import LogitMoments
from lt_det.modeling.fast_inference import fast_rcnn_inference

K, ROWS, WIDTH = 20, 32, 8
HALVES = (torch.float16, torch.bfloat16)
LOSSES = sorted(name for name, _ in LOSS_REGISTRY)
CALIBRATORS = sorted(name for name, _ in CALIBRATOR_REGISTRY)


@pytest.fixture(scope="module")
def statistics():
    counts = np.round(np.geomspace(1, 1000, K)).astype(np.int64)
    names, dimension = tuple(f"class {i}" for i in range(K)), np.linspace(1, 2, K)
    return ClassStatistics(counts, counts * 2, 2000, names, fractal_dimension=dimension).with_sampled_counts(
        counts * 1.5
    )


@pytest.fixture(scope="module")
def listed(request):
    """The table of docs/scaling.md: from (file, function) to what it waits for."""
    text = (request.config.rootpath / "docs/scaling.md").read_text()
    rows = re.findall(r"^\| `(lt_det/[\w/]+\.py)` \| `(\w+)` \| ([^|]+) \|", text, re.M)
    return {(file, function): set(waits.strip().split(", ")) for file, function, waits in rows}


def twice(step) -> dict:
    """Where the second of two steps waits; the first one may prepare what stays."""
    with Waits():
        step()
    with Waits() as waits:
        step()
    return waits.places


def check(places: dict, listed: dict) -> None:
    for place, waits in places.items():
        assert waits <= listed.get(place, set()), f"{place} waits by {waits}: docs/scaling.md does not say so"


def make_loss(name, statistics):
    loss_class = LOSS_REGISTRY.get(name)
    extra = {"iterations": 1} if loss_class.needs_iterations else {}
    loss = loss_class(K, statistics=statistics, **extra)
    loss.remember_features(WIDTH)
    loss.prepare()
    return loss


def loss_step(name, dtype, statistics):
    loss = make_loss(name, statistics)
    columns = [c.tolist() for c in loss._columns()] if name == "BAGS" else []
    with fake_cuda():
        loss.to("cuda")
        if name == "BAGS":  # it reads its groups once, and fake tensors cannot tell how large they are
            on_device = [torch.tensor(c, device="cuda") for c in columns]
            loss._columns = lambda: on_device
        scores = torch.randn(ROWS, loss.num_outputs(K), device="cuda", dtype=dtype, requires_grad=True)
        labels = torch.randint(0, K + 1, (ROWS,), device="cuda")
        weights = torch.rand(ROWS, device="cuda")
        extra = {}
        if loss.wants_features:
            classifier = nn.Linear(WIDTH, K + 1, device="cuda", dtype=dtype)
            extra = {"features": torch.randn(ROWS, WIDTH, device="cuda", dtype=dtype), "classify": classifier}

        def step():
            scores.grad = None
            value = loss(scores, labels, roi_weights=weights, **extra)
            value = sum(value.values()) if isinstance(value, dict) else value
            assert value.device == scores.device and value.dtype == torch.float32
            value.backward()
            assert scores.grad.dtype == dtype
            assert loss.activation(scores).device == scores.device

        return twice(step)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, dtype, statistics, listed):
    check(loss_step(name, dtype, statistics), listed)


def classifier_step(name, dtype):
    module = build_classifier(name, WIDTH, K + 1, **({"learn_scale": True, "bias": True} if name == "cosine" else {}))
    with fake_cuda():
        module.to("cuda", dtype)
        x = torch.randn(ROWS, WIDTH, device="cuda", dtype=dtype, requires_grad=True)

        def step():
            scores = module(x)
            assert scores.dtype == dtype
            scores.sum().backward()

        return twice(step)


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=str)
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_classifiers(name, dtype):
    assert not classifier_step(name, dtype)


def calibrator_step(name, dtype, statistics, loss_name="Softmax"):
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.box_regression import Box2BoxTransform

    kind, options = CALIBRATOR_REGISTRY.get(name), {}
    if kind.uses_statistics:
        options["statistics"] = statistics
    if name == "LogN":
        options["moments"] = [LogitMoments((0.0,) * K, (1.0,) * K, 10, "")]
    predictor = LongTailOutputLayers(
        ShapeSpec(channels=WIDTH), num_classes=K, loss=make_loss(loss_name, statistics), calibrator=kind(**options),
        box2box_transform=Box2BoxTransform((1.0, 1.0, 1.0, 1.0)),
    )  # fmt: skip
    weights = {}
    if kind.uses_statistics:
        exclusive = predictor.loss.mutually_exclusive
        weights = {exclusive: predictor.calibrator.log_weights(K, mutually_exclusive=exclusive).tolist()}
    with fake_cuda():
        if kind.uses_statistics:  # worked out once, on the host
            predictor.calibrator._log_weights = {k: torch.tensor(w, dtype=torch.float64) for k, w in weights.items()}
        predictor.to("cuda", dtype)
        scores = predictor.cls_score(torch.randn(ROWS, WIDTH, device="cuda", dtype=dtype))

        def step():
            with torch.no_grad():
                assert predictor.calibrator(scores, predictor).device == scores.device

        return twice(step)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", CALIBRATORS)
def test_calibrators(name, dtype, statistics, listed):
    check(calibrator_step(name, dtype, statistics), listed)


def gml_step(dtype, statistics):
    loss = LOSS_REGISTRY.get("GML")(K, statistics=statistics, queue_size=200, alpha=0.5)
    branch = MutualInformation(loss, WIDTH, WIDTH)
    with fake_cuda():
        branch.to("cuda")
        labels = torch.randint(0, K + 1, (ROWS,), device="cuda")
        ids = torch.arange(ROWS, device="cuda")
        features = torch.randn(ROWS, WIDTH, device="cuda", dtype=dtype, requires_grad=True)
        scores = torch.randn(ROWS, K + 1, device="cuda", dtype=dtype, requires_grad=True)

        def step():
            branch.insert(features[:5], labels[:5], ids[:5])
            losses = branch(features.float(), labels, ids, scores=scores, teacher_logits=scores.detach())
            sum(losses.values()).backward()

        return twice(step)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gml_queues(dtype, statistics, listed):
    check(gml_step(dtype, statistics), listed)


def inference_step(dtype):
    with fake_cuda():
        boxes = torch.rand(1000, 4, device="cuda", dtype=dtype)
        scores = torch.rand(1000, K + 1, device="cuda", dtype=dtype)

        def step():
            for count in (10, 100_000):  # few candidates, and so many that only the best are looked at
                with mock.patch.object(torch, "count_nonzero", lambda _, count=count: count):
                    fast_rcnn_inference([boxes], [scores], [(100, 100)], 1e-4, 0.5, 10)

        return twice(step)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_inference(dtype, listed):
    check(inference_step(dtype), listed)


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=str)
def test_mask_head(dtype):
    from detectron2.layers import ShapeSpec

    head = LongTailMaskHead(ShapeSpec(channels=WIDTH, height=4, width=4), num_classes=K, conv_dims=[WIDTH, WIDTH])
    with fake_cuda():
        head.to("cuda", dtype).eval()
        instances = Instances((64, 64), pred_classes=torch.zeros(6, dtype=torch.int64, device="cuda"))
        with torch.no_grad(), Waits() as waits:
            head(torch.randn(6, WIDTH, 4, 4, device="cuda", dtype=dtype), [instances])
        assert instances.pred_masks.shape == (6, 1, 8, 8) and instances.pred_masks.device.type == "cuda"
    assert not waits.places


@pytest.mark.parametrize("name", ["Seesaw", "LOCE", "Federated"])
def test_without_waiting_is_the_same(name, statistics, monkeypatch):
    """What a GPU computes so as not to be waited for, all rows or classes and a mask, on the CPU in float64."""
    results = []
    for waits in (False, True):
        monkeypatch.setattr("lt_det.losses.base.reading_waits", lambda tensor, waits=waits: waits)
        monkeypatch.setattr("lt_det.losses.federated.reading_waits", lambda tensor, waits=waits: waits)
        torch.manual_seed(0)
        loss = make_loss(name, statistics).double()
        scores = torch.randn(ROWS, loss.num_outputs(K), dtype=torch.float64).requires_grad_()
        labels, weights = torch.randint(0, K + 1, (ROWS,)), torch.rand(ROWS, dtype=torch.float64)
        labels[:5] = K
        extra = {}
        if loss.wants_features:
            features, weight = torch.randn(2, ROWS, WIDTH, dtype=torch.float64)
            extra = {"features": features, "classify": lambda x, w=weight: x @ w[: K + 1].T}
        values = loss(scores, labels, roi_weights=weights, **extra)
        values = values if isinstance(values, dict) else {"loss_cls": values}
        sum(values.values()).backward()
        results.append([*values.values(), scores.grad, *loss.buffers()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


# ------------------------------------------------------------------------------------------ phases of a whole detector


def _images():
    for count in (3, 2):
        instances = Instances((96, 128))
        instances.gt_boxes = Boxes(torch.rand(count, 4) * 40)
        instances.gt_classes = torch.randint(0, K, (count,))
        instances.gt_masks = BitMasks(torch.zeros(count, 96, 128, dtype=torch.bool))
        image = torch.zeros(3, 96, 128, dtype=torch.uint8)
        yield {"image": image, "instances": instances, "height": 96, "width": 128}


@pytest.fixture(scope="module")
def detector(request, statistics):
    """From the name of a loss to a small detector on the CPU."""

    def build(loss):
        cfg = get_lt_det_cfg()
        cfg.merge_from_file(request.config.rootpath / "configs/glyph_softmax.yaml")
        cfg.merge_from_list([
            "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.ROI_HEADS.NUM_CLASSES", K, "MODEL.FPN.OUT_CHANNELS", 16,
            "MODEL.ROI_BOX_HEAD.FC_DIM", 16, "MODEL.ROI_MASK_HEAD.CONV_DIM", 16, "MODEL.RESNETS.DEPTH", 18,
            "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16,
        ])  # fmt: skip
        found = build_model(cfg)
        for predictor in box_predictors(found):
            predictor.set_loss(make_loss(loss, statistics), reinit=True)
        return found

    return build


def _same_size(tensors, *args, **kwargs):
    return ImageList(torch.stack(tensors), [tuple(t.shape[-2:]) for t in tensors])


@pytest.fixture
def detectron2_on_fakes(monkeypatch):
    """Two functions of Detectron2 that read sizes back, which fake tensors have not."""
    monkeypatch.setattr(ImageList, "from_tensors", staticmethod(_same_size))

    def numbered(boxes, sizes):
        return torch.cat([boxes.new_zeros(len(boxes), 1), boxes], dim=1)

    monkeypatch.setattr(poolers, "_convert_boxes_to_pooler_format", numbered)


def re_weighted(model):
    for predictor in box_predictors(model):
        predictor.loss.set_drw(True)
    return model


def with_rates(learner):
    def build(model):
        model.to("cuda")  # before an optimizer takes its parameters
        optimizer = torch.optim.SGD([p for b in box_predictors(model) for p in b.cls_score.parameters()], lr=0.1)
        step = MetaStep(
            build_learner(learner, K), LOSS_REGISTRY.get("Softmax")(K), optimizer=optimizer, balance_rois=True,
            open_batches=lambda start: iter(lambda: list(_images()), None),
        )  # fmt: skip
        return MetaDecoupledClassifier(model, step)

    return build


def student(model):
    return build_mutual_information(model, Teacher(copy.deepcopy(model)), momentum=0.9)


# The detector's loss, and what trains it.
PHASES = {
    "plain": ("BalancedSoftmax", lambda model: model),
    "re-weighted": ("LDAM", re_weighted),
    "decoupled": ("BalancedSoftmax", DecoupledClassifier),
    "meta": ("BalancedSoftmax", with_rates("MetaReweighter")),
    "meta, RoIs drawn": ("BalancedSoftmax", with_rates("MetaSampler")),
    "GML": ("GML", student),
}


def phase_step(phase, detector):
    loss, build = PHASES[phase]
    model = detector(loss)
    module = None if phase.startswith("meta") else build(model)
    with EventStorage(0), fake_cuda():
        with Waits():
            module = build(model) if module is None else module
            module.to("cuda").train()
        with Waits() as waits:
            losses = module(list(_images()))
            sum(losses.values()).backward()
            if phase == "GML":
                module.update_teacher()
            if phase == "plain":
                model.eval()
                with torch.no_grad():
                    model(list(_images()))
        return waits.places


def test_float32_and_phases(statistics, detector, detectron2_on_fakes, listed):
    """All of the above in float32, and a whole detector in each kind of stage: the waits are those that are listed."""
    runs = [loss_step(name, torch.float32, statistics) for name in LOSSES]
    runs += [calibrator_step(name, torch.float32, statistics) for name in CALIBRATORS]
    runs += [gml_step(torch.float32, statistics), inference_step(torch.float32)]
    runs += [phase_step(phase, detector) for phase in PHASES]
    found: dict = {}
    for places in runs:
        for place, waits in places.items():
            found.setdefault(place, set()).update(waits)
    assert found == listed
