"""The wheel, in an environment that has Detectron2 and what it needs, and nothing of this checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import lt_det

IN_THE_ENVIRONMENT = """
import sys
from pathlib import Path

import detectron2, lt_det
from lt_det import model_zoo
from lt_det.cli import main

assert lt_det.__file__.startswith(sys.prefix), lt_det.__file__
assert not detectron2.__file__.startswith(sys.prefix)
cfg = model_zoo.get_config("lvis_balms")
assert (cfg.META.NAME, cfg.MODEL.ROI_HEADS.NUM_CLASSES) == ("MetaReweighter", 1203)
assert model_zoo.get_config_file("lvis_balms").startswith(sys.prefix)

truth, images, *options = sys.argv[1:]
Path("mine.yaml").write_text("_BASE_: glyph_softmax\\nSOLVER:\\n  MAX_ITER: 1\\n")
config = ["--config-file", "mine.yaml"]
results = "out/inference/lvis_instances_results.json"
trained = [*options, "MODEL.WEIGHTS", "out/model_final.pth"]
for words in (
    ["doctor", *config, *options],
    ["train", *config, *options, "OUTPUT_DIR", "out", "TEST.REPORT", "True", "SOLVER.MAX_ITER", "1"],
    ["eval", *config, *trained, "OUTPUT_DIR", "again"],
    ["eval", "--annotations", truth, "--results", results, "--output-dir", "by_file"],
    ["compare", "out", "again", "--annotations", truth, "--replicates", "5"],
    ["report", "out", "again", "--annotations", truth, "--output", "two.html", "--replicates", "5"],
    ["predict", images, *config, "--output", "predictions", *trained],
    ["convert", "split", truth, "--train", "train.json", "--val", "val.json"],
    ["inspect", "--annotations", "train.json", "--output", "inspect.html"],
):
    assert main(words) == 0, words
"""
WRITTEN = """
    out/model_final.pth out/inference/metrics.json out/inference/report.html again/inference/metrics.json
    by_file/per_category.csv two.html two_thresholds.csv predictions/predictions.json val.json inspect.html
"""


@pytest.fixture(scope="module")
def checkout(repo_dir, tmp_path_factory) -> Path:
    """What the builds read, without what earlier builds and installations left in the checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("lt_det", "configs"):
        shutil.copytree(repo_dir / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(repo_dir / name, copy)
    (copy / "tests").mkdir()  # what setuptools would take unasked
    shutil.copy(repo_dir / "tests/test_progress.py", copy / "tests")
    return copy


@pytest.fixture(scope="module")
def built(checkout) -> tuple[Path, Path]:
    """sdist, and the wheel that is made of it."""
    pytest.importorskip("build")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(checkout / "dist"), str(checkout)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-4000:]
    # Deprecations of setuptools are framed by rows of asterisks. (Byte-compiling may be off by environment variable.)
    assert "*****" not in log and "Deprecat" not in log, log
    (sdist,) = (checkout / "dist").glob("*.tar.gz")
    (wheel,) = (checkout / "dist").glob("*.whl")
    return sdist, wheel


def test_contents(built, repo_dir):
    sdist, wheel = built
    assert sdist.name == f"lt_det-{lt_det.__version__}.tar.gz" and f"-{lt_det.__version__}-" in wheel.name
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    recipes = [
        p.relative_to(repo_dir).as_posix() for ext in ("yaml", "py") for p in repo_dir.glob(f"configs/**/*.{ext}")
    ]
    assert len(recipes) > 40
    assert not {f"lt_det/model_zoo/{name}" for name in recipes} - names
    # Sources, and what lies beside them: the templates of the pages.
    sources = {p.relative_to(repo_dir).as_posix() for p in (repo_dir / "lt_det").rglob("*") if p.is_file()}
    sources = {name for name in sources if "__pycache__" not in name}
    assert "lt_det/report/templates/page.js" in sources and not sources - names
    assert not [n for n in names if n.startswith(("tests", "tools", "configs"))]
    with tarfile.open(sdist) as file:
        packed = {name.partition("/")[2] for name in file.getnames()}
    assert {"configs/lvis_balms.yaml", "CHANGELOG.md", "CITATION.cff", *sources} <= packed
    assert not [name for name in packed if name.startswith("tests")]


def keep_compiled(checkout: Path, installed: Path) -> None:
    """Give numba what it has compiled of the checkout's kernels, for which it would take most of the test's time."""
    for compiled in checkout.rglob("*.nb[ic]"):
        folder = installed / compiled.parent.relative_to(checkout)
        folder.mkdir(exist_ok=True)
        shutil.copy(compiled, folder)
        source = f"{compiled.name.partition('.')[0]}.py"
        # numba takes a file for the same by its time and size.
        shutil.copystat(compiled.parent.parent / source, folder.parent / source)


def test_bare_environment(built, tool_options, tiny_paths, tmp_path):
    uv = Path(sys.executable).parent / "uv"
    if not uv.exists():
        pytest.skip("uv, by which the Makefile installs, is not beside this Python")
    env = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(env)], check=True)
    # The packages of this environment, by a path: .pth files there, as of an editable lt_det, are not followed.
    site = env / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (site / "stock.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [str(uv), "pip", "install", "--quiet", "--offline", "--no-deps", "--python", str(env / "bin/python")]
    install += ["--link-mode", "copy"]  # files here are touched below, and those of uv's cache are not to be
    subprocess.run([*install, str(built[1])], check=True)

    keep_compiled(Path(lt_det.__file__).parent, site / "lt_det")
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(*command):
        done = subprocess.run(
            list(map(str, command)), cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr

    text = run(env / "bin/lt-det", "--help")
    assert all(f"  {name} " in text for name in ("train", "eval", "compare", "report", "predict", "inspect", "doctor"))
    assert run(env / "bin/lt-det", "--version").strip() == f"lt_det {lt_det.__version__}"
    truth = tiny_paths["val"]
    run(env / "bin/python", "-c", IN_THE_ENVIRONMENT, truth.json_file, truth.image_root, *tool_options)
    assert not [name for name in WRITTEN.split() if not (tmp_path / name).is_file()]
