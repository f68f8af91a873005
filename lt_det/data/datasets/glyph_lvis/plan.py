"""What goes on which image, decided before anything is drawn."""

import dataclasses

import numpy as np

from .spec import SPLITS, GlyphSpec


@dataclasses.dataclass
class ImagePlan:
    """Categories are indices into `GlyphSpec.characters`, not category ids."""

    image_id: int
    #: Annotated objects, one entry an instance.
    annotated: list[int]
    #: Objects that are drawn but not annotated, see `GlyphSpec.not_exhaustive_rate` and `unlisted_rate`.
    unannotated: list[int]
    not_exhaustive: list[int]
    negatives: list[int]


def random_generator(spec: GlyphSpec, *key: int) -> np.random.Generator:
    """An independent stream for each key, so that no image depends on the order in which images are drawn."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(spec.seed, spawn_key=key)))


def plan_split(spec: GlyphSpec, split: str) -> list[ImagePlan]:
    """
    Deal the categories out to the images of `split` such that category c is annotated in exactly `spec.image_counts[c]`
    (training) or `spec.val_images_per_category` (validation) of them.

    Raises:
        ValueError: where the images have not enough room for all (image, category) pairs.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    rng = random_generator(spec, SPLITS.index(split))
    num_images, num_categories = spec.num_images(split), spec.num_categories
    train_counts = np.array(spec.image_counts)
    counts = train_counts if split == "train" else np.full(num_categories, spec.val_images_per_category)

    room = rng.integers(spec.objects_per_image[0], spec.objects_per_image[1] + 1, num_images)
    has_unlisted = rng.random(num_images) < spec.unlisted_rate
    room -= has_unlisted & (room > 1)

    # Frequent categories first: they need many images that still have room.
    positives: list[list[int]] = [[] for _ in range(num_images)]
    for category in np.argsort(-counts, kind="stable"):
        wanted = counts[category]
        chosen = _draw_without_replacement(room**2, wanted, rng)
        if len(chosen) < wanted:
            raise ValueError(
                f"GlyphSpec {spec.name!r}: {int(counts.sum())} (image, category) pairs do not fit on {num_images} "
                f"{split} images of {spec.objects_per_image} objects; raise the number of images or "
                "objects_per_image, or lower the image counts"
            )
        room[chosen] -= 1
        for image in chosen:
            positives[image].append(int(category))

    first_id = 1 if split == "train" else spec.num_train_images + 1  # no id stands for two images
    negatives_range = spec.train_negatives if split == "train" else spec.val_negatives
    plans = []
    for image, categories in enumerate(positives):
        categories = sorted(categories)
        annotated, unannotated, not_exhaustive = list(categories), [], []
        for category in categories:
            if rng.random() < spec.not_exhaustive_rate:
                not_exhaustive.append(category)
                unannotated.append(category)
        num_extra = room[image] - len(not_exhaustive)
        if categories and num_extra > 0:
            annotated += [int(c) for c in rng.choice(categories, num_extra)]

        absent = np.ones(num_categories, bool)
        absent[categories] = False
        if has_unlisted[image] and absent.any():
            unlisted = int(_draw_without_replacement(train_counts * absent, 1, rng)[0])
            unannotated.append(unlisted)
            absent[unlisted] = False
        num_negatives = int(rng.integers(negatives_range[0], negatives_range[1] + 1))
        negatives = _draw_without_replacement(np.sqrt(train_counts) * absent, num_negatives, rng)
        plans.append(
            ImagePlan(
                image_id=first_id + image,
                annotated=annotated,
                unannotated=unannotated,
                not_exhaustive=not_exhaustive,
                negatives=sorted(int(c) for c in negatives),
            )
        )
    return plans


def _draw_without_replacement(weights: np.ndarray, num: int, rng: np.random.Generator) -> np.ndarray:
    """`num` indices in proportion to `weights`; fewer where fewer weights are above zero."""
    # Gumbel noise on log-weights, then the top n: the distribution of numpy's `choice`, only faster.
    possible = np.flatnonzero(weights)
    if len(possible) <= num:
        return possible
    keys = np.log(weights[possible]) + rng.gumbel(size=len(possible))
    return possible[np.argpartition(-keys, num)[:num]]


def measure_counts(plans: list[ImagePlan], num_categories: int) -> tuple[np.ndarray, np.ndarray]:
    """Image and annotated-instance count of each category, `(K,)` int64 both."""
    instances = [category for plan in plans for category in plan.annotated]
    pairs = [category for plan in plans for category in set(plan.annotated)]
    return np.bincount(pairs, minlength=num_categories), np.bincount(instances, minlength=num_categories)


def frequency_group(image_count: int) -> str:
    """LVIS: "r" for 1-10 training images, "c" for 11-100, "f" for more."""
    return "r" if image_count <= 10 else "c" if image_count <= 100 else "f"
