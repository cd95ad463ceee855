"""What a checkpoint says about itself: `manifest.json`, the last file written and the first one read.

A checkpoint is a folder `step-00001234`. Its manifest lists each file with its bytes and SHA-256, and carries the
position, the score and the facts (recipe, digest, strategy, stage) of the run. The manifest guards itself too: its
first field is the SHA-256 of all its other bytes, and only one spelling of the JSON is accepted, so any flipped byte is
found. Reading one needs neither torch nor pickle.

    {"sha256": "9f…", "format": "livt-checkpoint", "version": 1, "position": {"epoch": 3, "step": 1234},
     "files": [{"name": "__0_0.distcp", "bytes": 9398, "sha256": "51…", "rank": 0}, …], "facts": {…}, …}
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
)

from livt_scale.util.errors import CheckpointDamaged
from livt_scale.util.outside import first_mistake, parse_json, read_checked

FORMAT = "livt-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
STEP_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, order=True)
class Position:
    """The progress of a stage: `step` optimizer steps of the stage are done; the next sample is of `epoch`."""

    epoch: int
    step: int


def _check_moment(text: str) -> str:
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise ValueError("it is not a date and time in ISO 8601") from None
    if moment.utcoffset() is None:
        raise ValueError("it has no offset from UTC, such as +00:00")
    return text


Moment = Annotated[str, AfterValidator(_check_moment)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileEntry(_Part):
    name: str
    bytes: NonNegativeInt
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    rank: NonNegativeInt

    @field_validator("name")
    @classmethod
    def _stays_in_the_folder(cls, name: str) -> str:
        if not name or name in (".", "..", MANIFEST) or any(c in name for c in "/\\\0"):
            raise ValueError(f"{name!r} is not the name of a file in the checkpoint's folder")
        return name


class SavedPosition(_Part):
    epoch: NonNegativeInt
    step: NonNegativeInt

    @property
    def position(self) -> Position:
        return Position(self.epoch, self.step)


class CheckpointManifest(_Part):
    """One checkpoint. `score`: higher is better; None: not evaluated. `facts`: what the trainer wanted recorded."""

    format: Literal["livt-checkpoint"] = "livt-checkpoint"
    version: Literal[1] = 1
    saved_at: Moment = Field(description="UTC, ISO 8601")
    place: SavedPosition = Field(alias="position")
    world_size: PositiveInt
    score: float | None
    final: bool
    num_tensors: PositiveInt
    torch: str = Field(description="the torch version that wrote it")
    files: tuple[FileEntry, ...] = Field(min_length=1, strict=False)
    facts: dict[str, Any]

    @field_validator("files")
    @classmethod
    def _each_once(cls, files: tuple[FileEntry, ...]) -> tuple[FileEntry, ...]:
        if len({entry.name for entry in files}) != len(files):
            raise ValueError("a file is listed twice")
        return files

    @property
    def position(self) -> Position:
        return self.place.position

    @property
    def num_bytes(self) -> int:
        return sum(f.bytes for f in self.files)

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)

    @property
    def files_digest(self) -> str:
        """SHA-256 of the names and digests of the files: it stands for every byte of them, and for no date."""
        lines = sorted(f"{entry.sha256}  {entry.name}\n" for entry in self.files)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def to_bytes(self) -> bytes:
        body = self.as_dict()
        digest = hashlib.sha256(_spell({"sha256": "", **body})).hexdigest()
        return _spell({"sha256": digest, **body})

    @classmethod
    def from_bytes(cls, raw: bytes) -> Self:
        """The manifest in `raw`; ValueError saying what is wrong with it."""
        body = parse_json(raw)
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise ValueError(f"not a {FORMAT} manifest")
        if body.get("version") != VERSION:
            raise ValueError(f"format version {body.get('version')!r}, this livt_scale reads {VERSION}")
        digest = body.pop("sha256", None)
        if hashlib.sha256(_spell({"sha256": "", **body})).hexdigest() != digest:
            raise ValueError("changed since it was written (its own SHA-256 does not match)")
        if _spell({"sha256": digest, **body}) != raw:
            raise ValueError("changed since it was written (same values in another spelling)")
        return cls.model_validate(body)


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step in a checkpoint folder's name, or None for any other name."""
    match = STEP_NAME.fullmatch(name)
    return int(match[1]) if match and step_name(int(match[1])) == name else None


def read_manifest(path: Path) -> CheckpointManifest:
    """The manifest of the checkpoint `path`; CheckpointDamaged names the file and what is wrong with it."""
    file = path / MANIFEST
    try:
        manifest = CheckpointManifest.from_bytes(read_checked(file, "checkpoint manifest"))
    except FileNotFoundError:
        raise CheckpointDamaged(f"{path}: {MANIFEST} is missing, so this is not a complete checkpoint") from None
    except OSError as error:
        raise CheckpointDamaged(f"{path}: {MANIFEST} cannot be read ({error.strerror})") from error
    except ValidationError as error:
        raise CheckpointDamaged(f"{path}: {MANIFEST}: {first_mistake(error)}") from error
    except ValueError as error:
        raise CheckpointDamaged(f"{path}: {MANIFEST}: {error}") from error
    named = step_of(path.name)
    if named is not None and named != manifest.place.step:
        raise CheckpointDamaged(f"{path}: {MANIFEST} is of step {manifest.place.step}, not of the step in the name")
    return manifest


def plain_score(score: float | None) -> float | None:
    """A score that can be compared and written: NaN and infinities count as no score."""
    return float(score) if score is not None and math.isfinite(score) else None


def differences(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What differs between the facts of two checkpoints or runs, one line a field, dotted.

    `["recipe.model.width: 96 in the checkpoint, 192 here"]`; empty when they agree.
    """
    old, new = _flatten(saved), _flatten(wanted)
    lines = []
    for field in sorted(old.keys() | new.keys()):
        if field not in new:
            lines.append(f"{field}: {_short(old[field])} in the checkpoint, absent here")
        elif field not in old:
            lines.append(f"{field}: absent in the checkpoint, {_short(new[field])} here")
        elif old[field] != new[field]:
            lines.append(f"{field}: {_short(old[field])} in the checkpoint, {_short(new[field])} here")
    return lines


def _spell(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, indent=1, allow_nan=False) + "\n").encode()


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        # a tuple becomes a list in JSON: the same thing here
        return {prefix: list(tree) if isinstance(tree, tuple) else tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}…"
