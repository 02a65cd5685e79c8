"""The scorer that knows the question: its formula, its place in prefill and training, its file."""

import json

import lightning.pytorch as L
import pytest
import torch

from bench.experiments.query_scorer import POOLED, measure
from lightning_modules.data.tokenizer import train_bpe
from lightning_modules.token_pruning import losses
from lightning_modules.token_pruning.asked_text import AskedRows, AskedText
from lightning_modules.token_pruning.evaluation import pruned_nll
from lightning_modules.token_pruning.module import TokenPruning
from lightning_modules.token_pruning.networks.mlp import MLP
from lightning_modules.token_pruning.networks.query_key import QueryKey
from lightning_modules.token_pruning.prefill import PromptPruner
from lightning_modules.token_pruning.pruner import TokenPruner
from lightning_modules.token_pruning.quality.asked import Asked
from lightning_modules.token_pruning.saliency import TokenSaliency
from lightning_modules.token_pruning.samples import split_batch
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers.learned import Learned
from lightning_modules.token_pruning.selection import pooled
from lightning_modules.token_pruning.targets.retrieval_attention import RetrievalAttention
from tests.lightning_modules.data.toy import sentences
from tests.lightning_modules.token_pruning.models import HIDDEN, build, shared, tokens
from tests.lightning_modules.token_pruning.prompts import ROWS, padded

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # Lightning 2.6 with torch 2.13

SMALL = QueryKey(heads=2, head_dim=8, window=3)
SCHEDULE = Schedule(layers=[1, 3], keep=0.5, sinks=2, tail=0.0, min_tail=4)


def _pruner(network=SMALL):
    torch.manual_seed(1)
    return TokenPruner.for_model(shared(), [1, 3], network)


@torch.no_grad()
@pytest.mark.parametrize("join", ["max", "mean"])
def test_scores_are_the_formula(join):
    pruner, hidden = _pruner(QueryKey(2, 8, window=3, join=join)), torch.randn(1, 9, HIDDEN)
    scorer = pruner.scorers["1"]
    normed = hidden / hidden.square().mean(-1, keepdim=True).add(1e-5).sqrt()
    paid = []
    for head in range(2):
        query = normed[0, 6:] @ scorer.query.weight[head * 8 : head * 8 + 8].T
        key = normed[0, :6] @ scorer.key.weight[head * 8 : head * 8 + 8].T
        paid.append((query @ key.T / 8**0.5).softmax(-1).mean(0))
    joined = torch.stack(paid).amax(0) if join == "max" else torch.stack(paid).mean(0)
    torch.testing.assert_close(pruner(hidden, 1)[0, :6], 6 * joined)
    assert not pruner(hidden, 1)[0, 6:].any()


@torch.no_grad()
def test_only_tokens_that_are_there_ask_and_are_looked_at():
    pruner, hidden = _pruner(), torch.randn(1, 12, HIDDEN)
    there = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0]], dtype=torch.bool)
    torch.testing.assert_close(pruner(hidden, 1, there)[there], pruner(hidden[there][None], 1)[0])
    few = torch.zeros(1, 12, dtype=torch.bool)
    few[0, 4:6] = True  # fewer than ask
    assert not pruner(hidden, 1, few).any()


@torch.no_grad()
def test_training_chooses_what_the_pruned_prefill_chooses():
    model, ids = shared(), tokens(1, 60)
    pruner = _pruner(QueryKey(2, 8, window=12))  # more than is protected: what asks counts in no mean
    samples = split_batch({"input_ids": ids, "labels": ids}, 6)
    _, _, masked = pruned_nll(model, samples, SCHEDULE, pruner)
    with PromptPruner(Learned(pruner), SCHEDULE).prefill(model) as run:
        model(ids[:, :54])
    assert torch.equal(torch.stack([masked.alive[layer][:, :54] for layer in (1, 3)]), run.kept())


@torch.no_grad()
def test_rows_of_a_padded_batch_are_pruned_as_alone():
    model, scorer = shared(), Learned(_pruner())
    ids, mask = padded(ROWS)
    pruner = PromptPruner(scorer, SCHEDULE)
    with pruner.prefill(model) as run:
        model(ids, attention_mask=mask)
    together = run.kept()
    for row, alone in enumerate(ROWS):
        with pruner.prefill(model) as run:
            model(alone[None])
        assert torch.equal(together[:, row, ids.shape[1] - len(alone) :], run.kept()[:, 0])
    assert scorer.asking == 3 and scorer.pool == 17 and scorer.name == "query_key"


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_it_can_begin_from_a_head_of_the_model(family):
    model = build(family)
    for layer in model.model.layers:
        layer.input_layernorm.weight.uniform_(0.5, 1.5)
    network = QueryKey(2, 16, window=3, begin=[[4, 3]])
    scorer = TokenPruner.for_model(model, [1], network).scorers["1"]
    hidden = torch.randn(1, 5, HIDDEN)
    attention, normed = model.model.layers[4].self_attn, model.model.layers[4].input_layernorm(hidden)
    torch.testing.assert_close(
        scorer.query(scorer.norm(hidden))[..., :16], attention.q_proj(normed)[..., 48:], rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(
        scorer.key(scorer.norm(hidden))[..., :16], attention.k_proj(normed)[..., 16:], rtol=1e-3, atol=1e-3
    )
    for begin, family, names in (
        ([9, 0], "llama", "no layer 9"),
        ([1, 4], "llama", "4 heads of 16"),
        ([1, 0], "gpt2", "gpt2"),
        ([1, 0], "olmo2", "olmo2 model are no mere projections"),
        ([1, 0], "qwen2", "qwen2 model are no mere projections"),
        ([1, 0], "qwen3", "qwen3 model are no mere projections"),
        ([1, 0], "gemma3_text", "gemma3_text model are no mere projections"),
    ):
        with pytest.raises(ValueError, match=names):
            TokenPruner.for_model(build(family), [1], QueryKey(2, 16, begin=[begin]))


def test_a_pruner_comes_back_with_its_network_and_old_folders_load(tmp_path):
    for number, network in enumerate((SMALL, MLP(7))):
        pruner, folder = _pruner(network), tmp_path / str(number)
        pruner.save(folder)
        again = TokenPruner.load(folder, shared())
        hidden = torch.randn(1, 9, HIDDEN)
        assert torch.equal(again(hidden, 3), pruner(hidden, 3)) and repr(again.network) == repr(network)
    file = tmp_path / "1/config.json"
    config = json.loads(file.read_text())
    del config["network"]
    (tmp_path / "1/pare.json").unlink(missing_ok=True)
    file.write_text(json.dumps(config | {"width": 7}))
    assert TokenPruner.load(tmp_path / "1").network.width == 7
    file.write_text(json.dumps(config | {"network": {"class": "Oracle"}}))
    with pytest.raises(ValueError, match="no network 'Oracle'"):
        TokenPruner.load(tmp_path / "1")


def test_retrieval_attention_is_what_the_heads_pay_from_the_end_of_the_prompt():
    model, ids = shared("llama", "eager"), tokens(2, 40)
    labels, real = ids.clone(), torch.ones_like(ids)
    labels[0, :30], labels[1, :22], real[1, 28:] = -100, -100, 0  # rows of other lengths, padded on the right
    samples = split_batch({"input_ids": ids, "labels": labels, "attention_mask": real}, 6)
    target = RetrievalAttention({3: [1], 4: [0, 2]}, window=4, pool=3, sinks=2)
    ran = []
    hooks = [m.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, m in enumerate(model.model.layers)]
    found = target.values(model, samples, [1, 2])
    for hook in hooks:
        hook.remove()
    assert ran == [0, 1, 2, 3] and torch.equal(found[1], found[2])
    for row, length in enumerate((30, 22)):
        with torch.no_grad():
            attentions = model(ids[row : row + 1, :length], output_attentions=True).attentions
        heads = torch.cat([attentions[3][0, [1]], attentions[4][0, [0, 2]]])
        out = torch.zeros(1, length, dtype=torch.bool)
        out[0, :2] = out[0, -4:] = True
        wanted = pooled(heads[:, -4:].mean(1).amax(0)[None], 3, out)[0]
        torch.testing.assert_close(found[1][row, :length], wanted, rtol=1e-4, atol=1e-5)
    for only, names in (({9: [0]}, "6 layers"), ({1: [4]}, "of 4 heads")):
        with pytest.raises(ValueError, match=names):
            RetrievalAttention(only).values(model, samples, [1])
    for given in ({"only": {}}, {"only": {1: []}}, {"only": {1: [0]}, "pool": 2}, {"only": {1: [0]}, "window": 0}):
        with pytest.raises(ValueError, match=r"only|pool"):
            RetrievalAttention(**given)


def test_cross_entropy_is_that_of_two_distributions():
    scores, target = torch.randn(2, 5), torch.rand(2, 5)
    valid = torch.tensor([[1, 1, 1, 0, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    p, q = (part[0, valid[0]] for part in (target, scores))
    wanted = -(p / p.sum() * q.softmax(0).log()).sum()
    torch.testing.assert_close(losses.cross_entropy(scores, target, valid), wanted)


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A toy model, and a text to plant facts in."""
    folder = tmp_path_factory.mktemp("asked")
    text = ". ".join(part.capitalize() for part in sentences(1, 600, 12)).replace("0 ", "A ") + ". "
    text = "".join(letter for letter in text if not letter.isdigit()).replace(".  ", ". The ")
    (folder / "text.json").write_text(json.dumps([{"text": text}]))
    tokenizer = train_bpe([text, "What is the secret password of the harbour? Question: Answer:"], 400)
    model = build("llama", vocab_size=400, max_position_embeddings=1024)
    with torch.no_grad():
        for name in ("q_proj", "k_proj"):
            getattr(model.model.layers[3].self_attn, name).weight.mul_(3)  # a head that looks at few tokens
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def _data(folder, **options):
    given = {"lengths": [400, 500], "train_prompts": 6, "val_prompts": 1, "batch_size": 2, **options}
    return AskedText(str(folder / "text.json"), str(folder / "model"), **given)


def test_asked_text_ends_with_the_question_and_its_answer_is_the_response(asked):
    data = _data(asked)
    data.setup("fit")
    samples = split_batch(next(iter(data.train_dataloader())), 8)
    assert len(samples.input_ids) == 2 and len(data.train_dataloader()) == 3 and len(data.val_dataloader()) == 1
    for ids, prompt, labels in zip(samples.input_ids, samples.prompt, samples.labels, strict=True):
        text, answer = data.tokenizer.decode(ids[prompt]), data.tokenizer.decode(labels[labels != -100]).strip()
        assert text.endswith("Answer:") and answer and answer in text and prompt.sum() <= 500
    ends = [data.tokenizer(text).input_ids[-1] for text in ("\n", ":")]
    prompts = [Asked(torch.tensor([5, end]), torch.zeros(2), "harbour", "x", 0.5) for end in ends]
    rows = AskedRows(prompts, data.tokenizer)
    assert [data.tokenizer.decode(row[2:]) for row, _ in rows.rows] == ["harbour", " harbour"]
    again = _data(asked)
    again.setup("fit")
    assert again._identity == data._identity
    for options, names in (
        ({"lengths": []}, "lengths"),
        ({"val": "nowhere"}, "no such file"),
        ({"batch_size": 0}, "batch"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=names):
            _data(asked, **options)


def test_it_learns_the_attention_of_a_later_layer(asked, tmp_path):
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    base, schedule = str(asked / "model"), Schedule(layers=[1], keep=0.5, pool=1)
    target, folder = RetrievalAttention({3: [1]}, window=8, pool=1), str(tmp_path / "s")
    L.Trainer(**quiet).predict(TokenSaliency(base, folder, schedule, target, num_samples=6), _data(asked))
    weights = {"lm_weight": 0.0, "mse_weight": 0.0, "ranking_weight": 0.0, "cross_entropy_weight": 1.0}
    options = {**weights, "network": QueryKey(heads=2, head_dim=16, window=8), "learning_rate": 1e-2, "warmup_steps": 1}
    found = []
    for steps in (1, 30):
        L.seed_everything(0, verbose=False)
        module = TokenPruning(base, schedule, str(tmp_path / "p"), saliency=folder, **options)
        trainer = L.Trainer(**quiet, max_steps=steps, enable_checkpointing=False, limit_val_batches=0)
        trainer.fit(module, _data(asked, batch_size=6))  # the same rows at every step
        found.append(trainer.callback_metrics["train/cross_entropy"].item())
    assert found[1] < found[0] - 0.5, found
    assert TokenPruner.load(tmp_path / "p", module.model).network.heads == 2


def test_what_must_stay_is_measured_at_the_pruned_layer():
    ids, evidence = tokens(1, 120)[0], torch.zeros(120, dtype=torch.bool)
    evidence[50] = True
    model, pruner = build(), _pruner()
    with torch.no_grad():
        for name in ("query", "key"):  # a scorer of nothing: all tokens are equal
            getattr(pruner.scorers["1"], name).weight.zero_()
    found = measure(model, pruner, [Asked(ids, evidence, "", "", 0.2)])
    assert found["learned"] == [1.0] and all(0 < found[name][0] < 1 for name in POOLED)
    assert found["untrained"] != found["learned"] and "head it began from" not in found
    one = TokenPruner.for_model(
        model, [1], QueryKey(heads=1, head_dim=model.model.layers[0].self_attn.head_dim, begin=[[2, 1]])
    )
    found = measure(model, one, [Asked(ids, evidence, "", "", 0.2)])
    assert found["untrained"] == found["learned"] and 0 < found["head it began from"][0] < 1
    evidence[:] = False
    evidence[-2:] = True  # stays whatever its score
    assert measure(model, pruner, [Asked(ids, evidence, "", "", 0.9)])["learned"] == [0.0]
