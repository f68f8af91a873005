#!/usr/bin/env python
"""Writes the pages of docs/ that follow from code and json files; --check only says whether they are up to date.

docs/methods.md: docs/source/methods.yaml, with keys and defaults from the code.
docs/config.md: the other keys, from lt_det/config.py.
docs/model-zoo.md, docs/benchmarks.md: docs/source/, with the tables of docs/results/*.json, and the numbers that
sentences take from them (prose_numbers.py).
docs/methods.png: a plot of docs/results/methods.json, if it is there.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from functools import cache
from pathlib import Path

import yaml
from tabulate import tabulate

from lt_det.declaration import declared_options
from lt_det.frequency import GROUP_COLOURS, GROUP_NAMES
from lt_det.io import write_atomically
from lt_det.losses import LOSS_REGISTRY
from lt_det.modeling import CALIBRATOR_REGISTRY

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools/experiments"), str(ROOT / "tools/dev")]
from config_keys import config_page  # noqa: E402
from prose_numbers import MARKER, with_numbers  # noqa: E402
from tables import results_table  # noqa: E402

NO_METHODS = "*Not measured yet: `tools/experiments/methods.py` writes `docs/results/methods.json`.*"


def table(name: str) -> str:
    """A table of docs/results/tables as Markdown, each cell as it stands there."""
    content = json.loads((ROOT / f"docs/results/tables/{name}.json").read_text())
    return tabulate(content["rows"], headers=content["headers"], tablefmt="github", disable_numparse=True)


def method_rows(name: str = "methods") -> list[dict]:
    """The rows of docs/results/methods.json, or of another file there; none if it is not there."""
    path = ROOT / f"docs/results/{name}.json"
    return _rows(path) if path.is_file() else []


@cache
def _rows(path: Path) -> list[dict]:
    """Read once: a page's sentences ask for some hundred numbers."""
    return json.loads(path.read_text())["rows"]


def chosen_rows(text: str) -> str:
    """A table of rows that are named as ``file: method; method | file: method``; those not run yet are left out."""
    rows = []
    for part in text.split(" | "):
        name, methods = part.split(": ", 1)
        known = {row["method"]: row for row in method_rows(name.strip())}
        rows += [known[m] for m in methods.split("; ") if m in known]
    return results_table(rows) if rows else NO_METHODS


def methods_section() -> str:
    """Table and plot of the benchmark of methods."""
    rows = method_rows()
    if not rows:
        return NO_METHODS
    text = (
        "`python tools/experiments/methods.py --seeds 1 2 3`: every row 1,000 iterations of a detector (decoupled "
        "methods share their seed's stage 1 and add stage 2, post-hoc methods add nothing); mean ± sample "
        "standard deviation over seeds; differences to softmax + RFS are paired by seed."
    )
    return textwrap.fill(text, 120) + f"\n\n{results_table(rows)}\n\n![mask AP by method](methods.png)"


def prose(text: str, indent: str = "") -> str:
    """A paragraph, or with an indent an item of a list, in lines of 120 columns."""
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def keys_table(prefix: str, cls: type) -> str:
    """The options of a class as config keys, with defaults and meaning."""
    rows = [[f"`{prefix}.{o.key}`", f"`{o.default!r}`", o.comment.replace("|", "\\|")] for o in declared_options(cls)]
    if not rows:
        return "It has no options of its own."
    return tabulate(rows, headers=["key", "default", "meaning"], tablefmt="github", disable_numparse=True)


def measured_row(name: str) -> str:
    """The benchmark's row of a method, in words."""
    found = [row for row in method_rows() if row["method"] == name]
    if not found:
        return "not in the benchmark of methods yet"
    return "\n\n" + results_table(found)


def facts() -> list[dict]:
    """The entries of docs/source/methods.yaml, and one from the docstring for a method that has none there."""
    entries = yaml.safe_load(with_numbers((ROOT / "docs/source/methods.yaml").read_text(), method_rows))
    for kind, registry in (("loss", LOSS_REGISTRY), ("calibrator", CALIBRATOR_REGISTRY)):
        known = {entry.get(kind) for entry in entries}
        for name, cls in registry:
            if name not in known:
                text = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
                entries.append({kind: name, "recipes": [], "when": text})
    return entries


def methods_page() -> str:
    """docs/methods.md."""
    entries = facts()
    rows = []
    for entry in entries:
        name = entry.get("loss") or entry["calibrator"]
        kind = "loss" if "loss" in entry else "calibrator"
        recipes = ", ".join(f"`{r}`" for r in entry["recipes"])
        rows.append([f"[{name}](#{name.lower()})", kind, recipes, entry["when"]])
    parts = [
        "# Methods",
        textwrap.fill(
            "A loss is one key, `MODEL.LONG_TAIL.LOSS` (of the second stage: `DECOUPLE.LOSS`), on any of the ROI heads "
            "`LongTailROIHeads`, `LongTailCascadeROIHeads` and `LongTailRes5ROIHeads`; a calibrator is "
            "`MODEL.LONG_TAIL.CALIBRATOR.NAME`, on a trained model. In the formulas z are the scores of a RoI, y its "
            "label, pi the prior of the K foreground classes, n their counts.",
            120,
        ),
        "This page is generated from `docs/source/methods.yaml` and the code by `python tools/dev/generate_docs.py`.",
        tabulate(rows, headers=["method", "kind", "recipes", "when to use it"], tablefmt="github"),
    ]
    for entry in entries:
        name = entry.get("loss") or entry["calibrator"]
        parts.append(f"## {name}")
        if "formula" in entry:
            parts.append(f"$$\n{entry['formula']}\n$$")
        for key, title in (("source", "Source"), ("when", "When to use it"), ("pitfalls", "Pitfalls")):
            if entry.get(key):
                parts.append(prose(f"**{title}.** {entry[key]}"))
        recipes = ", ".join(f"`configs/lvis_{r}.yaml`, `configs/glyph_{r}.yaml`" for r in entry["recipes"])
        if recipes:
            parts.append(prose(f"**Recipes.** {recipes}"))
        if "loss" in entry:
            cls = LOSS_REGISTRY.get(name)
            prefix = f"MODEL.LONG_TAIL.{cls.config_node}"
        else:
            cls, prefix = CALIBRATOR_REGISTRY.get(name), "MODEL.LONG_TAIL.CALIBRATOR"
        parts.append(keys_table(prefix, cls))
        parts.append(f"**Measured on glyph_lvis.** {measured_row(entry.get('measured', ''))}")
        if entry.get("published"):
            items = "\n".join(prose(f"- {line}", "  ") for line in entry["published"])
            parts.append(f"**Published by others.**\n\n{items}")
    return "\n\n".join(parts) + "\n"


def recipes_table() -> str:
    """Every method of the recipes with the first sentence of its head."""
    rows = []
    for path in sorted((ROOT / "configs/methods").glob("*.yaml")):
        head = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
        first = re.split(r"\. (?=[A-Z])", " ".join(head))[0].rstrip(".")
        rows.append([f"`lvis_{path.stem}`", first])
    return tabulate(rows, headers=["recipe", "what it is"], tablefmt="github", disable_numparse=True)


def published_table() -> str:
    """What others published, by method."""
    rows = [[e.get("loss") or e["calibrator"], line] for e in facts() for line in e.get("published", ())]
    return tabulate(rows, headers=["method", "stated"], tablefmt="github", disable_numparse=True)


def filled(name: str) -> str:
    """A page of docs/source with its markers filled in."""
    sections = {"methods": methods_section, "recipes": recipes_table, "published": published_table}

    def fill(match: re.Match) -> str:
        kind, _, rest = match.group(1).partition(" ")
        if kind == "rows":
            return chosen_rows(rest)
        return table(rest) if kind == "table" else sections[kind]()

    blocks = (ROOT / f"docs/source/{name}.md").read_text().split("\n\n")
    text = "\n\n".join(numbered(block) if MARKER.search(block) else block for block in blocks)
    return re.sub(r"\{\{ (.*?) \}\}", fill, text)


def numbered(block: str) -> str:
    """A paragraph or a list with the numbers that its markers name, in lines of their length again."""
    items = [" ".join(item.split()) for item in re.split(r"\n(?=- |\d+\. )", with_numbers(block, method_rows))]
    kept = [re.sub(r"(?<=\w) (?=\d+\. )", "\N{NO-BREAK SPACE}", item) for item in items]  # no line starts a list
    bullets = [re.match(r"- |\d+\. |", item)[0] for item in items]
    lines = [prose(item, " " * len(bullet)) for item, bullet in zip(kept, bullets)]
    return "\n".join(lines).replace("\N{NO-BREAK SPACE}", " ")


def pages() -> dict[str, str]:
    """Every generated page: its path from the repository's root, and its content."""
    texts = {
        "docs/methods.md": methods_page(),
        "docs/config.md": config_page(),
        "docs/model-zoo.md": filled("model-zoo"),
        "docs/benchmarks.md": filled("benchmarks"),
    }
    for name, text in texts.items():
        if unknown := re.search(r"\{\{ .{0,60}", text):
            raise ValueError(f"{name}: {unknown[0]!r} is no marker of generate_docs.py or prose_numbers.py")
    return texts


def plot(path: Path) -> None:
    """Mask AP of each method, all and by frequency group, mean over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def mean(row: dict, metric: str) -> float:
        values = [v for v in row["segm"][metric] if v is not None]
        return sum(values) / len(values) if values else float("nan")

    rows = sorted(method_rows(), key=lambda row: mean(row, "AP"))
    figure, axes = plt.subplots(figsize=(8, 1 + 0.28 * len(rows)), layout="constrained")
    at = range(len(rows))
    axes.barh(at, [mean(r, "AP") for r in rows], color="#c8d6e5", label="all")
    axes.margins(y=0.01)
    longer = {row["method"]: mean(row, "AP") for row in method_rows("longer")}
    axes.plot([longer.get(r["method"]) for r in rows], at, "|", color="black", label="all, 2,500 iterations")
    for group, name in GROUP_NAMES.items():
        axes.plot([mean(r, f"AP{group}") for r in rows], at, "o", color=GROUP_COLOURS[group], label=name, markersize=5)
    axes.set_yticks(list(at), [r["method"] for r in rows], fontsize=8)
    axes.set_xlabel("mask AP on glyph_lvis (synthetic), mean over seeds")
    figure.legend(loc="outside upper center", ncols=5, fontsize=8)  # above: no corner is free of points
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is not up to date")
    args = parser.parse_args()
    try:
        texts = pages()
    except ValueError as error:
        raise SystemExit(str(error)) from None
    old = []
    for name, text in texts.items():
        path = ROOT / name
        if not path.is_file() or path.read_text() != text:
            old.append(name)
            if not args.check:
                write_atomically(path, lambda file, text=text: file.write(text))
    if method_rows() and not args.check:
        plot(ROOT / "docs/methods.png")
    print(f"{'not up to date' if args.check else 'written'}: {', '.join(old)}" if old else "up to date")
    return int(args.check and bool(old))


if __name__ == "__main__":
    sys.exit(main())
