"""A strategy that also keeps an exponential moving average (EMA) of the weights: `stages.finetune.ema`.

After the k-th update that was applied (k from 0), with w the weights and a the average, in fp32:

    a ← a + (1 − d_k) · (w − a)        d_k = decay, with warm-up min(decay, (1 + k) / (10 + k))

The warm-up lets a short run forget its initial weights: d is 0.1, 0.18, 0.25, …, 0.99 after 900 updates, 0.999 after
9,000. A skipped update does not change the average. It is part of the strategy's state (`ema.<name>`, `ema.updates`):
saved, resumed, rolled back and compared between ranks like the rest; the loop does not know about it.

Memory: 4 bytes per weight; of the rank's shard under fsdp, of the full model under ddp, zero1 and zero2. zero3 gathers
a weight only when a layer is called, so its average would need extra gathers: the recipe refuses it.

Source: Polyak and Juditsky 1992; the warm-up is that of `tf.train.ExponentialMovingAverage`. Why not torch's
`AveragedModel`: it deep-copies a model, which sharded and engine-owned parameters do not allow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from livt_scale.config.recipe import Ema
from livt_scale.distributed.state_dict import AVERAGE, plain_name
from livt_scale.distributed.strategy import DeviceResult, DeviceUpdates, StepResult, Strategy, StrategyWrapper

UPDATES = f"{AVERAGE}updates"


def with_ema(strategy: Strategy, ema: Ema | None) -> Strategy:
    """`strategy` wrapped so that it also keeps the average that `ema` asks for; None: unchanged."""
    return strategy if ema is None else WithEma(strategy, ema)


def decay_at(updates: int, ema: Ema) -> float:
    """The decay at the update that has `updates` before it."""
    return min(ema.decay, _warm_up(updates)) if ema.warmup else ema.decay


def _warm_up(updates: Any) -> Any:
    """The decay of the warm-up, of a number or a float64 tensor."""
    return (1 + updates) / (10 + updates)


class WithEma(StrategyWrapper):
    """A `Strategy`: the inner one, and the average of its trained weights, which starts as their copy."""

    def __init__(self, strategy: Strategy, ema: Ema) -> None:
        super().__init__(strategy)
        self._ema = ema
        self._weights = {plain_name(name): p for name, p in self.model.named_parameters() if p.requires_grad}
        assert "updates" not in self._weights, "a weight has the name of the count"
        self._average = {name: weight.detach().clone() for name, weight in self._weights.items()}
        device = next(iter(self._weights.values())).device if strategy.on_device is not None else None
        self._updates = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, lr: float, *, max_norm: float | None) -> StepResult:
        update = self._inner.update(lr, max_norm=max_norm)
        if update.applied:
            self._follow()
        return update

    @property
    def on_device(self) -> DeviceUpdates | None:
        return self if self._inner.on_device is not None else None

    @torch.no_grad()
    def update_unless(self, is_bad: Tensor, lr: float, *, max_norm: float | None) -> DeviceResult:
        assert self._inner.on_device is not None, "see on_device"
        update = self._inner.on_device.update_unless(is_bad, lr, max_norm=max_norm)
        decay: Any = self._ema.decay
        if self._ema.warmup:
            decay = _warm_up(self._updates.double()).clamp(max=decay)
        share = torch.where(update.applied, 1 - decay, 0.0).float()
        average = _locals(self._average)
        torch._foreach_lerp_(average, _locals(self._weights), [share] * len(average))
        self._updates += update.applied
        return update

    @torch.no_grad()
    def _follow(self) -> None:
        share = 1 - decay_at(int(self._updates), self._ema)
        torch._foreach_lerp_(_locals(self._average), _locals(self._weights), share)  # as torch's own swa_utils
        self._updates += 1

    @contextmanager
    def average_in_place(self) -> Iterator[None]:
        """Within the block the model computes with the average; afterwards its own weights are back, bit for bit.

        Tensors are swapped one by one, so there is no third copy. Do not train or save within the block.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # an evaluation may have left the other weights gathered
        for weight, average in zip(_locals(self._weights), _locals(self._average), strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def state(self) -> dict[str, Tensor]:
        average = {f"{AVERAGE}{name}": tensor for name, tensor in self._average.items()}
        return {**self._inner.state(), **average, UPDATES: self._updates}

    def restored(self, state: dict[str, Tensor]) -> None:
        """`state()` gave the average's live tensors, and they have been filled: the rest is the inner strategy's."""
        self._inner.restored({name: tensor for name, tensor in state.items() if not name.startswith(AVERAGE)})

    def held_bytes(self) -> int:
        return self._inner.held_bytes() + sum(tensor.nbytes for tensor in _locals(self._average))


def _locals(tensors: dict[str, Any]) -> list[Tensor]:
    """What this rank holds of each, sharing its memory."""
    found = (t.detach() if isinstance(t, nn.Parameter) else t for t in tensors.values())
    return [t.to_local() if isinstance(t, DTensor) else t for t in found]
