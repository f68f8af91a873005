import errno
import math
import os
import resource

import pytest

from lt_det.io import atomic_path, write_atomically, write_csv_atomically, write_json_atomically


def test_the_file_takes_its_place_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "folder" / "a.json"
    write_json_atomically(path, {"a": [1, None]}, indent=1)
    assert path.read_text() == '{\n "a": [\n  1,\n  null\n ]\n}\n'
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == ".json"
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text().startswith("{") and os.listdir(path.parent) == ["a.json"]
    write_atomically(path, lambda file: file.write(b"\r\n"), mode="wb")
    assert path.read_bytes() == b"\r\n"
    umask = os.umask(0o022)
    try:
        write_json_atomically(path, 1)
    finally:
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o644


def test_what_has_no_value_is_null_and_numbers_keep_their_digits(tmp_path):
    write_json_atomically(tmp_path / "a.json", {"AP": (math.nan, 0.1 + 0.2), "b": [{"c": math.nan}]})
    assert (tmp_path / "a.json").read_text() == '{"AP": [null, 0.30000000000000004], "b": [{"c": null}]}\n'
    write_csv_atomically(
        tmp_path / "a.csv", [{"name": "a, b", "AP": 0.1 + 0.2}, {"name": "c", "AP": ""}], ["name", "AP"]
    )
    assert (tmp_path / "a.csv").read_text() == 'name,AP\n"a, b",0.30000000000000004\nc,\n'


@pytest.fixture
def file_size_limit():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_takes_no_more(tmp_path, file_size_limit):
    """The kernel refuses a write in the middle, as on a full disk."""
    path = tmp_path / "big.json"
    path.write_text("old")
    with pytest.raises(OSError) as raised:
        write_json_atomically(path, list(range(10_000)))
    assert raised.value.errno == errno.EFBIG
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["big.json"]


def test_full_disk_names_file_and_remedy(tmp_path):
    def write(file):
        file.write("x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"a\.txt cannot be written: No space left on device; free space") as raised:
        write_atomically(tmp_path / "a.txt", write)
    assert raised.value.errno == errno.ENOSPC and not os.listdir(tmp_path)


def test_a_folder_that_cannot_be_made_or_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a.txt", tmp_path / "file" / "b" / "a.txt"):
        with pytest.raises(OSError, match=r"a\.txt cannot be written: .*; a file stands where a folder"):
            write_atomically(path, lambda file: None)
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match="a folder stands in its place"):
        write_atomically(tmp_path / "folder", lambda file: None)

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(args[0]))

    monkeypatch.setattr("builtins.open", refuse)  # the tests may run as root, whom no mode of a folder stops
    with pytest.raises(PermissionError, match=r"a\.txt cannot be written: Permission denied; choose a folder"):
        write_atomically(tmp_path / "a.txt", lambda file: None)


def test_errors_of_other_files_stay_theirs(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        write_atomically(tmp_path / "a.txt", lambda file: open("/nowhere/missing"))
