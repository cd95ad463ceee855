"""How each layer of the network learns, at the steps that are logged: `log.layer_groups`.

For each group of parameters (the embedding, each block, the head; in pretraining the decoder's too):

    grad_norm       of its gradient, before clipping
    weight_norm     of its parameters after the step
    update_ratio    norm of the step's change / weight_norm: 1e-3 is usual, 1e-6 does not learn, 1e-1 is unstable

A ViT has one loss, at its end; a loss per layer would need heads that the method does not have. These three numbers
answer the question behind it: which layers the gradient reaches, and which ones move.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from livt_scale.config.timm_models import TimmFacts
from livt_scale.models.timm_backbone import TimmClassifier
from livt_scale.train.loop import Hook, Loop, Step

BLOCK = re.compile(r"(decoder_)?blocks\.(\d+)\.")
RESIDUAL = re.compile(r"layer(\d+)\.(\d+)\.")  # of a ResNet
NAMES = ("grad_norm", "weight_norm", "update_ratio")


def group_of(name: str) -> str:
    """The layer group of a parameter of either network, by its plain name."""
    if block := BLOCK.match(name):
        return f"{block[1] or ''}block_{int(block[2]):02d}"
    if block := RESIDUAL.match(name):
        return f"layer_{block[1]}_block_{int(block[2]):02d}"
    if name.startswith(("decoder_embed.", "mask_token")):
        return "decoder_embed"
    if name.startswith(("decoder_norm.", "decoder_pred.")):
        return "decoder_pred"
    if name.startswith(("fc_norm.", "head.", "head_dist.", "fc.")):
        return "head"
    return "norm" if name.startswith("norm.") else "embed"


def group_in_timm(name: str, facts: TimmFacts) -> str:
    """The layer group of a parameter of another model of timm: its block, "head", or "embed" for the rest."""
    block = next((block for block in facts.blocks if name.startswith(f"{block}.")), None)
    return block or ("head" if name.startswith(f"{facts.head}.") else "embed")


class LayerStats(Hook):
    """Adds `layers` to the lines of metrics.jsonl. To be called before the hook that writes them."""

    def at_start(self, loop: Loop) -> None:
        self._groups = LayerGroups(loop.state.strategy.model)

    def before_update(self, loop: Loop, step: Step) -> None:
        if loop.schedule.logs(step.number):
            self._groups.before(scale=(loop.state.strategy.scaler() or {}).get("scale", 1.0))

    def after_step(self, loop: Loop, step: Step) -> None:
        if loop.schedule.logs(step.number):
            table = self._groups.after()
            step.metrics["layers"] = {group: {k: _finite(v) for k, v in row.items()} for group, row in table.items()}


class LayerGroups:
    """The groups of one model, its parameters plain or sharded. Both calls are collective if it is sharded.

    Between the two calls a copy of the rank's (shard of the) parameters is held.
    """

    def __init__(self, model: nn.Module) -> None:
        self._groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                group = group_in_timm(name, model.facts) if isinstance(model, TimmClassifier) else group_of(name)
                self._groups.setdefault(group, []).append(parameter)
        self._gradients: Tensor | None = None
        self._before: list[list[Tensor]] = []

    @torch.no_grad()
    def before(self, *, scale: float) -> None:
        """The gradients are complete, the weights not yet updated. `scale`: fp16's loss scale."""
        groups = self._groups.values()
        self._gradients = _norms([[p.grad for p in group if p.grad is not None] for group in groups]) / scale
        self._before = [[p.detach().clone() for p in group] for group in groups]

    @torch.no_grad()
    def after(self) -> dict[str, dict[str, float]]:
        """By group, the numbers of the step since `before`; empty if a bad loss ended the step before that."""
        if self._gradients is None:
            return {}
        groups = self._groups.values()
        weights = _norms([[p.detach() for p in group] for group in groups])
        pairs = zip(groups, self._before, strict=True)
        changes = _norms([[p.detach() - old for p, old in zip(group, olds, strict=True)] for group, olds in pairs])
        table = torch.stack((self._gradients, weights, changes / weights), dim=1).tolist()  # [groups, 3]
        self._gradients, self._before = None, []
        return {group: dict(zip(NAMES, row, strict=True)) for group, row in zip(self._groups, table, strict=True)}


def _norms(groups: list[list[Tensor]]) -> Tensor:
    """The norm of each list of tensors, over all shards: float32 `[groups]`."""
    totals = (nn.utils.get_total_norm(tensors, foreach=True) for tensors in groups)
    return torch.stack([t.full_tensor() if isinstance(t, DTensor) else t for t in totals]).float()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
