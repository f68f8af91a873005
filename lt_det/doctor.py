"""``python -m lt_det.doctor``: is this environment ready, are the data where they should be, does a config fit them?

    python -m lt_det.doctor
    python -m lt_det.doctor --config-file configs/lvis_balms.yaml MODEL.WEIGHTS model.pth

Each line is ``ok``, ``note`` or ``ERROR`` with a remedy; together they are a block for issues. The exit code is 1 if
there is an error.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

__all__ = ["Finding", "check_data", "check_environment", "check_run", "main"]


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        level: ``"ok"``, ``"note"`` or ``"ERROR"``.
        subject: what was looked at, a word or two.
        text: what was found; for errors with the remedy.
    """

    level: str
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<5}  {self.subject:<16}  {self.text}"


def _one_line(error: BaseException) -> str:
    text = error.args[0] if isinstance(error, KeyError) and error.args else error
    return " ".join(str(text).split()) or type(error).__name__


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_environment() -> Iterator[Finding]:
    """Python, lt_det, torch with torchvision, GPUs, Detectron2, what else lt_det requires, processors and memory."""
    import lt_det
    from lt_det.processes import usable_cores

    version = platform.python_version()
    yield Finding("ok", "Python", f"{version}, {platform.platform()}")
    yield Finding("ok", "lt_det", f"{lt_det.__version__} in {Path(lt_det.__file__).parent}")
    yield from _check_torch()
    yield from _check_detectron2()
    yield from _check_requirements()
    yield Finding("ok", "processors", f"{usable_cores()}; OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}")


def _check_torch() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("ERROR", "torch", f"{_one_line(error)}; install it, see https://pytorch.org.")
        return
    yield Finding("ok", "torch", torch.__version__)
    if sys.dont_write_bytecode and not os.path.exists(importlib.util.cache_from_source(torch.__file__)):
        packages = Path(torch.__file__).parent.parent
        text = "PYTHONDONTWRITEBYTECODE is set: each start compiles all packages, for seconds; compile them once:"
        yield Finding("note", "bytecode", f"{text} python -m compileall -q -j 0 {packages}")
    try:
        import torchvision
        from torchvision.ops import nms

        nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
        yield Finding("ok", "torchvision", torchvision.__version__)
    except (ImportError, RuntimeError, AttributeError) as error:
        remedy = "torch and torchvision come in pairs, and both with or both without CUDA: install them together."
        yield Finding("ERROR", "torchvision", f"{_one_line(error)}; {remedy}")
    if not torch.cuda.is_available():
        built = f"this torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "a torch without CUDA"
        yield Finding("note", "GPU", f"none ({built}); trainings run on the CPU.")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        try:
            torch.ones(8, 8, device=f"cuda:{index}") @ torch.ones(8, 8, device=f"cuda:{index}")
            text = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
            yield Finding("ok", f"GPU {index}", text)
        except RuntimeError as error:
            remedy = "a driver or a torch that does not fit this GPU"
            yield Finding(
                "ERROR", f"GPU {index}", f"{properties.name} does not compute: {_one_line(error)} ({remedy})."
            )


def _check_detectron2() -> Iterator[Finding]:
    try:
        import detectron2
        import detectron2.modeling
    except ImportError as error:
        remedy = (
            "pip install --no-build-isolation git+https://github.com/facebookresearch/detectron2.git, or the wheel "
            "that requirements-detectron2.txt pins."
        )
        yield Finding("ERROR", "Detectron2", f"{_one_line(error)}; {remedy}")
        return
    folder = Path(detectron2.__file__).resolve().parent
    names = dict.fromkeys(importlib.metadata.packages_distributions().get("detectron2", []))
    installed = {n: Path(str(importlib.metadata.distribution(n).locate_file("detectron2"))).resolve() for n in names}
    # A source folder may hide an installed one; a source folder that is itself installed (pip install -e) has no other.
    origins = [f"{n} {_version(n)}" for n, where in installed.items() if where == folder or not where.exists()]
    origin = ", ".join(origins) or "a source folder on the path"
    version = getattr(detectron2, "__version__", "?")
    yield Finding("ok", "Detectron2", f"{version} from {origin}, in {Path(detectron2.__file__).parent}")
    try:
        importlib.import_module("detectron2._C")
    except ImportError:
        text = "not built; Mask R-CNN and all of lt_det do without (deformable convolution and rotated boxes do not)."
        yield Finding("note", "Detectron2's _C", text)


def _check_requirements() -> Iterator[Finding]:
    """What lt_det's installation asks for, and what its optional parts import."""
    from packaging.requirements import Requirement

    try:
        requires = importlib.metadata.requires("lt_det") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("note", "requirements", "lt_det is imported from a folder, not installed: not checked.")
        requires = []
    bad = []
    for requirement in map(Requirement, requires):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            bad.append(f'"{requirement}"')
            have = "is not installed" if found is None else f"is {found}"
            yield Finding("ERROR", requirement.name, f"{have}; pip install {bad[-1]}")
    if requires and not bad:
        yield Finding("ok", "requirements", "all that lt_det asks for is installed")
    try:
        import cv2

        yield Finding("ok", "OpenCV", cv2.__version__)
    except ImportError as error:
        text = f"{_one_line(error)}; glyph_lvis and boundary AP need it: pip install opencv-python-headless"
        yield Finding("note", "OpenCV", text)


def check_data() -> Iterator[Finding]:
    """LVIS where Detectron2 expects it, and the cache folder."""
    from lt_det.io import cache_root

    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    where = f"{os.path.abspath(root)} (DETECTRON2_DATASETS {'set' if 'DETECTRON2_DATASETS' in os.environ else 'unset'})"
    needed = ["lvis/lvis_v1_train.json", "lvis/lvis_v1_val.json", "coco/train2017", "coco/val2017"]
    missing = [name for name in needed if not os.path.exists(os.path.join(root, name))]
    if missing:
        yield Finding("note", "LVIS v1", f"not in {where}: {', '.join(missing)}; only LVIS recipes need it.")
    else:
        yield Finding("ok", "LVIS v1", f"in {where}")
    cache = cache_root()
    there = next(p for p in (cache, *cache.parents) if p.exists())
    free = shutil.disk_usage(there).free / 2**30
    if os.access(there, os.W_OK):
        yield Finding("ok", "cache", f"{cache}, {free:.0f} GiB free")
    else:
        yield Finding("ERROR", "cache", f"{cache} cannot be written; set LT_DET_CACHE to a folder of yours.")


@contextmanager
def _logged_warnings() -> Iterator[list[str]]:
    """The warnings that lt_det logs meanwhile, which then go nowhere else."""
    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(" ".join(record.getMessage().split()))
    log = logging.getLogger("lt_det")
    propagate, log.propagate = log.propagate, False
    log.addHandler(handler)
    try:
        yield texts
    finally:
        log.removeHandler(handler)
        log.propagate = propagate


def check_run(config_file: str, opts: Sequence[str] = ()) -> Iterator[Finding]:
    """A config against its data: keys, files, class counts, class names, weights.

    Args:
        config_file: yaml or LazyConfig, or the name of a recipe.
        opts: ``KEY VALUE`` pairs, or overrides of a LazyConfig.
    """
    from lt_det import model_zoo

    with _logged_warnings() as warnings:
        try:
            path = model_zoo.resolve(config_file)
            read = _read_lazy if path.endswith(".py") else _read_yaml
            train, test, number, weights, losses = read(path, opts)
        except Exception as error:  # whatever a config can be wrong in
            yield Finding("ERROR", "config", _one_line(error))
            return
    yield Finding("ok", "config", path)
    for text in warnings:
        yield Finding("note", "config", text)
    if weights:
        from lt_det.engine.checkpoint import check_weights_path

        try:
            check_weights_path(weights)
            yield Finding("ok", "weights", weights)
        except Exception as error:
            yield Finding("ERROR", "weights", _one_line(error))
    found = list(_check_datasets(train, test, number))
    yield from found
    if any(f.level == "ERROR" for f in found):
        return
    try:
        for loss in losses:
            loss().prepare()
    except (OSError, ValueError) as error:
        yield Finding("ERROR", "loss", _one_line(error))


def _read_yaml(path: str, opts: Sequence[str]) -> tuple:
    from lt_det.engine.checks import given_keys
    from lt_det.engine.setup import finish_config, merged_config
    from lt_det.modeling import build_loss

    cfg = finish_config(merged_config(path, opts), given_keys(path, opts))
    losses = [partial(build_loss, cfg, stage=stage) for stage in ((1, 2) if cfg.DECOUPLE.ENABLED else (1,))]
    return cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.WEIGHTS, losses


def _read_lazy(path: str, opts: Sequence[str]) -> tuple:
    from detectron2.config import LazyConfig, instantiate
    from omegaconf import ListConfig, OmegaConf

    from lt_det.data import register_builtin
    from lt_det.engine.checks_lazy import check_lazy_config, check_lazy_overrides, lazy_datasets

    cfg = LazyConfig.load(path)
    check_lazy_overrides(cfg, list(opts))
    cfg = LazyConfig.apply_overrides(cfg, list(opts))
    check_lazy_config(cfg)
    register_builtin()
    number = OmegaConf.select(cfg, "model.roi_heads.num_classes")
    weights = OmegaConf.select(cfg, "train.init_checkpoint") or ""
    predictors = OmegaConf.select(cfg, "model.roi_heads.box_predictor")
    nodes = [p.get("loss") for p in (predictors if isinstance(predictors, ListConfig) else [predictors or {}])]
    nodes.append(OmegaConf.select(cfg, "train.decouple.loss"))
    losses = [partial(instantiate, node) for node in nodes if node is not None]
    return lazy_datasets(cfg, "train"), lazy_datasets(cfg, "test"), number, weights, losses


def _check_datasets(train: Sequence[str], test: Sequence[str], number: int | None) -> Iterator[Finding]:
    from detectron2.data import MetadataCatalog

    from lt_det.data import ClassStatistics, prepare_dataset, require_dataset
    from lt_det.engine.checks import check_class_count, check_classes

    usable = []
    for name in dict.fromkeys([*train, *test]):
        try:
            require_dataset(name)
            prepare_dataset(name)
            usable.append(name)
        except (OSError, KeyError, ValueError) as error:
            yield Finding("ERROR", name, _one_line(error))
    names = None
    for name in train:
        if name not in usable:
            continue
        metadata = MetadataCatalog.get(name)
        names = names or metadata.get("thing_classes")
        try:
            if number is not None:
                check_class_count("MODEL.ROI_HEADS.NUM_CLASSES", number, name)
            counts = ClassStatistics.from_metadata(metadata)
        except (OSError, ValueError) as error:
            yield Finding("ERROR", name, _one_line(error))
            continue
        groups = ", ".join(f"{len(counts.frequency_groups[g])} {g}" for g in "rcf")
        images = "?" if counts.num_images is None else f"{counts.num_images:,}"
        yield Finding("ok", name, f"{images} images, {counts.num_classes} classes ({groups})")
        zero = [n for n, c in zip(counts.names, counts.image_count) if c == 0]
        if zero:
            some = ", ".join(map(repr, zero[:3])) + (", ..." if len(zero) > 3 else "")
            what = "class has" if len(zero) == 1 else "classes have"
            yield Finding("note", name, f"{len(zero)} {what} no training image: {some}")
    for name in test:
        if name not in usable:
            continue
        try:
            if names:
                check_classes(names, f"DATASETS.TRAIN {train[0]!r}", name)
            yield Finding("ok", name, "the same classes as in training" if names else "found")
        except ValueError as error:
            yield Finding("ERROR", name, _one_line(error))


def main(argv: Sequence[str] | None = None) -> int:
    """``lt-det doctor``; returns 1 if something is wrong."""
    parser = argparse.ArgumentParser(
        prog="lt-det doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file", default="", metavar="FILE", help="check it against its data; a recipe's name too"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="as for train_net.py")
    args = parser.parse_args(argv)
    if args.opts and not args.config_file:
        parser.error("KEY VALUE pairs go with --config-file")

    findings: list[Finding] = []

    def show(found: Iterator[Finding]) -> None:
        for finding in found:
            findings.append(finding)
            print(finding, flush=True)

    print("```text")
    show(check_environment())
    if not any(f.level == "ERROR" for f in findings):
        show(check_data())
        if args.config_file:
            show(check_run(args.config_file, args.opts))
    print("```")
    errors = sum(f.level == "ERROR" for f in findings)
    print(f"{'Nothing is wrong.' if not errors else f'{errors} to mend.'} For an issue, copy the block above.")
    return int(errors > 0)


if __name__ == "__main__":
    sys.exit(main())
