"""Type faces that matplotlib ships, bitmaps of their characters, and what the categories are called."""

import functools
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .spec import GlyphSpec


@functools.cache
def face_path(face: str) -> str:
    """
    Path of the font file of a face such as "DejaVuSans-Bold".

    Raises:
        FileNotFoundError: matplotlib does not ship it, or was installed without its fonts.
    """
    import matplotlib

    folder = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    path = os.path.join(folder, face + ".ttf")
    if not os.path.isfile(path):
        present = sorted(path.stem for path in Path(folder).glob("*.ttf"))
        raise FileNotFoundError(
            f"glyph_lvis needs the font {face}.ttf, which matplotlib ships, but {folder} has "
            f"{', '.join(present) or 'no fonts'}. Some distributions strip matplotlib's fonts: install it from PyPI "
            "(pip install --force-reinstall matplotlib), or name other faces in the GlyphSpec."
        )
    return path


@functools.cache
def covered_code_points(face: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(face_path(face)).get_charmap())


def faces_with(character: str, faces: Sequence[str]) -> tuple[str, ...]:
    """Those of `faces` that have the character."""
    return tuple(face for face in faces if ord(character) in covered_code_points(face))


@functools.cache
def _font(face: str, size: int) -> ImageFont.FreeTypeFont:
    # The basic layout engine: others shape text, and are not installed everywhere.
    return ImageFont.truetype(face_path(face), size, layout_engine=ImageFont.Layout.BASIC)


def glyph_bitmap(face: str, character: str, size: int) -> np.ndarray:
    """
    Coverage of a character, `(size, size)` uint8, centred, scaled such that its longer side is `size - 2` pixels: a
    category is told by its shape, never by its size on the line.

    Raises:
        ValueError: the face has no ink for the character.
    """
    font = _font(face, 2 * size)
    left, top, right, bottom = font.getbbox(character)
    canvas = Image.new("L", (max(right - left, 1) + 8, max(bottom - top, 1) + 8))
    ImageDraw.Draw(canvas).text((4 - left, 4 - top), character, font=font, fill=255)
    ink = np.asarray(canvas)
    rows, columns = np.nonzero(ink.max(1) > 64)[0], np.nonzero(ink.max(0) > 64)[0]
    if len(rows) == 0 or ord(character) not in covered_code_points(face):
        raise ValueError(f"the face {face} has no drawing of {character!r} (U+{ord(character):04X})")
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = (size - 2) / max(ink.shape)
    height, width = (max(1, round(side * scale)) for side in ink.shape)
    ink = cv2.resize(ink, (width, height), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    bitmap = np.zeros((size, size), np.uint8)
    y, x = (size - height) // 2, (size - width) // 2
    bitmap[y : y + height, x : x + width] = ink
    return bitmap


def glyph_similarity(
    characters: str, faces: Sequence[str], max_rotation: float = 40.0, step: float = 10.0
) -> np.ndarray:
    """
    How much characters look alike: `(N, N)` float32 with a zero diagonal. The entry of a pair is the Dice coefficient
    2<a,b> / (<a,a> + <b,b>) of their blurred 16 x 16 drawings, at its largest over all pairs of faces (one for each
    character) and over rotations of one against the other by up to `max_rotation` degrees.
    """
    base, side, num = 64, 16, len(characters)
    steps = np.arange(step, max_rotation + 1e-6, step)
    angles = [0.0, *steps, *-steps]
    descriptors = {}  # by face: (angles, N, side * side), zero where the face lacks the character
    for face in faces:
        descriptors[face] = np.zeros((len(angles), num, side * side), np.float32)
        for i, character in enumerate(characters):
            if ord(character) in covered_code_points(face):
                bitmap = glyph_bitmap(face, character, base).astype(np.float32) / 255
                for k, angle in enumerate(angles):
                    turn = cv2.getRotationMatrix2D((base / 2 - 0.5, base / 2 - 0.5), float(angle), 0.85)
                    turned = cv2.GaussianBlur(cv2.warpAffine(bitmap, turn, (base, base)), (0, 0), 2.0)
                    small = cv2.resize(turned, (side, side), interpolation=cv2.INTER_AREA)
                    descriptors[face][k, i] = small.ravel()
    similarity = np.zeros((num, num), np.float32)
    for upright in (descriptors[face][0] for face in faces):
        for turned in (angle for face in faces for angle in descriptors[face]):
            norms = (upright**2).sum(1)[:, None] + (turned**2).sum(1)[None]
            np.maximum(similarity, 2 * upright @ turned.T / np.maximum(norms, 1e-6), out=similarity)
    similarity = np.maximum(similarity, similarity.T)
    np.fill_diagonal(similarity, 0)
    return similarity


class GlyphAtlas:
    """Bitmaps of a spec's characters in several resolutions, drawn when first asked for."""

    def __init__(self, spec: GlyphSpec):
        self._characters = spec.characters
        self.train_faces = [faces_with(character, spec.train_faces) for character in spec.characters]
        self.val_only_faces = [faces_with(character, spec.val_only_faces) for character in spec.characters]
        without = [c for c, faces in zip(spec.characters, self.train_faces) if not faces]
        if without:
            names = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in without[:10])
            raise ValueError(
                f"GlyphSpec {spec.name!r}: none of the train_faces {spec.train_faces} has {names}"
                f"{' and others' if len(without) > 10 else ''}; add a face that has it or drop the character"
            )
        largest = spec.object_size[1] * spec.glyph_scale[1]
        self._base = 1 << max(5, int(np.ceil(np.log2(largest))))
        self._pyramids: dict[tuple[int, str], list[np.ndarray]] = {}

    def bitmap(self, category: int, face: str, size: float) -> np.ndarray:
        """The smallest stored bitmap, `(S, S)` uint8, with S >= size (the largest where there is none)."""
        key = (category, face)
        if key not in self._pyramids:
            self._pyramids[key] = image_pyramid(glyph_bitmap(face, self._characters[category], self._base))
        return level_for(self._pyramids[key], size)


def image_pyramid(bitmap: np.ndarray, smallest: int = 16) -> list[np.ndarray]:
    """The bitmap and its halvings, largest first: warping from the nearest larger level does not alias."""
    levels = [bitmap]
    while levels[-1].shape[0] // 2 >= smallest:
        side = levels[-1].shape[0] // 2
        levels.append(cv2.resize(levels[-1], (side, side), interpolation=cv2.INTER_AREA))
    return levels


def level_for(pyramid: list[np.ndarray], size: float) -> np.ndarray:
    return next((level for level in reversed(pyramid) if level.shape[0] >= size), pyramid[0])


def category_entry(character: str, category_id: int) -> dict:
    """The part of an LVIS category that does not depend on counts."""
    title = unicodedata.name(character, f"character U+{ord(character):04X}")
    name = title.lower().replace(" ", "_")
    return {
        "id": category_id,
        "name": name,
        "synset": f"{name}.n.01",
        "synonyms": [name, character],
        "def": f"the character {character} (U+{ord(character):04X}, {title}) on a solid body",
    }
