"""`livt ckpt`: list a run's checkpoints, verify every byte of them, and convert them to another layout and back.

livt ckpt ls runs/demo               one line per checkpoint: step, epoch, size, age, complete or damaged and why
livt ckpt verify runs/demo           exit 1 if any byte of any checkpoint differs, naming the file
livt ckpt convert PATH --to FILE     one safetensors file, or a checkpoint of ours from another format
"""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from livt_scale.cli.options import AsJson, Sets
from livt_scale.cli.output import echo

if TYPE_CHECKING:
    from livt_scale.checkpoint.catalog import CheckpointInfo
    from livt_scale.checkpoint.foreign.convert import Converted

app = typer.Typer(help="List, verify and convert checkpoints.", no_args_is_help=True)
STAGE_FOLDERS = ("pretrain", "finetune")
UNITS_S = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


@app.command("ls")
def ls(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run, a stage of it, or a folder of checkpoints.")],
    as_json: AsJson = False,
    quick: Annotated[bool, typer.Option("--quick", help="Compare sizes only; do not read every byte.")] = False,
) -> None:
    """List checkpoints, oldest first.

    Columns: step, epoch, size, age, complete or damaged and why, best and final.
    """
    from livt_scale.checkpoint.catalog import list_checkpoints

    now = datetime.datetime.now(datetime.UTC)
    rows = [
        _row(info, folder, now=now)
        for folder in checkpoint_folders(run)
        for info in list_checkpoints(folder, quick=quick)
    ]
    if as_json:
        echo(json.dumps({"checkpoints": rows}, indent=1))
    elif not rows:
        echo(f"No checkpoints in {run} yet.")
    else:
        for line in table(rows):
            echo(line)


@app.command("verify")
def verify(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A checkpoint, a run, a stage, or a folder of checkpoints.")
    ],
    as_json: AsJson = False,
) -> None:
    """Compare every byte of checkpoints with their manifests.

    Exit codes: 0 all complete; 1 one is damaged, or none was found.
    """
    from livt_scale.checkpoint import catalog as folders
    from livt_scale.util.errors import CheckpointError

    if _is_checkpoint(path):
        damaged = {str(path): folders.verify(path)}
    else:
        found = [
            info.path for folder in checkpoint_folders(path) for info in folders.list_checkpoints(folder, quick=True)
        ]
        verified = [(checkpoint, folders.verify(checkpoint)) for checkpoint in found]
        # the run that saves there may have removed one meanwhile
        damaged = {str(checkpoint): wrong for checkpoint, wrong in verified if checkpoint.is_dir()}
    if not damaged:
        raise CheckpointError(f"there is no checkpoint in {path}")
    if as_json:
        rows = [{"path": name, "whole": not wrong, "why": wrong} for name, wrong in damaged.items()]
        echo(json.dumps({"checkpoints": rows}, indent=1))
    else:
        for name, wrong in damaged.items():
            echo(f"{name}: {'; '.join(wrong) if wrong else 'complete; every byte matches the manifest'}")
    if any(damaged.values()):
        raise typer.Exit(1)


@app.command("convert")
def convert(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Checkpoint of livt, safetensors, DeepSpeed or torch.")],
    to: Annotated[Path, typer.Option("--to", help="NAME.safetensors, or a new folder for a livt checkpoint.")],
    recipe: Annotated[Path | None, typer.Option(help="Recipe it was trained with; lets livt train resume it.")] = None,
    stage: Annotated[str | None, typer.Option(help="Stage of the recipe: pretrain (default) or finetune.")] = None,
    step: Annotated[
        int | None, typer.Option(min=0, help="Steps done in the stage.", show_default="as recorded")
    ] = None,
    sets: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Convert a checkpoint to safetensors, or to a livt checkpoint.

    Reads livt checkpoints, safetensors, DeepSpeed (ZeRO 1, 2, 3), torch.distributed.checkpoint folders and torch.save
    files (pytorch_model.bin, checkpoint.pth). Tensors keep their bits; nothing that is read is executed.
    """
    from livt_scale.checkpoint.foreign import convert as converting
    from livt_scale.util.errors import UsageError

    if recipe is None and (stage is not None or step is not None or sets):
        raise UsageError("--stage, --step and --set say more of a --recipe", remedy="give it, or leave them out")
    found = converting.read(path)
    if recipe is not None:
        found = _with_recipe(found, recipe, stage or "pretrain", step, sets or [])
    write = converting.write_safetensors if to.suffix == ".safetensors" else converting.write_checkpoint
    write(found, to)
    told = {"from": found.kind, "to": str(to), "used": found.used, "left": found.left, "made": found.made}
    if as_json:
        echo(json.dumps(told, indent=1))
    else:
        for name, said in told.items():
            echo(f"{name:5} {said if isinstance(said, str) else '; '.join(said) or 'nothing'}")


def _with_recipe(found: Converted, recipe: Path, stage: str, step: int | None, sets: list[str]) -> Converted:
    """`found` with the facts that `livt train` needs in a checkpoint. UsageError if the recipe has no such stage."""
    from livt_scale.checkpoint.foreign.convert import Position, trained_by
    from livt_scale.config.load import load_recipe
    from livt_scale.data.order.for_stage import stage_order
    from livt_scale.data.shard_set import ShardSet
    from livt_scale.train.train_state import run_facts
    from livt_scale.util.errors import UsageError

    if found.facts is not None:
        raise UsageError("this checkpoint says itself what it was trained by", remedy="leave --recipe out")
    loaded = load_recipe(recipe, sets=sets)
    name = next((name for name in loaded.stage_names if name == stage), None)
    if name is None:
        raise UsageError(f"the recipe has no stage {stage}", remedy=f"it has {', '.join(loaded.stage_names)}")
    if name == "finetune" and loaded.stages.finetune and loaded.stages.finetune.init != "scratch":
        raise UsageError(
            f"a fine-tuning that begins with {loaded.stages.finetune.init} cannot be taken over",
            remedy="set stages.finetune.init=scratch",
        )
    for field in ("weights", "distill"):
        if getattr(loaded.stage(name), field, None) is not None:
            raise UsageError(
                f"the checkpoint does not record the weights of stages.{name}.{field}, so no run would resume from it",
                remedy=f"set stages.{name}.{field}=null",
            )
    if step is None and found.position is None:
        raise UsageError("it does not record how many steps it has taken", remedy="give --step")
    train = ShardSet.open(loaded.data.train, data=loaded.data)
    done = step if step is not None or found.position is None else found.position.step
    assert done is not None
    epoch = done // stage_order(train, loaded, name).steps_per_epoch
    facts = run_facts(loaded.at(name), name, train, strategy="converted", origin=None)
    return trained_by(found, facts, Position(epoch, done))


def checkpoint_folders(path: Path) -> list[Path]:
    """The folders of checkpoints that `path` (a run, a stage or such a folder) means; UsageError for anything else."""
    from livt_scale.util.errors import UsageError

    if not path.is_dir():
        raise UsageError(f"{path} is not a folder", remedy="Give a run directory, such as runs/NAME")
    if path.name == "checkpoints" or any(_is_checkpoint(child) for child in path.iterdir()):
        return [path]
    places = [path / "checkpoints", *(path / stage / "checkpoints" for stage in STAGE_FOLDERS)]
    if found := [place for place in places if place.is_dir()]:
        return found
    if any((path / name).exists() for name in ("recipe.yaml", "status.json", *STAGE_FOLDERS)):
        return []  # a run that has saved nothing yet
    raise UsageError(
        f"{path} is neither a run nor a stage nor a folder of checkpoints",
        remedy="Give a run directory (the folder with recipe.yaml), such as runs/NAME",
    )


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as aligned text, a title line first."""
    from livt_scale.checkpoint.io import readable

    lines = [("stage", "step", "epoch", "size", "age", "state", "notes")]
    for row in rows:
        notes = [mark for mark in ("best", "final") if row[mark]]
        if row["score"] is not None:
            notes.append(f"score {row['score']:.4f}")
        lines.append(
            (
                row["stage"] or "-",
                str(row["step"]),
                "?" if row["epoch"] is None else str(row["epoch"]),
                readable(row["bytes"]),
                "?" if row["age_s"] is None else _age(row["age_s"]),
                "complete" if row["whole"] else "damaged",
                ", ".join([*notes, row["why"]] if row["why"] else notes),
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _is_checkpoint(path: Path) -> bool:
    from livt_scale.checkpoint.manifest import MANIFEST, read_manifest, step_of
    from livt_scale.util.errors import CheckpointDamaged

    if not path.is_dir():
        return False
    if step_of(path.name) is not None:
        return True
    if not (path / MANIFEST).is_file():
        return False
    try:  # a copy under another name; a set of shards has a manifest.json too
        read_manifest(path)
    except CheckpointDamaged:
        return False
    return True


def _row(info: CheckpointInfo, folder: Path, *, now: datetime.datetime) -> dict[str, Any]:
    from livt_scale.checkpoint.manifest import step_of

    saved_at = info.manifest.saved_at if info.manifest else None
    age_s = (now - datetime.datetime.fromisoformat(saved_at)).total_seconds() if saved_at else None
    return {
        "path": str(info.path),
        "stage": folder.parent.name if folder.parent.name in STAGE_FOLDERS else None,
        "step": step_of(info.path.name),
        "epoch": info.position.epoch if info.position else None,
        "bytes": info.bytes,
        "saved_at": saved_at,
        "age_s": None if age_s is None else round(age_s, 1),
        "whole": info.whole,
        "why": info.why,
        "best": info.best,
        "final": info.final,
        "score": info.score,
    }


def _age(age_s: float) -> str:
    for unit_s, name in UNITS_S:
        if age_s >= unit_s:
            return f"{int(age_s // unit_s)} {name}"
    return "now"
