"""The scanner of annotations against Python's json module."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lt_det.io import annotations
from lt_det.io.annotations import FLOATS, INTEGERS, NONE, ODD, OTHER, scan_annotations


@pytest.fixture(autouse=True, scope="module")
def whatever_the_length():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(annotations, "_SCANNED_FROM_BYTES", 0)
        yield


numbers = st.one_of(
    st.floats(-1e4, 1e4).map(lambda v: round(v, 2)), st.floats(allow_nan=False, allow_infinity=False),
    st.integers(-(10**4), 10**4), st.integers(),
)  # fmt: skip
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)
floats = st.lists(st.floats(-1e3, 1e3), min_size=6, max_size=8)
integers = st.lists(st.integers(-1000, 1000), min_size=6, max_size=8)
usual = {
    "id": st.integers(0, 10**6), "image_id": st.integers(0, 10**6), "category_id": st.integers(1, 1203),
    "bbox": st.lists(numbers, min_size=4, max_size=4), "area": numbers,
    "segmentation": st.one_of(st.lists(floats, max_size=3), st.lists(integers, max_size=2), values),
}  # fmt: skip
more = {
    "iscrowd": st.one_of(st.integers(0, 1), values),
    "ignore": st.integers(0, 1),
    "keypoints": values,
    "note": values,
}


def kind_of(segmentation):
    if segmentation is None or segmentation == []:
        return NONE
    parts = segmentation if isinstance(segmentation, list) else [None]
    if not all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in parts):
        return OTHER
    types = {type(v) for p in parts for v in p}
    return {frozenset({float}): FLOATS, frozenset({int}): INTEGERS}.get(frozenset(types), OTHER)


@settings(max_examples=200)
@given(
    st.lists(st.fixed_dictionaries(usual, optional=more), min_size=1, max_size=4),
    st.sampled_from([None, 1]), st.booleans(),
)  # fmt: skip
def test_columns_are_those_of_json(content, indent, ascii_only):
    """Every column, of all that is not marked as unusual; and numbers to the last bit."""
    text = json.dumps(content, indent=indent, ensure_ascii=ascii_only)
    block = scan_annotations(text.encode())
    assert len(block) == len(content)
    ends = np.insert(block.part_end, 0, 0)
    part = 0
    for i, (element, fields, kind) in enumerate(zip(json.loads(text), block.fields, block.kind)):
        assert block.element(i) == element
        polygons = [block.values[a:b] for a, b in zip(ends[part:], ends[part + 1 :])][: block.parts[i]]
        part += block.parts[i]
        # A number of many digits, which is not certain, may make any mask another one.
        wanted = kind_of(element["segmentation"])
        assert kind == wanted or (kind == OTHER and wanted in (FLOATS, INTEGERS))
        if kind in (FLOATS, INTEGERS):
            for ours, theirs in zip(polygons, element["segmentation"], strict=True):
                assert ours.tolist() == [float(v) for v in theirs]
        if fields & ODD:
            continue
        assert [block.identifier[i], block.image[i], block.category[i]] == [
            element["id"], element["image_id"], element["category_id"],
        ]  # fmt: skip
        assert block.crowd[i] == element.get("iscrowd", -1) and block.ignore[i] == element.get("ignore", 0)
        assert block.area[i] == element["area"] and block.box[i].tolist() == [float(v) for v in element["bbox"]]
        assert block.box_integer[i] == sum((type(v) is int) << k for k, v in enumerate(element["bbox"]))


@pytest.mark.parametrize(
    "number", ["0.1", "-0.07", "1e-7", "123456789012345", "1234567890.12345678", "5e0", "0", "-3.0"]
)
def test_a_polygon_to_the_last_bit(number):
    block = scan_annotations(b'[{"segmentation": [[' + ", ".join([number] * 6).encode() + b"]]}]")
    assert block.values.tolist() == [float(number)] * 6
    assert block.kind[0] == (INTEGERS if number.lstrip("-").isdigit() else FLOATS)


@pytest.mark.parametrize(
    "text",
    [
        "[", "[{}]", "[1, 2]", '[{"a"}]', '[{"a": }]', '[{"a": [1}]}]', '[{"a": "b}]', '[{"a": tru}]', '[{"a": -}]',
        '[{"a": 1.}]', '[{"id": 1}', '[{"id": 1},]', '[{"id": 1}] x', '[{"id": 01}]',
        '[{"segmentation": [[1, 2, 3, 4, 5, 6]}]',
    ],
)  # fmt: skip
def test_what_is_not_usual_is_left_to_a_library(text):
    assert scan_annotations(text.encode()) is None


def test_unusual_fields_are_marked():
    texts = ['"id": "7"', '"id": 1.0', '"id": 1e3', '"iscrowd": true', '"bbox": [1, 2, 3]', '"id": 1, "id": 2',
             '"keypoints": [1]', '"image_id": 9007199254740993']  # fmt: skip
    block = scan_annotations(("[" + ", ".join("{" + t + "}" for t in texts) + "]").encode())
    assert (block.fields & ODD).all()
    assert not (scan_annotations(b'[{"id": 1, "other": {"a": [1, "]"]}}]').fields & ODD).any()


def test_short_texts_are_left_to_a_library(monkeypatch):
    monkeypatch.setattr(annotations, "_SCANNED_FROM_BYTES", 100)
    assert scan_annotations(b'[{"id": 1}]') is None
