"""The planner that reads its context anew: what it asks, and that its arms differ only in what is dropped."""

from bench.experiments import planner
from lightning_modules.data.tokenizer import train_bpe
from lightning_modules.token_pruning.prefill import PromptPruner
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers.recency import Recency
from tests.lightning_modules.token_pruning.models import build


def test_what_is_asked_was_seen_and_its_latest_place_is_right():
    world = planner.observations(30)
    assert world == planner.observations(30) and world != planner.observations(30, seed=1)
    latest: dict[str, str] = {}
    for text, asked, place in world:
        said = text.split(" In the ")[1]
        where, thing = said.split(" the courier saw the ")
        latest[thing.split(".")[0]] = where
        assert latest[asked] == place


def test_plans_of_an_arm_that_drops_nothing_are_the_unpruned_models():
    world = planner.observations(2)
    tokenizer = train_bpe(iter([[text for text, *_ in planner.observations(40)]]), 400)
    model = build(vocab_size=len(tokenizer), max_position_embeddings=2048)
    pruners = {
        "whole": PromptPruner(Recency(), Schedule(layers=[1], keep=1.0)),
        "pruned": PromptPruner(Recency(), Schedule(layers=[1, 3], keep=0.2, tail=0.0)),
    }
    rows = planner.plan(model, tokenizer, pruners, world)
    assert [row["arm"] for row in rows] == ["whole", "pruned"] * 2 and rows[2]["tokens"] > rows[0]["tokens"]
    assert all(row["same"] for row in rows if row["arm"] == "whole")
    assert all(row["bound"] > 1 for row in rows if row["arm"] == "pruned") and rows[0]["bound"] == 1
    assert not all(row["same"] for row in rows if row["arm"] == "pruned")


def test_what_is_shown_is_the_prompt_that_was_asked():
    world = planner.observations(3)
    tokenizer = train_bpe(iter([[text for text, *_ in planner.observations(40)]]), 400)
    model = build(vocab_size=len(tokenizer), max_position_embeddings=2048)
    pruner = PromptPruner(Recency(), Schedule(layers=[1, 3], keep=0.2, tail=0.0))
    seen = planner.look(model, tokenizer, pruner, world)
    tokens, fate = seen["survival"]["tokens"], seen["survival"]["dropped_at"]
    assert "".join(tokens) == tokenizer.decode(planner.prompt(tokenizer, [text for text, *_ in world], world[-1][1])[0])
    assert len(fate) == len(tokens) and {0, 1, None} == set(fate) and seen["asked"] == world[-1][1]
