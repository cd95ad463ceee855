"""What the ranks of a process group do with the ZeRO strategies: deepspeed_ranks.py FOLDER RANK WORLD_SIZE PORT NAME...

For each strategy NAME, `everything` is done on a small model, and what came of it is left in FOLDER/NAME.pt by rank 0.
The tests do the same by `ddp` in one process. For a NAME like `zero3:bytes`, what a rank holds of a larger model.
"""

from __future__ import annotations

import gc
import os
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from livt_scale import optim
from livt_scale.config.recipe import Decoder, Model, Parallel
from livt_scale.distributed.strategy import StepResult, Strategy
from livt_scale.distributed.world import World, process_group
from livt_scale.distributed.wrap import make_strategy
from livt_scale.models.mae import build_mae

MODEL = Model(  # rows that no world size divides: 20 · 3, 20, 12, 1
    width=20, heads=2, depth=1, patch_px=4, image_px=16, channels=1, decoder=Decoder(width=12, depth=1, heads=2)
)
WIDER = MODEL.model_copy(update={"width": 96, "decoder": Decoder(width=48, depth=1, heads=2)})
BATCH = 8
LR = 1e-2
CLIP = 0.3
ALONE = World()


def build(name: str, *, world: World = ALONE, seed: int = 0, model: Model = MODEL, **parallel: Any) -> Strategy:
    torch.manual_seed(seed)
    model = build_mae(model, norm_pix=True, mask_ratio=0.75)
    chosen = Parallel(strategy=name, **parallel)
    return make_strategy(chosen, model, groups, betas=(0.9, 0.95), world=world)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    made = optim.param_groups(model, lr=1e-3, weight_decay=0.05, layer_decay=None, tokens_decay=True)
    made[0]["lr_scale"] = 0.5
    return made


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 1, 16, 16, generator=generator), torch.rand(BATCH, 16, generator=generator)


def forward_backward(strategy: Strategy, step: int, *, world: World, count: int = 1, factor: float = 1.0) -> float:
    """The gradients of a step over `count` micro-batches; `factor`: of the last rank's loss. The mean loss."""
    total = torch.zeros(())
    images, noise = (t.chunk(world.world_size)[world.rank].chunk(count) for t in batch(step))
    for k in range(count):
        loss = strategy.call(images[k], noise[k], last=k == count - 1) / count
        if world.rank == world.world_size - 1:
            loss = loss * factor
        strategy.backward(loss, last=k == count - 1)
        total += loss.detach() / world.world_size
    if world.world_size > 1:
        dist.all_reduce(total)
    return float(total)


def train(
    strategy: Strategy, steps: range, *, world: World = ALONE, max_norm: float | None = None, count: int = 1
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    done = []
    for step in steps:
        loss = forward_backward(strategy, step, world=world, count=count)
        update = strategy.update(LR, max_norm=max_norm)
        assert update.applied
        done.append((loss, update.grad_norm))
    return done


def whole(strategy: Strategy) -> dict[str, Tensor]:
    state = strategy.state()
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in state.items()}


def everything(name: str, *, world: World) -> dict[str, Any]:
    made: dict[str, Any] = {}
    strategy = build(name, world=world)
    made["untrained"] = whole(strategy)
    first = train(strategy, range(2), world=world)
    made["middle"] = middle = whole(strategy)
    made["plain"] = plain = first + train(strategy, range(2, 4), world=world)
    made["state"] = end = whole(strategy)
    made["infer"] = float(strategy.infer(*batch(9)))
    pixels, is_masked = strategy.infer(*batch(9), predict=True)
    made["pixels"], made["is_masked"] = pixels, is_masked
    assert same(whole(strategy), end), "inference has changed the state"
    made["rows"] = {n: tuple(t.to_local().shape) for n, t in strategy.state().items() if isinstance(t, DTensor)}

    forward_backward(strategy, 4, world=world)
    strategy.discard()
    refuses_and_goes_on(strategy, middle, plain, end, world=world)

    clipped = build(name, world=world, adamw="foreach")
    made["clipped"] = train(clipped, range(4), world=world, max_norm=CLIP, count=2)
    made["clipped state"] = whole(clipped)
    made["recomputed"] = train(build(name, world=world, activation_checkpointing=True), range(3), world=world)
    made["bf16"] = train(build(name, world=world, precision="bf16"), range(3), world=world)
    made["fp16"], made["overflow"] = half(name, world=world)
    if name != "ddp":
        offloaded = build(name, world=world, offload="cpu")
        made["offloaded"] = train(offloaded, range(4), world=world, max_norm=CLIP, count=2)
        made["offloaded state"] = whole(offloaded)
        refuses_and_goes_on(
            offloaded, made["offloaded state"], [], made["offloaded state"], world=world, steps=range(0)
        )
    return made


def refuses_and_goes_on(
    strategy: Strategy,
    middle: dict[str, Tensor],
    plain: list[tuple[float, float]],
    end: dict[str, Tensor],
    *,
    world: World,
    steps: range = range(2, 4),
) -> None:
    """Set back to the middle, meet what must not change anything there, and do the last `steps` bit for bit."""
    goes_back(strategy, middle)
    for factor, max_norm in ((float("nan"), None), (float("inf"), CLIP)):
        forward_backward(strategy, 5, world=world, factor=factor)
        update = strategy.update(LR, max_norm=max_norm)
        assert not update.applied
        assert not update.overflow
        assert not torch.tensor(update.grad_norm).isfinite()
        assert same(whole(strategy), middle), "weights or moments have changed"
    forward_backward(strategy, 6, world=world, count=2)
    strategy.discard()
    assert same(whole(strategy), middle)
    assert train(strategy, steps, world=world) == plain[steps.start :]
    assert same(whole(strategy), end)


def goes_back(strategy: Strategy, saved: dict[str, Tensor]) -> None:
    state = strategy.state()
    with torch.no_grad():
        for name, tensor in state.items():
            if isinstance(tensor, DTensor):
                rows = saved[name].chunk(tensor.device_mesh.size())
                rank = tensor.device_mesh.get_local_rank()
                tensor.to_local().copy_(rows[rank] if rank < len(rows) else saved[name][:0])
            else:
                tensor.copy_(saved[name])
    strategy.restored(state)


def half(name: str, *, world: World) -> tuple[list[tuple[float, float]], list[Any]]:
    """fp16: three steps at its first scale, then what a scale comes to that is too high, and one that is not."""
    strategy = build(name, world=world, precision="fp16")
    scales = [strategy.scaler()]
    losses = train(strategy, range(3), world=world)
    scales.append(strategy.scaler())
    before = whole(strategy)
    strategy.set_scaler({"scale": 2.0**60, "good_steps": 7})
    forward_backward(strategy, 3, world=world)
    update: StepResult = strategy.update(LR, max_norm=None)
    scales += [strategy.scaler(), [update.applied, update.overflow], same(whole(strategy), before)]
    strategy.set_scaler({"scale": 1024.0, "good_steps": 1999})
    losses += train(strategy, range(3, 4), world=world)
    return losses, [*scales, strategy.scaler()]


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def leaves_no_trace(name: str, *, world: World) -> None:
    """A stage's engine is gone when the next stage begins, and torch is as it was."""
    linear = nn.functional.linear
    strategy = build(name, world=world)
    train(strategy, range(1), world=world)
    weights, flat = weakref.ref(strategy.model), strategy._state.flats()[0]
    del strategy
    gc.collect()
    if name == "zero3":
        assert flat.untyped_storage().nbytes() == 0
    else:
        assert weights() is None, "the model of a stage that is over is still held"
    assert nn.functional.linear is linear


def measure(name: str, *, world: World) -> dict[str, int]:
    """Bytes a rank holds of `WIDER` after a step and another's backward pass, and how many weights that model has."""
    strategy = build(name, world=world, model=WIDER)
    weights = sum(t.numel() for n, t in strategy.state().items() if n.startswith("model."))
    train(strategy, range(1), world=world)
    forward_backward(strategy, 1, world=world)
    return {"bytes": strategy.held_bytes(), "weights": weights}


def main() -> None:
    folder, rank, world_size, port = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    warnings.simplefilter("error")
    world = World(rank, world_size, local_rank=rank, local_size=world_size)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    gc.freeze()  # DeepSpeed collects garbage for each engine: not through all that was imported
    with process_group(world, timeout_s=60):
        for word in sys.argv[5:]:
            name, _, only_bytes = word.partition(":")
            made = measure(name, world=world) if only_bytes else everything(name, world=world)
            if world.is_main:
                torch.save(made, folder / f"{word}.pt")
            leaves_no_trace(name, world=world)


if __name__ == "__main__":
    main()
