import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from browser import browser


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    """A headless Chromium, shared by the tests of a process."""
    with browser(tmp_path_factory.mktemp("chromium")) as window:
        yield window
