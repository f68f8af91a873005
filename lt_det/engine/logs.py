"""Logging of a run: on the console what a person reads, in ``log.txt`` everything; metrics as valid json."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import warnings
from collections import defaultdict

import detectron2
import numpy as np
import torch
import torchvision
from detectron2.layers import move_device_like
from detectron2.utils import comm
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
)
from detectron2.utils.logger import _ColorfulFormatter

# What a person follows of Detectron2's log: progress and time left, evaluation, checkpoints.
_ON_CONSOLE = (
    "detectron2.utils.events",
    "detectron2.evaluation.evaluator",
    "detectron2.engine.hooks",
    "detectron2.engine.train_loop",
    "fvcore.common.checkpoint",
)
_NAMES = ("lt_det", "detectron2", "fvcore")
_MAX_LINES = 4  # of one message on the console
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class _ConsoleFormatter(logging.Formatter):
    """The time and the message; of a long message its first lines, and of a traceback, which Python prints, nothing.

    A message with ``extra={"whole": True}``, as a table of results, is printed with all its lines.
    """

    def __init__(self, log_file: str):
        super().__init__("[%(asctime)s] %(message)s", datefmt="%m/%d %H:%M:%S")
        self._log_file = log_file

    def format(self, record: logging.LogRecord) -> str:
        stamp = self.formatTime(record, self.datefmt)
        level = "" if record.levelno < logging.WARNING else f"{record.levelname}: "
        lines = _COLOUR.sub("", record.getMessage()).splitlines() or [""]
        if len(lines) > _MAX_LINES and not getattr(record, "whole", False):
            lines = [*lines[: _MAX_LINES - 1], f"... ({len(lines) - _MAX_LINES + 1} more lines in {self._log_file})"]
        return f"[{stamp}] {level}" + "\n".join(lines)


class _FileFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _COLOUR.sub("", super().format(record))


def _for_people(record: logging.LogRecord) -> bool:
    if record.levelno >= logging.WARNING:
        return True
    return record.levelno >= logging.INFO and record.name.startswith(("lt_det", *_ON_CONSOLE))


def setup_logging(output_dir: str, *, rank: int = 0) -> str:
    """Send the log of lt_det, Detectron2 and fvcore to ``output_dir/log.txt`` (of other ranks ``log.txt.rank<n>``),
    whole and without colour codes, and, on rank 0, what a person reads of it to the console. Called again, it replaces
    what it did; Detectron2's own console output goes.

    Returns:
        The path of the file.
    """
    os.makedirs(output_dir, exist_ok=True)
    path = os.path.join(output_dir, "log.txt" + (f".rank{rank}" if rank else ""))
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(_FileFormatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s", datefmt="%m/%d %H:%M:%S"))
    handlers: list[logging.Handler] = [file]
    if rank == 0:
        console = logging.StreamHandler(sys.stdout)
        console.setFormatter(_ConsoleFormatter(path))
        console.addFilter(_for_people)
        handlers.append(console)
    for handler in handlers:
        handler.set_name("lt_det")
    for name in _NAMES:
        logger = logging.getLogger(name)
        for old in [h for h in logger.handlers if h.get_name() == "lt_det" or _is_detectron2s_console(h)]:
            logger.removeHandler(old)
            old.close()
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
        for handler in handlers:
            logger.addHandler(handler)
    mend_warnings()
    return path


def _is_detectron2s_console(handler: logging.Handler) -> bool:
    """Whether Detectron2's ``setup_logger`` made it. It would print all a second time, and it abbreviates the name in
    the record itself ("d2.engine"), which whoever comes after it then reads."""
    return isinstance(handler.formatter, _ColorfulFormatter)


def mend_warnings() -> None:
    """Two calls in Detectron2 that current torch warns about, made as torch asks for; what they give is the same. What
    torch says of each loader, twice, that it has more processes than processors, is said once, of the config; and what
    torch 2.15 says of Detectron2's ``create_ddp_model``, in each process and stage, nobody here can follow."""
    from detectron2.modeling import anchor_generator
    from detectron2.utils import tracing
    from torch.fx import _symbolic_trace

    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    # Detectron2 asks it before its assertions alone.
    if hasattr(_symbolic_trace, "is_fx_symbolic_tracing") and hasattr(tracing, "is_fx_tracing_current"):
        tracing.is_fx_tracing_current = lambda: (
            _symbolic_trace.is_fx_symbolic_tracing() or torch.compiler.is_compiling()
        )

    if hasattr(anchor_generator, "_create_grid_offsets"):
        anchor_generator._create_grid_offsets = _create_grid_offsets


def _create_grid_offsets(
    size: list[int], stride: int, offset: float, target_device_tensor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Detectron2's function of this name; its ``torch.meshgrid`` does not say which indexing it means.

    As there, it can be scripted, and a trace follows the image's size.
    """
    y = torch.arange(offset * stride, size[0] * stride, step=stride, dtype=torch.float32)
    x = torch.arange(offset * stride, size[1] * stride, step=stride, dtype=torch.float32)
    y, x = move_device_like(y, target_device_tensor), move_device_like(x, target_device_tensor)
    y, x = torch.meshgrid([y, x], indexing="ij")
    return x.reshape(-1), y.reshape(-1)


def versions() -> str:
    """What the run's results may depend on, for the log file."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["none"]
    return (
        f"Python {sys.version.split()[0]}, torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"detectron2 {detectron2.__version__}, numpy {np.__version__}, GPUs: {', '.join(gpus)}, "
        f"{torch.get_num_threads()} threads, CPU capability {torch.backends.cpu.get_cpu_capability()}"
    )


def describe_processes() -> str:
    """``"2 processes on 1 machine"``"""
    world, local = comm.get_world_size(), comm.get_local_size()
    machines = world // max(1, local)
    return f"{world} process{'es' * (world > 1)} on {machines} machine{'s' * (machines > 1)}"


class JSONLinesWriter(JSONWriter):
    """Detectron2's ``metrics.json``, one object a line, as valid json: a number that is none (NaN, infinite) is
    null."""

    def write(self) -> None:
        by_iteration: dict[int, dict] = defaultdict(dict)
        for name, (value, iteration) in get_event_storage().latest_with_smoothing_hint(self._window_size).items():
            if iteration > self._last_write:
                by_iteration[iteration][name] = value if math.isfinite(value) else None
        for iteration, scalars in sorted(by_iteration.items()):
            line = json.dumps({**scalars, "iteration": iteration}, sort_keys=True, allow_nan=False)
            self._file_handle.write(line + "\n")
            self._last_write = iteration
        self._file_handle.flush()


def build_writers(output_dir: str, max_iter: int) -> list[EventWriter]:
    """Detectron2's three writers, with valid json in ``metrics.json``."""
    os.makedirs(output_dir, exist_ok=True)
    return [
        CommonMetricPrinter(max_iter),
        JSONLinesWriter(os.path.join(output_dir, "metrics.json")),
        TensorboardXWriter(output_dir),
    ]
