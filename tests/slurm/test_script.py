"""What the batch shell does, by really running it: signals, environment, frozen code, steps and exit codes.

What it decides is Python, tested in test_job.py. Here `livt job next` is a small program that gives the answers of the
test, but for the last two tests; srun is one in shell.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from livt_scale.slurm.code_snapshot import freeze, read_code
from livt_scale.slurm.records import ENDS, EndRecord, read_end
from livt_scale.slurm.script import JobPlan, render
from livt_scale.slurm.sites import resources_for
from tests.slurm.test_script_text import REPO, recipe, settings, template, write_recipe

RUN = ["run", "train", "srun", "livt", "train"]
# Records its arguments and prints the answer of its number; where a file NUMBER.waits is there, after a second.
DECIDES = """#!/bin/bash
printf '%s\\n' "python $*" >>"$CALLS"
n=$(grep -c '^python' "$CALLS")
if [ -e "$ANSWERS/$n.waits" ]; then touch "$RUN/deciding"; sleep 1; fi
if [ -e "$ANSWERS/$n" ]; then cat "$ANSWERS/$n"; else exit 1; fi
"""


class Script:
    """A rendered script in a folder of its own, with Python and srun as the test writes them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run it's"
        for path in (self.run / "slurm", folder / "bin", folder / "answers"):
            path.mkdir(parents=True)
        self.program("srun", "exit 0")
        self.python = folder / "bin" / "python it's"
        self.python.write_text(DECIDES)
        self.python.chmod(0o755)
        self.environ: dict[str, str] = {}

    def program(self, name: str, body: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f'#!/bin/bash\nprintf "%s\\n" "{name} $*" >>"$CALLS"\n{body}\n')
        path.chmod(0o755)

    def answers(self, *answers: list[str], waits: int = 0) -> None:
        """What Python says in turn. waits: the number of the one that takes its time."""
        for number, words in enumerate(answers, start=1):
            (self.folder / "answers" / str(number)).write_bytes(b"".join(os.fsencode(word) + b"\0" for word in words))
        if waits:
            (self.folder / "answers" / f"{waits}.waits").touch()

    def start(self, *, slurm: dict | None = None, when_stopped="requeue", **files) -> subprocess.Popen:
        of = recipe(slurm or {}, run_dir=str(self.run))
        known = {"work_dir": str(self.folder), "code": "", "python": str(self.python)}
        known |= {"code_sha256": "", "recipe_sha256": ""}
        plan = JobPlan("pretrain", resources_for(of.slurm, None, "pretrain"), when_stopped=when_stopped)
        script = self.folder / "script.sbatch"
        script.write_text(render(template(), plan, settings(of, **(known | files))))
        env = {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2"}
        env |= {"CALLS": str(self.folder / "calls"), "RUN": str(self.run), "ANSWERS": str(self.folder / "answers")}
        return subprocess.Popen(["bash", str(script)], env=env | self.environ, stderr=subprocess.PIPE, text=True)

    def __call__(self, **given) -> tuple[int, str]:
        process = self.start(**given)
        _, log = process.communicate(timeout=60)
        return process.returncode, log

    def calls(self, name: str = "") -> list[str]:
        path = self.folder / "calls"
        return [line for line in path.read_text().splitlines() if line.startswith(name)] if path.exists() else []

    @property
    def end(self) -> EndRecord | None:
        return read_end(self.run, self.environ.get("SLURM_JOB_ID", "77"))


@pytest.fixture
def script(tmp_path):
    return Script(tmp_path)


def wait_for(path: Path) -> None:
    until = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < until, f"no {path}"
        time.sleep(0.02)


@pytest.mark.parametrize("code", [0, 1, 85])
def test_it_does_what_python_says_and_tells_python_how_each_step_ended(script, code):
    hostile = "it's $(touch pwned)\n * \\"
    script.program("srun", 'printf "<%s>" "$@" >>"$RUN/words"; exit 7')
    script.answers(["run", "check", "srun", hostile, ""], RUN, ["exit", str(code)])
    assert script()[0] == code
    assert (script.run / "words").read_text() == f"<{hostile}><><livt><train>"
    asked = script.calls("python")
    assert asked[0].endswith("--segments=1 --signalled=no")
    assert asked[1].endswith("--signalled=no --ended=check:7")
    assert asked[2].endswith("--signalled=no --ended=check:7 --ended=train:7")
    assert " -P -m livt_scale job next pretrain " in asked[0]


# --- failures before or without an answer ---


MODES = pytest.mark.parametrize("when_stopped", ["requeue", "next"])


@MODES
def test_where_python_fails_the_job_fails_and_its_record_says_why(script, when_stopped):
    script.answers(RUN)
    code, log = script(when_stopped=when_stopped)
    assert code == 1
    assert "livt job next failed" in log
    assert len(script.calls("python")) == 2
    assert (script.end.kind, script.end.code) == ("failed", 1)
    assert "livt job next failed" in script.end.why


@MODES
def test_a_module_that_cannot_be_loaded_fails_the_job(script, when_stopped):
    script.environ["BASH_FUNC_module%%"] = '() { echo "no such module: $2" >&2; [ "$2" = good ]; }'
    code, log = script(slurm={"modules": ["good", "bad"]}, when_stopped=when_stopped)
    assert code == 1
    assert "no such module: bad" in log
    assert (script.end.kind, script.end.why) == ("failed", "module load bad failed")
    assert script.calls() == []


def test_a_working_folder_that_is_not_there_fails_the_job(script):
    code, log = script(work_dir="/no/such folder", when_stopped="next")
    assert code == 1
    assert "there is no folder /no/such folder on " in log
    assert script.end.kind == "failed"
    assert script.calls() == []


def test_the_kind_and_reason_that_python_gives_are_recorded(script):
    script.answers(["exit", "85", "stopped", "it's saved:\n $(touch pwned) *"])
    before = time.time() - 2
    assert script()[0] == 85
    end = script.end
    assert (end.kind, end.code, end.why) == ("stopped", 85, "it's saved: $(touch pwned) *")
    assert before < end.at < time.time() + 1
    assert [path.name for path in (script.run / ENDS).iterdir()] == ["77"]


def test_an_element_of_an_array_has_a_record_by_its_own_id(script):
    script.environ |= {"SLURM_JOB_ID": "79", "SLURM_ARRAY_JOB_ID": "75", "SLURM_ARRAY_TASK_ID": "4"}
    script.answers(["exit", "0", "done", ""])
    script()
    assert read_end(script.run, "75_4").kind == "done"


def test_a_start_removes_the_record_of_the_start_before(script):
    """So that one that is killed leaves none, rather than that of another start."""
    script.answers(["exit", "85", "stopped", ""], RUN)
    script()
    assert script.end.kind == "stopped"
    script.program("srun", 'kill -9 "$PPID"')
    script.answers(RUN)
    (script.folder / "calls").unlink()
    assert script()[0] == -signal.SIGKILL
    assert script.end is None


def test_a_record_that_cannot_be_written_does_not_change_the_exit_code(script):
    (script.run / ENDS).write_text("a file")
    script.answers(["exit", "85", "stopped", ""])
    assert script()[0] == 85


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_shell_that_a_signal_ends_leaves_a_record(script, number):
    script.program("srun", f'kill -s {number} "$PPID"; sleep 0.2')
    script.answers(RUN)
    script()
    assert script.end.kind == "failed"


def test_an_interpreter_that_is_not_there_fails_the_job(script):
    code, log = script(python="/no/such python", when_stopped="last")
    assert code == 1
    assert "/no/such python" in log
    assert script.end.kind == "failed"


# --- signals ---

WAITS = """trap 'echo "srun got it" >>"$CALLS"; sleep 1; exit 85' USR2
touch "$RUN/started"
for _ in $(seq 300); do sleep 0.1; done
exit 0"""


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_for_the_batch_shell_reaches_srun_and_the_shell_waits_for_the_save(script, number):
    script.program("srun", WAITS)
    script.answers(RUN, ["exit", "85"])
    process = script.start()
    wait_for(script.run / "started")
    process.send_signal(number)
    time.sleep(0.3)
    process.send_signal(number)  # Slurm sends them again
    process.communicate(timeout=60)
    assert process.returncode == 85
    assert "srun got it" in script.calls()
    assert script.calls("python")[-1].endswith("--signalled=yes --ended=train:85")


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
@pytest.mark.parametrize("to_python_too", [False, True])
def test_a_signal_while_python_decides_is_not_lost_and_no_step_starts(script, number, to_python_too):
    """scancel --full signals the processes of the shell as well."""
    script.answers(RUN, ["exit", "85"], waits=1)
    process = script.start()
    wait_for(script.run / "deciding")
    process.send_signal(number)
    if to_python_too:
        for child in children_of(process.pid):
            os.kill(child, number)
    process.communicate(timeout=60)
    assert process.returncode == 85
    assert script.calls("srun") == []
    assert script.calls("python")[1].endswith("--signalled=yes --ended=train:85")


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_the_clean_up_runs_in_spite_of_a_signal(script):
    script.program("srun", 'trap "" USR2; if [ "$1" = livt ]; then kill -s USR2 $PPID; sleep 1; exit 85; fi')
    script.answers(RUN, ["run", "clean-up", "srun", "rm"], ["exit", "85"])
    assert script()[0] == 85
    assert script.calls("srun") == ["srun livt train", "srun rm"]
    assert script.calls("python")[-1].endswith("--ended=train:85 --ended=clean-up:0")


def test_a_segment_that_is_killed_leaves_no_record_of_a_failure(script):
    script.program("srun", 'kill -9 "$PPID"')  # as Slurm does with a preempted job that it cancels, or at a lost node
    script.answers(RUN)
    assert script(when_stopped="next")[0] == -signal.SIGKILL
    assert script.end is None


# --- the code that was submitted ---


@pytest.fixture
def frozen(tmp_path, script):
    """The settings of a script whose code and recipe are frozen."""
    package = tmp_path / "checkout" / "livt_scale"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    code = freeze(read_code(package), tmp_path / "run it's")
    path = script.run / "slurm" / "submitted.yaml"
    path.write_text("name: x\n")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    files = {"code": str(code.folder), "code_sha256": code.sha256}
    return {**files, "recipe_path": str(path), "recipe_sha256": digest}


def test_code_that_is_as_it_was_submitted_runs_and_comes_first_in_the_path(script, frozen):
    script.environ["PYTHONPATH"] = "/elsewhere"
    script.program("srun", 'echo "path $PYTHONPATH" >>"$CALLS"')
    script.answers(RUN, ["exit", "0"])
    assert script(**frozen)[0] == 0
    assert script.calls("path") == [f"path {frozen['code']}:/elsewhere"]


def test_a_path_that_the_recipe_sets_comes_behind_the_code(script, frozen):
    """For extensions, say. In its place, no process would find what it has to run (LIVT_CODE)."""
    script.program("srun", 'echo "path $PYTHONPATH" >>"$CALLS"')
    script.answers(RUN, ["exit", "0"])
    slurm = {"environment": {"PYTHONPATH": "/mine"}, "setup": ["export PYTHONPATH=/first:$PYTHONPATH"]}
    assert script(slurm=slurm, **frozen)[0] == 0
    assert script.calls("path") == [f"path {frozen['code']}:/first:/mine"]


@pytest.mark.parametrize("name", ["livt_scale/__init__.py", "SHA256SUMS", "submitted.yaml"])
@pytest.mark.parametrize("how", ["changed", "gone"])
def test_code_or_a_recipe_that_was_changed_since_is_refused_before_any_of_it_runs(script, frozen, name, how):
    path = Path(frozen["recipe_path"] if name == "submitted.yaml" else f"{frozen['code']}/{name}")
    path.chmod(0o644)
    path.unlink() if how == "gone" else path.write_text(path.read_text() + "\n# edited\n")
    code, log = script(**frozen, when_stopped="next")
    assert code == 1
    what = "is not the recipe that was submitted" if name == "submitted.yaml" else "is not what was submitted"
    assert what in log
    assert what in script.end.why
    assert script.calls() == []


# --- the environment of the tasks ---


def test_what_another_launcher_left_is_removed_and_what_the_recipe_sets_is_there(script):
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LIVT_STOP_AT")
    script.environ = dict.fromkeys(names, "3")
    script.program("srun", f'echo "left {"".join(f"${{{name}-}}" for name in names)} $NCCL_DEBUG" >>"$CALLS"')
    script.answers(RUN, ["exit", "0"])
    script(slurm={"environment": {"NCCL_DEBUG": "it's $(x)"}})
    assert script.calls("left") == ["left  it's $(x)"]


def test_setup_runs_after_the_environment_is_set_and_tasks_see_what_it_exports(script):
    script.program("srun", 'echo "sees $DERIVED" >>"$CALLS"')
    script.answers(RUN, ["exit", "0"])
    setup = ['export DERIVED="$SAID, it\'s $(echo so)"', "true"]
    assert script(slurm={"environment": {"SAID": "here"}, "setup": setup})[0] == 0
    assert script.calls("sees") == ["sees here, it's so"]


@pytest.mark.parametrize("command", ["false", "no-such-command", "if then", "(exit 3)"])
def test_setup_that_fails_ends_the_job_with_its_command(script, command):
    code, log = script(slurm={"setup": ["true", command, "touch too-far"]}, when_stopped="next")
    assert code == 1
    assert f"slurm.setup: {command} failed" in log
    assert script.calls() == []
    assert not (script.folder / "too-far").exists()


def test_what_the_submitting_shell_has_exported_does_not_decide_how_the_script_runs(script):
    """Options by SHELLOPTS, functions that hide commands; `module` is a function that is needed."""
    script.environ |= {"SHELLOPTS": "errexit:nounset:noglob:noclobber:pipefail:posix", "BASHOPTS": "failglob:nullglob"}
    hides = ("cd", "srun", "date", "kill", "wait", "export", "mapfile", "sha256sum", "eval", "exec", "[")
    script.environ |= {f"BASH_FUNC_{name}%%": '() { echo "function" >>"$CALLS"; return 9; }' for name in hides}
    script.environ["BASH_FUNC_module%%"] = '() { echo "module $*" >>"$CALLS"; }'
    script.program("srun", 'echo "options <$SHELLOPTS>" >>"$CALLS"; exit 7')
    script.answers(["run", "check", "srun", "x"], RUN, ["exit", "0"])
    code, log = script(slurm={"modules": ["cuda"]}, when_stopped="next")
    assert (code, log) == (0, "")
    assert script.calls("module") == ["module load cuda"]
    assert script.calls("function") == []
    assert script.calls("python")[-1].endswith("--ended=check:7 --ended=train:7")
    assert not any("nounset" in line or "posix" in line for line in script.calls("options"))


def test_srun_hands_on_what_the_script_sets_whatever_sbatch_exported(script):
    script.environ |= {"SLURM_EXPORT_ENV": "NONE", "OMPI_COMM_WORLD_RANK": "3", "LIVT_CODE": "/of/another/job"}
    script.program("srun", 'echo "left <${SLURM_EXPORT_ENV-}${OMPI_COMM_WORLD_RANK-}${LIVT_CODE-}>" >>"$CALLS"')
    script.answers(RUN, ["exit", "0"])
    assert script()[0] == 0
    assert script.calls("left") == ["left <>"]


# --- with the real `livt job next` ---

REAL = {"code": str(REPO), "python": sys.executable}


def test_a_job_trains_and_ends(script):
    of = recipe(run_dir=str(script.run))
    path = write_recipe(of, script.folder / "it's.yaml")
    code, log = script(recipe_path=path, **REAL)
    assert code == 0, log
    (call,) = script.calls("srun")
    assert call.endswith(f"{sys.executable} -P -m livt_scale train {path} --stage pretrain")
    assert json.loads((script.run / "slurm" / "starts-pretrain.json").read_text())["job"] == "77"


def test_a_job_that_is_signalled_saves_and_is_requeued(script):
    path = write_recipe(recipe(run_dir=str(script.run)), script.folder / "it's.yaml")
    script.program("srun", WAITS)
    script.program("scontrol", "exit 0")
    process = script.start(recipe_path=path, **REAL)
    wait_for(script.run / "started")
    process.send_signal(signal.SIGUSR2)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 85, log
    assert "was stopped; its newest checkpoint" in log
    assert "scontrol requeue 77" in script.calls("scontrol")
    assert script.calls("srun got")
