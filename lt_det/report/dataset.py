"""What an annotation file holds: counts, sizes, company of rare classes, exposures by sampler, suspicious entries.

Nothing here trusts the file: entries that a loader would refuse are counted and shown rather than raised.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lt_det.data.class_statistics import ClassStatistics, group_letters
from lt_det.data.json_summary import is_federated_image
from lt_det.data.samplers import expected_counts, sampler_by_name, samplers_with_options
from lt_det.declaration import declared_options
from lt_det.frequency import GROUP_LIMITS
from lt_det.io.json_blocks import iter_json_blocks
from lt_det.io.segmentations import has_usable_polygons
from lt_det.progress import progress_bar

__all__ = [
    "Advice",
    "Annotations",
    "Finding",
    "Inspection",
    "Sampling",
    "companions",
    "inspect_annotations",
    "read_annotations",
    "samplings",
    "suggest_threshold",
]

_EXAMPLES = 20  # of each kind of suspicious entry
_FRAME_SLACK = 1.0  # pixels: annotation tools round


@dataclass
class Finding:
    """Suspicious entries of one kind.

    Attributes:
        kind: a short name, stable.
        level: "error" (a loader refuses or drops it), "warning" (trains, but hardly as meant), "info".
        title: what was found.
        advice: why it matters and what to do.
        count: how many.
        examples: at most 20, ``{"image": ..., "annotation": ..., "category": ..., "detail": ...}``.
    """

    kind: str
    level: str
    title: str
    advice: str
    count: int = 0
    examples: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Annotations:
    """The entries of a json that can be used, as columns; N annotations, I images, K categories by ascending id.

    Attributes:
        path: of the json.
        images (I,): image records, without their long lists.
        categories (K,): category records.
        image, category (N,) int64: positions in the two.
        annotation_id (N,) int64; box (N, 4) float64 x, y, width, height; area (N,) float64, NaN where not stated;
            crowd, usable (N,) bool: whether it is a crowd region, and has a mask (or none at all) to train on.
        federated: whether images carry LVIS's lists of verified categories.
        negative: (P, 2) int64 image and category position of every listed negative.
        not_exhaustive: (P, 2) likewise.
        findings: what was wrong with entries that could not be taken in, or were taken in with a remark.
    """

    path: str
    images: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    image: np.ndarray
    category: np.ndarray
    annotation_id: np.ndarray
    box: np.ndarray
    area: np.ndarray
    crowd: np.ndarray
    usable: np.ndarray
    federated: bool
    negative: np.ndarray
    not_exhaustive: np.ndarray
    findings: dict[str, Finding]

    @property
    def trained(self) -> np.ndarray:
        """(N,) bool: annotations that become training instances."""
        return ~self.crowd & self.usable

    @property
    def names(self) -> list[str]:
        """K names."""
        return [str(c.get("name", c["id"])) for c in self.categories]


@dataclass
class Sampling:
    """What one epoch shows of each class under a sampler.

    Attributes:
        name: of the sampler; threshold: its repeat threshold, None where it has none.
        draws: expected images an epoch.
        largest: largest repeat factor.
        repeated: number of images with a factor above 1.
        images (K,), instances (K,): expected images with the class, and instances of it, an epoch.
    """

    name: str
    threshold: float | None
    draws: float
    largest: float
    repeated: int
    images: np.ndarray
    instances: np.ndarray


@dataclass
class Advice:
    """A repeat threshold and its reasons. ``threshold`` is None where repeating is of no use."""

    threshold: float | None
    reasons: list[str]
    candidates: list[Sampling]


@dataclass
class Inspection:
    """Result of :func:`inspect_annotations`."""

    annotations: Annotations
    statistics: ClassStatistics
    group: np.ndarray  # (K,) letters
    group_source: str
    instances_per_image: np.ndarray  # (I,)
    categories_per_image: np.ndarray  # (I,)
    samplings: list[Sampling]
    companions: list[dict[str, Any]]
    company: np.ndarray  # (3, 3): mean instances of group b in an image with group a
    advice: Advice
    findings: list[Finding]


# ---------------------------------------------------------------------------------------------- reading


def read_annotations(path: str | os.PathLike, *, progress: bool = False) -> Annotations:
    """Read an LVIS- or COCO-style json in one streamed pass, keeping columns alone.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not such a json, or without categories or images; the message says what is wrong.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no annotation file {path}.")
    return _Reader(path).read(progress)


class _Reader:
    def __init__(self, path: str):
        self.path = path
        self.findings: dict[str, Finding] = {}
        self.images: list[dict] = []
        self.categories: list[dict] = []
        self.lists: dict[str, tuple[array, array]] = {}
        self.federated = False
        self.ids = {name: array("q") for name in ("annotation", "image", "category")}
        self.numbers = array("d")
        self.flags = array("b")

    def read(self, progress: bool) -> Annotations:
        members: set[str] = set()
        size, title = os.path.getsize(self.path), f"reading {os.path.basename(self.path)}"
        bar = progress_bar(total=size, unit="B", unit_scale=True, desc=title, show=progress)
        take = {"images": self._image, "categories": self._category, "annotations": self._annotation}
        with bar:
            decoders = dict.fromkeys(take, json.loads)
            for name, block in iter_json_blocks(self.path, decoders, on_read=lambda data: bar.update(len(data))):
                members.add(name)
                for item in block if name in take else ():
                    try:
                        take[name](item)
                    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
                        self._note("malformed", {"detail": f"in {name}: {error!r}: {str(item)[:120]}"})
        missing = [name for name in ("images", "categories") if not getattr(self, name)]
        if missing:
            raise ValueError(
                f"{self.path} has no {' and no '.join(missing)}; an LVIS or COCO annotation json has 'images', "
                f"'annotations' and 'categories', this file {sorted(members) or 'nothing'}."
            )
        return self._columns()

    def _note(self, kind: str, example: dict[str, Any]) -> None:
        note(self.findings, kind, [example], 1)

    def _image(self, item: dict) -> None:
        image_id = _whole(item["id"])
        self.images.append({
            "id": image_id, "width": _positive(item["width"]), "height": _positive(item["height"]),
            "file": item.get("file_name") or item.get("coco_url") or "",
        })  # fmt: skip
        self.federated = self.federated or is_federated_image(item)
        for name in ("neg_category_ids", "not_exhaustive_category_ids"):
            listed = [_whole(c) for c in item.get(name) or ()]
            images, categories = self.lists.setdefault(name, (array("q"), array("q")))
            images.extend([image_id] * len(listed))
            categories.extend(listed)

    def _category(self, item: dict) -> None:
        self.categories.append({**item, "id": _whole(item["id"])})

    def _annotation(self, item: dict) -> None:
        ids = [_whole(item[key]) for key in ("id", "image_id", "category_id")]
        numbers = [float(v) for v in item["bbox"]]
        if len(numbers) != 4:
            raise ValueError(f"bbox has {len(numbers)} numbers, not 4")
        area = item.get("area")
        numbers.append(math.nan if area is None else float(area))
        flags = bool(item.get("iscrowd", 0)) + 2 * has_usable_polygons(item.get("segmentation"))
        for column, value in zip(self.ids.values(), ids):
            column.append(value)
        self.numbers.extend(numbers)
        self.flags.append(flags)

    def _columns(self) -> Annotations:
        self.categories.sort(key=lambda c: c["id"])
        self.images.sort(key=lambda i: i["id"])
        for name, records in (("image", self.images), ("category", self.categories)):
            counted = Counter(r["id"] for r in records)
            twice = [i for i, n in counted.items() if n > 1]
            examples = [{name: i, "detail": f"{counted[i]} times"} for i in twice]
            note(self.findings, f"duplicate_{name}_id", examples, len(twice))
            known: dict[int, dict] = {}
            for record in records:
                known.setdefault(record["id"], record)
            records[:] = known.values()
        ids = {name: np.frombuffer(column, np.int64) for name, column in self.ids.items()}
        numbers = np.frombuffer(self.numbers, np.float64).reshape(-1, 5)
        flags = np.frombuffer(self.flags, np.int8)
        place = {name: np.array([r["id"] for r in getattr(self, plural)], np.int64)
                 for name, plural in (("image", "images"), ("category", "categories"))}  # fmt: skip
        rank = {name: _ranks(place[name], ids[name]) for name in place}
        keep = np.ones(len(flags), bool)
        for name in place:
            strays = np.flatnonzero(rank[name] < 0)
            examples = [
                {"annotation": int(ids["annotation"][i]), "detail": f"{name}_id {ids[name][i]}"}
                for i in strays[:_EXAMPLES]
            ]
            note(self.findings, f"unknown_{name}", examples, len(strays))
            keep &= rank[name] >= 0
        lists = {}
        for name, (images, categories) in self.lists.items():
            pairs = np.stack([_ranks(place["image"], np.frombuffer(images, np.int64)),
                              _ranks(place["category"], np.frombuffer(categories, np.int64))], 1)  # fmt: skip
            strays = np.flatnonzero((pairs < 0).any(1))
            examples = [
                {"image": images[i], "detail": f"{name} lists category {categories[i]}"} for i in strays[:_EXAMPLES]
            ]
            note(self.findings, "unknown_listed", examples, len(strays))
            lists[name] = pairs[(pairs >= 0).all(1)]
        none = np.zeros((0, 2), np.int64)
        return Annotations(
            path=self.path, images=self.images, categories=self.categories, image=rank["image"][keep],
            category=rank["category"][keep], annotation_id=ids["annotation"][keep], box=numbers[keep, :4],
            area=numbers[keep, 4], crowd=(flags[keep] & 1) > 0, usable=(flags[keep] & 2) > 0, federated=self.federated,
            negative=lists.get("neg_category_ids", none),
            not_exhaustive=lists.get("not_exhaustive_category_ids", none), findings=self.findings,
        )  # fmt: skip


def _whole(value: Any) -> int:
    if isinstance(value, bool) or int(value) != value:
        raise ValueError(f"{value!r} is not a whole number")
    return int(value)


def _positive(value: Any) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"an image's side is {value!r}")
    return float(value)


def _ranks(sorted_ids: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Position of each id, -1 where it is not there."""
    place = np.minimum(np.searchsorted(sorted_ids, ids), len(sorted_ids) - 1)
    return np.where(sorted_ids[place] == ids, place, -1)


# ---------------------------------------------------------------------------------------------- suspicious entries

# kind: level, title, advice
_KINDS = {
    "malformed": (
        "error",
        "Entries that cannot be read",
        "A field is missing or not of its type; loaders stop here or drop the entry.",
    ),
    "unknown_image": (
        "error",
        "Annotations of images that the file does not list",
        "Drop the annotations or add the images.",
    ),
    "unknown_category": (
        "error",
        "Annotations of categories that the file does not list",
        "Drop the annotations or add the categories.",
    ),
    "unknown_listed": (
        "warning",
        "neg_category_ids or not_exhaustive_category_ids with unknown categories",
        "They have no effect; the lists may belong to another version of the data set.",
    ),
    "duplicate_annotation_id": (
        "error",
        "Annotation ids that occur more than once",
        "The official API keeps the last of them: renumber.",
    ),
    "duplicate_image_id": (
        "error",
        "Image ids that occur more than once",
        "Annotations cannot be told apart: renumber.",
    ),
    "duplicate_category_id": (
        "error",
        "Category ids that occur more than once",
        "Renumber the categories.",
    ),
    "duplicate_category_name": (
        "warning",
        "Category names that occur more than once",
        "Models and data sets are matched by names: make them unique.",
    ),
    "duplicate_file": (
        "warning",
        "Image files listed more than once",
        "The same picture under two ids counts twice, and may stand on both sides of a split.",
    ),
    "not_finite": (
        "error",
        "Boxes or areas that are not finite",
        "NaN or infinity: training on them gives NaN losses.",
    ),
    "degenerate": (
        "error",
        "Boxes without width or height",
        "Detectron2 drops them from training without a word.",
    ),
    "thin": (
        "info",
        "Boxes less than a pixel wide or high",
        "They vanish when images are resized; few detectors find them.",
    ),
    "out_of_frame": (
        "warning",
        "Boxes that reach out of their image",
        "By more than a pixel. Clip them; a swap of x and y, or boxes for another image size, look like this too.",
    ),
    "outside": (
        "error",
        "Boxes wholly outside of their image",
        "Nothing is left of them after clipping.",
    ),
    "area": (
        "warning",
        "Areas that are 0 or larger than the box",
        "The area sorts objects into small, medium and large, and LVIS drops annotations without any.",
    ),
    "polygon": (
        "warning",
        "Objects whose polygons have fewer than three points",
        "Detectron2 leaves them out of training; here they are left out of the counts too.",
    ),
    "duplicate": (
        "warning",
        "Objects annotated twice",
        "Same image, category and box. A detector finds one of them, the other counts as missed.",
    ),
    "two_categories": (
        "info",
        "One box under two categories",
        "Same image and box. In LVIS a thing may have two names; else one of them is wrong.",
    ),
    "negative_present": (
        "warning",
        "Categories listed as absent from an image that has them",
        "neg_category_ids contradicts the annotations.",
    ),
    "empty_category": (
        "warning",
        "Categories without images",
        "The prior of such a class is zero: set MODEL.LONG_TAIL.MIN_COUNT, or drop the category.",
    ),
    "empty_image": (
        "info",
        "Images without annotations",
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS decides whether they train the background.",
    ),
    "stated_count": (
        "info",
        "Categories whose stated image_count is another",
        "Right for a validation file, which states the training set's counts; else a subset kept the counts "
        "of the whole.",
    ),
    "stated_group": (
        "info",
        "Categories whose stated frequency group does not follow from the counts",
        "Right for a validation file; else a subset kept the groups of the whole.",
    ),
}


def note(findings: dict[str, Finding], kind: str, examples: Sequence[dict[str, Any]], count: int) -> None:
    """Add suspicious entries to the findings."""
    if count == 0:
        return
    found = findings.setdefault(kind, Finding(kind, *_KINDS[kind]))
    found.count += count
    found.examples += examples[: _EXAMPLES - len(found.examples)]


def _suspicious(data: Annotations, statistics: ClassStatistics, group: np.ndarray, thresholds) -> list[Finding]:
    findings = {kind: Finding(**vars(f)) for kind, f in data.findings.items()}
    names, image_ids = data.names, np.array([i["id"] for i in data.images])

    def annotations(kind: str, mask: np.ndarray, detail) -> None:
        rows = np.flatnonzero(mask)
        note(findings, kind, [
            {"image": int(image_ids[data.image[i]]), "annotation": int(data.annotation_id[i]),
             "category": names[data.category[i]], "detail": detail(i)} for i in rows[:_EXAMPLES]
        ], len(rows))  # fmt: skip

    def classes(kind: str, mask: np.ndarray, detail) -> None:
        rows = np.flatnonzero(mask)
        note(findings, kind, [{"category": names[k], "detail": detail(k)} for k in rows[:_EXAMPLES]], len(rows))

    ids, count = np.unique(data.annotation_id, return_counts=True)
    examples = [{"annotation": int(i), "detail": f"{n} times"} for i, n in zip(ids[count > 1], count[count > 1])]
    note(findings, "duplicate_annotation_id", examples, len(examples))
    for kind, values, key in (("duplicate_category_name", names, "category"),
                              ("duplicate_file", [i["file"] for i in data.images if i["file"]], "detail")):  # fmt: skip
        twice = [(v, n) for v, n in Counter(values).items() if n > 1]
        note(findings, kind, [{key: v, "detail": f"{v}, {n} times"} for v, n in twice], len(twice))

    box = data.box
    finite = np.isfinite(box).all(1) & ~np.isinf(data.area)
    annotations("not_finite", ~finite, lambda i: f"box {_short(box[i])}, area {data.area[i]:g}")
    x, y, w, h = np.where(finite[:, None], box, 1.0).T
    degenerate = finite & ((w <= 0) | (h <= 0))
    annotations("degenerate", degenerate, lambda i: f"box {_short(box[i])}")
    annotations("thin", finite & ~degenerate & ((w < 1) | (h < 1)), lambda i: f"{w[i]:.2f} x {h[i]:.2f}")
    width, height = (np.array([i[k] for i in data.images])[data.image] for k in ("width", "height"))

    def frame(i):
        return f"box {_short(box[i])} in {width[i]:g} x {height[i]:g}"

    outside = finite & ~degenerate & ((x >= width) | (y >= height) | (x + w <= 0) | (y + h <= 0))
    over = finite & (
        (x < -_FRAME_SLACK) | (y < -_FRAME_SLACK) | (x + w > width + _FRAME_SLACK) | (y + h > height + _FRAME_SLACK)
    )
    annotations("outside", outside, frame)
    annotations("out_of_frame", over & ~outside & ~degenerate, frame)
    # Rounded boxes are a little smaller than their masks.
    wrong_area = finite & ~degenerate & ((data.area <= 0) | (data.area > 1.05 * (w + 1) * (h + 1)))
    annotations("area", wrong_area, lambda i: f"area {data.area[i]:g}, box {w[i]:.1f} x {h[i]:.1f}")
    annotations("polygon", ~data.usable, lambda i: f"box {_short(box[i])}")

    # Boxes by hundredths of a pixel; those that are not finite were counted above.
    rows = np.flatnonzero(finite & ~degenerate & ~data.crowd)
    key = np.column_stack([data.image[rows], np.round(np.clip(box[rows], -1e9, 1e9) * 100).astype(np.int64)])
    order = np.lexsort((data.category[rows], *key.T[::-1]))
    same = (key[order][1:] == key[order][:-1]).all(1)
    again = data.category[rows][order][1:] == data.category[rows][order][:-1]
    for kind, mask in (("duplicate", same & again), ("two_categories", same & ~again)):
        second, first = rows[order[1:][mask]], rows[order[:-1][mask]]
        twin = dict(zip(second.tolist(), first.tolist()))
        flags = np.zeros(len(box), bool)
        flags[second] = True
        annotations(
            kind,
            flags,
            lambda i, twin=twin: f"as annotation {data.annotation_id[twin[i]]} ({names[data.category[twin[i]]]})",
        )

    K = len(names)
    present = np.unique(data.image * K + data.category)
    listed = data.negative[:, 0] * K + data.negative[:, 1]
    wrong = data.negative[np.isin(listed, present)]
    note(
        findings,
        "negative_present",
        [{"image": int(image_ids[i]), "category": names[k], "detail": ""} for i, k in wrong[:_EXAMPLES]],
        len(wrong),
    )
    classes("empty_category", statistics.image_count == 0, lambda k: f"id {data.categories[k]['id']}")
    empty = np.setdiff1d(np.arange(len(data.images)), data.image)
    note(
        findings,
        "empty_image",
        [{"image": int(image_ids[i]), "detail": data.images[i]["file"]} for i in empty[:_EXAMPLES]],
        len(empty),
    )
    if all("image_count" in c for c in data.categories):
        stated = np.array([c["image_count"] for c in data.categories])
        other = stated != statistics.image_count
        classes("stated_count", other, lambda k: f"stated {stated[k]}, counted {statistics.image_count[k]}")
    if statistics.frequency is not None:
        counted = group_letters(statistics.groups(thresholds), K)
        classes(
            "stated_group",
            counted != group,
            lambda k: f"stated {group[k]}, counted {counted[k]}: {statistics.image_count[k]} images",
        )
    severity = {"error": 0, "warning": 1, "info": 2}
    return sorted(findings.values(), key=lambda f: (severity[f.level], -f.count))


def _short(box: np.ndarray) -> str:
    return "(" + ", ".join(f"{v:.1f}" for v in box) + ")"


# ---------------------------------------------------------------------------------------------- samplers


class _Records(Sequence):
    """Detectron2's dataset dicts with nothing but classes, sharing one dict a class: what the samplers read."""

    def __init__(self, image: np.ndarray, category: np.ndarray, num_images: int, num_classes: int):
        one = [{"category_id": k, "iscrowd": 0} for k in range(num_classes)]
        order = np.argsort(image, kind="stable")
        start = np.searchsorted(image[order], np.arange(num_images + 1)).tolist()
        classes = category[order].tolist()
        self._records = [{"annotations": [one[k] for k in classes[a:b]]} for a, b in itertools.pairwise(start)]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index):
        return self._records[index]


def _records(data: Annotations) -> _Records:
    """The images that training sees: those with a class to learn (DATALOADER.FILTER_EMPTY_ANNOTATIONS)."""
    keep = data.trained
    images, image = np.unique(data.image[keep], return_inverse=True)
    return _Records(image, data.category[keep], len(images), len(data.categories))


def _sampling(name: str, threshold: float | None, records: Sequence[Mapping], num_classes: int) -> Sampling:
    # Threshold 0 repeats nothing, which the sampler that takes one would warn of.
    used = "TrainingSampler" if threshold == 0 else name
    options = {"repeat_threshold": threshold} if threshold else {}
    factors = sampler_by_name(used, records, seed=0, **options).repeat_factors
    factors = np.ones(len(records)) if factors is None else factors.double().numpy()
    once = [{"annotations": list({id(a): a for a in r["annotations"]}.values())} for r in records]
    return Sampling(
        name, threshold, float(factors.sum()), float(factors.max()), int((factors > 1).sum()),
        images=expected_counts(once, num_classes, factors), instances=expected_counts(records, num_classes, factors),
    )  # fmt: skip


def samplings(records: Sequence[Mapping], num_classes: int, threshold: float) -> list[Sampling]:
    """One epoch under every registered sampler that needs no more than the data set."""
    found = []
    for name, entry in sorted(samplers_with_options(), key=lambda e: e[0] != "TrainingSampler"):
        if name == "RandomSubsetTrainingSampler" or not getattr(entry, "resumable_by_replay", True):
            continue
        takes = "repeat_threshold" in {option.name for option in declared_options(entry)}
        found.append(_sampling(name, threshold if takes else None, records, num_classes))
    return found


def suggest_threshold(statistics: ClassStatistics, records: Sequence[Mapping], common_limit: int = 100) -> Advice:
    """A repeat threshold for repeat factor sampling.

    LVIS takes t = 0.001 with 100,170 images: classes in fewer than 100 images, its rare and common ones, are
    repeated. The same rule for any data set is t = (images that bound the common classes) / (images).

    Args:
        statistics: of the training set.
        records: its images.
        common_limit: most images of a common class.
    """
    num_images = len(records)
    t = common_limit / num_images
    counts = statistics.image_count[statistics.image_count > 0]
    share = float((counts < common_limit).mean())
    reasons = [
        f"Classes in fewer than {common_limit} of the {num_images:,} images are rare or common; t = {common_limit} / "
        f"{num_images:,} repeats images for exactly these ({100 * share:.0f} % of the classes). LVIS's 0.001 is this "
        "rule with 100,170 images."
    ]
    if t >= 1 or share == 1:
        # Everything is rare: a threshold relative to the most frequent classes still ranks them.
        t = float(np.quantile(counts, 0.75) / num_images)
        reasons = [
            f"With {num_images:,} images no class is in more than {common_limit}, as frequent ones are by LVIS's "
            "limits. t is set so that the most frequent quarter of the classes is not repeated."
        ]
    t = float(f"{t:.2g}")
    candidates = [_sampling("RepeatFactorTrainingSampler", c, records, statistics.num_classes)
                  for c in sorted({0.0, *(float(f"{t * f:.2g}") for f in (0.3, 1, 3, 10))})]  # fmt: skip
    chosen = next(c for c in candidates if c.threshold == t)
    if counts.max() / counts.min() < 3 or chosen.repeated == 0:
        ratio = counts.max() / counts.min()
        return Advice(
            None,
            [
                f"The most frequent class is in only {ratio:.1f} times as many images as the rarest: repeat "
                "factors have nothing to mend here. Use TrainingSampler."
            ],
            candidates,
        )
    reasons.append(
        f"At t = {t:g} an epoch has {chosen.draws / num_images:.2f} times as many draws as there are images; the most "
        f"repeated image comes {chosen.largest:.1f} times."
    )
    if chosen.largest > 30:
        reasons.append(
            "Images repeated more than 30 times an epoch are soon known by heart: take a smaller t, or a loss that "
            "corrects for the prior."
        )
    return Advice(t, reasons, candidates)


# ---------------------------------------------------------------------------------------------- company


def companions(
    data: Annotations, statistics: ClassStatistics, group: np.ndarray
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """With what the rare classes stand in one image.

    Returns:
        One row a rare class that has images: "name", "images", "with" (share of its images that hold a frequent class),
        "per_instance" (frequent instances in its images for each instance of it: what repeating such an image
        repeats besides), "companions" (its most common frequent classes with shares). And a (3, 3) table: mean
        instances of group b (columns r, c, f) in an image that holds group a (rows); NaN without such images.
    """
    keep = data.trained
    K, names = len(data.categories), data.names
    pairs, count = np.unique(data.image[keep] * K + data.category[keep], return_counts=True)
    image, category = pairs // K, pairs % K
    letters = np.array(["r", "c", "f"])
    index = np.full(K, -1)
    for i, letter in enumerate(letters):
        index[group == letter] = i
    per_image = np.zeros((len(data.images), 3))
    np.add.at(per_image, (image, index[category]), count)
    company = np.full((3, 3), np.nan)
    for a in range(3):
        if (per_image[:, a] > 0).any():
            company[a] = per_image[per_image[:, a] > 0].mean(0)
    start = np.searchsorted(image, np.arange(len(data.images) + 1))
    rows = []
    for k in np.flatnonzero((group == "r") & (statistics.image_count > 0)):
        images = image[category == k]
        others = np.concatenate([category[start[i] : start[i + 1]] for i in images])
        met = Counter(others[index[others] == 2].tolist())
        top = ", ".join(
            f"{names[c]} {n / len(images):.0%}" for c, n in sorted(met.items(), key=lambda e: (-e[1], e[0]))[:3]
        )
        rows.append({
            "name": names[k], "images": len(images), "instances": int(statistics.instance_count[k]),
            "with": 100 * float((per_image[images, 2] > 0).mean()),
            "per_instance": float(per_image[images, 2].sum() / statistics.instance_count[k]), "companions": top,
        })  # fmt: skip
    return rows, company


def inspect_annotations(
    path: str | os.PathLike,
    *,
    repeat_threshold: float | None = None,
    thresholds: tuple[int, int] = GROUP_LIMITS,
    progress: bool = False,
) -> Inspection:
    """Look at an annotation file from all sides.

    Args:
        path: an LVIS- or COCO-style json.
        repeat_threshold: of the samplers that take one; None: the one that is advised.
        thresholds: most images of a rare and of a common class, for files without a ``frequency`` field.
        progress: show a progress bar while reading, where the console is a terminal.

    Raises:
        FileNotFoundError, ValueError: no such file, not such a json, or no annotation that could train anything.
    """
    data = read_annotations(path, progress=progress)
    keep, K = data.trained, len(data.categories)
    if not keep.any():
        raise ValueError(f"{data.path} has no annotation of its images and categories that could be trained on.")
    pairs = np.unique(data.image[keep] * K + data.category[keep])
    stated = [c.get("frequency") for c in data.categories]
    statistics = ClassStatistics(
        image_count=np.bincount(pairs % K, minlength=K),
        instance_count=np.bincount(data.category[keep], minlength=K),
        num_images=len(data.images),
        names=tuple(data.names),
        frequency=tuple(stated) if all(f in ("r", "c", "f") for f in stated) else None,
    )
    groups = statistics.frequency_groups if statistics.frequency else statistics.groups(thresholds)
    group = group_letters(groups, K)
    source = (
        "the frequency field of the categories"
        if statistics.frequency
        else f"the counts: rare up to {thresholds[0]} images, common up to {thresholds[1]}, frequent above"
    )
    rows, company = companions(data, statistics, group)
    records = _records(data)
    advice = suggest_threshold(statistics, records, thresholds[1])
    threshold = repeat_threshold if repeat_threshold is not None else (advice.threshold or 0.001)
    return Inspection(
        annotations=data,
        statistics=statistics,
        group=group,
        group_source=source,
        instances_per_image=np.bincount(data.image[keep], minlength=len(data.images)),
        categories_per_image=np.bincount(pairs // K, minlength=len(data.images)),
        samplings=samplings(records, K, threshold),
        companions=rows,
        company=company,
        advice=advice,
        findings=_suspicious(data, statistics, group, thresholds),
    )
