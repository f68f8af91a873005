"""Compiled reading of json's parts: white space, names of members, numbers. numba is imported here, so import this
lazily."""

import sys

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic


def _word(text):
    return np.frombuffer(text, np.uint8).copy()


PADDING = 8  # zero bytes behind the text, at which every loop stops

_POWERS = 10.0 ** np.arange(23)  # exact in float64
_EXACT = 2**53
_INTEGER, _REAL, _UNCERTAIN, _WRONG = 0, 1, 2, 3

_NULL, _TRUE, _FALSE = _word(b"null"), _word(b"true"), _word(b"false")
_DEEPEST = 60
_QUOTE, _BACKSLASH, _COMMA, _COLON = 34, 92, 44, 58
_OPEN_LIST, _CLOSE_LIST, _OPEN, _CLOSE = 91, 93, 123, 125

_LITTLE_ENDIAN = sys.byteorder == "little"
# All of one type, so that numba computes in it.
_ONE, _THREE, _EIGHT, _TEN, _SIXTEEN, _THIRTY_TWO = (np.uint64(n) for n in (1, 3, 8, 10, 16, 32))
_ZEROS, _BEYOND_NINE, _HIGH_BITS = (np.uint64(byte * 0x0101010101010101) for byte in (0x30, 0x76, 0x80))
_PAIRS = np.uint64(0x000000FF000000FF)
_TIMES_HIGH = np.uint64((1_000_000 << 32) + 100)  # of digits 1 and 2, and of 5 and 6
_TIMES_LOW = np.uint64((10_000 << 32) + 1)  # of digits 3 and 4, and of 7 and 8


@njit(cache=True, nogil=True)
def _is_digit(c):
    return 48 <= c <= 57


@njit(cache=True, nogil=True)
def _skip_space(text, p):
    while text[p] == 32 or text[p] == 10 or text[p] == 13 or text[p] == 9:
        p += 1
    return p


@njit(cache=True, nogil=True)
def _key(text, p):
    """``"name":`` at ``p``: begin and end of the name, and where its value begins, or -1."""
    if text[p] != _QUOTE:
        return p, p, -1
    begin = p + 1
    end = begin
    while text[end] != _QUOTE:
        if text[end] == 0 or text[end] == _BACKSLASH:
            return begin, end, -1
        end += 1
    p = _skip_space(text, end + 1)
    if text[p] != _COLON:
        return begin, end, -1
    return begin, end, _skip_space(text, p + 1)


@njit(cache=True, nogil=True)
def _is(text, begin, end, word):
    if end - begin != word.shape[0]:
        return False
    for i in range(word.shape[0]):
        if text[begin + i] != word[i]:
            return False
    return True


@njit(cache=True, nogil=True)
def _next_member(text, p, close):
    """Behind a member: where the next one begins, and whether ``close`` stood there instead (then behind it); -1 where
    neither follows."""
    p = _skip_space(text, p)
    if text[p] == close:
        return p + 1, True
    if text[p] != _COMMA:
        return -1, False
    return _skip_space(text, p + 1), False


@njit(cache=True, nogil=True)
def parse_number(text, p):
    """A json number as the nearest float64, as Python's float() gives it.

    Args:
        text: (n + PADDING,) uint8, or a pointer to its first byte.
        p: where the number stands.

    Returns:
        (value, place behind it, kind): 0 integer, 1 with a fraction or an exponent, 2 a number whose value is not
        certain, 3 no number.
    """
    negative = text[p] == 45
    if negative:
        p += 1
    if not _is_digit(text[p]) or (text[p] == 48 and _is_digit(text[p + 1])):
        return 0.0, p, _WRONG
    mantissa = np.int64(0)
    digits = 0
    exponent = 0
    kind = _INTEGER
    while _is_digit(text[p]) or (text[p] == 46 and kind == _INTEGER):
        if text[p] == 46:
            kind = _REAL
            if not _is_digit(text[p + 1]):
                return 0.0, p, _WRONG
        else:
            if digits < 19:
                mantissa = mantissa * 10 + (np.int64(text[p]) - 48)
            if mantissa:
                digits += 1
            if kind == _REAL:
                exponent -= 1
        p += 1
    if text[p] == 101 or text[p] == 69:
        kind = _REAL
        p += 1
        minus = text[p] == 45
        if text[p] == 45 or text[p] == 43:
            p += 1
        if not _is_digit(text[p]):
            return 0.0, p, _WRONG
        e = 0
        while _is_digit(text[p]):
            if e < 1000:
                e = e * 10 + (np.int64(text[p]) - 48)
            p += 1
        exponent += -e if minus else e
    if digits > 18:
        return 0.0, p, _UNCERTAIN
    value = np.float64(mantissa)
    if mantissa != 0 and exponent != 0:
        if exponent < -22 or exponent > 22 or (exponent > 0 and mantissa > _EXACT):
            return 0.0, p, _UNCERTAIN
        if mantissa <= _EXACT:  # one rounding, of exact numbers
            value = value * _POWERS[exponent] if exponent > 0 else value / _POWERS[-exponent]
        else:
            # Quotient in two parts; certain when the second one does not come near a rounding border.
            divisor = _POWERS[-exponent]
            rest = np.float64(mantissa - np.int64(value))
            quotient = value / divisor
            product, error = _two_product(quotient, divisor)
            correction = ((value - product) - error + rest) / divisor
            slack = quotient * 3.2e-30
            value = quotient + (correction - slack)
            if value != quotient + (correction + slack):
                return 0.0, p, _UNCERTAIN
    return -value if negative else value, p, kind


@njit(cache=True, nogil=True)
def _two_product(a, b):
    """a * b as the nearest float64 and the rest (Dekker 1971)."""
    p = a * b
    t = 134217729.0 * a
    ah = t - (t - a)
    al = a - ah
    t = 134217729.0 * b
    bh = t - (t - b)
    bl = b - bh
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


@intrinsic
def first_byte(_, text):
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
def parse_number_fast(text, p):
    """``parse_number`` of a pointer, quickly for short numbers."""
    if _LITTLE_ENDIAN:
        negative = text[p] == 45
        value, end, kind = _short_number(text, p + 1 if negative else p)
        if kind == _INTEGER or kind == _REAL:
            return (-value if negative else value), end, kind
    return parse_number(text, p)


@njit(cache=True, nogil=True)
def parse_box(text, p, box):
    """``[x, y, w, h]``: the place behind, or -1; a bit for each number that is an integer; whether all are certain."""
    integers, certain = 0, True
    if text[p] != _OPEN_LIST:
        return -1, integers, certain
    p = _skip_space(text, p + 1)
    for i in range(4):
        box[i], p, kind = parse_number_fast(text, p)
        if kind == _WRONG:
            return -1, integers, certain
        integers |= (kind == _INTEGER) << i
        certain &= kind != _UNCERTAIN
        p, closed = _next_member(text, p, _CLOSE_LIST)
        if p < 0 or closed != (i == 3):
            return -1, integers, certain
    return p, integers, certain


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
