"""Every key of add_lt_det_config is explained, and stands in the documents."""

from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config_keys(load_script):
    return load_script("tools/dev/config_keys.py")


def test_every_key_has_a_meaning(config_keys):
    assert not [key for key, text in config_keys.meanings().items() if len(text) < 8]


def test_every_key_is_in_the_documents(config_keys):
    text = "\n".join(path.read_text() for path in (REPO / "docs").glob("*.md"))
    keys = config_keys.added_keys()
    assert len(keys) > 100
    assert not [key for key in keys if f"`{key}`" not in text]


def test_comments(config_keys):
    source = """
    # One
    # comment.
    cfg.A = CN()
    cfg.A.B = 1
    # Another.
    cfg.A.C = 2

    cfg.D = 3
    x = lt.E = CN()
    """
    assert config_keys.comments(source) == {
        "A": "One comment.", "A.B": "One comment.", "A.C": "Another.", "D": "", "MODEL.LONG_TAIL.E": "",
    }  # fmt: skip
