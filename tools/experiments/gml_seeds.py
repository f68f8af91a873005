#!/usr/bin/env python
"""GML beside softmax, logit adjustment and BALMS on the embedded data set, over seeds, and its ablation.

For each seed: softmax with repeat-factor sampling, BALMS from its model, logit adjustment, L_cls alone (the
teacher: a cosine classifier with logit adjustment), and GML with that teacher. The ablation changes one thing of
GML at a time, for ``--ablation-seeds``. Finished runs are kept: the same command goes on where it was stopped.

    tools/experiments/gml_seeds.py --output-dir output/gml_seeds --seeds 1 2 3 --ablation-seeds 1

Writes ``gml_seeds.json`` and ``gml_seeds.md`` to the output folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from seeds import keep, make_table, summarize, train

from lt_det.files import write_json_atomically

NODE = "MODEL.LONG_TAIL.GML."
TEACHER = "L_cls alone (the teacher)"
ABLATION = {
    "teacher: a copy that follows the student": ["TEACHER.WEIGHTS", ""],
    "512 keys": [NODE + "QUEUE_SIZE", "512"],
    "beta 4": [NODE + "BETA", "4.0"],
    "alpha 1 (distillation)": [NODE + "ALPHA", "1.0"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("output/gml_seeds"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--ablation-seeds", type=int, nargs="*", default=[1])
    parser.add_argument("--rows", nargs="*", help="only rows whose name contains one of these (and the teacher)")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="for every run; last")
    args = parser.parse_args()
    output_dir = args.output_dir.resolve()
    unknown = set(args.ablation_seeds) - set(args.seeds)
    if unknown:
        raise SystemExit(f"--ablation-seeds {sorted(unknown)}: not among --seeds")

    runs: dict[str, list[dict]] = {}

    def row(name: str, seed: int, config: str, options: list[str], *, needed: bool = False) -> str:
        folder = output_dir / f"seed{seed}" / name.split(" (")[0].replace(": ", " ").replace(" ", "_")
        if needed or not args.rows or any(part in name for part in args.rows):
            metrics = train(f"configs/{config}.yaml", folder, [*options, *args.opts, "SEED", str(seed)])
            runs.setdefault(name, []).append(keep(metrics))
            report(runs, args, output_dir)
        return str(folder / "model_final.pth")

    for seed in args.seeds:
        softmax = row("softmax + RFS", seed, "glyph_softmax", [])
        row("BALMS", seed, "glyph_balms", ["DECOUPLE.START_ITER", "0", "MODEL.WEIGHTS", softmax])
        row("logit adjusted", seed, "glyph_logit_adjusted", [])
        teacher = row(TEACHER, seed, "glyph_gml", ["TEACHER.MAX_ITER", "0", NODE + "BETA", "0.0"], needed=True)
        gml = ["TEACHER.MAX_ITER", "0", "TEACHER.WEIGHTS", teacher]
        row("GML", seed, "glyph_gml", gml)
        if seed in args.ablation_seeds:
            for name, changes in ABLATION.items():
                row(f"GML, {name}", seed, "glyph_gml", [*gml, *changes])


def report(runs: dict[str, list[dict]], args: argparse.Namespace, output_dir: Path) -> None:
    rows = [{"name": name, "seeds": len(r), "runs": r, **summarize(r)} for name, r in runs.items()]
    write_json_atomically(output_dir / "gml_seeds.json", {"seeds": args.seeds, "rows": rows})
    table = make_table(rows)
    (output_dir / "gml_seeds.md").write_text(table + "\n")
    print(table + "\n", flush=True)


if __name__ == "__main__":
    main()
