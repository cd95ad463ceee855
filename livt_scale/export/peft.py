"""Exports what LoRA has trained, without the network: an adapter that the library `peft` opens, megabytes.

    livt export runs/lora --to peft --out exports/adapter --base exports/base

    network = timm.create_model("local-dir:exports/base", pretrained=True)   # or timm's own, if the run began there
    PeftModel.from_pretrained(network, "exports/adapter")                    # the run's logits

The folder has peft's two files, with the head among `modules_to_save`, and `config.json` with our facts
(`export_info`). It appears only after peft has opened it and given the logits of the trained model.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from livt_scale.checkpoint.tensor_file import write_tensors
from livt_scale.config.tuning import LORA_ADAPTER, Lora
from livt_scale.export.timm import check_same_logits, timm_config
from livt_scale.export.write_export import check_target, model_facts
from livt_scale.models.classifier import head_name
from livt_scale.models.cosine_head import CosineHead
from livt_scale.models.parameter_efficient import lora_config, lora_layers
from livt_scale.train.export_info import ADAPTER, ADAPTER_CONFIG, CONFIG, WEIGHTS, ExportInfo, WeightsFile
from livt_scale.train.load_trained import Trained, Weights, load_trained
from livt_scale.util.atomic import new_folder, plain_disk_errors
from livt_scale.util.errors import ExportError, UsageError
from livt_scale.util.outside import real_path

PREFIX = "base_model.model."  # peft's name of the network that it wraps
TOLERANCE = 1e-5  # of a logit, over the largest: the products are the same, in the same order


def export_peft(
    run_dir: Path,
    out: Path,
    *,
    base: Path | None = None,
    which: str | None = None,
    weights: Weights = "raw",
    force: bool = False,
) -> ExportInfo:
    """Write the adapter of `run_dir` to `out`, and to `base` the network without it, as timm reads it.

    What is replaced in `out`: see `write_export.check_target`; `base` must be new. Raises UsageError where the run was
    not trained by LoRA, and ExportError.
    """
    check_target(out)
    if base is not None and (base.exists() or base.is_symlink()):
        raise ExportError(f"{base} is there already", remedy="give a new folder as --base")
    trained = load_trained(run_dir, which=which, weights=weights, merged=False)
    if not isinstance(trained.tuning, Lora):
        to = "timm" if trained.tuning.merges else "livt"
        raise UsageError(
            f"{run_dir} was trained with train: {trained.tuning.name}, and peft opens adapters of LoRA",
            remedy=f"give --to {to}",
        )
    if isinstance(trained.model.get_submodule(head_name(trained.model)), CosineHead):
        raise UsageError(f"{run_dir} has a cosine head, which timm's network does not have", remedy="give --to timm")
    check_target(out, weights=trained.weights, file=ADAPTER, force=force)
    network = without_adapter(trained.model)
    tensors, config = adapter_tensors(trained), adapter_config(trained)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    with plain_disk_errors(real_path(out), needed=num_bytes), new_folder(real_path(out)) as temporary:
        write_tensors(tensors, temporary / ADAPTER, metadata={"format": "pt"})
        (temporary / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="ascii")
        info = ExportInfo(**dict(model_facts(trained)), weights=WeightsFile.of(temporary / ADAPTER))
        text = json.dumps({"livt": info.model_dump(mode="json")}, indent=2)
        (temporary / CONFIG).write_text(text + "\n", encoding="ascii")
        _compare_with_peft(trained, network, temporary)
    if base is not None:
        _write_base(network, info, base)
    return info


def without_adapter(classifier: nn.Module) -> nn.Module:
    """A copy of the network as it was before LoRA, its head 0."""
    network = copy.deepcopy(classifier)
    network._forward_pre_hooks.clear()
    for name, layer in lora_layers(network):
        network.set_submodule(name, layer.get_base_layer())
    for parameter in network.get_submodule(head_name(network)).parameters():
        nn.init.zeros_(parameter)
    return network


def adapter_tensors(trained: Trained) -> dict[str, Tensor]:
    """A, B and the head, by peft's names."""
    head, found = head_name(trained.model), {}
    for name, tensor in trained.model.state_dict().items():
        if name.startswith(f"{head}.") or ".lora_" in name:
            found[PREFIX + name.replace(f".{LORA_ADAPTER}.", ".")] = tensor.detach().cpu().contiguous()
    return found


def adapter_config(trained: Trained) -> dict[str, Any]:
    """adapter_config.json. Names are sorted, so that the same weights give the same bytes."""
    assert isinstance(trained.tuning, Lora)
    layers = [name for name, _ in lora_layers(trained.model)]
    config = lora_config(trained.tuning, layers, head=head_name(trained.model)).to_dict()
    sets = {name: sorted(value) for name, value in config.items() if isinstance(value, set)}
    return {**config, **sets, "inference_mode": True}


def _compare_with_peft(trained: Trained, network: nn.Module, folder: Path) -> None:
    from peft import PeftModel

    opened = PeftModel.from_pretrained(copy.deepcopy(network), str(folder)).eval()
    check_same_logits(trained.model, opened, trained.recipe.model, reader="peft", tolerance=TOLERANCE)


def _write_base(network: nn.Module, info: ExportInfo, base: Path) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    with plain_disk_errors(real_path(base), needed=num_bytes), new_folder(real_path(base)) as temporary:
        write_tensors(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(timm_config(info), indent=2) + "\n", encoding="ascii")
