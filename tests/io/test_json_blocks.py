"""Blocks of a json file, put together again, equal what the standard library reads."""

import gzip
import json
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lt_det.io.json_blocks import first_character, iter_json_blocks, iter_json_list

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


def rebuild(path, arrays, **options):
    members = {}
    for name, value in iter_json_blocks(str(path), dict.fromkeys(arrays, json.loads), **options):
        if name in arrays:
            members.setdefault(name, []).extend(value)
        else:
            members[name] = value
    return members


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(
    images=st.lists(VALUES | st.dictionaries(st.text(max_size=3), VALUES, max_size=3), max_size=8),
    others=st.dictionaries(st.text(max_size=4).filter(lambda name: name != "images"), VALUES, max_size=4),
    block=st.integers(1, 60),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
)
def test_blocks_equal_json_for_any_size(tmp_path, images, others, block, indent, ascii_only):
    content = {**others, "images": images, "last": 12}
    path = tmp_path / "any.json"
    try:
        path.write_text(json.dumps(content, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    except UnicodeEncodeError:  # lone surrogates cannot be written unescaped
        path.write_text(json.dumps(content), encoding="utf-8")
    read = []
    assert rebuild(path, ("images",), block_bytes=block, on_read=read.append) == content
    assert b"".join(read) == path.read_bytes()


def test_objects_come_in_blocks(tmp_path):
    path = tmp_path / "many.json"
    path.write_text(
        json.dumps({"images": [{"id": i, "more": [{"a": 1}, {"b": 2}]} for i in range(2000)], "x": "}], {"})
    )
    blocks = [
        b for name, b in iter_json_blocks(str(path), {"images": json.loads}, block_bytes=10_000) if name == "images"
    ]
    assert [image["id"] for block in blocks for image in block] == list(range(2000))
    assert 5 < len(blocks) < 40


@pytest.mark.parametrize(
    "text, complaint",
    [
        ('{"images": [{"id": 1}, {"id"', "cut off"),
        ('{"images": [1 2]}', r"expected ',' or '\]'"),
        ('{"images": 3}', r"expected '\['"),
        ('{"images": []', "it ends early"),
        ('{"images": [{"id": 1}], "info": {"a"', "cut off"),
        ("[1, 2]", "expected '{'"),
        ("", "it ends early"),
        ('{"images": [], 3: 4}', "a member name is missing"),
        ('{"images": ["\xff', "cut off"),
    ],
)
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_damaged_text(tmp_path, text, complaint, block):
    path = tmp_path / "damaged.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=complaint) as error:
        rebuild(path, ("images",), block_bytes=block)
    assert str(path) in str(error.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.lists(VALUES | st.dictionaries(st.text(max_size=3), VALUES, max_size=3), max_size=8), st.integers(1, 60))
def test_a_list_at_the_top(tmp_path, content, block):
    path = tmp_path / "list.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode() + b"\n")
    blocks = iter_json_list(str(path), json.loads, block_bytes=block)
    assert [value for b in blocks for value in b] == content
    assert first_character(str(path)) == "["


def test_gzip_and_what_is_left_of_it(tmp_path):
    path = tmp_path / "list.json.gz"
    content = [{"id": i} for i in range(20_000)]
    whole = gzip.compress(json.dumps(content).encode())
    path.write_bytes(whole)
    assert [v for b in iter_json_list(str(path), json.loads, block_bytes=5000) for v in b] == content
    for damaged in (whole[: len(whole) // 2], whole[:100] + b"xx" + whole[102:], whole[:3]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="cannot be read to its end|not a complete") as error:
            list(iter_json_list(str(path), json.loads, block_bytes=5000))
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_text_behind_a_list_and_nesting(tmp_path):
    path = tmp_path / "list.json"
    path.write_text("[1, 2] 3")
    with pytest.raises(ValueError, match="behind the end"):
        list(iter_json_list(str(path), json.loads))
    path.write_text("[" * 200_000)
    with pytest.raises(ValueError, match="nests too deeply|does not end"):
        list(iter_json_list(str(path), json.loads))


@pytest.mark.parametrize("num_threads", [1, 3])
def test_blocks_decoded_ahead_are_those_of_the_file_in_its_order(tmp_path, num_threads):
    """Also where a text looks like the space between two elements, and from there on."""
    elements = [{"id": i, "text": '}, {"id": 7}, {' * (i in (40, 41, 300))} for i in range(500)]
    path = tmp_path / "list.json"
    path.write_text(json.dumps(elements))
    threads = set()

    def decode(block):
        threads.add(threading.get_ident())
        return json.loads(block)

    for block_bytes in (64, 1000, 1 << 20):
        blocks = list(iter_json_list(str(path), decode, block_bytes=block_bytes, num_threads=num_threads))
        assert [e for block in blocks for e in block] == elements
    assert len(threads) > 1  # the threads, and this one from the first such text on


def test_a_file_cut_off_is_an_error_while_blocks_are_decoded_ahead(tmp_path):
    path = tmp_path / "list.json"
    path.write_text(json.dumps([{"id": i} for i in range(500)])[:-40])
    blocks = iter_json_list(str(path), json.loads, block_bytes=500, num_threads=2)
    with pytest.raises(ValueError, match="cut off"):
        list(blocks)
