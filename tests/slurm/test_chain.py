"""Which jobs a run needs: pure functions of recipe, site, cluster and what is measured."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from livt_scale.config.recipe import Recipe
from livt_scale.config.slurm import Slurm
from livt_scale.slurm.chain import MAX_SEGMENTS, check_times, choose_mode, dependencies, num_segments, plan_chain
from livt_scale.slurm.facts import PartitionFacts, minutes, read_facts
from livt_scale.slurm.sites import Resources, load_site, resources_for
from livt_scale.slurm.step_times import Measured
from livt_scale.util.errors import UsageError
from tests.slurm.fake_slurm import CONFIG, PARTITIONS

FACTS = read_facts(CONFIG, PARTITIONS, frozenset({"lab", "other"}))
NOTHING = Measured()


def recipe(**slurm):
    tree = {"name": "r", "data": {"train": "t"}, "stages": {"pretrain": {}, "finetune": {}}, "slurm": slurm}
    return Recipe.model_validate(tree)


def plan(of, site=None, facts=FACTS, **measured):
    known = {"pretrain": NOTHING, "finetune": NOTHING} | measured
    return plan_chain(of, load_site(site) if site else None, facts, known)


def asked(time_min, *, nodes=1, tasks=1, partition=None):
    return Resources(nodes, tasks, 0, None, time_min, partition)


# --- what the controller says ---


def test_facts_are_read_as_slurm_writes_them():
    assert FACTS.partitions == {
        "normal": PartitionFacts("normal", True, 1440, "off", None, 6),
        "spare": PartitionFacts("spare", False, 720, "requeue"),
        "scrap": PartitionFacts("scrap", False, None, "cancel", 4, up=False),
    }
    assert FACTS.partition(None).name == "normal"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1-12:00:00", 2160), ("30:00", 30), ("02:00:30", 120.5), ("UNLIMITED", None), ("NONE", None)],
)
def test_time_limits_are_read_as_slurm_writes_them(text, expected):
    assert minutes(text) == expected


@pytest.mark.parametrize(
    ("slurm", "said"),
    [
        ({"partition": "sparse"}, "no partition 'sparse' on this cluster. Did you mean 'spare'"),
        ({"account": "lap"}, "'lap', which you cannot charge here. Did you mean 'lab'"),
    ],
)
def test_what_the_cluster_does_not_have_is_refused(slurm, said):
    with pytest.raises(UsageError, match=said):
        plan(recipe(**slurm))


LIMITED = read_facts(CONFIG, PARTITIONS, None, qos="short|cluster|02:00:00|cpu=64,node=2\nlong|cluster||\n")


@pytest.mark.parametrize(
    ("slurm", "wrong", "limits", "remedy"),
    [
        ({"partition": "spare", "time_min": 721}, "slurm.time_min is 721", "720 min", "slurm.time_min=720"),
        (
            {"finetune": {"time_min": 1441}},
            "slurm.finetune.time_min is 1441",
            "6 nodes, 1440",
            "finetune.time_min=1440",
        ),
        ({"evaluate": {"time_min": 1500}}, "evaluate.time_min is 1500", "1440 min", "slurm.evaluate.time_min=1440"),
        ({"partition": "scrap", "nodes": 8}, "slurm.nodes is 8", "at most 4 a job, no time limit", "slurm.nodes=4"),
        (
            {"pretrain": {"nodes": 8}},
            "slurm.pretrain.nodes is 8",
            "partition normal: 6 nodes",
            "slurm.pretrain.nodes=6",
        ),
        ({"qos": "short", "time_min": 121}, "slurm.time_min is 121", "QOS short", "slurm.time_min=120"),
        ({"qos": "short", "nodes": 4}, "slurm.nodes is 4", "QOS short", "slurm.nodes=2"),
    ],
)
def test_what_slurm_would_take_and_never_start_is_refused_with_the_limits(slurm, wrong, limits, remedy):
    tasks = {"tasks_per_node": 1, "mode": "segments", "step_s": 0.1}
    with pytest.raises(UsageError) as told:
        plan(recipe(**tasks, **slurm), facts=LIMITED)
    assert wrong in told.value.message
    assert limits in told.value.message
    assert told.value.remedy.endswith(remedy)


@pytest.mark.parametrize(
    ("slurm", "site", "minutes"),
    [
        ({}, None, 1440),
        ({"partition": "spare"}, None, 720),
        ({"partition": "scrap"}, None, 1440),  # without a limit: a day
        ({"partition": "spare"}, "two_cpu_nodes", 720),  # the profile's 1440 is more than the cluster has
        ({"partition": "spare", "qos": "short"}, None, 120),
        ({"partition": "spare", "time_min": 30}, None, 30),
    ],
)
def test_without_a_time_a_job_asks_for_the_longest_that_is_allowed(slurm, site, minutes):
    of = recipe(signal_lead_s=60, start_s=60, **slurm)
    jobs = {job.job: job.resources.time_min for job in plan(of, site=site, facts=LIMITED).jobs}
    assert jobs == {"pretrain": minutes, "finetune": minutes, "evaluate": 60}


@pytest.mark.parametrize(
    ("slurm", "site", "noted"),
    [
        ({}, None, True),
        ({"gpus_per_node": 0}, None, False),
        ({"gpus_per_node": 4}, None, False),
        ({}, "single_node", False),
    ],
)
def test_that_no_gpu_is_requested_is_noted_where_nobody_decided_it(slurm, site, noted):
    notes = plan(recipe(**slurm), site=site, facts=None).notes
    assert any("no GPU is requested" in note for note in notes) == noted


def test_a_partition_that_is_down_is_told():
    notes = plan(recipe(partition="scrap", pretrain={"segments": 1}, finetune={"segments": 1})).notes
    assert any("partition scrap is not up" in note for note in notes)


def test_a_profile_that_says_other_than_the_cluster_is_told():
    site = load_site("two_cpu_nodes")
    notes = plan_chain(recipe(), site, FACTS, {"pretrain": NOTHING, "finetune": NOTHING}).notes
    assert "partition spare: the site profile has time_min 1440, the cluster 720" in notes
    assert "partition scrap: the site profile has nodes 2, the cluster 4" in notes
    lost = plan(recipe(account="lab"), site="h100_infiniband", facts=None).notes
    assert not any("this cluster" in note for note in lost)


# --- the mode ---


@pytest.mark.parametrize(
    ("slurm", "site", "facts", "mode"),
    [
        ({}, None, FACTS, "requeue"),
        ({"partition": "spare"}, None, FACTS, "requeue"),
        ({"partition": "scrap"}, None, FACTS, "segments"),
        ({"partition": "scrap", "mode": "requeue"}, None, FACTS, "requeue"),
        ({"mode": "segments"}, None, FACTS, "segments"),
        ({}, "a100_slingshot", None, "segments"),  # forbids requeue
        ({}, "h100_infiniband", None, "requeue"),
        ({"partition": "scavenge"}, "a100_slingshot", None, "segments"),
        ({"qos": "preempt"}, "by_qos", None, "segments"),
        ({"qos": "regular"}, "by_qos", None, "requeue"),
        ({"partition": "scrap"}, "two_cpu_nodes", None, "segments"),  # by the profile, without a controller
        ({}, None, None, "requeue"),
    ],
)
def test_the_mode_follows_recipe_then_profile_then_preempt_mode(slurm, site, facts, mode):
    slurm, site = Slurm.model_validate(slurm), load_site(site) if site else None
    assert choose_mode(slurm, site, facts, {"pretrain": resources_for(slurm, site, "pretrain")})[0] == mode


BY_QOS = "\nPreemptMode             = {mode}\nPreemptType             = preempt/qos"


@pytest.mark.parametrize(
    ("cluster", "qos", "mode"),
    [
        ("REQUEUE", "long", "requeue"),  # it says "cluster"
        ("CANCEL", "long", "segments"),
        ("GANG,CANCEL", None, "segments"),
        ("REQUEUE", "scavenge", "segments"),
        ("CANCEL", "kept", "requeue"),
        ("OFF", None, "requeue"),
    ],
)
def test_where_qos_decide_who_is_preempted_the_mode_follows_the_qos_and_not_the_partition(cluster, qos, mode):
    said = "long|cluster\nscavenge|cancel\nkept|requeue\n"
    facts = read_facts(CONFIG + BY_QOS.format(mode=cluster), PARTITIONS, None, qos=said)
    for partition in ("normal", "scrap"):
        slurm = Slurm(partition=partition, qos=qos)
        assert choose_mode(slurm, None, facts, {"pretrain": resources_for(slurm, None, "pretrain")})[0] == mode


def test_without_preemption_by_qos_the_partition_decides_whatever_the_qos_says():
    facts = read_facts(CONFIG, PARTITIONS, None, qos="scavenge|cancel\n")
    slurm = Slurm(partition="normal", qos="scavenge")
    assert choose_mode(slurm, None, facts, {"pretrain": resources_for(slurm, None, "pretrain")})[0] == "requeue"


def test_a_qos_that_the_cluster_does_not_have_is_refused_with_the_nearest():
    facts = read_facts(CONFIG, PARTITIONS, None, qos="normal|cluster\nscavenge|cancel\n")
    with pytest.raises(UsageError, match=r"'scavange'.*") as told:
        plan(recipe(qos="scavange"), facts=facts)
    assert "scavenge" in told.value.remedy


def test_a_qos_that_is_not_given_where_some_cancel_is_told():
    facts = read_facts(CONFIG + BY_QOS.format(mode="REQUEUE"), PARTITIONS, None, qos="scavenge|cancel\n")
    assert any("slurm.qos does not say" in note for note in plan(recipe(), facts=facts).notes)


# --- time ---


@pytest.mark.parametrize(
    ("signal_lead_s", "step_s", "save_s", "fits"),
    [(60, 10, 20, True), (59, 10, 20, False), (60, 30, None, True), (59, 30, None, False)],
)
def test_the_lead_is_at_least_twice_a_step_and_a_save(signal_lead_s, step_s, save_s, fits):
    slurm = Slurm(signal_lead_s=signal_lead_s)
    known = Measured(longest_step_s=step_s, save_s=save_s)
    if fits:
        check_times(slurm, "pretrain", asked(600), known)
    else:
        with pytest.raises(UsageError, match=r"--set slurm\.signal_lead_s=60"):
            check_times(slurm, "pretrain", asked(600), known)


def test_a_planned_step_and_save_win_over_measured_ones():
    slurm = Slurm(signal_lead_s=60, step_s=1, save_s=2)
    assert check_times(slurm, "pretrain", asked(600), Measured(longest_step_s=100, save_s=500)) == []


def test_what_is_not_known_is_told():
    (note,) = check_times(Slurm(save_s=3), "finetune", asked(600), NOTHING)
    assert "how long a step takes is not known yet" in note


@pytest.mark.parametrize(("time_min", "fits"), [(8, False), (9, True)])
def test_a_job_too_short_for_any_progress_is_refused(time_min, fits):
    slurm = Slurm(
        start_s=120, signal_lead_s=300, step_s=2, save_s=10
    )  # 120 + 300 + 60 (the signal may be early) + 12 = 492 s
    if fits:
        check_times(slurm, "pretrain", asked(time_min), NOTHING)
    else:
        with pytest.raises(UsageError, match=r"makes no progress.*Ask for more than 9 min"):
            check_times(slurm, "pretrain", asked(time_min), NOTHING)


@pytest.mark.parametrize("time_min", [6, 8])  # stopped before it has started, and as it has
def test_jobs_that_never_train_are_not_counted(time_min):
    with pytest.raises(UsageError, match="makes no progress"):
        num_segments(Slurm(), "pretrain", asked(time_min), Measured(total=10_000, planned_step_s=1.0))


def test_the_runs_own_clock_may_stop_it_before_slurm_does():
    slurm = Slurm(
        start_s=0, signal_lead_s=10, step_s=1
    )  # a save not yet measured is taken for 30 s: 2 · (1 + 30) = 62, under 70
    with pytest.raises(UsageError, match="stopped 70 s"):
        check_times(slurm, "pretrain", asked(1), NOTHING)
    with pytest.raises(UsageError, match="stopped 200 s"):
        check_times(Slurm(start_s=0, signal_lead_s=140, step_s=10, save_s=60), "pretrain", asked(3), NOTHING)


# --- segments ---


def test_segments_are_what_is_left_over_what_a_job_trains_and_one_to_spare():
    slurm = Slurm(start_s=120, signal_lead_s=300)
    known = Measured(step=1000, total=11_000, step_s=2.0, save_s=5.0, longest_step_s=3.0, world_size=8)
    count, how = num_segments(slurm, "pretrain", asked(128, nodes=1, tasks=8), known)
    assert count == 4  # 20000 s over 7200 s a job is 2.8
    assert "10000 steps · 2 s (measured) / 7200 s" in how


def test_a_step_measured_on_fewer_ranks_is_taken_to_shrink_with_more():
    known = Measured(total=10_000, step_s=4.0, world_size=4)
    assert num_segments(Slurm(), "pretrain", asked(128, tasks=8), known)[0] == 4


def test_a_given_number_of_segments_holds():
    assert num_segments(Slurm(pretrain={"segments": 7}), "pretrain", asked(60), NOTHING)[0] == 7


def test_a_given_number_of_segments_without_effect_is_told():
    made = plan(recipe(pretrain={"segments": 7}))
    assert made.jobs[0].name == "pretrain"
    assert [note for note in made.notes if "slurm.pretrain.segments has no effect" in note]


def test_an_unknown_step_time_gives_two_segments_and_says_so():
    count, how = num_segments(Slurm(), "pretrain", asked(60), Measured(total=5))
    assert count == 2
    assert "2 segments, because a step's time is not known" in how


def test_one_preemption_ends_no_chain():
    """Each stage has a segment for what is left; of one that is given, a person has decided."""
    last_step = Measured(step=99, total=100, step_s=1.0, save_s=1.0)
    jobs = plan(recipe(partition="scrap", finetune={"segments": 1}), pretrain=last_step).jobs
    names = ["pretrain-1", "pretrain-2", "finetune", "evaluate-1", "evaluate-2"]
    assert [job.name for job in jobs] == names
    waits = [[(kind, names[k]) for kind, k in dependencies(jobs, number)] for number in range(len(names))]
    assert waits == [
        [],
        [("afterany", "pretrain-1")],
        [("afterok", "pretrain-2")],
        [("afterok", "finetune")],
        [("afterok", "finetune"), ("afterany", "evaluate-1")],
    ]


def test_too_many_segments_are_a_mistake():
    with pytest.raises(UsageError, match=f"more than {MAX_SEGMENTS}"):
        num_segments(Slurm(step_s=1000), "pretrain", asked(60), Measured(total=100_000))


@given(
    left=st.integers(0, 10**6),
    step_s=st.floats(0.01, 60),
    time_min=st.integers(20, 2880),
    signal_lead_s=st.integers(10, 600),
)
def test_the_planned_segments_are_enough_and_no_more_than_one_too_many(left, step_s, time_min, signal_lead_s):
    slurm = Slurm(step_s=step_s, signal_lead_s=signal_lead_s, save_s=1)
    useful_s = time_min * 60 - slurm.start_s - max(signal_lead_s + 60, 2 * (step_s + 1), 10)
    try:
        count, _ = num_segments(slurm, "pretrain", asked(time_min), Measured(total=left))
    except UsageError:
        assert left * step_s / useful_s > MAX_SEGMENTS - 2
        return
    assert (count - 1) * useful_s >= left * step_s * (1 - 1e-9)
    assert (count - 2) * useful_s < left * step_s or left == 0
