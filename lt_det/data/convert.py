"""From a COCO json to LVIS style, splits, class subsets and mixtures of data sets.

All functions take and return the content of an annotation file (``{"images", "annotations", "categories", ...}``) and
leave what they were given as it was. Categories of what they return have the ids 1, 2, ..., K in the order of their
former ids, as Detectron2's LVIS loader wants them.
"""

from __future__ import annotations

import gzip
import heapq
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from lt_det.frequency import GROUP_LIMITS
from lt_det.io import write_atomically

__all__ = ["class_subset", "mix", "read_annotations", "split", "to_lvis", "write_annotations"]

logger = logging.getLogger(__name__)

# Fields that mark an annotation file as federated.
_FEDERATED = ("neg_category_ids", "not_exhaustive_category_ids")


def read_annotations(path: str | os.PathLike) -> dict[str, Any]:
    """The content of an LVIS- or COCO-style annotation file (gzip too), checked for what the functions here read.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a file; the message names what is wrong.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
        content = orjson.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{path} is not json: {error}.") from None
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file.") from None
    fields = {
        "images": ("id", "height", "width"),
        "annotations": ("image_id", "category_id"),
        "categories": ("id", "name"),
    }
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an annotation file.")
    for part, names in fields.items():
        rows = content.get(part)
        if not isinstance(rows, list):
            raise ValueError(f"{path} has no list {part!r}; it takes an LVIS- or COCO-style annotation file.")
        for index, row in enumerate(rows):
            missing = [n for n in names if n not in row] if isinstance(row, dict) else list(names)
            if missing:
                raise ValueError(f"{path}: {part}[{index}] has no {', '.join(missing)}.")
        if part != "annotations":
            twice = [key for key, count in Counter(row["id"] for row in rows).items() if count > 1]
            if twice:
                raise ValueError(f"{path}: {part} have ids twice: {twice[:5]}.")
    known = {part: {row["id"] for row in content[part]} for part in ("images", "categories")}
    for index, row in enumerate(content["annotations"]):
        for key, part in (("image_id", "images"), ("category_id", "categories")):
            if row[key] not in known[part]:
                raise ValueError(f"{path}: annotations[{index}] has the unknown {key} {row[key]!r}.")
    return content


def write_annotations(path: str | os.PathLike, content: Mapping[str, Any]) -> None:
    """Write the content of an annotation file, whole or not at all."""
    write_atomically(path, lambda file: file.write(orjson.dumps(content)), mode="wb")


def _is_federated(content: Mapping[str, Any]) -> bool:
    return bool(content["images"]) and all(field in content["images"][0] for field in _FEDERATED)


def _recount(content: dict, thresholds: tuple[int, int], keep_frequency: bool = False) -> dict:
    """Counts and frequency groups of the categories, in place."""
    images = defaultdict(set)
    instances: Counter = Counter()
    for row in content["annotations"]:
        images[row["category_id"]].add(row["image_id"])
        instances[row["category_id"]] += 1
    rare, common = thresholds
    for category in content["categories"]:
        count = len(images[category["id"]])
        category["image_count"], category["instance_count"] = count, instances[category["id"]]
        if not (keep_frequency and category.get("frequency") in ("r", "c", "f")):
            category["frequency"] = "r" if count <= rare else "c" if count <= common else "f"
    return content


def _renumbered(content: Mapping[str, Any], new_id: Mapping[int, int]) -> dict:
    """A copy with other category ids; categories, annotations and federated fields without a new id are left out."""
    categories = [dict(c, id=new_id[c["id"]]) for c in content["categories"] if c["id"] in new_id]
    images = []
    for image in content["images"]:
        image = dict(image)
        for field in _FEDERATED:
            if field in image:
                image[field] = sorted({new_id[c] for c in image[field] if c in new_id})
        images.append(image)
    annotations = [
        dict(row, category_id=new_id[row["category_id"]])
        for row in content["annotations"]
        if row["category_id"] in new_id
    ]
    rest = {k: v for k, v in content.items() if k not in ("images", "annotations", "categories")}
    categories.sort(key=lambda c: c["id"])
    return {**rest, "images": images, "annotations": annotations, "categories": categories}


def to_lvis(content: Mapping[str, Any], *, thresholds: tuple[int, int] = GROUP_LIMITS) -> dict:
    """A COCO-style annotation file in LVIS style.

    COCO images are annotated for every category, so each image's ``neg_category_ids`` are all categories that it does
    not have: evaluated by LVIS's rules, every detection counts, as by COCO's. A crowd region (``iscrowd``) says that
    more of its category may be there: it becomes the category's entry in ``not_exhaustive_category_ids``. A file that
    has federated fields keeps them.

    Args:
        thresholds: most images of a rare, and of a common category.
    """
    ids = sorted(c["id"] for c in content["categories"])
    out = _renumbered(content, {old: i for i, old in enumerate(ids, 1)})
    crowds = defaultdict(set)
    present = defaultdict(set)
    kept = []
    for index, row in enumerate(out["annotations"], 1):
        if row.pop("iscrowd", 0):
            crowds[row["image_id"]].add(row["category_id"])
            continue
        present[row["image_id"]].add(row["category_id"])
        row.setdefault("id", index)
        if "area" not in row and "bbox" in row:
            row["area"] = row["bbox"][2] * row["bbox"][3]
        kept.append(row)
    out["annotations"] = kept
    every = set(range(1, len(ids) + 1))
    federated = _is_federated(content)
    for image in out["images"]:
        key = image["id"]
        if not federated:
            image["neg_category_ids"] = sorted(every - present[key] - crowds[key])
            image["not_exhaustive_category_ids"] = []
        image["not_exhaustive_category_ids"] = sorted({*image["not_exhaustive_category_ids"], *crowds[key]})
    for category in out["categories"]:
        category.setdefault("synonyms", [category["name"]])
        category.setdefault("def", "")
        category.setdefault("synset", "")
    return _recount(out, thresholds)


def class_subset(
    content: Mapping[str, Any],
    *,
    names: Collection[str] = (),
    frequency: Collection[str] = (),
    keep_empty: bool = False,
) -> dict:
    """The part of a data set that some of its categories make.

    Args:
        names: of the categories to keep.
        frequency: groups to keep, of ``r``, ``c``, ``f``, as the file states them. With ``names``: the union.
        keep_empty: keep images that have none of these categories (and, where federated, are not verified for one).

    Raises:
        ValueError: for names that the file does not have, or if no category is left.
    """
    known = {c["name"]: c for c in content["categories"]}
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"there are no categories {', '.join(map(repr, unknown[:5]))}.")
    if frequency and any("frequency" not in c for c in content["categories"]):
        raise ValueError("the categories have no 'frequency'; make the file LVIS style first (lt-det convert lvis).")
    wanted = [c["id"] for c in content["categories"] if c["name"] in set(names) or c.get("frequency") in set(frequency)]
    if not wanted:
        raise ValueError("no category is left; name some, or a frequency group that is there.")
    out = _renumbered(content, {old: i for i, old in enumerate(sorted(wanted), 1)})
    if not keep_empty:
        used = {row["image_id"] for row in out["annotations"]}
        out["images"] = [i for i in out["images"] if i["id"] in used or i.get("neg_category_ids")]
    return out


def mix(
    contents: Sequence[Mapping[str, Any]],
    *,
    prefixes: Sequence[str] = (),
    thresholds: tuple[int, int] = GROUP_LIMITS,
) -> dict:
    """Several data sets as one, with classes of the same name as one.

    Each is brought to LVIS style first. A class that only one data set has was not looked for in the images of the
    other: it is neither negative nor exhaustive there, and LVIS's rules count no detection of it. (A loss that takes
    federated annotations into account, as ``Federated``, is the one to train with.) Image and annotation ids are new.

    Args:
        contents: the annotation files.
        prefixes: put before the file names of each data set's images, so that one image folder serves all.
        thresholds: as for :func:`to_lvis`, on the counts of all together.

    Raises:
        ValueError: if a file has two categories of one name, or two data sets bring the same image.
    """
    prefixes = list(prefixes) or [""] * len(contents)
    if len(prefixes) != len(contents):
        raise ValueError(f"there are {len(contents)} data sets and {len(prefixes)} prefixes.")
    out: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    id_of: dict[str, int] = {}
    seen: dict[str, int] = {}
    for number, (content, prefix) in enumerate(zip(contents, prefixes)):
        content = to_lvis(content)
        names = [c["name"] for c in content["categories"]]
        if len(set(names)) < len(names):
            twice = [n for n, count in Counter(names).items() if count > 1]
            raise ValueError(f"data set {number + 1} has two categories of the name {twice[0]!r}.")
        for category in content["categories"]:
            if category["name"] not in id_of:
                id_of[category["name"]] = len(id_of) + 1
                out["categories"].append(dict(category, id=id_of[category["name"]]))
        content = _renumbered(content, {c["id"]: id_of[c["name"]] for c in content["categories"]})
        image_id = {}
        for image in content["images"]:
            image_id[image["id"]] = len(out["images"]) + 1
            image["id"] = image_id[image["id"]]
            if prefix and not image.get("file_name"):
                image["file_name"] = "/".join(image["coco_url"].split("/")[-2:])
            if prefix:
                image["file_name"] = os.path.join(prefix, image["file_name"])
            name = image.get("file_name") or image.get("coco_url")
            if name and seen.setdefault(name, number) != number:
                raise ValueError(
                    f"data sets {seen[name] + 1} and {number + 1} both have the image {name}; give prefixes."
                )
            out["images"].append(image)
        for row in content["annotations"]:
            out["annotations"].append(dict(row, id=len(out["annotations"]) + 1, image_id=image_id[row["image_id"]]))
    return _recount(out, thresholds)


def split(
    content: Mapping[str, Any], *, fraction: float = 0.2, seed: int = 0, thresholds: tuple[int, int] = GROUP_LIMITS
) -> tuple[dict, dict]:
    """Two parts of a data set with about the same share of each class: every class in the first, and as many as can be
    in the second too.

    Iterative stratification (Sechidis et al., ECML PKDD 2011): images are dealt out class by class, the class with
    fewest images left first, each to the side that lacks most of that class. Before that each class, rarest first, gets
    an image on each side. Images of the same file name go to the same side. The result follows from the content and the
    seed.

    Args:
        fraction: share of the second part, in (0, 1).
        seed: decides between images that serve equally well.
        thresholds: of the frequency groups of a file that has none. Groups that a file states are kept, on both sides:
            they are a property of the classes, and of the whole set.

    Returns:
        The first part (to train on) and the second (to validate on). Categories have the counts of the first on both
        sides: of a validation file, as of LVIS's groups, it is the training images that matter. A class with one image
        is in the first alone, and so may be one that shares its few images with such; these are logged.

    Raises:
        ValueError: if ``fraction`` is not in (0, 1), or there are fewer than two images.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the fraction must lie between 0 and 1, not {fraction}.")
    units: dict[Any, int] = {}  # images of one file are one unit
    unit_of = {}
    for image in content["images"]:
        name = image.get("file_name") or image.get("coco_url") or ("id", image["id"])
        unit_of[image["id"]] = units.setdefault(name, len(units))
    if len(units) < 2:
        raise ValueError("there are fewer than two images to split.")
    classes_of: list[set[int]] = [set() for _ in units]
    for row in content["annotations"]:
        classes_of[unit_of[row["image_id"]]].add(row["category_id"])
    side = _deal(classes_of, fraction, np.random.default_rng(seed))

    whole = _recount(
        {**content, "categories": [dict(c) for c in content["categories"]]}, thresholds, keep_frequency=True
    )
    parts = []
    ids = sorted(c["id"] for c in whole["categories"])
    for s in (0, 1):
        images = [i for i in content["images"] if side[unit_of[i["id"]]] == s]
        here = {i["id"] for i in images}
        annotations = [row for row in content["annotations"] if row["image_id"] in here]
        part = _renumbered(
            {**whole, "images": images, "annotations": annotations}, {old: i for i, old in enumerate(ids, 1)}
        )
        parts.append(_recount(part, thresholds, keep_frequency=True))
    lacking = [
        a["name"] for a, b in zip(parts[0]["categories"], parts[1]["categories"])
        if a["image_count"] > 0 and b["image_count"] == 0
    ]  # fmt: skip
    for a, b in zip(parts[0]["categories"], parts[1]["categories"]):
        b["image_count"], b["instance_count"] = a["image_count"], a["instance_count"]
    if lacking:
        logger.warning(
            "%d class%s in the first part alone, having too few images for both: %s%s", len(lacking),
            " is" if len(lacking) == 1 else "es are", ", ".join(lacking[:10]), ", ..." if len(lacking) > 10 else "",
        )  # fmt: skip
    return parts[0], parts[1]


def _deal(classes_of: Sequence[set[int]], fraction: float, rng: np.random.Generator) -> np.ndarray:
    """The side (0 or 1) of each unit, see :func:`split`."""
    number = len(classes_of)
    order = rng.permutation(number)  # equal units in random order
    members: dict[int, list[int]] = defaultdict(list)
    for unit in order.tolist():
        for c in classes_of[unit]:
            members[c].append(unit)
    side = np.full(number, -1, np.int8)
    placed = {c: [0, 0] for c in members}
    share = (1 - fraction, fraction)

    def place(unit: int, to: int) -> None:
        side[unit] = to
        for c in classes_of[unit]:
            placed[c][to] += 1

    def lost(unit: int, to: int) -> int:
        """Classes that could never be on the other side, were the unit on side ``to``."""
        return sum(placed[c][1 - to] == 0 and len(members[c]) - sum(placed[c]) == 1 for c in classes_of[unit])

    def gain(unit: int, to: int) -> tuple:
        """The fewer classes lose their last chance elsewhere, and then the more are new there, the better."""
        return -lost(unit, to), sum(placed[c][to] == 0 for c in classes_of[unit])

    # Every class on both sides, rarest first; a class that can be on one side alone is on the first.
    for c in sorted(members, key=lambda c: (len(members[c]), c)):
        for to in (1, 0):
            free = [u for u in members[c] if side[u] < 0 and not (to == 1 and lost(u, 1))]
            if placed[c][to] == 0 and free:
                place(max(free, key=lambda u, to=to: gain(u, to)), to)

    # The rest, by the class with fewest free images; a heap whose entries may be out of date.
    free_of = {c: sum(side[u] < 0 for u in members[c]) for c in members}
    heap = [(n, c) for c, n in free_of.items() if n]
    heapq.heapify(heap)
    cursor = dict.fromkeys(members, 0)
    total = [int((side == s).sum()) for s in (0, 1)]
    while heap:
        n, c = heapq.heappop(heap)
        if n != free_of[c]:
            if free_of[c]:
                heapq.heappush(heap, (free_of[c], c))
            continue
        while side[members[c][cursor[c]]] >= 0:
            cursor[c] += 1
        unit = members[c][cursor[c]]
        lack = [share[s] * len(members[c]) - placed[c][s] for s in (0, 1)]
        if abs(lack[0] - lack[1]) < 1e-9:
            lack = [share[s] * number - total[s] for s in (0, 1)]
        to = int(lack[1] > lack[0])
        place(unit, to)
        total[to] += 1
        for other in classes_of[unit]:
            free_of[other] -= 1
        if free_of[c]:
            heapq.heappush(heap, (free_of[c], c))

    # Images without objects fill up the second side to its share.
    empty = [u for u in order.tolist() if side[u] < 0]
    wanted = min(len(empty), max(0, round(fraction * number) - total[1]))
    for i, unit in enumerate(empty):
        side[unit] = int(i < wanted)
    return side
