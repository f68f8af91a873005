"""Draws one image: characters on solid bodies whose silhouette says nothing of the category."""

import dataclasses

import cv2
import numpy as np
import pycocotools.mask as mask_util

from .masks import mask_to_polygons, polygons_to_rle
from .plan import ImagePlan, random_generator
from .spec import SPLITS, GlyphSpec
from .vocabulary import GlyphAtlas, image_pyramid, level_for

_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)
_POSITIONS_TRIED = 24
_RESTARTS = 40


@dataclasses.dataclass
class _Body:
    category: int  # -1: without a character
    is_annotated: bool
    face: str  # of the character; empty without one
    size: float  # diameter, pixels
    alpha: np.ndarray  # (P, P) float32 coverage of the body, P odd
    inner: np.ndarray  # likewise, without its rim
    glyph: np.ndarray  # likewise, of the character
    x: int = 0  # of the patch's top left corner
    y: int = 0


@dataclasses.dataclass
class RenderedObject:
    category: int
    is_annotated: bool
    #: The type face of the character.
    face: str
    #: Visible pixels, `(H, W)` bool.
    mask: np.ndarray
    #: Visible share of the body and of the character.
    visible: float
    glyph_visible: float


@dataclasses.dataclass
class RenderedImage:
    #: `(H, W, 3)` uint8, RGB.
    pixels: np.ndarray
    #: The objects with characters.
    objects: list[RenderedObject]

    def annotations(self) -> list[tuple]:
        """(category, polygons, [x, y, w, h], area) of each annotated object; all from the polygons."""
        rows = []
        for item in self.objects:
            if item.is_annotated:
                polygons = mask_to_polygons(item.mask.astype(np.uint8))
                rle = polygons_to_rle(polygons, *item.mask.shape)
                box, area = mask_util.toBbox(rle).tolist(), float(mask_util.area(rle))
                rows.append((item.category, polygons, box, area))
        return rows


class SceneRenderer:
    """Renders the images of a spec, each independent of the others."""

    def __init__(self, spec: GlyphSpec):
        self.spec = spec
        self.atlas = GlyphAtlas(spec)
        self._bodies = [image_pyramid(bitmap) for bitmap in _body_bitmaps(_power_of_two(spec.object_size[1]))]

    def render(self, plan: ImagePlan, split: str) -> RenderedImage:
        """
        Raises:
            RuntimeError: the objects could not be placed without hiding each other.
        """
        rng = random_generator(self.spec, SPLITS.index(split), plan.image_id)
        for restart in range(_RESTARTS):
            # A crowded picture gets smaller objects rather than fewer: the plan's counts are kept.
            shrink = max(0.95**restart, self.spec.object_size[0] / self.spec.object_size[1])
            placed = self._place(self._make_bodies(plan, split, shrink, rng), rng)
            if placed is not None:
                return self._paint(*placed, rng)
        raise RuntimeError(
            f"GlyphSpec {self.spec.name!r}: image {plan.image_id} of {split} has no room for "
            f"{len(plan.annotated) + len(plan.unannotated)} objects of {self.spec.object_size} pixels; lower "
            "objects_per_image, object_size or min_visible, or raise image_size"
        )

    # ----- bodies --------------------------------------------------------------------------------

    def _make_bodies(self, plan: ImagePlan, split: str, shrink: float, rng: np.random.Generator) -> list[_Body]:
        spec = self.spec
        kinds = [(category, True) for category in plan.annotated]
        kinds += [(category, False) for category in plan.unannotated]
        kinds += [(-1, False)] * int(rng.integers(spec.blank_bodies[0], spec.blank_bodies[1] + 1))
        low, high = np.log(spec.object_size[0]), np.log(spec.object_size[1] * shrink)
        bodies = [self._make_body(*kind, np.exp(rng.uniform(low, high)), split, rng) for kind in kinds]
        # Large ones are mostly behind small ones: else the small ones would have nowhere to go.
        order = np.argsort([-body.size * rng.uniform(0.8, 1.25) for body in bodies], kind="stable")
        return [bodies[i] for i in order]

    def _make_body(self, category: int, is_annotated: bool, size: float, split: str, rng) -> _Body:
        spec = self.spec
        angle = np.deg2rad(rng.uniform(-spec.rotation, spec.rotation))
        stretch = np.diag([1 + rng.uniform(0, spec.stretch), 1.0])
        axis = _rotation(rng.uniform(0, np.pi))
        deform = axis @ stretch @ axis.T
        silhouette = self._bodies[rng.integers(len(self._bodies))]
        side = 2 * int(np.ceil(size / 2 * (1 + spec.stretch))) + 3
        source = level_for(silhouette, size)
        alpha = _warp(source, _rotation(angle) @ deform * (size / source.shape[0]), side)
        inner = _warp(source, _rotation(angle) @ deform * (size * 0.88 / source.shape[0]), side)
        face, glyph = "", np.zeros_like(alpha)
        if category >= 0:
            faces = self.atlas.train_faces[category]
            unseen = self.atlas.val_only_faces[category] if split == "val" else ()
            if unseen and rng.random() < spec.unseen_face_rate:
                faces = unseen
            face = faces[rng.integers(len(faces))]
            longer_side = size * rng.uniform(*spec.glyph_scale)
            source = self.atlas.bitmap(category, face, longer_side)
            glyph = _warp(source, _rotation(angle) * (longer_side / (source.shape[0] - 2)), side) * alpha
        return _Body(category, is_annotated, face, size, alpha, inner, glyph)

    # ----- layout --------------------------------------------------------------------------------

    def _place(self, bodies: list[_Body], rng: np.random.Generator):
        """
        Finds a place for one body after the other, each above those before. Returns the bodies, the index of the body
        that each pixel shows `(H, W)` (-1: background), and the visible shares, or None where one has no place.
        """
        spec, side = self.spec, self.spec.image_size
        owner = np.full((side, side), -1, np.int64)
        inked = np.zeros((side, side), bool)  # the owner's character is here
        solid = [body.alpha >= 0.5 for body in bodies]
        ink = [body.glyph >= 0.5 for body in bodies]
        full = np.array([max(1, mask.sum()) for mask in solid])
        full_ink = np.array([max(1, mask.sum()) for mask in ink])
        # Blank bodies may be hidden as they like.
        need = np.array([spec.min_visible if body.category >= 0 else 0.0 for body in bodies])
        need_ink = np.array([spec.min_glyph_visible if body.category >= 0 else 0.0 for body in bodies])
        visible, visible_ink = np.zeros(len(bodies)), np.zeros(len(bodies))
        for index, body in enumerate(bodies):
            patch_side = body.alpha.shape[0]
            # Up to a quarter of a body may lie outside the picture.
            margin = int(0.25 * body.size)
            low, high = -margin, side - patch_side + margin
            for x, y in rng.integers(low, high + 1, (_POSITIONS_TRIED, 2)):
                in_image, in_patch = _overlap(x, y, patch_side, side)
                mask, glyph = solid[index][in_patch], ink[index][in_patch]
                own, own_ink = mask.sum(), glyph.sum()
                if own < need[index] * full[index] or own_ink < need_ink[index] * full_ink[index]:
                    continue
                region = owner[in_image]
                hidden = np.bincount(region[mask] + 1, minlength=len(bodies) + 1)[1:]
                hidden_ink = np.bincount(region[mask & inked[in_image]] + 1, minlength=len(bodies) + 1)[1:]
                left, left_ink = visible - hidden, visible_ink - hidden_ink
                placed = slice(0, index)
                if np.any(left[placed] < need[placed] * full[placed]):
                    continue
                if body.category < 0 and hidden_ink.any():
                    continue
                if np.any(left_ink[placed] < need_ink[placed] * full_ink[placed]):
                    continue
                visible, visible_ink = left, left_ink
                visible[index], visible_ink[index] = own, own_ink
                region[mask] = index
                inked[in_image][mask] = glyph[mask]
                body.x, body.y = int(x), int(y)
                break
            else:
                return None
        return bodies, owner, visible / full, visible_ink / full_ink

    # ----- painting ------------------------------------------------------------------------------

    def _paint(self, bodies, owner, visible, visible_ink, rng: np.random.Generator) -> RenderedImage:
        spec, side = self.spec, self.spec.image_size
        canvas = self._background(rng)
        light = rng.uniform(0, 2 * np.pi)
        direction = np.array([np.cos(light), np.sin(light)], np.float32)
        for body in bodies:
            self._paint_body(canvas, body, direction, rng)
        ramp = np.linspace(-1, 1, side, dtype=np.float32)
        slope = direction[0] * ramp[None, :] + direction[1] * ramp[:, None]
        canvas *= (1 + rng.uniform(0, spec.lighting) * slope)[:, :, None]
        if spec.noise:
            canvas += rng.standard_normal(canvas.shape, np.float32) * np.float32(spec.noise / 255)
        pixels = (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
        objects = [
            RenderedObject(
                category=body.category,
                is_annotated=body.is_annotated,
                face=body.face,
                mask=owner == index,
                visible=float(visible[index]),
                glyph_visible=float(visible_ink[index]),
            )
            for index, body in enumerate(bodies)
            if body.category >= 0
        ]
        return RenderedImage(pixels, objects)

    def _background(self, rng: np.random.Generator) -> np.ndarray:
        spec, side = self.spec, self.spec.image_size
        canvas = np.empty((side, side, 3), np.float32)
        canvas[:] = _colour(rng.uniform(0.25, 0.8), 0.25, rng)
        for cells in rng.integers(2, 12, 2):
            grid = rng.uniform(-0.5, 0.5, (cells, cells, 3)).astype(np.float32)
            grid = 0.7 * grid[:, :, :1] + 0.3 * grid
            canvas += spec.background_contrast * cv2.resize(grid, (side, side), interpolation=cv2.INTER_CUBIC)
        if rng.random() < 0.4:
            angle, period = rng.uniform(0, np.pi), rng.uniform(6, 24)
            ramp = np.arange(side, dtype=np.float32) * np.float32(2 * np.pi / period)
            wave = np.sin(np.cos(angle) * ramp[None, :] + np.sin(angle) * ramp[:, None])
            canvas += (0.2 * spec.background_contrast * wave)[:, :, None].astype(np.float32)
        for _ in range(rng.integers(spec.clutter_marks[0], spec.clutter_marks[1] + 1)):
            colour = tuple(float(v) for v in _colour(rng.uniform(0.15, 0.9), 0.4, rng))
            (x0, y0), (x1, y1) = rng.integers(0, side, (2, 2)).tolist()
            if rng.random() < 0.5:
                cv2.line(canvas, (x0, y0), (x1, y1), colour, int(rng.integers(1, 4)), cv2.LINE_AA)
            else:
                axes = tuple(int(v) for v in rng.integers(max(2, side // 64), max(3, side // 12), 2))
                cv2.ellipse(canvas, (x0, y0), axes, rng.uniform(0, 180), 0, 360, colour, -1, cv2.LINE_AA)
        return canvas

    def _paint_body(self, canvas: np.ndarray, body: _Body, light: np.ndarray, rng: np.random.Generator) -> None:
        spec, side = self.spec, canvas.shape[0]
        patch_side = body.alpha.shape[0]
        in_image, in_patch = _overlap(body.x, body.y, patch_side, side)

        strength = rng.uniform(0, spec.shadow)
        offset = np.rint(light * body.size * rng.uniform(0.03, 0.1)).astype(int)
        shadow_in_image, shadow_in_patch = _overlap(body.x - offset[0], body.y - offset[1], patch_side, side)
        soft = cv2.blur(body.alpha, (5, 5))[shadow_in_patch]
        canvas[shadow_in_image] *= (1 - strength * soft)[:, :, None]

        luminance = rng.uniform(0.15, 0.85)
        gap = rng.uniform(spec.glyph_contrast, spec.glyph_contrast + 0.2)
        brighter = luminance + gap if luminance + spec.glyph_contrast <= 0.97 else None
        darker = luminance - gap if luminance - spec.glyph_contrast >= 0.03 else None
        if brighter is None and darker is None:
            luminance = 0.97 - spec.glyph_contrast
            brighter = luminance + gap
        choices = [value for value in (brighter, darker) if value is not None]
        glyph_luminance = float(np.clip(choices[rng.integers(len(choices))], 0.03, 0.97))
        colour = _colour(luminance, 0.8, rng)
        rim_colour = colour * rng.uniform(0.55, 1.0)
        glyph_colour = _colour(glyph_luminance, 0.8, rng)

        alpha, inner, glyph = (part[in_patch][:, :, None] for part in (body.alpha, body.inner, body.glyph))
        patch = rim_colour + inner * (colour - rim_colour)
        patch += glyph * (glyph_colour - patch)
        ramp = np.linspace(-1, 1, patch_side, dtype=np.float32)
        slope = light[0] * ramp[None, :] + light[1] * ramp[:, None]
        patch *= (1 + rng.uniform(0, 0.6 * spec.lighting) * slope)[in_patch][:, :, None]
        region = canvas[in_image]
        region += alpha * (patch - region)


def _overlap(x: int, y: int, patch_side: int, image_side: int):
    """Index of the patch's part inside the image, in the image and in the patch."""
    x0, y0 = max(x, 0), max(y, 0)
    x1, y1 = max(x0, min(x + patch_side, image_side)), max(y0, min(y + patch_side, image_side))
    return (slice(y0, y1), slice(x0, x1)), (slice(y0 - y, y1 - y), slice(x0 - x, x1 - x))


def _rotation(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _warp(bitmap: np.ndarray, linear: np.ndarray, side: int) -> np.ndarray:
    """`bitmap` mapped by the 2 x 2 matrix about its centre onto `(side, side)` float32 in [0, 1]."""
    source, target = (bitmap.shape[0] - 1) / 2, (side - 1) / 2
    shift = target - linear @ np.array([source, source])
    warped = cv2.warpAffine(bitmap, np.column_stack([linear, shift]), (side, side), flags=cv2.INTER_LINEAR)
    return warped.astype(np.float32) * np.float32(1 / 255)


def _colour(luminance: float, saturation: float, rng: np.random.Generator) -> np.ndarray:
    """A random colour, `(3,)` float32 RGB, of exactly this luminance; less saturated where that needs it."""
    chroma = rng.random(3).astype(np.float32)
    chroma -= chroma @ _LUMINANCE
    room = np.where(chroma > 0, 1 - luminance, luminance) / np.maximum(np.abs(chroma), 1e-6)
    return (luminance + chroma * min(saturation, float(room.min()))).astype(np.float32)


def _power_of_two(size: float) -> int:
    return 1 << max(5, int(np.ceil(np.log2(size))))


def _body_bitmaps(size: int) -> list[np.ndarray]:
    """Coverage of the silhouettes, `(size, size)` uint8 each; all contain most of a disc."""
    turn = np.linspace(0, 2 * np.pi, 241)[:-1]
    circle = np.stack([np.cos(turn), np.sin(turn)], 1)

    def regular(corners, phase):
        angles = phase + 2 * np.pi * np.arange(corners) / corners
        return np.stack([np.cos(angles), np.sin(angles)], 1)

    def squircle(power):
        points = np.sign(circle) * np.abs(circle) ** (2 / power)
        return points / np.abs(points).max(1).max() * (1 / np.linalg.norm(points, axis=1).max())

    scalloped = circle * (0.93 + 0.07 * np.cos(12 * turn))[:, None]
    upper = np.array([[-0.84, -0.72], [-0.42, -0.80], [0.0, -0.92], [0.42, -0.80], [0.84, -0.72]])
    t = np.linspace(0, 1, 24)[:, None]
    right = (1 - t) ** 2 * [[0.84, -0.72]] + 2 * t * (1 - t) * [[0.98, 0.62]] + t**2 * [[0.0, 1.0]]
    shield = np.concatenate([upper, right, right[::-1] * [[-1, 1]]])
    shapes = [
        circle,
        squircle(6.0),
        regular(6, np.pi / 6),
        regular(6, 0.0),
        regular(8, np.pi / 8),
        scalloped,
        shield,
    ]
    bitmaps = []
    for shape in shapes:
        oversampled = np.zeros((4 * size, 4 * size), np.uint8)
        points = np.rint((shape * 0.5 + 0.5) * (4 * size - 1) * 256).astype(np.int32)
        cv2.fillPoly(oversampled, [points], 255, shift=8)
        bitmaps.append(cv2.resize(oversampled, (size, size), interpolation=cv2.INTER_AREA))
    return bitmaps
