"""Compiled reading of json's parts: white space, names of members, numbers. numba is imported here, so import this
lazily."""

import numpy as np
from numba import njit

PADDING = 8  # zero bytes behind the text, at which every loop stops

_POWERS = 10.0 ** np.arange(23)  # exact in float64
_EXACT = 2**53
_INTEGER, _REAL, _UNCERTAIN, _WRONG = 0, 1, 2, 3

_QUOTE, _BACKSLASH, _COMMA, _COLON = 34, 92, 44, 58
_OPEN_LIST, _CLOSE_LIST, _OPEN, _CLOSE = 91, 93, 123, 125


def _word(text):
    return np.frombuffer(text, np.uint8).copy()


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
