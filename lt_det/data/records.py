"""Training sets as sequences of Detectron2's dataset dicts that are made on access, with columns beside them.

Only what loads an image asks for its dict; what looks at all images reads the columns, see ``columns.py``.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.data.common import DatasetFromList
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from .annotation_file import AnnotationFile
from .columns import AnnotationColumns, annotation_columns
from .image_files import COCO_RULES, LVIS_RULES
from .record_checks import check_dataset_dicts

__all__ = [
    "DatasetRecords",
    "MappedDataset",
    "RecordPositions",
]


class _Sequence(Sequence):
    """What lists of dicts offer beside length and items, as far as it is used on data sets."""

    def __iter__(self) -> Iterator[dict]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, (str, bytes)):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None


# ------------------------------------------------------------------------------------------------------- one json file


class MappedDataset(_Sequence):
    """The images of an annotation file as Detectron2's dataset dicts, ordered by image id.

    An item is made on access and belongs to the caller. In another process the same columns are mapped.
    """

    def __init__(
        self,
        file: AnnotationFile,
        image_root: str,
        *,
        class_of: np.ndarray | None = None,
        check_images: bool = True,
        lvis_fields: bool = False,
    ):
        """
        Args:
            file: the columns.
            image_root: folder of the images; :func:`~lt_det.data.load_lvis_or_coco_json` says how one is found.
            class_of: ``(K,)`` class index of each category of the file, -1 for none; by default its position by id.
            check_images: look for the image files.
            lvis_fields: hand on what Detectron2's ``load_lvis_json`` does, which knows no crowds and no keypoints.

        Raises:
            FileNotFoundError: the image folder or the images are not there.
            ValueError: an annotation is of a category without class.
        """
        self.file = file
        self.image_root = image_root
        self._class_of = class_of
        self._dropped = ("iscrowd", "keypoints") if lvis_fields else ()
        if class_of is not None:
            used = np.bincount(file.category, minlength=len(class_of)) > 0
            strays = np.flatnonzero(used & (class_of < 0))
            if strays.size:
                ids = [file.meta["categories"][i]["id"] for i in strays[:10]]
                raise ValueError(f"{file.path}: annotations have categories that are not of this data set: ids {ids}.")
        self._rules = LVIS_RULES if file.meta["federated"] else COCO_RULES
        self._rule: int | np.ndarray | None = self._find_images() if check_images else None

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, i: int) -> dict:
        i = operator.index(i)
        if not -len(self) <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        i %= len(self)
        image = self.file.image(i)
        record = {"file_name": self._path(i, image), "height": image["height"], "width": image["width"]}
        if self.file.meta["federated"]:
            record["not_exhaustive_category_ids"] = image.get("not_exhaustive_category_ids", [])
            record["neg_category_ids"] = image.get("neg_category_ids", [])
        record["image_id"] = image["id"]
        objects = self.file.objects(i)
        for obj in objects:
            obj["bbox_mode"] = BoxMode.XYWH_ABS
            if self._class_of is not None:
                obj["category_id"] = int(self._class_of[obj["category_id"]])
            for field in self._dropped:
                obj.pop(field, None)
        record["annotations"] = objects
        return record

    def columns(self) -> AnnotationColumns:
        image = np.repeat(np.arange(len(self), dtype=np.int32), np.diff(self.file.first))
        crowd = np.zeros(len(image), bool) if self._dropped else self.file.crowd
        return AnnotationColumns(image, self.category(), crowd, len(self))

    def category(self) -> np.ndarray:
        """``(M,)`` class indices."""
        return self.file.category if self._class_of is None else self._class_of[self.file.category]

    def fingerprint(self) -> str:
        classes = None if self._class_of is None else self._class_of.tolist()
        return repr((self.file.digest, self.image_root, classes, self._dropped))

    # ---- where the images are

    def _path(self, i: int, image: Mapping[str, Any]) -> str:
        if self._rule is not None:
            rule = self._rule if isinstance(self._rule, int) else int(self._rule[i])
            path = self._rules[rule](self.image_root, image)
            if path is not None:
                return path
        return next(path for path in (rule(self.image_root, image) for rule in self._rules) if path is not None)

    def _find_images(self) -> int | np.ndarray:
        """The rule that finds a sample of the images, or for a mixed folder the rule of each image."""
        root, path = self.image_root, self.file.path
        if not PathManager.isdir(root):
            raise FileNotFoundError(
                f"There is no image folder {root} for {path}. Put the images there, or name the right folder."
            )
        sample = [self.file.image(i) for i in range(0, len(self), max(1, len(self) // 8))]
        for k, rule in enumerate(self._rules):
            found = [rule(root, image) for image in sample]
            if all(name is not None and PathManager.isfile(name) for name in found):
                return k
        rules = np.zeros(len(self), np.uint8)
        missing = []
        for i in range(len(self)):
            candidates = [rule(root, self.file.image(i)) for rule in self._rules]
            found = next(
                (k for k, name in enumerate(candidates) if name is not None and PathManager.isfile(name)), None
            )
            if found is None:
                missing.append([name for name in candidates if name is not None])
            else:
                rules[i] = found
        if missing:
            tried = ", ".join(dict.fromkeys(missing[0]))
            raise FileNotFoundError(
                f"{len(missing)} of the {len(self)} images of {path} are not under {root}; for the first one these "
                f"paths were tried: {tried}. Put the images there, or name the right folder."
            )
        return rules


# ------------------------------------------------------------------------------------------ several, or parts of them


class _Listed(_Sequence):
    """A plain list of dataset dicts, serialised so that workers share it, with its columns."""

    def __init__(self, records: Sequence[Mapping[str, Any]]):
        check_dataset_dicts(records)
        self._columns = annotation_columns(records)
        self._records = DatasetFromList(list(records), copy=False)
        lacking = [r for r in records if "width" not in r or "height" not in r]
        self.without_size = None if not lacking else lacking[0].get("image_id", lacking[0].get("file_name"))
        self.image_size = np.array([(r.get("width", 0), r.get("height", 0)) for r in records], float).reshape(-1, 2)
        objects = [record.get("annotations") or () for record in records]
        self.visible_keypoints = np.array(
            [sum(v > 0 for a in of_image for v in (a.get("keypoints") or ())[2::3]) for of_image in objects], np.int64
        )
        masks = (a.get("segmentation") for of_image in objects for a in of_image)
        self.has_bitmasks = any(isinstance(m, (dict, np.ndarray)) for m in masks)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> dict:
        return self._records[i]

    def columns(self) -> AnnotationColumns:
        return self._columns

    def fingerprint(self) -> str:
        return hashlib.sha256(repr(list(self)).encode()).hexdigest()


class DatasetRecords(_Sequence):
    """One data set or several in a row, whole or in part: what is trained on. Dicts are made on access.

    Slices and :meth:`select` give another one over the same data.
    """

    def __init__(self, sources: Sequence[Sequence[Mapping[str, Any]]], *, _rows: np.ndarray | None = None):
        """
        Args:
            sources: :class:`MappedDataset` or lists of dataset dicts.
        """
        self._sources = [s if isinstance(s, (MappedDataset, _Listed)) else _Listed(s) for s in sources]
        self._ends = np.cumsum([len(s) for s in self._sources], dtype=np.int64)
        self._rows = _rows  # positions in all of the sources together; None for all of them

    @classmethod
    def join(cls, parts: Sequence[DatasetRecords]) -> DatasetRecords:
        """The images of all parts in a row."""
        if len(parts) == 1:
            return parts[0]
        sources = list({id(s): s for part in parts for s in part._sources}.values())
        start = dict(zip(map(id, sources), np.cumsum([0] + [len(s) for s in sources])))
        rows = []
        for part in parts:
            own = np.concatenate([np.arange(len(s)) + start[id(s)] for s in part._sources])
            rows.append(own if part._rows is None else own[part._rows])
        return cls(sources, _rows=np.concatenate(rows))

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._rows is None else len(self._rows)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return self.select(np.arange(*i.indices(len(self))))
        i = operator.index(i)
        if not -len(self) <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        i %= len(self)
        row = i if self._rows is None else int(self._rows[i])
        source = int(np.searchsorted(self._ends, row, side="right"))
        return self._sources[source][row - int(self._ends[source]) + len(self._sources[source])]

    def select(self, indices: Any) -> DatasetRecords:
        """The images at ``indices`` (positions, or a mask of all of them), in that order."""
        indices = np.asarray(indices)
        if indices.dtype == bool:
            indices = np.flatnonzero(indices)
        rows = indices.astype(np.int64) if self._rows is None else self._rows[indices]
        return DatasetRecords(self._sources, _rows=rows)

    def _per_image(self, arrays: list[np.ndarray]) -> np.ndarray:
        values = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        return values if self._rows is None else values[self._rows]

    def columns(self) -> AnnotationColumns:
        image, category, crowd = self._gather([s.columns()[:3] for s in self._sources])
        return AnnotationColumns(image, category, crowd, len(self))

    def _gather(self, columns: list[Sequence[np.ndarray]]) -> list[np.ndarray]:
        """Columns of annotations, the first of them the image, of the sources, as columns of these records."""
        starts = self._ends - [len(s) for s in self._sources]
        if len(columns) == 1:
            joined = list(columns[0])
        else:
            joined = [np.concatenate(parts) for parts in zip(*columns)]
            joined[0] = np.concatenate([c[0] + start for c, start in zip(columns, starts)])
        if self._rows is None:
            return joined
        counts = np.bincount(joined[0], minlength=int(self._ends[-1]))
        first = np.cumsum(counts) - counts
        mine = counts[self._rows]
        image = np.repeat(np.arange(len(self._rows), dtype=np.int32), mine)
        within = np.arange(len(image)) - np.repeat(np.cumsum(mine) - mine, mine)
        at = np.repeat(first[self._rows], mine) + within
        return [image, *(column[at] for column in joined[1:])]

    def box_columns(self) -> tuple[np.ndarray, np.ndarray] | None:
        """``(M, 4)`` boxes as in the files (x, y, width, height) and ``(M, 2)`` width and height of their images, in
        the order of :meth:`columns`. None unless all data sets are mapped."""
        if not all(isinstance(s, MappedDataset) for s in self._sources):
            return None
        image, box = self._gather([(s.columns().image, s.file.box) for s in self._sources])
        return box, self.image_sizes()[image]

    def image_sizes(self) -> np.ndarray:
        """``(N, 2)`` float64, width and height.

        Raises:
            ValueError: an image has none.
        """
        for source in self._sources:
            if isinstance(source, _Listed) and source.without_size is not None:
                raise ValueError(f"Image {source.without_size} has no width and height.")
        sizes = [s.file.image_size if isinstance(s, MappedDataset) else s.image_size for s in self._sources]
        return self._per_image(sizes)

    def fingerprint(self) -> str:
        """A hash of what these records are: annotations, image folders, which images, in which order."""
        digest = hashlib.sha256()
        for source in self._sources:
            digest.update(source.fingerprint().encode())
        digest.update(b"all" if self._rows is None else self._rows.tobytes())
        return digest.hexdigest()

    @property
    def has_bitmasks(self) -> bool:
        """Whether there are masks that are not polygons."""
        return any(s.file.meta["has_rle"] if isinstance(s, MappedDataset) else s.has_bitmasks for s in self._sources)

    def with_annotations(self) -> DatasetRecords:
        """Without images that have no annotation, or crowd regions alone (``DATALOADER.FILTER_EMPTY_ANNOTATIONS``)."""
        columns = self.columns()
        return self.select(np.bincount(columns.image[~columns.crowd], minlength=len(self)) > 0)

    def with_keypoints(self, least: int) -> DatasetRecords:
        """Without images that have fewer than ``least`` visible keypoints."""
        counts = [
            np.add.reduceat(np.append(s.file.visible_keypoints, 0), s.file.first[:-1]) * (np.diff(s.file.first) > 0)
            if isinstance(s, MappedDataset)
            else s.visible_keypoints
            for s in self._sources
        ]
        return self.select(self._per_image(counts) >= least)


class RecordPositions(_Sequence):
    """Stands in for records where images are not read: item i is ``{"cache_index": i}``; columns are those of the
    records."""

    def __init__(self, records: DatasetRecords):
        self._length = len(records)
        self._records = records

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> dict:
        return {"cache_index": range(self._length)[i]}

    def columns(self) -> AnnotationColumns:
        return self._records.columns()

    def image_sizes(self) -> np.ndarray:
        return self._records.image_sizes()
