"""CONTRIBUTING's example of a loss, in a copy of the project: from its blocks alone, with no other change."""

import gc
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from detectron2.utils.registry import Registry

REPO = Path(__file__).resolve().parents[2]
CHECK = """
def test_poly_from_its_recipes():
    from lt_det import losses, model_zoo
    from lt_det.modeling import build_loss

    for name in ("glyph_poly", "lvis_poly"):
        cfg = model_zoo.get_config(name)
        assert cfg.MODEL.LONG_TAIL.POLY.EPS == 1.0
        cfg.MODEL.LONG_TAIL.POLY.EPS = 0.25
        loss = build_loss(cfg)
        assert type(loss) is losses.Poly and loss.eps == 0.25 and losses.__file__.startswith({root!r})
"""


def run_pytest(folder, arguments, log):
    """pytest on a copy of the project, in a process that has imported the project itself."""
    with open(log, "w") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    for registry in [one for one in gc.get_objects() if isinstance(one, Registry)]:
        for name, entry in list(registry):
            if entry.__module__.partition(".")[0] == "lt_det":
                del registry._obj_map[name]
    for name in [name for name in sys.modules if name.partition(".")[0] == "lt_det"]:
        del sys.modules[name]
    sys.path.insert(0, folder)
    os.chdir(folder)
    sys.exit(pytest.main(arguments))


def test_example_of_a_loss(server, tmp_path):
    for name in ("lt_det", "configs", "tests/losses"):
        shutil.copytree(REPO / name, tmp_path / name)
    for name in ("pytest.ini", "tests/conftest.py"):
        shutil.copy(REPO / name, tmp_path / name)
    section = (REPO / "CONTRIBUTING.md").read_text().partition("## Add a loss")[2].partition("\n## ")[0]
    written = []
    for path, text in re.findall(r"```\w+\n# (\S+)\n(.*?)```", section, re.S):
        target = tmp_path / path
        assert len(text.splitlines()) < 60
        with target.open("a") as file:
            file.write(text)
        written.append(path)
    assert len(written) == 6 and "lt_det/losses/__init__.py" in written

    (tmp_path / "tests/losses/test_poly_recipes.py").write_text(CHECK.format(root=str(tmp_path)))
    arguments = ["-n", "0", "-rA", "tests/losses", "-k", "Poly or poly or file_of_its_name"]
    process = server.Process(target=run_pytest, args=(str(tmp_path), arguments, str(tmp_path / "log.txt")))
    process.start()
    process.join(600)
    said = (tmp_path / "log.txt").read_text()
    assert process.exitcode == 0, said[-6000:]
    assert "PASSED tests/losses/test_poly_recipes.py::test_poly_from_its_recipes" in said
    assert "PASSED tests/losses/test_poly.py::test_poly" in said
    # Its own tests, and those that every loss must pass.
    assert int(re.search(r"(\d+) passed", said)[1]) > 16


def test_lines_of_each_folder():
    """The table names every folder of the package, and no number is off by more than a tenth."""
    section = (REPO / "CONTRIBUTING.md").read_text().partition("Lines of Python and yaml")[2].partition("\n## ")[0]
    seen = set()
    for cell, number in re.findall(r"^\| (`.+?`) \|[^|]*\| ([\d,]+) \|", section, re.M):
        names = re.findall(r"`(.+?)`", cell)
        seen.update(names)
        files = [f for n in names for f in (REPO.glob(n) if n.endswith(".py") else (REPO / n).rglob("*"))]
        lines = sum(len(f.read_text().splitlines()) for f in files if f.suffix in (".py", ".yaml"))
        assert abs(lines - int(number.replace(",", ""))) <= lines / 10, f"{cell}: {lines:,} lines now"
    assert {f"lt_det/{path.parent.name}/" for path in (REPO / "lt_det").glob("*/__init__.py")} <= seen
