"""The page of an evaluated model, or of two side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lt_det.evaluation import GroundTruth
from lt_det.evaluation.compare import Comparison
from lt_det.evaluation.errors import ERROR_TYPES
from lt_det.evaluation.matching import RECALL_THRESHOLDS
from lt_det.frequency import CURVE_NAMES, GROUP_COLOURS

from .evaluation import Run
from .page import (
    Chart,
    Facts,
    Gallery,
    Notice,
    Page,
    Section,
    Table,
    axis,
    layout,
    plain,
    rounded,
)
from .pictures import ERROR_NAMES

__all__ = ["evaluation_page"]

_RUN_COLOURS = ("#8696a8", "#2a6f97")
_MOST_CONFUSIONS = 1500  # rows of the page's table: the most frequent
_KINDS = {"bbox": "boxes", "segm": "masks", "boundary": "mask boundaries"}


def evaluation_page(
    gt: GroundTruth,
    runs: Sequence[Run],
    *,
    comparisons: Mapping[str, Comparison] | None = None,
    pictures: Mapping[str, Sequence[tuple[bytes, str]]] | None = None,
    title: str = "",
    without_pictures: str = "",
) -> Page:
    """The page of one run, or of two (A, then B).

    Args:
        runs: analysed, see :meth:`~lt_det.report.evaluation.Run.analyse`.
        comparisons: of two runs, by IoU type.
        pictures: (JPEG, caption) by heading, of the last run.
        title: of the page.
        without_pictures: why there are none.
    """
    main = runs[0].main
    subject = " and ".join(run.source for run in runs)
    sections = [Section("Overview", _overview(gt, runs), id="overview")]
    if comparisons:
        sections.append(
            Section(
                "A and B",
                _comparison(comparisons[main], runs, comparisons),
                "Paired bootstrap over images: the interval says what another draw of images would do to the "
                "difference, and nothing of the spread between training runs.",
                "compare",
            )
        )
    sections += [
        Section(
            "Categories",
            _categories(gt, runs),
            f"AP of {_KINDS[main]}. F1 and the threshold are the best for the category at IoU 0.5; the last column is "
            "the class that most often takes the category's objects."
            + (" All but the AP of A are B's." if len(runs) == 2 else ""),
            "categories",
        ),
        Section(
            "Precision and recall",
            _precision_recall(gt, runs),
            "Interpolated precision over recall, mean over the categories of each group.",
            "precision-recall",
        ),
    ]
    if any(run.errors for run in runs):
        federated = (
            " A detection of a category that the image's annotation says nothing about, or of one that is not "
            "exhaustively annotated there, is no error (LVIS's federated rule)."
            if gt.federated
            else ""
        )
        sections.append(
            Section(
                "Errors",
                _errors(runs),
                "What is wrong with the detections, by TIDE's types, and the AP50 that is gained when all errors of "
                "one type are mended. Class: on an object, of another class. Location: of the right class, but with "
                "an IoU of 0.1 to 0.5. Both: neither is right. Duplicate: of an object that a better detection found. "
                "Background: on no object. Missed: objects that nothing found." + federated,
                "errors",
            )
        )
        sections.append(
            Section(
                "Confusions",
                _confusions(gt, runs),
                "For each object, the best-scored detection over it (IoU 0.5): of its own class, or of another one, "
                "which then takes the object.",
                "confusions",
            )
        )
    sections += [
        Section(
            "Calibration",
            _calibration(runs),
            "Whether a score is the chance that the detection is right (IoU 0.5): on the diagonal it is. D-ECE is the "
            "mean distance from it, weighted by the number of detections.",
            "calibration",
        ),
        Section(
            "Thresholds",
            _thresholds(gt, runs),
            "The score above which detections of a category are worth keeping: best F1. They are chosen on this data "
            "set, so F1 on other images is a little lower.",
            "thresholds",
        ),
    ]
    if any(run.norms is not None for run in runs):
        sections.append(
            Section(
                "Classifier",
                _norms(gt, runs),
                "The length of each class's weight against its number of training images: a classifier trained on the "
                "long tail gives its frequent classes longer ones.",
                "classifier",
            )
        )
    about = f"Detections of B, {plain(runs[1].name)}." if len(runs) == 2 and pictures else ""
    sections.append(Section("Images", _images(pictures or {}, without_pictures), about, "images"))
    rule = "federated (LVIS) rules" if gt.federated else "exhaustive (COCO) rules"
    return Page(
        title=title or "Evaluation of " + " and ".join(run.name for run in runs),
        subtitle=f"{subject}; {gt.num_images:,} images, {gt.num_categories:,} categories, {rule}.",
        sections=sections,
        footer=f"lt_det, report of {subject}.",
    )


def _groups(gt: GroundTruth) -> list[tuple[str, np.ndarray]]:
    """All categories, then the groups that there are."""
    return list(gt.groups().items())


def _named(runs: Sequence[Run]) -> list[tuple[str, Run]]:
    """Runs with the heading that charts give them: nothing where there is one."""
    return [("", runs[0])] if len(runs) == 1 else list(zip(("A: ", "B: "), runs))


def _title(prefix: str, run: Run) -> dict[str, Any]:
    text = plain(f"{prefix}{run.name}") if prefix else ""
    return {
        "title": {"text": text, "font": {"size": 13}, "x": 0.02, "y": 0.98, "yanchor": "top"},
        "margin": {"l": 60, "r": 15, "t": 62, "b": 50},
    }


def _number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _overview(gt: GroundTruth, runs: Sequence[Run]) -> list[Any]:
    main = runs[0].main
    last = runs[-1]
    facts = []
    for key, what in (("AP", "all"), ("APr", "rare"), ("APc", "common"), ("APf", "frequent")):
        value = last.metrics[main].get(key, math.nan)
        text = _number(value)
        if len(runs) == 2 and not math.isnan(value):
            text += f" ({value - runs[0].metrics[main][key]:+.1f})"
        facts.append((text, f"{key} of {_KINDS[main]}, {what}" + (", B (B - A)" if len(runs) == 2 else "")))
    blocks: list[Any] = [Facts(facts)]
    for prefix, run in _named(runs):
        if run.errors is None:
            blocks.append(
                Notice(
                    f"{prefix}{run.source} holds no results file, so there are no errors, confusions and pictures of "
                    "it. Evaluate with TEST.REPORT True or TEST.WRITE_SUBMISSION True, or name the results file.",
                    "warning",
                )
            )
    rows: list[dict[str, Any]] = []
    every = list(dict.fromkeys(k for run in runs for metrics in run.metrics.values() for k in metrics))
    for prefix, run in _named(runs):
        for task, metrics in run.metrics.items():
            rows.append({"run": prefix[:1], "task": task, **metrics})
    first = [("run", "run", "text")] if len(runs) == 2 else []
    first.append(("task", "of", "text"))
    which = f"A is {runs[0].name}, B is {runs[1].name}." if len(runs) == 2 else ""
    plain_metrics = [c for c in every if not c.endswith(("-fixed", "-pool"))]
    for part, text in (
        (plain_metrics, f"Percent. A dash: there is no such category or object. {which}".strip()),
        (
            [c for c in every if c not in plain_metrics],
            "AP-fixed: 10,000 detections a category and no cap by image. AP-pool: the same, of all categories on one "
            "precision-recall curve.",
        ),
    ):
        if part:
            blocks.append(Table([*first, *((c, c, "float1") for c in part)], rows, caption=text))
    bars = []
    keys = {"AP": "all", "APr": "rare", "APc": "common", "APf": "frequent"}
    for i, (prefix, run) in enumerate(_named(runs)):
        values = [run.metrics[main].get(k, math.nan) for k in keys]
        colour = [GROUP_COLOURS[k[2:]] for k in keys] if len(runs) == 1 else _RUN_COLOURS[i]
        bars.append({
            "type": "bar", "x": list(keys.values()), "y": rounded(values), "name": plain(f"{prefix}{run.name}"),
            "marker": {"color": colour}, "text": [_number(v) for v in values], "textposition": "outside",
            "cliponaxis": False, "hovertemplate": "%{x}: %{y:.2f}<extra></extra>",
        })  # fmt: skip
    blocks.append(
        Chart(
            {"data": bars, "layout": layout(yaxis=axis(f"AP of {_KINDS[main]} (%)"), showlegend=len(runs) == 2)},
            "Mean AP over the categories of each group.",
        )
    )
    blocks.append(_by_count(gt, last))
    return blocks


def _by_count(gt: GroundTruth, run: Run) -> Chart:
    """AP of every category against its training images, or where they are not known against its annotations."""
    ap = 100 * run.curves[run.main].per_category_ap()
    known = gt.image_count >= 0
    stated = bool(known.any())
    count = gt.image_count if stated else gt.num_gt()[:, 0]
    traces = []
    for letter, members in _groups(gt)[1:] or _groups(gt):
        part = np.flatnonzero(members & ~np.isnan(ap) & (count > 0))
        traces.append(_points(gt, letter, part, count[part], ap[part], "%{text}: %{x} images, AP %{y:.1f}"))
    what = "training images" if stated else "annotations here"
    return Chart(
        {"data": traces, "layout": layout(xaxis=axis(f"{what} of the category", type="log"), yaxis=axis("AP (%)"))},
        f"AP of each category of {run.name} against its {what}.",
    )


def _points(gt: GroundTruth, letter: str, part: np.ndarray, x, y, hover: str) -> dict[str, Any]:
    return {
        "type": "scatter", "mode": "markers", "x": rounded(x), "y": rounded(y), "name": CURVE_NAMES[letter],
        "text": [plain(gt.category_names[k]) for k in part], "marker": {"color": GROUP_COLOURS[letter], "size": 5},
        "opacity": 0.7, "hovertemplate": hover + "<extra></extra>",
    }  # fmt: skip


def _comparison(found: Comparison, runs: Sequence[Run], others: Mapping[str, Comparison]) -> list[Any]:
    rows = []
    for task, comparison in others.items():
        for name, r in comparison.groups.items():
            sure = "" if math.isnan(r["p"]) else "differs" if r["low"] > 0 or r["high"] < 0 else "noise"
            rows.append({"task": task, "metric": name, **r, "verdict": sure if r["images"] >= 20 else "too few images"})
    level = f"{100 * found.level:g} %"
    columns = [
        ("task", "of", "text"), ("metric", "metric", "text"), ("a", "A", "float2"), ("b", "B", "float2"),
        ("difference", "B - A", "signed1"), ("low", f"{level} from", "signed1"), ("high", "to", "signed1"),
        ("p", "p", "float3"), ("images", "images with such objects", "int"), ("verdict", "verdict", "text"),
    ]  # fmt: skip
    groups = [(name, r) for name, r in found.groups.items() if not math.isnan(r["difference"])]
    middle = np.array([r["difference"] for _, r in groups])
    bars = {
        "type": "scatter", "mode": "markers", "x": [name for name, _ in groups], "y": rounded(middle),
        "marker": {"size": 11, "color": _RUN_COLOURS[1]}, "showlegend": False,
        "error_y": {
            "type": "data", "symmetric": False, "thickness": 2, "width": 8,
            "array": rounded(np.array([r["high"] for _, r in groups]) - middle),
            "arrayminus": rounded(middle - np.array([r["low"] for _, r in groups])),
        },
        "hovertemplate": "%{x}: %{y:+.2f}<extra></extra>",
    }  # fmt: skip
    categories = found.categories
    dots = []
    for letter in ("f", "c", "r", ""):
        part = [r for r in categories if r["group"] == letter]
        if part:
            dots.append({
                "type": "scatter", "mode": "markers", "x": rounded([r["a"] for r in part]),
                "y": rounded([r["b"] for r in part]), "text": [plain(r["name"]) for r in part],
                "name": CURVE_NAMES[letter] if letter else "no group", "opacity": 0.7,
                "marker": {"color": GROUP_COLOURS[letter], "size": 5},
                "hovertemplate": "%{text}: A %{x:.1f}, B %{y:.1f}<extra></extra>",
            })  # fmt: skip
    dots.append({"type": "scatter", "mode": "lines", "x": [0, 100], "y": [0, 100], "showlegend": False,
                 "line": {"color": "#999999", "dash": "dot", "width": 1}, "hoverinfo": "skip"})  # fmt: skip
    by_category = [
        ("name", "category", "text"), ("group", "group", "group"), ("annotations", "objects", "int"),
        ("a", "A", "float1"), ("b", "B", "float1"), ("difference", "B - A", "signed1"),
        ("low", f"{level} from", "signed1"), ("high", "to", "signed1"),
    ]  # fmt: skip
    zero = {"zeroline": True, "zerolinecolor": "#999999"}
    return [
        Notice(f"A is {runs[0].source}, B is {runs[1].source}; {found.replicates:,} draws of the images."),
        Table(columns, rows),
        Chart({"data": [bars], "layout": layout(yaxis=axis("B - A (AP points)", **zero))},
              f"Differences with their {level} intervals."),
        Chart({"data": dots, "layout": layout(xaxis=axis("AP of A (%)"), yaxis=axis("AP of B (%)"))},
              "Each category; above the line B is better."),
        Table(by_category, categories, sort="difference", shown=12, search=True, file_name="comparison.csv",
              caption="Categories: those that lost most first; a click on a heading sorts."),
    ]  # fmt: skip


def _categories(gt: GroundTruth, runs: Sequence[Run]) -> list[Any]:
    last = runs[-1]
    main = last.main
    objects = gt.num_gt()[:, 0]
    ap = [100 * run.curves[main].per_category_ap() for run in runs]
    ap50 = 100 * last.curves[main].per_category_ap(0.5)
    recall = 100 * last.curves[main].per_category_ar()
    taker: dict[int, str] = {}
    for pair in last.errors.confusions if last.errors else ():
        taker.setdefault(pair["category"], f"{gt.category_names[pair['taken_by']]} ({pair['count']})")
    rows = []
    for k in range(gt.num_categories):
        cut = last.thresholds[k]
        known = cut["source"] == "category"
        row = {
            "name": gt.category_names[k], "group": gt.group_of(k), "objects": int(objects[k]),
            "images": int(gt.image_count[k]) if gt.image_count[k] >= 0 else None, "AP": ap[-1][k], "AP50": ap50[k],
            "AR": recall[k], "f1": 100 * cut["f1"] if known else None, "threshold": cut["threshold"],
            "taker": taker.get(k, ""),
        }  # fmt: skip
        if len(runs) == 2:
            row["A"] = ap[0][k]
        if last.norms is not None:
            row["norm"] = last.norms[k]
        rows.append(row)
    columns = [("name", "category", "text"), ("group", "group", "group")]
    if (gt.image_count >= 0).any():
        columns.append(("images", "training images", "int"))
    columns += [("objects", "objects here", "int")]
    if len(runs) == 2:
        columns.append(("A", "AP of A", "float1"))
    columns += [
        ("AP", "AP of B" if len(runs) == 2 else "AP", "float1"), ("AP50", "AP50", "float1"), ("AR", "AR", "float1"),
        ("f1", "best F1", "float1"), ("threshold", "at score", "float3"),
    ]  # fmt: skip
    if last.norms is not None:
        columns.append(("norm", "weight", "float2"))
    if last.errors:
        columns.append(("taker", "taken by", "text"))
    return [Table(columns, rows, sort="AP", shown=20, search=True, file_name="categories.csv",
                  caption="Worst first. Percent, but for the score and the weight.")]  # fmt: skip


def _precision_recall(gt: GroundTruth, runs: Sequence[Run]) -> list[Any]:
    charts = []
    for prefix, run in _named(runs):
        found = run.curves[run.main]
        for part, text in ((slice(0, 1), "IoU 0.5"), (slice(None), "Mean over IoU 0.5 to 0.95")):
            traces = []
            for letter, members in _groups(gt):
                members = members & (found.recall[0, :, 0] >= 0)
                if not members.any():
                    continue
                curve = found.precision[part][:, :, members, 0].mean(axis=(0, 2))
                traces.append({
                    "type": "scatter", "mode": "lines", "x": rounded(RECALL_THRESHOLDS), "y": rounded(curve),
                    "name": f"{CURVE_NAMES[letter]} {100 * curve.mean():.1f}",
                    "line": {"color": GROUP_COLOURS[letter], "dash": "solid" if letter else "dash", "width": 2},
                    "hovertemplate": "recall %{x:.2f}: precision %{y:.2f}<extra></extra>",
                })  # fmt: skip
            figure = {
                "data": traces,
                "layout": layout(
                    xaxis=axis("recall", range=[0, 1]), yaxis=axis("precision", range=[0, 1.02]), **_title(prefix, run)
                ),
            }
            charts.append(Chart(figure, f"{text}; the legend has the area under each curve."))
    return charts


def _errors(runs: Sequence[Run]) -> list[Any]:
    blocks: list[Any] = []
    rows = []
    for prefix, run in _named(runs):
        found = run.errors
        if found is None:
            continue
        costs, counts = [], []
        names = [ERROR_NAMES.get(e, e) for e in ERROR_TYPES]
        for letter in found.cost:
            common = {
                "type": "bar",
                "x": names,
                "name": CURVE_NAMES[letter],
                "marker": {"color": GROUP_COLOURS[letter]},
            }
            costs.append({
                **common, "y": rounded([found.cost[letter][e] for e in ERROR_TYPES]),
                "hovertemplate": "%{x}: %{y:.2f} AP50<extra></extra>",
            })  # fmt: skip
            total = max(sum(found.count[letter].values()), 1)
            counts.append({
                **common, "y": rounded([100 * found.count[letter][e] / total for e in ERROR_TYPES]),
                "customdata": [found.count[letter][e] for e in ERROR_TYPES],
                "hovertemplate": "%{x}: %{customdata:,} (%{y:.1f} %)<extra></extra>",
            })  # fmt: skip
            row: dict[str, Any] = {
                "run": prefix[:1],
                "group": CURVE_NAMES[letter],
                "AP50": found.ap50[letter],
            }
            row |= {f"cost_{e}": found.cost[letter][e] for e in ERROR_TYPES}
            row |= {f"count_{e}": found.count[letter][e] for e in ERROR_TYPES}
            rows.append(row)
        blocks.append(
            Chart(
                {"data": costs, "layout": layout(barmode="group", yaxis=axis("AP50 gained"), **_title(prefix, run))},
                "What mending each type of error, in all groups, would give each group.",
            )
        )
        blocks.append(
            Chart(
                {"data": counts, "layout": layout(barmode="group", yaxis=axis("% of errors"), **_title(prefix, run))},
                "How the errors of each group's detections (missed: of its objects) divide among the types.",
            )
        )
    columns = [("run", "run", "text")] if len(runs) == 2 else []
    columns += [("group", "group", "text"), ("AP50", "AP50", "float1")]
    columns += [(f"cost_{e}", f"{ERROR_NAMES.get(e, e)}: AP50", "float1") for e in ERROR_TYPES]
    columns += [(f"count_{e}", f"{ERROR_NAMES.get(e, e)}: number", "int") for e in ERROR_TYPES]
    blocks.append(Table(columns, rows, file_name="errors.csv"))
    return blocks


def _confusions(gt: GroundTruth, runs: Sequence[Run]) -> list[Any]:
    prefix, run = [(p, r) for p, r in _named(runs) if r.errors][-1]
    found = run.errors
    assert found is not None
    blocks: list[Any] = []
    members = _groups(gt)[1:]
    if members:
        share = np.zeros((len(members), len(members) + 2))
        place = {letter: i for i, (letter, _) in enumerate(members)}
        for pair in found.confusions:
            one, other = (place.get(gt.group_of(pair[key]), -1) for key in ("category", "taken_by"))
            if one >= 0 and other >= 0:
                share[one, 1 + other] += pair["count"]
        total = np.array([found.objects[part].sum() for _, part in members], float)
        share[:, 0] = [found.found[part].sum() for _, part in members]
        share[:, -1] = total - share[:, :-1].sum(1)
        share = 100 * share / np.maximum(total, 1)[:, None]
        across = ["found", *(CURVE_NAMES[g] for g, _ in members), "nobody"]
        heat = {
            "type": "heatmap", "z": [rounded(r, 3) for r in share], "x": across,
            "y": [f"{CURVE_NAMES[g]}" for g, _ in members], "zmin": 0, "zmax": 100,
            "colorscale": [[0, "#f4f8fb"], [1, "#4f93bd"]],
            "text": [[f"{v:.1f} %" for v in r] for r in share], "texttemplate": "%{text}", "showscale": False,
            "hovertemplate": "%{y} objects, %{x}: %{z} %<extra></extra>",
        }  # fmt: skip
        blocks.append(
            Chart(
                {
                    "data": [heat],
                    "layout": layout(
                        xaxis=axis("found, or taken by a class that is ..."),
                        yaxis=axis("", autorange="reversed"),
                        **_title(prefix, run),
                    ),
                },
                "What becomes of the objects of each group.",
                height=300,
            )
        )
        rare = [p for p in found.confusions if gt.group_of(p["category"]) == "r" and gt.group_of(p["taken_by"]) == "f"]
        takers: dict[int, int] = {}
        for pair in rare:
            takers[pair["taken_by"]] = takers.get(pair["taken_by"], 0) + pair["count"]
        most = sorted(takers.items(), key=lambda t: -t[1])[:15][::-1]
        if most:
            bars = {
                "type": "bar", "orientation": "h", "x": [n for _, n in most],
                "y": [plain(gt.category_names[k])[:40] for k, _ in most], "marker": {"color": GROUP_COLOURS["f"]},
                "hovertemplate": "%{y}: %{x}<extra></extra>",
            }  # fmt: skip
            blocks.append(
                Chart(
                    {
                        "data": [bars],
                        # dtick: every class is named, where Plotly would leave out some
                        "layout": layout(
                            xaxis=axis("rare objects taken"), yaxis=axis("", dtick=1), **_title(prefix, run)
                        ),
                    },
                    "Frequent classes that take most objects of rare ones.",
                    height=max(300, 130 + 20 * len(most)),
                )
            )
        blocks.append(_pairs(gt, rare, "rare_to_frequent.csv", "Rare classes whose objects frequent classes take."))
    text = "All confusions, the most frequent first."
    if len(found.confusions) > _MOST_CONFUSIONS:
        text = f"The {_MOST_CONFUSIONS:,} most frequent of {len(found.confusions):,} confusions."
    blocks.append(_pairs(gt, found.confusions[:_MOST_CONFUSIONS], "confusions.csv", text))
    return blocks


def _pairs(gt: GroundTruth, pairs: Sequence[Mapping[str, int]], file: str, caption: str) -> Table:
    rows = [
        {
            "name": gt.category_names[p["category"]], "group": gt.group_of(p["category"]),
            "taker": gt.category_names[p["taken_by"]],
            "taker_group": CURVE_NAMES[gt.group_of(p["taken_by"])] if gt.group_of(p["taken_by"]) else "",
            "count": p["count"], "objects": p["objects"], "checked": p["checked"],
            "share": 100 * p["count"] / max(p["objects"], 1),
        }
        for p in pairs
    ]  # fmt: skip
    columns = [
        ("name", "category", "text"), ("group", "group", "group"), ("taker", "taken by", "text"),
        ("taker_group", "of group", "text"), ("count", "objects taken", "int"), ("objects", "of", "int"),
        ("share", "%", "float1"), ("checked", "of these in images annotated for the taker", "int"),
    ]  # fmt: skip
    return Table(columns, rows, sort="-count", shown=10, search=True, file_name=file, caption=caption)


def _calibration(runs: Sequence[Run]) -> list[Any]:
    blocks: list[Any] = []
    rows = []
    for prefix, run in _named(runs):
        traces: list[dict[str, Any]] = [
            {"type": "scatter", "mode": "lines", "x": [0, 1], "y": [0, 1], "showlegend": False, "hoverinfo": "skip",
             "line": {"color": "#999999", "dash": "dot", "width": 1}}
        ]  # fmt: skip
        numbers = []
        for letter, one in run.calibration.items():
            common = {"name": CURVE_NAMES[letter], "hoverinfo": "all"}
            some = one.count >= 5  # fewer are dots without meaning
            traces.append({
                **common, "type": "scatter", "mode": "lines+markers", "x": rounded(one.score[some]),
                "y": rounded(one.precision[some]), "customdata": one.count[some],
                "line": {"color": GROUP_COLOURS[letter], "dash": "solid" if letter else "dash"},
                "hovertemplate": "score %{x:.3f}: %{y:.3f} right, %{customdata:,} detections<extra></extra>",
            })  # fmt: skip
            edges = (np.arange(len(one.count)) + 0.5) / len(one.count)
            if letter or len(run.calibration) == 1:
                numbers.append({
                    **common, "type": "scatter", "mode": "lines", "x": rounded(edges),
                    "y": [int(n) or None for n in one.count], "line": {"color": GROUP_COLOURS[letter], "shape": "hvh"},
                    "hovertemplate": "score %{x:.3f}: %{y:,} detections<extra></extra>",
                })  # fmt: skip
            high = run.calibration_high[letter]
            rows.append({
                "run": prefix[:1], "group": CURVE_NAMES[letter], "count": int(one.count.sum()),
                "error": one.error, "largest": one.largest, "count_high": int(high.count.sum()),
                "error_high": high.error, "mean": _mean(high.score, high.count),
                "precision": _mean(high.precision, high.count),
            })  # fmt: skip
        both = {"xaxis": axis("score", range=[0, 1]), **_title(prefix, run)}
        blocks.append(
            Chart(
                {"data": traces, "layout": layout(yaxis=axis("share that is right", range=[0, 1.02]), **both)},
                "Below the diagonal: overconfident. Bins of at least five detections.",
            )
        )
        blocks.append(
            Chart(
                {"data": numbers, "layout": layout(yaxis=axis("detections", type="log"), **both)},
                "How many detections have which score.",
            )
        )
    columns = [("run", "run", "text")] if len(runs) == 2 else []
    columns += [
        ("group", "group", "text"), ("count", "detections", "int"), ("error", "D-ECE", "float3"),
        ("largest", "largest gap of a bin", "float3"), ("count_high", "with a score of 0.1 and more", "int"),
        ("error_high", "their D-ECE", "float3"), ("mean", "their mean score", "float3"),
        ("precision", "share of them that is right", "float3"),
    ]  # fmt: skip
    return [*blocks, Table(columns, rows, caption="Detections that the annotations say nothing about are left out.")]


def _mean(values: np.ndarray, count: np.ndarray) -> float:
    known = count > 0
    return float((values[known] * count[known]).sum() / count.sum()) if known.any() else math.nan


def _thresholds(gt: GroundTruth, runs: Sequence[Run]) -> list[Any]:
    blocks: list[Any] = []
    for prefix, run in _named(runs):
        boxes = []
        for letter, members in _groups(gt)[1:] or _groups(gt):
            own = [run.thresholds[k]["threshold"] for k in np.flatnonzero(members)
                   if run.thresholds[k]["source"] == "category"]  # fmt: skip
            boxes.append({
                "type": "box", "y": rounded(own), "name": f"{CURVE_NAMES[letter]} ({len(own)})", "boxpoints": False,
                "marker": {"color": GROUP_COLOURS[letter]}, "showlegend": False,
            })  # fmt: skip
        blocks.append(
            Chart(
                {
                    "data": boxes,
                    "layout": layout(yaxis=axis("threshold of best F1", range=[0, 1.02]), **_title(prefix, run)),
                },
                "Of categories with at least one right detection (their number in brackets).",
            )
        )
    of_run = " of B" if len(runs) == 2 else ""
    blocks.append(
        Notice(
            f"The thresholds of all categories{of_run} are in the csv beside this page; lt-det predict --thresholds "
            "takes it. A category without a right detection has the threshold that is best for its group.",
        )
    )
    return blocks


def _norms(gt: GroundTruth, runs: Sequence[Run]) -> list[Any]:
    blocks: list[Any] = []
    stated = bool((gt.image_count >= 0).any())
    count = gt.image_count if stated else gt.num_gt()[:, 0]
    for prefix, run in _named(runs):
        if run.norms is None:
            continue
        traces = []
        for letter, members in _groups(gt)[1:] or _groups(gt):
            part = np.flatnonzero(members & (count > 0))
            traces.append(_points(gt, letter, part, count[part], run.norms[part], "%{text}: %{x} images, %{y:.2f}"))
        known = count > 0
        slope = np.polyfit(np.log10(count[known]), run.norms[known], 1)[0] if known.sum() > 1 else math.nan
        figure = {
            "data": traces,
            "layout": layout(
                xaxis=axis("training images" if stated else "annotations here", type="log"),
                yaxis=axis("length of the weight"),
                **_title(prefix, run),
            ),
        }
        blocks.append(Chart(figure, f"Ten times the images go with {slope:+.2f} in length (least squares)."))
    return blocks


def _images(pictures: Mapping[str, Sequence[tuple[bytes, str]]], reason: str) -> list[Any]:
    blocks: list[Any] = []
    for heading, some in pictures.items():
        if some:
            blocks += [Notice(heading), Gallery(some, width=520)]
    return blocks or [Notice(reason or "There is no image to show.", "warning")]
