"""Which parameters fine-tuning trains: `stages.finetune.train`, a name or a name with its options. Needs no torch.

    all          every parameter
    head         the head alone: a linear probe
    lora         low-rank matrices beside linear layers, W x + (α / r) · B A x           arXiv 2106.09685
    adaptformer  a bottleneck beside each MLP, MLP(x) + s · up(ReLU(down(x)))            arXiv 2205.13535
    vpt          tokens before the first block (VPT-shallow)                             arXiv 2203.12119
    bitfit       the biases                                                              arXiv 2106.10199
    layernorm    weights and biases of the norms                                         arXiv 2312.11420

The head is always trained. What a method does to a network follows from names and shapes (`tuned`), so that `livt plan`
counts without building one; `livt_scale.models.parameter_efficient` does it to modules, and a test compares both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import Field, NonNegativeFloat, PositiveInt

from livt_scale.util.choices import Chosen, Options
from livt_scale.util.registry import Registry

Shape = tuple[int, ...]

# Linear layers of attention and MLP, as timm's families call them; those that a model lacks are left out.
LORA_TARGETS = ("qkv", "q_proj", "k_proj", "v_proj", "proj", "fc1", "fc1_g", "fc1_x", "fc2")
LORA_ADAPTER = "default"  # peft's name of an adapter that is given none
WEIGHT = ".weight"


class TunedParameter(NamedTuple):
    """A parameter of a tuned network. plain: its name before; None: the method has added it."""

    name: str
    shape: Shape
    trained: bool
    plain: str | None


class Tuning(Options):
    """A method and its options."""

    name: str

    freezes: ClassVar[bool] = True  # parameters besides those that it trains
    head_alone: ClassVar[bool] = False  # so no gradient passes through the backbone
    merges: ClassVar[bool] = True  # afterwards the plain network with other values gives the same logits

    def trains(self, name: str) -> bool:  # noqa: ARG002
        """Whether it trains the network's own parameter `name`, which is not the head's."""
        return False

    def renamed(self, name: str, layers: Iterable[str]) -> str:  # noqa: ARG002
        """What the network's own parameter `name` is called afterwards; layers: see `adapted`."""
        return name

    def adapted(self, shapes: Mapping[str, Shape], *, head: str) -> tuple[str, ...]:  # noqa: ARG002
        """The modules that it adds parameters to. Raises ValueError: there are none."""
        return ()

    def added(self, layer: str, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Shape]]:  # noqa: ARG002
        """What it adds to one of `adapted`."""
        yield from ()

    @property
    def phrase(self) -> str:
        """What is trained, in a word or two."""
        return self.name

    @property
    def tokens(self) -> int:
        """Tokens that the blocks have besides."""
        return 0

    @property
    def uniforms(self) -> int:
        """Random numbers that it takes for each image in training."""
        return 0


TUNINGS: Registry[type[Tuning]] = Registry("method")


@TUNINGS.register("all")
class TrainAll(Tuning):
    """Every parameter."""

    name: Literal["all"] = "all"
    freezes: ClassVar[bool] = False

    def trains(self, name: str) -> bool:  # noqa: ARG002
        return True


@TUNINGS.register("head")
class TrainHead(Tuning):
    """A linear probe: the head alone."""

    name: Literal["head"] = "head"
    head_alone: ClassVar[bool] = True

    @property
    def phrase(self) -> str:
        return "head alone"


@TUNINGS.register("lora")
class Lora(Tuning):
    """LoRA by the library `peft`. Defaults: rank 8 on attention and MLP, as in LIFT's code for CLIP's ViT-B."""

    name: Literal["lora"] = "lora"
    rank: PositiveInt = Field(8, description="columns of A, rows of B")
    alpha: PositiveInt = Field(16, description="the update is scaled by alpha / rank")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="of the input of A, by image")
    targets: tuple[str, ...] | None = Field(
        None, description="linear layers, as qkv or blocks.0.mlp.fc1; None: those of attention and MLP"
    )

    def renamed(self, name: str, layers: Iterable[str]) -> str:
        module, _, own = name.rpartition(".")
        return f"{module}.base_layer.{own}" if module in layers else name

    def adapted(self, shapes: Mapping[str, Shape], *, head: str) -> tuple[str, ...]:
        linear = linear_layers(shapes, head=head)
        wanted = self.targets if self.targets is not None else LORA_TARGETS
        unmatched = [target for target in wanted if not any(_matches(layer, target) for layer in linear)]
        if (self.targets is not None and unmatched) or len(unmatched) == len(wanted):
            what = ", ".join(map(repr, unmatched if self.targets else wanted)) or "no target"
            known = ", ".join(dict.fromkeys(layer.rpartition(".")[2] for layer in linear)) or "none"
            raise ValueError(f"targets: {what} matches no linear layer of the model. It has {known}")
        return tuple(layer for layer in linear if any(_matches(layer, target) for target in wanted))

    def added(self, layer: str, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Shape]]:
        outer, inner, *kernel = shapes[layer + WEIGHT]
        yield f"{layer}.lora_A.{LORA_ADAPTER}.weight", (self.rank, inner, *kernel)
        yield f"{layer}.lora_B.{LORA_ADAPTER}.weight", (outer, self.rank, *kernel)

    @property
    def uniforms(self) -> int:
        return 1 if self.dropout else 0


@TUNINGS.register("adaptformer")
class AdaptFormer(Tuning):
    """A bottleneck beside each MLP. Defaults: the paper's."""

    name: Literal["adaptformer"] = "adaptformer"
    merges: ClassVar[bool] = False
    bottleneck: PositiveInt = Field(64, description="width between down and up")
    scale: NonNegativeFloat = Field(0.1, description="s, of the bottleneck's output")

    def adapted(self, shapes: Mapping[str, Shape], *, head: str) -> tuple[str, ...]:
        linear = linear_layers(shapes, head=head)
        of_tokens = (layer for layer in linear if layer.endswith(".mlp.fc2") and len(shapes[layer + WEIGHT]) == 2)
        mlps = [layer.rpartition(".")[0] for layer in of_tokens]
        if not mlps:
            raise ValueError("adaptformer adds to blocks with an MLP, and the model has none: choose lora or bitfit")
        return tuple(mlps)

    def added(self, layer: str, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Shape]]:
        width = shapes[f"{layer}.fc2.weight"][0]
        yield f"{layer}.adapter.down.weight", (self.bottleneck, width)
        yield f"{layer}.adapter.down.bias", (self.bottleneck,)
        yield f"{layer}.adapter.up.weight", (width, self.bottleneck)
        yield f"{layer}.adapter.up.bias", (width,)


@TUNINGS.register("vpt")
class Vpt(Tuning):
    """VPT-shallow: trained tokens between the class token and the patches, left out where the patches are averaged."""

    name: Literal["vpt"] = "vpt"
    merges: ClassVar[bool] = False
    prompts: PositiveInt = Field(10, description="number of trained tokens")

    def adapted(self, shapes: Mapping[str, Shape], *, head: str) -> tuple[str, ...]:  # noqa: ARG002
        if "pos_embed" not in shapes or not any(name.startswith("blocks.") for name in shapes):
            raise ValueError("vpt adds tokens to a ViT with position embeddings: choose lora or bitfit for this model")
        return ("norm_pre",)

    def added(self, layer: str, shapes: Mapping[str, Shape]) -> Iterator[tuple[str, Shape]]:
        yield f"{layer}.prompts", (1, self.prompts, shapes["pos_embed"][-1])

    @property
    def tokens(self) -> int:
        return self.prompts


@TUNINGS.register("bitfit")
class BitFit(Tuning):
    """The biases, those of the norms included."""

    name: Literal["bitfit"] = "bitfit"

    def trains(self, name: str) -> bool:
        return name.endswith("bias")


@TUNINGS.register("layernorm")
class TrainNorms(Tuning):
    """Weights and biases of the modules that are called a norm."""

    name: Literal["layernorm"] = "layernorm"

    def trains(self, name: str) -> bool:
        return "norm" in name.rpartition(".")[0].rpartition(".")[2]


AnyTuning = Annotated[Tuning, Chosen(TUNINGS, default="all", short=True)]


def tuned(tuning: Tuning, shapes: Mapping[str, Shape], *, head: str) -> Iterator[TunedParameter]:
    """The parameters of a network after `tuning`; shapes: of the plain one, by name; head: its last linear layer.

    Raises ValueError where the network has nothing that the method changes.
    """
    layers = tuning.adapted(shapes, head=head)
    for name, shape in shapes.items():
        trained = name.startswith(f"{head}.") or tuning.trains(name)
        yield TunedParameter(tuning.renamed(name, layers), shape, trained, name)
    for layer in layers:
        for name, shape in tuning.added(layer, shapes):
            yield TunedParameter(name, shape, True, None)


def linear_layers(shapes: Mapping[str, Shape], *, head: str) -> list[str]:
    """The modules whose weight is a matrix, also as a 1 x 1 convolution, without the head."""
    matrices = (name for name, shape in shapes.items() if len(shape) == 2 or (len(shape) == 4 and shape[2:] == (1, 1)))
    found = (name.removesuffix(WEIGHT) for name in matrices if name.endswith(WEIGHT))
    return [layer for layer in found if layer != head]


def _matches(layer: str, target: str) -> bool:
    """As peft matches: the name itself, or its end after a dot."""
    return layer == target or layer.endswith(f".{target}")
