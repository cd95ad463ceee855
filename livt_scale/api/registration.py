"""`livt.register_*`: add a loss, sampler, optimizer, model size or source format by name. See docs/extending.md.

    @register_loss("poly1")
    class Poly1(LossOptions): ...

Each raises UsageError where the name is taken, with both places. A recipe, the API and every command know the name
afterwards; for processes that torchrun or Slurm starts, name the file in LIVT_EXTENSIONS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from livt_scale.config.model import MODEL_SIZES, ViTDims
from livt_scale.config.optimizers import OPTIMIZERS, OptimizerOptions
from livt_scale.config.sampling import SAMPLERS, Sampler
from livt_scale.losses import LOSSES, LossOptions

if TYPE_CHECKING:
    from livt_scale.data.build.formats import SourceFormat

LossClass = TypeVar("LossClass", bound=type[LossOptions])
SamplerClass = TypeVar("SamplerClass", bound=type[Sampler])
OptimizerClass = TypeVar("OptimizerClass", bound=type[OptimizerOptions])
FormatClass = TypeVar("FormatClass", bound="type[SourceFormat]")


def register_loss(name: str) -> Callable[[LossClass], LossClass]:
    """A decorator: the class of `LossOptions` is the loss `name`. Raises UsageError: the name is taken.

    Its `build(counts)` gets float64 [C], the images of each class, and returns a callable (logits float [B, C], soft
    targets float [B, C]) to a scalar.
    """
    return LOSSES.register(name)


def register_sampler(name: str) -> Callable[[SamplerClass], SamplerClass]:
    """A decorator: the class of `Sampler` is the sampling policy `name`. Raises UsageError: the name is taken.

    Its `shares(counts, progress)` gets int64 [C] and t/T in 0 … 1, and returns each class's share of an epoch's draws,
    float64 [C], together 1.
    """
    return SAMPLERS.register(name)


def register_optimizer(name: str) -> Callable[[OptimizerClass], OptimizerClass]:
    """A decorator: the class of `OptimizerOptions` is the optimizer `name`. Raises UsageError: the name is taken.

    Its `build(groups)` gets the groups of `livt.optim.param_groups` and returns a torch.optim.Optimizer.
    """
    return OPTIMIZERS.register(name)


def register_model_size(name: str, dims: ViTDims) -> ViTDims:
    """`ViTDims(width, depth, heads, patch_px)` is the model size `name`. Raises UsageError: the name is taken."""
    return MODEL_SIZES.register(name, dims)


def register_source_format(name: str) -> Callable[[FormatClass], FormatClass]:
    """A decorator: the class of `SourceFormat` is the format `name` of raw images. Raises UsageError: it is taken.

    Its `open(name, root, class_names=…)` returns a `livt_scale.data.build.sources.Source`.
    """
    from livt_scale.data.build.formats import SOURCE_FORMATS

    return SOURCE_FORMATS.register(name)
