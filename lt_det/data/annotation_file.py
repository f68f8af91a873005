"""An annotation file in LVIS or COCO format as columns: read once, kept on disk, mapped by every process that needs it.

The first reader of a large file writes its columns into lt_det's cache, under the hash of the file's content; all
others, at the same time or later, map them. Objects stand in the order of Detectron2's loaders: images by id, the
objects of an image as in the file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from filelock import FileLock

from lt_det.io import cache_root, write_json_atomically
from lt_det.io.array_folder import ArrayFolderWriter, CheckedArray, CorruptFolderError, open_array_folder

from .annotation_reader import SegmentKind, read_columns

__all__ = ["AnnotationFile", "open_annotation_file"]

_VERSION = 1  # of the columns; a change makes old ones unused
# Reading a smaller file takes less than half a second: no cache, no progress bar.
_LARGE = 32 << 20  # bytes


class AnnotationFile:
    """Columns of an annotation file. N images by id, M objects by image, K categories by id. Everything is read-only.

    Attributes:
        path: the json file.
        meta: what the file says beside images and objects: ``categories`` (the file's records, by id), ``federated``,
            ``has_annotations`` (whether there is such a member), ``num_skipped`` (objects without a usable polygon),
            ``num_empty_boxes``, ``has_rle``.
        image_size: ``(N, 2)`` float64, width and height.
        first: ``(N + 1,)`` int64; the objects of image i are ``first[i]`` to ``first[i + 1]``.
        category: ``(M,)`` int32, position of the category by id.
        crowd: ``(M,)`` bool.
        box: ``(M, 4)`` float64, x, y, width, height as in the file.
        annotation_id: ``(M,)`` int64, -1 where the file's is not an integer.
        visible_keypoints: ``(M,)`` int32.
        fractal_dimension: ``(K,)`` float64, of the objects that are not crowds.
    """

    def __init__(self, path: str, folder: Path | None, arrays: Mapping[str, Any], meta: Mapping[str, Any]):
        self.path = path
        self._folder = folder
        self._arrays = arrays
        self.meta = meta
        self.image_size: np.ndarray = arrays["image_size"]
        self.first: np.ndarray = arrays["first"]
        self.category: np.ndarray = arrays["category"]
        self.crowd: np.ndarray = arrays["is_crowd"]
        self.box: np.ndarray = arrays["box"]
        self.annotation_id: np.ndarray = arrays["annotation_id"]
        self.visible_keypoints: np.ndarray = arrays["visible_keypoints"]
        self.fractal_dimension: np.ndarray = arrays["fractal_dimension"]
        self._points: CheckedArray = arrays["points"]
        self._text: CheckedArray = arrays["text"]
        self._loads = json.loads if meta["plain_json"] else msgspec.json.decode

    def __len__(self) -> int:
        return len(self.image_size)

    @property
    def digest(self) -> str:
        """A hash of the file's content."""
        return self._folder.name if self._folder is not None else _digest(self.path)

    @property
    def num_objects(self) -> int:
        return len(self.category)

    def __reduce__(self):
        # Another process maps the same files; what is in memory alone goes along.
        if self._folder is not None:
            return _open_folder, (self.path, self._folder)
        return AnnotationFile, (self.path, None, dict(self._arrays), self.meta)

    def image(self, i: int) -> dict:
        """The fields of image i that data sets hand on, as in the file."""
        start = int(self._arrays["image_text_start"][i])
        return self._decode(start, int(self._arrays["image_text_length"][i]))

    def _decode(self, start: int, length: int) -> dict:
        with self._told():
            return self._loads(bytes(self._text.read(start, start + length)))

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except CorruptFolderError as error:
            raise _corrupt(self.path, self._folder, error) from error

    def objects(self, i: int) -> list[dict]:
        """The annotations of image i as in the file, without ``id``, ``image_id`` and ``area``.

        ``category_id`` is the position of the category. Masks are as Detectron2's loaders hand them on: polygons
        without those of fewer than three points, or compressed RLE.
        """
        a = self._arrays
        rows = slice(int(self.first[i]), int(self.first[i + 1]))
        if rows.start == rows.stop:
            return []
        boxes, integer = self.box[rows].tolist(), a["box_integer"][rows].tolist()
        categories, crowd, kinds = self.category[rows].tolist(), a["crowd"][rows].tolist(), a["kind"][rows].tolist()
        parts, part_counts = a["part"][rows].tolist(), a["part_count"][rows].tolist()
        texts, lengths = a["text_start"][rows].tolist(), a["text_length"][rows].tolist()
        result = []
        for j, box in enumerate(boxes):
            if integer[j]:
                box = [int(v) if integer[j] >> k & 1 else v for k, v in enumerate(box)]
            obj: dict[str, Any] = {"bbox": box, "category_id": categories[j]}
            if crowd[j] >= 0:
                obj["iscrowd"] = crowd[j]
            if kinds[j] in (SegmentKind.FLOATS, SegmentKind.INTEGERS):
                ends = a["part_end"][parts[j] : parts[j] + part_counts[j] + 1].tolist()
                with self._told():
                    points = self._points.read(ends[0], ends[-1])
                if kinds[j] == SegmentKind.INTEGERS:
                    points = points.astype(np.int64)
                values = points.tolist()
                obj["segmentation"] = [values[s - ends[0] : e - ends[0]] for s, e in itertools.pairwise(ends)]
            if lengths[j]:
                more = self._decode(texts[j], lengths[j])
                if "rle" in more:
                    *size, counts = more.pop("rle")
                    more["segmentation"] = {"size": size, "counts": counts.encode("ascii")}
                obj.update(more)
            result.append(obj)
        return result


def _corrupt(path: str, folder: Path | None, error: Exception) -> ValueError:
    return CorruptFolderError(f"{error}. Delete the folder {folder}: it is made again from {path}.")


# ------------------------------------------------------------------------------------------------- opening and caching

_OPEN: weakref.WeakValueDictionary[tuple, AnnotationFile] = weakref.WeakValueDictionary()


def open_annotation_file(
    path: str | os.PathLike,
    *,
    extra_keys: Sequence[str] = (),
    cache: bool | None = None,
    cache_folder: Path | None = None,
) -> AnnotationFile:
    """Open an LVIS or COCO json file as columns, reading it if nobody has yet. A file that is open is not opened twice.

    Args:
        path: the json file.
        extra_keys: fields of the annotations to keep besides the standard ones.
        cache: keep the columns for the next process; by default for files from 32 MB on.
        cache_folder: default ``cache_root() / "annotations"``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not such a json, with what is wrong; or the columns on disk are damaged.
        OSError: the cache cannot be written; the message names the folder.
    """
    path = os.path.realpath(os.fspath(path))
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no annotation file {path}. Check the path, or put the file there.")
    stat = os.stat(path)
    if cache is None:
        cache = _is_large(path)
    root = Path(cache_folder) if cache_folder is not None else cache_root() / "annotations"
    stamp = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "inode": stat.st_ino}
    extra_keys = tuple(sorted(set(extra_keys)))
    opened = (path, *stamp.values(), extra_keys, root if cache else None)
    file = _OPEN.get(opened)
    if file is None:
        file = _open_cached(path, stamp, extra_keys, root) if cache else _in_memory(path, extra_keys)
        _OPEN[opened] = file
    return file


def _is_large(path: str) -> bool:
    return os.path.getsize(path) >= _LARGE


def _in_memory(path: str, extra_keys: Sequence[str]) -> AnnotationFile:
    chunks: dict[str, list[np.ndarray]] = {"points": [np.zeros(0)], "text": [np.zeros(0, np.uint8)]}
    arrays, meta = read_columns(
        path, extra_keys, chunks["points"].append, chunks["text"].append, None, progress=_is_large(path)
    )
    checked = {name: CheckedArray(np.concatenate(parts), None, path) for name, parts in chunks.items()}
    return AnnotationFile(path, None, {**arrays, **checked}, meta)


def _open_cached(path: str, stamp: dict, extra_keys: Sequence[str], root: Path) -> AnnotationFile:
    """The columns of the file with this content. Which content a path has is remembered by size and time of change."""
    note = root / f"{Path(path).stem}-{hashlib.sha256(path.encode()).hexdigest()[:16]}.json"
    suffix = f"-{stamp['size']}-v{_VERSION}" + "".join(f"+{key}" for key in extra_keys).replace("/", "_")

    def folder_of(digest: str) -> Path:
        return root / (digest[:32] + suffix)

    def known() -> Path | None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(note.read_text(encoding="utf-8"))
            if content["stamp"] == stamp and folder_of(content["sha256"]).is_dir():
                return folder_of(content["sha256"])
        return None

    folder = known()
    if folder is None:
        try:
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / f".{note.stem}.lock"):  # of eight ranks one reads, the others wait for it
                folder = known()
                if folder is None:
                    digest = _digest(path) if any(root.glob("*" + suffix)) else None
                    if digest is None or not folder_of(digest).is_dir():
                        digest = _write_columns(path, extra_keys, root, folder_of)
                    write_json_atomically(note, {"path": path, "stamp": stamp, "sha256": digest})
                    folder = folder_of(digest)
        except OSError as error:
            why = "the disk is full" if error.errno == errno.ENOSPC else str(error)
            raise OSError(
                error.errno,
                f"the columns of {path} cannot be kept in {root} ({why}). Free space there (as much as the json file "
                "takes), or set the environment variable LT_DET_CACHE to another folder",
            ) from error
    return _open_folder(path, folder)


def _open_folder(path: str, folder: Path) -> AnnotationFile:
    try:
        arrays, meta = open_array_folder(folder)
    except CorruptFolderError as error:
        raise _corrupt(path, folder, error) from error
    return AnnotationFile(path, folder, arrays, meta)


def _digest(path: str) -> str:
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write_columns(path: str, extra_keys: Sequence[str], root: Path, folder_of: Callable[[str], Path]) -> str:
    content_hash = hashlib.sha256()
    with ArrayFolderWriter(root) as writer:
        arrays, meta = read_columns(
            path, extra_keys, writer.stream("points", np.float64), writer.stream("text", np.uint8),
            content_hash.update, progress=_is_large(path),
        )  # fmt: skip
        for name, array in arrays.items():
            writer.add(name, array)
        digest = content_hash.hexdigest()
        writer.finish(folder_of(digest), meta)
    return digest
