"""What many runs cost: CPU time of this process and bytes on disk, with a fake Slurm."""

import time
from pathlib import Path

import pytest

from livt_scale.cli import status as screens
from livt_scale.config.load import load_recipe, to_yaml
from livt_scale.slurm import array, submit
from tests.slurm.fake_slurm import FakeSlurm
from tests.slurm.made_runs import MadeRun
from tests.slurm.replayed_slurm import ReplayedSlurm

pytestmark = pytest.mark.slow

QUICKSTART = Path(__file__).resolve().parents[2] / "recipes" / "fashion_mnist_lt" / "quickstart.yaml"
KNOWN = ("slurm.step_s=1", "slurm.save_s=1")


@pytest.fixture
def fake(tmp_path, monkeypatch):
    fake = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", fake.path)
    monkeypatch.chdir(tmp_path)
    return fake


def test_an_array_of_100_takes_at_most_20_s_and_10_mb(tmp_path, fake):
    began = time.process_time()
    sets = [(f"run_dir={tmp_path}/runs/{k}", f"name=r{k}", f"seed={k}", *KNOWN) for k in range(100)]
    told = array.submit_array(array.prepare_array([load_recipe(QUICKSTART, sets=each) for each in sets]))
    assert time.process_time() - began < 20
    assert len(told["runs"]) == 100
    assert sum(path.stat().st_size for path in (tmp_path / "runs").rglob("*")) < 10e6
    assert len(fake.calls("squeue")) == 0
    assert len(fake.calls("scontrol")) == 2  # not for each run


def test_a_chain_of_65_jobs_takes_at_most_5_s(tmp_path, fake):
    began = time.process_time()
    segments = ("slurm.mode=segments", "slurm.pretrain.segments=31", "slurm.finetune.segments=32")
    prepared = submit.prepare(load_recipe(QUICKSTART, sets=[f"run_dir={tmp_path}/run", *KNOWN, *segments]))
    assert len(submit.submit(prepared)["jobs"]) == 65
    assert time.process_time() - began < 5


def test_the_status_of_200_runs_takes_at_most_3_s(tmp_path, monkeypatch):
    ReplayedSlurm(tmp_path, monkeypatch)
    runs = [MadeRun(tmp_path / "runs" / f"{k:03}") for k in range(200)]
    recipe = to_yaml(load_recipe(QUICKSTART))
    for run in runs:
        (run.dir / "recipe.yaml").write_text(recipe)
        run.status("running", step=120, total_steps=10_000)
        run.beat(0)
        run.metrics(*[2.0] * 5000)  # 800 kB
        run.chain(("14", "pretrain"), ("15", "finetune"))
    began = time.process_time()
    views = screens._AskedNowAndThen().look([run.dir for run in runs], brief=True)
    text = screens._as_text(views, single=False, place=tmp_path)
    assert time.process_time() - began < 3
    assert len(text.splitlines()) == 200
