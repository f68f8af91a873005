"""Data sets by name: one's own files, the embedded glyph_lvis, and LVIS itself."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.lvis import get_lvis_instances_meta

from ..json_summary import summarize_json
from .lvis_format import load_lvis_or_coco_json, set_metadata

__all__ = [
    "GLYPH_LVIS_NAMES",
    "is_registered_here",
    "open_dataset",
    "prepare_dataset",
    "register_builtin",
    "register_dataset",
    "register_from_config",
    "require_dataset",
]

logger = logging.getLogger(__name__)

GLYPH_LVIS_NAMES = ("glyph_lvis_train", "glyph_lvis_val", "glyph_lvis_1203_train", "glyph_lvis_1203_val")


@dataclass(frozen=True)
class _Entry:
    """A data set registered here. ``locate`` gives (json_file, image_root), making them if need be."""

    locate: Callable[[], tuple[str, str]]
    files: tuple[str, str] | None  # None where locate makes them


_ENTRIES: dict[str, _Entry] = {}


def is_registered_here(name: str) -> bool:
    """Whether ``name`` was registered by :func:`register_dataset` or :func:`register_builtin`."""
    return name in _ENTRIES


def register_dataset(name: str, json_file: str | os.PathLike, image_root: str | os.PathLike) -> None:
    """Register an LVIS- or COCO-format json and its image folder with Detectron2's catalogs.

    Nothing is read now. ``json_file`` and ``image_root`` are in the metadata at once; ``thing_classes``,
    ``thing_dataset_id_to_contiguous_id``, ``class_image_count`` and ``evaluator_type`` (``lvis`` for a json with
    federated fields, else ``coco``) follow when the data set is loaded or by :func:`prepare_dataset`. Registering the
    same files under the same name again does nothing.

    Raises:
        ValueError: the name is taken by other files or by another data set.
    """
    files = (os.path.abspath(os.fspath(json_file)), os.path.abspath(os.fspath(image_root)))
    if name in _ENTRIES and _ENTRIES[name].files == files:
        return
    if name in _ENTRIES or name in DatasetCatalog:
        known = _ENTRIES[name].files if name in _ENTRIES else None
        raise ValueError(
            f"The data set name {name!r} is taken already"
            + (f" by {known[0]} with images in {known[1]}" if known else "")
            + ". Choose another name in DATASETS.REGISTER."
        )
    _register(name, _Entry(locate=lambda: files, files=files))
    MetadataCatalog.get(name).set(json_file=files[0], image_root=files[1])


def _register(name: str, entry: _Entry) -> None:
    _ENTRIES[name] = entry
    DatasetCatalog.register(name, lambda: _load(name))


def _load(name: str) -> Sequence[dict]:
    require_dataset(name)
    prepare_dataset(name)
    json_file, image_root = _ENTRIES[name].locate()
    return load_lvis_or_coco_json(json_file, image_root, name)


def prepare_dataset(name: str) -> None:
    """Make sure that a data set registered here is there, and complete its metadata.

    Renders the embedded data set if that has not been done. The annotation file is opened
    (:func:`lt_det.data.annotation_file.open_annotation_file`). Data sets that others registered are left alone.

    Raises:
        FileNotFoundError, ValueError: the annotation file is not there or not of this format.
    """
    if name in GLYPH_LVIS_NAMES:
        _register_glyph_lvis()
    if name not in _ENTRIES:
        return
    json_file, image_root = _ENTRIES[name].locate()
    if not os.path.isfile(json_file):
        raise FileNotFoundError(_missing_files_message(name, json_file, image_root))
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") is not None:
        return
    summary = summarize_json(json_file)
    fields = {
        "json_file": json_file,
        "image_root": image_root,
        "thing_classes": list(summary.names),
        "thing_dataset_id_to_contiguous_id": {c: i for i, c in enumerate(summary.category_ids)},
    }
    if summary.counted:
        # Detectron2's federated loss reads this field: one record per class, in order of the classes.
        fields["class_image_count"] = [
            {"id": c, "image_count": n} for c, n in zip(summary.category_ids, summary.image_count)
        ]
    set_metadata(name, json_file, **fields)
    set_metadata(name, json_file, evaluator_type="lvis" if summary.federated else "coco")


def register_from_config(entries: Iterable[Sequence[str]]) -> None:
    """Register what the config key ``DATASETS.REGISTER`` lists: (name, json file, image folder) triples.

    Raises:
        ValueError: an entry is not such a triple, or see :func:`register_dataset`.
    """
    for entry in entries:
        if (
            isinstance(entry, str)
            or not isinstance(entry, Sequence)
            or len(entry) != 3
            or not all(isinstance(part, (str, os.PathLike)) and os.fspath(part) for part in entry)
        ):
            raise ValueError(
                "DATASETS.REGISTER is a list of (name, json file, image folder) triples, such as "
                f'[["birds_train", "birds/train.json", "birds/images"]]; found {entry!r}.'
            )
        register_dataset(*entry)


def _locate_glyph_lvis(name: str) -> tuple[str, str]:
    from .glyph_lvis import ensure_glyph_lvis

    made = ensure_glyph_lvis(name)
    return os.fspath(made.json_file), os.fspath(made.image_root)


def register_builtin() -> None:
    """Register ``glyph_lvis_{train,val}`` and ``glyph_lvis_1203_{train,val}``, rendered on first use.

    Detectron2's LVIS entries (``lvis_v1_train`` and so on) keep their names and metadata, and are loaded by lt_det:
    same result, without the ``lvis`` package, which wants a windowing library. An entry that somebody else has replaced
    is left alone. The tools call this; importing lt_det does not. Calling it again does nothing.
    """
    _register_glyph_lvis()
    for name, loader in list(DatasetCatalog.data.items()):
        if getattr(loader, "__module__", None) == "detectron2.data.datasets.lvis":
            DatasetCatalog[name] = lambda name=name: _load_detectron2_lvis(name)


def _register_glyph_lvis() -> None:
    for name in GLYPH_LVIS_NAMES:
        if name not in _ENTRIES:
            _register(name, _Entry(locate=lambda name=name: _locate_glyph_lvis(name), files=None))


def _load_detectron2_lvis(name: str) -> Sequence[dict]:
    """What ``load_lvis_json`` gives for a name of ``register_lvis_instances``."""
    require_dataset(name)
    metadata = MetadataCatalog.get(name)
    try:
        set_metadata(name, "Detectron2", **get_lvis_instances_meta(name))
    except ValueError:  # neither v0.5 nor v1: Detectron2 does not load it; here the classes are those of the file
        return load_lvis_or_coco_json(metadata.json_file, metadata.image_root, name, lvis_fields=True)
    id_map = metadata.get("thing_dataset_id_to_contiguous_id")
    if id_map is None:
        id_map = {i + 1: i for i in range(len(metadata.thing_classes))}
    return load_lvis_or_coco_json(metadata.json_file, metadata.image_root, category_id_map=id_map, lvis_fields=True)


def _load_detectron2_coco(name: str) -> Sequence[dict]:
    """What ``load_coco_json`` gives for a name of ``register_coco_instances``."""
    require_dataset(name)
    metadata = MetadataCatalog.get(name)
    return load_lvis_or_coco_json(metadata.json_file, metadata.image_root, name)


_DETECTRON2_LOADERS = {
    "detectron2.data.datasets.lvis": _load_detectron2_lvis,
    "detectron2.data.datasets.coco": _load_detectron2_coco,
}


def open_dataset(name: str) -> Sequence[dict]:
    """The records of a data set. Whoever registered it with lt_det's, LVIS's or COCO's function gets a mapped one.

    For data sets in another form, what the ``DatasetCatalog`` has.

    Raises:
        KeyError, FileNotFoundError, ValueError: see :func:`require_dataset` and
            :func:`~lt_det.data.load_lvis_or_coco_json`.
    """
    require_dataset(name)
    if name in _ENTRIES:
        return _load(name)
    # register_lvis_instances and register_coco_instances register a function of their module, and put the paths into
    # the metadata.
    load = _DETECTRON2_LOADERS.get(getattr(DatasetCatalog.data.get(name), "__module__", None))
    metadata = MetadataCatalog.get(name)
    if load is not None and metadata.get("json_file") and metadata.get("image_root"):
        return load(name)
    return DatasetCatalog.get(name)


def require_dataset(name: str) -> None:
    """Check that a data set is registered and that its files are there; nothing is loaded or rendered.

    Raises:
        KeyError: no data set of this name; the message lists similar names.
        FileNotFoundError: files are missing; the message says what to get and where to put it.
    """
    if name in GLYPH_LVIS_NAMES:
        _register_glyph_lvis()
    if name not in DatasetCatalog:
        names = {*DatasetCatalog.keys(), *GLYPH_LVIS_NAMES}
        similar = difflib.get_close_matches(name, sorted(names), n=5, cutoff=0.5)
        raise KeyError(
            f"There is no data set {name!r}."
            + (f" Similar names: {', '.join(similar)}." if similar else "")
            + " Register your own by DATASETS.REGISTER: a list of (name, json file, image folder)."
        )
    if name in _ENTRIES and _ENTRIES[name].files is None:
        return  # made on first use
    metadata = MetadataCatalog.get(name)
    json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
    if (json_file and "://" not in json_file and not os.path.isfile(json_file)) or (
        image_root and "://" not in image_root and not os.path.isdir(image_root)
    ):
        raise FileNotFoundError(_missing_files_message(name, json_file, image_root))


def _missing_files_message(name: str, json_file: str | None, image_root: str | None) -> str:
    lacking = [
        f"{kind} {path}"
        for kind, path, there in (
            ("annotation file", json_file, os.path.isfile),
            ("image folder", image_root, os.path.isdir),
        )
        if path and not there(path)
    ]
    message = f"Data set {name!r} is not complete: there is no {' and no '.join(lacking)}. "
    if name in _ENTRIES:
        return message + "Put them there, or correct the paths in DATASETS.REGISTER."
    if name.startswith("lvis_"):
        root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))
        version = "v0.5" if "v0.5" in name else "v1"
        return (
            message + f"Download the LVIS {version} annotations from https://www.lvisdataset.org/dataset and unpack"
            f" them to {json_file}; download train2017.zip and val2017.zip (for test sets test2017.zip)"
            " from https://cocodataset.org/#download and unpack them to"
            f" {os.path.join(root, 'coco')}/train2017 and so on. Set the environment variable"
            f" DETECTRON2_DATASETS to keep the data elsewhere than in {os.path.abspath(root)}."
        )
    return message + "Put them there; DETECTRON2_DATASETS names the folder of Detectron2's own data sets."
