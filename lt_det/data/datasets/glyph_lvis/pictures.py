"""
Renders and writes the pictures of a split, in this process or in several.

Workers are fresh interpreters that load this sub-package alone, without torch and Detectron2: they start in a fraction
of a second, they do not import the caller's main module again, and they are safe whatever threads, CUDA contexts or
process groups the caller has, none of which holds for `multiprocessing`.
"""

import json
import logging
import os
import queue
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import cv2

from .plan import ImagePlan
from .scene import SceneRenderer
from .spec import GlyphSpec

logger = logging.getLogger(__name__)

_IMAGES_A_JOB = 16
_FEWEST_IMAGES_A_WORKER = 64  # below, starting one takes longer than it saves
_MOST_WORKERS = 16

# Run by a worker. Registering the folder as a top-level package keeps Python from importing its parents.
_WORKER = """
import importlib.util, os, sys
folder = sys.argv[1]
spec = importlib.util.spec_from_file_location(
    "glyph_lvis", os.path.join(folder, "__init__.py"), submodule_search_locations=[folder])
package = sys.modules["glyph_lvis"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
from glyph_lvis.pictures import serve
serve()
"""


def compact_json(content) -> str:
    return json.dumps(content, separators=(",", ":"))


def picture_name(image_id: int) -> str:
    return f"{image_id:012d}.jpg"


def render_pictures(
    spec: GlyphSpec,
    split: str,
    plans: list[ImagePlan],
    folder: Path,
    *,
    num_workers: int | None = None,
    progress: bool = True,
) -> dict[int, list]:
    """
    Write `<folder>/<image id>.jpg` for each plan. Returns, by image id, (category index, annotation as json text,
    without its ids) of each annotated object. As text they take a tenth of the memory.

    Raises:
        RuntimeError: an image has no room for its objects.
        OSError: a picture cannot be written.
    """
    from lt_det.processes import usable_cores  # here: the processes that render import no lt_det
    from lt_det.progress import progress_bar

    if num_workers is None:
        num_workers = min(usable_cores(), _MOST_WORKERS)
    num_workers = min(num_workers, len(plans) // _FEWEST_IMAGES_A_WORKER)
    annotations: dict[int, list] = {}
    title = f"Rendering {spec.name}_{split}"
    with progress_bar(total=len(plans), desc=title, unit="image", show=progress) as bar:

        def collect(rows_by_image):
            annotations.update((int(image_id), rows) for image_id, rows in rows_by_image.items())
            bar.update(len(rows_by_image))

        if num_workers > 1:
            _render_in_workers(spec, split, plans, folder, num_workers, collect)
        else:
            renderer = SceneRenderer(spec)
            for plan in plans:
                collect(_render(renderer, split, [plan], folder))
    return annotations


def _render(renderer: SceneRenderer, split: str, plans: list[ImagePlan], folder: Path) -> dict[int, list]:
    rows = {}
    for plan in plans:
        image = renderer.render(plan, split)
        quality = [cv2.IMWRITE_JPEG_QUALITY, renderer.spec.jpeg_quality]
        _, encoded = cv2.imencode(".jpg", image.pixels[:, :, ::-1], quality)
        # cv2.imwrite would not raise on a full disk
        (folder / picture_name(plan.image_id)).write_bytes(encoded)
        rows[plan.image_id] = [
            (category, compact_json({"bbox": box, "area": area, "segmentation": polygons}))
            for category, polygons, box, area in image.annotations()
        ]
    return rows


# ----- workers: one line of json a request, one a reply -----------------------------------------


def _render_in_workers(spec, split, plans, folder, num_workers, collect) -> None:
    jobs: queue.SimpleQueue = queue.SimpleQueue()
    for start in range(0, len(plans), _IMAGES_A_JOB):
        jobs.put([plan.__dict__ for plan in plans[start : start + _IMAGES_A_JOB]])
    # Of dictionaries, exceptions, and None from a worker that is done.
    replies: queue.SimpleQueue = queue.SimpleQueue()
    setup = {"spec": spec.to_dict(), "split": split, "folder": str(folder)}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _WORKER, str(Path(__file__).parent)]
    workers = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            encoding="utf-8",
        )
        for _ in range(num_workers)
    ]
    try:
        for worker in workers:
            threading.Thread(target=_feed, args=(worker, setup, jobs, replies), daemon=True).start()
        running = num_workers
        while running:
            reply = replies.get()
            if isinstance(reply, Exception):
                raise reply
            elif reply is None:
                running -= 1
            else:
                collect(reply)
    finally:
        for worker in workers:
            worker.kill()  # those that have finished are not harmed
        for worker in workers:
            worker.wait()
            worker.stdout.close()


def _feed(worker: subprocess.Popen, setup: dict, jobs: queue.SimpleQueue, replies: queue.SimpleQueue) -> None:
    """Thread of the parent that belongs to one worker."""
    try:
        _send(worker.stdin, setup)
        while True:
            try:
                job = jobs.get_nowait()
            except queue.Empty:
                break
            _send(worker.stdin, job)
            line = worker.stdout.readline()
            if not line:
                raise RuntimeError(
                    f"a process that renders glyph_lvis ended with exit code {worker.wait()}; its "
                    "messages are above. num_workers=1 renders without further processes."
                )
            reply = json.loads(line)
            if "error" in reply:
                raise RuntimeError(reply["error"])
            replies.put(reply["images"])
        worker.stdin.close()
        replies.put(None)
    except Exception as error:  # to be raised by the thread that waits
        replies.put(error)


def _send(pipe, message) -> None:
    pipe.write(json.dumps(message) + "\n")
    pipe.flush()


def serve() -> None:
    """What a worker does: reads the set-up, then a job a line, until the parent closes the pipe or ends."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    sys.stdout = sys.stderr  # nothing that a library prints may get between the replies
    cv2.setNumThreads(1)
    lines = open(sys.stdin.fileno(), encoding="utf-8", closefd=False)
    setup = json.loads(lines.readline())
    renderer, folder = None, Path(setup["folder"])
    for line in lines:
        try:
            renderer = renderer or SceneRenderer(GlyphSpec(**setup["spec"]))
            plans = [ImagePlan(**plan) for plan in json.loads(line)]
            reply = {"images": _render(renderer, setup["split"], plans, folder)}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}\n\nin a worker:\n{traceback.format_exc()}"}
        _send(replies, reply)
