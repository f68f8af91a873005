"""Renders a split into a folder, all of it or nothing, and keeps the predefined ones in a cache."""

import contextlib
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .pictures import compact_json, picture_name, render_pictures
from .plan import ImagePlan, frequency_group, measure_counts, plan_split
from .spec import PREDEFINED_SPECS, RECIPE_VERSION, SPLITS, GlyphSpec
from .vocabulary import category_entry

try:
    import fcntl
except ImportError:  # Windows: whoever renames first wins
    fcntl = None

logger = logging.getLogger(__name__)

_TEMPORARY = ".rendering"
_ABANDONED_AFTER_SECONDS = 24 * 3600


class GlyphPaths(NamedTuple):
    #: LVIS v1 annotations.
    json_file: str
    #: The folder that `file_name` and `coco_url` of the images are relative to.
    image_root: str


def ensure_glyph_lvis(
    name: str, root: str | Path | None = None, *, num_workers: int | None = None, progress: bool = True
) -> GlyphPaths:
    """
    Render one of the predefined data sets if the cache does not have it yet, and say where it is.

    Any number of processes may call this at once; one renders and the others wait for it.

    Args:
        name: glyph_lvis_train, glyph_lvis_val, glyph_lvis_1203_train or glyph_lvis_1203_val.
        root: cache folder; $LT_DET_CACHE, or else ~/.cache/lt_det.
        num_workers: processes that render; the number of usable CPU cores (16 at most) by default. The result does not
            depend on it.
        progress: show a progress bar.

    Raises:
        ValueError: for an unknown name.
        OSError: the cache cannot be written; the message names LT_DET_CACHE.
    """
    base, _, split = name.rpartition("_")
    if base not in PREDEFINED_SPECS or split not in SPLITS:
        known = [f"{base}_{split}" for base in PREDEFINED_SPECS for split in SPLITS]
        raise ValueError(f"unknown glyph data set {name!r}; known are {', '.join(known)}")
    return ensure_glyph_dataset(PREDEFINED_SPECS[base](), split, root, num_workers=num_workers, progress=progress)


def ensure_glyph_dataset(
    spec: GlyphSpec,
    split: str,
    root: str | Path | None = None,
    *,
    num_workers: int | None = None,
    progress: bool = True,
) -> GlyphPaths:
    """`ensure_glyph_lvis` for a recipe of one's own. The cache folder's name has the spec's fingerprint."""
    folder = cache_root(root) / f"{spec.name}_{split}-v{RECIPE_VERSION}-{spec.fingerprint()}"
    if not folder.is_dir():
        lock_file = folder.parent / f".{folder.name}.lock"
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock_file.touch()
        except OSError as error:
            message = f"cannot write the glyph_lvis cache: {error}. Set LT_DET_CACHE to a folder of yours."
            raise OSError(error.errno, message) from error
        with _locked(lock_file):
            if not folder.is_dir():
                build_glyph_dataset(spec, split, folder, num_workers=num_workers, progress=progress)
    return _paths(spec, split, folder)


def cache_root(root: str | Path | None = None) -> Path:
    """`root`, or $LT_DET_CACHE, or ~/.cache/lt_det."""
    return Path(root or os.environ.get("LT_DET_CACHE") or "~/.cache/lt_det").expanduser().absolute()


def build_glyph_dataset(
    spec: GlyphSpec,
    split: str,
    out_dir: str | Path,
    *,
    num_workers: int | None = None,
    progress: bool = True,
) -> GlyphPaths:
    """
    Render a split into the new folder `out_dir`: `<name>_<split>.json`, `<split>/*.jpg` and `spec.json`.

    The work is done in a folder beside it that is renamed at the end: `out_dir` is complete or absent. Where another
    process completes it first, its result, which is the same, is kept.

    Raises:
        FileExistsError: `out_dir` exists.
    """
    out_dir = Path(out_dir).absolute()
    if out_dir.exists():
        raise FileExistsError(f"{out_dir} exists; name a new folder, or remove it to render it again")
    plans = plan_split(spec, split)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(out_dir)
    temporary = out_dir.with_name(f"{out_dir.name}{_TEMPORARY}-{socket.gethostname()}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)  # of an earlier process with this id
    try:
        (temporary / split).mkdir(parents=True)
        started = time.perf_counter()
        annotations = render_pictures(spec, split, plans, temporary / split, num_workers=num_workers, progress=progress)
        json_file = _paths(spec, split, temporary).json_file
        _write_lvis_json(json_file, lvis_header(spec, split, plans), annotations, plans)
        recipe = {"recipe_version": RECIPE_VERSION, "split": split, "spec": spec.to_dict()}
        (temporary / "spec.json").write_text(compact_json(recipe), encoding="utf-8")
        try:
            os.rename(temporary, out_dir)
        except OSError:
            if not out_dir.is_dir():
                raise
        logger.info(f"Rendered {len(plans)} images to {out_dir} in {time.perf_counter() - started:.1f} s.")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _paths(spec, split, out_dir)


def lvis_header(spec: GlyphSpec, split: str, plans: list[ImagePlan]) -> dict:
    """The LVIS v1 dictionary of a split without its annotations."""
    train_plans = plans if split == "train" else plan_split(spec, "train")
    image_counts, instance_counts = measure_counts(train_plans, spec.num_categories)
    if tuple(image_counts.tolist()) != spec.image_counts:
        raise AssertionError(f"GlyphSpec {spec.name!r}: planned image counts differ from image_counts")
    images = []
    for plan in plans:
        file_name = f"{split}/{picture_name(plan.image_id)}"
        images.append(
            {
                "id": plan.image_id,
                "file_name": file_name,
                # Detectron2's LVIS loader takes the last two parts of this for the file's name.
                "coco_url": file_name,
                "height": spec.image_size,
                "width": spec.image_size,
                "neg_category_ids": [category + 1 for category in plan.negatives],
                "not_exhaustive_category_ids": [category + 1 for category in plan.not_exhaustive],
                "license": 1,
            }
        )
    categories = []
    for index, character in enumerate(spec.characters):
        counts = {"image_count": int(image_counts[index]), "instance_count": int(instance_counts[index])}
        categories.append(
            {
                **category_entry(character, index + 1),
                "frequency": frequency_group(image_counts[index]),
                **counts,
            }
        )
    return {
        "info": {
            "description": f"{spec.name}: a synthetic data set, characters drawn on solid bodies",
            "version": f"{RECIPE_VERSION}-{spec.fingerprint()}",
        },
        "licenses": [
            {"id": 1, "name": "No photograph, no third-party picture: rendered from font outlines", "url": ""}
        ],
        "images": images,
        "categories": categories,
    }


def _paths(spec: GlyphSpec, split: str, folder: Path) -> GlyphPaths:
    return GlyphPaths(str(folder / f"{spec.name}_{split}.json"), str(folder))


def _write_lvis_json(path: str, header: dict, annotations: dict[int, list], plans: list[ImagePlan]) -> None:
    """`annotations` are what `render_pictures` returns."""
    next_id = 1
    with open(path, "w", encoding="utf-8") as file:
        file.write(compact_json(header)[:-1] + ',"annotations":[')
        for plan in plans:
            rows = annotations[plan.image_id]
            if sorted(category for category, _ in rows) != sorted(plan.annotated):
                raise AssertionError(f"image {plan.image_id} does not show what was planned")
            for category, text in rows:
                ids = f'{{"id":{next_id},"image_id":{plan.image_id},"category_id":{category + 1},'
                file.write(("" if next_id == 1 else ",") + ids + text[1:])
                next_id += 1
        file.write("]}")
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock between processes; without effect where the file system has no locks."""
    with open(path, "w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info(f"Another process is rendering; waiting for it ({path}).")
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                logger.warning(f"{path.parent} cannot lock files ({error}); several processes may render at once.")
        yield


def _remove_abandoned(out_dir: Path) -> None:
    """Removes what processes that were killed while they rendered `out_dir` have left."""
    host = socket.gethostname()
    for folder in out_dir.parent.glob(f"{out_dir.name}{_TEMPORARY}-*"):
        owner, _, pid = folder.name.split(f"{_TEMPORARY}-", 1)[1].rpartition("-")
        try:
            idle = time.time() - max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
        except OSError:  # its owner has just removed or renamed it
            continue
        if (owner == host and pid.isdigit() and not _is_running(int(pid))) or idle > _ABANDONED_AFTER_SECONDS:
            logger.info(f"Removing {folder}, left by an interrupted rendering.")
            shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: int) -> bool:
    if os.name == "nt":  # where os.kill would end the process; the age decides alone
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
