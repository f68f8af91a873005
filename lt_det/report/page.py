"""A page of text, charts, tables and pictures in one HTML file that needs no network.

Plotly's script is written into the file, compressed; the rest is data. The page's content security policy forbids every
request, so that a file which opens here opens anywhere. What is in view is drawn first; the other tables follow, the
other charts when they come near. Tables show their first rows until asked for all.
"""

from __future__ import annotations

import base64
import gzip
import html
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import orjson

from lt_det.frequency import CURVE_NAMES, GROUP_COLOURS
from lt_det.io import write_atomically

__all__ = [
    "Chart",
    "Facts",
    "Gallery",
    "Notice",
    "Page",
    "Section",
    "Table",
    "axis",
    "layout",
    "plain",
    "rounded",
]


@dataclass
class Chart:
    """A Plotly figure.

    Attributes:
        figure: ``{"data": [...], "layout": {...}}``, with numpy arrays where that is handy; NaN becomes a gap.
        caption: a sentence below it, plain text.
        wide: over the whole width of the page rather than half of it.
        height: pixels.
    """

    figure: Mapping[str, Any]
    caption: str = ""
    wide: bool = False
    height: int = 360


@dataclass
class Table:
    """A table that sorts by a click on a heading and searches its text.

    Attributes:
        columns: ``(key, heading, kind)``; kind is "text", "group" (a letter of r, c, f), "int", "float1", "float2",
            "float3" or "signed1".
        rows: one mapping a row; None, NaN or a missing key shows as a dash.
        sort: key to sort by first, "-" before it for descending; "" keeps the order of the rows.
        shown: rows shown until all are asked for.
        search: whether there is a search field, and buttons for the groups where a column is of that kind.
        file_name: of the csv that a button saves; "" for no button.
        caption: a sentence below it.
    """

    columns: Sequence[tuple[str, str, str]]
    rows: Sequence[Mapping[str, Any]]
    sort: str = ""
    shown: int = 25
    search: bool = False
    file_name: str = ""
    caption: str = ""


@dataclass
class Facts:
    """Large numbers side by side: ``(value, what it is)``."""

    items: Sequence[tuple[str, str]]


@dataclass
class Notice:
    """A remark; level is "good", "info", "warning" or "error"."""

    text: str
    level: str = "info"


@dataclass
class Gallery:
    """Pictures: ``(bytes, caption)``; the bytes are a JPEG, PNG or WebP file. Each has ``width`` pixels or more."""

    pictures: Sequence[tuple[bytes, str]]
    caption: str = ""
    width: int = 340


@dataclass
class Section:
    """A heading with what stands below it, linked from the top of the page."""

    title: str
    blocks: Sequence[Any]
    intro: str = ""
    id: str = ""


@dataclass
class Page:
    """A page; :meth:`write` makes the file."""

    title: str
    subtitle: str = ""
    sections: list[Section] = field(default_factory=list)
    footer: str = ""

    def render(self) -> str:
        """The HTML text."""
        data: dict[str, dict] = {"charts": {}, "tables": {}}
        sections = []
        for s, section in enumerate(self.sections):
            blocks = []
            for b, block in enumerate(section.blocks):
                key = f"b{s}-{b}"
                if isinstance(block, Chart):
                    data["charts"][key] = block.figure
                elif isinstance(block, Table):
                    data["tables"][key] = _table_data(block)
                content: dict[str, Any] = {"kind": type(block).__name__.lower(), "key": key, "block": block}
                if isinstance(block, Gallery):
                    content["pictures"] = [(_data_uri(picture), text) for picture, text in block.pictures]
                blocks.append(content)
            sections.append({"id": section.id or f"s{s}", "section": section, "blocks": blocks})
        # "<" never stands in the json, so that no text of a data set can end the script element.
        text = orjson.dumps(data, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS, default=_default)
        return _environment().get_template("page.html").render(
            page=self, sections=sections, data=text.decode().replace("<", "\\u003c"), plotly=_plotly(),
            colours=GROUP_COLOURS, names=CURVE_NAMES,
        )  # fmt: skip

    def write(self, path: str | os.PathLike) -> None:
        """Write the page, atomically."""
        text = self.render()
        write_atomically(path, lambda file: file.write(text))


def _default(value: Any) -> Any:
    if isinstance(value, np.ndarray):  # not contiguous, or of strings
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a page cannot hold a {type(value).__name__}")


def _table_data(table: Table) -> dict[str, Any]:
    """Columns rather than rows: keys once, not in every row."""
    keys = [key for key, _, _ in table.columns]
    unknown = table.sort.lstrip("-")
    if unknown and unknown not in keys:
        raise ValueError(f"the table is to be sorted by {unknown!r}, but has the columns {keys}.")
    return {
        "keys": keys,
        "headings": [heading for _, heading, _ in table.columns],
        "kinds": [kind for _, _, kind in table.columns],
        "values": [[_cell(row.get(key)) for row in table.rows] for key in keys],
        "sort": table.sort,
        "shown": table.shown,
        "search": table.search,
        "file": table.file_name,
    }


def _cell(value: Any) -> Any:
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.5g}") if np.isfinite(value) else None
    return None if value == "" else value


def _data_uri(picture: bytes) -> str:
    kinds = {b"\xff\xd8": "jpeg", b"\x89P": "png", b"RI": "webp"}
    if picture[:2] not in kinds:
        raise ValueError("a picture of a page must be a JPEG, PNG or WebP file.")
    return f"data:image/{kinds[picture[:2]]};base64,{base64.b64encode(picture).decode()}"


@cache
def _plotly() -> str:
    """Plotly's script, by gzip and in base64."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


@cache
def _environment():
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("lt_det.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- figures


def plain(text: str) -> str:
    """Text for a label of a chart: Plotly reads its labels as HTML."""
    return html.escape(str(text), quote=False)


def rounded(values: Any, digits: int = 4) -> list:
    """Numbers with so many significant digits, None for NaN: charts need no more, and pages stay small."""
    return [float(f"{v:.{digits}g}") if np.isfinite(v) else None for v in np.asarray(values, np.float64).tolist()]


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with a title."""
    return {"title": {"text": title}, **more}


def layout(**more: Any) -> dict[str, Any]:
    """What all charts share."""
    common = {
        "margin": {"l": 60, "r": 15, "t": 30, "b": 50},
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        "hovermode": "closest",
        "plot_bgcolor": "#ffffff",
        "paper_bgcolor": "#ffffff",
    }
    for name in [k for k in more if k.startswith(("xaxis", "yaxis"))]:
        # A power of ten a tick: Plotly's own choice also writes the 2s and 5s between them.
        ticks: dict[str, Any] = {"dtick": 1} if more[name].get("type") == "log" else {}
        if name.startswith("yaxis"):  # ticks that are not seen keep the labels off the bars
            ticks |= {"ticks": "outside", "ticklen": 4, "tickcolor": "rgba(0,0,0,0)"}
        more[name] = {"gridcolor": "#e8e8e8", "zeroline": False, "automargin": True, **ticks, **more[name]}
    return {**common, **more}
