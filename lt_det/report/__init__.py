"""Self-contained HTML pages: of an evaluated model (or two), and of a data set.

Names are imported on first use: a page needs Plotly and Jinja2, which nothing else does.
"""

import importlib

_MODULES = {
    "Chart": "page",
    "Facts": "page",
    "Gallery": "page",
    "Notice": "page",
    "Page": "page",
    "Section": "page",
    "Table": "page",
    "inspect_annotations": "dataset",
    "dataset_page": "dataset_page",
    "evaluation_page": "evaluation_page",
    "read_run": "evaluation",
    "write_report": "evaluation_report",
}

__all__ = sorted(_MODULES)


def __getattr__(name):
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
