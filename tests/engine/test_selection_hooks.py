"""Best checkpoint, early stopping, validation loss, scalars by frequency group."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from detectron2.engine import HookBase, TrainerBase
from detectron2.utils.events import EventStorage

from lt_det.engine.hooks_groups import GroupScalars, group_scalars
from lt_det.engine.hooks_selection import BestCheckpoint, EarlyStop, EarlyStopping, ValidationLoss


class Values(HookBase):
    """Puts a metric into the storage at some iterations, as an evaluation does."""

    def __init__(self, values):
        self.values = values

    def after_step(self):
        if self.trainer.iter in self.values:
            self.trainer.storage.put_scalar("segm/AP", self.values[self.trainer.iter], smoothing_hint=False)


class Loop(TrainerBase):
    def run_step(self):
        pass


def train(hooks, length=10):
    trainer = Loop()
    saved = []
    trainer.checkpointer = SimpleNamespace(save=lambda name, iteration: saved.append((name, iteration)))
    trainer.register_hooks(hooks(trainer.checkpointer))
    try:
        trainer.train(0, length)
    except EarlyStop:
        pass
    return trainer, saved


VALUES = {1: 10.0, 3: 12.0, 5: math.nan, 7: 11.0, 9: 12.0}


def test_best_checkpoint():
    _, saved = train(lambda c: [Values(VALUES), BestCheckpoint(c, "segm/AP")])
    assert saved == [("model_best", 1), ("model_best", 3)]
    _, saved = train(lambda c: [Values(VALUES), BestCheckpoint(c, "segm/AP", mode="min", start_iter=2)])
    assert saved == [("model_best", 3), ("model_best", 7)]


def test_best_value_survives_a_resumption():
    hook = BestCheckpoint(None, "segm/AP")
    assert hook.state_dict() == {}
    hook.load_state_dict({"best": 11.5})

    def hooks(checkpointer):
        hook._checkpointer = checkpointer
        return [Values(VALUES), hook]

    assert train(hooks)[1] == [("model_best", 3)] and hook.state_dict() == {"best": 12.0}


def test_early_stopping():
    trainer, saved = train(lambda c: [Values(VALUES), EarlyStopping("segm/AP", 2)])
    assert trainer.iter == 7 and saved == [("model_final", 7)]  # 12, then NaN and 11
    trainer, saved = train(lambda c: [Values(VALUES), EarlyStopping("segm/AP", 3)])
    assert trainer.iter == 10 and not saved  # the last iteration ends it anyway
    trainer, _ = train(lambda c: [Values(VALUES), EarlyStopping("segm/AP", 1, mode="min")])
    assert trainer.iter == 3
    trainer, _ = train(lambda c: [Values(VALUES), EarlyStopping("segm/AP", 2, start_iter=4)])
    assert trainer.iter == 10
    with pytest.raises(ValueError, match="patience"):
        EarlyStopping("segm/AP", 0)


def test_group_scalars_by_hand():
    probabilities = torch.tensor(
        [[0.7, 0.1, 0.1, 0.1], [0.2, 0.5, 0.1, 0.2], [0.3, 0.1, 0.1, 0.5], [0.0, 0.4, 0.1, 0.5]]
    )
    labels = torch.tensor([0, 0, 3, 1])  # right, wrong, background, right (background is no foreground class)
    found = group_scalars(probabilities, labels, torch.tensor([0, 2, 1]))
    assert found == pytest.approx(
        {"accuracy_rare": 0.5, "score_rare": 0.45, "accuracy_frequent": 1.0, "score_frequent": 0.4}
    )
    assert group_scalars(probabilities[:0], labels[:0], torch.tensor([0, 2, 1])) == {}


class Counting(torch.nn.Module):
    """A model that counts, draws and normalises while it trains."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(1)
        self.register_buffer("count", torch.zeros(1))
        self.calls = 0

    def forward(self, batch):
        assert self.training and not self.norm.training
        self.count += 1
        self.calls += 1
        x = torch.tensor([[float(x)] for x in batch])
        return {"loss_a": self.norm(x).mean() + 0 * torch.rand(()), "loss_b": torch.rand(())}


def test_validation_loss_is_a_mean_over_images_and_leaves_no_trace():
    model = Counting()
    hook = ValidationLoss(5, model, lambda: [[[1, 2, 3]], [[6]]])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(3)
    draws = torch.rand(2)
    torch.manual_seed(3)
    torch.rand(1)
    with EventStorage():
        first, second = hook.compute(), hook.compute()
    assert first == second
    assert first["loss_a"] == pytest.approx(3 / math.sqrt(1 + 1e-5))
    assert first["total_loss"] == pytest.approx(first["loss_a"] + first["loss_b"])
    assert torch.rand(1) == draws[1]
    assert model.calls == 0 and model.norm.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_in_a_run(tiny_cfg, train, tmp_path):
    """Two stages with all of it on: the training is the same as without, and the files and scalars are there."""
    changes = ["TEST.EVAL_PERIOD", 2, "DATASETS.TEST", ("tiny_val",), "DECOUPLE.EVAL_STAGE1", False]
    plain = train(tiny_cfg("TEST.GROUP_SCALARS_PERIOD", 0, "OUTPUT_DIR", str(tmp_path / "plain")))[1]
    cfg = tiny_cfg(
        *changes, "TEST.BEST_METRIC", "validation/total_loss", "TEST.VALIDATION_LOSS.PERIOD", 3,
        "TEST.VALIDATION_LOSS.IMAGES", 4, "TEST.GROUP_SCALARS_PERIOD", 1, "TEST.EVAL_PERIOD", 0,
    )  # fmt: skip
    trainer, record = train(cfg)
    losses = lambda r: {i: {k: v for k, v in row.items() if "validation" not in k} for i, row in r.losses.items()}
    assert losses(plain) == losses(record)
    history = {name: h.values() for name, h in trainer.storage.histories().items()}
    assert [i for i, row in record.losses.items() if "validation/total_loss" in row] == [2, 5, 8]
    assert {"validation/loss_cls", "validation/loss_mask", "groups/accuracy_rare", "groups/score_rare"} <= set(history)
    assert {i for _, i in history["groups/prior_rare"]} == {5, 6, 7, 8}  # balanced softmax is stage 2's
    total = sum(history[f"groups/prior_{g}"][-1][0] for g in ("rare", "common", "frequent"))
    assert total == pytest.approx(1)
    best = torch.load(tmp_path / "out/model_best.pth", weights_only=False)
    values = {i: v for v, i in history["validation/total_loss"] if i >= 5}
    assert best["iteration"] == min(values, key=values.get)
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.json").read_text().splitlines()]
    assert any("validation/total_loss" in row for row in rows)


def test_early_stop_of_a_run(tiny_cfg, train, tmp_path):
    cfg = tiny_cfg(
        "DATASETS.TEST", ("tiny_val",), "DECOUPLE.ENABLED", False, "TEST.BEST_METRIC", "validation/total_loss",
        "TEST.VALIDATION_LOSS.PERIOD", 1, "TEST.VALIDATION_LOSS.IMAGES", 2, "TEST.PATIENCE", 1,
        "SOLVER.BASE_LR", 1e-12, "SOLVER.MAX_ITER", 50,
    )  # fmt: skip
    _, record = train(cfg)  # it cannot learn, but float32 may still find a smaller loss once or twice
    last = max(record.losses)
    assert last < 49 and torch.load(tmp_path / "out/model_final.pth", weights_only=False)["iteration"] == last + 1


@pytest.mark.parametrize(
    "options, message",
    [
        (["TEST.PATIENCE", 3], "TEST.PATIENCE waits for TEST.BEST_METRIC"),
        (["TEST.BEST_METRIC", "APr", "TEST.EVAL_PERIOD", 5], "it takes what evaluation reports"),
        (["TEST.BEST_METRIC", "segm/APr"], "needs TEST.EVAL_PERIOD"),
        (["TEST.BEST_METRIC", "validation/total_loss"], "needs TEST.VALIDATION_LOSS.PERIOD"),
    ],
)
def test_keys_that_contradict(tiny_cfg, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_cfg("DATASETS.TEST", ("tiny_val",), *options)


def test_no_counts_no_scalars(caplog):
    def groups():
        raise ValueError("no counts are known")

    hook = GroupScalars(lambda: torch.nn.Module(), groups, period=1)
    hook.trainer = SimpleNamespace(iter=0)
    with caplog.at_level("INFO"):
        hook.before_step()
        hook.before_step()
    assert caplog.text.count("no counts are known") == 1
