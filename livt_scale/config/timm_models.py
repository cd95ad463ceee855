"""What timm knows of the model that a recipe names (`model.timm`): its pixel statistics, and its parts.

    spec = TimmSpec("convnext_atto", image_px=64)
    facts_of(spec).head, facts_of(spec).blocks[:2]      "head.fc", ("stages.0.blocks.0", "stages.0.blocks.1")

The parts are read off a model on torch's meta device, where nothing is allocated or computed: one forward and one
backward pass of two images show which modules draw random numbers, which parameters have no gradient, and whether the
model takes images of this size. This costs a second, once per process and spec. No weights are read or downloaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from livt_scale.util.names import closest, listed
from livt_scale.util.text import first_line

if TYPE_CHECKING:
    from torch import nn

# arguments of timm.create_model that the recipe gives by other fields, or that read or download files
NOT_ARGS: dict[str, str] = {
    "num_classes": "the training set has it",
    "in_chans": "set model.channels",
    "img_size": "set model.image_px",
    "drop_path_rate": "set stages.finetune.drop_path",
    "pretrained": "set stages.finetune.weights",
    "checkpoint_path": "set stages.finetune.weights",
    "pretrained_cfg": "set data.mean, data.std, data.crop_pct and data.interpolation",
    "pretrained_cfg_overlay": "set data.mean, data.std, data.crop_pct and data.interpolation",
    "cache_dir": "set HF_HUB_CACHE in the environment",
    "features_only": "a classifier is trained",
}
OPTIONAL = ("img_size", "drop_path_rate")  # passed to the models that take them
_RATE = 0.1  # of drop path, to see which modules have one
_IMAGES = 2  # of the forward pass on the meta device


class TimmSpec(NamedTuple):
    """A model of timm for images of one size. args: further arguments of `timm.create_model`, as JSON."""

    name: str
    image_px: int
    channels: int = 3
    args: str = "{}"


class TimmWeight(NamedTuple):
    """A parameter. block: which of the model's blocks it belongs to; None: none."""

    name: str
    shape: tuple[int, ...]
    block: str | None


@dataclass(frozen=True)
class TimmFacts:
    """Modules and parameters of a model, by their names."""

    takes: tuple[str, ...]  # of OPTIONAL
    head: str  # the last linear layer
    blocks: tuple[str, ...]  # in the order of their calls
    drop_paths: tuple[str, ...]  # called once with one row per image: their numbers can be each image's own
    draws: bool  # other random operations in training: dropout, patch dropout
    unused: tuple[str, ...]  # parameters that have no part in the logits
    has_batchnorm: bool


def check_name(name: str) -> None:
    """Raise ValueError, with the nearest names, unless timm has a model and a tag of weights called `name`."""
    timm = _timm()
    arch, _, tag = name.partition(".")
    if not timm.is_model(arch) or ":" in name:
        raise ValueError(_near(name, [*timm.list_models(), *timm.list_models(pretrained=True)], "timm.list_models()"))
    tags = [each for each in timm.list_pretrained(f"{arch}.*") if each.startswith(f"{arch}.")]
    if tag and name not in tags:
        raise ValueError(_near(name, tags, f"timm has {listed(tags) if tags else 'no weights of it'}"))


def _near(name: str, names: list[str], otherwise: str) -> str:
    guesses = closest(name, names)
    return f"timm has no such model: {f'did you mean {listed(guesses)}?' if guesses else f'see {otherwise}'}"


def check_args(args: Mapping[str, Any]) -> None:
    """Raise ValueError for an argument that the recipe gives otherwise, or that would read files."""
    for name in args:
        if name in NOT_ARGS:
            raise ValueError(f"args has {name!r}, which is given otherwise: {NOT_ARGS[name]}")


@lru_cache(maxsize=64)
def pixel_facts(name: str) -> dict[str, Any]:
    """`input_size` (C, H, W), `mean`, `std`, `interpolation` and `crop_pct` of the model's weights, from timm."""
    cfg = _timm().get_pretrained_cfg(name, allow_unregistered=False)
    interpolation = cfg.interpolation if cfg.interpolation in ("bicubic", "bilinear") else "bicubic"
    return {
        "input_size": tuple(cfg.input_size),
        "mean": tuple(map(float, cfg.mean)),
        "std": tuple(map(float, cfg.std)),
        "interpolation": interpolation,
        "crop_pct": float(cfg.crop_pct),
    }


def usual_image_px(name: object) -> dict[str, int]:
    """`image_px` of the model's weights; nothing of a name that timm does not have, which its own check reports."""
    return {"image_px": pixel_facts(name)["input_size"][-1]} if _is_known(name) else {}


def with_pixel_facts(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's `values` with the pixels that the weights of `model.timm` were trained on, where it sets no others."""
    model, data = values.get("model"), values.get("data")
    name = model.get("timm") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(data, dict) or not _is_known(name):
        return values
    usual = pixel_facts(name)
    pixels = {field: usual[field] for field in ("mean", "std", "interpolation", "crop_pct")}
    if model.get("channels", 3) != len(usual["mean"]):
        pixels = {field: value for field, value in pixels.items() if field not in ("mean", "std")}
    return {**values, "data": {**pixels, **data}}


def _is_known(name: object) -> TypeGuard[str]:
    if not isinstance(name, str):
        return False
    try:
        check_name(name)
    except ValueError:
        return False
    return True


def create(spec: TimmSpec, *, num_classes: int, drop_path: float, takes: tuple[str, ...] = OPTIONAL) -> nn.Module:
    """timm's network with fresh weights, on torch's current device. Raises what timm raises."""
    given = {"img_size": spec.image_px, "drop_path_rate": drop_path}
    optional = {name: given[name] for name in takes}
    network: nn.Module = _timm().create_model(
        spec.name,
        pretrained=False,
        num_classes=num_classes,
        in_chans=spec.channels,
        **optional,
        **json.loads(spec.args),
    )
    return network


@lru_cache(maxsize=16)
def facts_of(spec: TimmSpec) -> TimmFacts:
    """What is found of `spec` on the meta device. Raises ValueError: arguments or images that the model cannot take,
    no classifier, or an output that is not one tensor of logits."""
    import torch

    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        network, takes = _build(spec)
        network.train()
        head = _head(network, spec)
        _check_patches(network, spec)
        seen = _Seen(network)
        with seen.watch:
            try:
                logits = network(torch.empty(_IMAGES, spec.channels, spec.image_px, spec.image_px))
            except Exception as error:  # whatever a model raises for images that it was not made for
                raise ValueError(
                    f"image_px is {spec.image_px}, and {spec.name} cannot take such images: {first_line(error)}"
                ) from error
        _check_logits(logits, spec)
        logits.sum().backward()
    unused = tuple(name for name, parameter in network.named_parameters() if parameter.grad is None)
    norms = torch.nn.modules.batchnorm._BatchNorm
    has_batchnorm = any(isinstance(module, norms) for module in network.modules())
    return TimmFacts(takes, head, _blocks(network), seen.by_image, seen.draws, unused, has_batchnorm)


@lru_cache(maxsize=16)
def weights_of(spec: TimmSpec, *, num_classes: int) -> tuple[tuple[TimmWeight, ...], tuple[int, int]]:
    """(parameters, FLOPs of one image forward and backward), counted on the meta device: matrix products,
    convolutions and attention, 2 for each multiplication and addition."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    facts = facts_of(spec)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        network = create(spec, num_classes=num_classes, drop_path=0.0, takes=facts.takes).eval()
        with FlopCounterMode(display=False) as counter:
            logits = network(torch.empty(1, spec.channels, spec.image_px, spec.image_px))
            forward = counter.get_total_flops()
            logits.sum().backward()
            total = counter.get_total_flops()
    found = tuple(
        TimmWeight(name, tuple(parameter.shape), next((b for b in facts.blocks if name.startswith(f"{b}.")), None))
        for name, parameter in network.named_parameters()
    )
    return found, (forward, total - forward)


def _build(spec: TimmSpec) -> tuple[nn.Module, tuple[str, ...]]:
    """The network on the meta device, and which of OPTIONAL it takes."""
    takes: tuple[str, ...] = OPTIONAL
    while True:
        try:
            return create(spec, num_classes=_IMAGES + 1, drop_path=_RATE, takes=takes), takes
        except TypeError as error:
            left = tuple(name for name in takes if f"'{name}'" not in str(error))
            if "unexpected keyword" not in str(error) or left == takes:
                raise ValueError(f"args cannot be those of {spec.name}: {first_line(error)}") from error
            takes = left
        except Exception as error:  # AssertionError, RuntimeError, ValueError: each family checks in its own way
            raise ValueError(
                f"{'args' if spec.args != '{}' else 'image_px'}: timm cannot build {spec.name} for images of "
                f"{spec.image_px} px: {first_line(error)}"
            ) from error


def _head(network: Any, spec: TimmSpec) -> str:
    """The name of the layer that gives the logits: the classifier, or the only such layer inside of it."""
    found: Any = network.get_classifier() if hasattr(network, "get_classifier") else None
    inside = set(found.modules()) if hasattr(found, "modules") else set[Any]()
    names = [
        name
        for name, module in network.named_modules()
        if module in inside and _IMAGES + 1 in (getattr(module, "out_features", 0), getattr(module, "out_channels", 0))
    ]
    if len(names) != 1:
        what = "several classifiers" if names or isinstance(found, tuple | list) else "no classifier"
        raise ValueError(f"timm: {spec.name} has {what}, and one linear layer is trained: choose another model")
    return names[0]


def _check_patches(network: Any, spec: TimmSpec) -> None:
    """timm cuts off what does not fill a patch, where a model takes any size."""
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    patch_px = patch[0] if isinstance(patch, tuple) else patch
    if isinstance(patch_px, int) and spec.image_px % patch_px:
        lower = max(spec.image_px // patch_px, 1) * patch_px
        raise ValueError(
            f"image_px is {spec.image_px}, not a multiple of {spec.name}'s patches of {patch_px} px: the nearest are "
            f"{lower} and {lower + patch_px}"
        )


def _check_logits(logits: Any, spec: TimmSpec) -> None:
    shape = getattr(logits, "shape", None)
    if shape is None:
        raise ValueError(f"timm: {spec.name} gives a {type(logits).__name__}, not logits: choose another model")
    if tuple(shape) != (_IMAGES, _IMAGES + 1):
        raise ValueError(f"timm: {spec.name} gives {list(shape)}, not logits [B, classes]: choose another model")


class _Seen:
    """Which modules of a network drop paths image by image, and whether anything else draws random numbers."""

    def __init__(self, network: nn.Module) -> None:
        from timm.layers import DropPath
        from torch import Tag
        from torch.utils._python_dispatch import TorchDispatchMode

        self._calls: dict[str, list[int]] = {}
        self._inside = 0
        self.others = False
        seen = self

        class RandomOperations(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if not seen._inside and Tag.nondeterministic_seeded in func.tags and _is_random(func, args, kwargs):
                    seen.others = True
                return func(*args, **(kwargs or {}))

        self.watch = RandomOperations()
        drops = [(name, module) for name, module in network.named_modules() if isinstance(module, DropPath)]
        for name, module in drops:
            module.register_forward_pre_hook(self._enter(name))
            module.register_forward_hook(self._leave)
        self._drops = [name for name, _ in drops]

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any) -> None:  # noqa: ARG001
            self._calls.setdefault(name, []).append(inputs[0].shape[0])
            self._inside += 1

        return hook

    def _leave(self, *_: Any) -> None:
        self._inside -= 1

    @property
    def by_image(self) -> tuple[str, ...]:
        """Called once, with a row for each image."""
        return tuple(name for name in self._drops if self._calls.get(name) == [_IMAGES])

    @property
    def draws(self) -> bool:
        """Whether numbers are drawn that cannot be given image by image."""
        return self.others or any(name not in self.by_image for name in self._calls)


def _is_random(func: Any, args: Any, kwargs: Any) -> bool:
    """Of an operation that may draw numbers: whether it does. Fused attention does with dropout alone."""
    names = [argument.name for argument in func._schema.arguments]
    if "dropout_p" not in names:
        return True
    k = names.index("dropout_p")
    return bool((kwargs or {}).get("dropout_p", args[k] if k < len(args) else 0.0))


def _blocks(network: Any) -> tuple[str, ...]:
    """The layers that timm numbers (`group_matcher`); where it has no patterns for them, the members of `blocks`, or
    of `stages` or `layers`. None of them is inside of another."""
    own = [re.compile(rf"(.*\.)?({lists})\.\d+") for lists in ("blocks", "stages|layers")]
    for patterns in (_numbered(network, coarse=False), _numbered(network, coarse=True), own[:1], own[1:]):
        found: list[str] = []
        for name, module in network.named_modules():
            inside = any(name.startswith(f"{block}.") for block in found)
            if not inside and any(p.fullmatch(name) for p in patterns) and next(module.parameters(), None) is not None:
                found.append(name)
        if found:
            return tuple(found)
    return ()


def _numbered(network: Any, *, coarse: bool) -> list[re.Pattern[str]]:
    """The patterns by which timm numbers the layers of a model; none where it has a function for that."""
    matcher = network.group_matcher(coarse=coarse) if hasattr(network, "group_matcher") else {}
    if callable(matcher):
        return []
    blocks = matcher.get("blocks", ())
    rules = [(blocks, None)] if isinstance(blocks, str) else blocks
    return [re.compile(rule) for rule, number in rules if number is None and re.compile(rule).groups]


def _timm() -> Any:
    import timm

    return timm
