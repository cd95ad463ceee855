"""What appears under its name is whole; a failure leaves what was there, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from livt_scale.util import atomic

HOSTILE = "a 'quoted\" name\nof two lines"


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / HOSTILE / "eval.json"
    atomic.write_atomic(path, b"first")
    atomic.write_atomic(path, b"second")
    assert path.read_bytes() == b"second"
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_bytes_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "eval.json"
    atomic.write_atomic(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_only_when_its_block_ends_well(tmp_path: Path) -> None:
    out = tmp_path / HOSTILE / "export"
    with atomic.new_folder(out) as temporary:
        (temporary / "a").write_bytes(b"1")
        assert not out.exists()
    with pytest.raises(ZeroDivisionError), atomic.new_folder(out) as temporary:  # noqa: PT012
        (temporary / "a").write_bytes(b"2")
        raise ZeroDivisionError
    assert (out / "a").read_bytes() == b"1"
    with atomic.new_folder(out) as temporary:
        (temporary / "b").write_bytes(b"3")
    assert [p.name for p in out.iterdir()] == ["b"]
    assert list(out.parent.iterdir()) == [out]


def test_what_is_written_can_be_read_by_the_group_if_the_umask_says_so(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    atomic.write_atomic(tmp_path / "whole", b"")
    assert (tmp_path / "whole").stat().st_mode == plain.stat().st_mode
    (tmp_path / "folder").mkdir()
    with atomic.new_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "folder").stat().st_mode
