"""Shipped files are found in a clone and in a wheel; without them the first use reports it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from livt_scale.config.load import load_recipe
from livt_scale.data.shard_set import ShardSet
from livt_scale.util.errors import InstallationError, RecipeError, UsageError
from livt_scale.util.resources import named, names_of, root, shipped
from tests.small_sets import write_idx

CLONE = Path(__file__).resolve().parents[2]
FOLDERS = ("recipes", "shards", "slurm", "studies")


def test_in_a_clone_the_files_are_those_at_the_top():
    assert root() == CLONE
    assert shipped("recipes/base/livt.yaml") == CLONE / "recipes/base/livt.yaml"


def test_a_package_without_its_files_reports_it(monkeypatch, tmp_path):
    package = tmp_path / "livt_scale"
    package.mkdir()
    (tmp_path / "recipes").mkdir()  # somebody else's
    monkeypatch.setattr("livt_scale.util.resources.files", lambda _: package)
    for use in (root, lambda: shipped("slurm/sites"), lambda: named("livt:base/livt", kind="recipes")):
        with pytest.raises(InstallationError) as raised:
            use()
        assert str(package / "shipped") in raised.value.message
        assert raised.value.remedy


def test_one_file_that_is_missing_is_named(monkeypatch, tmp_path):
    file = tmp_path / "livt_scale" / "shipped" / "recipes" / "base" / "livt.yaml"
    file.parent.mkdir(parents=True)
    file.touch()
    monkeypatch.setattr("livt_scale.util.resources.files", lambda _: tmp_path / "livt_scale")
    assert shipped("recipes/base/livt.yaml") == file
    with pytest.raises(InstallationError, match="slurm"):
        shipped("slurm")


@pytest.mark.parametrize("kind", ["recipes", "shards", "studies"])
def test_every_name_means_a_file_with_or_without_its_ending(kind):
    names = names_of(kind)
    assert names
    for name in names:
        assert (
            named(f"livt:{name}", kind=kind) == named(f"livt:{name}.yaml", kind=kind) == CLONE / kind / f"{name}.yaml"
        )
    assert named("a/b.yaml", kind=kind) == Path("a/b.yaml")


@pytest.mark.parametrize("name", ["", "../setup", "/etc/passwd", "base/livtt", "x"])
def test_another_name_is_wrong_usage_and_leads_nowhere(name):
    with pytest.raises(UsageError) as raised:
        named(f"livt:{name}", kind="recipes")
    assert raised.value.remedy.startswith("did you mean" if name.startswith("base") else "valid names")


def test_a_recipe_anywhere_extends_a_shipped_one(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("extends: [livt:base/livt, livt:base/imagenet_lt]\nname: mine\nmodel: {size: vit_s}\n")
    mine, theirs = load_recipe(file), load_recipe("livt:imagenet_lt/vit_b16")
    assert mine.stage("pretrain").epochs == theirs.stage("pretrain").epochs == 800
    assert mine.data.mean == theirs.data.mean

    file.write_text("name: mine\nextends: livt:base/livtt\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml, line 2: extends") as raised:
        load_recipe(file)
    assert raised.value.remedy == "did you mean 'base/livt'?"


# --- a wheel ---


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel of this working tree and nothing else in it."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for path in tracked():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(CLONE / path, source / path)
    big = source / "shards" / "mine" / "train" / "a.tar"  # a set that was built in the clone
    big.parent.mkdir(parents=True)
    big.touch()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "lib"), str(wheel)], check=True)
    return folder / "lib"


def tracked():
    """Files of the package and what is built into it, as git knows them, with those not yet added."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "setup.py", "pyproject.toml", "README.md",
         "LICENSE", "livt_scale", *FOLDERS],
        cwd=CLONE, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [path for path in listed.stdout.splitlines() if (CLONE / path).is_file()]


def livt(installed, cwd, *words, expect=0):
    """stdout of the installed command, outside the clone."""
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-m", "livt_scale", *map(str, words)], cwd=cwd, env=environ, capture_output=True, text=True
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_wheel_holds_what_a_clone_holds_and_nothing_that_was_built_there(installed):
    root = installed / "livt_scale" / "shipped"
    found = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert found == {path for path in tracked() if path.startswith(tuple(f"{folder}/" for folder in FOLDERS))}
    code = {str(path.relative_to(installed)) for path in (installed / "livt_scale").rglob("*.py")}
    assert code == {path for path in tracked() if path.startswith("livt_scale/") and path.endswith(".py")}


@pytest.mark.slow
def test_an_installed_wheel_needs_no_clone(installed, tmp_path):
    assert "livt:imagenet_lt/vit_b16\n" in livt(installed, tmp_path, "recipe", "list")
    assert "Usage" in livt(installed, tmp_path, "quickstart", "--help")
    shards = installed / "livt_scale" / "shipped" / "shards" / "fashion-mnist-lt"
    assert f"train: {shards}/train-lt" in livt(
        installed, tmp_path, "recipe", "show", "livt:fashion_mnist_lt/quickstart"
    )
    script = livt(installed, tmp_path, "submit", "livt:imagenet_lt/vit_b16", "--set=slurm.time_min=60", "--dry-run")
    assert "#SBATCH" in script
    assert "hours" in livt(installed, tmp_path, "reproduce", "losses", "--dry-run")
    assert "not run" in livt(installed, tmp_path, "study", "status", "livt:fashion_mnist_lt/rates")
    nowhere = [f"--source={name}={tmp_path}/none" for name in ("train", "test")]
    wrong = livt(installed, tmp_path, "shards", "build", "livt:cifar10-lt", *nowhere, expect=1)
    assert f"{tmp_path}/none" in wrong


@pytest.mark.slow
def test_an_installed_wheel_builds_a_shipped_spec_where_recipes_look_for_it(installed, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    for name, per_class in (("train", 1000), ("t10k", 100)):  # under the names of Fashion-MNIST
        classes = (np.arange(10 * per_class) % 10).astype(np.uint8)
        pixels = np.random.default_rng(0).integers(0, 256, (len(classes), 28, 28), dtype=np.uint8)
        write_idx(raw / f"{name}-images-idx3-ubyte.gz", pixels)
        write_idx(raw / f"{name}-labels-idx1-ubyte.gz", classes)
    sources = [f"--source={name}={raw}" for name in ("train", "test")]
    livt(installed, tmp_path, "shards", "build", "livt:fashion-mnist-lt", "--workers", 1, *sources)
    shown = livt(installed, tmp_path, "recipe", "show", "livt:fashion_mnist_lt/quickstart")
    assert f"train: {tmp_path}/shards/fashion-mnist-lt/train-lt" in shown
    assert ShardSet.open(tmp_path / "shards" / "fashion-mnist-lt" / "train-lt").num_samples == 2478


@pytest.mark.slow
def test_a_wheel_without_its_files_says_so(installed, tmp_path):
    shutil.copytree(installed / "livt_scale", tmp_path / "livt_scale", ignore=shutil.ignore_patterns("shipped"))
    for words in (["recipe", "list"], ["quickstart"], ["submit", "livt:imagenet_lt/vit_b16", "--dry-run"]):
        said = livt(tmp_path, tmp_path, *words, expect=1)
        *logged, error = said.splitlines()
        assert error.startswith("livt: error: the files that ship with livt_scale are missing")
        assert len(logged) <= 1  # `quickstart` logs that it checks the run
