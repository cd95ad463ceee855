"""The paper's claims, and one of ours: the runs that `livt reproduce` trains, and what it asks of their results.

    CLAIMS["losses"].arms(SETTINGS["fashion_mnist_lt"])    a way of training each: bal_bce, bce, ce, …
    CLAIMS["losses"].questions(…)                          bal_bce above bce on top1_all?  above ce?  …

An arm differs from the others of its claim only in what the claim is about; all have the same seeds, the same order of
samples and the same budget. Each loss has its authors' constants and the recipe's learning rate; arms that are trained
from scratch for longer than fine-tuning takes have the schedule of labels alone. Arms that pretrain alike share one
pretraining a seed, and an arm that two claims have is trained once. A setting has the data and the sizes, so that one
argument takes a claim from two CPU cores to ImageNet-LT.

Source: arXiv 2212.02015, abstract and section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from livt_scale.config.load import load_recipe
from livt_scale.config.recipe import STAGES, Recipe
from livt_scale.plan.flops import network_flops
from livt_scale.plan.published import PUBLISHED
from livt_scale.study.comparison import Comparison, GapComparison, Question
from livt_scale.study.runs import Run, as_words, in_order, laid_over
from livt_scale.util.errors import UsageError, nearest
from livt_scale.util.resources import shipped

Sets = Mapping[str, Any]
# A network that begins at random needs one rate for all layers (as timm's and DeiT's recipes have it).
SCRATCH: Sets = {"stages.finetune.init": "scratch", "stages.finetune.layer_decay": 1.0}


@dataclass(frozen=True)
class Setting:
    """The data and the sizes. balanced: the same data without a tail. sizes, mgp_shares: from small to large.

    scratch_factor, cnn: for the claim that compares a ViT with a CNN, trained on labels alone. tuned: by loss, the
    option that was better than its authors' on held-out images.

    The numbers of images are only for the cost, which is estimated before the sets exist.
    """

    name: str  # of a shipped recipe
    balanced: str
    sizes: Mapping[str, Sets]
    mgp_shares: tuple[float, ...]  # schedules of pretraining, as shares of the recipe's epochs; the last is 1
    num_classes: int
    num_images: int
    num_balanced: int
    scratch_factor: int  # epochs of labels alone over those of fine-tuning: nothing was pretrained
    from_scratch: Sets  # what else labels alone need where they have more time than fine-tuning: a rate, a warm-up
    cnn: Sets  # the network in the ViT's place, of about as many weights
    tuned: Mapping[str, Sets] = field(default_factory=dict)
    sets: Sets = field(default_factory=dict)

    @property
    def recipe(self) -> Path:
        return shipped(f"recipes/{self.name}.yaml")

    def load(self, sets: Sets | None = None) -> Recipe:
        """The recipe of this setting, with `sets` over it; both stages are in it."""
        return load_recipe(self.recipe, sets=as_words(laid_over(self.sets, sets or {})))

    def with_sets(self, sets: Sets) -> Setting:
        """The same with `sets` over its recipe. What an arm derives from the recipe, its epochs say, follows them."""
        return replace(self, sets=laid_over(self.sets, sets))

    @cached_property
    def mgp_epochs(self) -> tuple[int, ...]:
        epochs = self.load().stage("pretrain").epochs
        return tuple(max(round(share * epochs), 1) for share in self.mgp_shares)

    @property
    def labels_alone(self) -> Sets:
        """The schedule of labels alone. Evaluated only at the end, as the claims that have it require."""
        epochs = self.scratch_factor * self.load().stage("finetune").epochs
        return {"stages.finetune.epochs": epochs, **self.from_scratch}

    def size_of(self, run: Run) -> tuple[int, int]:
        """(images, classes) of the run's training set."""
        is_balanced = run.sets.get("data.train") == self.balanced
        return self.num_balanced if is_balanced else self.num_images, self.num_classes

    @property
    def base_size(self) -> str:
        return next(name for name, sets in self.sizes.items() if not sets)


@dataclass(frozen=True)
class Arm:
    """One way of training. pretraining: its name, and `pretrain` what it changes; None: none. `finetune` None: none.

    teacher: the arm that teaches it.
    """

    name: str
    pretraining: str | None = None
    pretrain: Sets = field(default_factory=dict)
    finetune: Sets | None = field(default_factory=dict)
    teacher: str | None = None


@dataclass(frozen=True)
class Claim:
    """One claim in words, its arms, and the questions about them."""

    says: str
    arms: Callable[[Setting], list[Arm]]
    questions: Callable[[Setting], list[Question]]


def runs_of(claim: Claim, setting: Setting, *, seeds: Sequence[int], sets: Sets) -> dict[tuple[str, int], list[Run]]:
    """The runs of each (arm, seed), the one that is looked at last. sets: over the recipe, below what makes an arm."""
    setting = setting.with_sets(sets)
    found: dict[tuple[str, int], list[Run]] = {}
    for seed in seeds:
        for arm in claim.arms(setting):
            shared = laid_over(setting.sets, arm.pretrain, {"seed": seed})
            runs = []
            if arm.pretraining is not None:
                runs.append(Run(f"pretrain-{arm.pretraining}/seed-{seed}", setting.recipe, shared, "pretrain"))
            if arm.finetune is not None:
                after = runs[-1].name if runs else None
                own = laid_over(shared, arm.finetune)
                teacher = f"{arm.teacher}/seed-{seed}" if arm.teacher is not None else None
                runs.append(Run(f"{arm.name}/seed-{seed}", setting.recipe, own, "finetune", after, teacher))
            found[arm.name, seed] = runs
    return found


def claim_runs(
    names: Sequence[str], on: str, *, seeds: Sequence[int], sets: Sets, arms: Sequence[str] | None = None
) -> list[Run]:
    """Each run of these claims once, seed by seed, after what it needs. arms: those alone, with what they need.

    Raises UsageError: none of the claims has such an arm.
    """
    every = [runs_of(CLAIMS[name], SETTINGS[on], seeds=[seed], sets=sets) for seed in seeds for name in names]
    known = dict.fromkeys(arm for of in every for arm, _ in of)
    for arm in arms or ():
        if arm not in known:
            raise UsageError(f"there is no arm {arm!r} in {', '.join(names)}", remedy=nearest(arm, known))
    ordered = in_order(run for of in every for runs in of.values() for run in runs)
    if arms is None:
        return ordered
    wanted = {runs[-1].name for of in every for (arm, _), runs in of.items() if arm in arms}
    for run in reversed(ordered):  # what a run needs comes before it
        if run.name in wanted:
            wanted |= set(run.needs)
    return [run for run in ordered if run.name in wanted]


# --- the claims ---

# Class-balanced twice: cb_ce as its authors have it, cb_bce as LiVT's code has it under mixup. Not ls_ce: the recipes
# smooth the targets, so `ce` computes the same.
LOSSES = ("bal_bce", "bce", "ce", "bal_ce", "cb_ce", "cb_bce", "ldam", "mislas", "lade", "focal")
HARD_LABELS: Sets = {"stages.finetune.smoothing": 0, "stages.finetune.mixup": 0, "stages.finetune.cutmix": 0}
ALSO_HARD = ("bal_bce", "bal_ce")  # for a comparison with lade in which the loss alone differs


def _two_stages(setting: Setting) -> list[Arm]:
    """Against labels alone, and against DeiT-LT: from scratch too, taught by a CNN with a balanced loss."""
    alone = {"stages.pretrain": None, **SCRATCH}
    return [
        Arm("bal_bce", "lt"),
        Arm("scratch", finetune=SCRATCH),
        Arm("resnet-bal_ce", finetune={**alone, **loss_sets("bal_ce"), **setting.labels_alone, **setting.cnn}),
        Arm("deit-lt", finetune={**alone, **_as_long(setting), **loss_sets("ce")}, teacher="resnet-bal_ce"),
    ]


def _equal_compute(setting: Setting) -> list[Arm]:
    return [Arm("bal_bce", "lt"), Arm("scratch-equal-compute", finetune={**SCRATCH, **_as_long(setting)})]


def _as_long(setting: Setting) -> Sets:
    """The schedule of labels alone for the compute of both stages."""
    epochs = epochs_of_equal_compute(setting.load(), num_classes=setting.num_classes)
    return {**setting.from_scratch, "stages.finetune.epochs": epochs, "stages.finetune.eval_every_epochs": None}


def epochs_of_equal_compute(recipe: Recipe, *, num_classes: int) -> int:
    """Epochs of fine-tuning that take as many operations as both stages together (`plan.flops`), rounded up."""
    first, second = (network_flops(recipe, stage, num_classes=num_classes).train for stage in STAGES)
    return recipe.stage("finetune").epochs + -(-recipe.stage("pretrain").epochs * first // second)


def _against(*rivals: str) -> Callable[[Setting], list[Question]]:
    """Above each over all classes and on the few-shot ones, and more so there."""

    def questions(setting: Setting) -> list[Question]:  # noqa: ARG001 - each claim's has the same signature
        found: list[Question] = []
        for rival in rivals:
            over_all, few = Comparison("bal_bce", rival, "top1_all"), Comparison("bal_bce", rival, "top1_few")
            found += [over_all, few, GapComparison(few, over_all)]
        return found

    return questions


def _each_loss(setting: Setting) -> list[Arm]:
    """With its authors' option, and with the one that was best on held-out images where that is another.

    Two without mixup and smoothing as well, as `lade` has to be.
    """
    hard = [Arm(f"{name}-hard", "lt", finetune={**loss_sets(name), **HARD_LABELS}) for name in ALSO_HARD]
    tuned = [
        Arm(_tuned(name, setting), "lt", finetune={**loss_sets(name), **sets}) for name, sets in setting.tuned.items()
    ]
    return [*(Arm(name, "lt", finetune=loss_sets(name)) for name in LOSSES), *hard, *tuned]


def _tuned(loss: str, setting: Setting) -> str:
    return f"{loss}-tuned" if loss in setting.tuned else loss


def loss_sets(name: str) -> dict[str, Any]:
    """The overrides for a loss. One that smooths the targets, or needs hard labels, cannot use all of the recipe."""
    if name == "bal_bce":
        return {}
    sets: dict[str, Any] = {"stages.finetune.loss.name": name}
    if name != "bal_ce":
        sets["stages.finetune.loss.tau"] = None
    if name == "mislas":
        sets["stages.finetune.smoothing"] = 0
    return {**sets, **HARD_LABELS} if name == "lade" else sets


def _best_loss(setting: Setting) -> list[Question]:
    pairs = [("bal_bce", rival) for rival in LOSSES[1:]]
    pairs += [("bal_bce-hard", "lade"), ("bal_bce-hard", "bal_ce-hard")]
    pairs += [(_tuned("bal_bce", setting), _tuned(rival, setting)) for rival in LOSSES[1:]]
    finally_: list[Question] = [Comparison(ours, rival, "top1_all") for ours, rival in dict.fromkeys(pairs)]
    return [*finally_, Comparison("bal_bce", "bal_ce", "top1_mean_over_epochs")]


def _mgp_arms(setting: Setting) -> list[Arm]:
    """Each size at the longest schedule, and the middle size at each schedule, on both sets."""
    arms = []
    for data, data_sets in (("lt", {}), ("balanced", {"data.train": setting.balanced})):
        for size, sets in setting.sizes.items():
            arms.append(_mgp_arm(data, size, setting.mgp_epochs[-1], {**data_sets, **sets}, setting))
        for epochs in setting.mgp_epochs[:-1]:
            arms.append(_mgp_arm(data, setting.base_size, epochs, data_sets, setting))
    return arms


def _mgp_arm(data: str, size: str, epochs: int, sets: Sets, setting: Setting) -> Arm:
    own = dict(sets)
    if epochs != setting.mgp_epochs[-1]:
        own["stages.pretrain.epochs"] = epochs
    return Arm(_mgp_name(data, size, epochs, setting), _mgp_name(data, size, epochs, setting), own, None)


def _mgp_name(data: str, size: str, epochs: int, setting: Setting) -> str:
    words = [data]
    words += [size] if size != setting.base_size else []
    words += [f"{epochs}-epochs"] if epochs != setting.mgp_epochs[-1] else []
    return "-".join(words)


def _reconstructs(setting: Setting) -> list[Question]:
    """Alike on both sets, to 5 %; lower with the next size, and with more epochs."""
    sizes, last = list(setting.sizes), setting.mgp_epochs[-1]
    arms = {
        (d, s, e): _mgp_name(d, s, e, setting) for d in ("lt", "balanced") for s in sizes for e in setting.mgp_epochs
    }
    base = setting.base_size
    questions: list[Question] = [
        Comparison(arms["lt", s, last], arms["balanced", s, last], "reconstruction_loss", within=0.05) for s in sizes
    ]
    larger = zip(sizes[1:], sizes[:-1], strict=True)
    questions += [Comparison(arms["lt", a, last], arms["lt", b, last], "reconstruction_loss") for a, b in larger]
    longer = zip(setting.mgp_epochs[1:], setting.mgp_epochs[:-1], strict=True)
    return [
        *questions,
        *(Comparison(arms["lt", base, a], arms["lt", base, b], "reconstruction_loss") for a, b in longer),
    ]


def _each_network_on_both_sets(setting: Setting) -> list[Arm]:
    """With labels alone and a loss that knows no class counts: what differs within a network is the set's balance."""
    plain = {"stages.pretrain": None, **SCRATCH, **loss_sets("ce"), **setting.labels_alone}
    return [
        Arm(f"{network}-{data}", finetune={**plain, **network_sets, **data_sets})
        for network, network_sets in (("vit", {}), ("resnet", setting.cnn))
        for data, data_sets in (("lt", {}), ("balanced", {"data.train": setting.balanced}))
    ]


def _a_vit_loses_more(setting: Setting) -> list[Question]:  # noqa: ARG001
    vit, resnet = (Comparison(f"{network}-balanced", f"{network}-lt", "top1_all") for network in ("vit", "resnet"))
    return [GapComparison(vit, resnet), vit, resnet]


def _each_size(setting: Setting) -> list[Arm]:
    return [
        Arm("bal_bce" if not sets else f"bal_bce-{size}", "lt" if not sets else f"lt-{size}", sets)
        for size, sets in setting.sizes.items()
    ]


def _larger_is_better(setting: Setting) -> list[Question]:
    names = [arm.name for arm in _each_size(setting)]
    return [Comparison(a, b, "top1_all") for a, b in zip(names[1:], names[:-1], strict=True)]


CLAIMS = {
    "balance": Claim(
        "A ViT loses more than a ResNet when the set is long-tailed and not balanced, both from scratch.",
        _each_network_on_both_sets, _a_vit_loses_more,
    ),
    "two-stages": Claim(
        "The two stages beat a ViT trained from scratch, most of all on the few-shot classes.",
        _two_stages, _against("scratch", "deit-lt"),
    ),
    "equal-compute": Claim(
        "The two stages beat a ViT that is trained from scratch for the compute of both (our question, not the "
        "paper's).", _equal_compute, _against("scratch-equal-compute"),
    ),
    "losses": Claim(
        "Bal-BCE beats the other losses in fine-tuning, and gains faster than Bal-CE.", _each_loss, _best_loss
    ),
    "reconstruction": Claim(
        "MAE reconstructs alike after pretraining on long-tailed or on balanced data; better with a larger model and "
        "with more epochs.", _mgp_arms, _reconstructs,
    ),
    "size": Claim("The larger the model, the higher the accuracy.", _each_size, _larger_is_better),
}  # fmt: skip

_SMALL = {
    "vit_nano": {"model.width": 48, "model.depth": 2},
    "vit_micro": {},
    "vit_mini": {"model.width": 144, "model.depth": 6},
}
_LARGE = {name: {} if name == "vit_b" else {"model.size": name} for name in ("vit_s", "vit_b", "vit_l", "vit_h")}
_FASHION = "fashion_mnist_lt/claims"
# The rate that is best for 40 epochs from scratch, as the recipe's is for 20: docs/reproducing.md.
_ALONE = {"stages.finetune.base_lr": 4e-3, "stages.finetune.eval_every_epochs": None}
_RESNET_MICRO = {"model.size": "resnet_micro", "model.patch_px": None}
SETTINGS = {
    "fashion_mnist_lt": Setting(
        name=_FASHION, balanced="shards/fashion-mnist-lt-full/train-balanced", sizes=_SMALL, mgp_shares=(1 / 3, 1),
        num_classes=10, num_images=14_886, num_balanced=14_886,
        scratch_factor=2, from_scratch=_ALONE, cnn=_RESNET_MICRO,
        tuned={"bal_ce": {"stages.finetune.loss.tau": 0.5}},  # docs/reproducing.md
    ),
    "fashion_mnist_lt_if10": Setting(
        name=_FASHION, balanced="shards/fashion-mnist-lt-if10/train-balanced", sizes=_SMALL, mgp_shares=(1 / 3, 1),
        num_classes=10, num_images=24_516, num_balanced=24_516,
        scratch_factor=2, from_scratch=_ALONE, cnn=_RESNET_MICRO,
        sets={
            "data.train": "shards/fashion-mnist-lt-if10/train-lt", "data.val": "shards/fashion-mnist-lt-if10/val",
            "data.few_under": 1500, "data.many_over": 3000,
        },
    ),
    "photographs_lt": Setting(
        name="photographs_lt/claims", balanced="shards/photographs-lt/train-balanced", sizes=_SMALL,
        mgp_shares=(1 / 3, 1), num_classes=60, num_images=3931, num_balanced=3931,
        scratch_factor=2, from_scratch=_ALONE, cnn=_RESNET_MICRO,
    ),
    "imagenet_lt": Setting(
        name="imagenet_lt/vit_b16", balanced="shards/imagenet-bal/train", sizes=_LARGE,
        mgp_shares=(0.25, 0.5, 1), num_classes=1000,
        num_images=PUBLISHED["imagenet-lt"][1], num_balanced=PUBLISHED["imagenet-bal"][1],
        scratch_factor=3,  # DeiT's 300 epochs
        from_scratch={  # the rest as MAE's ViT-B from scratch: recipes/imagenet_lt/vit_b16_scratch.yaml
            "stages.finetune.warmup_epochs": 20, "stages.finetune.base_lr": 1e-4,
            "stages.finetune.weight_decay": 0.3, "stages.finetune.betas": [0.9, 0.95],
        },
        cnn={"model.size": "resnet50", "model.patch_px": None},  # 25.6 M weights, as the paper compares them
        sets={"stages.finetune.eval_every_epochs": 5},
    ),
}  # fmt: skip
