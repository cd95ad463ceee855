"""Which shards a run reads, and how: the recipe's part `data`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from livt_scale.config.resume import ALLOW, FREE
from livt_scale.config.runtime import RecipePart
from livt_scale.util.urls import is_url, url_problem


def _of_pixels(value: float) -> float:
    if not 0 <= value <= 1:
        raise PydanticCustomError("of_pixels", "Input should be from 0 to 1, of pixels in [0, 1]; divide by 255")
    return value


PixelMean = Annotated[float, AfterValidator(_of_pixels)]
PixelStd = Annotated[PositiveFloat, AfterValidator(_of_pixels)]


class Cache(RecipePart):
    """Where shards from a URL are kept on each node, and how much of them. Local folders are read in place."""

    dir: str | None = Field(
        None, min_length=1, description="on the node's own disk; None: LIVT_CACHE_DIR, else livt-cache-UID in $TMPDIR"
    )
    limit_gib: PositiveFloat = Field(64, description="GiB a node, over all its processes; what was used last stays")
    ahead: PositiveInt = Field(4, description="shards that each loader process has fetched before it needs them")


class Remote(RecipePart):
    """How a file is fetched from a URL."""

    tries: PositiveInt = Field(
        8, description="of a time-out, reset, wrong body, 429 or 5xx; 404 and 403 are not retried"
    )
    connect_timeout_s: PositiveFloat = Field(10, description="for the connection to be made")
    stall_timeout_s: PositiveFloat = Field(30, description="a connection that sends nothing for this time is closed")
    deadline_s: PositiveFloat = Field(900, description="for one file, all tries and waits together")


class Data(RecipePart):
    """Which shards, and how they are read."""

    train: Annotated[str, FREE] = Field(
        min_length=1, description="folder or URL of the training shards (the one with manifest.json)"
    )
    val: Annotated[str | None, FREE] = Field(
        None, min_length=1, description="the same of the evaluation shards; None: no evaluation"
    )
    mean: tuple[PixelMean, ...] = Field(
        (0.485, 0.456, 0.406),
        description="of the pixels in [0, 1], one a channel; with model.timm, if not set, that of its weights",
    )
    std: tuple[PixelStd, ...] = Field((0.229, 0.224, 0.225), description="of the pixels, one a channel")
    interpolation: Literal["bicubic", "bilinear"] = Field(
        "bicubic", description="of resized images, with antialiasing; with model.timm, if not set, that of its weights"
    )
    crop_pct: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="in evaluation, the crop's side over the resized shorter side; None: 0.875 up to 224 px, else 1; "
        "with model.timm, if not set, that of its weights",
    )
    many_over: Annotated[PositiveInt, ALLOW] = Field(
        100, description="many-shot: classes with more training images than this"
    )
    few_under: Annotated[PositiveInt, ALLOW] = Field(
        20, description="few-shot: classes with fewer training images than this"
    )
    group_counts: Annotated[str | None, FREE] = Field(
        None,
        min_length=1,
        description="images of each class that make it many, medium or few: a JSON list, a set of shards, or "
        "livt:NAME; None: those of data.train",
    )
    workers: Annotated[NonNegativeInt | Literal["auto"], FREE] = Field(
        2, description="loader processes a rank; 0 decodes in the training process; auto: measured at the start"
    )
    prefetch: Annotated[PositiveInt, FREE] = Field(
        4, description="micro-batches each loader process keeps ready; with auto, at most"
    )
    lane_groups: PositiveInt | None = Field(
        None, description="groups of slots with separate shards; None: the most that leave each 12 shards"
    )
    shuffle_window: PositiveInt = Field(65536, description="samples among which a lane group shuffles")
    cache: Annotated[Cache, FREE] = Cache()
    remote: Annotated[Remote, FREE] = Remote()

    @model_validator(mode="after")
    def _urls_hold_no_secret(self) -> Self:
        for name in ("train", "val", "group_counts"):
            location = getattr(self, name)
            problem = url_problem(location) if location and is_url(location) else None
            if problem:  # the URL itself is not repeated: it may hold a password
                raise ValueError(f"{name} is a URL that cannot be: {problem}")
        return self

    @model_validator(mode="after")
    def _thresholds_leave_a_middle(self) -> Self:
        if self.few_under > self.many_over + 1:
            raise ValueError(f"few_under is {self.few_under}, above many_over = {self.many_over}: groups overlap")
        return self
