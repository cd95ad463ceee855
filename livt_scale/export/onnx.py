"""Exports a classifier as one ONNX graph from pixels to probabilities, for onnxruntime and what else reads ONNX.

    livt export runs/try --to onnx --out exports/onnx
    onnxruntime.InferenceSession("exports/onnx/model.onnx").run(["probabilities"], {"images": pixels})

The graph takes uint8 pixels `[N, C, T, T]`, resized and cropped as in evaluation, and holds normalisation, network,
temperature and softmax, in fp32. Its metadata under `livt`, and `config.json`, say what the export of timm's layout
says (`export_info`). Where onnxruntime is installed, an export appears only after it gave our probabilities to 1e-4.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from livt_scale.export.write_export import check_target, model_facts
from livt_scale.train.export_info import CONFIG, ONNX, ONNX_DATA, ExportInfo, WeightsFile
from livt_scale.train.load_trained import Trained
from livt_scale.util.atomic import new_folder, plain_disk_errors
from livt_scale.util.errors import ExportError, UsageError
from livt_scale.util.outside import real_path
from livt_scale.util.text import first_line

TOLERANCE = 1e-4  # of a probability
ONE_FILE_BYTES = 1_500_000_000  # a protobuf has at most 2 GiB: larger weights are in a file beside the graph
OPSET = 18
_log = logging.getLogger(__name__)


class PixelsToProbabilities(nn.Module):
    """uint8 `[N, C, T, T]` to float32 `[N, classes]` that sum to 1: softmax(model(normalised) / temperature)."""

    mean: Tensor
    std: Tensor

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        data = trained.recipe.data
        self.model = trained.model
        self.temperature = trained.calibration.temperature or 1.0
        self.register_buffer("mean", torch.tensor(data.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(data.std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model((images.float() / 255 - self.mean) / self.std)
        return (logits / self.temperature).softmax(dim=1)


def export_onnx(trained: Trained, out: Path, *, force: bool = False) -> ExportInfo:
    """Write model.onnx and config.json to `out` atomically. What is replaced there: see `write_export.check_target`.

    Raises UsageError (a package is missing) and ExportError.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"ONNX export needs {' and '.join(missing)}, not installed here",
            remedy="install it with: pip install onnx onnxscript onnxruntime",
        )
    check_target(out, weights=trained.weights, file=ONNX, force=force)
    network = PixelsToProbabilities(trained).cpu().eval()
    num_bytes = sum(tensor.nbytes for tensor in network.state_dict().values())
    with plain_disk_errors(real_path(out), needed=num_bytes), new_folder(real_path(out)) as temporary:
        file = _write_graph(network, trained, temporary, in_two=num_bytes > ONE_FILE_BYTES)
        info = ExportInfo(**dict(model_facts(trained)), weights=WeightsFile.of(temporary / file))
        text = json.dumps({"livt": info.model_dump(mode="json")}, indent=2)
        (temporary / CONFIG).write_text(text + "\n", encoding="ascii")
        compare_with_onnxruntime(network, temporary / ONNX, images=_pixels(trained, 3))
    _log.info("export: %s", info.calibration)
    return info


def _write_graph(network: nn.Module, trained: Trained, folder: Path, *, in_two: bool) -> str:
    """Write the graph with its metadata; the name of the file that holds the weights."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # of torch about itself
        try:
            program = torch.onnx.export(
                network,
                (_pixels(trained, 2),),
                input_names=["images"],
                output_names=["probabilities"],
                dynamic_shapes={"images": {0: torch.export.Dim("N", min=1)}},
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise ExportError(f"torch cannot write this model as ONNX: {first_line(error)}") from error
    assert program is not None
    shape = program.model.graph.inputs[0].shape
    if shape is None or isinstance(shape[0], int):
        raise ExportError("torch wrote this model as ONNX for one batch size alone")
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces with paths: the same weights give the same bytes
    program.model.metadata_props["livt"] = json.dumps(model_facts(trained).model_dump(mode="json"))
    program.save(folder / ONNX, external_data=in_two)
    return ONNX_DATA if in_two else ONNX


def compare_with_onnxruntime(network: nn.Module, path: Path, *, images: Tensor) -> None:
    """Raise ExportError unless onnxruntime gives our probabilities for one image and for several."""
    if importlib.util.find_spec("onnxruntime") is None:
        _log.warning("export: %s is not checked: onnxruntime is not installed", path.name)
        return
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for pixels in (images, images[:1]):
        with torch.inference_mode():
            ours = network(pixels)
        try:
            [theirs] = session.run(["probabilities"], {"images": pixels.numpy()})
        except Exception as error:  # onnxruntime's errors have no common class but this
            raise ExportError(f"onnxruntime cannot run the graph: {first_line(error)}") from error
        gap = float((ours - torch.from_numpy(theirs)).abs().max())
        if not gap <= TOLERANCE:
            raise ExportError(f"onnxruntime's probabilities differ by {gap:.2g} from the model's, over {TOLERANCE:g}")


def _pixels(trained: Trained, count: int) -> Tensor:
    """uint8 `[count, C, T, T]`, the same at every call."""
    model = trained.recipe.model
    shape = (count, model.channels, model.image_px, model.image_px)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
