"""Every command and code block of README.md, CONTRIBUTING.md and docs/, as a reader would run them.

Blocks run page by page, in their order, in one folder with a tiny data set, trainings for two iterations. A
block after ``<!-- needs: ... -->`` wants what a test has not (LVIS, GPUs, a network, ...): its commands are parsed, its
config files and keys checked, its code compiled.
"""

import io
import json
import re
import runpy
import shlex
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from lt_det.cli import main as lt_det_command

REPO = Path(__file__).resolve().parents[2]
PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").glob("*.md"))]
# What makes a training of any recipe a matter of seconds.
TINY = """
    MODEL.WEIGHTS "" MODEL.RESNETS.DEPTH 50 MODEL.RESNETS.STEM_OUT_CHANNELS 16 MODEL.RESNETS.RES2_OUT_CHANNELS 16
    MODEL.RESNETS.WIDTH_PER_GROUP 4 MODEL.RESNETS.NORM BN MODEL.BACKBONE.FREEZE_AT 0
    MODEL.ROI_HEADS.NUM_CLASSES 4 MODEL.FPN.OUT_CHANNELS 32 MODEL.ROI_BOX_HEAD.FC_DIM 32 MODEL.ROI_MASK_HEAD.CONV_DIM 32
    MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 16 MODEL.ROI_MASK_HEAD.NUM_CONV 1
    MODEL.RPN.PRE_NMS_TOPK_TRAIN 50 MODEL.RPN.PRE_NMS_TOPK_TEST 50 MODEL.RPN.POST_NMS_TOPK_TEST 10
    INPUT.MIN_SIZE_TRAIN (64,) INPUT.MAX_SIZE_TRAIN 128 INPUT.MIN_SIZE_TEST 64 DATALOADER.NUM_WORKERS 0
    SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 2 SOLVER.STEPS () DECOUPLE.MAX_ITER 1 DECOUPLE.STEPS ()
    TEST.DETECTIONS_PER_IMAGE 10 TEST.EVAL_PERIOD 2
"""


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str
    needs: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(path: Path) -> list[Block]:
    found = []
    pattern = r"(?:<!-- needs: (?P<needs>[^\n]*?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)```"
    content = path.read_text()
    for match in re.finditer(pattern, content, re.S):
        line = content.count("\n", 0, match.start("text"))
        name = path.relative_to(REPO).as_posix()
        found.append(Block(name, line, match["language"], match["text"], match["needs"] or ""))
    return found


def commands(text: str) -> list[list[str]]:
    joined = text.replace("\\\n", " ")
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def key_value_pairs(words: list[str]) -> list[str]:
    """The KEY VALUE pairs that end a command."""
    start = next((i for i, w in enumerate(words) if re.fullmatch(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)*", w)), len(words))
    return [w for w in words[start:] if not w.startswith("--")]


def merged(text: str):
    """A yaml block over the defaults."""
    from detectron2.config import CfgNode

    from lt_det.config import get_lt_det_cfg

    content = yaml.safe_load(text)
    content.pop("_BASE_", None)
    cfg = get_lt_det_cfg()
    cfg.merge_from_other_cfg(CfgNode(content))
    return cfg


def check_command(words: list[str], place: str) -> None:
    """That a command which cannot run here would be understood."""
    from lt_det import model_zoo
    from lt_det.cli import COMMANDS
    from lt_det.engine.setup import merged_config

    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (REPO / "Makefile").read_text(), re.M), place
        return
    if words[0] == "lt-det":
        assert words[1] in COMMANDS, place
    for word in words:
        if word.startswith(("tools/", "tests/")):
            assert (REPO / word.partition("::")[0]).exists(), f"{place}: {word}"
    if "--config-file" in words:
        name = words[words.index("--config-file") + 1]
        path = name if Path(name).is_file() else model_zoo.get_config_file(name)
        if path.endswith(".yaml"):
            merged_config(path, key_value_pairs(words))


def run_command(words: list[str], place: str) -> None:
    """Run a command in this process."""
    if "--config-file" in words:
        at = next((i for i, w in enumerate(words) if w.startswith("MODEL.WEIGHTS")), None)
        weights = words[at : at + 2] if at else []
        words = [*words, *shlex.split(TINY), *weights]
    out = io.StringIO()
    code = None
    try:
        with redirect_stdout(out), redirect_stderr(out):
            if words[0] == "lt-det":
                code = lt_det_command(words[1:])
            else:
                assert words[0] == "python", f"{place}: how is {words[0]} to be run?"
                sys.argv = [str(REPO / words[1]), *words[2:]]
                runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    assert code in (0, None), f"{place}: {shlex.join(words)}\n{out.getvalue()[-3000:]}"


@pytest.fixture
def reader(tiny_paths, tmp_path, monkeypatch):
    """The folder of a reader: a checkout, a COCO json of birds with images, and results of some model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    for name in ("configs", "tools"):
        (tmp_path / name).symlink_to(REPO / name)
    (tmp_path / "birds").mkdir()
    (tmp_path / "birds/images").symlink_to(tiny_paths["train"].image_root)
    content = json.loads(Path(tiny_paths["train"].json_file).read_text())
    for image in content["images"]:
        image.pop("neg_category_ids"), image.pop("not_exhaustive_category_ids")
    (tmp_path / "birds/coco.json").write_text(json.dumps(content))
    truth = json.loads(Path(tiny_paths["val"].json_file).read_text())
    (tmp_path / "val.json").write_text(json.dumps(truth))
    results = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.5}
        for a in truth["annotations"]
    ]
    (tmp_path / "results.json").write_text(json.dumps(results))
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_blocks(page, reader):
    names: dict = {}
    for block in blocks_of(page):
        assert block.language in ("bash", "python", "yaml", "text"), f"{block.place}: mark its language"
        if block.language == "yaml":
            merged(block.text)
            title = re.match(r"# (\w+\.yaml)\n", block.text)
            if title:
                (reader / title[1]).write_text(block.text)
        elif block.language == "python":
            code = compile(block.text, block.place, "exec")
            if not block.needs:
                exec(code, names)
        elif block.language == "bash":
            for words in commands(block.text):
                (check_command if block.needs else run_command)(words, block.place)


def test_every_page_is_in_the_navigation():
    text = (REPO / "mkdocs.yml").read_text()
    assert set(re.findall(r": (\S+\.md)$", text, re.M)) == {p.name for p in (REPO / "docs").glob("*.md")}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_pictures_are_there(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"
