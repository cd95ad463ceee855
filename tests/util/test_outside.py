"""Files from outside are regular files of a bounded size, and their text and JSON is bounded and whole."""

from __future__ import annotations

import json
import os
import re
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from livt_scale.util import outside
from livt_scale.util.outside import RefusedFile, open_checked, parse_json, read_checked, read_json, read_text
from livt_scale.util.text import escaped, first_line


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (make_pipe, "it is a named pipe"),
        (Path.mkdir, "it is a folder"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a device"),
        (lambda path: os.mknod(path, 0o140600), "No such device"),
        (
            lambda path: path.write_bytes(bytes(2**20 + 1)),
            r"more than a file of this kind \(recipe\) may have: 1,048,576",
        ),
    ],
    ids=["pipe", "folder", "device", "socket", "large"],
)
def test_what_is_not_a_file_of_a_bounded_size_is_refused_without_waiting(make, said, tmp_path):
    make(tmp_path / "x.yaml")
    with pytest.raises(OSError) as error:  # noqa: PT011  its strerror is compared
        read_checked(tmp_path / "x.yaml", "recipe")
    assert re.search(said, error.value.strerror)


def test_a_link_to_a_file_is_read_and_its_bound_is_exact(tmp_path):
    (tmp_path / "there").write_bytes(b"x" * 100)
    (tmp_path / "link").symlink_to("there")
    assert read_checked(tmp_path / "link", "recipe", max_bytes=100) == b"x" * 100
    with pytest.raises(RefusedFile, match="has 100 bytes"):
        read_checked(tmp_path / "link", "recipe", max_bytes=99)


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "log"
    path.write_bytes(b"x")
    monkeypatch.setattr(outside, "check_regular", lambda handle, path: 1)  # what it was a moment ago
    path.write_bytes(b"x" * 5000)
    with pytest.raises(RefusedFile, match="5,000 bytes"):
        read_checked(path, "recipe", max_bytes=100)


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_a_name_that_no_file_can_have_is_an_oserror(name):
    with pytest.raises(RefusedFile, match="cannot be the name of a file"):
        open_checked(Path(name), "recipe")


def test_descriptors_do_not_leak(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    before, threads = len(os.listdir("/proc/self/fd")), set(threading.enumerate())  # noqa: PTH208
    for _ in range(20):
        with pytest.raises(RefusedFile):
            read_checked(tmp_path / "pipe", "recipe")
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    assert set(threading.enumerate()) <= threads  # those of other tests may be there, and may end


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"[1,", "not JSON"),
        (b"\xff", "not text in UTF-8"),
        (b"\xed\xa0\x80", "not text in UTF-8"),
        (b'["\\ud800"]', "half a character"),
        (b"[" * 10**5 + b"]" * 10**5, "nested more than 64 deep"),
        (b"[" * 70 + b"]" * 70, "nested more than 64 deep"),
        (b"9" * 5000, "more than 64 bits"),
        (b'{"bytes": 9223372036854775808}', "more than 64 bits"),
        (b"[-9223372036854775809]", "more than 64 bits"),
        (b"[" + b"1," * 10**7 + b"1]", "more than 10,000,000 values"),
    ],
)
def test_json_is_bounded_and_errors_fit_on_one_line(raw, said):
    with pytest.raises(ValueError, match=said) as error:
        parse_json(raw)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 200


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(),
        lambda c: st.lists(c) | st.dictionaries(st.text(), c),
    )
)
def test_what_json_can_hold_is_read_as_it_is(value):
    text = json.dumps(value)
    assert parse_json(text.encode()) == value


def test_text_and_json_of_files(tmp_path):
    (tmp_path / "a").write_text('{"é": [1]}', encoding="utf-8")
    assert read_text(tmp_path / "a", "recipe") == '{"é": [1]}'
    assert read_json(tmp_path / "a", "record") == {"é": [1]}


# --- escaping ---


@given(st.text(alphabet=st.characters(exclude_categories=())))
def test_escaped_text_is_printable_can_be_encoded_and_stays_so(text):
    assert escaped(text).isprintable()
    assert escaped(escaped(text)) == escaped(text)
    escaped(text).encode()
    if text.isprintable():
        assert escaped(text) == text


def test_what_moves_the_cursor_or_reverses_text_is_escaped():
    assert escaped("a\x1b[2J\n\u202e\x9b\ud800é") == "a\\x1b[2J\\n\\u202e\\x9b\\ud800é"
    assert escaped("a\nb\x07", keep="\n") == "a\nb\\x07"
    assert escaped(Path("a b")) == "a b"


def test_a_librarys_error_is_one_short_line():
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"
    assert first_line(ValueError("\x1b" * 1000)).isprintable()
