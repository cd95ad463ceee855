"""A network as the shapes of its matrix products: what FLOPs are counted from, and what times are computed from.

    mae(Model(size="vit_l"), mask_ratio=0.75)   -> 24 blocks of 1024 over 50 tokens, 8 of 512 over 197, 4 products more

The shapes are those of this project's code: pretraining embeds the kept patches alone; the decoder takes all tokens,
but its last block answers for the masked ones alone, and they alone are predicted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from livt_scale.config.model import MLP_RATIO
from livt_scale.config.recipe import Model, Pretrain, Recipe, Stage
from livt_scale.config.tuning import TrainAll, Tuning


@dataclass(frozen=True)
class Product:
    """Rows of an image `[rows, inner]` times weights `[inner, columns]`.

    `leads_back`: the input needs a gradient. `trained`: the weights do.
    """

    rows: int
    inner: int
    columns: int
    leads_back: bool = True
    trained: bool = True

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns

    @property
    def weights(self) -> int:
        return self.inner * self.columns


@dataclass(frozen=True)
class BlockStack:
    """`depth` transformer blocks alike: the first `answered` tokens are asked for, all are looked at.

    `trained`: the matrices are. `added`: (inner, columns) of products over all tokens that a method of tuning adds.
    """

    tokens: int
    width: int
    heads: int
    depth: int
    answered: int
    mlp_ratio: float = MLP_RATIO
    drops_paths: bool = False
    trained: bool = True
    added: tuple[tuple[int, int], ...] = ()

    @property
    def hidden(self) -> int:
        return round(self.mlp_ratio * self.width)

    @cached_property
    def products(self) -> tuple[Product, ...]:
        """Of one block, in their order; the last one's output is not needed again when the block is recomputed."""
        width, answered = self.width, self.answered
        inputs = [Product(answered, width, width), Product(self.tokens, width, 2 * width)]
        if answered == self.tokens:
            inputs = [Product(answered, width, 3 * width)]
        mlp = (Product(answered, width, self.hidden), Product(answered, self.hidden, width))
        own = (*inputs, Product(answered, width, width), *mlp)
        more = (Product(self.tokens, inner, columns) for inner, columns in self.added)
        return (*more, *(replace(product, trained=self.trained) for product in own))

    @property
    def attention_flops(self) -> int:
        """Of one block and image: scores, and the values that they weigh."""
        return 2 * 2 * self.answered * self.tokens * self.width

    @property
    def flops(self) -> int:
        """Of one block and image, forward."""
        return sum(p.flops for p in self.products) + self.attention_flops


@dataclass(frozen=True)
class Network:
    """BlockStack, and the products outside of them. `image_values`: of one image, as the network takes it."""

    blocks: tuple[BlockStack, ...]
    outside: tuple[Product, ...]
    image_values: int

    @property
    def products(self) -> Iterator[tuple[Product, int]]:
        """Each product and how often there is one like it."""
        for blocks in self.blocks:
            yield from ((product, blocks.depth) for product in blocks.products)
        yield from ((product, 1) for product in self.outside)

    @property
    def num_blocks(self) -> int:
        return sum(b.depth for b in self.blocks)

    @cached_property
    def weights(self) -> int:
        """Elements of all matrices."""
        return sum(times * product.weights for product, times in self.products)

    @property
    def forward_flops(self) -> int:
        attention = sum(b.depth * b.attention_flops for b in self.blocks)
        return attention + sum(times * product.flops for product, times in self.products)

    @property
    def backward_flops(self) -> int:
        """Two products for each one forward, but one where the input or the weights need no gradient."""
        attention = sum(b.depth * b.attention_flops for b in self.blocks)
        return 2 * attention + sum(times * p.flops * (p.trained + p.leads_back) for p, times in self.products)

    @property
    def recomputed_flops(self) -> int:
        """What activation checkpointing computes again: each block but its last product, whose output nothing needs."""
        return sum(b.depth * (b.flops - b.products[-1].flops) for b in self.blocks)


def network_of(recipe: Recipe, stage: Stage, *, num_classes: int) -> Network:
    """The ViT that `stage` trains."""
    part, model = recipe.stage(stage), recipe.at(stage).model
    if isinstance(part, Pretrain):
        return mae(model, mask_ratio=part.mask_ratio)
    return classifier(model, num_classes=num_classes, drops_paths=part.drop_path > 0, tuning=part.tuning)


def mae(model: Model, *, mask_ratio: float) -> Network:
    width, depth, heads, patch_px = model.dims
    kept = model.num_kept(mask_ratio)
    masked = model.num_patches - kept
    values = patch_px**2 * model.channels
    decoder, tokens = model.decoder, 1 + model.num_patches
    blocks = (
        BlockStack(1 + kept, width, heads, depth, 1 + kept),
        BlockStack(tokens, decoder.width, decoder.heads, decoder.depth - 1, tokens),
        BlockStack(tokens, decoder.width, decoder.heads, 1, masked),
    )
    outside = (
        Product(kept, values, width, leads_back=False),
        Product(1 + kept, width, decoder.width),
        Product(masked, decoder.width, values),
    )
    return Network(blocks, outside, model.channels * model.image_px**2)


def classifier(model: Model, *, num_classes: int, drops_paths: bool = False, tuning: Tuning | None = None) -> Network:
    """`tuning`: None: all is trained. A linear probe's gradients are not counted here (`plan.flops`)."""
    tuning = tuning or TrainAll()
    width, depth, heads, patch_px = model.dims
    tokens = model.prefix_tokens + model.num_patches + tuning.tokens
    is_trained = not tuning.freezes or tuning.head_alone
    blocks = BlockStack(
        tokens, width, heads, depth, tokens, drops_paths=drops_paths, trained=is_trained, added=_added(model, tuning)
    )
    embed = Product(model.num_patches, patch_px**2 * model.channels, width, leads_back=False, trained=is_trained)
    outside = embed, *(Product(1, width, num_classes),) * model.prefix_tokens  # a head each
    return Network((blocks,), outside, model.channels * model.image_px**2)


def _added(model: Model, tuning: Tuning) -> tuple[tuple[int, int], ...]:
    """(inner, columns) of the matrices that `tuning` adds to one block."""
    shapes, head = model.tunable_shapes
    layers = tuning.adapted(shapes, head=head)
    found = (shape for layer in layers if layer.startswith("blocks.0.") for _, shape in tuning.added(layer, shapes))
    return tuple((shape[1], shape[0]) for shape in found if len(shape) == 2)
