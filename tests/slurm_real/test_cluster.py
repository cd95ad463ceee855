"""What our batch scripts rely on, shown on a real Slurm by scripts of a few lines, without livt_scale."""

import os
import re
import signal
import time

import pytest

from tests.slurm_real.cluster import ClusterError, wait_for
from tests.slurm_real.descriptions import REQUEUE_S, TWO_NODES

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]

NODES = TWO_NODES.nodes  # and the first two of other clusters
BOTH = ("--nodes=2", f"--nodelist={','.join(NODES)}")
ON_BOTH = (*BOTH, "--ntasks-per-node=1", "--time=5")
DONE = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL")


@pytest.fixture(scope="module", autouse=True)
def _chains_of_other_clusters_first(request):
    """They run while the tests here wait."""
    if any("preempted" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("preempted")


def said(tmp_path, job, text, seconds=60):
    """The job's output, once it holds `text`."""
    out = tmp_path / f"{job}.out"

    def holds():
        return out.exists() and text in out.read_text() and out.read_text()

    return wait_for(holds, lambda: f"{text!r} in {out.read_text() if out.exists() else out}", seconds=seconds)


def test_srun_starts_a_task_on_each_node_and_all_know_the_first_nodes_name(cluster, sbatch, tmp_path):
    body = "srun bash -c 'echo $SLURM_PROCID $SLURMD_NODENAME $SLURM_STEP_NODELIST $(getent hosts livt-n1)'"
    job = sbatch(body, *ON_BOTH)
    assert cluster.wait(job, *DONE)["JobState"] == "COMPLETED"
    lines = sorted(line.split()[:3] for line in (tmp_path / f"{job}.out").read_text().splitlines())
    assert lines == [[str(n), node, "livt-n[1-2]"] for n, node in enumerate(NODES)]


def test_tasks_are_told_their_gpus(cluster, sbatch, tmp_path):
    job = sbatch("srun bash -c 'echo $SLURM_PROCID sees $CUDA_VISIBLE_DEVICES'", *ON_BOTH, "--gpus-per-node=2")
    cluster.wait(job, "COMPLETED")
    assert sorted((tmp_path / f"{job}.out").read_text().splitlines()) == ["0 sees 0,1", "1 sees 0,1"]


def test_the_signal_before_the_time_limit_comes_to_the_batch_shell_alone_and_srun_hands_it_to_every_task(
    cluster, sbatch, tmp_path
):
    body = """
    srun bash -c 'trap "echo task $SLURM_PROCID got it; exit 0" USR2; echo waits; while :; do sleep 100; done' &
    trap 'echo shell got it; kill -USR2 $!' USR2
    wait $!; echo "woken by $?"; wait $!; echo "srun ended with $?"
    """
    job = sbatch(body, *BOTH, "--ntasks-per-node=1", "--time=1", "--signal=B:USR2@50")
    assert cluster.wait(job, *DONE)["JobState"] == "COMPLETED"
    lines = (tmp_path / f"{job}.out").read_text().splitlines()
    assert sorted(lines) == sorted(
        ["waits", "waits", "shell got it", f"woken by {128 + signal.SIGUSR2}", "task 0 got it", "task 1 got it"]
        + ["srun ended with 0"]
        + 2 * ["User defined signal 2"]  # to the task's children as well, the `sleep` here: whoever heeds it not, ends
    )


def test_a_signal_without_a_trap_in_the_batch_shell_ends_it_and_reaches_no_task(cluster, sbatch, tmp_path):
    """Pain 13: `--signal=B:` with no trap: the save that was meant never happens."""
    body = "srun bash -c 'trap \"echo task got it\" USR2; echo waits; while :; do sleep 0.2; done'"
    job = sbatch(body, "--time=5", "--signal=B:USR2@50")
    said(tmp_path, job, "waits")
    cluster.run("scancel", "--batch", "--signal=USR2", job)
    assert cluster.wait(job, *DONE)["JobState"] == "FAILED"
    assert "task got it" not in (tmp_path / f"{job}.out").read_text()


def test_a_job_puts_itself_back_on_exit_85_and_goes_on_writing_the_same_file(cluster, sbatch, tmp_path):
    body = """
    echo "start ${SLURM_RESTART_COUNT:-0}"
    srun bash -c 'exit $(( ${SLURM_RESTART_COUNT:-0} < 2 ? 85 : 0 ))'
    code=$?
    [ $code -eq 85 ] || exit $code
    scontrol requeue "$SLURM_JOB_ID" && sleep 60
    """
    job = sbatch(body, *ON_BOTH, "--requeue")
    after = sbatch("echo after", f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes")
    began = time.monotonic()
    assert cluster.wait(job, *DONE, seconds=150)["Restarts"] == "2"
    assert time.monotonic() - began > 2 * REQUEUE_S, "a requeued job does not start at once: it waits cred_expire"
    out = (tmp_path / f"{job}.out").read_text()
    assert re.findall(r"^start \d", out, re.MULTILINE) == ["start 0", "start 1", "start 2"]
    assert cluster.wait(after, *DONE)["JobState"] == "COMPLETED", "who depends on it waits through its restarts"


def test_a_job_that_may_not_be_requeued_is_told_so(cluster, sbatch, tmp_path):
    job = sbatch('scontrol requeue "$SLURM_JOB_ID"; echo "scontrol said $?"', "--no-requeue", "--time=5")
    assert cluster.wait(job, *DONE)["JobState"] == "COMPLETED"
    assert "Requested operation is presently disabled" in said(tmp_path, job, "scontrol said 1")


@pytest.mark.parametrize("ending", ["exit 7", "kill -9 $$", "exit 85"])
def test_one_lost_task_ends_the_step_and_the_code_is_of_those_that_were_ended(cluster, sbatch, tmp_path, ending):
    """Pain 17. srun gives the highest code of its tasks: even where the first left with 85, that is 143 or 137."""
    body = f"""
    srun --kill-on-bad-exit=1 bash -c '[ $SLURM_PROCID = 1 ] && {ending}; sleep 300'
    echo "srun ended with $? after $SECONDS s"
    """
    job = sbatch(body, *ON_BOTH)
    after = re.search(r"ended with (\d+) after (\d+) s", said(tmp_path, job, "srun ended with"))
    assert after[1] in ("143", "137")
    assert int(after[2]) < 30


def test_after_a_failed_job_its_dependant_is_cancelled_not_left_waiting(cluster, sbatch, tmp_path):
    failing = sbatch("while [ ! -e fail ]; do sleep 0.2; done; exit 1", "--time=5")
    killed = sbatch("echo never", f"--dependency=afterok:{failing}", "--kill-on-invalid-dep=yes")
    left = sbatch("echo never", f"--dependency=afterok:{failing}", "--kill-on-invalid-dep=no")
    wait_for(lambda: cluster.show(killed)["Reason"] == "Dependency", "the reason", seconds=60)
    (tmp_path / "fail").touch()
    cluster.wait(failing, "FAILED")
    assert cluster.wait(killed, *DONE)["JobState"] == "CANCELLED"
    wait_for(lambda: cluster.show(left)["Reason"] == "DependencyNeverSatisfied", "the reason", seconds=60)
    assert cluster.show(left)["JobState"] == "PENDING", "for ever: pain 16"


def test_after_a_job_that_failed_before_the_dependant_was_submitted_it_is_cancelled_too(cluster, sbatch):
    failed = sbatch("exit 1", "--time=5")
    cluster.wait(failed, "FAILED")
    late = sbatch("echo never", f"--dependency=afterok:{failed}", "--kill-on-invalid-dep=yes")
    assert cluster.wait(late, *DONE)["JobState"] == "CANCELLED"


def test_a_job_over_its_time_limit_is_ended_and_what_follows_by_afterok_does_not_run(cluster, sbatch):
    job = sbatch("sleep 600", "--time=1")
    after = sbatch("echo never", f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes")
    anyway = sbatch("echo runs", f"--dependency=afterany:{job}")
    assert cluster.wait(job, *DONE, seconds=180)["JobState"] == "TIMEOUT"
    assert cluster.wait(after, *DONE)["JobState"] == "CANCELLED"
    assert cluster.wait(anyway, *DONE)["JobState"] == "COMPLETED"


SAVES_WHEN_TOLD = """
echo "start ${SLURM_RESTART_COUNT:-0}"
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exit 0
trap 'echo shell got USR2' USR2
trap 'echo shell got TERM' TERM
for n in $(seq 600); do sleep 0.1; done
"""
WHOLE = (*BOTH, "--exclusive", "--time=5")


def test_who_is_preempted_on_a_partition_that_requeues_is_warned_put_back_and_comes_again(cluster, sbatch, tmp_path):
    low = sbatch(SAVES_WHEN_TOLD, *WHOLE, "--partition=spare", "--requeue", "--signal=B:USR2@60")
    said(tmp_path, low, "start 0")
    high = sbatch("sleep 5", *WHOLE, "--partition=urgent")
    said(tmp_path, low, "shell got USR2")  # preempt_send_user_signal; without it, SIGTERM to the steps alone
    cluster.wait(high, "COMPLETED", seconds=150)
    assert cluster.wait(low, *DONE, seconds=150)["JobState"] == "COMPLETED"
    assert said(tmp_path, low, "start 1")


def test_who_is_preempted_on_a_partition_that_cancels_is_gone_whatever_requeue_says(cluster, sbatch, tmp_path):
    """Pain 14: `--requeue` does nothing where PreemptMode is CANCEL; `scontrol show partition` tells before."""
    assert "PreemptMode=CANCEL" in cluster.run("scontrol", "show", "partition", "scrap").stdout
    low = sbatch(SAVES_WHEN_TOLD, *WHOLE, "--partition=scrap", "--requeue", "--signal=B:USR2@60")
    said(tmp_path, low, "start 0")
    sbatch("sleep 5", *WHOLE, "--partition=urgent")
    assert cluster.wait(low, *DONE, seconds=150)["JobState"] == "PREEMPTED"
    assert "start 1" not in (tmp_path / f"{low}.out").read_text()


def test_a_lost_node_puts_the_job_back(cluster, sbatch, tmp_path):
    job = sbatch('echo "start ${SLURM_RESTART_COUNT:-0}"; srun sleep 600', *ON_BOTH, "--requeue")
    said(tmp_path, job, "start 0")
    cluster.lose(NODES[1])
    cluster.wait(job, "PENDING")
    cluster.bring_back(NODES[1])
    said(tmp_path, job, "start 1", seconds=90)


def test_an_array_runs_a_bounded_number_at_once(cluster, sbatch, tmp_path):
    array = sbatch("sleep 4; echo $SLURM_ARRAY_TASK_ID >> done", "--array=0-3%2", "--time=5")
    most, done = 0, tmp_path / "done"

    def all_done():
        nonlocal most
        running = cluster.run("squeue", "--noheader", "--array", f"--jobs={array}", "--states=RUNNING").stdout
        most = max(most, len(running.splitlines()))
        return done.exists() and len(done.read_text().split()) == 4

    wait_for(all_done, "the four", seconds=180, every_s=0.5)
    assert most == 2
    assert sorted(done.read_text().split()) == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--partition=nowhere", "invalid partition specified"),
        ("--constraint=huge", "Invalid feature specification"),
    ],
)
def test_what_cannot_run_is_refused_with_these_words(cluster, sbatch, option, words):
    with pytest.raises(ClusterError, match=words):
        sbatch("true", option, "--time=1")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--account=nobody", "Invalid account or account/partition combination specified"),
        ("--qos=nothing", "Invalid qos specification"),
    ],
)
def test_an_account_and_a_qos_are_checked_by_accounting_alone(cluster, sbatch, option, words):
    if cluster.description.accounting:
        with pytest.raises(ClusterError, match=words):
            sbatch("true", option, "--time=1")
    else:
        assert cluster.wait(sbatch("true", option, "--time=1"), *DONE)["JobState"] == "COMPLETED"


def test_more_nodes_than_there_are_wait_for_ever_with_a_reason(cluster, sbatch):
    job = sbatch("true", f"--nodes={len(cluster.nodes) + 1}", "--time=1")
    wait_for(lambda: cluster.show(job)["Reason"] == "PartitionNodeLimit", "the reason", seconds=60)


def test_a_dependency_on_a_job_that_slurm_has_forgotten_holds_nothing_back(cluster, sbatch):
    """Pain 16: `afterok` on such a job is ignored, so a chain never leans on the number of an earlier one."""
    job = sbatch("true", "--dependency=afterok:99999", "--kill-on-invalid-dep=yes", "--time=1")
    assert cluster.wait(job, *DONE)["JobState"] == "COMPLETED"


def test_accounting_remembers_how_a_job_ended_and_without_it_the_queue_does_for_a_while(cluster, sbatch):
    job = sbatch("exit 3", "--time=1", "--account=lab", "--qos=low")
    cluster.wait(job, "FAILED")
    if not cluster.description.accounting:
        with pytest.raises(ClusterError, match="Slurm accounting storage is disabled"):
            cluster.run("sacct", f"--jobs={job}")
        assert cluster.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").stdout == "FAILED\n"
        return
    fields = (
        "sacct",
        "--noheader",
        "--parsable2",
        "--allocations",
        f"--jobs={job}",
        "--format=State,ExitCode,Account,QOS",
    )
    wait_for(
        lambda: cluster.run(*fields).stdout.strip() == "FAILED|3:0|lab|low",
        lambda: f"sacct: {cluster.run(*fields).stdout}",
        seconds=60,
    )


def test_other_clusters_of_this_machine_are_not_touched(cluster):
    assert os.environ.get("SLURM_CONF") != str(cluster.conf)
    assert not cluster.conf.is_relative_to("/etc")
