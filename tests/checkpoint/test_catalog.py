from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from livt_scale.checkpoint import catalog
from livt_scale.checkpoint.catalog import clean_leftovers, list_checkpoints, verify
from livt_scale.checkpoint.load import Position, Retention, Saver, newest_whole


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """Two checkpoints, read only but for a test that puts back what it changed."""
    import torch

    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    with Saver(folder, mode="sync", retention=Retention(keep_last=9)) as saver:
        for step in (1, 2):
            saver.save({"model.w": torch.full((40,), float(step))}, position=Position(0, step), facts={"a": "ü"})
    return folder


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_names_its_file_and_the_one_before_is_taken(two_checkpoints, data):
    newest = two_checkpoints / "step-00000002"
    file = data.draw(st.sampled_from(sorted(newest.iterdir())))
    raw = file.read_bytes()
    place = data.draw(st.integers(0, len(raw) - 1))
    changed = bytearray(raw)
    changed[place] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(changed)
    try:
        assert any(line.startswith(file.name) for line in verify(newest))
        seen = []
        found = newest_whole(two_checkpoints, on_damage=lambda path, wrong: seen.append((path, wrong)))
        assert found == two_checkpoints / "step-00000001"
        assert [path for path, _ in seen] == [newest]
        assert any(file.name in line for line in seen[0][1])
    finally:
        file.write_bytes(raw)
    assert verify(newest) == []


def test_a_missing_cut_or_longer_file_is_named(save):
    path = save(1)
    data = path / "__0_0.distcp"
    raw = data.read_bytes()
    for other in (raw[:-1], raw + b"x", b""):
        data.write_bytes(other)
        assert verify(path) == [f"__0_0.distcp has {len(other)} bytes, not {len(raw)}"]
    data.unlink()
    assert verify(path) == ["__0_0.distcp is missing"]
    os.mkfifo(data)
    assert verify(path) == ["__0_0.distcp is not a file"]
    (path / "manifest.json").unlink()
    assert "manifest.json is missing" in verify(path)[0]
    assert "is not a folder" in verify(path / "absent")[0]


def test_a_stray_file_beside_does_not_hurt(save):
    path = save(1)
    (path / ".nfs0001").write_bytes(b"")
    assert verify(path) == []


def test_no_folder_and_no_checkpoint_are_the_same(tmp_path):
    assert newest_whole(tmp_path / "absent") is None
    assert list_checkpoints(tmp_path / "absent") == []
    (tmp_path / "step-00000001.txt").write_text("no checkpoint")
    (tmp_path / "step-00000001").write_text("a file of that name")
    assert newest_whole(tmp_path) is None


def test_all_damaged_leaves_none_and_names_each(save):
    paths = [save(step) for step in (1, 2, 3)]
    (paths[0] / ".metadata").write_bytes(b"x")
    (paths[1] / "manifest.json").unlink()
    (paths[2] / "__0_0.distcp").unlink()
    seen = []
    assert newest_whole(paths[0].parent, on_damage=lambda path, wrong: seen.append((path, wrong[0].split()[0]))) is None
    assert seen == [(paths[2], "__0_0.distcp"), (paths[1], "manifest.json"), (paths[0], ".metadata")]


def test_the_list_says_what_is_whole_best_and_final(save):
    for step, score in ((10, 0.1), (20, 0.9), (30, 0.9), (40, None)):
        save(step, score=score, final=step == 40)
    damaged = save(20).parent / "step-00000020"
    assert [i.best for i in list_checkpoints(damaged.parent)] == [False, False, True, False]  # 20 has lost its score
    (damaged / ".metadata").write_bytes(b"")
    infos = list_checkpoints(damaged.parent)
    assert [i.position.step for i in infos] == [10, 20, 30, 40]
    assert [i.whole for i in infos] == [True, False, True, True]
    assert ".metadata" in infos[1].why
    assert [i.final for i in infos] == [False, False, False, True]
    assert infos[0].bytes == sum(f.stat().st_size for f in infos[0].path.iterdir())


def test_leftovers_of_killed_saves_go_and_one_set_aside_comes_back(save):
    path = save(3)
    folder = path.parent
    for name in (".step-00000004.partial", ".step-00000002.pruned", ".step-00000003.replaced"):
        shutil.copytree(path, folder / name)
    other = folder / ".keep"
    other.mkdir()
    shutil.copytree(save(5), folder / ".step-00000005.replaced")
    shutil.rmtree(folder / "step-00000005")
    clean_leftovers(folder)
    assert sorted(p.name for p in folder.iterdir()) == [".keep", "step-00000003", "step-00000005"]
    assert newest_whole(folder) == folder / "step-00000005"
    assert clean_leftovers(folder) == []
    assert clean_leftovers(Path("/nonexistent")) == []


@pytest.mark.parametrize("removed_by", ["damages", "read_manifest", "_folder_bytes"])
def test_one_that_the_run_removes_while_it_is_read_is_left_out(two_checkpoints, tmp_path, monkeypatch, removed_by):
    folder = shutil.copytree(two_checkpoints, tmp_path / "copy")
    real = getattr(catalog, removed_by)

    def during(path, **named):
        found = real(path, **named)
        shutil.rmtree(folder / "step-00000001", ignore_errors=True)
        return found

    monkeypatch.setattr(catalog, removed_by, during)
    assert [(info.path.name, info.whole) for info in list_checkpoints(folder)] == [("step-00000002", True)]
