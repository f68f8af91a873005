"""A compiled scanner for the annotations of an LVIS or COCO json. numba is imported here, so import this lazily.

One pass over the text gives columns and the numbers of all polygons. What is not as usual is left to a library: an
object, or a whole block of them.
"""

import numpy as np
from numba import njit

from .annotations import AREA, BOX, CATEGORY, CROWD, FLOATS, ID, IGNORE, IMAGE, INTEGERS, NONE, ODD, OTHER, SEGMENTATION
from .json_kernels import (
    _CLOSE,
    _CLOSE_LIST,
    _EXACT,
    _INTEGER,
    _OPEN,
    _OPEN_LIST,
    _REAL,
    _is,
    _key,
    _next_member,
    _skip_space,
    _skip_value,
    _word,
    first_byte,
    parse_box,
    parse_number,
    parse_number_fast,
)

_NAMES = (_word(b"id"), _word(b"image_id"), _word(b"category_id"))
_BBOX, _AREA, _ISCROWD, _IGNORE = _word(b"bbox"), _word(b"area"), _word(b"iscrowd"), _word(b"ignore")
_SEGMENTATION, _KEYPOINTS = _word(b"segmentation"), _word(b"keypoints")
_NULL = _word(b"null")


@njit(cache=True, nogil=True)
def _polygons(text, p, values, num_values, part_end, num_parts):
    """``[[x, y, ...], ...]`` of three points or more, all integers or all not.

    Returns:
        (place behind, kind, numbers and parts so far, largest absolute number), kind OTHER where it is something else,
        then without a place.
    """
    if _is(text, p, p + 4, _NULL):
        return p + 4, NONE, num_values, num_parts, 0.0
    if text[p] != _OPEN_LIST:
        return -1, OTHER, num_values, num_parts, 0.0
    p = _skip_space(text, p + 1)
    if text[p] == _CLOSE_LIST:
        return p + 1, NONE, num_values, num_parts, 0.0
    v, part, integers, reach = num_values, num_parts, 0, 0.0
    closed = False
    while not closed:
        if text[p] != _OPEN_LIST:
            return -1, OTHER, num_values, num_parts, 0.0
        p = _skip_space(text, p + 1)
        start = v
        end_of_part = False
        while not end_of_part:
            value, p, kind = parse_number_fast(text, p)
            if kind != _INTEGER and kind != _REAL:
                return -1, OTHER, num_values, num_parts, 0.0
            integers += kind == _INTEGER
            reach = max(reach, abs(value))
            values[v] = value
            v += 1
            if text[p] == 44 and text[p + 1] == 32:  # ", ", as nearly always
                p += 2
            else:
                p, end_of_part = _next_member(text, p, _CLOSE_LIST)
                if p < 0:
                    return -1, OTHER, num_values, num_parts, 0.0
        if v - start < 6 or (v - start) % 2 == 1:
            return -1, OTHER, num_values, num_parts, 0.0
        part_end[part] = v
        part += 1
        p, closed = _next_member(text, p, _CLOSE_LIST)
        if p < 0:
            return -1, OTHER, num_values, num_parts, 0.0
    if integers != 0 and integers != v - num_values:
        return -1, OTHER, num_values, num_parts, 0.0
    return p, (INTEGERS if integers else FLOATS), v, part, reach


@njit(cache=True, nogil=True)
def scan_annotations(text, numbers, area, reach, box, box_integer, fields, kind, parts, span, part_end, values):
    """Reads ``[{..}, ..]``; row i is object i.

    Args:
        text: (n + PADDING,) uint8, zeros at the end.
        numbers: (5, m) int64 id, image_id, category_id, iscrowd, ignore; area, reach (m,), box (m, 4) float64;
            box_integer (m,) uint8, bit k: number k is an integer; fields (m,) uint16, what the object has; kind (m,)
            uint8; parts (m,) int32, polygons; span (m, 2) int64, where the object stands in ``text``.
        part_end: (n // 2 + 1,) int64, of each polygon the number of numbers up to its end; values (n // 2 + 1,).

    Returns:
        Objects, polygons and numbers, or -1 objects where the text is not as usual.
    """
    return _scan(first_byte(text), numbers, area, reach, box, box_integer, fields, kind, parts, span, part_end, values)


@njit(cache=True, nogil=True)
def _scan(text, numbers, area, reach, box, box_integer, fields, kind, parts, span, part_end, values):
    p = _skip_space(text, 0)
    if text[p] != _OPEN_LIST:
        return -1, 0, 0
    p = _skip_space(text, p + 1)
    row, num_parts, num_values = 0, 0, 0
    closed = False
    while not closed:
        if text[p] != _OPEN or row == fields.shape[0]:
            return -1, 0, 0
        span[row, 0] = p
        p = _skip_space(text, p + 1)
        have = 0
        numbers[:3, row], numbers[3, row], numbers[4, row] = 0, -1, 0
        area[row], reach[row], box[row], box_integer[row], kind[row], parts[row] = 0.0, 0.0, 0.0, 0, NONE, 0
        first_part = num_parts
        end_of_object = False
        while not end_of_object:
            a, b, p = _key(text, p)
            if p < 0:
                return -1, 0, 0
            field = 0
            for i in range(3):
                if _is(text, a, b, _NAMES[i]):
                    field = 1 << i
            if _is(text, a, b, _BBOX):
                field = BOX
            elif _is(text, a, b, _AREA):
                field = AREA
            elif _is(text, a, b, _ISCROWD):
                field = CROWD
            elif _is(text, a, b, _IGNORE):
                field = IGNORE
            elif _is(text, a, b, _SEGMENTATION):
                field = SEGMENTATION
            elif _is(text, a, b, _KEYPOINTS):
                have |= ODD
            if have & field:
                have |= ODD  # twice
            have |= field
            end = -1
            if field == SEGMENTATION:
                end, kind[row], num_values, num_parts, reach[row] = _polygons(
                    text, p, values, num_values, part_end, num_parts
                )
                parts[row] = num_parts - first_part
                if end < 0:
                    end = _skip_value(text, p)
            elif field == BOX:
                end, box_integer[row], certain = parse_box(text, p, box[row])
                if not certain:
                    end = -1
            elif field != 0:
                value, end, what = parse_number(text, p)
                if field == AREA and (what == _INTEGER or what == _REAL):
                    area[row] = value
                elif field != AREA and what == _INTEGER and abs(value) < _EXACT:
                    column = 0 if field == ID else 1 if field == IMAGE else 2 if field == CATEGORY else 3
                    numbers[4 if field == IGNORE else column, row] = np.int64(value)
                else:
                    end = -1
            if end < 0:
                if field != 0:
                    have |= ODD
                end = _skip_value(text, p)
                if end < 0:
                    return -1, 0, 0
            p, end_of_object = _next_member(text, end, _CLOSE)
            if p < 0:
                return -1, 0, 0
        span[row, 1] = p
        fields[row] = have
        row += 1
        p, closed = _next_member(text, p, _CLOSE_LIST)
        if p < 0:
            return -1, 0, 0
    if text[_skip_space(text, p)] != 0:
        return -1, 0, 0
    return row, num_parts, num_values
