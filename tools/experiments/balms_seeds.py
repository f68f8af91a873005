#!/usr/bin/env python
"""Softmax, balanced softmax and BALMS on the embedded data set: mean and deviation over seeds.

For each seed, stage 1 (softmax with repeat-factor sampling) is trained once; the stage-2 variants start from
its model. Finished runs are kept: the same command goes on where it was stopped.

    tools/experiments/balms_seeds.py --output-dir output/balms_seeds --seeds 1 2 3

Writes ``balms_seeds.json`` (every run, and mean and sample standard deviation of each row) and
``balms_seeds.md`` to the output folder. The last rows are the differences to balanced softmax, seed by seed.
Further rows: ``--variant "NAME=CONFIG.yaml KEY VALUE ..."``, each the config of a stage 2.
"""

from __future__ import annotations

import argparse
import shlex
import time
from pathlib import Path

from seeds import ROOT, keep, make_table, subtract, summarize, train

from lt_det.files import write_json_atomically

STAGE1 = "softmax + RFS"
VARIANTS = ("balanced softmax=configs/glyph_balanced_softmax.yaml", "BALMS=configs/glyph_balms.yaml")


def parse_variant(text: str) -> tuple[str, str, list[str]]:
    name, found, rest = text.partition("=")
    config, *options = shlex.split(rest) or [""]
    if not found or not config or len(options) % 2:
        raise SystemExit(f'--variant {text!r}: write "NAME=CONFIG.yaml KEY VALUE ..."')
    if not (ROOT / config).is_file():
        raise SystemExit(f"--variant {text!r}: there is no file {ROOT / config}")
    return name.strip(), config, options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("output/balms_seeds"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--stage1", default="configs/glyph_softmax.yaml", help="config of stage 1")
    parser.add_argument("--variant", action="append", default=[], help="a further row (see above)")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="for every run; last")
    args = parser.parse_args()
    variants = [parse_variant(text) for text in (*VARIANTS, *args.variant)]
    output_dir = args.output_dir.resolve()
    start = time.time()

    runs: dict[str, list[dict]] = {STAGE1: [], **{name: [] for name, *_ in variants}}
    for seed in args.seeds:
        folder = output_dir / f"seed{seed}"
        shared = [*args.opts, "SEED", str(seed)]
        runs[STAGE1].append(train(args.stage1, folder / "stage1", shared))
        weights = ["DECOUPLE.START_ITER", "0", "MODEL.WEIGHTS", str(folder / "stage1" / "model_final.pth")]
        for name, config, options in variants:
            stage2 = folder / name.replace(" ", "_")
            runs[name].append(train(config, stage2, [*args.opts, *options, *weights, "SEED", str(seed)]))
        report(runs, args.seeds, output_dir, time.time() - start)


def report(runs: dict[str, list[dict]], seeds: list[int], output_dir: Path, seconds: float) -> None:
    seeds = seeds[: len(runs[STAGE1])]
    rows = []
    for name, of_seeds in runs.items():
        kept = [keep(r) for r in of_seeds]
        rows.append({"name": name, "runs": kept, **summarize(kept)})
    # Rows of a seed share their stage 1, so differences are surer than the rows are.
    _, baseline, *others = rows
    for row in others:
        differences = [subtract(a, b) for a, b in zip(row["runs"], baseline["runs"])]
        rows.append({"name": f"{row['name']} - {baseline['name']}", "runs": differences, **summarize(differences)})

    table = make_table(rows)
    print(f"\nSeeds {seeds}, mean ± standard deviation:\n{table}\n", flush=True)
    write_json_atomically(output_dir / "balms_seeds.json", {"seeds": seeds, "rows": rows, "seconds": round(seconds)})
    (output_dir / "balms_seeds.md").write_text(table + "\n")


if __name__ == "__main__":
    main()
