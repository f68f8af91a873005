"""The page of a data set."""

from __future__ import annotations

import itertools
import os
from typing import Any

import numpy as np

from lt_det.frequency import CURVE_NAMES, GROUP_COLOURS

from .dataset import Finding, Inspection
from .page import (
    Chart,
    Facts,
    Notice,
    Page,
    Section,
    Table,
    axis,
    layout,
    plain,
    rounded,
)

__all__ = ["dataset_page"]

_SAMPLER_COLOURS = ("#777777", "#2a9d8f", "#8e5ea2", "#e9a23b", "#3b7dd8", "#b5485d")


def dataset_page(found: Inspection, *, title: str | None = None) -> Page:
    """The page of :func:`lt_det.report.inspect_annotations`."""
    data, statistics = found.annotations, found.statistics
    name = title or os.path.basename(data.path)
    kind = "federated (LVIS)" if data.federated else "exhaustive (COCO)"
    return Page(
        title=f"Data set: {name}",
        subtitle=f"{data.path}; {kind} annotations; groups by {found.group_source}.",
        sections=[
            Section("Overview", _overview(found), id="overview"),
            Section(
                "Classes",
                _classes(found),
                "The long tail: classes by descending number of images. A classifier trained without care follows "
                "these counts.",
                "classes",
            ),
            Section(
                "Samplers",
                _samplers(found),
                "What one epoch shows of every class under each sampler: expected numbers under its repeat factors. "
                "An epoch of one sampler may be longer than that of another.",
                "samplers",
            ),
            Section("Repeat threshold", _advice(found), id="threshold"),
            Section("Images", _images(found), id="images"),
            Section("Sizes", _sizes(found), id="sizes"),
            Section(
                "Company of rare classes",
                _company(found),
                "To repeat an image for its rare class repeats the frequent classes in it as well; this is why "
                "resampling alone does not balance the classes.",
                "company",
            ),
            Section("Suspicious entries", _findings(found), id="suspicious"),
        ],
        footer=f"lt-det inspect: {data.path}, {len(data.image):,} annotations, {statistics.num_classes:,} categories.",
    )


def _overview(found: Inspection) -> list[Any]:
    data, statistics = found.annotations, found.statistics
    counts = statistics.image_count
    present = counts[counts > 0]
    facts = [
        (f"{len(data.images):,}", "images"),
        (f"{int(statistics.instance_count.sum()):,}", "instances to train on"),
        (f"{statistics.num_classes:,}", "categories"),
        *((f"{int((found.group == g).sum()):,}", CURVE_NAMES[g]) for g in "rcf"),
        (f"{present.max() / present.min():,.0f} : 1", "images of the most frequent and the rarest class"),
        (f"{found.instances_per_image.mean():.1f}", "instances an image"),
    ]
    errors = sum(f.count for f in found.findings if f.level == "error")
    warnings = sum(f.count for f in found.findings if f.level == "warning")
    if errors:
        notice = Notice(
            f"{errors:,} entries are wrong and {warnings:,} look suspicious; see the last section.", "error"
        )
    elif warnings:
        notice = Notice(f"{warnings:,} entries look suspicious; see the last section.", "warning")
    else:
        notice = Notice("No entry looks wrong.", "good")
    return [Facts(facts), notice]


def _by_group(group: np.ndarray) -> list[tuple[str, np.ndarray]]:
    return [(g, np.flatnonzero(group == g)) for g in "fcr" if (group == g).any()]


def _classes(found: Inspection) -> list[Any]:
    statistics, group = found.statistics, found.group
    order = np.argsort(-statistics.image_count, kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(1, len(order) + 1)
    names = [plain(n) for n in statistics.names]
    traces, shapes = [], []
    for letter, members in _by_group(group):
        members = members[np.argsort(rank[members])]
        traces.append({
            "type": "scatter", "mode": "markers", "x": rank[members],
            "y": [c or None for c in statistics.image_count[members].tolist()], "text": [names[k] for k in members],
            "name": f"{CURVE_NAMES[letter]} ({len(members)})", "marker": {"color": GROUP_COLOURS[letter], "size": 5},
            "hovertemplate": "%{text}: %{y} images<extra></extra>",
        })  # fmt: skip
        low, high = rank[members].min() - 0.5, rank[members].max() + 0.5
        shapes.append({
            "type": "rect", "xref": "x", "yref": "paper", "x0": low, "x1": high, "y0": 0, "y1": 1, "layer": "below",
            "fillcolor": GROUP_COLOURS[letter], "opacity": 0.09, "line": {"width": 0},
        })  # fmt: skip
    counts = statistics.image_count
    # Groups that the file states may be those of another, larger set: then they mix in the order of these counts.
    ordered = all(a["x1"] <= b["x0"] for a, b in itertools.pairwise(shapes))
    few = {"dtick": "D2"} if counts.max() < 20 else {}
    by_rank = {
        "data": traces,
        "layout": layout(
            xaxis=axis("category, by number of images", type="log"), yaxis=axis("images", type="log", **few),
            shapes=shapes if ordered else [],
        ),
    }  # fmt: skip

    # Bars on a logarithmic axis: their places and widths are logarithms, the ticks say the numbers.
    decades = int(np.ceil(np.log10(max(counts.max(), 10))))
    edges = np.linspace(0, decades, 8 * decades + 1)
    bars = []
    for letter, members in reversed(_by_group(group)):
        height, _ = np.histogram(np.log10(counts[members][counts[members] > 0]), edges)
        bars.append({
            "type": "bar", "x": rounded((edges[:-1] + edges[1:]) / 2), "y": height, "width": rounded(np.diff(edges)),
            "name": CURVE_NAMES[letter], "marker": {"color": GROUP_COLOURS[letter]},
            "customdata": rounded(10 ** ((edges[:-1] + edges[1:]) / 2), 2),
            "hovertemplate": "about %{customdata} images: %{y} categories<extra></extra>",
        })  # fmt: skip
    ticks = {"tickvals": list(range(decades + 1)), "ticktext": [f"{10**d:,}" for d in range(decades + 1)]}
    histogram = {
        "data": bars,
        "layout": layout(barmode="stack", xaxis=axis("images of a category", **ticks), yaxis=axis("categories")),
    }
    rows = [
        {
            "name": statistics.names[k], "group": group[k], "images": int(counts[k]),
            "instances": int(statistics.instance_count[k]),
            "per_image": statistics.instance_count[k] / counts[k] if counts[k] else None,
            **{s.name: float(s.instances[k]) for s in found.samplings},
        }
        for k in range(statistics.num_classes)
    ]  # fmt: skip
    columns = [
        ("name", "category", "text"), ("group", "group", "group"), ("images", "images", "int"),
        ("instances", "instances", "int"), ("per_image", "instances an image", "float1"),
        *((s.name, f"{_sampler(s.name)}: instances an epoch", "float1") for s in found.samplings[1:]),
    ]  # fmt: skip
    none = int((counts == 0).sum())
    return [
        Chart(by_rank, "Both axes logarithmic" + ("; the bands are the frequency groups." if ordered else ".")),
        Chart(histogram, "How many categories have how many images" + (f"; {none:,} have none." if none else ".")),
        Table(columns, rows, sort="images", shown=15, search=True, file_name="categories.csv"),
    ]


def _sampler(name: str) -> str:
    """A sampler's name without what all have in common."""
    short = name.replace("TrainingSampler", "").replace("Sampler", "")
    return short or "every image once"


def _samplers(found: Inspection) -> list[Any]:
    statistics, group = found.statistics, found.group
    order = np.argsort(-statistics.image_count, kind="stable")
    known = order[statistics.image_count[order] > 0]
    # Neighbours in the order are alike: a line of at most 300 geometric means reads better than 1,203 points.
    step = max(1, len(known) // 300)
    bins = [known[i : i + step] for i in range(0, len(known), step)]
    charts = []
    for kind, what in (("images", "images drawn that hold the class"), ("instances", "instances of the class seen")):
        traces = []
        for sampling, colour in zip(found.samplings, itertools.cycle(_SAMPLER_COLOURS)):
            values = getattr(sampling, kind)
            mean = [np.exp(np.log(np.maximum(values[b], 1e-6)).mean()) for b in bins]
            traces.append({
                "type": "scatter", "mode": "lines", "x": [i * step + 1 for i in range(len(bins))], "y": rounded(mean),
                "name": _sampler(sampling.name), "line": {"color": colour, "width": 1.8},
                "text": [plain(statistics.names[b[0]]) for b in bins],
                "hovertemplate": "%{text}: %{y:.3g}<extra>" + plain(_sampler(sampling.name)) + "</extra>",
            })  # fmt: skip
        charts.append(
            Chart(
                {
                    "data": traces,
                    "layout": layout(
                        xaxis=axis("category, by number of images", type="log"),
                        yaxis=axis(f"{kind} an epoch", type="log"),
                    ),
                },
                f"Expected {what} in one epoch.",
            )
        )
    rows = []
    for s in found.samplings:
        seen = s.instances[statistics.image_count > 0]
        total = s.instances.sum()
        rows.append({
            "sampler": s.name, "threshold": "-" if s.threshold is None else f"{s.threshold:g}", "draws": round(s.draws),
            "largest": s.largest, "repeated": s.repeated,
            **{g: 100 * s.instances[group == g].sum() / total for g in "rcf"}, "ratio": seen.max() / seen.min(),
        })  # fmt: skip
    columns = [
        ("sampler", "DATALOADER.SAMPLER_TRAIN", "text"), ("threshold", "repeat threshold", "text"),
        ("draws", "images an epoch", "int"), ("repeated", "images with a factor above 1", "int"),
        ("largest", "largest factor", "float1"), ("r", "% of instances rare", "float2"),
        ("c", "% common", "float2"), ("f", "% frequent", "float2"), ("ratio", "most : least seen class", "float1"),
    ]  # fmt: skip
    caption = (
        "ClassBalancedSampler's factors are scaled to a mean of 1, so that its epochs are as long as the data set."
    )
    return [*charts, Table(columns, rows, caption=caption)]


def _advice(found: Inspection) -> list[Any]:
    advice = found.advice
    text = "DATALOADER.SAMPLER_TRAIN TrainingSampler. " if advice.threshold is None else (
        f"DATALOADER.SAMPLER_TRAIN RepeatFactorTrainingSampler, DATALOADER.REPEAT_THRESHOLD {advice.threshold:g}. "
    )  # fmt: skip
    group = found.group
    rows = [
        {
            "threshold": f"{s.threshold:g}",
            "draws": round(s.draws),
            "longer": s.draws / max(len(found.annotations.images), 1),
            "repeated": s.repeated,
            "largest": s.largest,
            **{g: 100 * s.instances[group == g].sum() / s.instances.sum() for g in "rcf"},
        }
        for s in advice.candidates
    ]
    columns = [
        ("threshold", "repeat threshold", "text"), ("draws", "images an epoch", "int"),
        ("longer", "images an epoch / images", "float2"), ("repeated", "images with a factor above 1", "int"),
        ("largest", "largest factor", "float1"), ("r", "% of instances rare", "float2"),
        ("c", "% common", "float2"), ("f", "% frequent", "float2"),
    ]  # fmt: skip
    return [Notice(text + " ".join(advice.reasons), "good"), Table(columns, rows)]


def _images(found: Inspection) -> list[Any]:
    charts = []
    for values, what in ((found.instances_per_image, "instances"), (found.categories_per_image, "categories")):
        count = np.bincount(values)
        x = np.flatnonzero(count)
        charts.append(
            Chart(
                {
                    "data": [
                        {
                            "type": "bar",
                            "x": x,
                            "y": count[x],
                            "marker": {"color": "#4c72b0"},
                            "hovertemplate": f"%{{x}} {what}: %{{y}} images<extra></extra>",
                        }
                    ],
                    "layout": layout(xaxis=axis(f"{what} in an image"), yaxis=axis("images", type="log"), bargap=0.05),
                },
                f"{what.capitalize()} an image: mean {values.mean():.1f}, median {np.median(values):g}, "
                f"most {values.max():,}.",
            )
        )
    if found.annotations.federated:
        data = found.annotations
        number = len(data.images)
        text = (
            f"Federated annotation: an image names {len(data.negative) / number:.1f} categories that it does not hold, "
            f"and {len(data.not_exhaustive) / number:.2f} of which not all instances are marked. "
        )
        if len(data.negative) + int(found.categories_per_image.sum()) == number * found.statistics.num_classes:
            text += "Every image is annotated for every category."
        else:
            text += (
                "Of all other categories that an image does not hold nothing is known: detections of them count "
                "neither for nor against."
            )
        charts.append(Notice(text))
    return charts


def _sizes(found: Inspection) -> list[Any]:
    data, group = found.annotations, found.group
    w, h = data.box[:, 2], data.box[:, 3]
    keep = data.trained & np.isfinite(data.box).all(1) & (w > 0) & (h > 0)
    side = np.sqrt(w[keep] * h[keep])
    letters = group[data.category[keep]]
    edges = np.logspace(0, np.log10(max(side.max(initial=2), 2)), 41)
    lines, bars = [], []
    area = np.where(np.isfinite(data.area), data.area, w * h)[keep]
    size = np.digitize(area, [32**2, 96**2])
    for g in "rcf":
        part = letters == g
        if not part.any():
            continue
        share = np.histogram(side[part], edges)[0] / part.sum()
        lines.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": rounded(np.sqrt(edges[:-1] * edges[1:])),
                "y": rounded(100 * share),
                "name": CURVE_NAMES[g],
                "line": {"color": GROUP_COLOURS[g], "shape": "hvh"},
                "hovertemplate": "about %{x:.3g} px: %{y:.1f} %<extra>" + CURVE_NAMES[g] + "</extra>",
            }
        )
        shares = 100 * np.bincount(size[part], minlength=3) / part.sum()
        bars.append((g, shares))
    shapes = [
        {
            "type": "line",
            "x0": x,
            "x1": x,
            "yref": "paper",
            "y0": 0,
            "y1": 1,
            "line": {"color": "#999", "dash": "dot", "width": 1},
        }
        for x in (32, 96)
    ]
    ratio = h[keep] / w[keep]
    text = ", ".join(
        f"{CURVE_NAMES[g]} {np.median(side[letters == g]):.0f} px ({np.quantile(ratio[letters == g], 0.05):.1f} to "
        f"{np.quantile(ratio[letters == g], 0.95):.1f} times as high as wide)"
        for g, _ in bars
    )
    stacked = {
        "data": [
            {
                "type": "bar",
                "orientation": "h",
                "y": [CURVE_NAMES[g] for g, _ in bars],
                "x": rounded([s[i] for _, s in bars]),
                "name": name,
                "marker": {"color": colour},
                "hovertemplate": "%{x:.1f} %<extra>" + name + "</extra>",
            }
            for i, (name, colour) in enumerate((("small", "#9ecae1"), ("medium", "#4292c6"), ("large", "#08519c")))
        ],
        "layout": layout(barmode="stack", xaxis=axis("% of the instances"), yaxis=axis("")),
    }
    return [
        Chart(
            {
                "data": lines,
                "layout": layout(
                    xaxis=axis("square root of the box's area, pixels", type="log"),
                    yaxis=axis("% of the group's instances"),
                    shapes=shapes,
                ),
            },
            "Dotted: LVIS's limits of small, medium and large, 32 and 96 pixels.",
        ),
        Chart(stacked, "By the annotations' area: small below 32 x 32 pixels, large above 96 x 96."),
        Notice(f"Median side, and the middle 90 % of the aspect ratios: {text}."),
    ]


def _company(found: Inspection) -> list[Any]:
    labels = [CURVE_NAMES[g] for g in "rcf"]
    table = found.company
    heat = {
        "data": [
            {
                "type": "heatmap",
                "z": [rounded(row) for row in table],
                "x": labels,
                "y": labels,
                "colorscale": "Blues",
                "reversescale": True,
                "text": [["" if np.isnan(v) else f"{v:.2f}" for v in row] for row in table],
                "texttemplate": "%{text}",
                "hovertemplate": "an image with a %{y} class: %{z} instances of %{x} ones<extra></extra>",
                "showscale": False,
            }
        ],
        "layout": layout(
            xaxis=axis("mean instances of these classes", showgrid=False),
            yaxis=axis("", autorange="reversed"),  # the caption says what rows are; a title runs into them
        ),
    }
    rows = found.companions
    if not rows:
        return [Notice("No rare class has an image.")]
    edges = np.arange(0, 101, 10)
    height, _ = np.histogram([r["with"] for r in rows], edges)
    bars = {
        "data": [
            {
                "type": "bar",
                "x": edges[:-1] + 5,
                "y": height,
                "customdata": [f"{low} to {low + 10}" for low in edges[:-1]],
                "marker": {"color": GROUP_COLOURS["r"]},
                "hovertemplate": "%{customdata} %: %{y} rare classes<extra></extra>",
            }
        ],
        "layout": layout(
            xaxis=axis("% of a rare class's images that hold a frequent class too", range=[0, 100]),
            yaxis=axis("rare classes"),
            bargap=0.05,
        ),
    }
    columns = [
        ("name", "rare category", "text"), ("images", "images", "int"), ("instances", "instances", "int"),
        ("with", "% of images with a frequent class", "float1"),
        ("per_instance", "frequent instances for each of its own", "float1"),
        ("companions", "most common frequent companions", "text"),
    ]  # fmt: skip
    return [
        Chart(heat, "Rows: images that hold a class of the group; columns: what else stands in them."),
        Chart(bars, "How often rare classes come with a frequent one."),
        Table(columns, rows, sort="-per_instance", shown=15, search=True, file_name="companions.csv"),
    ]


def _findings(found: Inspection) -> list[Any]:
    if not found.findings:
        return [Notice("Nothing suspicious was found.", "good")]
    rows = [{"level": f.level, "what": f.title, "count": f.count, "advice": f.advice} for f in found.findings]
    columns = [
        ("level", "level", "text"), ("count", "number", "int"), ("what", "what", "text"), ("advice", "advice", "text")
    ]  # fmt: skip
    blocks: list[Any] = [Table(columns, rows, shown=40)]
    examples = [{"what": f.title, **e} for f in found.findings for e in f.examples]
    blocks.append(
        Table(
            [("what", "what", "text"), ("image", "image id", "text"), ("annotation", "annotation id", "text"),
             ("category", "category", "text"), ("detail", "detail", "text")],
            examples, search=True, shown=25, file_name="suspicious.csv",
            caption="At most 20 examples of each kind.",
        )
    )  # fmt: skip
    return blocks


def findings_text(findings: list[Finding]) -> str:
    """One line a kind, for the console."""
    return "\n".join(f"  {f.level:7} {f.count:>9,}  {f.title}" for f in findings)
