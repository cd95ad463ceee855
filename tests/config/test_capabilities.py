"""One table says what a strategy can do: recipes, planner, engines and the documents agree with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from livt_scale.config.capabilities import AUTO, CAPABILITIES, STRATEGIES, Feature, choices, supports
from livt_scale.config.load import load_recipe
from livt_scale.plan.stage_plan import strategies_for
from livt_scale.util.errors import RecipeError

REPO = Path(__file__).parents[2]
QUICKSTART = REPO / "recipes/fashion_mnist_lt/quickstart.yaml"
PROBE = ["stages.pretrain=null", "stages.finetune.init=weights", "stages.finetune.weights=w"]
PROBE += ["stages.finetune.train=head", "stages.finetune.layer_decay=1", "stages.finetune.drop_path=0"]
# feature -> what asks for it in a recipe
ASKED: dict[Feature, list[str]] = {
    "offload": ["parallel.offload=cpu"],
    "hybrid": ["parallel.shard_within=node"],
    "ema": ["stages.finetune.ema.decay=0.99"],
    "other_optimizer": [*PROBE, "stages.finetune.optimizer=lars"],
    "frozen_parameters": PROBE,
    "layer_groups": ["log.layer_groups=true"],
}


def test_offloading_with_a_loss_scaler_is_refused_under_fsdp_alone():
    sets = ["parallel.offload=cpu", "parallel.precision=fp16"]
    load_recipe(QUICKSTART, sets=[*sets, "parallel.strategy=zero2"])
    with pytest.raises(RecipeError, match="do not go together under fsdp"):
        load_recipe(QUICKSTART, sets=[*sets, "parallel.strategy=fsdp"])


@pytest.mark.parametrize("strategy", ["auto", *STRATEGIES])
@pytest.mark.parametrize("feature", ASKED)
def test_a_recipe_is_refused_where_the_table_says_no(strategy, feature):
    sets = [f"parallel.strategy={strategy}", *ASKED[feature]]
    if supports(strategy, feature):
        load_recipe(QUICKSTART, sets=sets)
    else:
        with pytest.raises(RecipeError, match=f"{strategy}.*{choices(feature)}"):
            load_recipe(QUICKSTART, sets=sets)


def test_auto_supports_what_each_of_its_choices_supports():
    for feature in ASKED:
        assert supports("auto", feature) == all(supports(name, feature) for name in AUTO)
    assert choices("hybrid") == "fsdp"
    assert choices("ema") == "ddp, fsdp, zero1 or zero2"


def test_the_planner_tries_what_a_recipe_may_have():
    probe = load_recipe(QUICKSTART, sets=PROBE).stage("finetune")
    assert strategies_for(probe) == tuple(name for name in STRATEGIES if supports(name, "frozen_parameters"))
    assert strategies_for(load_recipe(QUICKSTART).stage("pretrain")) == STRATEGIES


def test_the_document_says_what_each_strategy_shards():
    text = (REPO / "docs/strategies.md").read_text(encoding="utf-8")
    table = text[text.index("| strategy | a rank holds |") :].partition("\n\n")[0]
    held = dict(re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", table, re.MULTILINE))
    words = {
        (False, False, False): "all parameters, gradients and moments",
        (False, False, True): "all parameters and gradients, its share of the moments",
        (False, True, True): "all parameters, its share of the rest",
        (True, True, True): "its share of all three",
    }
    for name, can in CAPABILITIES.items():
        assert held[name] == words[can.shards_parameters, can.shards_gradients, can.shards_moments], name
