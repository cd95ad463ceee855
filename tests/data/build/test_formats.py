"""A source format from outside the package is one registration; its options are checked like the built-in ones."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import PositiveInt

from livt_scale.data.build.builder import build
from livt_scale.data.build.formats import SOURCE_FORMATS, SourceFormat
from livt_scale.data.build.sources import Source
from livt_scale.data.build.spec import load_spec
from livt_scale.data.build.verify import verify
from livt_scale.util.errors import SourceError, UsageError
from tests.small_sets import encoded


@dataclass(frozen=True)
class NoiseSource(Source):
    numbers: np.ndarray

    def key(self, i: int) -> str:
        return f"{self.name}-{self.numbers[i]}"

    def image(self, i: int) -> tuple[str, bytes]:
        return "png", encoded(int(self.numbers[i]))

    def part(self, indices: np.ndarray) -> NoiseSource:
        return replace(self, labels=self.labels[indices], numbers=self.numbers[indices])


@pytest.fixture
def noise():
    @SOURCE_FORMATS.register("noise")
    class Noise(SourceFormat):
        per_class: PositiveInt
        bad_key: bool = False

        def open(self, name, root, *, class_names):
            labels = np.repeat(np.arange(len(class_names)), self.per_class)
            name = f"{name}.v2" if self.bad_key else name
            return NoiseSource(name, class_names, labels, np.arange(len(labels)))

    yield Noise
    SOURCE_FORMATS.remove("noise")


def spec_file(folder: Path, options: str) -> Path:
    path = folder / "spec.yaml"
    path.write_text(
        f"name: n\nclass_names: [a, b]\nsources:\n  raw:\n    noise: {options}\nsets:\n  all: {{source: raw}}\n"
    )
    return path


def test_a_registered_format_is_built_and_recorded_like_a_built_in_one(noise, tmp_path):
    (built,) = build(load_spec(spec_file(tmp_path, "{root: ., per_class: 4}")), tmp_path / "out", workers=1)
    assert built.num_samples == 8
    assert verify(built.folder, decode=True, workers=1) == []
    spec = json.loads((built.folder / "manifest.json").read_text())["source"]["spec"]
    assert spec["source"] == {"noise": {"per_class": 4, "bad_key": False}}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("{root: ., per_clas: 4}", "there is no field sources.raw.noise.per_clas: did you mean 'per_class'"),
        ("{root: .}", "sources.raw.noise.per_class is missing"),
        ("{root: ., per_class: many}", "sources.raw.noise.per_class is 'many'"),
    ],
)
def test_a_wrong_option_of_it_is_named_with_file_and_line(noise, tmp_path, options, said):
    with pytest.raises(UsageError) as error:
        load_spec(spec_file(tmp_path, options))
    assert f"{tmp_path / 'spec.yaml'}, line 5: {said}" in error.value.message


def test_an_unregistered_format_is_named_with_the_nearest(noise, tmp_path):
    path = spec_file(tmp_path, "{root: .}")
    path.write_text(path.read_text().replace("noise:", "nois:"))
    with pytest.raises(UsageError, match=r"line 5: there is no field sources\.raw\.nois: did you mean 'noise'"):
        load_spec(path)


def test_a_key_that_webdataset_would_not_read_back_is_refused(noise, tmp_path):
    spec = load_spec(spec_file(tmp_path, "{root: ., per_class: 4, bad_key: true}"))
    with pytest.raises(SourceError, match=r"'raw\.v2-0' cannot be the key"):
        spec.open_source("raw")


def test_a_name_that_is_taken_is_refused(noise):
    with pytest.raises(UsageError, match="'noise' is already registered"):
        SOURCE_FORMATS.register("noise", noise)
