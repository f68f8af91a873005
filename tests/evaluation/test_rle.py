"""Run-length kernels against pycocotools and Detectron2's mask pasting."""

import numpy as np
import pycocotools.mask as mask_utils
import pytest
import torch
from detectron2.layers import paste_masks_in_image
from hypothesis import given, settings
from hypothesis import strategies as st
from test_metrics_oracle import random_mask

from lt_det.evaluation import _rle_kernels as kernels
from lt_det.evaluation.rle import RleTable, encode_segmentations


def random_masks(seed, n=4):
    rng = np.random.default_rng(seed)
    h, w = int(rng.integers(1, 30)), int(rng.integers(1, 30))
    return np.stack([random_mask(rng, h, w) for _ in range(n)])


@settings(max_examples=200)
@given(st.integers(0, 2**32 - 1))
def test_codec_area_box_and_iou_equal_pycocotools(seed):
    masks = random_masks(seed)
    n, h, w = masks.shape
    reference = mask_utils.encode(np.asfortranarray(masks.transpose(1, 2, 0)))
    counts, start = kernels.encode_bitmaps(masks)
    table = RleTable.from_counts(counts, start, np.array([[h, w]] * n))
    assert table.strings() == [r["counts"] for r in reference]
    decoded, decoded_start = RleTable.from_strings([r["counts"] for r in reference], table.size).counts()
    np.testing.assert_array_equal(decoded, counts)
    np.testing.assert_array_equal(decoded_start, start)
    np.testing.assert_array_equal(kernels.areas(counts, start), mask_utils.area(reference))
    np.testing.assert_array_equal(np.add.reduceat(counts, start[:-1]), h * w)
    area, total = table.areas_and_totals()
    np.testing.assert_array_equal(area, mask_utils.area(reference))
    np.testing.assert_array_equal(total, h * w)
    boxes = kernels.bounding_boxes(counts, start, np.full(n, h))
    np.testing.assert_array_equal(boxes, mask_utils.toBbox(reference))
    for crowd in (0, 1):
        ious = np.empty(n * n)
        area = kernels.areas(counts, start)
        kernels.cell_mask_ious(
            np.array([0, n]), np.array([0]), np.array([n]), np.array([0]),
            counts, start, area, boxes, counts, start, area, boxes, np.full(n, bool(crowd)), ious,
        )  # fmt: skip
        expected = mask_utils.iou(reference, reference, [crowd] * n)
        np.testing.assert_array_equal(ious.reshape(n, n), expected)


@settings(max_examples=100)
@given(st.lists(st.integers(0, 2**31), min_size=1, max_size=12))
def test_any_counts_survive_the_string_form(values):
    counts = np.array(values, np.uint32)
    start = np.array([0, len(values)])
    table = RleTable.from_counts(counts, start, np.zeros((1, 2)))
    again, again_start = table.counts()
    np.testing.assert_array_equal(again, counts)
    np.testing.assert_array_equal(again_start, start)


@pytest.mark.parametrize("text", [b"o", b"0o", b"`````````0"])
def test_broken_strings_are_marked(text):
    """A number that does not end, or that is far too long, gives counts that fit no image."""
    counts, start = RleTable.from_strings([text, b"11"], np.zeros((2, 2))).counts()
    total = np.add.reduceat(counts.astype(np.int64), start[:-1])
    assert total[0] == 2**32 - 1 and total[1] == 2
    table = RleTable.from_strings([text, b"11"], np.zeros((2, 2)))
    np.testing.assert_array_equal(table.areas_and_totals()[1], [-1, 2])


def test_segmentation_forms_agree():
    polygon = [[2.0, 3.0, 9.0, 3.0, 9.0, 8.0, 2.0, 8.0], [12.0, 1.0, 15.0, 1.0, 15.0, 4.0]]
    size = np.array([[12, 20]])
    reference = mask_utils.merge(mask_utils.frPyObjects(polygon, 12, 20))
    mask = mask_utils.decode(reference)
    runs = np.diff(np.flatnonzero(np.concatenate([[True], np.diff(mask.T.ravel().astype(int)) != 0, [True]])))
    forms = [polygon, {"size": [12, 20], "counts": runs.tolist()}, reference]
    forms.append({"size": [12, 20], "counts": reference["counts"].decode()})
    for form in forms:
        table, problems = encode_segmentations([form], size)
        assert table.strings() == [reference["counts"]] and not problems
    for bad in ([], "polygon", {"size": [1, 2]}, None):
        table, problems = encode_segmentations([bad], size)
        assert table.strings() == [b""] and list(problems) == [0] and problems[0]


@pytest.mark.parametrize("resolution", [28, 14, 56])
def test_pasting_equals_detectron2(resolution):
    """Same pixels as paste_masks_in_image, but where the interpolated value is the threshold to rounding."""
    generator = torch.Generator().manual_seed(resolution)
    h, w, n = 97, 131, 60
    low = torch.rand(n, 2, generator=generator) * torch.tensor([w, h]) - 15
    boxes = torch.cat([low, low + torch.rand(n, 2, generator=generator) ** 2 * 120 + 16], 1)
    boxes[0] = torch.tensor([0.0, 0.0, w, h])
    boxes[1] = torch.tensor([30.0, 40.0, 30.4, 60.0])
    noise = torch.rand(n, 1, resolution, resolution, generator=generator)
    masks = torch.nn.functional.avg_pool2d(noise, 5, 1, 2)[:, 0].contiguous()
    expected = paste_masks_in_image(masks, boxes, (h, w)).numpy()
    counts, start = kernels.paste_and_encode(masks.numpy(), boxes.numpy(), h, w, 0.5)
    ours = np.stack(
        [np.repeat(np.arange(b - a) % 2, counts[a:b]).reshape(w, h).T for a, b in zip(start[:-1], start[1:])]
    )
    different = ours.astype(bool) != expected
    assert expected.any() and different.mean() < 1e-4
    # the soft values of the pixels that differ lie at the threshold
    soft = torch.stack([paste_masks_in_image(masks, boxes, (h, w), threshold=t) for t in (0.4999, 0.5001)]).numpy()
    assert (soft[0] != soft[1])[different].all()


def test_a_few_masks_of_a_large_buffer_are_read_alone(tmp_path):
    """Error analysis takes the masks of one image at a time; 20,000 copies of all of them took half an hour."""
    path = tmp_path / "buffer"
    with open(path, "wb") as file:
        file.truncate(1 << 42)  # 4 TB without content: more than any memory
        file.seek(1 << 41)
        file.write(b"abc")
    text = np.memmap(path, np.uint8, "r")
    begin = np.array([0, 1 << 41, 1 << 40])
    table = RleTable(text, begin, begin + [2, 3, 1], np.zeros((3, 2), np.int64))
    assert table.take([1, 0]).strings() == [b"abc", b"\0\0"]
