"""Site profiles: read strictly, told by line, and what a recipe leaves open comes from them."""

import pytest

from livt_scale.config.slurm import Slurm
from livt_scale.slurm.sites import Resources, gpu_options, load_site, resources_for, with_site
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
    half = resources_for(Slurm(gpus_per_node=4), site, "pretrain")
    assert half.cpus_per_task == 12  # half of the cores: the others may be another job's
    slurm = Slurm(nodes=2, gpus_per_node=4, cpus_per_task=3, time_min=500, finetune={"nodes": 1, "time_min": 30})
    assert resources_for(slurm, site, "pretrain") == Resources(2, 4, 4, 3, 500, "gpu")
    assert resources_for(slurm, site, "finetune") == Resources(1, 4, 4, 3, 30, "gpu")


def test_the_evaluation_asks_for_a_gpus_share_of_a_nodes_memory(site):
    assert resources_for(Slurm(memory_gib=900), site, "pretrain").memory_gib == 900
    assert resources_for(Slurm(memory_gib=900), site, "evaluate").memory_gib == 113  # of 8 GPUs, rounded up
    assert resources_for(Slurm(memory_gib=9, tasks_per_node=2), None, "evaluate").memory_gib == 5
    assert resources_for(Slurm(memory_gib=9), None, "evaluate").memory_gib == 9


# --- GPUs with a type, QOS, options, containers ---

SHARED = """\
about: a test
partitions:
  gpu: {time_min: 600, gpus_per_node: 8, gpu_type: a100}
  old: {time_min: 600, gpus_per_node: 4}
default_partition: gpu
gpus_by: gres
qos: {short: {time_min: 60, nodes: 2}, scavenge: {preempt: cancel}}
default_qos: short
constraint: gpu
options: {exclusive: true, licenses: data}
container: {by: pyxis, image: livt.sqsh}
"""


@pytest.fixture
def shared(tmp_path):
    (tmp_path / "shared.yaml").write_text(SHARED)
    return load_site(str(tmp_path / "shared.yaml"))


@pytest.mark.parametrize(
    ("slurm", "job", "expected"),
    [
        ({}, "pretrain", {"gres": "gpu:a100:8"}),
        ({}, "evaluate", {"gres": "gpu:a100:1"}),
        ({"gpus_per_node": 2}, "pretrain", {"gres": "gpu:a100:2"}),
        ({"gpus_per_node": 0}, "pretrain", {}),
        ({"partition": "old"}, "pretrain", {"gres": "gpu:4"}),
        ({"options": {"gres": "ssd:1,gpu:h100"}}, "pretrain", {"gres": "ssd:1,gpu:h100:8"}),
        ({"options": {"gres": "gpu:h100:2"}}, "pretrain", {"gres": "gpu:h100:2"}),
        ({"options": {"gres": "gpu:h100:2"}}, "evaluate", {"gres": "gpu:h100:1"}),
    ],
)
def test_gpus_are_asked_for_by_type_and_number(shared, slurm, job, expected):
    slurm = with_site(Slurm.model_validate(slurm), shared)
    assert gpu_options(resources_for(slurm, shared, job), slurm.options, shared) == expected


@pytest.mark.parametrize(
    ("slurm", "expected"),
    [
        ({"gpus_per_node": 2}, {"gpus-per-node": "2"}),
        ({"gpus_per_node": 2, "options": {"gres": "ssd:1"}}, {"gpus-per-node": "2", "gres": "ssd:1"}),
        ({"options": {"gres": "gpu:2"}}, {"gres": "gpu:2"}),
        ({"options": {"gres": False}}, {}),
        ({}, {}),
    ],
)
def test_without_a_profile_gpus_are_asked_for_as_the_recipe_has_it(slurm, expected):
    slurm = Slurm.model_validate(slurm)
    assert gpu_options(resources_for(slurm, None, "pretrain"), slurm.options, None) == expected


def test_two_numbers_of_gpus_are_refused():
    with pytest.raises(UsageError, match=r"options\.gres asks for 2 GPUs a node, and slurm\.gpus_per_node is 4"):
        resources_for(Slurm(gpus_per_node=4, options={"gres": "gpu:a100:2"}), None, "pretrain")


def test_a_profile_fills_qos_options_and_container_where_the_recipe_has_none(shared):
    filled = with_site(Slurm(options={"exclusive": False, "reservation": "x"}), shared)
    assert (filled.qos, filled.constraint) == ("short", "gpu")
    assert filled.options == {"licenses": "data", "reservation": "x"}
    assert filled.container == shared.container
    own = with_site(Slurm(qos="scavenge", container={"by": "apptainer", "image": "x.sif"}), shared)
    assert (own.qos, own.container.image) == ("scavenge", "x.sif")
    assert with_site(Slurm(), None) == Slurm()


def test_a_qos_limits_time_and_nodes(shared):
    slurm = with_site(Slurm(), shared)
    assert resources_for(slurm, shared, "pretrain").time_min == 60
    with pytest.raises(UsageError, match="nodes would be 3; the site profile's QOS short has at most 2"):
        resources_for(slurm.model_copy(update={"nodes": 3}), shared, "pretrain")
    assert resources_for(with_site(Slurm(qos="scavenge", nodes=9), shared), shared, "pretrain").time_min == 600


@pytest.mark.parametrize(
    ("slurm", "said"),
    [({"python": "/usr/bin/python3"}, "tasks run in a container"), ({"qos": "shrot"}, "Did you mean 'short'")],
)
def test_what_does_not_fit_the_profile_is_refused(shared, slurm, said):
    with pytest.raises(UsageError, match=said):
        with_site(Slurm.model_validate(slurm), shared)


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
        ("about: a test", "about: a test\ndefault_qos: long", "default_qos is 'long'"),
        ("about: a test", "about: a test\noptions: {time: 5}", r"time cannot be an option here: slurm\.time_min"),
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
