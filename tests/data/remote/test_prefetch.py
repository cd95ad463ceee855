"""A set at a URL gives the batches of the same set in a folder, bit for bit, whatever the connection does."""

import itertools
import json
import pickle
import random
import re
import threading
import time

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from livt_scale.cli.main import app
from livt_scale.config.load import load_recipe
from livt_scale.data.build.verify import verify
from livt_scale.data.loader import eval_batches, train_batches
from livt_scale.data.manifest import QUARANTINE
from livt_scale.data.order.for_stage import stage_order
from livt_scale.data.order.instance import Order
from livt_scale.data.pipeline import to_webdataset
from livt_scale.data.reader import read_sample
from livt_scale.data.remote.cache import GIB, ShardCache
from livt_scale.data.remote.prefetch import shards_in_view
from livt_scale.data.shard_set import ShardSet
from livt_scale.util.errors import DataError, LivtError, ManifestError, RemoteError, UsageError
from tests.data.remote.chaos_proxy import ChaosProxy
from tests.data.remote.flaky_server import FAULTS
from tests.data.remote.real_servers import AWS, BUCKET, nginx, s3, upload
from tests.data.tiny_sets import tiny_recipe

SECRET = re.compile("pa55|s3cr3t")


def recipe_for(where, **changes):
    quick = {"tries": 12, "connect_timeout_s": 5.0, "stall_timeout_s": 2.0, "deadline_s": 60.0}
    return tiny_recipe(where, **{"data__remote": quick, "stages__pretrain__epochs": 2, **changes})


def loaded(where, **changes):
    """All there is in the batches of a stage, rank 1 of 2."""
    recipe = recipe_for(where, **changes)
    shards = ShardSet.open(recipe.data.train, data=recipe.data)
    options = {"rank": 1, "world_size": 2, "micro_batch": 4, "epoch": 0, "step": 1}
    with train_batches(shards, recipe, stage="pretrain", **options) as batches:
        train = [(b.epoch, b.step, b.keys, b.images.clone(), b.labels.clone(), b.noise.clone()) for b in batches]
    with eval_batches(shards, recipe, rank=0, world_size=1, batch=8) as batches:
        return train + [(b.epoch, b.step, b.keys, b.images.clone(), b.labels.clone()) for b in batches]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) > 10
    for one, other in zip(ours, theirs, strict=True):
        assert one[:3] == other[:3]
        assert all(torch.equal(a, b) for a, b in zip(one[3:], other[3:], strict=True))


@pytest.fixture(scope="module")
def from_files(local):
    return loaded(local.folder)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_a_bad_server_equal_those_from_files(local, server, from_files, workers):
    draw = random.Random(workers)
    server.plan = lambda name, before: draw.choice(FAULTS) if draw.random() < 0.4 and before < 9 else "slow"
    assert_same(loaded(server.url, data__workers=workers), from_files)
    names = {info.name for info in local.manifest.shards}
    assert names <= set(server.requests)


def test_each_file_is_downloaded_once_whatever_the_number_of_processes_and_openings(local, server, from_files):
    assert_same(loaded(server.url, data__workers=3), from_files)
    assert_same(loaded(server.url, data__workers=0), from_files)
    fetched = {name: count for name, count in server.requests.items() if not name.endswith(".json")}
    assert set(fetched.values()) == {1}
    assert set(fetched) == {f.name for f in (*local.manifest.shards, local.manifest.index, local.manifest.keys)}


def test_batches_from_nginx_through_cut_connections_equal_those_from_files(local, from_files, tmp_path):
    with (
        nginx(tmp_path / "nginx", local.folder) as port,
        ChaosProxy(port, seed=1, most_bytes=30_000) as proxy,
    ):
        assert_same(loaded(proxy.url, data__workers=2), from_files)
        assert {"cut", "reset", "busy"} <= set(proxy.seen)


def test_batches_from_s3_through_cut_connections_equal_those_from_files(local, from_files, tmp_path, monkeypatch):
    with s3(tmp_path) as port, ChaosProxy(port, seed=2, most_bytes=30_000) as proxy:
        upload(local.folder, port, "set")
        for name, value in {**AWS, "AWS_ENDPOINT_URL": proxy.url}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RemoteError, match=rf"manifest\.json cannot be fetched from s3://{BUCKET}/none/.*404"):
            ShardSet.open(f"s3://{BUCKET}/none")
        assert_same(loaded(f"s3://{BUCKET}/set", data__workers=2), from_files)
        assert {"cut", "reset", "busy"} <= set(proxy.seen)


def test_batches_from_a_file_url_equal_those_from_the_folder(local, from_files):
    assert_same(loaded(f"file://{local.folder}"), from_files)


def test_with_room_for_the_least_that_is_let_through_batches_are_the_same(local, server, from_files, tmp_path):
    sizes = sum(s.bytes for s in local.manifest.shards) + local.manifest.index.bytes + local.manifest.keys.bytes
    changes = {"data__workers": 2, "data__cache__ahead": 1}
    assert_same(loaded(server.url, **changes, data__cache__limit_gib=sizes / GIB), from_files)
    for path in (tmp_path / "cache" / "v1").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=rf"limit_gib is .*, this order, with 2 .* needs {sizes:,}.*at least"):
        loaded(server.url, **changes, data__cache__limit_gib=(sizes - 1) / GIB)


def test_a_limit_far_below_the_set_suffices_where_the_shuffle_window_is_small(server, local, tmp_path):
    """Evicted shards are fetched again in the next epoch, and the cache stays under its limit."""
    small = {"data__shuffle_window": 4, "data__lane_groups": 1, "data__cache__ahead": 1}
    expected = loaded(local.folder, **small)
    sizes = sorted((s.bytes for s in local.manifest.shards), reverse=True)
    limit = sum(sizes[:5]) + local.manifest.index.bytes + local.manifest.keys.bytes
    got = loaded(server.url, **small, data__cache__limit_gib=limit / GIB)
    assert_same(got, expected)
    assert sum(p.stat().st_size for p in (tmp_path / "cache" / "v1").iterdir()) <= limit
    assert max(server.requests[s.name] for s in local.manifest.shards) > 1


def test_shards_are_there_before_they_are_needed(server, local):
    """While a reader sits on its first batch, the next `ahead` shards come by themselves."""
    recipe = recipe_for(server.url, data__shuffle_window=4, data__lane_groups=1, data__cache__ahead=3)
    shards = ShardSet.open(server.url, data=recipe.data)
    stream = to_webdataset(shards, stage_order(shards, recipe, "pretrain"), epochs=1, micro_batch=1)
    samples = iter(stream)
    next(samples)
    for _ in range(1000):
        come = [s for s in local.manifest.shards if shards.remote.cache.has(s)]
        if len(come) >= 4:
            break
        time.sleep(0.01)
    assert 4 <= len(come) < len(local.manifest.shards)
    samples.close()


def test_a_shard_that_was_read_and_evicted_is_not_fetched_again_by_a_thread_that_is_late(server, local, monkeypatch):
    """One of the two threads is late for its first shard; meanwhile the reader fetches it and all others."""
    small = {"data__shuffle_window": 4, "data__lane_groups": 1, "data__cache__ahead": 1}
    sizes = sorted((s.bytes for s in local.manifest.shards), reverse=True)
    limit = sum(sizes[:5]) + local.manifest.index.bytes + local.manifest.keys.bytes
    recipe = recipe_for(server.url, **small, data__cache__limit_gib=limit / GIB)
    shards = ShardSet.open(server.url, data=recipe.data)
    late, go_on, has = [], threading.Event(), ShardCache.has

    def slow(cache, info):
        there = has(cache, info)
        if threading.current_thread() is not threading.main_thread() and not late:
            late.append((threading.current_thread(), info))
            go_on.wait(60)
            return False
        return there

    monkeypatch.setattr(ShardCache, "has", slow)
    stream = to_webdataset(shards, stage_order(shards, recipe, "pretrain"), epochs=1, micro_batch=1)
    assert len(list(stream)) > 30
    thread, info = late[0]
    assert not has(shards.remote.cache, info)  # evicted
    go_on.set()
    thread.join(60)
    assert not thread.is_alive()
    assert server.requests[info.name] == 1


def test_an_opened_set_pickles_without_its_bytes(server, local):
    shards = ShardSet.open(server.url)
    packed = pickle.dumps(shards)
    assert len(packed) < 30_000
    again = pickle.loads(packed)
    assert again.keys(np.arange(43)) == local.keys(np.arange(43))
    assert again.where == server.url
    assert read_sample(again, 7) == read_sample(local, 7)
    assert server.requests["manifest.json"] == 1


def test_quarantine_at_the_url_is_kept_to(local, server, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in local.folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    q = {"number": 3, "key": "s003", "shard": local.manifest.shards[0].name, "class": 0, "reason": "no"}
    (copy / QUARANTINE).write_text(json.dumps({"format": "livt-quarantine", "version": 1, "samples": [q]}))
    server.folder = copy
    shards = ShardSet.open(server.url)
    assert shards.num_samples == 42
    assert shards.digest == ShardSet.open(copy).digest
    server.plan = lambda name, before: "403" if name == QUARANTINE else ""
    with pytest.raises(RemoteError, match="access is denied"):  # there or not? Not for us to guess
        ShardSet.open(server.url)


def test_a_manifest_that_was_changed_or_cut_is_fetched_again_and_then_told(server):
    server.plan = lambda name, before: ("wrong", "short", "")[min(before, 2)] if name == "manifest.json" else ""
    assert ShardSet.open(server.url).num_samples == 43
    server.plan = lambda name, before: "wrong" if name == "manifest.json" else ""
    with pytest.raises(ManifestError, match=rf"{server.url}/manifest\.json: not a manifest of shards"):
        ShardSet.open(server.url)


def test_a_shard_that_was_damaged_on_the_caches_disk_is_fetched_again(server, local):
    shards = ShardSet.open(server.url)
    assert read_sample(shards, 0) == read_sample(local, 0)
    path = shards.shard_path(0)
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[int(shards.index["start"][0]) + 600] ^= 1
    path.write_bytes(data)
    assert read_sample(shards, 0) == read_sample(local, 0)
    assert server.requests[local.manifest.shards[0].name] == 2


def test_a_shard_that_cannot_be_fetched_is_one_error_from_a_loader_process(server, local):
    bad = local.manifest.shards[2].name
    server.plan = lambda name, before: "503" if name == bad else ""
    with pytest.raises(RemoteError, match=rf"{bad} cannot be fetched from {server.url}/{bad}: 2 tries in"):
        loaded(server.url, data__workers=2, data__remote__tries=2)


def test_verify_and_info_take_a_url(server, local):
    run = CliRunner().invoke(app, ["shards", "info", server.url, "--json"])
    assert run.exit_code == 0, run.output
    told = CliRunner().invoke(app, ["shards", "info", str(local.folder), "--json"])
    assert json.loads(run.stdout) == json.loads(told.stdout)
    assert verify(server.url, decode=True) == []
    bad = local.manifest.shards[1]
    ShardSet.open(server.url).remote.cache.drop(bad)
    server.plan = lambda name, before: "wrong" if name == bad.name else ""
    faults = verify(server.url)
    assert [f.shard for f in faults] == [bad.name]
    assert "SHA-256 is not the manifest's" in faults[0].what
    with pytest.raises(UsageError, match="to the folder of the set"):
        verify(server.url, quarantine=True)


@pytest.mark.parametrize(
    ("url", "field"),
    [
        ("https://me:pa55@h/x", "train"),
        ("s3://KEY:pa55@b/x", "val"),
        ("https://h/x?X-Amz-Signature=pa55", "train"),
        ("https://me:pa55/1@h/x", "val"),
    ],
)
def test_a_recipe_with_a_secret_in_a_url_is_refused_without_telling_it(tmp_path, url, field):
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(tiny_recipe("x").model_dump(mode="json") | {"data": {"train": "x", field: url}}))
    with pytest.raises(LivtError) as caught:
        load_recipe(path)
    assert f"data.{field} is a URL that cannot be" in str(caught.value)
    plain = tmp_path / "p.yaml"
    plain.write_text(json.dumps(tiny_recipe("x").model_dump(mode="json")))
    for words in (["--set", f"data.{field}={url}"], ["--set", f"data={url}"], ["--set", f"data.{field}=[{url}]"]):
        for command in (["recipe", "show", str(plain)], ["recipe", "check", str(plain)], ["train", str(plain)]):
            run = CliRunner().invoke(app, [*command, *words])
            assert run.exit_code, run.output
            caught_text = str(caught.value) + run.output + str(run.exception or "")
            assert not SECRET.search(caught_text), caught_text
    for command in (["shards", "info", url], ["shards", "verify", url]):
        run = CliRunner().invoke(app, command)
        assert run.exit_code
        assert not SECRET.search(run.output + str(run.exception))


def test_without_credentials_or_rights_s3_fails_at_once_and_tells_none(tmp_path, monkeypatch):
    with s3(tmp_path) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
            monkeypatch.setenv(name, str(tmp_path / "none"))
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        with pytest.raises(RemoteError, match=r"1 try in .*access is denied.*AWS_PROFILE"):
            ShardSet.open("s3://bucket/set", data=recipe_for("s3://bucket/set", data__remote__tries=6).data)
        for name, value in AWS.items():
            monkeypatch.setenv(name, value)
        told = recipe_for("s3://bucket/set", data__remote__tries=7)  # another file system of fsspec's
        with pytest.raises(RemoteError, match=r"1 try in .*404") as caught:
            ShardSet.open("s3://bucket/set", data=told.data)
        assert not SECRET.search(repr(caught.value) + str(caught.value))


def test_shards_in_view_covers_what_a_node_reads_in_any_window():
    per_shard = np.array([5, 9, 3, 7, 8, 2, 6, 4, 9, 5, 5, 7])
    first = np.concatenate([[0], np.cumsum(per_shard)])
    for groups, window, nodes in ((1, 10, 1), (2, 12, 1), (2, 12, 2), (2, 12, 4), (2, 900, 2), (4, 8, 2), (3, 8, 2)):
        order = Order(per_shard, 12, seed=1, lane_groups=groups, window=window)
        view = shards_in_view(order, per_shard, ranks=1, world_size=nodes)
        for node, step in itertools.product(range(nodes), range(order.steps_per_epoch)):
            slots = {"first_slot": node * 12 // nodes, "num_slots": 12 // nodes}
            read = np.searchsorted(first, order.positions(0, step, **slots), side="right") - 1
            assert len(set(read.tolist())) <= view
    assert shards_in_view(Order([1000] * 500, 64, seed=0, window=2000), np.full(500, 1000), ranks=1, world_size=64) < 10
