"""Finds the file that a path of weights refers to, without reading it: needs no torch, so recipe checks can use it."""

from __future__ import annotations

from pathlib import Path

from livt_scale.util.errors import WeightsError

SAFETENSORS = "model.safetensors"
IN_FOLDER = (SAFETENSORS, "pytorch_model.bin", "checkpoint.pth")
PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".tar")


def find_file(path: Path) -> Path:
    """The file of weights that `path` is, or that is in the folder `path`. Raises WeightsError: none, or no known kind.

    A folder may hold more than weights, so its file goes by name; a single file goes by its suffix.
    """
    if path.is_dir():
        return _in_folder(path)
    if not path.is_file():
        raise WeightsError(f"there is no {path}", remedy="give a file of weights, or a folder that holds one")
    if path.suffix not in (".safetensors", *PICKLED):
        raise WeightsError(
            f"{path}: {path.suffix or 'a file without suffix'} is no known kind of weights",
            remedy=f"take .safetensors, or one of {', '.join(PICKLED)}",
        )
    return path


def _in_folder(folder: Path) -> Path:
    for name in IN_FOLDER:
        if (folder / name).is_file():
            return folder / name
    split = sorted(p.name for p in folder.glob("*.index.json"))
    why = f"its weights are split over files ({split[0]})" if split else f"it has none of {', '.join(IN_FOLDER)}"
    raise WeightsError(f"{folder}: {why}", remedy="give one file of weights")
