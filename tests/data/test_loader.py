"""The loader: the same batches for any workers and ranks, exact resume, plain errors, no process left over."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import pickle
import random
import signal
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchvision.transforms import functional as tv

from livt_scale.data.batch import _RECEIVED
from livt_scale.data.build.verify import verify
from livt_scale.data.fork_server import fork_server
from livt_scale.data.loader import (
    Batch,
    Mix,
    _TrainDataset,
    apply_mix,
    eval_batches,
    evaluation_batches,
    normalise,
    train_batches,
)
from livt_scale.data.loader_processes import Batches, KeptBatches, _kill
from livt_scale.data.mixup import draw_mix
from livt_scale.data.order.for_rank import RankOrder
from livt_scale.data.order.for_stage import stage_order
from livt_scale.data.seeds import sample_rng
from livt_scale.data.settings import ImageSettings, TrainSettings
from livt_scale.data.shard_set import ShardSet
from livt_scale.util.errors import DataError, SampleError, ShardError, UsageError
from tests import warm
from tests.data.tiny_sets import HOSTILE, tiny_recipe, tiny_set

STEPS = 5  # of an epoch: 43 samples, global batch 8


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    return tiny_set(tmp_path_factory.mktemp("loader") / HOSTILE, num_samples=43)


@pytest.fixture(autouse=True)
def _no_process_is_left_over():
    before = set(multiprocessing.active_children())
    yield
    if not set(multiprocessing.active_children()) <= before:
        gc.collect()  # a failed test's traceback may hold an iterator
    assert set(multiprocessing.active_children()) <= before


def load(
    shards: ShardSet, stage: str = "pretrain", *, rank=0, world=1, micro=8, epoch=0, step=0, **changes
) -> list[Batch]:
    recipe = tiny_recipe(shards.folder, **changes)
    where = {"rank": rank, "world_size": world, "micro_batch": micro, "epoch": epoch, "step": step}
    with train_batches(shards, recipe, stage=stage, **where) as batches:
        return list(batches)


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    mix = {} if batch.mix is None else {"lam": batch.mix.lam, "box": batch.mix.box}
    named = {"images": batch.images, "labels": batch.labels, "noise": batch.noise, "drop": batch.drop, **mix}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert (a.epoch, a.step, a.micro_index, a.keys) == (b.epoch, b.step, b.micro_index, b.keys)
        assert tensors(a).keys() == tensors(b).keys()
        for name, tensor in tensors(a).items():
            assert tensor.dtype == tensors(b)[name].dtype
            assert torch.equal(tensor, tensors(b)[name]), name


def joined(parts: list[Batch]) -> Batch:
    """Batches of one step, in the order of their slots, as one."""
    first, mix = parts[0], None
    merged = {name: torch.cat([tensors(p)[name] for p in parts]) for name in tensors(first)}
    if first.mix is not None:
        mix = Mix(merged.pop("lam"), merged.pop("box"))
    keys = [key for part in parts for key in part.keys]
    return Batch(keys=keys, epoch=first.epoch, step=first.step, micro_index=0, mix=mix, **merged)


@pytest.fixture(scope="module")
def whole(shards) -> dict[str, list[Batch]]:
    """Both stages in one process, uninterrupted."""
    return {stage: load(shards, stage) for stage in ("pretrain", "finetune")}


def test_a_batch_holds_what_its_stage_needs(whole):
    pretrain, finetune = whole["pretrain"][0], whole["finetune"][0]
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors(pretrain).items()} == {
        "images": (torch.uint8, (8, 3, 32, 32)),
        "labels": (torch.int64, (8,)),
        "noise": (torch.float32, (8, 16)),
    }
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors(finetune).items()} == {
        "images": (torch.uint8, (8, 3, 32, 32)),
        "labels": (torch.int64, (8,)),
        "drop": (torch.float32, (8, 8)),
        "lam": (torch.float32, (4,)),
        "box": (torch.int64, (4, 4)),
    }
    assert len(whole["pretrain"]) == len(whole["finetune"]) == 3 * STEPS
    assert [(b.epoch, b.step) for b in whole["pretrain"]] == [(e, s) for e in range(3) for s in range(STEPS)]
    for batch in whole["finetune"]:
        assert batch.labels.tolist() == [int(key[1:]) % 3 for key in batch.keys]


def test_without_drop_path_and_mixing_a_batch_has_none(shards):
    off = {"drop_path": 0, "mixup": 0, "cutmix": 0}
    batch = load(shards, "finetune", **{f"stages__finetune__{k}": v for k, v in off.items()})[0]
    assert (batch.noise, batch.drop, batch.mix) == (None, None, None)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_batches_do_not_depend_on_the_number_of_workers(shards, whole, stage, workers):
    assert_same(load(shards, stage, data__workers=workers), whole[stage])


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize(("world", "micro", "workers"), [(2, 4, 0), (2, 2, 2), (4, 2, 0), (1, 2, 2)])
def test_ranks_together_have_the_batches_of_one(shards, whole, stage, world, micro, workers):
    ranks = [load(shards, stage, rank=r, world=world, micro=micro, data__workers=workers) for r in range(world)]
    accumulation = 8 // world // micro
    assert [b.micro_index for b in ranks[0][:accumulation]] == list(range(accumulation))
    steps = [
        joined([b for rank in ranks for b in rank[k * accumulation : (k + 1) * accumulation]]) for k in range(3 * STEPS)
    ]
    assert_same(steps, whole[stage])


@settings(max_examples=8)
@given(step=st.integers(0, 3 * STEPS - 1), stage=st.sampled_from(["pretrain", "finetune"]))
def test_a_resumed_loader_gives_the_tail_of_the_whole(shards, whole, step, stage):
    assert_same(load(shards, stage, step=step), whole[stage][step:])
    assert_same(load(shards, stage, epoch=step // STEPS, step=step % STEPS), whole[stage][step:])


@pytest.mark.parametrize("step", [0, STEPS, 2 * STEPS + 1])  # the first, exactly at an epoch's end, in the last
def test_a_resumed_loader_with_other_workers_gives_the_tail_too(shards, whole, step):
    assert_same(load(shards, step=step, data__workers=2), whole["pretrain"][step:])


def test_at_the_end_of_the_stage_nothing_is_left(shards):
    assert load(shards, epoch=3) == []
    assert load(shards, step=3 * STEPS, data__workers=2) == []


def test_a_sample_comes_at_most_once_an_epoch_and_looks_new_in_each(whole):
    seen: dict[str, list[bytes]] = {}
    for epoch in range(3):
        keys = [k for b in whole["pretrain"] if b.epoch == epoch for k in b.keys]
        assert len(set(keys)) == len(keys) == 8 * STEPS
    for batch in whole["pretrain"]:
        for key, image, noise in zip(batch.keys, batch.images, batch.noise, strict=True):
            seen.setdefault(key, []).append(image.numpy().tobytes() + noise.numpy().tobytes())
    views = [view for of_key in seen.values() for view in of_key]
    assert len(set(views)) == len(views)


def test_masking_noise_and_drop_are_the_sample_s_own(shards, whole):
    for stage, purpose, count in (("pretrain", "noise", 16), ("finetune", "drop", 8)):
        batch = whole[stage][7]
        for key, row in zip(batch.keys, tensors(batch)[purpose], strict=True):
            np.testing.assert_array_equal(row, sample_rng(5, 1, key, purpose).random(count, dtype=np.float32))
            assert 0 <= row.min() <= row.max() < 1


@pytest.mark.parametrize(("num_samples", "world", "batch"), [(23, 1, 8), (23, 2, 5), (23, 4, 100), (3, 4, 2)])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_each_sample_exactly_once(tmp_path, num_samples, world, batch, workers):
    shards = tiny_set(tmp_path / "set", num_samples=num_samples)
    recipe = tiny_recipe(shards.folder, data__workers=workers)
    ranks = [list(eval_batches(shards, recipe, rank=r, world_size=world, batch=batch)) for r in range(world)]
    keys = [key for rank in ranks for b in rank for key in b.keys]
    assert sorted(keys) == [f"s{i:03d}" for i in range(num_samples)]
    alone = joined(list(eval_batches(shards, tiny_recipe(shards.folder), rank=0, world_size=1, batch=num_samples)))
    images = dict(zip(alone.keys, alone.images, strict=True))
    for b in (b for rank in ranks for b in rank):
        assert len(b.keys) <= batch
        assert b.labels.tolist() == [int(key[1:]) % 3 for key in b.keys]
        assert all(torch.equal(image, images[key]) for key, image in zip(b.keys, b.images, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_global_generators_alone(shards, workers):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    load(shards, "finetune", data__workers=workers)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["bytes", "image", "cut", "gone"])
def test_damage_is_the_same_plain_error_in_a_worker_and_without(tmp_path, workers, damage):
    shards = tiny_set(tmp_path / "set", num_samples=8, per_shard=2, half=(5,) if damage == "image" else ())
    start, path = int(shards.index["start"][5]), shards.shard_path(2)
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        os.truncate(path, start + 200)
    elif damage == "bytes":
        contents = bytearray(path.read_bytes())
        contents[start + 600] ^= 255
        path.write_bytes(contents)
    said = {
        "bytes": rf"part-002\.tar, byte {start}, sample 's005': the bytes are corrupt",
        "image": rf"part-002\.tar, byte {start}, sample 's005': the JPEG is cut or damaged",
        "cut": r"part-002\.tar is truncated: sample 's005'",
        "gone": r"part-002\.tar cannot be read .*'s00[45]'.*No such file",
    }
    with pytest.raises((SampleError, ShardError), match=said[damage]) as caught:
        load(shards, data__workers=workers)
    assert "\n" not in str(caught.value)


def test_what_is_in_quarantine_is_never_loaded(tmp_path):
    tiny_set(tmp_path / "set", num_samples=19, half=(4, 9))
    verify(tmp_path / "set", decode=True, quarantine=True, workers=1)
    shards = ShardSet.open(tmp_path / "set")
    good = {f"s{i:03d}" for i in range(19) if i not in (4, 9)}
    batches = load(shards, stages__pretrain__epochs=20, stages__pretrain__warmup_epochs=0)
    assert {key for batch in batches for key in batch.keys} == good  # 17 of them, two batches an epoch
    assert len(batches) == 40
    evaluated = eval_batches(shards, tiny_recipe(shards.folder), rank=0, world_size=1, batch=5)
    assert sorted(key for batch in evaluated for key in batch.keys) == sorted(good)


def finetuning_dataset(shards, recipe):
    ranks = RankOrder(shards, stage_order(shards, recipe, "finetune"), epochs=1, rank=0, world_size=1)
    return _TrainDataset(shards, TrainSettings.of_stage(recipe, "finetune"), ranks, epoch=0, step=0)


def test_pinning_keeps_every_tensor_and_its_order_in_memory(whole, shards, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())  # what it does, less the GPU
    packed = next(iter(finetuning_dataset(shards, tiny_recipe(shards.folder))))
    pinned = packed.pin_memory()
    assert_same([pinned], whole["finetune"][:1])
    assert pinned.images.is_contiguous(memory_format=torch.channels_last)
    assert_same([pinned.to("cpu")], [pinned])


def test_after_a_death_the_thread_that_pins_batches_ends_too():
    packed = SimpleNamespace(_pin_memory_thread=None, _pin_memory_thread_done_event=threading.Event())
    _kill(packed, [], [])
    assert packed._pin_memory_thread_done_event.is_set()
    _kill(SimpleNamespace(), [], [])  # without a GPU there is none


def test_a_killed_worker_is_an_error_at_the_next_batches_and_ends_the_others(shards):
    recipe = tiny_recipe(shards.folder, data__workers=2, stages__pretrain__epochs=1000)
    list(DataLoader(range(2), num_workers=1))  # its handler of SIGCHLD stays: it would raise in any line, also below
    before = set(multiprocessing.active_children())
    batches = train_batches(shards, recipe, stage="pretrain", rank=0, world_size=1, micro_batch=8, epoch=0, step=0)
    next(batches)
    workers = set(multiprocessing.active_children()) - before
    victim = min(workers, key=lambda w: w.pid)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    with pytest.raises(DataError, match="was killed by SIGKILL"):
        for _ in batches:
            pass
    assert not any(w.is_alive() for w in workers)
    with pytest.raises(StopIteration):
        next(batches)


def test_signals_of_a_preemption_do_not_end_the_workers(shards):
    recipe = tiny_recipe(shards.folder, data__workers=2)
    before = set(multiprocessing.active_children())
    with train_batches(
        shards, recipe, stage="pretrain", rank=0, world_size=1, micro_batch=8, epoch=0, step=0
    ) as batches:
        next(batches)
        for worker in set(multiprocessing.active_children()) - before:
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
                os.kill(worker.pid, number)
        assert len(list(batches)) == 3 * STEPS - 1


@pytest.mark.parametrize("how", ["dropped", "closed", "left"])
def test_no_process_outlives_the_iterator(shards, how):
    recipe = tiny_recipe(shards.folder, data__workers=2)
    before = set(multiprocessing.active_children())
    batches = train_batches(shards, recipe, stage="pretrain", rank=0, world_size=1, micro_batch=8, epoch=0, step=0)
    next(batches)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    if how == "closed":
        batches.close()
    elif how == "left":
        with batches:
            pass
    del batches
    assert not any(w.is_alive() for w in workers)


def kept_batches(shards) -> KeptBatches:
    settings = ImageSettings.of_recipe(tiny_recipe(shards.folder, data__workers=2))
    return KeptBatches(lambda: evaluation_batches(shards, settings, rank=0, world_size=1, batch=8, kept=True))


def one_pass(kept: KeptBatches) -> tuple[list[Batch], set[int | None]]:
    """The batches and the processes that loaded them."""
    with kept.one_pass() as batches:
        images = list(batches)
        return images, {p.pid for p in multiprocessing.active_children()}


@pytest.mark.parametrize("served", [False, True])
def test_kept_processes_load_pass_after_pass_and_hold_no_memory_in_between(shards, served):
    alone = list(eval_batches(shards, tiny_recipe(shards.folder), rank=0, world_size=1, batch=8))
    with fork_server() if served else nullcontext(), closing(kept_batches(shards)) as kept:
        (first, processes), (second, again) = one_pass(kept), one_pass(kept)
        assert_same(first, alone)
        assert_same(second, alone)
        assert len(processes) == 2
        assert again == processes
        assert not [name for name in _RECEIVED if name[0] in processes]
        kept.close()
        assert not any(is_running(pid) for pid in processes)
        assert_same(one_pass(kept)[0], alone)


def test_a_kept_process_that_dies_between_two_passes_is_named(shards):
    with closing(kept_batches(shards)) as kept:
        _, processes = one_pass(kept)
        victim = multiprocessing.active_children()[0]
        victim.kill()
        victim.join()
        begun = time.monotonic()
        with pytest.raises(DataError, match=rf"a loader process \(pid {victim.pid}\) was killed by SIGKILL"):
            one_pass(kept)
        assert time.monotonic() - begun < 4  # not after torch's wait of 5 s
        assert not any(is_running(pid) for pid in processes)


def test_a_pass_that_is_not_finished_ends_the_processes(shards):
    kept = kept_batches(shards)
    with suppress(ZeroDivisionError), kept.one_pass() as batches:
        next(batches)
        processes = {p.pid for p in multiprocessing.active_children()}
        raise ZeroDivisionError
    assert len(processes) == 2
    assert not any(is_running(pid) for pid in processes)


@contextmanager
def served_batches(shards, **changes) -> Iterator[tuple[Batches, int]]:
    """Batches for fine-tuning from processes of a server, and the server's process number."""
    recipe = tiny_recipe(shards.folder, data__workers=2, **changes)
    where = {"rank": 0, "world_size": 1, "micro_batch": 8, "epoch": 0, "step": 0}
    with fork_server(), train_batches(shards, recipe, stage="finetune", **where) as batches:
        (server,) = {psutil.Process(p.pid).ppid() for p in multiprocessing.active_children()}
        assert server != os.getpid()
        yield batches, server


def test_a_server_s_processes_load_the_same_batches_whatever_a_preemption_signals(shards, whole):
    with served_batches(shards) as (batches, server):
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(server, number)
        assert_same(list(batches), whole["finetune"])
    assert not is_running(server)


@pytest.mark.slow
def test_the_death_of_the_server_is_an_error_and_the_next_processes_are_started_without_it(shards, whole):
    with served_batches(shards, stages__finetune__epochs=1000) as (batches, server):
        next(batches)
        processes = [p.pid for p in multiprocessing.active_children()]
        os.kill(server, signal.SIGKILL)
        with pytest.raises(DataError, match="a loader process"):
            list(batches)
        assert not any(is_running(pid) for pid in processes)
        assert_same(load(shards, "finetune", data__workers=1), whole["finetune"])


SCRIPT = """
    import multiprocessing, os, signal, sys, time
    from contextlib import nullcontext
    from pathlib import Path
    from livt_scale.data import loader_processes
    from livt_scale.data.fork_server import fork_server
    from livt_scale.data.loader import train_batches
    from livt_scale.data.shard_set import ShardSet
    from livt_scale.config.recipe import Recipe
    recipe = Recipe.model_validate_json(sys.argv[2])
    shards = ShardSet.open(recipe.data.train)
    if "at once" in sys.argv[1]:  # a loader process that only begins when the main process has gone
        main, leave = Path(f"/proc/{os.getpid()}"), loader_processes.leave_server
        def leave_late():
            leave()
            while main.exists():
                time.sleep(0.01)
            time.sleep(0.3)  # the server ends too
        loader_processes.leave_server = leave_late
    with fork_server() if "served" in sys.argv[1] else nullcontext():
        batches = train_batches(shards, recipe, stage="pretrain", rank=0, world_size=1, micro_batch=8, epoch=0, step=0)
        if "at once" not in sys.argv[1]:
            next(batches)
        print(*[p.pid for p in multiprocessing.active_children()], flush=True)
        if "killed" in sys.argv[1]:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    "end",
    ["killed", "killed at once", "finished", "served and killed", "served and killed at once", "served and finished"],
)
def test_no_process_outlives_the_main_one(shards, end):
    recipe = tiny_recipe(shards.folder, data__workers=2, stages__pretrain__epochs=1000)
    done = warm.run(["-c", textwrap.dedent(SCRIPT), end, recipe.model_dump_json()], timeout=120)
    assert done.returncode == (-signal.SIGKILL if "killed" in end else 0), done.stderr
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 60
    while any(is_running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(is_running(pid) for pid in workers)


@pytest.mark.parametrize("error", [OSError(errno.ENOSYS, "an old kernel"), AttributeError("a Python without it")])
def test_loader_processes_end_where_there_are_no_pidfds(shards, monkeypatch, error):
    def pidfd_open(_):
        raise error

    monkeypatch.setattr(os, "pidfd_open", pidfd_open)
    recipe = tiny_recipe(shards.folder, data__workers=1)
    start = {"stage": "pretrain", "rank": 0, "world_size": 1, "micro_batch": 8, "epoch": 0, "step": 0}
    with train_batches(shards, recipe, **start) as batches:
        next(batches)
        (process,) = batches._workers
        _kill(batches._packed, batches._workers, batches._handles)
        assert not is_running(process.pid)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="Linux alone")
def test_shared_memory_has_no_name(shards):
    before = set(Path("/dev/shm").glob("torch_*"))
    batches = load(shards, data__workers=2)
    assert batches
    assert set(Path("/dev/shm").glob("torch_*")) <= before


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="Linux alone")
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_blocks_go_round_and_none_is_filled_while_a_view_of_it_lives(shards, whole, workers):
    long = {"stages__pretrain__epochs": 60, "stages__pretrain__warmup_epochs": 0, "data__workers": workers}
    recipe = tiny_recipe(shards.folder, **long)
    start = {"stage": "pretrain", "rank": 0, "world_size": 1, "micro_batch": 8, "epoch": 0, "step": 0}
    kept, addresses = [], set()
    with train_batches(shards, recipe, **start) as batches:
        for number, batch in enumerate(batches):
            addresses.add(batch.images.data_ptr())
            if number % 13 == 0 or number < 6:  # views of all kinds, some longer-lived than there are blocks
                view = batch.images[3:5, 1]
                kept.append((view, view.clone(), batch.labels.view(2, 4), batch.labels.tolist()))
            del batch
            if number == 6:
                pids = {process.pid for process in batches._workers}
                assert {name[0] for name in _RECEIVED} >= pids
        assert number == 60 * STEPS - 1
        assert len(addresses) < 60 * STEPS / 2  # else nothing would have gone round
    assert not {name[0] for name in _RECEIVED} & pids
    for view, copy, labels, values in kept:  # after the processes have ended, too
        assert torch.equal(view, copy)
        assert labels.flatten().tolist() == values


def test_a_process_forked_while_a_batch_is_in_use_does_not_hand_its_block_back(shards):
    recipe = tiny_recipe(shards.folder, data__workers=1)
    start = {"stage": "pretrain", "rank": 0, "world_size": 1, "micro_batch": 8, "epoch": 0, "step": 0}
    with train_batches(shards, recipe, **start) as batches:
        batch = next(batches)
        block = next(block for name, block in _RECEIVED.items() if name[0] == batches._workers[0].pid)
        if (child := os.fork()) == 0:
            del batch
            gc.collect()
            os._exit(0)
        os.waitpid(child, 0)
        assert block[0] == 1
        del batch
        gc.collect()
        assert block[0] == 0


def test_a_message_between_processes_stays_below_the_pipe_s_atomic_size(shards):
    recipe = tiny_recipe(shards.folder)
    dataset = finetuning_dataset(shards, recipe)
    assert len(bytes(ForkingPickler.dumps(next(iter(dataset))))) < 2048
    assert pickle.loads(pickle.dumps(dataset))


def test_an_odd_micro_batch_cannot_be_mixed(shards):
    with pytest.raises(UsageError, match="must be even"):
        load(shards, "finetune", micro=1)
    assert load(shards, "pretrain", micro=1)


@given(height=st.integers(1, 9), batch=st.integers(0, 4), channels=st.sampled_from([1, 3]))
@settings(max_examples=20)
def test_normalising_is_torchvision_s(height, batch, channels):
    images = torch.randint(0, 256, (batch, height, 7, channels), dtype=torch.uint8).permute(0, 3, 1, 2)
    mean, std = (0.48, 0.45, 0.4)[:channels], (0.2, 0.3, 0.25)[:channels]
    ours = normalise(images, mean, std, torch.float32)
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, tv.normalize(images / 255, mean, std))
    assert normalise(images, mean, std, torch.bfloat16).dtype == torch.bfloat16
    room = torch.full(images.shape, torch.nan)
    assert torch.equal(normalise(images, mean, std, torch.float32, out=room), ours)
    assert torch.equal(room, ours)


def test_mixing_is_what_the_papers_say():
    rng = np.random.default_rng(0)
    images, targets = rng.normal(size=(6, 3, 8, 8)), rng.random((6, 4))
    lam = np.array([0.7, 1 - 12 / 64, 1.0])
    box = np.array([[0, 0, 0, 0], [2, 5, 4, 8], [0, 0, 0, 0]])
    mix = Mix(torch.tensor(lam, dtype=torch.float32), torch.tensor(box))
    mixed, soft = apply_mix(torch.tensor(images), torch.tensor(targets), mix)
    expected, expected_soft = images.copy(), targets.copy()
    for k in range(3):
        for own, other in ((2 * k, 2 * k + 1), (2 * k + 1, 2 * k)):
            y0, y1, x0, x1 = box[k]
            if k == 1:
                expected[own, :, y0:y1, x0:x1] = images[other, :, y0:y1, x0:x1]
            else:
                expected[own] = lam[k] * images[own] + (1 - lam[k]) * images[other]
            expected_soft[own] = lam[k] * targets[own] + (1 - lam[k]) * targets[other]
    np.testing.assert_allclose(mixed, expected, atol=1e-6)
    np.testing.assert_allclose(soft, expected_soft, atol=1e-6)
    assert torch.equal(mixed[4:], torch.tensor(images[4:]))  # exactly: nothing is mixed at 1


@pytest.mark.parametrize(("mixup", "cutmix", "share"), [(0.8, 1.0, 0.5), (0, 1.0, 1.0), (0.8, 0, 0.0)])
def test_mix_parameters_come_from_the_even_slot_and_have_their_distribution(tmp_path, mixup, cutmix, share):
    changes = {"stages__finetune__mixup": mixup, "stages__finetune__cutmix": cutmix}
    part = tiny_recipe(tmp_path, **changes).stages.finetune
    keys = [f"k{i}" for i in range(3000)]
    lam, box = draw_mix(part, keys, seed=1, epoch=2, image_px=32)
    again = draw_mix(part, keys[7:9], seed=1, epoch=2, image_px=32)
    np.testing.assert_array_equal(lam[7:9], again[0])
    np.testing.assert_array_equal(box[7:9], again[1])
    is_cut = box.any(axis=1)
    assert abs(is_cut.mean() - share) < 0.04
    areas = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
    np.testing.assert_allclose(lam[is_cut], 1 - areas[is_cut] / 32**2, atol=1e-6)
    assert box.min() >= 0
    assert box.max() <= 32
    if share < 1:  # Beta(0.8, 0.8): mean 1/2, variance 1 / (4 · 2.6); a cut without area counts as mixup here
        mixed = lam[~is_cut & (lam < 1)]
        assert abs(mixed.mean() - 0.5) < 0.03
        assert abs(mixed.var() - 1 / 10.4) < 0.01
