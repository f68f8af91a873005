"""Generated pages agree with code and json files; facts that stand twice agree."""

import json
import re
from pathlib import Path

import pytest
import yaml

import lt_det
from lt_det.losses import LOSS_REGISTRY
from lt_det.modeling import CALIBRATOR_REGISTRY

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def generator(load_script):
    return load_script("tools/dev/generate_docs.py")


def test_pages_are_up_to_date(generator):
    old = [name for name, text in generator.pages().items() if (REPO / name).read_text() != text]
    assert not old, f"python tools/dev/generate_docs.py writes {old} anew"


def test_every_method_is_on_the_page(generator):
    text = (REPO / "docs/methods.md").read_text()
    for registry in (LOSS_REGISTRY, CALIBRATOR_REGISTRY):
        assert not [name for name, _ in registry if f"\n## {name}\n" not in text]
    named = {recipe for entry in generator.facts() for recipe in entry["recipes"]}
    assert not named - {path.stem.removeprefix("lvis_") for path in (REPO / "configs").glob("lvis_*.yaml")}


def test_options_have_a_meaning(generator):
    """Each key in a method's table is explained by the docstring of its class."""
    for line in (REPO / "docs/methods.md").read_text().splitlines():
        match = re.match(r"\| `(MODEL\.LONG_TAIL\.\S+)` +\| `.*?` +\| *(.*?) *\|$", line)
        assert not match or match[2], f"{match[1]} is not explained under Args: of its class"


def test_cells_come_from_the_json(generator, tmp_path, monkeypatch):
    rows = [
        {"method": "softmax + RFS", "seeds": [1, 2], "seconds": 60.0},
        {"method": "Seesaw", "seeds": [2, 1], "seconds": 90.0},
    ]
    metrics = ("AP", "APr", "APc", "APf", "AP-fixed", "AP-pool")
    for k, row in enumerate(rows):
        row["segm"] = row["bbox"] = {m: [10.0 * k + i, 10.0 * k + i + 2] for i, m in enumerate(metrics)}
    (tmp_path / "docs/results").mkdir(parents=True)
    (tmp_path / "docs/results/methods.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(generator, "ROOT", tmp_path)
    text = generator.methods_section()
    (seesaw,) = [line for line in text.splitlines() if line.startswith("| Seesaw")]
    cells = [c.strip() for c in seesaw.split("|")[1:-1]]
    assert cells[:3] == ["Seesaw", "2", "11.0 ± 1.4"]  # of 10 and 12
    assert "+10.0 ± 2.8" in cells  # of 12 - 0 and 10 - 2: seed 1 with seed 1
    generator.plot(tmp_path / "methods.png")
    assert (tmp_path / "methods.png").stat().st_size > 5000


NUMBERS = {
    "methods": [
        {"method": "a: b, c", "seeds": [1, 2, 3], "segm": {"AP": [1.0, 2.0, 3.0], "AP-fixed": [None, 5.0, None]}},
        {"method": "d", "seeds": [2, 1], "segm": {"AP": [1.0, 4.0], "AP-fixed": [None, None]}},
    ],
    "tried": [{"method": "e + f", "seeds": [1], "segm": {"AP": [0.96]}}],
}


@pytest.mark.parametrize(
    ("marker", "text"),
    [
        ("AP: a: b, c", "2.0"),
        ("AP ±: a: b, c", "2.0 ± 1.0"),
        ("AP ±: a: b, c; seeds 1 2", "1.5 ± 0.7"),
        ("AP-fixed ±: a: b, c", "5.0"),
        ("AP ±: a: b, c minus d", "-1.0 ± 2.8"),  # 1 - 4 and 2 - 1: by seed, not by place
        ("AP ±: a: b, c below d", "1.0 ± 2.8"),
        ("AP: a: b, c above d; seeds 2", "1.0"),
        ("AP: a: b, c\n above tried/e + f; seeds\n1", None),  # 0.04 is no difference
        ("AP: a: b, c minus tried/e + f", "+0.0"),
        ("AP: a: b, c above d", None),
        ("AP-fixed: d", None),
        ("AP: g", None),
    ],
)
def test_numbers_of_sentences(generator, marker, text):
    """Means and paired differences worked by hand; a sentence that no longer holds is refused."""
    sentence = f"It is {{{{ {marker} }}}} ahead."
    if text is None:
        with pytest.raises(ValueError, match=r"does not hold|no seed has|has no row"):
            generator.with_numbers(sentence, NUMBERS.get)
    else:
        assert generator.with_numbers(sentence, NUMBERS.get) == f"It is {text} ahead."


def test_markers_that_are_not_known_are_refused(generator, monkeypatch):
    """Not printed as they stand; one that is broken over lines is none the less one."""
    monkeypatch.setattr(generator, "config_page", lambda: "ahead by {{ APx: Seesaw\nabove GML }}")
    with pytest.raises(ValueError, match=r"docs/config.md: '\{\{ APx: Seesaw' is no marker"):
        generator.pages()


def test_filled_paragraphs_keep_their_items(generator, monkeypatch):
    """Lines are wrapped anew, items of a list stay apart, and no line begins with a number that would start one."""
    monkeypatch.setattr(generator, "method_rows", NUMBERS.get)
    block = "- {{ AP: d }} is\n  the first\n- the second" + " word" * 20 + " of seed 1. And {{ AP: d }}"
    lines = generator.numbered(block).splitlines()
    assert lines[0] == "- 2.5 is the first" and lines[1].startswith("- the second word")
    assert all(len(line) <= 120 for line in lines) and lines[2].startswith("  seed 1. And 2.5")


def test_version_stands_in_one_place():
    version, date = re.search(r"^## (\d+\.\d+\.\d+) \((.+)\)$", (REPO / "CHANGELOG.md").read_text(), re.M).groups()
    assert version == lt_det.__version__
    citation = yaml.safe_load((REPO / "CITATION.cff").read_text())
    assert (citation["version"], str(citation["date-released"])) == (version, date)
    assert '__version__ = "' in (REPO / "setup.py").read_text()  # read from the package


def test_readme_is_short_and_its_table_measured():
    text = (REPO / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    demo = json.loads((REPO / "docs/results/tables/demo.json").read_text())
    for row in demo["rows"]:
        assert re.search(r"\| *" + r" *\| *".join(map(re.escape, row)) + r" *\|", text), row


def test_site_builds(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    config = load_config(str(REPO / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True)
    build(config)
    api = (tmp_path / "site/api/index.html").read_text()
    assert "lt_det.losses.functional.balanced_softmax_loss" in api and "LongTailLVISEvaluator" in api
    assert "arithmatex" in (tmp_path / "site/methods/index.html").read_text()
