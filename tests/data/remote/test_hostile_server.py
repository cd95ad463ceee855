"""A set at a URL whose maker means harm: names, sizes and bodies are bounded, and errors stay one printable line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from livt_scale.cli.main import app
from livt_scale.config.recipe import Data, Remote
from livt_scale.data.build.verify import verify
from livt_scale.data.manifest import MANIFEST, ShardManifest
from livt_scale.data.reader import read_sample
from livt_scale.data.shard_set import ShardSet
from livt_scale.util.errors import DataError, LivtError, ManifestError, RemoteError
from tests.data.remote.flaky_server import FlakyServer
from tests.data.tiny_sets import tiny_set
from tests.small_sets import contents

ODD = "a\n\x1b]0;x\x07 $(touch x) %2e%2e%2f\u202eé.tar"


@pytest.fixture
def served(tmp_path):
    """(folder of a set, its server); the test may change what lies there."""
    folder = tiny_set(tmp_path / "served", num_samples=9, per_shard=4).folder
    with FlakyServer(folder) as server:
        yield folder, server


def change(folder, **fields):
    """Rewrite the manifest, with a digest that is right. `fields`: dotted with `__`, as shards__0__name."""
    tree = json.loads((folder / MANIFEST).read_text())
    del tree["digest"]
    for path, value in fields.items():
        *parents, last = (int(p) if p.isdigit() else p for p in path.split("__"))
        part = tree
        for parent in parents:
            part = part[parent]
        part[last] = value
    (folder / MANIFEST).write_bytes(ShardManifest.model_validate(tree).to_bytes())


def opened(server) -> ShardSet:
    told = Remote(tries=2, connect_timeout_s=5, stall_timeout_s=5, deadline_s=30)
    return ShardSet.open(server.url, data=Data(train=server.url, remote=told))


def one_line_of(error: LivtError) -> str:
    assert str(error).isprintable()
    assert len(str(error)) < 1000
    return str(error)


def test_a_shard_with_an_odd_name_is_fetched_and_read_and_nothing_is_made_of_its_name(served, tmp_path):
    folder, server = served
    expected = [read_sample(ShardSet.open(folder), k) for k in range(9)]
    shutil.move(folder / "part-000.tar", folder / ODD)
    change(folder, shards__0__name=ODD)
    shards = opened(server)
    assert [read_sample(shards, k) for k in range(9)] == expected
    kept = {p.name for p in (tmp_path / "cache" / "v1").iterdir()}
    assert all(len(name) == 64 or name == "lock" for name in kept)  # named by their contents
    assert {p.name for p in tmp_path.iterdir()} == {"served", "cache"}


def test_an_odd_name_stands_quoted_in_every_error(served, tmp_path):
    folder, server = served
    change(folder, shards__0__name=ODD)
    shards = opened(server)
    with pytest.raises(RemoteError, match=r"a\\n\\x1b\]0;x\\x07 .* cannot be fetched from .*404") as error:
        read_sample(shards, 0)
    one_line_of(error.value)
    for fault in (*verify(server.url), *verify(folder)):
        assert str(fault).isprintable()
    assert any("a\\n\\x1b" in str(fault) for fault in verify(folder))
    said = CliRunner().invoke(app, ["shards", "verify", str(folder)])
    assert said.exit_code == 1
    assert "\x1b]0;x" not in said.output
    change(folder, shards__0__bytes=2**50)
    with pytest.raises(DataError, match="alone needs") as error:
        read_sample(opened(server), 0)
    assert "a\\n\\x1b" in one_line_of(error.value)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b.tar", "a\0b"])
def test_a_name_that_leads_out_is_refused_before_anything_is_asked_for(served, name):
    folder, server = served
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace("part-000.tar", json.dumps(name)[1:-1]))
    with pytest.raises(ManifestError) as error:
        opened(server)
    one_line_of(error.value)
    assert set(server.requests) == {MANIFEST}


@pytest.mark.parametrize("field", ["index", "keys"])
def test_an_index_that_claims_2_to_the_60_bytes_is_refused_before_it_is_fetched(served, field, tmp_path):
    folder, server = served
    change(folder, **{f"{field}__bytes": 2**60})
    with pytest.raises(LivtError) as error:
        opened(server)
    one_line_of(error.value)
    assert server.requests[{"index": "index.npy", "keys": "keys.bin"}[field]] == 0
    assert all(p.stat().st_size < 1 << 20 for p in (tmp_path / "cache" / "v1").iterdir())


def test_an_index_that_unpickles_is_data_and_not_run(served, tmp_path, monkeypatch):
    """A .npy of objects holds a pickle: with every sum right, it is refused."""
    folder, server = served

    class Boom:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "unpickled"),)

    np.save(folder / "index.npy", np.array([Boom()], dtype=object), allow_pickle=True)
    data = (folder / "index.npy").read_bytes()
    change(folder, index__bytes=len(data), index__sha256=hashlib.sha256(data).hexdigest())
    before = contents(folder)
    with pytest.raises(ManifestError) as error:
        opened(server)
    one_line_of(error.value)
    assert not (tmp_path / "unpickled").exists()
    assert contents(folder) == before
