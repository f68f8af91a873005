"""Fractal dimensions, against the rule written out as loops and a least-squares fit of numpy's."""

import numpy as np
import pytest
from detectron2.structures import BoxMode

from lt_det.data import ClassStatistics, fractal_dimensions, open_datasets, register_dataset


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


def test_from_every_kind_of_data_set(tiny_paths):
    """The annotation file, its mapped records and Detectron2's dicts in either box mode give the same dimensions."""
    paths = tiny_paths["train"]
    register_dataset("fractal_tiny", paths.json_file, paths.image_root)
    wanted = ClassStatistics.from_json(paths.json_file).fractal_dimension
    assert (wanted > 1).any()
    records = open_datasets("fractal_tiny", filter_empty=False)
    lists = [[dict(r, annotations=[dict(a) for a in r["annotations"]]) for r in records] for _ in range(2)]
    for record in lists[1]:
        for a in record["annotations"]:
            a["bbox"], a["bbox_mode"] = BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS), BoxMode.XYXY_ABS
    for source in (records, *lists):
        found = ClassStatistics.from_dataset_dicts(source, len(wanted)).fractal_dimension
        np.testing.assert_allclose(found, wanted, rtol=1e-12)
    del lists[0][0]["width"]
    assert ClassStatistics.from_dataset_dicts(lists[0], len(wanted)).fractal_dimension is None
