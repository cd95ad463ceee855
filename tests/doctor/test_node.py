import pytest
import torch
from typer.testing import CliRunner

from livt_scale.cli.main import app
from livt_scale.doctor import checks
from livt_scale.doctor.node import judge_given_gpus, judge_gpu, judge_shared, look_at_node, multiplies_exactly


def test_a_node_that_is_well_says_so_in_a_file_of_its_own_name(tmp_path):
    assert {finding.status for finding in look_at_node(tmp_path, {"SLURMD_NODENAME": "n7"})} <= {"note"}
    assert (tmp_path / "n7").read_text() == "ok\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has GPUs")
def test_gpus_that_slurm_gave_and_torch_does_not_see_are_a_problem(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    assert CliRunner().invoke(app, ["doctor", "--node", str(tmp_path)]).exit_code == 1
    assert (tmp_path / "n7").read_text() == "gpus: Slurm gave this job 2 GPUs here, and torch sees 0\n"


def test_a_check_that_breaks_is_a_problem_and_the_others_are_made(tmp_path, monkeypatch):
    def breaks():
        raise RuntimeError("uncorrectable ECC error")

    monkeypatch.setattr(checks, "free_shared_memory", breaks)
    findings = look_at_node(tmp_path, {"SLURMD_NODENAME": "n7"})
    problems = [finding for finding in findings if finding.status == "problem"]
    assert len(problems) == 1
    assert "uncorrectable ECC" in (tmp_path / "n7").read_text()
    assert problems[0].name == "shared memory"


@pytest.mark.parametrize(
    ("finding", "status"),
    [
        (judge_given_gpus(8, 8), "ok"),
        (judge_given_gpus(8, 7), "problem"),
        (judge_given_gpus(0, 4), "ok"),
        (judge_gpu("gpu 0", free=79, total=80, is_right=True), "ok"),
        (judge_gpu("gpu 0", free=60, total=80, is_right=True), "problem"),
        (judge_gpu("gpu 0", free=79, total=80, is_right=False), "problem"),
        (judge_shared(None), "ok"),
        (judge_shared(63 * 2**20), "problem"),
        (judge_shared(64 * 2**20), "ok"),
    ],
)
def test_judgements(finding, status):
    assert finding.status == status


def test_whole_numbers_are_multiplied_exactly():
    assert multiplies_exactly(torch.device("cpu"))
