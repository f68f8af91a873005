"""Class frequencies of a training set: the one place where lt_det takes them from."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lt_det.frequency import FREQUENCY_GROUPS, GROUP_LIMITS
from lt_det.io import write_json_atomically
from lt_det.io.segmentations import has_usable_polygons
from lt_det.losses.counts import COUNT_SOURCES as PRIOR_SOURCES
from lt_det.losses.counts import class_counts

from .columns import annotation_columns, box_centers
from .fractal import fractal_dimensions
from .json_summary import JsonSummary, image_and_instance_counts, summarize_json

__all__ = ["PRIOR_SOURCES", "ClassStatistics", "group_letters"]

_FORMAT = "lt_det.ClassStatistics"
# Detectron2's metadata and LVIS's category lists state image counts per category but not how many images
# there are. Keyed by (number of categories, sum of their image counts).
_KNOWN_NUM_IMAGES = {(1203, 360952): 100170}  # LVIS v1 train


def group_letters(groups: Mapping[str, np.ndarray], num_classes: int) -> np.ndarray:
    """``(K,)`` text, the group of each class; "" for one that is in none.

    Args:
        groups: class indices by letter, as :attr:`ClassStatistics.frequency_groups` has them.
    """
    letters = np.full(num_classes, "", dtype="<U1")
    for letter, members in groups.items():
        letters[members] = letter
    return letters


@dataclass(frozen=True, eq=False)
class ClassStatistics:
    """How often each of the K foreground classes occurs in a training set.

    Attributes:
        image_count: ``(K,)`` int64, number of images with at least one instance of the class. Read-only.
        instance_count: ``(K,)`` int64, number of instances; None where the source does not tell (Detectron2's LVIS v1
            metadata has image counts alone). Read-only.
        num_images: number of images in the set, images without annotations included; None if unknown.
        names: K class names.
        frequency: K letters ``r``, ``c`` or ``f`` as the annotation file states them, or None.
        sampled_count: ``(K,)`` float64, expected instances of each class in an epoch under the sampler in use, set by
            :meth:`with_sampled_counts`; None otherwise. Read-only.
        fractal_dimension: ``(K,)`` float64, see :func:`lt_det.data.fractal_dimensions`; None where the source has no
            boxes. Read-only.

    Crowd regions and objects without a usable mask are not counted.
    """

    image_count: np.ndarray
    instance_count: np.ndarray | None
    num_images: int | None
    names: tuple[str, ...]
    frequency: tuple[str, ...] | None = None
    sampled_count: np.ndarray | None = None
    fractal_dimension: np.ndarray | None = None

    def __post_init__(self) -> None:
        set_field = object.__setattr__  # the dataclass is frozen for everybody else
        set_field(self, "names", tuple(str(name) for name in self.names))
        num_classes = len(self.names)
        if num_classes == 0:
            raise ValueError("ClassStatistics needs at least one class, but names is empty.")
        set_field(self, "image_count", self._counts("image_count", self.image_count, np.int64))
        if self.instance_count is not None:
            set_field(self, "instance_count", self._counts("instance_count", self.instance_count, np.int64))
            bad = np.flatnonzero(self.image_count > self.instance_count)
            if bad.size:
                raise ValueError(
                    f"image_count exceeds instance_count for {self._some(bad)}: an image that contains a"
                    " class has at least one instance of it. Are the two swapped?"
                )
        if self.sampled_count is not None:
            set_field(self, "sampled_count", self._counts("sampled_count", self.sampled_count, np.float64))
        if self.fractal_dimension is not None:
            dimension = self._counts("fractal_dimension", self.fractal_dimension, np.float64)
            set_field(self, "fractal_dimension", dimension)
        if self.num_images is not None:
            set_field(self, "num_images", int(self.num_images))
            bad = np.flatnonzero(self.image_count > self.num_images)
            if self.num_images < 0 or bad.size:
                raise ValueError(
                    f"num_images is {self.num_images}, but image_count is larger for {self._some(bad)}."
                    if bad.size
                    else f"num_images must not be negative, got {self.num_images}."
                )
        if self.frequency is not None:
            set_field(self, "frequency", tuple(self.frequency))
            if len(self.frequency) != num_classes:
                raise ValueError(f"frequency has {len(self.frequency)} entries for {num_classes} classes.")
            unknown = sorted(set(map(str, self.frequency)) - set(FREQUENCY_GROUPS))
            if unknown:
                raise ValueError(f"frequency must be 'r', 'c' or 'f' for every class, found {unknown[:10]}.")

    def _counts(self, field: str, values: Any, dtype: type) -> np.ndarray:
        array = np.asarray(values)
        if array.shape != (len(self.names),):
            raise ValueError(f"{field} has shape {array.shape}, but there are {len(self.names)} class names.")
        if array.dtype.kind not in "iuf":
            raise ValueError(f"{field} must hold numbers, got dtype {array.dtype}.")
        bad = np.flatnonzero(~np.isfinite(array))
        if bad.size:
            raise ValueError(f"{field} is not finite for {self._some(bad)}.")
        bad = np.flatnonzero(array < 0)
        if bad.size:
            raise ValueError(f"{field} is negative for {self._some(bad)}.")
        result = array.astype(dtype)  # a copy, so that the caller's array stays writable
        bad = np.flatnonzero(result != array)
        if bad.size:
            raise ValueError(f"{field} is not a whole number for {self._some(bad)}.")
        result.flags.writeable = False
        return result

    def _some(self, indices: np.ndarray) -> str:
        shown = ", ".join(f"{self.names[i]} ({i})" for i in indices[:10])
        number = "1 class" if len(indices) == 1 else f"{len(indices)} classes"
        return f"{number}: {shown}" + (f" and {len(indices) - 10} more" if len(indices) > 10 else "")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ClassStatistics):
            return NotImplemented

        def same(a: Any, b: Any) -> bool:
            if a is None or b is None:
                return a is b
            return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b

        return all(same(getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))

    __hash__ = None  # holds arrays; two equal ones need not be one object

    @property
    def num_classes(self) -> int:
        """K, the number of foreground classes."""
        return len(self.names)

    # ---------------------------------------------------------------- groups

    @property
    def frequency_groups(self) -> dict[str, np.ndarray]:
        """Class indices of each group, ``{"r": ..., "c": ..., "f": ...}``, int64, ascending.

        The ``frequency`` field of the annotation file decides where it is present, as in LVIS, whose validation file
        carries the groups of the training set. Otherwise :meth:`groups` with LVIS's limits.
        """
        if self.frequency is None:
            return self.groups()
        letters = np.asarray(self.frequency)
        return {group: np.flatnonzero(letters == group).astype(np.int64) for group in FREQUENCY_GROUPS}

    def groups(self, thresholds: tuple[int, int] = GROUP_LIMITS) -> dict[str, np.ndarray]:
        """Class indices by image count: r up to ``thresholds[0]``, c up to ``thresholds[1]``, f above.

        The default is LVIS's: rare 1-10, common 11-100, frequent more than 100 images. A class that occurs in no image
        at all counts as rare.
        """
        low, high = thresholds
        if not 0 <= low < high:
            raise ValueError(f"thresholds must satisfy 0 <= first < second, got {thresholds}.")
        group = np.digitize(self.image_count, (low + 1, high + 1))
        return {name: np.flatnonzero(group == i).astype(np.int64) for i, name in enumerate(FREQUENCY_GROUPS)}

    # ---------------------------------------------------------------- priors

    def prior(self, source: str = "image_count", *, min_count: float = 0.0) -> np.ndarray:
        """Foreground prior pi: ``(K,)`` float64, positive, summing to one.

        Args:
            source: ``image_count``, ``instance_count``, or ``sampled``: the expected instance counts under the sampler
                in use, which is what the classifier sees; needs :meth:`with_sampled_counts`.
            min_count: counts below it are raised to it. With the default 0, a class with count 0 is an error, since its
                log prior would be minus infinity.

        Raises:
            ValueError: unknown source, counts that are not there, or zero counts with ``min_count`` 0.
        """
        counts = class_counts(self, source, min_count=min_count)
        return counts / counts.sum()

    def log_adjustment(self, source: str = "image_count", tau: float = 1.0, *, min_count: float = 0.0) -> np.ndarray:
        """``tau * log(K * pi)``: ``(K,)`` float64, zero for a uniform prior. See :meth:`prior`."""
        return tau * np.log(self.num_classes * self.prior(source, min_count=min_count))

    def with_sampled_counts(self, counts: Any) -> ClassStatistics:
        """A copy that knows the expected instance counts ``(K,)`` under the sampler in use.

        See :func:`lt_det.data.expected_counts`. Only ratios between classes matter.
        """
        return dataclasses.replace(self, sampled_count=np.asarray(counts, dtype=np.float64))

    # ---------------------------------------------------------------- sources

    @classmethod
    def from_json(
        cls,
        path: str | os.PathLike,
        *,
        num_images: int | None = None,
        cache: bool | None = None,
        cache_folder: Path | None = None,
    ) -> ClassStatistics:
        """Count an annotation file in LVIS or COCO format, or read a list of categories.

        Classes are ordered by category id, over all categories of the file. Counts are made from the annotations. A
        list of categories with ``image_count`` (and ``instance_count``), such as LVIS's
        ``lvis_v1_train_cat_info.json``, or a file without annotations gives the counts that it states.

        Args:
            path: json file; a large one is read once, see :func:`lt_det.data.annotation_file.open_annotation_file`.
            num_images: number of images, where the file does not tell.
            cache, cache_folder: see :func:`lt_det.data.annotation_file.open_annotation_file`.

        Raises:
            FileNotFoundError, ValueError: no such file, or not such a json; the message names the remedy.
        """
        summary = summarize_json(path, cache=cache, cache_folder=cache_folder)
        return cls._from_summary(summary, path, num_images)

    @classmethod
    def _from_summary(
        cls, summary: JsonSummary, path: Any, num_images: int | None, order: Sequence[int] | None = None
    ) -> ClassStatistics:
        if summary.image_count is None:
            raise ValueError(
                f"{path} has no annotations to count, and its categories have no 'image_count'. Name the annotation "
                "file of the training set."
            )
        order = range(len(summary.names)) if order is None else order

        def pick(values: Sequence | None) -> list | None:
            return None if values is None else [values[i] for i in order]

        if num_images is None and summary.counted:
            num_images = summary.num_images
        if num_images is None:
            num_images = _KNOWN_NUM_IMAGES.get((len(summary.names), sum(summary.image_count)))
        return cls(
            image_count=np.asarray(pick(summary.image_count), dtype=np.int64),
            instance_count=pick(summary.instance_count),
            num_images=num_images,
            names=pick(summary.names),
            frequency=pick(summary.frequency),
            fractal_dimension=pick(summary.fractal_dimension),
        )

    @classmethod
    def from_category_info(
        cls, categories: Sequence[Mapping[str, Any]], *, num_images: int | None = None
    ) -> ClassStatistics:
        """From category records with ``id`` and ``image_count``.

        ``name``, ``instance_count`` and ``frequency`` are taken where all records have them. Classes are ordered by id.
        This is the form of LVIS's category lists and of the ``class_image_count`` in Detectron2's metadata (which has
        no names; the ids stand in for them).
        """
        ordered = sorted(categories, key=lambda c: c["id"])
        lacking = [c["id"] for c in ordered if "image_count" not in c]
        if lacking:
            raise ValueError(f"Categories with these ids have no 'image_count': {lacking[:10]}.")
        image_count = [c["image_count"] for c in ordered]
        if num_images is None:
            num_images = _KNOWN_NUM_IMAGES.get((len(ordered), sum(image_count)))

        def column(field: str) -> list | None:
            return [c[field] for c in ordered] if all(field in c for c in ordered) else None

        return cls(
            image_count=image_count,
            instance_count=column("instance_count"),
            num_images=num_images,
            names=[c.get("name", str(c["id"])) for c in ordered],
            frequency=column("frequency"),
        )

    @classmethod
    def from_dataset_dicts(
        cls,
        dataset_dicts: Sequence[Mapping[str, Any]],
        num_classes: int,
        names: Sequence[str] | None = None,
    ) -> ClassStatistics:
        """Count a list in Detectron2's standard dataset format.

        Note that ``DATALOADER.FILTER_EMPTY_ANNOTATIONS`` removes images before they get here, which lowers
        ``num_images`` but no count of a class.

        Raises:
            ValueError: a ``category_id`` is outside ``[0, num_classes)``, or ``names`` has another length.
        """
        columns = annotation_columns(dataset_dicts)
        usable = ~columns.crowd
        if not hasattr(dataset_dicts, "columns"):  # else such objects are not in the columns
            every = (a.get("segmentation") for record in dataset_dicts for a in record.get("annotations") or ())
            usable &= np.fromiter(map(has_usable_polygons, every), bool, len(usable))
        image, category = columns.image[usable], columns.category[usable]
        if category.size and category.max() >= num_classes:
            record = dataset_dicts[int(image[category.argmax()])]
            raise ValueError(
                f"Image {record.get('image_id', record.get('file_name'))} has category_id {category.max()},"
                f" but there are {num_classes} classes (0 to {num_classes - 1}). Set the number of"
                " classes of the model to that of the data set."
            )
        image_count, instance_count = image_and_instance_counts(image, category, len(dataset_dicts), num_classes)
        if names is None:
            names = [str(i) for i in range(num_classes)]
        centers = box_centers(dataset_dicts)
        dimension = None if centers is None else fractal_dimensions(centers[usable], category, num_classes)
        return cls(image_count, instance_count, len(dataset_dicts), tuple(names), fractal_dimension=dimension)

    @classmethod
    def from_metadata(cls, metadata: Any, *, num_images: int | None = None) -> ClassStatistics:
        """From an entry of Detectron2's ``MetadataCatalog``, or its name.

        Sources, the first that is there:

        1. ``json_file``, if it exists: counted from its annotations (remembered for large files), in the order of
           ``thing_dataset_id_to_contiguous_id`` where the entry has that. A data set that lt_det makes on first use is
           made now.
        2. ``class_image_count``: what Detectron2 has for LVIS v1 train; no instance counts.

        Raises:
            ValueError: the entry has neither; the message says what to do.
        """
        from detectron2.data import MetadataCatalog

        from .datasets.register import prepare_dataset

        if isinstance(metadata, str):
            metadata = MetadataCatalog.get(metadata)
        name = metadata.name
        prepare_dataset(name)
        classes = metadata.get("thing_classes")
        json_file = metadata.get("json_file")
        if json_file and os.path.isfile(json_file):
            summary = summarize_json(json_file)
            order = None
            id_map = metadata.get("thing_dataset_id_to_contiguous_id")
            if id_map:
                missing = sorted(set(id_map) - set(summary.category_ids))
                if missing:
                    raise ValueError(
                        f"{json_file} lacks categories that the metadata of {name!r} maps: ids {missing[:10]}."
                    )
                position = {category: i for i, category in enumerate(summary.category_ids)}
                order = [position[c] for c in sorted(id_map, key=id_map.get)]
            statistics = cls._from_summary(summary, json_file, num_images, order)
            if not classes:
                return statistics
            if len(classes) != statistics.num_classes:
                raise ValueError(
                    f"Data set {name!r} has {len(classes)} thing_classes, but {json_file} has "
                    f"{statistics.num_classes} categories."
                )
            return dataclasses.replace(statistics, names=tuple(classes))
        counts = metadata.get("class_image_count")
        if counts:
            statistics = cls.from_category_info(counts, num_images=num_images)
            return dataclasses.replace(statistics, names=tuple(classes)) if classes else statistics
        raise ValueError(
            f"No class counts are known for data set {name!r}: "
            + (f"its annotation file {json_file} does not exist" if json_file else "its metadata has no json_file")
            + " and it has no class_image_count. Put the annotation file there, or write the counts of the "
            "training set to a file with ClassStatistics.to_json and name that."
        )

    def to_json(self, path: str | os.PathLike) -> None:
        """Write a small json file that :meth:`from_file` reads; replaced atomically."""
        content = {"format": _FORMAT, "version": 1}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            content[field.name] = value.tolist() if isinstance(value, np.ndarray) else value
        write_json_atomically(path, content)

    @classmethod
    def read(cls, path: str | os.PathLike) -> ClassStatistics:
        """:meth:`from_file` or :meth:`from_json`, as the file's beginning tells.

        Raises:
            FileNotFoundError, ValueError: no such file, or neither kind of file.
        """
        _require_file(path)
        with open(path, "rb") as file:
            own = f'"{_FORMAT}"'.encode() in file.read(256)
        return cls.from_file(path) if own else cls.from_json(path)

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> ClassStatistics:
        """Read what :meth:`to_json` wrote.

        Raises:
            FileNotFoundError, ValueError: no such file, or another kind of file.
        """
        _require_file(path)
        with open(path, encoding="utf-8") as file:
            try:
                content = json.load(file)
            except ValueError as error:
                raise ValueError(f"{path} is not valid json: {error}") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(
                f"{path} was not written by ClassStatistics.to_json. For an LVIS or COCO annotation file use "
                "ClassStatistics.from_json."
            )
        try:
            # Files written before there was a fractal dimension lack it.
            content.setdefault("fractal_dimension", None)
            return cls(**{field.name: content[field.name] for field in dataclasses.fields(cls)})
        except KeyError as error:
            raise ValueError(f"{path} lacks the field {error}.") from error


def _require_file(path: str | os.PathLike) -> None:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no class statistics file {path}.")
