"""A compiled scanner for the annotations of an LVIS or COCO json. numba is imported here, so import this lazily.

One pass over the text gives columns and the numbers of all polygons. What is not as usual is left to a library: an
object, or a whole block of them.
"""

import sys

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .annotations import AREA, BOX, CATEGORY, CROWD, FLOATS, ID, IGNORE, IMAGE, INTEGERS, NONE, ODD, OTHER, SEGMENTATION
from .json_kernels import (
    _BACKSLASH,
    _CLOSE,
    _CLOSE_LIST,
    _EXACT,
    _INTEGER,
    _OPEN,
    _OPEN_LIST,
    _POWERS,
    _QUOTE,
    _REAL,
    _WRONG,
    _is,
    _key,
    _next_member,
    _skip_space,
    _word,
    parse_number,
)

_NAMES = (_word(b"id"), _word(b"image_id"), _word(b"category_id"))
_BBOX, _AREA, _ISCROWD, _IGNORE = _word(b"bbox"), _word(b"area"), _word(b"iscrowd"), _word(b"ignore")
_SEGMENTATION, _KEYPOINTS = _word(b"segmentation"), _word(b"keypoints")
_NULL, _TRUE, _FALSE = _word(b"null"), _word(b"true"), _word(b"false")
_DEEPEST = 60
_LITTLE_ENDIAN = sys.byteorder == "little"
# All of one type, so that numba computes in it.
_ONE, _THREE, _EIGHT, _TEN, _SIXTEEN, _THIRTY_TWO = (np.uint64(n) for n in (1, 3, 8, 10, 16, 32))
_ZEROS, _BEYOND_NINE, _HIGH_BITS = (np.uint64(byte * 0x0101010101010101) for byte in (0x30, 0x76, 0x80))
_PAIRS = np.uint64(0x000000FF000000FF)
_TIMES_HIGH = np.uint64((1_000_000 << 32) + 100)  # of digits 1 and 2, and of 5 and 6
_TIMES_LOW = np.uint64((10_000 << 32) + 1)  # of digits 3 and 4, and of 7 and 8


@njit(cache=True, nogil=True)
def _skip_string(text, p):
    """Behind the string whose quote stands at ``p``, or -1."""
    p += 1
    while text[p] != _QUOTE:
        if text[p] < 32:
            return -1
        p += 2 if text[p] == _BACKSLASH else 1
    return p + 1


@njit(cache=True, nogil=True)
def _skip_simple(text, p):
    """Behind the string, number, true, false or null at ``p``, or -1."""
    if text[p] == _QUOTE:
        return _skip_string(text, p)
    if _is(text, p, p + 4, _NULL) or _is(text, p, p + 4, _TRUE):
        return p + 4
    if _is(text, p, p + 5, _FALSE):
        return p + 5
    _, end, _ = parse_number(text, p)
    return end if end > p and (48 <= text[end - 1] <= 57) else -1


@njit(cache=True, nogil=True)
def _skip_value(text, p):
    """Behind the value at ``p``, or -1. Of what nests it is seen that brackets match, not where commas stand."""
    if text[p] != _OPEN and text[p] != _OPEN_LIST:
        return _skip_simple(text, p)
    depth = 0
    kinds = np.int64(0)  # one bit for each level: 1 is an object
    while True:
        c = text[p]
        if c == _QUOTE:
            p = _skip_string(text, p)
            if p < 0:
                return -1
            continue
        if c == _OPEN or c == _OPEN_LIST:
            if depth == _DEEPEST:
                return -1
            depth += 1
            kinds = kinds * 2 + (1 if c == _OPEN else 0)
        elif c == _CLOSE or c == _CLOSE_LIST:
            if (kinds & 1) != (1 if c == _CLOSE else 0):
                return -1
            depth -= 1
            kinds >>= 1
            if depth == 0:
                return p + 1
        elif c < 32 and c != 10 and c != 13 and c != 9:
            return -1
        p += 1


@intrinsic
def _first_byte(_, text):
    """A pointer to the first byte of an array. Handing an array to a function that is not inlined counts its users up
    and down, atomically: more time than a number takes."""

    def pointer(context, builder, signature, arguments):
        return context.make_array(signature.args[0])(context, builder, arguments[0]).data

    return types.CPointer(types.uint8)(text), pointer


@intrinsic
def _eight_bytes(_, text, place):
    """The eight bytes at ``text[place]`` as one number, the first the lowest."""

    def load(context, builder, signature, arguments):
        pointer = builder.gep(arguments[0], [arguments[1]])
        word = builder.load(builder.bitcast(pointer, ir.IntType(64).as_pointer()))
        word.align = 1
        return word

    return types.uint64(text, types.int64), load


@intrinsic
def _zeros_below(_, word):
    """Zero bits below the lowest that is set; 64 for 0."""

    def count(context, builder, signature, arguments):
        return builder.cttz(arguments[0], cgutils.false_bit)

    return types.uint64(types.uint64), count


@njit(cache=True, nogil=True)
def _short_number(text, p):
    """A number without sign or exponent that ends within eight bytes, by arithmetic on all of them at once: a loop
    over digits is held up by its ends, which no processor foresees.

    Returns:
        (value, place behind it, kind); another kind than an integer or real where it is another number, or none.
    """
    word = _eight_bytes(text, p)
    digits = word ^ _ZEROS
    # The high bit of every byte that is no digit. A carry out of a byte beyond ASCII reaches later bytes alone.
    other = ((digits + _BEYOND_NINE) | digits) & _HIGH_BITS
    first = _zeros_below(other) >> _THREE
    second = _zeros_below(other & (other - _ONE)) >> _THREE
    if first == 0 or first >= 8 or (text[p] == 48 and first > 1):
        return 0.0, p, _WRONG
    length, decimals = first, np.uint64(0)
    if text[p + np.int64(first)] == 46:  # the point
        if second >= 8 or second == first + _ONE:
            return 0.0, p, _WRONG
        whole = (_ONE << (first << _THREE)) - _ONE
        digits = (digits & whole) | ((digits >> _EIGHT) & ~whole)
        decimals = second - first - _ONE
        length = second
    behind = p + np.int64(length)
    if text[behind] == 101 or text[behind] == 69:  # e, E
        return 0.0, p, _WRONG
    number_of_digits = first + decimals
    digits <<= (_EIGHT - number_of_digits) << _THREE  # the last digit in the highest byte, zeros below the first
    digits = digits * _TEN + (digits >> _EIGHT)  # pairs, in every second byte
    high, low = (digits & _PAIRS) * _TIMES_HIGH, ((digits >> _SIXTEEN) & _PAIRS) * _TIMES_LOW
    value = np.float64((high + low) >> _THIRTY_TWO)
    if decimals == 0:
        return value, behind, _INTEGER
    return value / _POWERS[np.int64(decimals)], behind, _REAL  # one rounding, of exact numbers


@njit(cache=True, nogil=True)
def _coordinate(text, p):
    """``parse_number``, quickly for short numbers."""
    if _LITTLE_ENDIAN:
        negative = text[p] == 45
        value, end, kind = _short_number(text, p + 1 if negative else p)
        if kind == _INTEGER or kind == _REAL:
            return (-value if negative else value), end, kind
    return parse_number(text, p)


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
            value, p, kind = _coordinate(text, p)
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
def _box(text, p, box):
    """``[x, y, w, h]``; the place behind, or -1, and a bit for each number that is an integer."""
    bits = 0
    if text[p] != _OPEN_LIST:
        return -1, bits
    p = _skip_space(text, p + 1)
    for i in range(4):
        box[i], p, kind = _coordinate(text, p)
        if kind != _INTEGER and kind != _REAL:
            return -1, bits
        if kind == _INTEGER:
            bits |= 1 << i
        p, closed = _next_member(text, p, _CLOSE_LIST)
        if p < 0 or closed != (i == 3):
            return -1, bits
    return p, bits


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
    return _scan(_first_byte(text), numbers, area, reach, box, box_integer, fields, kind, parts, span, part_end, values)


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
                end, box_integer[row] = _box(text, p, box[row])
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
