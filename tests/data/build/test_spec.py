"""A spec says which field, which line and which name was meant; profiles give the counts they promise."""

import json

import pytest

from livt_scale.data.build.spec import load_spec
from livt_scale.util.errors import DataError, SourceError, UsageError
from tests.small_sets import write_idx_set

GOOD = """\
name: small
sources:
  raw: {idx: {root: raw, images: images.gz, labels: labels.gz}}
sets:
  lt: {source: raw, exponential: {imbalance: 4}}
  twin: {source: raw, balanced: {like: lt}}
  even: {source: raw, balanced: {per_class: 2}}
  some: {source: raw, balanced: {total: 7}}
  listed: {source: raw, counts: {values: [3, 1, 2]}}
  from-file: {source: raw, counts: {file: counts.json}}
  all: {source: raw}
"""


@pytest.fixture
def write(tmp_path):
    write_idx_set(tmp_path / "raw", [0] * 8 + [1] * 6 + [2] * 5)

    def written(old="", new=""):
        assert old in GOOD
        path = tmp_path / "a spec.yaml"
        path.write_text(GOOD.replace(old, new))
        (tmp_path / "counts.json").write_text("[1, 2, 3]")
        return path

    return written


def test_every_profile_gives_its_counts(write):
    spec = load_spec(write())
    source = spec.open_source("raw")
    counts = {name: spec.class_counts(name, source).tolist() for name in spec.build.sets}
    assert counts == {
        "lt": [8, 4, 2],
        "twin": [5, 5, 4],
        "even": [2, 2, 2],
        "some": [3, 2, 2],
        "listed": [3, 1, 2],
        "from-file": [1, 2, 3],
        "all": [8, 6, 5],
    }


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "imbalance: 4",
            "imbalence: 4",
            r"line 5: .* sets\.lt\.exponential\.imbalence: did you mean 'imba",
        ),
        (
            "imbalance: 4",
            "imbalance: 0.5",
            r"line 5: sets\.lt\.exponential\.imbalance is 0\.5: input should be",
        ),
        ("{imbalance: 4}", "{}", r"line 5: sets\.lt\.exponential\.imbalance is missing"),
        ("{imbalance: 4}", "100", r"line 5: sets\.lt\.exponential is 100, but it has fields: n0, imbalance"),
        (
            "  all: {source: raw}",
            "  all: {sorce: raw}",
            r"line 11: .* sets\.all\.sorce: did you mean 'sour",
        ),
        ("  all: {source: raw}", "  all: {source: row}", r"line 11: sets\.all\.source is 'row'.*did you mean 'raw'"),
        ("like: lt", "like: sone", r"line 6: sets\.twin\.balanced\.like is 'sone', no other set: did you mean 'some'"),
        ("like: lt", "like: twin", r"sets\.twin\.balanced\.like is 'twin', no other set"),
        ("like: lt", "like: even", r"sets\.twin\.balanced\.like is 'even', itself balanced"),
        ("like: lt", "like: lt, total: 3", r"line 6: sets\.twin\.balanced: give one of like, per_class, total"),
        ("per_class: 2", "", r"line 7: sets\.even\.balanced: give one of .*: there is none"),
        (
            "  all: {",
            "  all: {counts: {values: [1]}, balanced: {total: 3}, ",
            r"line 11: sets\.all: give at most one",
        ),
        ("  all:", "  ../all:", r"line 11: sets\.\.\./all: a name is made of"),
        ("  all:", "  a.b:", r"a name is made of letters"),
        ("name: small", "nam: small", r"line 1: there is no field nam: did you mean 'name'"),
        ("idx:", "idy:", r"line 3: there is no field sources\.raw\.idy: did you mean 'idx'"),
        ("values: [3, 1, 2]", "values: [3, -1, 2]", r"line 9: sets\.listed\.counts\.values\.1 is -1"),
        ("sets:", "sets: {}\nother:", "there is no field other"),
        (GOOD, "", "empty"),
        (GOOD, "name: [", "not YAML"),
        ("name: small", "name: !!python/object/apply:os.system [id]", "is refused"),
    ],
)
def test_what_is_wrong_with_a_spec_is_said_with_its_field_and_line(write, old, new, said):
    with pytest.raises(UsageError, match=said):
        load_spec(write(old, new))


def test_a_spec_that_is_not_there_names_one_that_is(write):
    path = write()
    with pytest.raises(UsageError, match=r"Did you mean .*a spec\.yaml"):
        load_spec(path.with_name("a spac.yaml"))


def test_the_command_line_says_where_a_source_lies(write, tmp_path, monkeypatch):
    write_idx_set(tmp_path / "elsewhere", [0, 1])
    path = write("root: raw", "root: /nowhere")
    spec = load_spec(path, overrides=[f"raw={tmp_path / 'elsewhere'}"])
    assert len(spec.open_source("raw")) == 2
    spec = load_spec(write(), overrides=[f"raw.labels={tmp_path / 'elsewhere' / 'labels.gz'}"])
    with pytest.raises(SourceError, match="has the shape"):
        spec.open_source("raw")
    monkeypatch.setenv("HOME", str(tmp_path))  # dash and zsh leave the ~ of an argument as it is
    assert len(load_spec(path, overrides=["raw=~/elsewhere"]).open_source("raw")) == 2
    with pytest.raises(UsageError, match="rite the path in full"):
        load_spec(path, overrides=["raw=~nobody-of-that-name/elsewhere"])
    for override, said in [("row=/x", "did you mean 'raw'"), ("raw", "not of the form"), ("raw.lables=x", "'labels'")]:
        with pytest.raises(UsageError, match=said):
            load_spec(path, overrides=[override])


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ([1, 2], "not a list of 3"),
        ([1, 2, 3.5], "not a list of 3"),
        ({"a": 1}, "not a list of 3"),
        ([1, 0, 2], "class 1 has no image"),
    ],
)
def test_a_counts_file_that_does_not_fit_is_refused(write, tmp_path, counts, said):
    spec = load_spec(write())
    (tmp_path / "counts.json").write_text(json.dumps(counts))
    with pytest.raises(DataError, match=said):
        spec.class_counts("from-file", spec.open_source("raw"))


def test_what_decides_a_set_has_no_folders_in_it(write, tmp_path):
    here = load_spec(write()).neutral("twin")
    there = load_spec(write(), overrides=["raw=/elsewhere"]).neutral("twin")
    assert here == there
    labels = load_spec(write()).build.sources["raw"].format.labels
    assert here == load_spec(write(), overrides=[f"raw.labels={tmp_path}/elsewhere/{labels}"]).neutral("twin")
    absolute = load_spec(write("file: counts.json", f"file: {tmp_path}/counts.json")).neutral("from-file")
    assert absolute == load_spec(write()).neutral("from-file")
    assert str(tmp_path) not in json.dumps(here)
    assert here != load_spec(write("imbalance: 4", "imbalance: 2")).neutral("twin")  # by way of `like`
