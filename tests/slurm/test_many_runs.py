"""What many runs cost: CPU time, and bytes on disk, with a Slurm that answers immediately."""

import json
import time

import pytest

from livt_scale.cli import status as screens
from tests.scripts import load_script
from tests.slurm.replayed_slurm import ReplayedSlurm
from tests.whole_runs import REPO

pytestmark = pytest.mark.slow

many_runs = load_script(REPO / "benchmarks" / "many_runs.py")


def test_an_array_of_100_takes_at_most_20_s_and_10_mb():
    figures = many_runs.array(100)
    assert figures["cpu_s"] < 20
    assert figures["bytes"] < 10e6
    assert figures["asked"] == 4  # not for each run


def test_a_chain_of_65_jobs_takes_at_most_5_s():
    assert many_runs.chain(65)["cpu_s"] < 5


def test_the_status_of_200_runs_takes_at_most_3_s(tmp_path, monkeypatch):
    ReplayedSlurm(tmp_path, monkeypatch)
    runs = many_runs.made_runs(tmp_path / "runs", 200)
    began = time.process_time()  # without the imports
    views = screens.AskedNowAndThen().look(runs, brief=True)
    text = screens._as_text(views, single=False, place=tmp_path)
    assert time.process_time() - began < 3
    assert len(text.splitlines()) == 200


def test_the_benchmark_writes_its_figures(tmp_path):
    assert many_runs.main(["--quick", "--json", str(tmp_path / "figures.json")]) == 0
    found = json.loads((tmp_path / "figures.json").read_text())
    assert {"wall_s", "cpu_s", "asked"} <= set(found["status of 3 runs"])
