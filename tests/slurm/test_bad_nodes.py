import pytest

from livt_scale.config.slurm import Slurm
from livt_scale.slurm.bad_nodes import BAD_NODES, excluding, read_bad_nodes
from livt_scale.slurm.status import look_at


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "slurm").mkdir()
    lines = ["n2\tt1\t7\tgpu 0: busy", "n1\tt2\t8\tno answer", "n2\tt3\t9\tgpu 1:\ttabs", "$(rm)\tt\t1\tx", "n5 cut"]
    (tmp_path / BAD_NODES).write_text("\n".join(lines))
    return tmp_path


def test_the_newest_word_on_each_node_counts_and_damaged_lines_do_not(run_dir):
    assert [(n.name, n.job, n.why) for n in read_bad_nodes(run_dir)] == [
        ("n2", "9", "gpu 1:\ttabs"),
        ("n1", "8", "no answer"),
    ]
    assert read_bad_nodes(run_dir / "none") == []


@pytest.mark.parametrize(
    ("check", "before", "after"),
    [("exclude", None, "n1,n2"), ("exclude", "old[1-3]", "old[1-3],n1,n2"), ("report", "old[1-3]", "old[1-3]")],
)
def test_bad_nodes_stand_beside_those_that_the_recipe_excludes_on_request(run_dir, check, before, after):
    assert excluding(Slurm(check_nodes=check, exclude=before), read_bad_nodes(run_dir)).exclude == after


def test_status_tells_of_them(run_dir):
    assert any("node n2 failed the check of job 9" in note for note in look_at(run_dir).notes)
