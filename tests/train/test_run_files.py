"""Files of a run are read while they are written, after kills and when damaged."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from livt_scale.train import run_files
from livt_scale.train.run_files import (
    METRICS,
    append_line,
    drop_lines_after,
    read_eval,
    read_evaluations,
    read_metrics,
    read_status,
    read_status_file,
)
from livt_scale.util import outside
from livt_scale.util.errors import RunError
from tests.train.disks import full_disk

LINES = [{"step": s, "epoch": s / 10, "loss": 1.0, "step_s": 0.5, "world_size": 2} for s in (10, 20, 30)]


def lines_file(folder, entries=LINES):
    path = folder / METRICS
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


@given(cut=st.integers(0, 10**6))
def test_a_file_cut_at_any_byte_has_the_lines_before_the_cut_and_no_damage(tmp_path_factory, cut):
    path = lines_file(tmp_path_factory.mktemp("run"))
    raw = path.read_bytes()
    cut %= len(raw) + 1
    path.write_bytes(raw[:cut])
    complete = sum(raw[:end].endswith(b"}") for end in range(1, cut + 1))
    found = read_metrics(path)
    assert [line.step for line in found.lines] == [10, 20, 30][:complete]
    assert found.damaged == 0


def test_the_end_of_a_file_starts_with_a_complete_line(tmp_path, monkeypatch):
    path = lines_file(tmp_path)
    monkeypatch.setattr(run_files, "TAIL_BYTES", len(path.read_bytes()) * 2 // 3 + 3)
    found = read_metrics(path, tail=True)
    assert [line.step for line in found.lines] == [20, 30]
    assert found.damaged == 0


@pytest.mark.parametrize("damage", ["{", "[1]", "null", "{}", '{"step": "x"}', '{"step": NaN}', "[" * 5000, "\0",
                                    '{"step": 1, "loss": 1' + "0" * 400 + "}"])  # fmt: skip
def test_a_damaged_line_is_counted_or_an_error_that_names_it(tmp_path, damage):
    path = lines_file(tmp_path)
    first, *others = path.read_text().splitlines(keepends=True)
    path.write_text("".join([first, damage + "\n", *others]))
    assert (len(read_metrics(path).lines), read_metrics(path).damaged) == (3, 1)
    with pytest.raises(RunError) as error:
        read_metrics(path, strict=True)
    assert f"{path}, line 2 " in error.value.message


@pytest.mark.parametrize("value", [None, "x", [], {}, True, float("nan"), 1e400])
def test_a_field_of_the_wrong_kind_is_missing(tmp_path, value):
    (line,) = read_metrics(lines_file(tmp_path, [LINES[0] | {"loss": value, "world_size": value}])).lines
    assert (line.step, line.loss, line.world_size) == (10, None, None)
    (tmp_path / "status.json").write_text(json.dumps({"state": "done", "step": value, "history": value, "why": 3}))
    status = read_status_file(tmp_path / "status.json")
    assert status == ({"state": "done"} if value != [] else {"state": "done", "history": []})


def test_what_is_not_there_is_no_error_unless_it_is_needed(tmp_path):
    assert read_status(tmp_path, "pretrain") is None
    assert read_metrics(tmp_path / METRICS).lines == []
    assert read_evaluations(tmp_path / "evaluations.jsonl") == []
    with pytest.raises(RunError):
        read_metrics(tmp_path / METRICS, strict=True)
    with pytest.raises(RunError):
        read_eval(tmp_path / "eval.json")


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 5000, b"{}", b'{"state": 3}'])
def test_a_damaged_status_is_an_error_that_names_the_file(tmp_path, raw):
    (tmp_path / "status.json").write_bytes(raw)
    with pytest.raises(RunError) as error:
        read_status_file(tmp_path / "status.json")
    assert str(tmp_path / "status.json") in error.value.message


def test_files_beyond_their_bounds_are_errors(tmp_path, monkeypatch):
    for name in ("MAX_LINES_BYTES", "MAX_STATUS_BYTES", "MAX_EVAL_BYTES"):
        monkeypatch.setattr(run_files, name, 10)
    for name, read in (
        (METRICS, read_metrics),
        ("evaluations.jsonl", read_evaluations),
        ("status.json", read_status_file),
        ("eval.json", read_eval),
    ):
        (tmp_path / name).write_text('{"state": "done"}')
        with pytest.raises(RunError):
            read(tmp_path / name)


@pytest.mark.parametrize(("step", "kept"), [(0, []), (10, [10]), (25, [10, 20]), (99, [10, 20])])
def test_lines_after_a_checkpoint_are_dropped(tmp_path, step, kept):
    path = lines_file(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])  # the last line is incomplete
    drop_lines_after(path, step)
    assert [line.step for line in read_metrics(path).lines] == kept
    assert path.read_bytes().endswith(b"\n") or not kept


def test_a_damaged_line_costs_none_of_the_lines_behind_it_where_lines_are_dropped(tmp_path):
    path = tmp_path / METRICS
    path.write_text('{"step": 1}\n{"step": 2, "ep{"step": 3}\n{"step": 4}\n{"step": 5}\n')
    drop_lines_after(path, 4)
    found = read_metrics(path)
    assert ([line.step for line in found.lines], found.damaged) == ([1, 4], 1)


def test_lines_are_dropped_whatever_the_size_of_the_file_and_on_a_full_disk(tmp_path, monkeypatch):
    path = lines_file(tmp_path)
    monkeypatch.setitem(outside.MAX_BYTES, "lines", 10)
    with full_disk():
        drop_lines_after(path, 10)
    assert [line.step for line in read_metrics(path).lines] == [10]


def test_a_line_that_does_not_fit_on_the_disk_leaves_no_half_of_it(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    line = {"epoch": 0.5, "top1_all": 0.25}
    append_line(path, {"step": 1, **line})
    with full_disk(room=path.stat().st_size + 9), pytest.raises(OSError, match="too large"):
        append_line(path, {"step": 2, **line})
    append_line(path, {"step": 3, **line})
    assert [found.step for found in read_evaluations(path)] == [1, 3]


def test_reading_needs_no_torch():
    code = "import sys, livt_scale.train.run_files; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_file_with_no_complete_line_is_an_error_where_its_lines_are_needed(tmp_path):
    path = tmp_path / METRICS
    path.write_text("{")
    assert read_metrics(path).lines == []
    with pytest.raises(RunError) as error:
        read_metrics(path, strict=True)
    assert f"{path}, line 1 " in error.value.message


@pytest.mark.parametrize("end", ["", '{"step": 9, "lo'])
@pytest.mark.parametrize("last", [1, 2, 3, 50])
def test_the_last_lines_are_read_whatever_follows_them(tmp_path, last, end):
    path = lines_file(tmp_path)
    path.write_text(path.read_text() + end)
    whole = read_metrics(path)
    found = read_metrics(path, tail=True, last=last)
    assert found.lines == whole.lines[-last:]
    assert found.damaged == 0
