"""The files in a folder of shards: `manifest.json`, the index of byte offsets, the keys, and the quarantine.

    train/  manifest.json          classes, counts, and each shard's bytes, samples and SHA-256; written last
            index.npy  keys.bin    one row of INDEX_DTYPE per sample; the keys one after the other in UTF-8
            train-000000.tar …     plain WebDataset tars
            quarantine.json        only after `livt shards verify --quarantine`: samples that are left out

This module defines and checks the format. `livt_scale.data.shard_set` opens a folder of such files for reading.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator

from livt_scale.util.errors import ManifestError
from livt_scale.util.outside import first_mistake, parse_json, read_checked

FORMAT = "livt-shards"
VERSION = 1
MANIFEST = "manifest.json"
INDEX = "index.npy"
KEYS = "keys.bin"
QUARANTINE = "quarantine.json"

INDEX_DTYPE = np.dtype(
    [
        ("start", "<u8"),  # offset in its shard of the sample's first tar header
        ("nbytes", "<u4"),  # from there to the end of its last member, padding included
        ("data_offset", "<u4"),  # of the image's bytes, from `start`
        ("data_size", "<u4"),  # of the image, bytes
        ("label", "<i4"),
        ("crc32", "<u4"),  # zlib.crc32 of [start, start + nbytes)
        ("image_type", "u1"),  # which of manifest.image_types
        ("key_end", "<u8"),  # where its key ends in keys.bin; it begins where the key before it ends
    ]
)

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PlainName = Annotated[str, Field(pattern=r"^[^/\x00]+$", max_length=255)]  # a file in this folder, never outside it


class _ManifestPart(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileInfo(_ManifestPart):
    name: PlainName
    bytes: NonNegativeInt
    sha256: Sha256

    @model_validator(mode="after")
    def _stays_in_the_folder(self) -> Self:
        if self.name in (".", ".."):
            raise ValueError(f"{self.name!r} is not the name of a file")
        return self


class ShardInfo(FileInfo):
    samples: NonNegativeInt


class ShardManifest(_ManifestPart):
    """All facts about a set except its samples. No absolute paths, no dates: a rebuild gives the same bytes."""

    format: Literal["livt-shards"] = "livt-shards"
    version: Literal[1] = 1
    name: str
    seed: int | None  # of the shuffle when the set was written; None: indexed tars, in their own order
    num_samples: NonNegativeInt
    image_types: list[str]  # file endings, ["png"]
    class_names: list[str]
    class_counts: list[NonNegativeInt]  # quarantined samples included
    shards: list[ShardInfo]
    index: FileInfo
    keys: FileInfo
    source: dict[str, Any]  # what the set was built from

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        sums = {"class_counts": sum(self.class_counts), "shards": sum(s.samples for s in self.shards)}
        for name, total in sums.items():
            if total != self.num_samples:
                raise ValueError(f"{name} add up to {total} samples, but num_samples is {self.num_samples}")
        if len(self.class_names) != len(self.class_counts):
            raise ValueError(f"{len(self.class_names)} class_names for {len(self.class_counts)} class_counts")
        if len({s.name for s in self.shards}) != len(self.shards):
            raise ValueError("two shards have the same name")
        return self

    def to_bytes(self) -> bytes:
        """The file's contents in their canonical form, with a digest of themselves at the end."""
        body = self.model_dump(mode="json")
        body["digest"] = hashlib.sha256(canonical_json(body)).hexdigest()
        return canonical_json(body)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The manifest in `folder`. Raises ManifestError, also if a single byte of it has changed."""
        path = folder / MANIFEST
        try:
            raw = read_checked(path, "manifest")
        except OSError as error:
            raise _no_manifest(folder, error) from error
        damaged = "copy the file again from its origin, or rebuild the set"
        try:
            body = dict(parse_json(raw))
            body.pop("digest", None)
            found = (body.get("format"), body.get("version"))
        except (ValueError, TypeError) as error:
            raise ManifestError(f"{path}: not a manifest of shards: {error}", remedy=damaged) from error
        if found != (FORMAT, VERSION):
            raise ManifestError(
                f"{path}: format {found[0]!r} version {found[1]!r}, this livt_scale reads {FORMAT!r} version {VERSION}",
                remedy="rebuild the set with this version, or use the version of livt_scale that wrote it",
            )
        try:
            manifest = cls.model_validate(body)
        except ValidationError as error:
            raise ManifestError(f"{path}: {first_mistake(error)}", remedy=damaged) from None
        if not _own_digest_matches(raw):
            raise ManifestError(f"{path}: the digest does not match: the file was changed", remedy=damaged)
        return manifest


class Quarantined(_ManifestPart):
    """A sample that is excluded, and why."""

    number: NonNegativeInt
    key: str
    shard: str
    label: NonNegativeInt = Field(alias="class")
    reason: str


class Quarantine(_ManifestPart):
    format: Literal["livt-quarantine"] = "livt-quarantine"
    version: Literal[1] = 1
    samples: list[Quarantined]

    def to_bytes(self) -> bytes:
        return canonical_json(self.model_dump(mode="json", by_alias=True))


def _own_digest_matches(raw: bytes) -> bool:
    """Whether the digest that ends a manifest is that of its other bytes, as `ShardManifest.to_bytes` makes them.

    The bytes are hashed as they are: writing a manifest of 100,000 shards again takes seconds.
    """
    before, _, last = raw.rpartition(b",\n")
    digest = hashlib.sha256(before + b"\n}\n").hexdigest()
    return last == f' "digest": "{digest}"\n}}\n'.encode()


def canonical_json(body: dict[str, Any]) -> bytes:
    """`body` as JSON in the one form that is hashed."""
    return (json.dumps(body, indent=1, ensure_ascii=True) + "\n").encode()


def _no_manifest(folder: Path, error: OSError) -> ManifestError:
    if not folder.exists():
        return ManifestError(f"there is no folder {folder}", remedy="give the folder that contains manifest.json")
    if not isinstance(error, FileNotFoundError):
        return ManifestError(f"{folder / MANIFEST} cannot be read: {error.strerror}", remedy="give a folder of shards")
    inside = sorted(p.parent.name for p in folder.glob(f"*/{MANIFEST}"))
    if inside:
        return ManifestError(f"{folder} contains no {MANIFEST}", remedy=f"give one of its sets: {', '.join(inside)}")
    if any(folder.glob("*.tar")):
        return ManifestError(
            f"{folder} contains tars but no {MANIFEST}",
            remedy=f"for existing tars run `livt shards index {folder}`; run an interrupted build again",
        )
    return ManifestError(f"{folder} contains no {MANIFEST}", remedy="build the set with `livt shards build`")
