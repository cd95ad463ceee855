"""`livt` on a machine that pretends to have one GPU: python pretend_cuda.py REPORT.json train RECIPE …

Tensors "on cuda:0" are wrappers around CPU tensors and hold real numbers. What a GPU refuses is refused: an operation
on CUDA and CPU tensors together, `.numpy()` of a CUDA tensor. What makes the host wait for a GPU is counted by the line
of the package that asks for it: `.item()`, `.tolist()`, `float()`, a blocking copy, a Python number made into a CUDA
tensor, an index by a mask. REPORT.json is a list of [what, file:line, count].

Kernels, streams and memory are not modelled: nothing here says how fast or how large a run on a GPU is.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
import types
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda", 0)
READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique_dim", "_unique2")
NUMBERS = ("tolist", "item", "__float__", "__int__", "__bool__", "__index__")
TOGETHER = ("cat", "stack", "bmm", "mm", "addmm")  # and all that begin with these:
TOGETHER_BEGIN = ("_foreach", "_fused", "_amp_")
INDEXES = (torch.int64, torch.int32, torch.bool, torch.uint8)

waits: Counter[tuple[str, str]] = Counter()


class MixedDevicesError(RuntimeError):
    """An operation on CUDA and CPU tensors."""


def asked_by() -> str:
    """The innermost line of the package on the stack."""
    for frame in reversed(traceback.extract_stack(limit=60)):
        if "/livt_scale/" in frame.filename:
            return f"{frame.filename.split('/livt_scale/')[-1]}:{frame.lineno}"
    return "outside"


def wait(what: str) -> None:
    waits[what, asked_by()] += 1


class Gpu(Tensor):
    """A tensor "on cuda:0": `inner` is the CPU tensor that holds its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> Gpu:
        assert not isinstance(inner, Gpu)
        made = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device="cpu", requires_grad=requires_grad,
        )  # fmt: skip
        made.inner = inner
        return made

    device = property(lambda _: CUDA)
    is_cuda = property(lambda _: True)
    is_cpu = property(lambda _: False)

    def __repr__(self) -> str:
        return f"Gpu({self.inner})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, kinds: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        _look_at(name, args, options)
        if options.get("device") is not None:
            options["device"] = torch.device("cpu")
        options.pop("pin_memory", None)
        out = func(*tree_map(_inner, args), **tree_map(_inner, options))
        if name == "copy_":
            return args[0]
        return return_and_correct_aliasing(func, args, dict(kwargs or {}), tree_map(_outer, out))


def _look_at(name: str, args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Count what waits; refuse what mixes devices."""
    tensors = [t for t in tree_flatten((args, options))[0] if isinstance(t, Tensor)]
    on_cpu = [t for t in tensors if not isinstance(t, Gpu)]
    is_index = name in ("index", "index_put", "index_put_")
    if name == "copy_":
        blocking = not (args[2] if len(args) > 2 else options.get("non_blocking", False))
        if blocking and isinstance(args[0], Gpu) != isinstance(args[1], Gpu):
            wait("copy to the GPU" if isinstance(args[0], Gpu) else "copy to the host")
    elif name in READS:
        wait(name)
    elif is_index and any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
        wait("index by a mask")
    elif is_index and isinstance(args[0], Gpu) and on_cpu and all(t.dtype in INDEXES for t in on_cpu):
        wait("index on the host")
    elif on_cpu and (any(t.dim() > 0 for t in on_cpu) or name in TOGETHER or name.startswith(TOGETHER_BEGIN)):
        shapes = [("cuda" if isinstance(t, Gpu) else "cpu", tuple(t.shape)) for t in tensors]
        raise MixedDevicesError(f"{name} of {shapes} at {asked_by()}")


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Gpu) else value


def _outer(value: Any) -> Any:
    return Gpu(value) if isinstance(value, Tensor) and not isinstance(value, Gpu) else value


class Move(torch.autograd.Function):
    """A copy between the devices that gradients pass."""

    @staticmethod
    def forward(ctx: Any, tensor: Any, to_gpu: bool) -> Tensor:
        ctx.to_gpu = to_gpu
        return Gpu(tensor.detach().clone()) if to_gpu else tensor.inner.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Tensor, None]:
        return (grad.inner if ctx.to_gpu else Gpu(grad)), None


def moved(tensor: Tensor, *, to_gpu: bool) -> Tensor:
    if isinstance(tensor, Gpu) == to_gpu:
        return tensor
    if tensor.requires_grad:
        return Move.apply(tensor, to_gpu)
    plain = _inner(tensor).detach().clone(memory_format=torch.preserve_format)
    return Gpu(plain) if to_gpu else plain


def is_gpu(device: object) -> bool:
    return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")


class Pretend(TorchFunctionMode):
    """Makes `tensor.to("cuda")`, `torch.zeros(…, device="cuda")` and the like give `Gpu` tensors."""

    def __torch_function__(
        self, func: Any, kinds: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        options.pop("pin_memory", None)
        name = getattr(func, "__name__", "")
        tensor = args[0] if args and isinstance(args[0], Tensor) else None
        if tensor is not None and name in ("to", "cuda", "cpu"):
            return _to(func, name, args, options)
        if isinstance(tensor, Gpu):
            if name in NUMBERS:
                wait(name)
                return getattr(tensor.inner.detach(), name)()
            if name in ("numpy", "__array__"):
                raise TypeError(f"can't convert a cuda:0 tensor to numpy, at {asked_by()}")
            if name == "new_tensor":
                wait(name)
                return Gpu(tensor.inner.new_tensor(*args[1:], **options))
        if is_gpu(options.get("device")):
            if name in ("tensor", "as_tensor"):
                wait(name)
            return moved(func(*args, **{**options, "device": torch.device("cpu")}), to_gpu=True)
        return func(*args, **options)


def _to(func: Any, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    tensor, rest = args[0], list(args[1:])
    device = options.pop("device", {"cuda": CUDA, "cpu": torch.device("cpu")}.get(name))
    if device is None and rest and isinstance(rest[0], (str, torch.device)):
        device = rest.pop(0)
    if device is None and rest and isinstance(rest[0], Tensor):
        device, rest[0] = rest[0].device, rest[0].dtype
    if device is None:
        return func(*args, **options)
    if not is_gpu(device) and tensor.dim() == 0 and options.get("non_blocking"):
        return tensor  # an optimizer's, to where its C++ finds the numbers of the parameters
    if is_gpu(device) != isinstance(tensor, Gpu) and not options.get("non_blocking"):
        wait("copy to the GPU" if is_gpu(device) else "copy to the host")
    tensor = moved(tensor, to_gpu=is_gpu(device))
    dtypes = [word for word in rest if isinstance(word, torch.dtype)]
    wanted = options.get("dtype", dtypes[0] if dtypes else None)
    return tensor if wanted is None else tensor.to(wanted)


class Event:
    def __init__(self, **_: object) -> None:
        self.at_s = 0.0

    def record(self, *_: object) -> None:
        self.at_s = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Of a copy of the step before: it has passed."""

    def elapsed_time(self, other: Event) -> float:
        return 1000 * (other.at_s - self.at_s)


class Stream:
    def synchronize(self) -> None:
        wait("stream")


def install() -> None:
    from livt_scale.distributed.world import World

    World.device = property(lambda _: CUDA)  # type: ignore[assignment]
    torch.inference_mode = torch.no_grad  # type: ignore[misc,assignment]
    card = types.SimpleNamespace(total_memory=141 * 2**30, name="NVIDIA H200")
    stand_ins = {
        "Event": Event, "current_stream": lambda *_: Stream(), "set_device": lambda *_: None,
        "synchronize": lambda *_: wait("torch.cuda.synchronize"), "get_device_name": lambda *_: card.name,
        "max_memory_allocated": lambda *_: 2**30, "reset_peak_memory_stats": lambda *_: None,
        "get_device_properties": lambda *_: card,
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)

    class Autocast(torch.autocast):
        def __init__(self, device_type: str, *args: Any, **options: Any) -> None:
            super().__init__("cpu" if device_type == "cuda" else device_type, *args, **options)

    torch.autocast = Autocast  # type: ignore[misc]
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    Pretend().__enter__()


def main() -> None:
    report = Path(sys.argv.pop(1))
    install()
    from livt_scale.cli.main import main as livt

    try:
        livt()
    finally:
        report.write_text(json.dumps([[what, where, count] for (what, where), count in sorted(waits.items())]))


if __name__ == "__main__":
    main()
