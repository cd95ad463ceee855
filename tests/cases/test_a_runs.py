"""A command that is refused, or has nothing to do, changes nothing; a run is where its folder is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from livt_scale.config.load import load_recipe
from livt_scale.config.run_place import check_place
from livt_scale.slurm.srun import Srun
from livt_scale.slurm.status import look_at
from livt_scale.slurm.submit import prepare, scripts
from livt_scale.study.local_runner import check_starts
from livt_scale.study.runs import Run, as_words
from livt_scale.train.compare_run import check_start, compare_run
from livt_scale.train.run import train
from livt_scale.train.run_dir import hold
from livt_scale.util.errors import CheckpointMismatch, LivtError, RunBusyError, UsageError

OTHER = {"stages.finetune.loss.name": "ce", "stages.finetune.epochs": 7, "model.width": 64}


def state_of(folder: Path) -> dict[str, tuple[bytes | None, int]]:
    """The bytes and the time of every file and folder below."""
    return {
        str(p.relative_to(folder)): (p.read_bytes() if p.is_file() else None, p.stat().st_mtime_ns)
        for p in (folder, *sorted(folder.rglob("*")))
    }


def steps_saved(run: Path, stage: str) -> list[str]:
    return sorted(p.name for p in (run / stage / "checkpoints").iterdir())


# --- A1, A2: compare first, write once accepted ---


def test_a1_a_finished_run_of_other_values_is_refused_and_not_written(finished_run, copy_of, tiny_recipe):
    run = copy_of(finished_run)
    before = state_of(run)
    recipe = load_recipe(tiny_recipe, sets=as_words({**OTHER, "run_dir": run}))
    with pytest.raises(UsageError) as refused:
        train(recipe)
    assert refused.value.exit_code == 2
    for field in ("model.width: 32 in {}, 64 here", "stages.finetune.epochs: 2 in {}, 7 here"):
        assert field.format("the finished finetune") in str(refused.value)
    assert "another run_dir" in refused.value.remedy
    assert state_of(run) == before


def test_a1_a_finished_run_started_again_by_its_own_recipe_is_left_as_it_is(finished_run, copy_of, train_tiny):
    run = copy_of(finished_run)
    before = state_of(run)
    train_tiny(run)
    train_tiny(run, {"parallel.timeout_s": 77})  # a field that may always change, but there is nothing to do
    assert state_of(run) == before


def test_a1_a_stage_that_the_recipe_no_longer_has_is_a_difference(finished_run, tiny_recipe):
    sets = {"stages.pretrain": None, "stages.finetune.init": "scratch", "run_dir": finished_run}
    recipe = load_recipe(tiny_recipe, sets=as_words(sets))
    found = {(d.stage, d.change.path): d for d in compare_run(recipe, finished_run)}
    assert found.keys() == {("pretrain", "stages.pretrain"), ("finetune", "stages.finetune.init")}
    assert all(d.finished for d in found.values())


def test_a1_submit_and_study_make_the_same_comparison(finished_run, tiny_recipe):
    before = state_of(finished_run)
    with pytest.raises(UsageError, match="in the finished finetune"):
        prepare(load_recipe(tiny_recipe, sets=as_words({**OTHER, "run_dir": finished_run})))
    with pytest.raises(UsageError, match="in the finished finetune"):
        check_starts([Run("a", tiny_recipe, OTHER)], finished_run.parent)
    assert state_of(finished_run) == before


def test_a2_submit_passes_an_allowed_change_on_to_its_jobs(interrupted_run, tiny_recipe):
    recipe = load_recipe(tiny_recipe, sets=["stages.finetune.epochs=3", f"run_dir={interrupted_run}"])
    with pytest.raises(CheckpointMismatch, match=r"stages\.finetune\.epochs"):
        prepare(recipe)
    prepared = prepare(recipe, allow=["stages.finetune.epochs"])
    texts = dict(zip([job.job for job in prepared.plan.jobs], scripts(prepared, None), strict=True))
    assert {job: "--allow=stages.finetune.epochs" in text for job, text in texts.items()} == {
        "finetune": True,
        "evaluate": False,
    }
    words = Srun(recipe, interrupted_run, Path(), {}).train("finetune", "r.yaml", [], allow=["stages.finetune.epochs"])
    assert words[-1] == "--allow=stages.finetune.epochs"


def test_a1_status_names_a_saved_recipe_that_is_not_what_was_trained(finished_run, copy_of):
    assert look_at(finished_run).notes == []
    run = copy_of(finished_run)
    saved = run / "recipe.yaml"
    saved.write_text(saved.read_text().replace("epochs: 2", "epochs: 7"))
    notes = look_at(run).notes
    assert any("recipe.yaml is not what finetune was trained by: stages.finetune.epochs: 2" in note for note in notes)


def test_a2_an_interrupted_run_keeps_its_recipe_when_a_change_is_refused(interrupted_run, copy_of, train_tiny):
    run = copy_of(interrupted_run)
    before = state_of(run)
    with pytest.raises(CheckpointMismatch, match=r"stages\.finetune\.epochs: 2 in the checkpoint, 7 here"):
        train_tiny(run, {"stages.finetune.epochs": 7})
    assert state_of(run) == before
    train_tiny(run)  # the plain start afterwards
    assert steps_saved(run, "finetune")[-1] == "step-00000008"


def test_a2_an_allowed_change_is_saved_once_it_is_accepted(interrupted_run, copy_of, train_tiny):
    run = copy_of(interrupted_run)
    train_tiny(run, {"stages.finetune.epochs": 3}, allow=["stages.finetune.epochs"])
    assert steps_saved(run, "finetune")[-1] == "step-00000012"
    assert load_recipe(run / "recipe.yaml").stages.finetune.epochs == 3


def test_a2_a_run_that_another_process_trains_is_busy_whatever_differs(interrupted_run, copy_of, train_tiny):
    run = copy_of(interrupted_run)
    with hold(run):  # by another open file than the one that looks
        before = state_of(run)
        with pytest.raises(RunBusyError, match="works in"):
            train_tiny(run, OTHER)
        assert state_of(run) == before
    with pytest.raises(CheckpointMismatch):
        train_tiny(run, OTHER)


CHANGES = {
    "seed": st.integers(1, 9),
    "model.width": st.sampled_from([16, 64]),
    "stages.pretrain.epochs": st.integers(3, 9),
    "stages.pretrain.mask_ratio": st.sampled_from([0.5, 0.6]),
    "stages.finetune.epochs": st.integers(3, 9),
    "stages.finetune.base_lr": st.sampled_from([1e-3, 2e-3]),
    "stages.finetune.loss.name": st.sampled_from(["ce", "bce"]),
    "stages.finetune.global_batch": st.sampled_from([32, 64]),
    "data.many_over": st.sampled_from([30, 50]),
}
drawn_changes = st.lists(st.sampled_from(sorted(CHANGES)), min_size=1, max_size=3, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: CHANGES[name] for name in names})
)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=drawn_changes, finished=st.booleans())
def test_a2_whatever_is_changed_a_refused_command_changes_nothing(
    changes, finished, finished_run, interrupted_run, tiny_recipe
):
    run = finished_run if finished else interrupted_run
    recipe = load_recipe(tiny_recipe, sets=as_words({**changes, "run_dir": run}))
    before = state_of(run)
    with pytest.raises(LivtError) as refused:
        train(recipe)
    assert any(path in str(refused.value) for path in changes)
    with pytest.raises(type(refused.value)):
        check_start(recipe, run)  # what submit and study call
    assert state_of(run) == before


# --- A3, A4: where a run is ---


def test_a3_a_moved_run_resumes_where_it_is(interrupted_run, copy_of, tmp_path):
    run = copy_of(interrupted_run)
    moved = tmp_path / "elsewhere" / "b"
    moved.parent.mkdir()
    run.rename(moved)
    recipe = load_recipe(moved / "recipe.yaml")
    assert recipe.run_dir == str(moved)
    train(recipe)
    assert steps_saved(moved, "finetune")[-1] == "step-00000008"
    assert not run.exists()
    assert load_recipe(moved / "recipe.yaml", sets=[f"run_dir={tmp_path}/new"]).run_dir == f"{tmp_path}/new"


def test_a3_a_recipe_over_the_saved_one_of_a_run_is_another_run(finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("next.yaml").write_text(f"extends: {finished_run}/recipe.yaml\nname: next\n")
    assert load_recipe("next.yaml").run_dir == str(tmp_path / "runs" / "next")


def test_a4_paths_are_absolute_and_run_dir_follows_the_working_directory(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w").mkdir()
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "r.yaml").write_text(
        f"extends: {tiny_recipe}\nstages: {{pretrain: null, finetune: {{init: weights, weights: w}}}}\n"
    )
    recipe = load_recipe("start/r.yaml")
    assert recipe.run_dir == str(tmp_path / "runs" / "tiny")
    assert recipe.stages.finetune.weights == str(tmp_path / "w")
    assert Path(recipe.data.train).is_absolute()
    assert load_recipe("start/r.yaml", sets=["run_dir=a/b"]).run_dir == str(tmp_path / "a" / "b")


@pytest.mark.parametrize("sets", [[], ["run_dir=runs/a"]])
def test_a4_the_same_command_in_another_folder_starts_no_second_run(
    sets, finished_run, tiny_recipe, tmp_path, monkeypatch
):
    project = tmp_path / "project"
    (project / "recipes").mkdir(parents=True)
    (project / "recipes" / "r.yaml").write_text(f"extends: {tiny_recipe}\n")
    run = project / "runs" / ("a" if sets else "tiny")
    shutil.copytree(finished_run, run)
    monkeypatch.chdir(project)
    assert load_recipe("recipes/r.yaml", sets=sets, to_start=True).run_dir == str(run)
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    with pytest.raises(UsageError) as refused:
        load_recipe(project / "recipes" / "r.yaml", sets=sets, to_start=True)
    assert str(run) in str(refused.value)
    assert str(run / "recipe.yaml") in refused.value.remedy
    assert load_recipe(project / "recipes" / "r.yaml", sets=sets).run_dir == str(other / run.relative_to(project))
    absolute = load_recipe(project / "recipes" / "r.yaml", sets=[f"run_dir={other}/x"], to_start=True)
    assert absolute.run_dir == f"{other}/x"
    assert list(other.iterdir()) == []


# --- A6: what cannot be a run ---


@pytest.mark.parametrize(
    "place", ["/", "/etc/livt", "/usr", "/dev", "~", "clone", "file", "foreign", "runs", "project"]
)
def test_a6_what_is_not_a_folder_for_a_run_is_refused_and_not_written(place, tmp_path, finished_run):
    (tmp_path / "file").write_text("x")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "photo.jpg").write_bytes(b"x")
    (tmp_path / "project" / "img").mkdir(parents=True)
    (tmp_path / "project" / "recipe.yaml").write_text("name: mine\n")
    known = {"~": Path.home(), "clone": Path(__file__).parents[2], "runs": finished_run.parent}
    folder = known.get(place, tmp_path / place)
    before = state_of(tmp_path)
    with pytest.raises(UsageError, match="run_dir is "):
        check_place(folder)
    assert state_of(tmp_path) == before


def test_a6_training_into_the_root_is_refused(tiny_recipe):
    with pytest.raises(UsageError, match="run_dir is /, which is not a folder for a run"):
        train(load_recipe(tiny_recipe, sets=["run_dir=/"]))


def test_a6_a_new_or_empty_folder_one_with_logs_and_a_run_may_be_used(tmp_path, finished_run, interrupted_run):
    (tmp_path / "empty").mkdir()
    (tmp_path / "logged").mkdir()
    (tmp_path / "logged" / "train.log").write_text("")
    (tmp_path / "link").symlink_to(finished_run)
    for place in (tmp_path / "new" / "er", tmp_path / "empty", tmp_path / "logged", finished_run, interrupted_run):
        check_place(place)
    check_place(tmp_path / "link")


# --- C9, D1 are in test_c9_quarantine.py and test_d1_scores.py ---


def test_a1_the_facts_of_a_checkpoint_name_the_run(finished_run):
    for stage in ("pretrain", "finetune"):
        newest = finished_run / stage / "checkpoints" / "step-00000008" / "manifest.json"
        facts = json.loads(newest.read_text())["facts"]
        assert facts["run"] == facts["recipe_digest"]
