"""Self-contained HTML pages: of an evaluated model (or two), and of a data set.

Names (``__init__.pyi``) are imported on first use: a page needs Plotly and Jinja2, which nothing else does.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
