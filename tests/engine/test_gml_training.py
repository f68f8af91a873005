"""GML in whole runs: teachers, keys, phases, resuming. (Two processes: test_distributed.py.)"""

import json

import numpy as np
import pytest
import torch

from lt_det.data import InOrderSampler
from lt_det.engine import LongTailTrainer, finish_config, get_lt_det_cfg
from lt_det.modeling import box_predictors

GML = (
    "MODEL.LONG_TAIL.GML.QUEUE_SIZE",
    64,
    "MODEL.LONG_TAIL.GML.QUEUE_BASE",
    2,
    "MODEL.LONG_TAIL.GML.PROJECTION_DIM",
    8,
)
OWN_TEACHER = ("TEACHER.MAX_ITER", 3, "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", (3,))


@pytest.fixture
def gml_cfg(tiny_options, repo_dir):
    """``gml_cfg("KEY", value, ...)``: the finished config of a GML run of 5 iterations, with changes."""

    def build(*changes):
        cfg = get_lt_det_cfg()
        cfg.merge_from_file(str(repo_dir / "configs/glyph_gml.yaml"))
        cfg.merge_from_list(["TEACHER.MAX_ITER", 0, *tiny_options, *GML, *changes])
        return finish_config(cfg)

    return build


def weights(trainer):
    state = dict(trainer.detector.state_dict())
    module = trainer.mutual_information
    state.update({f"branches.{k}": v for k, v in module.branches.state_dict().items()})
    state.update({f"teacher.{k}": v for k, v in module.teacher.state_dict().items()})
    return {k: v.clone() for k, v in state.items()}


def test_a_following_teacher(gml_cfg, train):
    trainer, record = train(gml_cfg("TEACHER.MOMENTUM", 0.5))
    assert {"loss_cls", "loss_gml", "loss_mask"} <= set(record.losses[0])
    assert all(np.isfinite(list(losses.values())).all() for losses in record.losses.values())
    module = trainer.mutual_information
    assert (module.branches[0].queues.filled >= 2).all()  # rare classes have keys from the first step on
    student, teacher = trainer.detector.state_dict(), module.teacher.detector.state_dict()
    name = "roi_heads.box_head.fc1.weight"
    assert not torch.equal(student[name], teacher[name])
    # What inference needs is a plain detector's state.
    assert not any("queue" in k or "projection" in k for k in student)
    saved = torch.load(f"{trainer.cfg.OUTPUT_DIR}/model_final.pth", weights_only=False)
    assert saved["model"].keys() == student.keys()


def test_momentum_moves_the_teacher(gml_cfg, train, tmp_path):
    """One step: teacher = m * start + (1 - m) * student; the start is the same for both momenta."""
    name = "roi_heads.box_head.fc1.weight"
    moved = []
    for momentum in (0.75, 1.0):
        out = str(tmp_path / str(momentum))
        cfg = gml_cfg(
            "TEACHER.MOMENTUM",
            momentum,
            "SOLVER.MAX_ITER",
            1,
            "SOLVER.STEPS",
            (),
            "OUTPUT_DIR",
            out,
            "SOLVER.WARMUP_ITERS",
            0,
        )
        trainer, _ = train(cfg)
        teacher = trainer.mutual_information.teacher.detector.state_dict()[name]
        moved.append((teacher, trainer.detector.state_dict()[name]))
    (teacher, student), (start, same) = moved
    assert torch.equal(student, same) and not torch.equal(student, start)
    torch.testing.assert_close(teacher, 0.75 * start + 0.25 * student)


def test_filling_queues_is_optional_and_moves_no_random_number(gml_cfg, train, tmp_path):
    _, filled = train(gml_cfg())
    empty_run, empty = train(gml_cfg("TEACHER.FILL_QUEUES", False, "OUTPUT_DIR", str(tmp_path / "b")))
    assert filled.losses[0]["loss_cls"] == empty.losses[0]["loss_cls"]
    assert filled.losses[0]["loss_gml"] != empty.losses[0]["loss_gml"]
    assert (empty_run.mutual_information.branches[0].queues.filled < 64).all()


def test_weights_of_the_losses(gml_cfg, train, tmp_path):
    """GAMMA, BETA and ALPHA scale their parts of the first iteration; without beta and alpha there is no teacher."""

    def first(name, *changes):
        node = "MODEL.LONG_TAIL.GML."
        keys = [x for key, value in changes for x in (node + key, value)]
        trainer, record = train(
            gml_cfg(*keys, "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", (), "OUTPUT_DIR", str(tmp_path / name))
        )
        return trainer, record.losses[0]

    _, plain = first("a", ("ALPHA", 1.0))
    _, scaled = first("b", ("ALPHA", 2.0), ("BETA", 3.0), ("GAMMA", 0.5))
    for name, factor in (("loss_distill", 2), ("loss_gml", 3), ("loss_cls", 0.5)):
        assert scaled[name] == pytest.approx(factor * plain[name], rel=1e-5), name
    trainer, alone = first("c", ("BETA", 0.0))
    assert trainer.mutual_information is None and "loss_gml" not in alone
    assert alone["loss_cls"] == plain["loss_cls"]


def test_a_phase_of_its_own_for_the_teacher(gml_cfg, train):
    cfg = gml_cfg(*OWN_TEACHER, "DATASETS.TEST", ("tiny_val",))
    trainer, record = train(cfg)
    assert sorted(record.losses) == list(range(7))
    assert "loss_gml" not in record.losses[2] and "loss_gml" in record.losses[3]
    saved = torch.load(f"{cfg.OUTPUT_DIR}/model_teacher.pth", weights_only=False)["model"]
    teacher = trainer.mutual_information.teacher.detector.state_dict()
    assert all(torch.equal(teacher[k], v) for k, v in saved.items())
    # The student started afresh, with a schedule of its own: warm-up again.
    assert record.lr[3] == pytest.approx(record.lr[0])
    assert (
        trainer.detector.state_dict()["roi_heads.box_head.fc1.weight"] - saved["roi_heads.box_head.fc1.weight"]
    ).abs().mean() > 0.01
    for folder in ("inference_stage0", "inference"):
        assert {"AP", "APr"} <= set(json.load(open(f"{cfg.OUTPUT_DIR}/{folder}/metrics.json"))["bbox"])


@pytest.mark.parametrize("options, stop_after", [((), 2), (OWN_TEACHER, 1), (OWN_TEACHER, 2), (OWN_TEACHER, 4)])
def test_resume_equals_uninterrupted(gml_cfg, interrupt_and_compare, options, stop_after):
    options = (*options, "TEACHER.MOMENTUM", 0.9, "MODEL.LONG_TAIL.GML.ALPHA", 0.5)
    resumed, _, whole, _ = interrupt_and_compare(gml_cfg, *options, stop_after=stop_after)
    a, b = weights(resumed), weights(whole)
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_a_finished_teacher_of_another_size(gml_cfg, train, tmp_path, tiny_options, repo_dir):
    """TEACHER.CONFIG and TEACHER.WEIGHTS: here stock Detectron2 heads of another width."""
    file = tmp_path / "teacher.yaml"
    cfg = get_lt_det_cfg()
    cfg.merge_from_file(str(repo_dir / "configs/glyph_softmax.yaml"))
    cfg.merge_from_list([*tiny_options, "MODEL.ROI_BOX_HEAD.FC_DIM", 24, "MODEL.ROI_HEADS.NAME", "StandardROIHeads",
    "OUTPUT_DIR",
                         str(tmp_path / "teacher")])  # fmt: skip
    first, _ = train(finish_config(cfg.clone()))
    file.write_text(cfg.dump())
    given = ("TEACHER.CONFIG", str(file), "TEACHER.WEIGHTS", str(tmp_path / "teacher/model_final.pth"))
    trainer, record = train(gml_cfg(*given, "MODEL.LONG_TAIL.GML.ALPHA", 1.0))
    module = trainer.mutual_information
    assert module.branches[0].queues.keys.shape == (64, 24)
    assert {"loss_gml", "loss_distill"} <= set(record.losses[0])
    for name, value in module.teacher.detector.state_dict().items():
        assert torch.equal(value, first.detector.state_dict()[name]), name
    with pytest.raises(ValueError, match="NUM_CLASSES 4, the student has 5"):
        LongTailTrainer(gml_cfg(*given, "MODEL.ROI_HEADS.NUM_CLASSES", 5))
    with pytest.raises(FileNotFoundError, match="TEACHER.WEIGHTS"):
        LongTailTrainer(gml_cfg("TEACHER.WEIGHTS", str(tmp_path / "none.pth")))


@pytest.mark.parametrize(
    "changes, message",
    [
        (("TEACHER.MAX_ITER", 3, "TEACHER.WEIGHTS", "x.pth"), "unset one of them"),
        (("TEACHER.CONFIG", "x.yaml"), "needs TEACHER.WEIGHTS"),
        (("TEACHER.MOMENTUM", 1.5), r"\[0, 1\]"),
        (("TEACHER.MAX_ITER", -1), "at least 0"),
        (("MODEL.LONG_TAIL.LOSS", "Softmax", "TEACHER.MAX_ITER", 3), "learns from no teacher; set it to GML"),
        (("DECOUPLE.ENABLED", True, "DECOUPLE.LOSS", "GML"), "stage 2 freezes"),
        (
            ("DECOUPLE.ENABLED", True, "DECOUPLE.LOSS", "LDAM", "TEACHER.MAX_ITER", 3, "DECOUPLE.START_ITER", 2),
            "START_ITER",
        ),
    ],
)
def test_contradicting_keys(gml_cfg, changes, message):
    with pytest.raises(ValueError, match=message):
        LongTailTrainer(gml_cfg(*changes))


def test_a_stage_two_after_gml(gml_cfg, train):
    cfg = gml_cfg("DECOUPLE.ENABLED", True, "DECOUPLE.LOSS", "BalancedSoftmax", "DECOUPLE.REINIT_CLASSIFIER", True)
    trainer, record = train(cfg)
    assert trainer.mutual_information is None and sorted(record.losses) == list(range(9))
    assert all(p.roi_observer is None for p in box_predictors(trainer.detector))


@pytest.mark.parametrize("size, batch, ranks", [(7, 2, 2), (3, 4, 2), (1, 1, 3), (8, 2, 2), (0, 2, 2)])
def test_in_order_sampler(monkeypatch, size, batch, ranks):
    from detectron2.utils import comm

    monkeypatch.setattr(comm, "get_world_size", lambda: ranks)
    seen, lengths = [], set()
    for rank in range(ranks):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        sampler = InOrderSampler(size, batch)
        indices = list(sampler)
        assert len(indices) == len(sampler) and len(indices) % batch == 0
        lengths.add(len(indices))
        seen += indices[: sampler.count]
    assert sorted(seen) == list(range(size)) and len(lengths) == 1
