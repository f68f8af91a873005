#!/usr/bin/env python
"""Every method on the embedded data set at the same budget, over seeds.

    tools/experiments/methods.py --seeds 1 2 3 --jobs 2

trains the rows of methods.yaml (or another file of that form: balms.yaml, gml.yaml) that the results file has not,
seed 1 of all rows first, and adds each finished run to it. Interrupted at any time, the same command goes on.
``--table`` prints the table of what is known.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from runs import ROOT, Bench, Results, read_rows
from tables import results_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).resolve().parent
    parser.add_argument("--rows", type=Path, default=here / "methods.yaml", help="the table's rows")
    parser.add_argument("--json", type=Path, help="results; default docs/results/<rows file>.json")
    parser.add_argument("--output-dir", type=Path, help="of the runs; default output/<rows file>")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="only these rows, and what they start from")
    parser.add_argument("--jobs", type=int, default=1, help="runs beside each other, one thread each")
    parser.add_argument("--box-accuracy", action="store_true", help="of classifiers on ground-truth boxes, too")
    parser.add_argument("--forget", nargs="+", metavar="METHOD", help="throw away the results of these rows and stop")
    parser.add_argument("--table", action="store_true", help="print what is known and stop")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="for every run; last")
    args = parser.parse_args()
    path = (args.json or ROOT / f"docs/results/{args.rows.stem}.json").resolve()
    if args.table:
        print(results_table(json.loads(path.read_text())["rows"]))
        return
    try:
        rows = read_rows(args.rows)
        results = Results(path, [row for row in rows if row.method not in (args.forget or ())])
        unknown = {*(args.methods or ()), *(args.forget or ())} - {row.method for row in rows}
        if unknown:
            raise ValueError(f"{args.rows} has no row {sorted(unknown)}; it has {[row.method for row in rows]}")
        if args.forget:
            results.forget(args.forget)
            return
        output_dir = (args.output_dir or ROOT / "output" / args.rows.stem).resolve()
        wanted = [row for row in rows if not args.methods or row.method in args.methods]
        Bench(rows, results, output_dir, args.opts, args.jobs, args.box_accuracy).run(wanted, args.seeds)
    except (ValueError, RuntimeError) as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit(f"\nInterrupted; finished runs are in {path}, the same command goes on") from None
    print(results_table(results.content()["rows"]))


if __name__ == "__main__":
    main()
