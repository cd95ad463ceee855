"""`livt shards` as people type it: what it prints, its exit codes, and one line for each mistake."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from livt_scale.cli.main import app
from livt_scale.cli.shards import histogram
from livt_scale.data.manifest import QUARANTINE
from livt_scale.data.shard_set import ShardSet
from livt_scale.util.errors import UsageError
from tests import warm
from tests.data.build.hostile import END, sample_bytes
from tests.small_sets import encoded, small_set, write_idx_spec

SETS = "{lt: {source: raw, exponential: {imbalance: 3}}, even: {source: raw, balanced: {like: lt}}}"


def livt(*args: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command; a LivtError is raised as it is."""
    result = CliRunner().invoke(app, ["shards", *map(str, args)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def spec(tmp_path):
    return write_idx_spec(tmp_path, [0] * 9 + [1] * 9 + [2] * 9, sets=SETS)


def test_build_goes_beside_the_spec_and_says_when_there_is_nothing_to_do(spec):
    code, out, err = livt("build", spec, "--workers", 1)
    assert code == 0
    assert "17 images" in out
    assert "1 shards written" in out
    assert "lt: 17 of 17 images," in err  # plain lines: this is no terminal
    assert ShardSet.open(spec.parent / "small" / "lt").num_samples == 17
    assert livt("build", spec)[1].count("finished already, nothing to do") == 2


def test_build_takes_a_folder_and_another_place_for_a_source(spec, tmp_path):
    moved = tmp_path / "it's moved"
    (tmp_path / "raw").rename(moved)
    code, _, _ = livt("build", spec, "--out", tmp_path / "out", "--source", f"raw={moved}", "--workers", 1)
    assert code == 0
    assert ShardSet.open(tmp_path / "out" / "even").class_counts.tolist() == [6, 6, 5]


def test_verify_reports_a_match_or_names_shard_and_key(tmp_path):
    folder = small_set(tmp_path)
    assert livt("verify", folder, "--decode", "--workers", 1)[:2] == (
        0, f"{folder}: every byte matches the manifest; every image can be decoded\n",
    )  # fmt: skip
    path = folder / "all-000002.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    key = ShardSet.open(folder).keys(np.array([13]))[0]
    code, out, _ = livt("verify", folder, "--workers", 1)
    assert code == 1
    assert out.splitlines() == [
        f"all-000002.tar, offset 0, key '{key}': changed since it was written (CRC-32)",
        f"to leave these samples out: livt shards verify {folder} --quarantine",
    ]
    code, out, _ = livt("verify", folder, "--json", "--workers", 1)
    assert (code, [f["key"] for f in json.loads(out)["faults"]]) == (1, [key])
    code, out, _ = livt("verify", folder, "--quarantine", "--workers", 1)
    assert code == 0
    assert "in quarantine: 1 samples: 1 of class 1. Training leaves them out" in out
    assert (folder / QUARANTINE).exists()
    assert "in quarantine     1: 1 of class 1" in livt("info", folder)[1]


def test_verify_succeeds_where_what_differs_is_in_quarantine_already(tmp_path):
    folder = small_set(tmp_path)
    path = folder / "all-000002.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    livt("verify", folder, "--quarantine", "--workers", 1)
    code, out, _ = livt("verify", folder, "--workers", 1)
    assert code == 0
    assert out.splitlines()[0].endswith("changed since it was written (CRC-32) (in quarantine)")
    assert "--quarantine" not in out
    data[3000] ^= 1
    path.write_bytes(data)
    code, out, _ = livt("verify", folder, "--json", "--workers", 1)
    assert (code, [fault["quarantined"] for fault in json.loads(out)["faults"]]) == (1, [True, False])


def test_index_makes_a_set_of_strangers_tars(tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\nunicorn\n")
    parts = [sample_bytes(f"k{k}", k % 2, ("jpg", encoded(k, kind="jpeg"))) for k in range(3)]
    (tmp_path / "a.tar").write_bytes(b"".join(parts) + END)
    code, out, _ = livt("index", tmp_path, "--class-names", tmp_path / "names.txt", "--workers", 1)
    assert code == 0
    assert "3 images of 3 classes: manifest written" in out
    assert "1 classes have no image (unicorn)" in out
    assert "no image in a class" in livt("info", tmp_path)[1]


def test_info_shows_counts_and_json_has_the_same(tmp_path):
    folder = small_set(tmp_path)
    _, out, _ = livt("info", folder)
    assert "all: 20 images (png)" in out
    assert "imbalance factor  6" in out
    facts = json.loads(livt("info", folder, "--json")[1])
    assert (facts["class_counts"], facts["imbalance_factor"]) == ([12, 6, 2], 6)


def test_info_needs_no_torch(tmp_path):
    code = (
        "import sys\nfrom livt_scale.cli.main import app\n"
        f"app(['shards', 'info', {str(small_set(tmp_path))!r}], standalone_mode=False)\n"
        "print([name for name in ('torch', 'webdataset') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_histogram_shows_head_and_tail_of_many_classes():
    lines = histogram([f"class {c}" for c in range(1000)], list(range(1000, 0, -1)))
    assert len(lines) == 20
    assert lines[0].split() == ["class", "0", "1,000", "█" * 40]
    assert lines[-1].split() == ["class", "999", "1", "▏"]


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["build", "spek.yaml"], 2, "the spec spek.yaml cannot be read: No such file or directory"),
        (["build", "small.yaml", "--source", "row=/x"], 2, "there is no source 'row': did you mean 'raw'?"),
        (["build", "small.yaml", "--source", "raw=/nowhere"], 1, "/nowhere/images.gz: No such file or directory"),
        (["build", "small.yaml", "--out", "/dev/null/x"], 1, "cannot be written: Not a directory"),
        (["info", "raw"], 1, "raw contains no manifest.json"),
        (["verify", "nothing"], 1, "there is no folder nothing"),
        (["index", "raw"], 1, "raw holds no .tar"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(spec, args, code, said):
    result = warm.run(["-m", "livt_scale", "shards", *args], cwd=spec.parent)
    assert result.returncode == code
    assert said in result.stderr
    assert result.stderr.startswith("livt: error: ")
    assert result.stderr.count("\n") == 1
    assert sorted(p.name for p in Path(spec.parent).iterdir()) in (
        ["raw", "small.yaml"],
        ["raw", "small", "small.yaml"],
    )


def test_a_stage_that_the_recipe_does_not_have_is_answered_with_those_it_has(tmp_path):
    folder = small_set(tmp_path)
    recipe = Path(__file__).parents[2] / "recipes" / "fashion_mnist_lt" / "quickstart.yaml"
    asked = ("--stage", "finetune", "--set", "stages.finetune=null")
    for words in (("trace", recipe), ("info", folder, "--recipe", recipe)):
        with pytest.raises(UsageError) as error:
            livt(*words, *asked)
        assert error.value.remedy == "valid names: pretrain"
