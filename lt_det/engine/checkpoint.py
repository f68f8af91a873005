"""Checkpoints that are written atomically, survive a bad file, and say plainly when they do not fit."""

from __future__ import annotations

import io
import os
import pickle
import re
import urllib.error
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from lt_det.data import prepare_dataset

from .checks import check_classes, model_classes


def check_weights_path(path: str, key: str = "MODEL.WEIGHTS") -> None:
    """Raise ``FileNotFoundError`` with the remedy if a local weights file is not there. URLs pass."""
    path = path.split("?")[0]
    if path and "://" not in path and not os.path.isfile(path):
        raise FileNotFoundError(
            f"{key} is {path!r}, and there is no such file. Give the path of a .pth or .pkl checkpoint, a "
            'detectron2:// or https:// address, or "" to train from scratch'
        )


# What torch and pickle raise for a file that is cut off or damaged; an OSError without a file's name is torch's.
_DAMAGED = (RuntimeError, EOFError, OSError, pickle.UnpicklingError, KeyError, AttributeError, UnicodeDecodeError)


class UnreadableCheckpoint(OSError):
    """A file is empty, cut off, corrupt or no checkpoint; the message names it."""


class LongTailCheckpointer(DetectionCheckpointer):
    """``DetectionCheckpointer`` that writes atomically, resumes from the last file that can be read, can insist that
    the weights fit, and runs no code from ``.pkl`` files.

    Attributes:
        strict: raise ``ValueError`` when there are no weights, or model weights are missing or of another shape, as is
            right for evaluation and for training on top of a finished model; when training starts from a pre-trained
            backbone, Detectron2's warnings are right instead.
        weights_key: the config key that names the weights, for messages.
    """

    def __init__(self, model, save_dir="", *, strict: bool = False, weights_key: str = "MODEL.WEIGHTS", **kwargs):
        super().__init__(model, save_dir, **kwargs)
        self.strict = strict
        self.weights_key = weights_key
        self._read: tuple[str, dict] | None = None  # a file that was read in search of one that can be

    def save(self, name: str, **kwargs) -> None:
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update({key: obj.state_dict() for key, obj in self.checkpointables.items()}, **kwargs)
        basename = f"{name}.pth"
        path = os.path.join(self.save_dir, basename)
        self.logger.info("Saving checkpoint to %s", path)
        # A kill at any moment leaves either the old file or the new one, and last_checkpoint names a whole file.
        # Always the same name: what a kill leaves behind is overwritten by the next save of that name.
        temporary = os.path.join(self.save_dir, f".{basename}.tmp")
        try:
            with open(temporary, "wb") as f:
                torch.save(data, f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:
            # torch tells of a full disk by RuntimeError.
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise OSError(
                f"the checkpoint {path} could not be written ({_first_line(error)}); the one before it is as it was. "
                "Make room and go on with --resume"
            ) from error
        self.tag_last_checkpoint(basename)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        temporary = os.path.join(self.save_dir, ".last_checkpoint.tmp")
        with open(temporary, "w") as f:
            f.write(last_filename_basename)
        os.replace(temporary, os.path.join(self.save_dir, "last_checkpoint"))

    # ---- which file

    def has_checkpoint(self) -> bool:
        """Whether there is something to resume from, if only a ``last_checkpoint`` that names nothing."""
        return bool(self.save_dir) and (super().has_checkpoint() or bool(checkpoint_files(self.save_dir)))

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Load the last checkpoint that can be read, or, without ``resume`` or where there is none, the weights in
        ``path``.

        Raises:
            UnreadableCheckpoint: if there are checkpoints and none can be read.
            ValueError: if they do not fit.
        """
        if not resume or not self.has_checkpoint():
            if resume and self.save_dir:
                self.logger.warning("--resume: there is no checkpoint in %s to go on from", self.save_dir)
            return super().resume_or_load(path, resume=False)
        self.strict = True
        # One process looks, so that all take the same file.
        found = comm.all_gather(self._last_good() if comm.is_main_process() else None)[0]
        if isinstance(found, UnreadableCheckpoint):
            raise found
        try:
            return self.load(found)
        finally:
            self._read = None

    def _last_good(self) -> str | UnreadableCheckpoint:
        """The last checkpoint that can be read. What is passed over is logged."""
        tag = os.path.join(self.save_dir, "last_checkpoint")
        candidates = checkpoint_files(self.save_dir)
        last = self.get_checkpoint_file() if os.path.exists(tag) else ""
        if os.path.isfile(last):
            candidates = [last, *(c for c in candidates if c != last)]
        elif not os.path.exists(tag):
            self.logger.warning("%s is gone; resuming from the newest checkpoint beside it", tag)
        else:
            named = os.path.basename(last)
            self.logger.warning("%s %s", tag, f"names {named}, and there is no such file" if named else "is empty")
        problems = []
        for path in candidates:
            try:
                self._read = (path, self._load_file(path))
            except UnreadableCheckpoint as error:
                self.logger.warning("%s", error)
                problems.append(os.path.basename(path))
                continue
            if path != last:
                self.logger.warning("Resuming from %s instead", path)
            return path
        return UnreadableCheckpoint(
            f"--resume: no checkpoint in {self.save_dir} can be read ({', '.join(problems) or 'there is none'}; "
            f"last_checkpoint names {os.path.basename(last) or 'nothing'}); remove them to start anew, or restore one"
        )

    @property
    def loaded(self) -> str:
        """The file or address that was loaded last."""
        return self._loading

    # ---- reading

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """As ``DetectionCheckpointer.load``.

        Raises:
            FileNotFoundError: if there is no such file.
            UnreadableCheckpoint: if it is no checkpoint, or damaged.
            ConnectionError: if an address cannot be reached; the message names the key and the remedy.
            ValueError: if it does not fit.
        """
        check_weights_path(path, self.weights_key)
        if not path and self.strict:
            raise ValueError(
                f"{self.weights_key} is empty, so there are no weights to evaluate or to train on; set it to a "
                "checkpoint"
            )
        self._loading, self._resuming = path, checkpointables is None
        try:
            return super().load(path, checkpointables=checkpointables)
        except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
            # URLError is an OSError whose reason is the cause.
            raise ConnectionError(
                f"{self.weights_key} is {path}, which could not be downloaded ({getattr(error, 'reason', error)}). "
                f'Download it where there is a network and set {self.weights_key} to the file, or set it to "" to '
                "train from scratch"
            ) from None
        finally:
            self._parsed_url_during_load = None

    def _load_file(self, filename: str) -> dict:
        if self._read is not None and self._read[0] == filename:
            return self._read[1]
        if os.path.isfile(filename) and os.path.getsize(filename) == 0:
            raise UnreadableCheckpoint(f"the checkpoint {filename} is empty")
        try:
            if filename.endswith(".pkl"):
                return _read_pickle(filename)
            searching = self._parsed_url_during_load is None
            loaded = self._torch_load(filename) if searching else super()._load_file(filename)
            if "run" in loaded and zipfile.is_zipfile(filename):
                # One of ours, so its checksums are there; torch.load does not look at them.
                with zipfile.ZipFile(filename) as archive:
                    damaged = archive.testzip()
                if damaged:
                    raise RuntimeError(f"the checksum of {damaged} is wrong")
            return loaded
        except _DAMAGED as error:
            if isinstance(error, OSError) and error.filename:
                raise  # of the file system, and it names the file
            # torch's own advice is to load with weights_only=False, which runs what the file says.
            raise UnreadableCheckpoint(
                f"the checkpoint {filename} cannot be read: it is cut off, damaged or not a checkpoint of weights "
                f"({type(error).__name__}: {_first_line(error)})"
            ) from None

    def _load_model(self, checkpoint):
        if self._resuming and "trainer" in checkpoint and "trainer" in self.checkpointables:
            state = checkpoint["trainer"]
            if "run" in checkpoint and "run" in self.checkpointables:
                self.checkpointables["run"].check(
                    checkpoint["run"],
                    source=self._loading,
                    iteration=state["iteration"],
                    stage=state.get("stage", 1),
                )
            # LongTailTrainer changes its form in the course of a run; Detectron2's trainers do not.
            getattr(self.checkpointables["trainer"], "prepare_to_load", lambda state: None)(state)
        incompatible = super()._load_model(checkpoint)
        # Detectron2 lets heads of another width be trained afresh; a file of which nothing fits is a mistake.
        unfit = set(incompatible.missing_keys) | {name for name, *_ in incompatible.incorrect_shapes}
        nothing = all(name in unfit for name, _ in self.model.named_parameters())
        if nothing or (self.strict and unfit):
            raise ValueError(self._explain(incompatible))
        return incompatible

    def _explain(self, incompatible) -> str:
        lines = [f"the checkpoint {self._loading} does not fit this model:"]
        if incompatible.incorrect_shapes:
            name, found, wanted = incompatible.incorrect_shapes[0]
            lines.append(
                f"  {len(incompatible.incorrect_shapes)} weights differ in shape, first {name}: "
                f"{tuple(found)} in the file, {tuple(wanted)} in the model"
            )
            if "cls_score" in name or "bbox_pred" in name or "predictor" in name:
                lines.append(
                    "  (check MODEL.ROI_HEADS.NUM_CLASSES, and that the loss is of the family it was trained with)"
                )
        for what, keys in (
            ("missing from the file", incompatible.missing_keys),
            ("unknown to the model", incompatible.unexpected_keys),
        ):
            if keys:
                shown = ", ".join(list(keys)[:5]) + (", ..." if len(keys) > 5 else "")
                lines.append(f"  {len(keys)} {what}: {shown}")
        lines.append(
            "Use the config that the checkpoint was trained with (config.yaml beside it), or other MODEL.WEIGHTS."
        )
        return "\n".join(lines)


def checkpoint_files(folder: str) -> list[str]:
    """Checkpoints of a run in its output folder, the newest first."""
    files = [p for p in Path(folder).glob("model*.pth") if p.is_file()]
    return [str(p) for p in sorted(files, key=lambda p: (p.stat().st_mtime_ns, p.name), reverse=True)]


def check_test_classes(
    extra: dict[str, Any], source: str, test_sets: Sequence[str], train_sets: Sequence[str], key: str = "DATASETS.TEST"
) -> None:
    """Check that a model has learnt the classes that it is about to be evaluated on.

    Args:
        extra: what is left of its checkpoint (what ``LongTailCheckpointer.load`` returned), whose field ``run`` names
            them. Checkpoints of other programs do not; then the config's training sets do, where they are here.
        source: the checkpoint, for messages.

    Raises:
        ValueError: names the first class that differs.
    """
    classes = (extra.get("run") or {}).get("thing_classes")
    if classes is None:
        source, classes = f"the training set ({', '.join(train_sets)})", model_classes(train_sets)
    for name in test_sets if classes else ():
        prepare_dataset(name)
        check_classes(classes, source, name, key=key)


def read_weights(path: str) -> tuple[dict[str, Any], list[str] | None]:
    """The weights in a checkpoint (.pth, or .pkl of Detectron2's model zoo), and the names of the classes that it was
    trained on, which lt_det's checkpoints have.

    Raises:
        FileNotFoundError: if there is no such file.
        UnreadableCheckpoint: if it is no checkpoint, or damaged.
    """
    check_weights_path(path, "--weights")
    try:
        if path.endswith(".pkl"):
            content = _read_pickle(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.filename:
            raise
        raise UnreadableCheckpoint(
            f"the checkpoint {path} cannot be read ({type(error).__name__}: {_first_line(error)})"
        ) from None
    return content.get("model", content), (content.get("run") or {}).get("thing_classes")


# ---- pickled weights


class _ArrayUnpickler(pickle.Unpickler):
    """Reads numpy arrays in dicts, lists and the like; a file that names anything else is refused before it can run."""

    _SAFE = {
        ("collections", "OrderedDict"),
        ("collections", "defaultdict"),
        ("builtins", "set"),
        ("builtins", "bytearray"),
        ("builtins", "complex"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str):
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        if (module, name) in self._SAFE:
            return super().find_class(module, name)
        if re.fullmatch(r"numpy\.(_?core)\.(multiarray|numeric)", module):
            if name in ("_reconstruct", "scalar", "_frombuffer"):
                return getattr(np._core.multiarray if name != "_frombuffer" else np._core.numeric, name)
        if (
            module == "numpy"
            and isinstance(getattr(np, name, None), type)
            and issubclass(getattr(np, name), np.generic)
        ):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not data and was not run")


def _read_pickle(filename: str) -> dict:
    """A ``.pkl`` of Detectron2's model zoo or of Caffe2, in the form that ``DetectionCheckpointer._load_file`` gives
    it.

    Detectron2 unpickles whatever the file says, code included.
    """
    with PathManager.open(filename, "rb") as f:
        data = _ArrayUnpickler(io.BytesIO(f.read()), encoding="latin1").load()
    if not isinstance(data, dict):
        raise pickle.UnpicklingError(f"it holds a {type(data).__name__} and no dict of weights")
    if "model" in data and "__author__" in data:
        return data
    data = data.get("blobs", data)
    data = {k: v for k, v in data.items() if not k.endswith("_momentum")}
    return {"model": data, "__author__": "Caffe2", "matching_heuristics": True}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
