"""Every part of bench_growth runs, at a few categories."""

import sys

import numpy as np
import pytest


@pytest.fixture
def bench_growth(repo_dir, monkeypatch):
    monkeypatch.syspath_prepend(str(repo_dir / "tools" / "benchmarks"))
    import bench_growth

    yield bench_growth
    sys.modules.pop("bench_growth")


def test_counts(bench_growth):
    assert bench_growth.class_counts(4, "uniform", 100).tolist() == [25, 25, 25, 25]
    # 1 + 1/2 + 1/3 + 1/4 = 25/12
    assert bench_growth.class_counts(4, "zipf", 100).tolist() == [48, 24, 16, 12]
    assert bench_growth.class_counts(1000, "zipf", 100).min() == 1


def test_every_part_runs(bench_growth, tmp_path, monkeypatch):
    from lt_det.losses import LOSS_REGISTRY

    for name, value in (("ROIS", 16), ("BOXES", 20), ("DETECTIONS", 2), ("KEYS", 64), ("IMAGES", 50)):
        monkeypatch.setattr(bench_growth, name, value)
    parts = list(bench_growth.parts_of(bench_growth.class_counts(6, "zipf", 300), tmp_path))
    names = [part.name for part in parts]
    assert {f"loss {name}" for name, _ in LOSS_REGISTRY} < set(names) and len(set(names)) == len(names)
    for part in parts:
        part.step()
        if part.name in ("classifier, linear", "evaluator"):
            assert bench_growth.megabytes(part) > 0 and np.isfinite(bench_growth.milliseconds(part, 1))
