from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest
import torch

from livt_scale.checkpoint import io
from livt_scale.checkpoint import saver as saver_module
from livt_scale.checkpoint.dcp import Staging, plan_write
from livt_scale.checkpoint.load import (
    Position,
    Retention,
    Saver,
    list_checkpoints,
    load,
    newest_whole,
    read_manifest,
    read_tensors,
    verify,
)
from livt_scale.distributed.collectives import Peers
from livt_scale.util.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch

ONLY = Position(0, 1)


def steps(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in sorted(folder.iterdir())]  # a temporary name would fail here


def save_and_wait(saver: Saver, state: dict[str, torch.Tensor], *, step: int) -> None:
    saver.save(state, position=Position(0, step), facts={})
    saver.wait()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_what_is_saved_comes_back_bit_for_bit(tmp_path, state, mode):
    saved = {**state(3), "model.odd": torch.randn(5, 6).t()[1:4], "model.parameter": torch.nn.Parameter(torch.randn(4))}
    with Saver(tmp_path / "c", mode=mode) as saver:
        saver.save(saved, position=Position(2, 20), facts={"stage": "pretrain", "counts": [3, 1]}, score=0.5)
    into = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    manifest = load(newest_whole(tmp_path / "c"), into)
    for name, tensor in saved.items():
        assert torch.equal(into[name], tensor), name
        assert into[name].dtype == tensor.dtype
    assert manifest["position"] == {"epoch": 2, "step": 20}
    assert manifest["facts"] == {"stage": "pretrain", "counts": [3, 1]}
    assert (manifest["world_size"], manifest["score"], manifest["final"]) == (1, 0.5, False)
    assert read_tensors(newest_whole(tmp_path / "c"), choose=lambda n: n.endswith("odd")).keys() == {"model.odd"}


def test_both_modes_write_the_same_bytes_and_no_path_of_the_writer(tmp_path, state):
    written = []
    for mode in ("sync", "async"):
        with Saver(tmp_path / mode, mode=mode) as saver:
            saver.save(state(3), position=ONLY, facts={})
        written.append({p.name: p.read_bytes() for p in (tmp_path / mode / "step-00000001").iterdir()})
    for name in written[0].keys() - {"manifest.json"}:  # which holds the time
        assert written[0][name] == written[1][name], name
        assert str(tmp_path).encode() not in written[0][name]
    assert str(tmp_path).encode() not in written[0]["manifest.json"]


def test_a_later_step_cannot_change_what_an_async_save_writes(tmp_path, state, monkeypatch):
    go = threading.Event()
    real = saver_module.publish
    monkeypatch.setattr(saver_module, "publish", lambda job, peers: (go.wait(60), real(job, peers)))
    live = state(1)
    with Saver(tmp_path, mode="async") as saver:
        saver.save(live, position=ONLY, facts={})
        for tensor in live.values():
            tensor.fill_(9)  # the next optimizer step, while nothing is on disk yet
        assert newest_whole(tmp_path) is None
        go.set()
    for name, tensor in read_tensors(tmp_path / "step-00000001").items():
        assert torch.equal(tensor, state(1)[name]), name


def test_copies_are_side_by_side_in_one_buffer_that_is_kept_and_each_is_written_as_it_is():
    live = {
        "model.a": torch.arange(6.0).view(2, 3), "model.b": torch.ones(5, dtype=torch.bfloat16),
        "model.none": torch.empty(0, 4), "step": torch.tensor(7), "model.c": torch.randn(2, 3, 4, 4),
    }  # fmt: skip
    live["model.c"] = live["model.c"].to(memory_format=torch.channels_last)
    plan, staging = plan_write(live, Peers()), Staging()
    starts = []
    for _ in range(2):
        copies = {index.fqn: copy for index, copy in staging.copy(live, plan, Peers()).tensors.items()}
        for name, tensor in live.items():
            assert torch.equal(copies[name], tensor), name
            assert copies[name].is_contiguous()
            assert copies[name].untyped_storage().nbytes() == tensor.nbytes  # else DCP would copy it once more
        starts.append(sorted(copy.data_ptr() for copy in copies.values() if copy.numel()))
        live["model.a"].add_(1)
    assert starts[0] == starts[1]
    assert starts[0][-1] - starts[0][0] < sum(tensor.nbytes for tensor in live.values()) + 4 * 64
    assert staging.num_bytes == sum(tensor.nbytes for tensor in live.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_gpus_tensors_are_copied_before_the_next_step(tmp_path, mode):
    live = {f"model.{k}": torch.full((2048, 2048), float(k), device="cuda") for k in range(8)}
    with Saver(tmp_path, mode=mode, retention=Retention(keep_last=9)) as saver:
        for step in range(3):
            saver.save(live, position=Position(0, step), facts={})
            for tensor in live.values():
                tensor.add_(1)
    for step in range(3):
        for k in range(8):
            into = {f"model.{k}": torch.zeros(2048, 2048, device="cuda")}
            load(tmp_path / f"step-{step:08d}", into, allow_unexpected=["model.*"])
            assert (into[f"model.{k}"] == k + step).all()


def test_a_failed_rename_brings_the_replaced_one_back(tmp_path, state, monkeypatch):
    with Saver(tmp_path, mode="sync") as saver:
        saver.save(state(1), position=ONLY, facts={})
        real = Path.rename

        def failing(self, target):
            if self.name.endswith(".partial"):
                raise OSError(errno.EIO, "Input/output error")
            return real(self, target)

        monkeypatch.setattr(Path, "rename", failing)
        with pytest.raises(CheckpointError, match="Input/output error"):
            saver.save(state(2), position=ONLY, facts={})
        monkeypatch.undo()
    assert steps(tmp_path) == [1]
    assert read_tensors(tmp_path / "step-00000001")["model.count"] == 1


def test_one_save_is_in_flight_at_most(tmp_path, state, monkeypatch):
    real = saver_module.publish
    running, most = [], []

    def counted(job, peers):
        running.append(job)
        most.append(len(running))
        real(job, peers)
        running.remove(job)

    monkeypatch.setattr(saver_module, "publish", counted)
    with Saver(tmp_path, mode="async", retention=Retention(keep_last=9)) as saver:
        for step in range(5):
            saver.save(state(step), position=Position(0, step), facts={})
        saver.wait()
        assert steps(tmp_path) == [0, 1, 2, 3, 4]
    assert most == [1] * 5
    for step in range(5):
        assert read_tensors(tmp_path / f"step-{step:08d}")["model.count"] == step


def test_memory_stays_level_over_fifty_saves(tmp_path):
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    live = {"model.w": torch.zeros(500_000), "optim.w.exp_avg": torch.zeros(500_000)}  # 4 MB
    with Saver(tmp_path, mode="async", retention=Retention(keep_last=1)) as saver:
        for step in range(50):
            saver.save(live, position=Position(0, step), facts={})
            if step == 9:
                saver.wait()
                before = resident_bytes()
        saver.wait()
        assert resident_bytes() - before < 40e6  # one copy kept from each of the 40 saves would be 160 MB


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_disk_without_room_is_named_before_anything_is_written(tmp_path, state, monkeypatch, mode):
    saver = Saver(tmp_path, mode=mode)
    saver.save(state(1), position=ONLY, facts={})
    saver.wait()
    monkeypatch.setattr(io, "free_bytes", lambda folder: 2048)
    with pytest.raises(CheckpointError, match=r"step-00000002 was not saved: it needs [\d.]+ KiB, 2\.0 KiB are free"):
        save_and_wait(saver, state(2), step=2)
    assert steps(tmp_path) == [1]
    monkeypatch.undo()
    saver.save(state(3), position=Position(0, 3), facts={})  # one failure does not spoil the next
    saver.close()
    assert newest_whole(tmp_path).name == "step-00000003"


@pytest.mark.parametrize(("code", "says"), [(errno.ENOSPC, "disk is full"), (errno.EIO, "Input/output error")])
@pytest.mark.parametrize("write", range(0, 40, 3))
def test_a_write_that_fails_half_way_leaves_the_old_ones_alone(tmp_path, state, monkeypatch, code, says, write):
    saver = Saver(tmp_path, mode="async", retention=Retention(keep_last=1))
    saver.save(state(1), position=ONLY, facts={})
    saver.wait()
    real, calls = io.HashedFile.write, []

    def failing(self, data):
        calls.append(1)
        if len(calls) > write:
            self.error = self.error or OSError(code, "Input/output error" if code == errno.EIO else "No space left")
            raise self.error
        return real(self, data)

    monkeypatch.setattr(io.HashedFile, "write", failing)
    with pytest.raises(CheckpointError, match=says):
        save_and_wait(saver, state(2), step=2)
    assert steps(tmp_path) == [1]
    assert verify(tmp_path / "step-00000001") == []
    saver.close()


def test_the_next_save_says_that_the_one_before_failed(tmp_path, state, monkeypatch):
    saver = Saver(tmp_path, mode="async")
    monkeypatch.setattr(io, "free_bytes", lambda folder: 0)
    saver.save(state(1), position=ONLY, facts={})
    with pytest.raises(CheckpointError, match="step-00000001 was not saved"):
        saver.save(state(2), position=Position(0, 2), facts={})
    saver.close()
    assert steps(tmp_path) == []


def test_close_tells_of_a_failed_save_and_does_not_hide_another_error(tmp_path, state, monkeypatch):
    monkeypatch.setattr(io, "free_bytes", lambda folder: 0)
    with pytest.raises(CheckpointError, match="was not saved"), Saver(tmp_path, mode="async") as saver:
        saver.save(state(1), position=ONLY, facts={})

    def stopped_by_another_error() -> None:
        with Saver(tmp_path, mode="async") as saver:
            saver.save(state(1), position=ONLY, facts={})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        stopped_by_another_error()
    assert "was not saved" in caught.value.__notes__[0]


def test_a_folder_that_cannot_be_made_is_an_error_of_the_store(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write checkpoints"):
        Saver(tmp_path / "file" / "checkpoints")


def test_pruning_counts_whole_ones_only(tmp_path, state):
    """A damaged newer one must not push out the last good one (NVIDIA-NeMo/Megatron-Bridge#5184)."""
    with Saver(tmp_path, mode="sync", retention=Retention(keep_last=2, keep_best=False)) as saver:
        for step in (1, 2):
            saver.save(state(step), position=Position(0, step), facts={})
    with Saver(tmp_path, mode="sync", retention=Retention(keep_last=2, keep_best=False)) as saver:
        damaged = tmp_path / "step-00000002" / "__0_0.distcp"
        raw = bytearray(damaged.read_bytes())
        raw[100] ^= 1  # of the same size: only reading it shows
        damaged.write_bytes(raw)
        saver.save(state(3), position=Position(0, 3), facts={})
        assert steps(tmp_path) == [1, 2, 3]
        saver.save(state(4), position=Position(0, 4), facts={})
        assert steps(tmp_path) == [2, 3, 4]  # two whole ones stay, and what is damaged is left for a person to see


def test_a_failed_save_prunes_nothing(tmp_path, state, monkeypatch):
    with Saver(tmp_path, mode="sync", retention=Retention(keep_last=1)) as saver:
        saver.save(state(1), position=ONLY, facts={})
        monkeypatch.setattr(io, "write_synced", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "x")))
        with pytest.raises(CheckpointError, match="disk is full"):
            saver.save(state(2), position=Position(0, 2), facts={})
        assert steps(tmp_path) == [1]


def test_a_checkpoint_that_cannot_be_pruned_is_reported_and_the_new_one_stands(tmp_path, state, monkeypatch):
    with Saver(tmp_path, mode="sync", retention=Retention(keep_last=1)) as saver:
        saver.save(state(1), position=ONLY, facts={})
        real = io.remove_folder

        def refused(folder):
            if folder.name.endswith("pruned") and folder.exists():
                raise PermissionError(errno.EACCES, "Permission denied")
            real(folder)

        monkeypatch.setattr(io, "remove_folder", refused)
        with pytest.raises(CheckpointError, match="was saved, but an old checkpoint could not be removed"):
            saver.save(state(2), position=Position(0, 2), facts={})
    assert newest_whole(tmp_path).name == "step-00000002"


def test_the_same_step_again_replaces_the_one_before(tmp_path, state):
    with Saver(tmp_path, mode="async") as saver:
        saver.save(state(1), position=ONLY, facts={})
        saver.save(state(2), position=ONLY, facts={}, score=0.5, final=True)
    assert steps(tmp_path) == [1]
    (info,) = list_checkpoints(tmp_path)
    assert info.final
    assert info.score == 0.5
    assert read_tensors(info.path)["model.count"] == 2


def test_a_change_of_the_state_makes_a_new_plan(tmp_path, state):
    with Saver(tmp_path, mode="async", retention=Retention(keep_last=9)) as saver:
        saver.save(state(1), position=Position(0, 1), facts={})
        saver.save({"model.weight": torch.ones(9, 9)}, position=Position(0, 2), facts={})
        saver.save({"model.weight": torch.ones(9, 9).double()}, position=Position(0, 3), facts={})
    for step, dtype in ((2, torch.float32), (3, torch.float64)):
        (tensor,) = read_tensors(tmp_path / f"step-{step:08d}").values()
        assert torch.equal(tensor, torch.ones(9, 9, dtype=dtype))


def test_a_save_does_not_depend_on_the_facts_after_it_was_asked_for(tmp_path, state):
    facts = {"sums": {"loss": 1.0}}
    with Saver(tmp_path, mode="async") as saver:
        saver.save(state(1), position=ONLY, facts=facts)
        facts["sums"]["loss"] = 2.0
    assert read_manifest(tmp_path / "step-00000001").facts == {"sums": {"loss": 1.0}}


def test_names_and_forms_that_differ_are_listed(save, state):
    path = save(4)
    into = state(0)
    into["model.head.weight"] = into.pop("model.weight")
    into["model.half"] = torch.zeros(8, dtype=torch.bfloat16)
    into["model.count"] = torch.tensor(0.0)
    with pytest.raises(CheckpointMismatch) as caught:
        load(path, into)
    for part in (
        "missing in the checkpoint: model.head.weight",
        "in the checkpoint alone: model.weight",
        "model.half ([7] torch.bfloat16 in the checkpoint, [8] torch.bfloat16 here)",
        "model.count ([] torch.int64 in the checkpoint, [] torch.float32 here)",
    ):
        assert part in str(caught.value)
    assert not into["model.head.weight"].any()  # nothing was loaded in part


def test_only_named_tensors_may_differ_and_nothing_loaded_is_an_error(save, state):
    path = save(4)
    into = {"model.weight": torch.zeros(3, 5), "model.head": torch.zeros(2)}
    load(path, into, allow_missing=["model.head"], allow_unexpected=["optim.*", "model.[chn]*"])
    assert torch.equal(into["model.weight"], state(4)["model.weight"])
    with pytest.raises(CheckpointMismatch, match=r"optim\.weight\.step"):
        load(path, into, allow_missing=["model.head"], allow_unexpected=["model.*"])
    with pytest.raises(CheckpointMismatch, match="none of the wanted tensors"):
        load(path, {"other": torch.zeros(1)}, allow_missing=["*"], allow_unexpected=["*"])


def test_a_damaged_checkpoint_is_not_loaded(save, state):
    path = save(4)
    data = path / "__0_0.distcp"
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 16
    data.write_bytes(raw)
    with pytest.raises(CheckpointDamaged, match=r"__0_0\.distcp was changed"):
        load(path, state(0))
    with pytest.raises(CheckpointDamaged, match=r"__0_0\.distcp was changed"):
        read_tensors(path)
    data.unlink()
    with pytest.raises(CheckpointDamaged, match=r"__0_0\.distcp"):
        load(path, state(0), check=False)
