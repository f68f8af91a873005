"""Writing a results file while the model runs."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence

import numpy as np

from lt_det.io import write_atomically

from .ground_truth import GroundTruth
from .predictions import ImagePredictions
from .rle import RleTable

__all__ = ["SubmissionShard", "format_results", "merge_shards"]


def format_results(
    gt: GroundTruth,
    predictions: ImagePredictions,
    counts: tuple[np.ndarray, np.ndarray] | None,
    size: Sequence[int],
) -> bytes:
    """Detections of one image as json objects, each followed by a comma and a line break.

    ``counts``: encodings of the masks of all detections, or None.
    """
    image_id = int(gt.image_ids[predictions.image])
    category_ids = gt.category_ids[predictions.category].tolist()
    boxes, scores = predictions.boxes.tolist(), predictions.score.tolist()
    strings: list[bytes | None] = [None] * len(scores)
    if counts is not None:
        strings = RleTable.from_counts(*counts, np.zeros((len(scores), 2))).strings()
    lines = []
    for category_id, box, score, text in zip(category_ids, boxes, scores, strings):
        result = {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
        if text is not None:
            result["segmentation"] = {"size": list(size), "counts": text.decode("ascii")}
        lines.append(json.dumps(result) + ",\n")
    return "".join(lines).encode("ascii")


class SubmissionShard:
    """The results of one process as lines of json in a temporary file next to the final one."""

    def __init__(self, output_dir: str, rank: int):
        os.makedirs(output_dir, exist_ok=True)
        handle, self.path = tempfile.mkstemp(dir=output_dir, prefix=f".lvis_results.rank{rank}.", suffix=".tmp")
        self._file = os.fdopen(handle, "wb", buffering=1 << 20)

    def write(self, lines: bytes) -> None:
        self._file.write(lines)

    def discard(self) -> None:
        """Removes what an evaluation that did not end has written."""
        self._file.close()
        if os.path.exists(self.path):
            os.remove(self.path)

    def close(self) -> str:
        """Path of the finished shard."""
        self._file.close()
        return self.path


def merge_shards(paths: Sequence[str], output: str) -> None:
    """Joins shards to one json list, atomically, and removes them.

    Raises:
        FileNotFoundError: a shard is not on this machine.
    """
    missing = [p for p in paths if not os.path.exists(p)]
    if missing:
        raise FileNotFoundError(
            f"shards of the submission are not on this machine: {missing}. Its output_dir must be on a file system "
            "that all machines share."
        )

    def write(f) -> None:
        f.write(b"[\n")
        for path in paths:
            with open(path, "rb") as shard:
                shutil.copyfileobj(shard, f, 1 << 20)
        if f.tell() > 2:
            f.seek(-2, os.SEEK_END)  # the comma behind the last object
            f.write(b"\n")
        f.write(b"]\n")

    write_atomically(output, write, mode="wb")
    for path in paths:
        os.remove(path)
