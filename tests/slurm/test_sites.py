"""Site profiles: read strictly, told by line, and what a recipe leaves open comes from them."""

import pytest

from livt_scale.config.slurm import Slurm
from livt_scale.slurm.sites import Resources, load_site, resources_for
from livt_scale.util.errors import RecipeError, UsageError
from livt_scale.util.resources import shipped

SITE = """\
about: a test
partitions:
  gpu: {time_min: 600, nodes: 4, gpus_per_node: 8, cpus_per_node: 100}
  cpu: {time_min: 60, cpus_per_node: 4}
default_partition: gpu
"""


@pytest.fixture
def site(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(SITE)
    return load_site(str(path))


@pytest.mark.parametrize("path", sorted(shipped("slurm/sites").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_profiles_that_ship_are_sound(path):
    site = load_site(path.stem)
    for job in ("pretrain", "finetune", "evaluate"):
        assert resources_for(Slurm(), site, job).partition == site.default_partition


def test_a_profile_fills_what_the_recipe_leaves_open(site):
    assert resources_for(Slurm(nodes=2), site, "pretrain") == Resources(2, 8, 8, 12, 600, "gpu")
    assert resources_for(Slurm(nodes=2), site, "evaluate") == Resources(
        1, 1, 1, 12, 60, "gpu"
    )  # one GPU, and its share of the cores
    assert resources_for(Slurm(nodes=1, partition="cpu"), site, "finetune") == Resources(1, 1, 0, 4, 60, "cpu")


def test_the_recipes_own_values_win_and_a_stages_over_them(site):
    slurm = Slurm(nodes=2, gpus_per_node=4, cpus_per_task=3, time_min=500, finetune={"nodes": 1, "time_min": 30})
    assert resources_for(slurm, site, "pretrain") == Resources(2, 4, 4, 3, 500, "gpu")
    assert resources_for(slurm, site, "finetune") == Resources(1, 4, 4, 3, 30, "gpu")


def test_without_a_profile_nothing_is_asked_that_nobody_said():
    assert resources_for(Slurm(), None, "pretrain") == Resources(1, 1, 0, None, 1440, None)


@pytest.mark.parametrize(
    ("slurm", "said"),
    [
        ({"nodes": 5}, "nodes would be 5.*partition gpu has at most 4"),
        ({"time_min": 601}, "time_min would be 601.*at most 600"),
        ({"gpus_per_node": 9}, "gpus_per_node would be 9"),
        ({"cpus_per_task": 13}, "CPUs of a node would be 104.*at most 100"),
        ({"partition": "gpus"}, "Did you mean 'gpu'"),
    ],
)
def test_more_than_a_site_has_is_refused(site, slurm, said):
    with pytest.raises(UsageError, match=said):
        resources_for(Slurm.model_validate(slurm), site, "pretrain")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("nodes: 4", "node: 4", r"line 3: there is no field partitions\.gpu\.node: did you mean 'nodes'"),
        ("default_partition: gpu", "default_partition: big", "default_partition is 'big'"),
        (
            "about: a test",
            "about: a test\nrequeues: true",
            "line 2: there is no field requeues: did you mean 'requeue'",
        ),
        ("time_min: 600", "time_min: '600'", r"line 3: partitions\.gpu\.time_min"),
        ("  gpu: {", "  'a b': {", "partitions"),
    ],
)
def test_a_mistake_in_a_profile_is_told_by_line(tmp_path, old, new, said):
    path = tmp_path / "bad.yaml"
    assert old in SITE
    path.write_text(SITE.replace(old, new))
    with pytest.raises(UsageError, match=said):
        load_site(str(path))


def test_a_profile_that_is_not_there_or_no_yaml(tmp_path):
    with pytest.raises(UsageError, match=r"Did you mean 'single_node'"):
        load_site("singel_node")
    (tmp_path / "x.yaml").write_text("a: [")
    with pytest.raises(RecipeError):
        load_site(str(tmp_path / "x.yaml"))
