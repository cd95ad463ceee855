"""B: whatever is impossible is reported before the first step, with a remedy that leads somewhere."""

from __future__ import annotations

import errno
import fcntl
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from livt_scale.cli.recipe import check_one
from livt_scale.config.load import load_recipe, to_yaml
from livt_scale.config.recipe import Recipe
from livt_scale.data.build.builder import build
from livt_scale.data.build.spec import load_spec
from livt_scale.data.classes import TrainingClasses, read_group_counts
from livt_scale.data.shard_set import SetFacts
from livt_scale.evaluation.logits import load_outputs, save_outputs
from livt_scale.evaluation.per_class import class_rows
from livt_scale.export.write_export import export_run
from livt_scale.longtail import shot_groups
from livt_scale.posthoc.evaluate_path import evaluate_path
from livt_scale.slurm import submit
from livt_scale.study.local_runner import check_runs
from livt_scale.study.runs import Run, as_words
from livt_scale.train.preflight import Problem, check_run, first_checkpoints_bytes, refuse
from livt_scale.train.run import train
from livt_scale.util.errors import RecipeError
from tests.scripts import load_script
from tests.small_sets import write_image_folder

# --- the sets and the recipe that all use ---


@pytest.fixture
def recipe(tiny_recipe: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """`recipe(data__val="x")`: the tiny recipe with a run directory in tmp_path."""

    def load(**changes: Any) -> Recipe:
        sets = {name.replace("__", "."): value for name, value in changes.items()}
        return load_recipe(tiny_recipe, sets=as_words({"run_dir": tmp_path / "runs" / "a", **sets}))

    return load


@pytest.fixture(scope="session")
def other_sets(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`other_sets("cat", "dog")`: the folder of a set of these classes, two images of each."""
    made: dict[tuple[str, ...], Path] = {}

    def make(*names: str, per_class: int = 2) -> Path:
        if names not in made:
            folder = tmp_path_factory.mktemp("other")
            images = write_image_folder(folder / "img", dict.fromkeys(names, per_class))
            spec = folder / "spec.yaml"
            text = {
                "name": "other",
                "class_names": list(names),
                "sources": {"all": {"folder": {"root": str(images)}}},
                "sets": {"val": {"source": "all"}},
            }
            spec.write_text(json.dumps(text))
            build(load_spec(spec), folder / "out", workers=1)
            made[names] = folder / "out" / "val"
        return made[names]

    return make


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def fields(problems: list[Problem]) -> list[str]:
    return [problem.field for problem in problems]


def refusals(recipe: Recipe, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What each caller of the pre-flight says of `recipe`, which each must refuse before it writes anything."""
    before = files_below(tmp_path)
    file = tiny_recipe.parent / "saved.yaml"
    file.write_text(to_yaml(recipe))
    monkeypatch.setenv("PATH", "/nowhere")  # no Slurm
    run = Run("a", file, {}, recipe.stage_names[-1], place=".")
    checked = check_one(file, sets=[], data=True)
    said = {"check": "\n".join(checked["errors"])}
    assert checked["exit_code"] == 2
    calls: dict[str, Callable[[], object]] = {
        "train": lambda: train(recipe),
        "submit": lambda: submit.prepare(recipe),
        "study and reproduce": lambda: check_runs([run], Path(recipe.run_dir or "")),
    }
    for name, call in calls.items():
        with pytest.raises(RecipeError) as caught:
            call()
        assert caught.value.exit_code == 2
        said[name] = str(caught.value)
    assert files_below(tmp_path) == before
    return said


# --- B1: more images in a step than there are ---


def test_b1_a_global_batch_larger_than_the_set(recipe, tiny_recipe, tmp_path, monkeypatch):
    of = recipe(**{"stages__*__global_batch": 128})
    problems = check_run(of)
    assert fields(problems) == ["stages.pretrain.global_batch", "stages.finetune.global_batch"]
    assert all("75 samples" in p.what and p.remedy == "set global_batch to at most 75" for p in problems)
    for name, said in refusals(of, tiny_recipe, tmp_path, monkeypatch).items():
        assert "stages.finetune.global_batch: the set has 75 samples" in said, name


def test_b1_a_global_batch_that_ranks_cannot_share_and_groups_of_lanes_that_do_not_divide_it(recipe):
    assert check_run(recipe(), world_sizes={"pretrain": 4, "finetune": 4}) == []
    (uneven,) = check_run(recipe(), world_sizes={"pretrain": 3, "finetune": 4})
    assert (uneven.field, uneven.where) == ("stages.pretrain.global_batch", "3 ranks")
    (lanes, _) = check_run(recipe(data__lane_groups=3))
    assert "lane_groups is 3" in lanes.what


def test_b1_a_class_that_the_loss_or_the_sampler_cannot_do_without(recipe, other_sets):
    alone = recipe(
        data__train=other_sets("cat"), data__val=None, **{"stages__*__global_batch": 2, "stages__*__micro_batch": 2}
    )
    assert fields(check_run(alone)) == ["stages.finetune.loss"]


# --- B2: the evaluation set has other classes ---


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (("cat", "dog", "eel"), "3 against 4; only in the first: none; only in the second: 'fox'"),
        (("cat", "dog", "eel", "gnu"), "only in the first: 'gnu'; only in the second: 'fox'"),
        (("dog", "cat", "eel", "fox"), "another order: class 0 is 'dog' against 'cat'"),
    ],
)
def test_b2_an_evaluation_set_of_other_classes(names, what, recipe, other_sets, tiny_recipe, tmp_path, monkeypatch):
    of = recipe(data__val=other_sets(*names))
    (problem,) = check_run(of)
    assert (problem.field, problem.where) == ("data.val", str(other_sets(*names)))
    assert what in problem.what
    if len(names) == 3:
        assert all(what in said for said in refusals(of, tiny_recipe, tmp_path, monkeypatch).values())


# --- B3: a set is missing, or part of it ---


def test_b3_a_missing_evaluation_set(recipe, tiny_recipe, tmp_path, monkeypatch):
    of = recipe(data__val=tmp_path / "no val")
    (problem,) = check_run(of)
    assert (problem.field, problem.where, problem.absent) == ("data.val", str(tmp_path / "no val"), True)
    assert all("no val" in said for said in refusals(of, tiny_recipe, tmp_path, monkeypatch).values())


def test_b3_a_missing_set_with_its_spec_beside_it_names_the_command_that_builds_it(recipe, tmp_path):
    (tmp_path / "photos.yaml").touch()
    (problem,) = check_run(recipe(data__train=tmp_path / "photos" / "train", data__val=None))
    assert problem.remedy == f"build it: livt shards build {tmp_path / 'photos.yaml'}"


def test_b3_a_set_that_lost_a_shard(recipe, tiny_shards, tmp_path):
    val = Path(shutil.copytree(tiny_shards / "val", tmp_path / "val"))
    shard = next(val.glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    (problem,) = check_run(recipe(data__val=val))
    assert shard.name in problem.what
    assert not problem.absent


def test_b3_a_login_node_that_sees_none_of_the_sets_notes_it(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    prepared = submit.prepare(recipe(data__train="/no/train", data__val="/no/val"))
    assert [note for note in prepared.plan.notes if "seen from here" in note] == [
        "data.train: there is no /no/train, seen from here; the nodes need it there",
        "data.val: there is no /no/val, seen from here; the nodes need it there",
    ]


# --- B4: groups by the counts of another set ---


def test_b4_the_balanced_twin_has_the_groups_of_the_long_tail():
    data = load_recipe("livt:imagenet_bal/vit_b16").data
    twin = TrainingClasses(tuple(map(str, range(1000))), (160,) * 1000, "twin")
    counts = read_group_counts(data, twin)
    assert (len(counts), sum(counts)) == (1000, 115_846)
    groups = shot_groups(counts)
    assert {name: len(classes) for name, classes in groups.items()} == {"many": 385, "medium": 479, "few": 136}


def test_b4_a_run_reports_by_those_groups_in_training_in_evaluation_and_from_its_export(
    train_tiny, tmp_path, tiny_shards
):
    (tmp_path / "counts.json").write_text("[5, 15, 100, 100]")
    sets = {"data.group_counts": tmp_path / "counts.json", "stages.pretrain": None, "stages.finetune.init": "scratch"}
    sets |= {"stages.finetune.epochs": 1, "data.train": tiny_shards / "val", "stages.finetune.layer_decay": 1.0}
    run_dir = tmp_path / "run"
    train_tiny(run_dir, sets)
    groups = ["few", "medium", "many", "many"]
    in_training = json.loads((run_dir / "finetune" / "eval.json").read_text())
    assert [row["group"] for row in in_training["per_class"]] == groups
    assert [row["train_images"] for row in in_training["per_class"]] == [6] * 4, "priors stay those of the set"
    (tmp_path / "counts.json").unlink()  # the run is complete without it
    export_run(run_dir, tmp_path / "export")
    for path in (run_dir, tmp_path / "export"):
        done = evaluate_path(path, data=tiny_shards / "val", keep=True)
        assert done.report["top1"] == in_training["top1"]
        assert done.outputs is not None
        save_outputs(done.outputs, tmp_path / "logits.safetensors")
        assert [row.group for row in class_rows(load_outputs(tmp_path / "logits.safetensors"))] == groups


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[1, 2, 3]", "has 3 counts, but .* has 4 classes"),
        ('{"a": 1}', "is not a list of whole numbers"),
        ("[1, 2, 3, -4]", "is not a list of whole numbers"),
        ("[1, 2, 3, true]", "is not a list of whole numbers"),
        ("[", "cannot be read"),
    ],
)
def test_b4_counts_that_cannot_be_used(text, what, recipe, tmp_path):
    (tmp_path / "counts.json").write_text(text)
    (problem,) = check_run(recipe(data__group_counts=tmp_path / "counts.json"))
    assert problem.field == "data.group_counts"
    assert re.search(what, problem.what)


def test_b4_a_set_or_its_manifest_gives_the_counts_and_must_have_the_classes(recipe, tiny_shards, other_sets):
    for place in (tiny_shards / "val", tiny_shards / "val" / "manifest.json"):
        of = recipe(data__group_counts=place)
        assert check_run(of) == []
        assert TrainingClasses.of(SetFacts.read(of.data.train), of.data).group_counts == (6, 6, 6, 6)
    (problem,) = check_run(recipe(data__group_counts=other_sets("cat", "dog", "eel", "gnu")))
    assert "do not have the same classes" in problem.what
    (problem,) = check_run(recipe(data__group_counts="livt:imagenet_lx"))
    assert problem.remedy == "did you mean 'imagenet_lt'? Valid names: imagenet_lt, inat18, inat18_as_text"


# --- what a run starts from, and where it is written ---


def test_b_weights_to_start_from(recipe, finished_run, tmp_path):
    def of(weights: Path, **more: Any) -> list[Problem]:
        sets = {"stages__pretrain": None, "stages__finetune__init": "weights", "stages__finetune__weights": weights}
        return check_run(recipe(**sets, **more))

    (tmp_path / "weights.pkl").touch()
    (tmp_path / "weights.pth").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun" / "pretrain").mkdir(parents=True)
    assert of(finished_run) == of(tmp_path / "weights.pth") == []
    said = {
        name: of(tmp_path / name)[0].what.replace(str(tmp_path), "")
        for name in ("none.pth", "weights.pkl", "empty", "begun")
    }
    assert said == {
        "none.pth": "there is no /none.pth",
        "weights.pkl": "/weights.pkl: .pkl is no known kind of weights",
        "empty": "/empty: it has none of model.safetensors, pytorch_model.bin, checkpoint.pth",
        "begun": "the pretraining of the run /begun is not done",
    }
    assert fields(of(finished_run, stages__finetune__keep_head=True)) == ["stages.finetune.weights"]


def test_b_a_disk_without_room_for_the_first_checkpoints(recipe, monkeypatch, finished_run):
    of = recipe()
    train = SetFacts.read(of.data.train)
    saved = [
        sum(file.stat().st_size for file in (finished_run / stage / "checkpoints").rglob("*") if file.is_file())
        for stage in ("pretrain", "finetune")
    ]
    for stage, size in zip(of.stage_names, saved, strict=True):  # two saves each, and there are no more
        assert first_checkpoints_bytes(of, [stage], train) == pytest.approx(size, rel=0.15)
    needed = first_checkpoints_bytes(of, of.stage_names, train)
    assert needed == pytest.approx(saved[0] / 2 + saved[1], rel=0.15)
    free = shutil.disk_usage("/")._replace(free=needed - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    (problem,) = check_run(of)
    assert problem.field == "run_dir"
    assert "the first checkpoints take" in problem.what


def test_b_a_disk_with_room_for_each_run_of_a_study_but_not_for_all(recipe, tiny_recipe, tmp_path, monkeypatch):
    of = recipe()
    one = first_checkpoints_bytes(of, ["pretrain"], SetFacts.read(of.data.train))  # two checkpoints, all that it keeps
    runs = [Run(f"seed-{k}", tiny_recipe, {"seed": k}, "pretrain") for k in range(3)]
    for free, fits in ((3 * one + one // 2, True), (3 * one, False)):
        usage = shutil.disk_usage("/")._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        if fits:
            check_runs(runs, tmp_path)
            continue
        with pytest.raises(RecipeError, match="the runs keep") as error:
            check_runs(runs, tmp_path)
        assert error.value.message.count("run_dir") == 1  # each alone would fit


def test_b_a_cache_without_room_for_a_shard_at_a_url(recipe, tiny_shards, tmp_path):
    urls = {f"data__{name}": (tiny_shards / name).as_uri() for name in ("train", "val")}
    largest = max((tiny_shards / "train").glob("*.tar"), key=lambda path: path.stat().st_size).stat().st_size
    for gib, fits in ((2 * largest / 2**30, False), (1.0, True)):
        found = check_run(recipe(**urls, data__cache={"dir": str(tmp_path), "limit_gib": gib, "ahead": 2}))
        assert {problem.field for problem in found} == (set() if fits else {"data.cache.limit_gib"})


def test_b_a_run_directory_that_cannot_be_written_or_locked(recipe, monkeypatch, tmp_path):
    (problem,) = check_run(recipe(run_dir="/proc/livt/run"))
    assert problem.field == "run_dir"
    assert problem.what.startswith("/proc/livt/run cannot be written")

    def missing(handle: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    (problem,) = check_run(recipe())
    assert (problem.field, problem.where) == ("run_dir", str(tmp_path))
    assert "flock" in problem.what
    assert files_below(tmp_path) == []


# --- the whole of it ---


def test_b_every_problem_is_reported_in_one_go(recipe, tmp_path):
    of = recipe(data__val=tmp_path / "none", run_dir="/proc/livt/run", **{"stages__*__global_batch": 128})
    found = check_run(of, world_sizes={"pretrain": 3, "finetune": 1})
    assert fields(found) == [
        "data.val", "stages.pretrain.global_batch", "stages.pretrain.global_batch", "stages.finetune.global_batch",
        "run_dir",
    ]  # fmt: skip
    with pytest.raises(RecipeError) as caught:
        refuse(found)
    assert all(str(problem) in str(caught.value) for problem in found)


def test_b_a_finished_run_is_not_looked_at_again(recipe, tmp_path, finished_run):
    shutil.copytree(finished_run, tmp_path / "runs" / "a")
    gone = recipe(data__train="/gone", data__val="/gone")
    assert check_run(gone) == []
    assert fields(check_run(gone, stages=gone.stage_names)) == ["data.train", "data.val"]


@given(
    batch=st.integers(1, 90), micro=st.integers(1, 90), ranks=st.integers(1, 9), lanes=st.none() | st.integers(1, 12),
    repeats=st.integers(1, 3), mixup=st.booleans(), policy=st.sampled_from(["instance", "sqrt"]),
)  # fmt: skip
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_b_batches_are_accepted_exactly_where_an_epoch_can_be_dealt_out(
    recipe, batch, micro, ranks, lanes, repeats, mixup, policy
):
    """Against the arithmetic, written once more: 75 samples, slots of a rank, views of an image, pairs of mixup."""
    micro = 1 + micro % batch
    sets = {"micro_batch": micro, "global_batch": batch, "repeats": repeats, "mixup": 0.8 * mixup}
    sets |= {"sampling__policy": policy}
    try:
        of = recipe(
            stages__pretrain=None, stages__finetune__init="scratch", stages__finetune__layer_decay=1.0,
            data__lane_groups=lanes, **{f"stages__finetune__{name}": value for name, value in sets.items()},
        )  # fmt: skip
    except RecipeError:
        return  # refused by the recipe alone
    slots, odd = divmod(batch, ranks)
    fits = (
        batch <= 75
        and not odd
        and not (mixup and slots % 2)
        and slots % min(micro, slots) == 0
        and (policy != "instance" or not lanes or (batch // repeats) % lanes == 0)
    )
    assert (check_run(of, world_sizes={"finetune": ranks}) == []) == fits


def test_b_a_set_of_a_billion_samples_is_checked_in_seconds(recipe, tmp_path):
    """2,000 shards here; benchmarks/preflight.py has 100,000."""
    names = ["cat", "dog", "eel", "fox"]
    benchmark = load_script(Path(__file__).parents[2] / "benchmarks" / "preflight.py")
    folder = benchmark.simulated_set(tmp_path / "large", num_shards=2000, num_samples=10**9, class_names=names)
    of = recipe(data__train=folder, **{"stages__*__global_batch": 4096, "stages__*__micro_batch": 4096})
    began = time.process_time()
    assert check_run(of) == []
    assert time.process_time() - began < 3
