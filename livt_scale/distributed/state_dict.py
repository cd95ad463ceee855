"""The state of a model and its optimizer for a checkpoint, by plain names, so that any strategy can read it.

    model.<name>                       parameters and persistent buffers, named as the bare model names them
    optim.<name>.exp_avg, .exp_avg_sq  AdamW's two moments of that parameter
    optim.<name>.step                  how many steps that parameter has had
    optim.<name>.<key>                 what another optimizer keeps of it in place of these: LARS's momentum_buffer
    ema.<name>, ema.updates            the average of that weight, if the recipe keeps one (`distributed.ema`)

Rates and weight decay are not saved: the recipe and the schedule give them, so that a resumed run follows what it says
now (a stale decay after a resume is NVIDIA/Megatron-LM#7468). Wrappers (DDP, torch.compile, activation checkpointing)
leave no trace in the names.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from livt_scale.optim import unwrapped
from livt_scale.util.errors import CheckpointMismatch

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")  # torch.compile; torch's checkpoint_wrapper
AVERAGE = "ema."  # what the names of averaged weights begin with
MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # AdamW's


def collect(model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Tensor]:
    """The live tensors of `model` and `optimizer` by name: save them, or load into them in place.

    An optimizer that has not stepped yet gets the zero moments that its first step would have made.
    """
    state = {f"model.{name}": tensor.detach() for name, tensor in _model_tensors(model).items()}
    if optimizer is not None:
        for name, parameter in _optimized(model, optimizer).items():
            moments = _moments(optimizer, parameter)
            kept = MOMENTS if moments.keys() == set(MOMENTS) else sorted(moments)
            state.update({f"optim.{name}.{moment}": moments[moment] for moment in kept})
    return state


def restore(model: nn.Module, optimizer: Optimizer | None, flat: dict[str, Tensor]) -> None:
    """Copy `flat` (as `collect` gives it) into `model` and `optimizer`; CheckpointMismatch if a name is missing or new.

    Not needed after `store.load(path, collect(model, optimizer))`, which fills the live tensors themselves.
    """
    live = collect(model, optimizer)
    missing, unexpected = sorted(live.keys() - flat.keys()), sorted(flat.keys() - live.keys())
    forms = [name for name in live if name in flat and live[name].shape != flat[name].shape]
    if missing or unexpected or forms:
        raise CheckpointMismatch(
            f"this state is of another model: missing {missing[:8]}, unexpected {unexpected[:8]}, "
            f"other shape {forms[:8]}"
        )
    with torch.no_grad():
        for name, target in live.items():
            if flat[name] is not target:
                target.copy_(flat[name])


def plain_name(name: str) -> str:
    """`blocks.0._orig_mod.attn.qkv.weight` -> `blocks.0.attn.qkv.weight`."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    model = unwrapped(model)
    tensors = {plain_name(name): value for name, value in model.state_dict(keep_vars=True).items()}
    for name, value in tensors.items():
        assert isinstance(value, Tensor), f"{name}: only tensors can be saved"
    return tensors


def _optimized(model: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """The parameters of the optimizer, by name in the order of the model; a tied one under its first name."""
    ours = {id(p) for group in optimizer.param_groups for p in group["params"]}
    named: dict[int, tuple[str, nn.Parameter]] = {}
    for name, tensor in _model_tensors(model).items():
        if id(tensor) in ours and id(tensor) not in named:
            assert isinstance(tensor, nn.Parameter)
            named[id(tensor)] = (name, tensor)
    assert len(named) == len(ours), "the optimizer has parameters that the model does not"
    return dict(named.values())


def _moments(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    state = optimizer.state[parameter]
    if not state and isinstance(optimizer, (Adam, AdamW)):
        group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
        assert not group["amsgrad"], "amsgrad has a third moment, which is not saved"
        # as Adam._init_group makes them (torch 2.11 to 2.14): the count is on the weights' device for a fused step
        beside = group["capturable"] or group["fused"]
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if beside else "cpu")
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state
