"""Progress bars: on a terminal, and nowhere else."""

import io
import re
from pathlib import Path

import pytest

from lt_det.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("file", "show", "drawn"), [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False)]
)
def test_on_terminals_alone(file, show, drawn):
    out = file()
    assert list(progress_bar(range(3), show=show, desc="images", file=out)) == [0, 1, 2]
    assert ("images" in out.getvalue()) == drawn


def test_there_is_one_place_that_makes_them(repo_dir):
    files = [p for folder in ("lt_det", "tools") for p in Path(repo_dir / folder).rglob("*.py")]
    found = [str(p.relative_to(repo_dir)) for p in files if re.search(r"\btqdm\(|import tqdm", p.read_text())]
    assert found == ["lt_det/progress.py"]
