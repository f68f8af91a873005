"""A compiled scanner for detection results in json. numba is imported here, so import this lazily.

It takes what writers of results usually write. A result with a number that it does not read for certain is left to a
library; so is the whole text where it meets anything else.
"""

import numpy as np
from numba import njit

from .json_kernels import (
    _BACKSLASH,
    _CLOSE,
    _CLOSE_LIST,
    _EXACT,
    _INTEGER,
    _OPEN,
    _OPEN_LIST,
    _QUOTE,
    _UNCERTAIN,
    _WRONG,
    _is,
    _key,
    _next_member,
    _skip_space,
    _skip_value,
    _word,
    first_byte,
    parse_box,
    parse_number_fast,
)
from .results import BOX, CATEGORY, IMAGE, MASK, SCORE, UNCERTAIN

_IMAGE_ID, _CATEGORY_ID, _SCORE = _word(b"image_id"), _word(b"category_id"), _word(b"score")
_BBOX, _SEGMENTATION = _word(b"bbox"), _word(b"segmentation")
_SIZE, _COUNTS = _word(b"size"), _word(b"counts")


@njit(cache=True, nogil=True)
def _size(text, p, size):
    """``[height, width]``; the place behind, or -1."""
    if text[p] != _OPEN_LIST:
        return -1
    p = _skip_space(text, p + 1)
    for i in range(2):
        value, p, kind = parse_number_fast(text, p)
        if kind != _INTEGER or value < 0 or value >= 2**31:
            return -1
        size[i] = np.int64(value)
        p, closed = _next_member(text, p, _CLOSE_LIST)
        if p < 0 or closed != (i == 1):
            return -1
    return p


@njit(cache=True, nogil=True)
def _mask(text, p, out, written, size):
    """``{"size": [h, w], "counts": "..."}``; the string goes to ``out``. The place behind, or -1, and the number of
    bytes written so far."""
    if text[p] != _OPEN:
        return -1, written
    p = _skip_space(text, p + 1)
    found = 0
    closed = False
    while not closed:
        a, b, p = _key(text, p)
        if p < 0:
            return -1, written
        if _is(text, a, b, _SIZE) and not found & 1:
            p = _size(text, p, size)
            found |= 1
        elif _is(text, a, b, _COUNTS) and text[p] == _QUOTE and not found & 2:
            p += 1
            c = text[p]
            while c != _QUOTE:
                if c < 48 or c > 111:  # what run lengths are written in
                    return -1, written
                if c == _BACKSLASH:
                    p += 1
                    if text[p] != _BACKSLASH:
                        return -1, written
                out[written] = c
                written += 1
                p += 1
                c = text[p]
            p += 1
            found |= 2
        else:
            return -1, written
        if p < 0:
            return -1, written
        p, closed = _next_member(text, p, _CLOSE)
        if p < 0:
            return -1, written
    return (p if found == 3 else -1), written


@njit(cache=True, nogil=True)
def scan_results(text, image, category, score, boxes, fields, end, size, masks, span):
    """Reads ``[{..}, ..]``; row i is result i.

    Args:
        text: (n + PADDING,) uint8, zeros at the end.
        image, category (m,) int64, score (m,), boxes (m, 4) float64; fields (m,) uint8: what the result has, and
            ``UNCERTAIN`` where a library has to read it.
        end (m,), size (m, 2) int64: where the string of its mask ends in ``masks``, and the mask's size.
        masks: (n,) uint8, the strings of all masks.
        span: (m, 2) int64, where the result stands in ``text``.

    Returns:
        The number of results, -1 where the text is not as usual; and the length of the strings.
    """
    return _scan(first_byte(text), image, category, score, boxes, fields, end, size, masks, span)


@njit(cache=True, nogil=True)
def _scan(text, image, category, score, boxes, fields, end, size, masks, span):
    row, written = 0, 0
    p = _skip_space(text, 0)
    if text[p] != _OPEN_LIST:
        return -1, written
    p = _skip_space(text, p + 1)
    closed = False
    while not closed:
        if text[p] != _OPEN or row == fields.shape[0]:
            return -1, written
        span[row, 0] = p
        p = _skip_space(text, p + 1)
        have = 0
        image[row], category[row], score[row], boxes[row], size[row] = 0, 0, np.nan, 0.0, 0
        end_of_object = False
        while not end_of_object:
            a, b, p = _key(text, p)
            if p < 0:
                return -1, written
            if _is(text, a, b, _BBOX):
                field = BOX
                p, _, certain = parse_box(text, p, boxes[row])
                if not certain:
                    have |= UNCERTAIN
            elif _is(text, a, b, _SEGMENTATION):
                field = MASK
                p, written = _mask(text, p, masks, written, size[row])
            elif _is(text, a, b, _SCORE):
                field = SCORE
                score[row], p, kind = parse_number_fast(text, p)
                if kind == _WRONG:
                    return -1, written
                if kind == _UNCERTAIN:
                    have |= UNCERTAIN
            elif _is(text, a, b, _IMAGE_ID) or _is(text, a, b, _CATEGORY_ID):
                value, p, kind = parse_number_fast(text, p)
                if kind != _INTEGER or abs(value) >= _EXACT:
                    return -1, written
                if b - a == _IMAGE_ID.shape[0]:
                    field = IMAGE
                    image[row] = np.int64(value)
                else:
                    field = CATEGORY
                    category[row] = np.int64(value)
            else:
                field = 0
                p = _skip_value(text, p)
            if p < 0 or have & field:  # a field twice
                return -1, written
            have |= field
            p, end_of_object = _next_member(text, p, _CLOSE)
            if p < 0:
                return -1, written
        fields[row], end[row], span[row, 1] = have, written, p
        row += 1
        p, closed = _next_member(text, p, _CLOSE_LIST)
        if p < 0:
            return -1, written
    return (row if text[_skip_space(text, p)] == 0 else -1), written
