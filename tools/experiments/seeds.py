"""What experiments over seeds share: trainings that are kept, and tables of mean and sample standard deviation."""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent.parent
METRICS = ("AP", "APr", "APc", "APf")
TASKS = {"bbox": "box", "segm": "mask"}


def train(config: str, output_dir: Path, options: list[str]) -> dict:
    """Train in a process of its own unless it is done already; returns the content of metrics.json."""
    metrics = output_dir / "inference" / "metrics.json"
    done = output_dir / "model_final.pth"
    if not (metrics.is_file() and done.is_file()):
        output_dir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(ROOT / "tools/train_net.py"), "--config-file", config, "--resume"]
        command += ["OUTPUT_DIR", str(output_dir), *options]
        print(f"{time.strftime('%H:%M:%S')}  {output_dir}  (log: {output_dir / 'log.txt'})", flush=True)
        with open(output_dir / "stdout.txt", "w") as file:
            code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
        if code:
            raise SystemExit(f"{shlex.join(command)}\nfailed with exit status {code}; see {output_dir / 'stdout.txt'}")
    return json.loads(metrics.read_text())


def keep(metrics: dict) -> dict:
    """The metrics that tables show."""
    return {task: {m: metrics[task][m] for m in METRICS} for task in TASKS}


def summarize(runs: list[dict]) -> dict:
    """Mean and sample standard deviation of each metric; None for groups without categories, or for the deviation of one run."""
    out: dict = {"mean": {}, "deviation": {}}
    for task in TASKS:
        values = {m: [r[task][m] for r in runs if r[task][m] is not None] for m in METRICS}
        out["mean"][task] = {m: statistics.mean(v) if v else None for m, v in values.items()}
        out["deviation"][task] = {m: statistics.stdev(v) if len(v) > 1 else None for m, v in values.items()}
    return out


def subtract(a: dict, b: dict) -> dict:
    """Differences of two runs' metrics; None where either is."""
    return {
        task: {m: None if None in (a[task][m], b[task][m]) else a[task][m] - b[task][m] for m in METRICS}
        for task in TASKS
    }


def make_table(rows: list[dict], tasks=tuple(TASKS)) -> str:
    """A Markdown table of ``{"name", "mean", "deviation"}``; rows of differences (a name with " - ") show signs."""

    def cell(row: dict, task: str, metric: str) -> str:
        mean, deviation = row["mean"][task][metric], row["deviation"][task][metric]
        if mean is None:
            return "-"
        sign = "+" if " - " in row["name"] else ""
        return f"{mean:{sign}.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")

    cells = [[row["name"], *(cell(row, t, m) for t in tasks for m in METRICS)] for row in rows]
    headers = ["", *(f"{TASKS[task]} {m}" for task in tasks for m in METRICS)]
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)
