#!/usr/bin/env python
"""Run the tests as other processors would: torch's kernels without vectors and with AVX2, MKL's compatible code
path, one thread and two. Prints a table; ends with status 1 if a setting has a failure.

    tools/dev/test_processors.py [pytest targets; default: tests] [--settings default avx2 ...] [--json FILE]

One setting after the other, each in one process with low priority, under the Python that runs this and with what its
PYTHONPATH adds (another Detectron2, for instance).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import detectron2
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
SETTINGS = {
    "as it is, 1 thread": {"OMP_NUM_THREADS": "1"},
    "as it is, 2 threads": {"OMP_NUM_THREADS": "2"},
    "ATEN_CPU_CAPABILITY=default": {"ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"},
    "ATEN_CPU_CAPABILITY=avx2": {"ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"},
    "MKL_CBWR=COMPATIBLE": {"MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"},
    "default, MKL_CBWR=COMPATIBLE, 2 threads": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_CBWR": "COMPATIBLE",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "OMP_NUM_THREADS": "2",
    },
}


def run(setting: str, targets: list[str]) -> dict:
    pytest = [sys.executable, "-m", "pytest", "-o", "addopts=", "-n", "0", "-q", "--tb=short"]  # -qq has no counts
    command = ["nice", "-n", "5", *pytest, *targets]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": path, **SETTINGS[setting]}
    begin = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error|skipped)", done.stdout[-500:])}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    if done.returncode not in (0, 1):
        failed.append(f"pytest ended with status {done.returncode}: {(done.stdout + done.stderr)[-300:]}")
    seconds = round(time.monotonic() - begin)
    return {"setting": setting, "status": done.returncode, "seconds": seconds, "failures": failed, **counts}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=["tests"])
    parser.add_argument("--settings", nargs="+", metavar="TEXT", help="those whose name contains one of these")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    chosen = [s for s in SETTINGS if not args.settings or any(text in s for text in args.settings)]
    rows = []
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, {detectron2.__file__}", flush=True)
    print("| setting | passed | failed | skipped | seconds |\n|---|---|---|---|---|", flush=True)
    for setting in chosen:
        row = run(setting, args.targets)
        rows.append(row)
        failed = row.get("failed", 0) + row.get("error", 0)
        print(
            f"| {setting} | {row.get('passed', 0)} | {failed} | {row.get('skipped', 0)} | {row['seconds']} |",
            flush=True,
        )
        for name in row["failures"]:
            print(f"    {name}", file=sys.stderr, flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps({"rows": rows}, indent=1))
    return int(any(row["status"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
