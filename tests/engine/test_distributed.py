"""Two gloo processes train as one process does on the same data, in all stages. All is computed in float64."""

import pytest
import torch
from two_processes import COMPARABLE, train_with_one_and_two


def assert_same(states):
    for name, value in states[0].items():
        # The queues keep their keys in float32: float64 values that differ by 1e-15 round alike, but for a rare one.
        atol = 1e-6 if value.dtype == torch.float32 else 1e-9
        torch.testing.assert_close(value, states[1][name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    assert any(value.dtype == torch.float64 for value in states[0].values())


@pytest.mark.parametrize(
    "meta",
    [
        (),
        ("META.NAME", "MetaReweighter", "META.LR", "0.1"),
        ("META.NAME", "MetaSampler", "META.LR", "0.1", "DECOUPLE.SAMPLER_TRAIN", "MetaSampler"),
    ],
    ids=["plain", "reweighter", "image_sampler"],
)
def test_two_stages(server, tiny_options, tiny_paths, repo_dir, tmp_path, meta):
    options = [*tiny_options, *COMPARABLE, "SOLVER.MAX_ITER", "3", "DECOUPLE.MAX_ITER", "3", *meta]
    config = repo_dir / "configs/glyph_balanced_softmax.yaml"
    states = train_with_one_and_two(server, config, options, tiny_paths, tmp_path)
    moved = torch.load(tmp_path / "out1/model_stage1.pth")["model"]["roi_heads.box_predictor.cls_score.weight"]
    assert not torch.equal(states[0]["roi_heads.box_predictor.cls_score.weight"], moved)
    if meta:
        assert states[0]["rates"].std() > 0.01
    assert_same(states)


@pytest.mark.parametrize("teacher_iterations", [0, 1], ids=["following_teacher", "own_teacher"])
def test_gml(server, tiny_options, tiny_paths, repo_dir, tmp_path, teacher_iterations):
    """The queues are of 64 keys: they overflow, so that the order of insertion counts."""
    node = "MODEL.LONG_TAIL.GML."
    options = [
        *tiny_options, *COMPARABLE, "SOLVER.MAX_ITER", "3", "TEACHER.MAX_ITER",
        teacher_iterations, "TEACHER.MOMENTUM", "0.9",
        node + "QUEUE_SIZE", "64", node + "QUEUE_BASE", "2", node + "PROJECTION_DIM", "8", node + "PROJECTION_NORM",
        "LN", node + "ALPHA", "0.5",
    ]  # fmt: skip
    states = train_with_one_and_two(server, repo_dir / "configs/glyph_gml.yaml", options, tiny_paths, tmp_path)
    assert states[0]["branches.0.queues.filled"].sum() > 8
    assert_same(states)
