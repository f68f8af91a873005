"""Trainings over methods and seeds: what there is to run, in which order, and what is kept of it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from lt_det.io import write_json_atomically
from lt_det.progress import progress_bar

ROOT = Path(__file__).resolve().parent.parent.parent
TASKS = ("bbox", "segm")
GROUPS = ("", "r", "c", "f")
METRICS = tuple(f"AP{group}{suffix}" for suffix in ("", "-fixed", "-pool") for group in GROUPS)
# Of every run: the CPU, in bfloat16 (its losses, weights and evaluation are float32 all the same), which takes two
# thirds of float32's time where the processor has bfloat16 instructions. docs/benchmarks.md has both side by side.
# AP counts the recipes' 40 detections an image; AP-fixed and AP-pool see 300.
PROTOCOL = (
    "MODEL.DEVICE", "cpu", "SOLVER.AMP.ENABLED", "True",
    "TEST.AP_FIXED", "True", "TEST.DETECTIONS_PER_IMAGE", "300", "TEST.MAX_DETS", "40",
)  # fmt: skip
# What a run is thought to take where none of its row is known yet, in seconds; used for the time left alone.
_SECONDS = {"": 500.0, "teacher": 600.0, "stage1": 250.0, "evaluate": 40.0}
_ROLES = {
    "stage1": lambda weights: ["DECOUPLE.START_ITER", "0", "MODEL.WEIGHTS", weights],
    "teacher": lambda weights: ["TEACHER.MAX_ITER", "0", "TEACHER.WEIGHTS", weights],
    "evaluate": lambda weights: ["MODEL.WEIGHTS", weights],
}


@dataclass(frozen=True)
class Row:
    """A line of the table: a recipe, what is put over it, and the row whose model it takes over, if any."""

    method: str
    config: str
    options: tuple[str, ...] = ()
    after: str = ""
    role: str = ""

    @property
    def slug(self) -> str:
        """The row's name as that of a folder."""
        return re.sub(r"[^a-z0-9]+", "_", self.method.lower()).strip("_")

    @property
    def definition(self) -> str:
        """What decides its result, in words; results of another definition are not mixed with it."""
        return shlex.join([self.config, *self.options, *([self.role, self.after] if self.after else [])])


def read_rows(path: Path) -> list[Row]:
    """The rows of a yaml file as ``methods.yaml`` has them.

    Raises:
        ValueError: for entries that are not of that form, naming them.
    """
    rows: dict[str, Row] = {}
    for entry in yaml.safe_load(path.read_text()):
        entry = dict(entry)
        row = Row(
            entry.pop("method"),
            entry.pop("config"),
            tuple(str(option) for option in entry.pop("options", ())),
            entry.pop("after", ""),
            entry.pop("as", ""),
        )
        if entry:
            raise ValueError(f"{path}: {row.method!r} has unknown fields {sorted(entry)}")
        if row.method in rows:
            raise ValueError(f"{path}: two rows are called {row.method!r}")
        if len(row.options) % 2:
            raise ValueError(f"{path}: the options of {row.method!r} are not pairs of KEY VALUE")
        if not (ROOT / row.config).is_file():
            raise ValueError(f"{path}: {row.method!r} names {row.config}, which does not exist")
        if bool(row.after) != bool(row.role) or (row.after and (row.after not in rows or row.role not in _ROLES)):
            raise ValueError(
                f"{path}: {row.method!r} must have both after (an earlier row) and as ({', '.join(_ROLES)}), or neither"
            )
        rows[row.method] = row
    return list(rows.values())


@dataclass
class Results:
    """What is known of all runs, in one json file that every finished run is added to at once.

    The file has ``{"rows": [{"method", "definition", "seeds", "bbox": {metric: [by seed]}, "segm": ...,
    "seconds" (mean), "seconds_by_seed", "commit" (by seed)}]}``; metrics in percent, None for groups without
    categories. With ``box_accuracy`` (of ``box_accuracy.py``, by group) where that was measured.
    """

    path: Path
    rows: list[Row]
    _known: dict[tuple[str, int], dict] = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._known = self._read()

    def _read(self) -> dict[tuple[str, int], dict]:
        if not self.path.is_file():
            return {}
        definitions = {row.method: row.definition for row in self.rows}
        known = {}
        for row in json.loads(self.path.read_text())["rows"]:
            method = row["method"]
            if row["definition"] != definitions.get(method, row["definition"]):
                raise ValueError(
                    f"{self.path}: the results of {method!r} are those of `{row['definition']}`, and the row is now "
                    f"`{definitions[method]}`; --forget {shlex.quote(method)} throws them away"
                )
            for k, seed in enumerate(row["seeds"]):
                known[method, seed] = {
                    "definition": row["definition"],
                    **{task: {m: row[task][m][k] for m in METRICS} for task in TASKS},
                    "seconds": row["seconds_by_seed"][k],
                    "commit": row["commit"][k],
                }
                if "box_accuracy" in row:
                    accuracy = {group: values[k] for group, values in row["box_accuracy"].items()}
                    known[method, seed]["box_accuracy"] = accuracy
        return known

    def __contains__(self, run: tuple[str, int]) -> bool:
        return run in self._known

    def summary(self, method: str, seed: int) -> str:
        """A finished run in a line."""
        run = self._known[method, seed]
        metrics = ", ".join(f"{m} {run['segm'][m]:.1f}" for m in ("AP", "APr") if run["segm"][m] is not None)
        return f"{method} (seed {seed}): mask {metrics}, {run['seconds'] / 60:.1f} minutes"

    def seconds(self, row: Row) -> float:
        """What a run of the row takes, by the runs that are known."""
        known = [r["seconds"] for (method, _), r in self._known.items() if method == row.method]
        return sum(known) / len(known) if known else _SECONDS[row.role]

    def add(self, row: Row, seed: int, metrics: dict, seconds: float, commit: str, **more: dict) -> None:
        """Add a finished run, with ``box_accuracy`` if that is known, and write the file."""
        with self._lock:
            self._known |= self._read()  # what another process, of other seeds, has added meanwhile
            self._known[row.method, seed] = {
                "definition": row.definition,
                **{task: {m: metrics[task].get(m) for m in METRICS} for task in TASKS},
                "seconds": round(seconds, 1),
                "commit": commit,
                **more,
            }
            write_json_atomically(self.path, self.content(), indent=1)

    def forget(self, methods: Iterable[str]) -> None:
        """Drop what is known of some rows."""
        self._known = {run: known for run, known in self._known.items() if run[0] not in set(methods)}
        write_json_atomically(self.path, self.content(), indent=1)

    def content(self) -> dict:
        """What the file has: rows of the yaml file in its order, then others by name."""
        order = [row.method for row in self.rows]
        methods = sorted({m for m, _ in self._known}, key=lambda m: (order.index(m) if m in order else len(order), m))
        out = []
        for method in methods:
            seeds = sorted(seed for m, seed in self._known if m == method)
            runs = [self._known[method, seed] for seed in seeds]
            seconds = [run["seconds"] for run in runs]
            out.append(
                {
                    "method": method,
                    "definition": runs[0]["definition"],
                    "seeds": seeds,
                    **{task: {m: [run[task][m] for run in runs] for m in METRICS} for task in TASKS},
                    "seconds": round(sum(seconds) / len(seconds), 1),
                    "seconds_by_seed": seconds,
                    "commit": [run["commit"] for run in runs],
                }
            )
            if all("box_accuracy" in run for run in runs):
                groups = runs[0]["box_accuracy"]
                out[-1]["box_accuracy"] = {group: [run["box_accuracy"][group] for run in runs] for group in groups}
        return {"rows": out}


@dataclass
class Bench:
    """Runs rows and seeds in processes of their own, each with one thread, and adds them to the results.

    Folders are ``OUTPUT_DIR/seed<n>/<row>``. A training that was interrupted goes on from its last checkpoint; one
    that is finished is read, not run.
    """

    rows: list[Row]
    results: Results
    output_dir: Path
    options: list[str]
    jobs: int = 1
    box_accuracy: bool = False

    def folder(self, row: Row, seed: int) -> Path:
        return self.output_dir / f"seed{seed}" / row.slug

    def run(self, wanted: list[Row], seeds: list[int]) -> None:
        """Run what is not known of these rows: all of a seed before the next seed, before each row what it needs.

        Raises:
            RuntimeError: if trainings fail (one may diverge), after all others but those that start from them.
        """
        by_name = {row.method: row for row in self.rows}
        todo: dict[tuple[str, int], None] = {}  # in order
        for seed in seeds:
            for row in wanted:
                if (row.method, seed) in self.results:
                    continue
                chain = [row]
                while chain[-1].after and not self._model(by_name[chain[-1].after], seed).is_file():
                    chain.append(by_name[chain[-1].after])
                todo.update(((r.method, seed), None) for r in reversed(chain))
        waiting, running, done, failures = list(todo), {}, set(), {}
        seconds = {run: max(1.0, self.results.seconds(by_name[run[0]])) for run in todo}
        start, total = time.time(), sum(seconds.values())
        bar = progress_bar(
            total=round(total),
            desc="runs",
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left {postfix}",
        )
        with bar, ThreadPoolExecutor(self.jobs) as pool:
            while waiting or running:
                for run in list(waiting):
                    if len(running) == self.jobs:
                        break
                    needs = (by_name[run[0]].after, run[1])
                    if needs in todo and needs not in done | failures.keys():
                        continue
                    waiting.remove(run)
                    if needs in failures:
                        failures[run] = f"{run[0]} (seed {run[1]}) starts from {needs[0]}, which failed"
                        continue
                    running[pool.submit(self._one, by_name[run[0]], run[1])] = run
                bar.set_postfix_str(", ".join(f"{m} (seed {s})" for m, s in running.values()))
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run = running.pop(future)
                    if future.exception():
                        failures[run] = str(future.exception())
                    else:
                        done.add(run)
                    bar.update(round(seconds[run]))
                    # A line, at once, that the log of a run in the background has too: in a file there is no bar.
                    ended = sum(seconds[run] for run in done | failures.keys())
                    left = bar.format_interval((time.time() - start) * (total / ended - 1))
                    bar.write(f"{failures.get(run) or self.results.summary(*run)}; {left} left", file=sys.stderr)
        if failures:
            raise RuntimeError("\n".join(failures.values()))

    def _model(self, row: Row, seed: int) -> Path:
        return self.folder(row, seed) / "model_final.pth"

    def _one(self, row: Row, seed: int) -> None:
        folder = self.folder(row, seed)
        folder.mkdir(parents=True, exist_ok=True)
        metrics, clock = folder / "inference/metrics.json", folder / "run.json"
        finished = metrics.is_file() and (row.role == "evaluate" or self._model(row, seed).is_file())
        made = json.loads(clock.read_text()) if clock.is_file() else {"seconds": 0.0, "commit": ""}
        if not finished:
            options = [*row.options, *self.options]
            if row.after:
                after = next(r for r in self.rows if r.method == row.after)
                options += _ROLES[row.role](str(self._model(after, seed)))
            command = [sys.executable, str(ROOT / "tools/train_net.py"), "--config-file", row.config]
            command += ["--eval-only"] if row.role == "evaluate" else ["--resume"]
            command += ["OUTPUT_DIR", str(folder), "SEED", str(seed), *PROTOCOL, *options]
            made["commit"], start = _commit(), time.time()  # before it: the checkout may move on meanwhile
            try:
                _run(command, folder / "stdout.txt")
            finally:
                made["seconds"] += time.time() - start
                write_json_atomically(clock, made)
        more = {}
        if self.box_accuracy and row.role != "evaluate":
            accuracy = folder / "box_accuracy.json"
            if not accuracy.is_file():
                script = Path(__file__).with_name("box_accuracy.py")
                _run([sys.executable, str(script), str(folder)], folder / "stdout.txt")
            more["box_accuracy"] = json.loads(accuracy.read_text())
        self.results.add(row, seed, json.loads(metrics.read_text()), **made, **more)


def _run(command: list[str], log: Path) -> None:
    """Run a command on one thread, its output appended to a file."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "a") as file:
        done = subprocess.run(
            command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\nended with exit status {done.returncode}; see {log}")


def _commit() -> str:
    """The checkout's commit, with a + where files differ from it; empty outside of git."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return head + ("+" if head and changed else "")
