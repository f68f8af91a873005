"""A compiled scanner for detection results in json. numba is imported here, so import this lazily.

It takes what writers of results usually write; where it meets anything else, a library reads the block.
Why it is here: ``tools/benchmarks/bench_json.py``.
"""

import numpy as np
from numba import njit

# Fields of a result, as bits of `fields`.
IMAGE, CATEGORY, SCORE, BOX, MASK = 1, 2, 4, 8, 16
PADDING = 8  # zero bytes behind the text, at which every loop stops

_POWERS = 10.0 ** np.arange(23)  # exact in float64
_EXACT = 2**53
_INTEGER, _REAL, _UNCERTAIN, _WRONG = 0, 1, 2, 3

_QUOTE, _BACKSLASH, _COMMA, _COLON = 34, 92, 44, 58
_OPEN_LIST, _CLOSE_LIST, _OPEN, _CLOSE = 91, 93, 123, 125


def _word(text):
    return np.frombuffer(text, np.uint8).copy()


_IMAGE_ID, _CATEGORY_ID, _SCORE = _word(b"image_id"), _word(b"category_id"), _word(b"score")
_BBOX, _SEGMENTATION = _word(b"bbox"), _word(b"segmentation")
_SIZE, _COUNTS = _word(b"size"), _word(b"counts")


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


@njit(cache=True, nogil=True)
def _numbers(text, p, row, out, uncertain):
    """``[a, b, ..]`` of as many numbers as a row of ``out`` holds; the place behind, or -1."""
    if text[p] != _OPEN_LIST:
        return -1
    p = _skip_space(text, p + 1)
    last = out.shape[1] - 1
    for i in range(last + 1):
        begin = p
        out[row, i], p, kind = parse_number(text, p)
        if kind == _WRONG or (kind == _UNCERTAIN and not _note(uncertain, row, i + 1, begin, p)):
            return -1
        p, closed = _next_member(text, p, _CLOSE_LIST)
        if p < 0 or closed != (i == last):
            return -1
    return p


@njit(cache=True, nogil=True)
def _note(uncertain, row, column, begin, end):
    """Keeps the place of a number for Python to read; False where there is no room."""
    k = uncertain[0, 0]
    if k + 1 == uncertain.shape[0]:
        return False
    uncertain[0, 0] = k + 1
    uncertain[k + 1, 0], uncertain[k + 1, 1], uncertain[k + 1, 2], uncertain[k + 1, 3] = row, column, begin, end
    return True


@njit(cache=True, nogil=True)
def _mask(text, p, row, begin, end, size):
    """``{"size": [h, w], "counts": "..."}``; the place behind, or -1."""
    if text[p] != _OPEN:
        return -1
    p = _skip_space(text, p + 1)
    found = 0
    closed = False
    while not closed:
        a, b, p = _key(text, p)
        if p < 0:
            return -1
        if _is(text, a, b, _SIZE):
            if text[p] != _OPEN_LIST:
                return -1
            p += 1
            for i in range(2):
                value, p, kind = parse_number(text, _skip_space(text, p))
                p = _skip_space(text, p)
                if kind != _INTEGER or text[p] != (_COMMA if i == 0 else _CLOSE_LIST):
                    return -1
                size[row, i] = np.int64(value)
                p += 1
            found |= 1
        elif _is(text, a, b, _COUNTS) and text[p] == _QUOTE:
            p += 1
            begin[row] = p
            while text[p] != _QUOTE:
                if text[p] < 48 or text[p] > 111 or (text[p] == _BACKSLASH and text[p + 1] != _BACKSLASH):
                    return -1
                p += 2 if text[p] == _BACKSLASH else 1
            end[row] = p
            p += 1
            found |= 2
        else:
            return -1
        p, closed = _next_member(text, p, _CLOSE)
        if p < 0:
            return -1
    return p if found == 3 else -1


@njit(cache=True, nogil=True)
def scan_results(text, image, category, score, boxes, begin, end, size, fields, uncertain):
    """Reads ``[{..}, ..]``.

    Args:
        text: (n + PADDING,) uint8, zeros at the end; not changed.
        image, category (m,) int64, score (m,), boxes (m, 4), fields (m,) uint8: to be filled, row i for result i;
            ``fields`` says what it has.
        begin, end (m,), size (m, 2) int64: likewise, where in ``text`` the string of a mask stands, and its size.
        uncertain: (u + 1, 4) int64, zeros: the number of rows that follow, then row, column (0: score, 1 to 4: box),
            begin and end of numbers that the caller has to read.

    Returns:
        The number of results, or -1 where the text holds anything else than usual results.
    """
    p = _skip_space(text, 0)
    if text[p] != _OPEN_LIST:
        return -1
    p = _skip_space(text, p + 1)
    row = 0
    closed = False
    while not closed:
        if text[p] != _OPEN or row == fields.shape[0]:
            return -1
        p = _skip_space(text, p + 1)
        have = 0
        end_of_object = False
        while not end_of_object:
            a, b, p = _key(text, p)
            if p < 0:
                return -1
            if _is(text, a, b, _BBOX):
                p = _numbers(text, p, row, boxes, uncertain)
                have |= BOX
            elif _is(text, a, b, _SEGMENTATION):
                p = _mask(text, p, row, begin, end, size)
                have |= MASK
            else:
                place = p
                value, p, kind = parse_number(text, p)
                if kind == _WRONG:
                    return -1
                if _is(text, a, b, _SCORE):
                    if kind == _UNCERTAIN and not _note(uncertain, row, 0, place, p):
                        return -1
                    score[row] = value
                    have |= SCORE
                elif _is(text, a, b, _IMAGE_ID):
                    if kind != _INTEGER or abs(value) >= _EXACT:
                        return -1
                    image[row] = np.int64(value)
                    have |= IMAGE
                elif _is(text, a, b, _CATEGORY_ID):
                    if kind != _INTEGER or abs(value) >= _EXACT:
                        return -1
                    category[row] = np.int64(value)
                    have |= CATEGORY
            if p < 0:
                return -1
            p, end_of_object = _next_member(text, p, _CLOSE)
            if p < 0:
                return -1
        fields[row] = have
        row += 1
        p, closed = _next_member(text, p, _CLOSE_LIST)
        if p < 0:
            return -1
    return row if text[_skip_space(text, p)] == 0 else -1


@njit(cache=True, nogil=True)
def unescape(text, begin, end):
    """Turns each double backslash of the strings into one, in place; ``end`` moves."""
    for row in range(begin.shape[0]):
        p = begin[row]
        while p < end[row] and text[p] != _BACKSLASH:
            p += 1
        out = p
        while p < end[row]:
            if text[p] == _BACKSLASH:
                p += 1
            text[out] = text[p]
            out += 1
            p += 1
        end[row] = out
