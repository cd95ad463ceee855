"""Many runs by one command: an array a stage. Slurm is the fake one of `fake_slurm`; bash really runs the scripts."""

import json
from pathlib import Path

import pytest

from livt_scale.config.recipe import Recipe
from livt_scale.slurm.array import array_scripts, prepare_array, submit_array
from livt_scale.slurm.commands import look
from livt_scale.slurm.records import read_chain
from livt_scale.util.errors import ClusterError, UsageError
from tests.slurm.fake_slurm import FakeSlurm
from tests.slurm.test_script_text import HOSTILE, run_script, write_recipe


@pytest.fixture
def fake(tmp_path, monkeypatch):
    fake = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", fake.path)
    monkeypatch.chdir(tmp_path)
    return fake


def recipe(tmp_path, name, *, slurm=None, **parts):
    tree = {
        "name": name,
        "run_dir": str(tmp_path / "runs" / name),
        "data": {"train": "/no/set/train", "val": "/no/set/val"},
        "stages": {"pretrain": {"epochs": 80}, "finetune": {"epochs": 50}},
        "slurm": {"step_s": 1.0, "save_s": 2.0} | (slurm or {}),
    }
    return Recipe.model_validate(tree | parts)


def three(tmp_path, **parts):
    return [recipe(tmp_path, name, **parts) for name in ("a", "b's $(x)", "c")]


def submit(recipes, **given):
    return submit_array(prepare_array(recipes, **given))


def test_one_array_a_stage_each_element_after_its_own_and_a_bounded_number_at_once(tmp_path, fake):
    told = submit(three(tmp_path), max_parallel=2)
    calls = fake.calls("sbatch")
    after = [next((w for w in call if w.startswith("--dependency")), None) for call in calls]
    assert after == [None, "--dependency=aftercorr:101", "--dependency=aftercorr:102"]
    assert all("#SBATCH --array=0-2%2" in Path(call[-1]).read_text() for call in calls)
    assert told["runs"] == [r.run_dir for r in three(tmp_path)]
    for k, of in enumerate(three(tmp_path)):
        chain = read_chain(Path(of.run_dir))
        assert [job["id"] for job in chain["jobs"]] == [f"{n}_{k}" for n in (101, 102, 103)]
        assert chain["jobs"][1]["dependency"] == f"aftercorr:101_{k}"
        assert (Path(of.run_dir) / "slurm" / "submitted.yaml").is_file()
        assert chain["code"]["folder"] == str(next((tmp_path / "runs" / "code").iterdir()))  # one for all
        assert Path(chain["jobs"][0]["log"]).parent == Path(told["folder"]) / "slurm" / "logs"


def test_what_runs_of_two_disks_have_in_common_is_beside_the_first_one(tmp_path, fake):
    runs = [
        recipe(tmp_path, name, run_dir=str(tmp_path / disk / "runs" / name)) for disk, name in (("1", "a"), ("2", "b"))
    ]
    before = {path.name for path in tmp_path.iterdir()}
    told = submit(runs)
    assert Path(told["folder"]).parent == tmp_path / "1" / "runs"
    assert {path.name for path in tmp_path.iterdir()} - before == {"1", "2"}


def test_where_jobs_are_cancelled_each_segment_is_an_array_that_waits_for_all_of_the_one_before(tmp_path, fake):
    recipes = three(tmp_path, slurm={"partition": "scrap", "finetune": {"segments": 1}})
    told = submit(recipes)
    assert told["mode"] == "segments"
    names = ["pretrain-1", "pretrain-2", "finetune", "evaluate-1", "evaluate-2"]
    assert [job["name"] for job in told["jobs"]] == names
    calls = fake.calls("sbatch")
    after = [next((w.partition("=")[2] for w in call if w.startswith("--dependency")), None) for call in calls]
    both = "aftercorr:103,afterany:104"
    assert after == [None, "afterany:101", "aftercorr:102", "aftercorr:103", both]
    assert all("#SBATCH --no-requeue" in Path(call[-1]).read_text() for call in calls)
    chain = read_chain(Path(recipes[1].run_dir))
    assert [(job["segment"], job["segments"], job["id"]) for job in chain["jobs"]] == [
        (1, 2, "101_1"), (2, 2, "102_1"), (1, 1, "103_1"), (1, 2, "104_1"), (2, 2, "105_1"),
    ]  # fmt: skip
    assert [job["dependency"] for job in chain["jobs"]][1:] == [
        "afterany:101", "aftercorr:102_1", "aftercorr:103_1", "aftercorr:103_1,afterany:104",
    ]  # fmt: skip


@pytest.mark.parametrize("element", [2, *(pytest.param(k, marks=pytest.mark.slow) for k in (0, 1))])
def test_an_element_trains_its_own_recipe_into_its_own_folder(tmp_path, fake, element):
    names = ["plain", HOSTILE[2].replace("/", "_"), HOSTILE[4].replace("/", "_")]
    recipes = [recipe(tmp_path, name, slurm={"code": "checkout", "check_nodes": "no"}) for name in names]
    for each in recipes:
        write_recipe(each, Path(each.run_dir) / "slurm" / "submitted.yaml")
    (pretrain, *_) = array_scripts(prepare_array(recipes), None)
    done, calls = run_script(tmp_path, pretrain, environ={"SLURM_ARRAY_TASK_ID": str(element)})
    assert done.returncode == 0, done.stderr
    (call,) = calls
    run = tmp_path / "runs" / names[element]
    assert call["words"][-3:] == [str(run / "slurm" / "submitted.yaml"), "--stage", "pretrain"]
    assert (run / "slurm" / "starts-pretrain.json").is_file()
    assert not list(tmp_path.rglob("pwned"))


def test_outside_an_array_its_script_refuses_to_run(tmp_path, fake):
    (pretrain, *_) = array_scripts(prepare_array(three(tmp_path)), None)
    done, calls = run_script(tmp_path, pretrain)
    assert done.returncode != 0
    assert not calls


def test_the_same_again_joins_and_a_part_of_it_is_refused(tmp_path, fake):
    first = submit(three(tmp_path))
    fake.set(queue=[[f"{job}_{k}", "PENDING", first["chain"]] for job in (101, 102, 103) for k in range(3)])
    assert len(submit(three(tmp_path))["joined"]) == 9
    with pytest.raises(ClusterError, match=r"jobs of 3 of these 3 runs .*101_0"):
        submit(three(tmp_path, seed=1))
    fake.set(queue=[["101_1", "RUNNING", first["chain"]], ["103_0", "PENDING", "another's"]])
    with pytest.raises(ClusterError, match="jobs of 1 of these 2 runs") as told:
        submit([*three(tmp_path)[1:]], max_parallel=1)
    assert "livt cancel" in told.value.remedy
    assert len(fake.calls("sbatch")) == 3


def test_a_refused_array_takes_the_ones_before_it_back(tmp_path, fake):
    fake.set(accepted=2)
    with pytest.raises(ClusterError, match="QOS policy; jobs 101, 102, submitted before it, were taken back"):
        submit(three(tmp_path))
    assert fake.calls("scancel") == [["101", "102"]]
    assert all("taken_back" in read_chain(Path(r.run_dir)) for r in three(tmp_path))


def test_runs_that_do_not_go_together_are_refused_before_anything_is_written(tmp_path, fake):
    for recipes, why in (
        ([recipe(tmp_path, "a"), recipe(tmp_path, "a", seed=1)], "the same run directory"),
        ([recipe(tmp_path, "a"), recipe(tmp_path, "b", slurm={"nodes": 2})], "ask Slurm for different things"),
    ):
        with pytest.raises(UsageError, match=why):
            prepare_array(recipes)
    assert not (tmp_path / "runs").exists()


def test_slurm_is_asked_for_elements_by_their_own_ids(tmp_path, fake):
    submit(three(tmp_path))
    chain = read_chain(tmp_path / "runs" / "c")
    fake.program(
        "squeue", '#!/bin/sh\necho "101_2|RUNNING|None|1:00|2:00|x|n1|$CHAIN"\n'.replace("$CHAIN", chain["chain"])
    )
    fake.program("sacct", f"#!/bin/sh\nprintf '%s\\n' \"$*\" >{json.dumps(str(tmp_path / 'asked'))}\n")
    (queue,) = look([chain])
    assert queue.jobs["101_2"].state == "RUNNING"
    assert "-j102_2,103_2" in (tmp_path / "asked").read_text()
