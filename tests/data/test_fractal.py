"""Fractal dimensions, against the rule written out as loops and a least-squares fit of numpy's."""

import numpy as np
import pytest

from lt_det.data import fractal_dimensions


def by_loops(centers, classes, num_classes, max_grid):
    result = []
    for c in range(num_classes):
        points = centers[classes == c]
        if len(points) < 4:
            result.append(1.0)
            continue
        grids = [g for g in range(1, max_grid + 1) if g * g <= len(points)]
        cells = [len({(int(x * g), int(y * g)) for x, y in points}) for g in grids]
        slope = np.polyfit(np.log(grids), np.log(cells), 1)[0] if len(grids) > 1 else 1.0
        result.append(max(1.0, slope))
    return np.array(result)


@pytest.mark.parametrize("max_grid", [1, 2, 7, 64])
def test_equals_the_rule(max_grid):
    random = np.random.default_rng(max_grid)
    counts = [0, 1, 3, 4, 5, 9, 30, 400, 5000]
    classes = np.repeat(np.arange(len(counts)), counts)
    centers = random.random((len(classes), 2))
    centers[classes == 7] = centers[classes == 7] * 0.2 + 0.4  # one corner of the image
    shuffle = random.permutation(len(classes))
    centers, classes = centers[shuffle], classes[shuffle]
    expected = by_loops(centers, classes, len(counts) + 1, max_grid)
    np.testing.assert_allclose(fractal_dimensions(centers, classes, len(counts) + 1, max_grid), expected, atol=1e-9)


def test_known_shapes():
    side = (np.arange(64) + 0.5) / 64
    plane = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)  # one in each cell of the finest grid
    line = np.stack([np.linspace(0, 1, 4096, endpoint=False), np.full(4096, 0.3)], 1)
    point = np.full((4096, 2), 0.5)
    classes = np.repeat([0, 1, 2], 4096)
    plane_dim, line_dim, point_dim = fractal_dimensions(np.concatenate([plane, line, point]), classes, 3)
    assert plane_dim == pytest.approx(2.0, abs=1e-12)
    assert line_dim == pytest.approx(1.0, abs=1e-12)
    assert point_dim == 1.0  # its slope is 0


def test_no_objects():
    assert fractal_dimensions(np.zeros((0, 2)), np.zeros(0, int), 3).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "centers, classes",
    [([[0.5, 1.0]], [0]), ([[np.nan, 0.5]], [0]), ([[0.5, 0.5]], [2]), ([[0.5, 0.5]], [-1]), ([[0.5, 0.5]], [0, 1])],
)
def test_wrong_input(centers, classes):
    with pytest.raises(ValueError):
        fractal_dimensions(centers, classes, 2)
