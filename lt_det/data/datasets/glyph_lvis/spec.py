"""The recipe of a glyph data set: every number that its pictures and its json depend on."""

import dataclasses
import hashlib
import json

import numpy as np

from .characters import CHARACTERS_60, CHARACTERS_1203

# Raised whenever the same GlyphSpec would give other pixels or another json: caches are rendered again then.
RECIPE_VERSION = 1

SPLITS = ("train", "val")


@dataclasses.dataclass(frozen=True)
class GlyphSpec:
    """
    What to draw. Two specs that differ in any field have different `fingerprint()`s and different caches.

    Lengths are in pixels, angles in degrees, colours and luminances in [0, 1], rates are probabilities; a pair is a
    closed range from which a value is drawn uniformly.
    """

    name: str
    #: One character a category, in category order (category id 1 is `characters[0]`).
    characters: str
    #: The number of training images that have annotations of each category, in category order.
    image_counts: tuple[int, ...]
    num_train_images: int
    num_val_images: int
    #: Validation images that have annotations of one category; the same for all, so that no AP rests on few.
    val_images_per_category: int

    seed: int = 1203
    image_size: int = 128
    jpeg_quality: int = 95

    #: Objects with a character, annotated or not. What is left after one instance of each positive category
    #: of the image becomes further instances of these.
    objects_per_image: tuple[int, int] = (5, 8)
    #: Bodies without a character: what a detector has to learn to leave alone.
    blank_bodies: tuple[int, int] = (0, 2)
    #: Lines and blobs of the background.
    clutter_marks: tuple[int, int] = (2, 7)

    #: Diameter of a body; log-uniform.
    object_size: tuple[float, float] = (28.0, 54.0)
    #: The longer side of the character over the diameter of its body.
    glyph_scale: tuple[float, float] = (0.60, 0.68)
    #: Rotation is uniform in [-rotation, rotation].
    rotation: float = 20.0
    #: Bodies are stretched along one axis by up to this share.
    stretch: float = 0.12
    #: The least share of a body, and of the character on it, that later objects and the border leave visible.
    min_visible: float = 0.6
    min_glyph_visible: float = 0.8

    #: Least difference of luminance between a character and its body.
    glyph_contrast: float = 0.45
    #: Strength of the background's texture, of light falling off over the picture, and of shadows.
    background_contrast: float = 0.35
    lighting: float = 0.25
    shadow: float = 0.4
    #: Standard deviation of the pixel noise, in grey levels of 255.
    noise: float = 3.0

    #: Names of type faces that matplotlib ships. A category uses those that have its character.
    train_faces: tuple[str, ...] = (
        "DejaVuSans-Bold",
        "DejaVuSerif-Bold",
        "DejaVuSansMono-Bold",
        "STIXGeneralBol",
    )
    #: Faces that no training image shows, and their share in validation.
    val_only_faces: tuple[str, ...] = ("DejaVuSans-BoldOblique", "DejaVuSerif-BoldItalic")
    unseen_face_rate: float = 0.25

    #: Share of (image, category) pairs with one more instance that is drawn but not annotated; the category
    #: is listed in `not_exhaustive_category_ids` of the image.
    not_exhaustive_rate: float = 0.02
    #: Share of images with one object of a category that the image neither annotates nor lists as absent.
    unlisted_rate: float = 0.05
    #: Categories verified to be absent (`neg_category_ids`), an image; frequent categories are likelier.
    train_negatives: tuple[int, int] = (2, 5)
    val_negatives: tuple[int, int] = (8, 14)

    def __post_init__(self):
        for field in dataclasses.fields(self):  # what comes from json has lists
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        object.__setattr__(self, "image_counts", tuple(int(n) for n in self.image_counts))
        self._check()

    def _check(self) -> None:
        def fail(what: str):
            raise ValueError(f"GlyphSpec {self.name!r}: {what}")

        if not self.name or any(c in self.name for c in "/\\ "):
            fail("name must be usable as a folder name")
        if len(set(self.characters)) != len(self.characters) or not self.characters:
            fail("characters must be given, each once")
        if len(self.image_counts) != len(self.characters):
            fail(f"{len(self.image_counts)} image_counts for {len(self.characters)} characters")
        for what, low, high in (
            ("image_counts", min(self.image_counts), max(self.image_counts)),
            ("val_images_per_category", self.val_images_per_category, self.val_images_per_category),
        ):
            images = self.num_train_images if what == "image_counts" else self.num_val_images
            if low < 1 or high > images:
                fail(f"{what} must lie between 1 and the number of images ({images}), got {low} to {high}")
        for name in ("objects_per_image", "blank_bodies", "clutter_marks", "object_size", "glyph_scale",
                     "train_negatives", "val_negatives"):  # fmt: skip
            pair = getattr(self, name)
            if len(pair) != 2 or not 0 <= pair[0] <= pair[1]:
                fail(f"{name} must be a pair (low, high) with 0 <= low <= high, got {pair}")
        if self.objects_per_image[0] < 1:
            fail("objects_per_image must start at 1 or more")
        if not 8 <= self.object_size[0] <= self.object_size[1] <= 0.8 * self.image_size:
            fail(f"object_size must lie between 8 and 0.8 * image_size pixels, got {self.object_size}")
        if not 0 < self.glyph_scale[0] <= self.glyph_scale[1] <= 0.8:
            fail(f"glyph_scale must lie in (0, 0.8], got {self.glyph_scale}")
        if not 0 <= self.glyph_contrast <= 0.6:
            fail(f"glyph_contrast must lie in [0, 0.6], got {self.glyph_contrast}")
        for name in ("min_visible", "min_glyph_visible", "unseen_face_rate", "not_exhaustive_rate",
                     "unlisted_rate", "background_contrast", "lighting", "shadow"):  # fmt: skip
            if not 0 <= getattr(self, name) <= 1:
                fail(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.stretch <= 0.5:
            fail(f"stretch must lie in [0, 0.5], got {self.stretch}")
        if not 0 <= self.rotation <= 180:
            fail(f"rotation must lie in [0, 180] degrees, got {self.rotation}")
        if self.noise < 0:
            fail(f"noise must not be negative, got {self.noise}")
        if not 1 <= self.jpeg_quality <= 100:
            fail(f"jpeg_quality must lie in [1, 100], got {self.jpeg_quality}")
        if not self.train_faces:
            fail("train_faces must name at least one type face")
        if set(self.train_faces) & set(self.val_only_faces):
            fail("a face cannot be both in train_faces and in val_only_faces")

    @property
    def num_categories(self) -> int:
        return len(self.characters)

    def num_images(self, split: str) -> int:
        return {"train": self.num_train_images, "val": self.num_val_images}[split]

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def fingerprint(self) -> str:
        """Ten hexadecimal digits that change with any field and with `RECIPE_VERSION`."""
        text = json.dumps([RECIPE_VERSION, self.to_dict()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:10]


def long_tailed_image_counts(num_rare: int, num_common: int, num_frequent: int, max_count: int) -> tuple[int, ...]:
    """
    Training image counts, ascending, with groups of the given sizes under LVIS's thresholds: rare 1-10, common 11-100,
    frequent 101-`max_count`, each spread evenly on a logarithmic scale. (LVIS v1's own counts within these groups are
    close to that.)
    """
    if max_count < 101:
        raise ValueError(f"max_count must be at least 101 for frequent categories, got {max_count}")
    groups = ((num_rare, 1, 10), (num_common, 11, 100), (num_frequent, 101, max_count))
    counts = [np.rint(np.geomspace(low, high, n)).astype(int) for n, low, high in groups]
    return tuple(int(n) for n in np.concatenate(counts))


def lvis_v1_image_counts(max_count: int) -> tuple[int, ...]:
    """
    The training image counts of LVIS v1's 1203 categories, in category order, as Detectron2 ships them. Those of rare
    and common categories are kept; frequent ones (101 to 1977 in LVIS v1) are mapped to 101..`max_count` linearly in
    the logarithm, which keeps their order and the groups.
    """
    from detectron2.data.datasets.lvis_v1_category_image_count import LVIS_CATEGORY_IMAGE_COUNT

    rows = sorted(LVIS_CATEGORY_IMAGE_COUNT, key=lambda row: row["id"])
    counts = np.array([row["image_count"] for row in rows])
    share = np.log(np.maximum(counts, 101) / 101) / np.log(counts.max() / 101)
    compressed = np.rint(101 + share * (max_count - 101)).astype(int)
    return tuple(int(n) for n in np.where(counts > 100, compressed, counts))


def laptop_spec() -> GlyphSpec:
    """`glyph_lvis_{train,val}`: 60 categories (24 rare, 22 common, 14 frequent), 1,200 and 300 images."""
    counts = np.array(long_tailed_image_counts(24, 22, 14, max_count=620))
    order = np.random.default_rng(60).permutation(len(counts))
    return GlyphSpec(
        name="glyph_lvis",
        characters=CHARACTERS_60,
        image_counts=tuple(counts[order]),
        num_train_images=1200,
        num_val_images=300,
        val_images_per_category=25,
    )


def lvis_sized_spec() -> GlyphSpec:
    """`glyph_lvis_1203_{train,val}`: LVIS v1's 337 rare, 461 common and 405 frequent image counts."""
    # LVIS orders categories by the alphabet, the characters are ordered by script: so they are shuffled.
    order = np.random.default_rng(1203).permutation(len(CHARACTERS_1203))
    return GlyphSpec(
        name="glyph_lvis_1203",
        characters="".join(CHARACTERS_1203[i] for i in order),
        image_counts=lvis_v1_image_counts(max_count=300),
        num_train_images=18000,
        num_val_images=2500,
        val_images_per_category=11,
        train_faces=("DejaVuSans-Bold", "DejaVuSans", "DejaVuSerif-Bold", "DejaVuSansMono-Bold"),
    )


#: The specs behind the names that `ensure_glyph_lvis` knows.
PREDEFINED_SPECS = {"glyph_lvis": laptop_spec, "glyph_lvis_1203": lvis_sized_spec}
