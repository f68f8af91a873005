"""Shared fixtures. Nothing here needs the network."""

import importlib.util
import logging
import multiprocessing
import os
from pathlib import Path

import pytest

# Two workers on two cores, many small operators: more threads than cores cost far more than they give.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

settings.register_profile("lt_det", deadline=None)
settings.load_profile("lt_det")

REPO = Path(__file__).resolve().parent.parent
# What is handed to the workers first, in this order. A file for each group of numba's kernels: in a new checkout each
# worker compiles one, where all of them, and the processes that they start, would compile all. Then the folders of long
# files, or one worker ends long after the rest.
FIRST = (
    "evaluation/test_rle.py", "io/test_annotations.py", "modeling/test_pooling.py", "evaluation/test_results_files.py",
    "tools", "engine", "modeling",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    first = [REPO / "tests" / place for place in FIRST]

    def place(item):
        return next((i for i, path in enumerate(first) if path == item.path or path in item.path.parents), len(first))

    items.sort(key=place)


@pytest.fixture(scope="session")
def repo_dir() -> Path:
    return REPO


@pytest.fixture(scope="session")
def load_script():
    """``load_script("tools/x.py")``: a script of the repository as a module."""

    def load(path: str):
        spec = importlib.util.spec_from_file_location(Path(path).stem, REPO / path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real LVIS annotations and photographs, kept beside the project and never inside it."""
    path = REPO.parent / "shared"
    if not (path / "data").is_dir():
        pytest.skip("real LVIS data is not here: ../shared/data does not exist")
    return path


@pytest.fixture(scope="session")
def server():
    """Starts processes as ``multiprocessing`` does, forked from one that has imported what a run needs: a fresh
    interpreter would spend ten times the test on imports."""
    context = multiprocessing.get_context("forkserver")
    kernels = ["data._resize", "evaluation._match", "evaluation._rle", "modeling._pooling"]  # and with them numba
    context.set_forkserver_preload(
        ["pytest", "lt_det.engine", "torch.utils.tensorboard", "matplotlib.figure"]
        + [f"lt_det.{kernel}_kernels" for kernel in kernels]
    )
    return context


@pytest.fixture(scope="session")
def tiny_paths(tmp_path_factory):
    """A data set of four categories and 22 images of 64 pixels: paths of its train and val split."""
    from lt_det.data.datasets.glyph_lvis import GlyphSpec, build_glyph_dataset

    spec = GlyphSpec(
        name="tiny",
        characters="AB#Ψ",
        image_counts=(2, 4, 8, 12),
        num_train_images=14,
        num_val_images=8,
        val_images_per_category=3,
        image_size=64,
        object_size=(18, 26),
        objects_per_image=(2, 4),
        blank_bodies=(0, 1),
        train_negatives=(1, 1),
        val_negatives=(1, 1),
    )
    root = tmp_path_factory.mktemp("tiny")
    return {s: build_glyph_dataset(spec, s, root / s, num_workers=1, progress=False) for s in ("train", "val")}


@pytest.fixture(scope="session")
def tiny_model_options():
    """KEY VALUE pairs that make a glyph config's detector small enough for seconds, in batches of 2."""
    return [
        # Detectron2's ResNet-18 has one width, and fifty times the weights.
        "MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.STEM_OUT_CHANNELS", "16", "MODEL.RESNETS.RES2_OUT_CHANNELS", "16",
        "MODEL.RESNETS.WIDTH_PER_GROUP", "4",
        "MODEL.ROI_HEADS.NUM_CLASSES", "4", "MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_BOX_HEAD.FC_DIM", "32",
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16", "MODEL.ROI_MASK_HEAD.CONV_DIM", "32",
        "INPUT.MIN_SIZE_TEST", "64", "SOLVER.IMS_PER_BATCH", "2", "TEST.DETECTIONS_PER_IMAGE", "10",
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def handlers_of_loggers():
    """A run in a test writes its log to that test's stderr and files; later tests must not."""
    loggers = [logging.getLogger(name) for name in ("", "detectron2", "fvcore", "lt_det")]
    before = [list(logger.handlers) for logger in loggers]
    yield
    for logger, handlers in zip(loggers, before):
        for handler in set(logger.handlers) - set(handlers):
            if isinstance(handler, logging.FileHandler):
                handler.close()
        logger.handlers[:] = handlers
