"""`livt doctor --bench`: what two real ranks measure, ranks that hang, die or fail, judgements of other clusters."""

from __future__ import annotations

import json
import os
import time

import pytest
from typer.testing import CliRunner

from livt_scale.cli import main
from livt_scale.config.load import load_recipe
from livt_scale.doctor import bench, disk
from livt_scale.plan.assumptions import accelerator
from livt_scale.util.errors import UsageError
from tests import warm
from tests.whole_runs import REPO, free_port


def ranks(folder, fault, *words) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of two ranks; of the first alone where the second hangs."""
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environ = {**os.environ, **place, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    started = [
        warm.Popen(
            [REPO / "tests/doctor/doctor_ranks.py", fault, "--dir", folder, *words],
            cwd=folder,
            env={**environ, "RANK": rank, "LOCAL_RANK": rank},
            stdout=warm.PIPE,
            stderr=warm.PIPE,
        )
        for rank in ("0", "1")
    ]
    said = []
    try:
        for process in started if fault != "hangs" else started[:1]:
            out, err = process.communicate(timeout=120)
            said.append((process.returncode, out, err))
    finally:
        for process in started:
            if process.returncode is None:
                process.kill()
                process.communicate()
    return said


def test_two_ranks_measure_and_the_first_one_tells(tmp_path):
    folder = tmp_path / "it's a\nfolder"
    folder.mkdir()
    device = tmp_path / "here.yaml"
    words = ("--seconds", "3", "--json", "--device-file", str(device))
    (code, out, err), (other_code, other_out, _) = ranks(folder, "nothing", *words)
    assert (code, other_code) == (0, 0), err
    assert other_out == ""
    report = json.loads(out)
    measured = report["bench"]
    assert [row["bytes"] for row in measured["all_reduce"]] == [4, 2**16, 2**20, 2**24]
    assert all(row["gb_s"] > 0 for row in measured["all_reduce"])
    assert [pair["ranks"] for pair in measured["pairs"]] == [[0, 1]]
    assert len(measured["compute_tflops"]) == 2
    (disks,) = measured["disks"].values()  # one node: measured once
    assert disks[0]["write_mb_s"] > 0
    assert list(folder.iterdir()) == []
    chip = accelerator(str(device)).chip("fp32", "likely")
    assert 1e-4 < chip.peak < 100  # TFLOP/s
    assert 1e8 < chip.bandwidth < 1e13
    assert 0 < chip.fused_attention < 10
    assert accelerator(str(device)).constants.missing == ()
    assert {"compute", "all-reduce", "links", "disk", "decode"} <= {check["name"] for check in report["checks"]}


def test_a_file_of_somebody_else_is_not_replaced_by_the_device(tmp_path):
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    words = ["doctor", "--bench", "--seconds", "3", "--device-file", str(tmp_path / "mine.yaml")]
    error = CliRunner().invoke(main.app, words).exception
    assert isinstance(error, UsageError)
    assert "mine.yaml is there already, and livt doctor did not write it" in error.message
    assert (tmp_path / "mine.yaml").read_text() == "name: mine\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--force"], "--force has no effect without --device-file"),
        (["--seconds", "5"], "--seconds has no effect without --bench"),
        (["--dir", "."], "--dir has no effect without --bench"),
        (["--node", "here", "--bench"], "--bench has no effect with --node"),
        (["--node", "here", "--json"], "--json has no effect with --node"),
    ],
)
def test_an_option_without_effect_is_refused(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = CliRunner().invoke(main.app, ["doctor", *words]).exception
    assert isinstance(error, UsageError)
    assert said in error.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("hangs", "a rank does not answer in 'pairs': "),
        ("dies", "a rank does not answer in 'all-reduce': "),
        ("fails", "no shards on this node"),
    ],
)
def test_a_rank_that_does_not_go_on_ends_it_with_its_name(tmp_path, fault, said):
    begun = time.monotonic()
    code, _, err = ranks(tmp_path, fault, "--seconds", "3")[0]
    assert code == 1, err
    assert said in err
    assert fault == "fails" or "1" in err.partition(said)[2].splitlines()[0]
    assert time.monotonic() - begun < 100
    assert list(tmp_path.iterdir()) == []


# --- judging ---

PAIRS = [{"ranks": [a, b], "latency_s": 1e-5, "gb_s": gb_s} for a, b, gb_s in ((0, 1, 20.0), (1, 2, 4.0), (2, 3, 9.0))]


def test_a_link_is_slow_beside_others_of_its_kind():
    told = bench.judge_pairs(PAIRS, ["a", "a", "b", "b"], on_gpu=False)
    assert [f.status for f in told] == ["note", "ok", "ok"]
    assert "rank 2 on b and rank 3 on b: 9.00 GB/s" in told[0].message
    told = bench.judge_pairs([{**PAIRS[1], "gb_s": 0.5}], ["a", "a", "b"], on_gpu=True)
    assert told[0].status == "note"  # alone of its kind, but too slow for any GPU


def test_a_node_is_slow_beside_others_or_by_itself():
    told = bench.judge_alike("compute", {"a": 10.0, "b": 10.0, "c": 6.0}, unit="TFLOP/s")
    assert [(f.status, f.message) for f in told] == [("note", "c: 6 TFLOP/s, the median is 10")]
    assert bench.judge_alike("decode", {"a": 90.0}, unit="images/s", slow=150)[0].status == "note"
    assert bench.judge_alike("compute", {"a": 10.0, "b": 9.0}, unit="TFLOP/s")[0].status == "ok"


def test_disks_are_judged_node_by_node():
    good = {"folder": "/x", "write_mb_s": 500.0, "read_mb_s": 900.0, "small_file_s": 0.01, "free_gib": 5.0}
    nodes = {"a": good, "b": {**good, "write_mb_s": 200.0}, "c": good, "d": {**good, "small_file_s": 0.3}}
    nodes["e"] = {"folder": "/x", "error": "Read-only file system"}
    told = bench.judge_disk_speed("/x", nodes)
    assert [(f.status, f.message.split(":")[0]) for f in told] == [
        ("problem", "/x on e"),
        ("ok", "/x on a"),
        ("note", "/x on b"),
        ("ok", "/x on c"),
        ("note", "/x on d"),
    ]
    assert "the median of the nodes is 500 MB/s" in told[2].message


# --- disks ---


def test_a_disk_is_measured_within_its_time_and_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "MAX_BYTES", 2**22)
    facts = disk.measure(tmp_path, seconds=40)
    assert facts["bytes"] == 2**22
    assert min(facts[name] for name in ("write_mb_s", "read_mb_s", "small_file_s", "free_gib")) > 0
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(disk, "MAX_BYTES", 2**50)
    begun = time.monotonic()
    disk.measure(tmp_path, seconds=0.4)
    assert time.monotonic() - begun < 20  # a sync under way is waited for
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_gives_back_other_bytes_is_told(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(bytes(disk.BLOCK) * 2)
    with pytest.raises(OSError, match="is not what was written"):
        disk._read_mb_s(path, seconds=5)


def test_a_disk_without_room_is_not_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "LEAVE_FREE", 2**70)
    with pytest.raises(OSError, match="too few"):
        disk.measure(tmp_path, seconds=1)
    assert bench._disks([tmp_path], 1.0)[0]["error"]


def test_the_folders_are_those_of_the_recipe_as_far_as_they_are_there(tmp_path, monkeypatch):
    monkeypatch.setenv("LIVT_CACHE_DIR", str(tmp_path / "cache" / "deep"))
    recipe = load_recipe(REPO / "recipes/fashion_mnist_lt/quickstart.yaml", sets=[f"run_dir={tmp_path}/runs/x"])
    assert bench.folders_to_measure([], recipe) == [tmp_path]
    (tmp_path / "at home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "at home"))
    recipe = load_recipe(REPO / "recipes/fashion_mnist_lt/quickstart.yaml", sets=["data.cache.dir=~/c"])
    assert tmp_path / "at home" in bench.folders_to_measure([], recipe)
    with pytest.raises(UsageError, match="is no folder"):
        bench.folders_to_measure([tmp_path / "none"], None)
