"""Objects drawn into a picture: masks, boxes and labels."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter, ImageFont

__all__ = ["GROUP_COLOURS", "DrawnObject", "draw_objects", "jpeg"]

GROUP_COLOURS = {"r": "#e5383b", "c": "#ff9f1c", "f": "#2a78d6", "": "#9d4edd"}
"""Of rare, common and frequent categories, and of unknown group."""


@dataclass
class DrawnObject:
    """
    Attributes:
        box: x, y, width, height in pixels of the image.
        label: text at its upper left corner; "" for none.
        colour: as "#rrggbb".
        mask: (H, W) bool of the image's size, drawn in place of the box.
    """

    box: Sequence[float]
    label: str
    colour: str
    mask: np.ndarray | None = None


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # its DejaVu font has most of Unicode

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)


def draw_objects(
    image: np.ndarray, objects: Sequence[DrawnObject], *, longest_side: int = 0, text_size: int = 0
) -> Image.Image:
    """Draw objects into an image, the first on top.

    Args:
        image: (H, W, 3) uint8 RGB.
        longest_side: the picture's, in pixels; 0: the image's own, but at least 480, for the labels.
        text_size: of the labels, in pixels; 0: what suits the picture's size.

    Returns:
        The picture.
    """
    height, width = image.shape[:2]
    side = longest_side or max(height, width, 480)
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    picture = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)
    for one in reversed(objects):
        if one.mask is not None and one.mask.any():
            _paint(picture, one.mask, one.colour, scale)
    draw = ImageDraw.Draw(picture)
    line = max(1, round(side / 400))
    for one in reversed(objects):
        if one.mask is None:
            x, y, w, h = (v * scale for v in one.box)
            draw.rectangle((x, y, x + max(w, 1), y + max(h, 1)), outline=one.colour, width=line + 1)
    font = _font(text_size or max(10, round(side / 52)))
    taken: list[tuple[float, float, float, float]] = []
    for one in objects:
        if one.label:
            _label(draw, one, scale, font, size, taken)
    return picture


def _paint(picture: Image.Image, mask: np.ndarray, colour: str, scale: float) -> None:
    """A veil over the mask, and its outline. Only the part of the picture that the mask is in is touched."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, left, bottom, right = rows[0], columns[0], rows[-1] + 1, columns[-1] + 1
    area = (round(left * scale), round(top * scale), round(right * scale), round(bottom * scale))
    part = Image.fromarray(mask[top:bottom, left:right].astype(np.uint8) * 255)
    size = (max(area[2] - area[0], 1), max(area[3] - area[1], 1))
    part = part.resize(size, Image.Resampling.BILINEAR).point(lambda v: 255 if v > 127 else 0)
    padded = Image.new("L", (size[0] + 4, size[1] + 4))  # so that the outline follows the picture's border too
    padded.paste(part, (2, 2))
    inner = padded.filter(ImageFilter.MinFilter(5)).crop((2, 2, 2 + size[0], 2 + size[1]))
    inside = np.asarray(inner) > 0
    alpha = np.where(np.asarray(part) > 0, np.where(inside, 72, 235), 0).astype(np.uint8)
    picture.paste(ImageColor.getrgb(colour), (area[0], area[1]), Image.fromarray(alpha))


def _label(draw, one: DrawnObject, scale: float, font, size: tuple[int, int], taken: list) -> None:
    """At the object's upper left corner, or below where another label stands already."""
    left, top, right, bottom = draw.textbbox((0, 0), one.label, font=font)
    width, height = right - left + 6, bottom - top + 4
    x = min(max(one.box[0] * scale, 0), max(size[0] - width, 0))
    y = min(max(one.box[1] * scale - height, 0), max(size[1] - height, 0))
    for _ in range(6):
        if not any(x < c and a < x + width and y < d and b < y + height for a, b, c, d in taken):
            break
        y = min(y + height, max(size[1] - height, 0))
    taken.append((x, y, x + width, y + height))
    draw.rectangle((x, y, x + width, y + height), fill=one.colour)
    red, green, blue = ImageColor.getrgb(one.colour)[:3]
    dark = 0.3 * red + 0.59 * green + 0.11 * blue < 140
    draw.text((x + 3 - left, y + 2 - top), one.label, fill="#ffffff" if dark else "#000000", font=font)


def jpeg(picture: Image.Image, quality: int = 82) -> bytes:
    """The picture as the bytes of a JPEG file."""
    file = io.BytesIO()
    picture.convert("RGB").save(file, "JPEG", quality=quality, optimize=True)
    return file.getvalue()
