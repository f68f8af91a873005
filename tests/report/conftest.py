import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools/dev"))

from browser import browser


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    """A headless Chromium, shared by the tests of a process."""
    with ExitStack() as stack:
        try:
            window = stack.enter_context(browser(tmp_path_factory.mktemp("chromium")))
        except FileNotFoundError as missing:
            pytest.skip(str(missing))
        yield window
