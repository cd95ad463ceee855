"""A chain is submitted whole, once, or not at all. Slurm is the fake one of `fake_slurm`."""

import json
import os
from pathlib import Path

import pytest

from livt_scale.config.load import load_recipe
from livt_scale.config.recipe import Recipe
from livt_scale.slurm import submit as chains
from livt_scale.util.errors import ClusterError, RecipeError, UsageError
from tests import warm
from tests.slurm.fake_slurm import FakeSlurm

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    fake = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", fake.path)
    monkeypatch.chdir(tmp_path)
    return fake


def recipe(tmp_path, *, slurm=None, **parts):
    tree = {
        "name": "it's $(x)",
        "run_dir": str(tmp_path / "runs" / 'it\'s 100% "$(touch pwned)"\nhere'),
        "data": {"train": "/no/set/train", "val": "/no/set/val"},
        "stages": {"pretrain": {"epochs": 80}, "finetune": {"epochs": 50}},
        "slurm": {"step_s": 1.0, "save_s": 2.0} | (slurm or {}),
    }
    return Recipe.model_validate(tree | parts)


def submit(of):
    return chains.submit(chains.prepare(of))


def option(call, name):
    return next((w.removeprefix(f"{name}=") for w in call if w.startswith(f"{name}=")), None)


def test_three_jobs_each_after_the_one_before_it(tmp_path, fake):
    of = recipe(tmp_path)
    chain = submit(of)
    assert [(j["stage"], j["id"], j["dependency"]) for j in chain["jobs"]] == [
        ("pretrain", "101", None),
        ("finetune", "102", "afterok:101"),
        ("evaluate", "103", "afterok:102"),
    ]
    calls = fake.calls("sbatch")
    assert [option(c, "--dependency") for c in calls] == [None, "afterok:101", "afterok:102"]
    assert ["--kill-on-invalid-dep=yes" in c for c in calls] == [False, True, True]
    assert {option(c, "--chdir") for c in calls} == {of.run_dir}
    assert {option(c, "--comment") for c in calls} == {chain["chain"]}
    assert option(calls[0], "--output") == of.run_dir.replace("%", "%%") + "/slurm/logs/pretrain-%j.log"
    assert not list(tmp_path.rglob("pwned"))


def test_jobs_are_submitted_with_a_clean_environment_and_the_rest_is_reported(tmp_path, fake, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_MEM_PER_CPU", "SLURM_CONF", "SBATCH_TIMELIMIT", "SBATCH_WCKEY", "SQUEUE_USERS"):
        monkeypatch.setenv(name, "7")
    prepared = chains.prepare(recipe(tmp_path))
    assert {"this is inside job 7: its SLURM_* variables are not passed on"} < set(prepared.plan.notes)
    assert "SBATCH_TIMELIMIT is set and not used: slurm.time_min decides" in prepared.plan.notes
    chains.submit(prepared)
    chains.submit(prepared)
    given = {name for name in fake.environ("sbatch") if name.startswith(("SLURM_", "SBATCH_"))}
    assert given == {"SLURM_CONF", "SBATCH_WCKEY"}
    assert "SQUEUE_USERS" not in fake.environ("squeue")


def test_the_record_names_each_job_its_script_and_its_log(tmp_path, fake):
    of = recipe(tmp_path)
    submit(of)
    run = Path(of.run_dir)
    chain = json.loads((run / "slurm" / "chain.json").read_text())
    assert chain["mode"] == "requeue"
    for job, call in zip(chain["jobs"], fake.calls("sbatch"), strict=True):
        assert (run / job["script"]).is_file()
        assert call[-1] == str(run / job["script"])
        assert job["log"].endswith(f"-{job['id']}.log")
        assert job["submitted_at"]
    assert (run / "slurm" / "logs").is_dir()
    assert load_recipe(run / "slurm" / "submitted.yaml").run_dir == of.run_dir
    assert Path(chain["code"]["folder"]).parent == run / "code"
    assert json.loads((run / "slurm" / "git.json").read_text()) == chain["code"]["git"]


def test_segments_go_on_however_the_one_before_ended_and_stages_only_after_success(tmp_path, fake):
    chain = submit(
        recipe(tmp_path, slurm={"mode": "segments", "pretrain": {"segments": 3}, "finetune": {"segments": 2}})
    )
    assert [(j["name"], j["dependency"]) for j in chain["jobs"]] == [
        ("pretrain-1", None),
        ("pretrain-2", "afterany:101"),
        ("pretrain-3", "afterany:102"),
        ("finetune-1", "afterok:103"),
        ("finetune-2", "afterok:103,afterany:104"),
        ("evaluate-1", "afterok:105"),
        ("evaluate-2", "afterok:105,afterany:106"),
    ]


def test_a_partition_that_cancels_gets_segments_and_one_that_requeues_does_not(tmp_path, fake):
    few = {"pretrain": {"segments": 2}, "finetune": {"segments": 1}}
    assert chains.prepare(recipe(tmp_path, slurm={"partition": "scrap"} | few)).plan.mode == "segments"
    assert chains.prepare(recipe(tmp_path, slurm={"partition": "spare", "time_min": 60})).plan.mode == "requeue"
    chosen = chains.prepare(recipe(tmp_path, slurm={"partition": "scrap", "mode": "requeue"}))
    assert chosen.plan.mode == "requeue"


@pytest.mark.parametrize("accepted", [0, 1, 2])
def test_where_one_job_is_refused_those_before_it_are_taken_back_and_sbatch_is_quoted(tmp_path, fake, accepted):
    fake.set(accepted=accepted)
    with pytest.raises(ClusterError, match="violates accounting/QOS policy") as caught:
        submit(recipe(tmp_path))
    assert fake.queue == []
    ids = [str(101 + k) for k in range(accepted)]
    assert fake.calls("scancel") == ([ids] if ids else [])
    assert all(job in str(caught.value) for job in ids)
    fake.set(accepted=99)
    assert not submit(recipe(tmp_path)).get("joined")  # and it can be submitted again


def test_jobs_that_cannot_be_taken_back_are_named(tmp_path, fake):
    fake.set(accepted=2, scancel_fails=True)
    with pytest.raises(ClusterError, match=r"101, 102, submitted before, could not be cancelled.*scancel 101 102"):
        submit(recipe(tmp_path))


def test_a_chain_submitted_twice_is_joined_not_doubled(tmp_path, fake):
    first = submit(recipe(tmp_path))
    second = submit(recipe(tmp_path))
    assert second["joined"] == {"101": "PENDING", "102": "PENDING", "103": "PENDING"}
    assert second["jobs"] == first["jobs"]
    assert len(fake.calls("sbatch")) == 3


def test_another_recipe_for_the_same_run_is_refused_as_long_as_the_first_is_queued(tmp_path, fake):
    submit(recipe(tmp_path))
    with pytest.raises(ClusterError, match=r"still in the queue .*another recipe .*scancel 101 102 103") as refused:
        submit(recipe(tmp_path, seed=5, slurm={"nodes": 2}))
    assert "(seed: 0 in the queue, 5 here; slurm.nodes: 1 in the queue, 2 here)" in str(refused.value)
    fake.set(queue=[])
    chain = submit(recipe(tmp_path, seed=5))
    assert [job["id"] for job in chain["jobs"]] == ["104", "105", "106"]
    assert chain["earlier"][0]["ids"] == ["101", "102", "103"]


def test_a_job_whose_id_was_lost_is_found_by_its_comment(tmp_path, fake):
    """A submission killed between sbatch and its record: the job is in the queue, and no id is written down."""
    of = recipe(tmp_path)
    submit(of)
    path = Path(of.run_dir) / "slurm" / "chain.json"
    chain = json.loads(path.read_text())
    chain["jobs"] = []
    path.write_text(json.dumps(chain))
    assert submit(of)["joined"]
    assert len(fake.calls("sbatch")) == 3


def test_a_queue_that_cannot_be_asked_stops_a_second_submission(tmp_path, fake):
    submit(recipe(tmp_path))
    fake.set(squeue_fails=True)
    with pytest.raises(ClusterError, match="Unable to contact slurm controller"):
        submit(recipe(tmp_path))
    assert len(fake.calls("sbatch")) == 3


def test_two_submissions_at_once_are_not_possible(tmp_path, fake):
    of = recipe(tmp_path)
    with chains.alone(Path(of.run_dir)), pytest.raises(ClusterError, match="another livt submit"):
        submit(of)


def test_counts_and_failures_of_the_chain_before_are_forgotten(tmp_path, fake):
    of = recipe(tmp_path)
    folder = Path(of.run_dir) / "slurm"
    (folder / "ends").mkdir(parents=True)
    for name in ("starts-pretrain", "ends/77"):
        (folder / name).write_text("step-00000001 3\n")
    submit(of)
    assert not list(folder.glob("starts-*"))
    assert not list((folder / "ends").iterdir())


def test_a_stage_that_is_done_is_not_submitted(tmp_path, fake):
    of = recipe(tmp_path)
    for stage in ("pretrain", "finetune"):
        folder = Path(of.run_dir) / stage
        folder.mkdir(parents=True)
        (folder / "status.json").write_text(json.dumps({"state": "done", "step": 5, "total_steps": 5}))
        names = [job.job for job in chains.prepare(of).plan.jobs]
        assert names == (["finetune", "evaluate"] if stage == "pretrain" else ["evaluate"])
    export = Path(of.run_dir) / "export"
    export.mkdir()
    (export / "eval.json").write_text("{}")
    assert chains.prepare(of).plan.jobs == []
    status = {"state": "done", "since": "2026-01-01T00:00:00+0000", "step": 5, "total_steps": 5}
    (Path(of.run_dir) / "finetune" / "status.json").write_text(json.dumps(status))
    os.utime(export / "eval.json", (1000, 1000))  # of the weights before these
    assert [job.job for job in chains.prepare(of).plan.jobs] == ["evaluate"]


@pytest.mark.parametrize(
    "text", ["{half", '{"chain": "livt x", "jobs": [{}]}', '{"chain": "livt x", "jobs": [], "earlier": 3}']
)
def test_a_record_that_cannot_be_read_is_told(tmp_path, fake, text):
    of = recipe(tmp_path)
    path = Path(of.run_dir) / "slurm" / "chain.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ClusterError, match=r"chain\.json cannot be read"):
        submit(of)


def test_no_sbatch_is_told_and_leaves_no_chain(tmp_path, fake):
    (fake.folder / "sbatch").unlink()
    os.environ["PATH"] = str(fake.folder)  # as monkeypatch will put back
    with pytest.raises(ClusterError, match="there is no sbatch here"):
        submit(recipe(tmp_path))


def test_a_run_directory_with_a_backslash_is_refused_before_any_job(tmp_path, fake):
    with pytest.raises(UsageError, match="backslash"):
        submit(recipe(tmp_path, run_dir=str(tmp_path / "a\\b")))
    assert fake.calls("sbatch") == []


def test_a_place_where_nothing_can_be_written_is_told(tmp_path, fake):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"run_dir is .*/file/run, and .*/file is a file"):
        submit(recipe(tmp_path, run_dir=str(tmp_path / "file" / "run")))
    blocked = chains.alone(tmp_path / "file" / "run")
    with pytest.raises(ClusterError, match=r"run directory .*/file/run cannot be written"), blocked:
        pass


def test_a_global_batch_that_does_not_divide_is_refused_here_not_in_the_job(tmp_path, fake):
    with pytest.raises(RecipeError, match=r"stages\.pretrain\.global_batch: a global batch of 4096"):
        submit(recipe(tmp_path, slurm={"nodes": 3, "tasks_per_node": 1}))
    assert fake.calls("sbatch") == []


# --- the command ---


def livt(*words, cwd, path=None):
    env = dict(os.environ) | ({"PATH": path} if path else {})
    done = warm.run(["-m", "livt_scale", *words], cwd=cwd, env=env, timeout=120)
    return done.returncode, done.stdout, done.stderr


QUICKSTART = str(REPO / "recipes" / "fashion_mnist_lt" / "quickstart.yaml")


def test_a_dry_run_prints_scripts_and_plan_and_writes_nothing(tmp_path, fake):
    words = ("submit", QUICKSTART, "--set", f"run_dir={tmp_path / 'run'}", "--dry-run")
    code, out, err = livt(*words, cwd=tmp_path)
    assert (code, err) == (0, "")
    assert out.count("#!/usr/bin/env bash") == 3
    assert "# plan: requeue" in out
    assert "# note: pretrain: how long a step and a save takes is not known yet" in out
    assert not (tmp_path / "run").exists()
    assert fake.calls("sbatch") == []
    told = json.loads(livt(*words, "--json", cwd=tmp_path)[1])
    assert [job["name"] for job in told["jobs"]] == ["pretrain", "finetune", "evaluate"]


def test_the_command_submits_says_what_it_did_and_the_second_time_that_it_did_nothing(tmp_path, fake):
    words = ("submit", QUICKSTART, "--set", f"run_dir={tmp_path / 'run'}", "--follow-checkout")
    code, out, _ = livt(*words, cwd=tmp_path)
    assert code == 0
    assert "afterok:101" in out
    script = (tmp_path / "run" / "slurm" / "scripts" / "01-pretrain.sbatch").read_text()
    assert "code_sha256=''" in script
    assert f"code={REPO}" in script
    code, out, _ = livt(*words, cwd=tmp_path)
    assert code == 0
    assert "nothing was submitted" in out


def test_a_wrong_partition_is_a_wrong_option(tmp_path, fake):
    code, _, err = livt(
        "submit", QUICKSTART, f"--set=run_dir={tmp_path}/run", "--set=slurm.partition=sparse", "--dry-run", cwd=tmp_path
    )
    assert code == 2
    assert "there is no partition 'sparse' on this cluster. Did you mean 'spare'?" in err


def test_the_submitted_recipe_can_be_submitted_again_as_livt_status_proposes(tmp_path, fake):
    of = recipe(tmp_path)
    submit(of)
    again = load_recipe(Path(of.run_dir) / "slurm" / "submitted.yaml", to_start=True)
    assert again.run_dir == of.run_dir
    assert submit(again).get("joined")  # the same recipe: nothing is submitted twice
