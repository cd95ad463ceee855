"""LiVT at scale: masked pretraining, then balanced fine-tuning, of Vision Transformers on long-tailed images.

The public API: every name of `__all__`, with documentation in docs/api.md. A name is imported when it is first used,
so that `import livt_scale` takes no torch and no time.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors; `_HOMES` says the same
    from livt_scale import losses as losses
    from livt_scale import optim as optim
    from livt_scale.api.eval_loader import EvalLoader as EvalLoader
    from livt_scale.api.eval_loader import evaluate as evaluate
    from livt_scale.api.init import init as init
    from livt_scale.api.models import build_classifier as build_classifier
    from livt_scale.api.predictor import Predicted as Predicted
    from livt_scale.api.predictor import Predictor as Predictor
    from livt_scale.api.predictor import load as load
    from livt_scale.api.registration import register_loss as register_loss
    from livt_scale.api.registration import register_model_size as register_model_size
    from livt_scale.api.registration import register_optimizer as register_optimizer
    from livt_scale.api.registration import register_sampler as register_sampler
    from livt_scale.api.registration import register_source_format as register_source_format
    from livt_scale.api.streams import to_webdataset as to_webdataset
    from livt_scale.api.train import train as train
    from livt_scale.api.train_loader import TrainLoader as TrainLoader
    from livt_scale.config.model import ViTDims as ViTDims
    from livt_scale.config.optimizers import OptimizerOptions as OptimizerOptions
    from livt_scale.config.sampling import Sampler as Sampler
    from livt_scale.data.build.formats import SourceFormat as SourceFormat
    from livt_scale.data.shard_set import ShardSet as ShardSet
    from livt_scale.losses import LossOptions as LossOptions
    from livt_scale.util.errors import DataError as DataError
    from livt_scale.util.errors import LivtError as LivtError
    from livt_scale.util.errors import Preempted as Preempted
    from livt_scale.util.errors import RunError as RunError
    from livt_scale.util.errors import UsageError as UsageError

__version__ = "0.1.0"

_HOMES = {  # name: the module below livt_scale that has it
    "ShardSet": "data.shard_set",
    "TrainLoader": "api.train_loader",
    "EvalLoader": "api.eval_loader",
    "build_classifier": "api.models",
    "evaluate": "api.eval_loader",
    "load": "api.predictor",
    "Predictor": "api.predictor",
    "Predicted": "api.predictor",
    "init": "api.init",
    "train": "api.train",
    "to_webdataset": "api.streams",
    "register_loss": "api.registration",
    "register_sampler": "api.registration",
    "register_optimizer": "api.registration",
    "register_model_size": "api.registration",
    "register_source_format": "api.registration",
    "LossOptions": "losses",
    "Sampler": "config.sampling",
    "OptimizerOptions": "config.optimizers",
    "ViTDims": "config.model",
    "SourceFormat": "data.build.formats",
    "LivtError": "util.errors",
    "UsageError": "util.errors",
    "DataError": "util.errors",
    "RunError": "util.errors",
    "Preempted": "util.errors",
}
_MODULES = ("losses", "optim")

__all__ = [
    "DataError",
    "EvalLoader",
    "LivtError",
    "LossOptions",
    "OptimizerOptions",
    "Predicted",
    "Predictor",
    "Preempted",
    "RunError",
    "Sampler",
    "ShardSet",
    "SourceFormat",
    "TrainLoader",
    "UsageError",
    "ViTDims",
    "__version__",
    "build_classifier",
    "evaluate",
    "init",
    "load",
    "losses",
    "optim",
    "register_loss",
    "register_model_size",
    "register_optimizer",
    "register_sampler",
    "register_source_format",
    "to_webdataset",
    "train",
]


if not TYPE_CHECKING:  # a type checker would believe that every name exists

    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return importlib.import_module(f"{__name__}.{name}")
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Keeps `livt_scale.train` the function. Python sets that attribute to the package of the same name when any of
    its modules is imported; the package itself is found as ever (`from livt_scale.train.run import …`)."""

    @property
    def train(self) -> Callable[..., Any]:
        function: Callable[..., Any] = importlib.import_module(f"{__name__}.api.train").train
        return function

    @train.setter
    def train(self, package: ModuleType) -> None:
        """What Python's import does; nothing needs the attribute."""


sys.modules[__name__].__class__ = _Package
