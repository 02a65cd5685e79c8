"""What each layer and head needs, the search, the file, and the command."""

import json
from types import SimpleNamespace

import pytest
import torch

from lightning_modules.data.tokenizer import train_bpe
from lightning_modules.token_pruning.calibration import measured
from lightning_modules.token_pruning.calibration.module import TokenCalibration, _rounded_down
from lightning_modules.token_pruning.calibration.retrieval import share_needed, tail_means
from lightning_modules.token_pruning.calibration.search import Reading, best_readings, merit, only, schedules
from lightning_modules.token_pruning.flops import Cost
from lightning_modules.token_pruning.identity import identity_of
from lightning_modules.token_pruning.prefill import PromptPruner
from lightning_modules.token_pruning.pruning_file import FILE, content
from lightning_modules.token_pruning.quality import asking
from lightning_modules.token_pruning.quality.answers import Answer
from lightning_modules.token_pruning.schedule import Schedule
from lightning_modules.token_pruning.scorers.blocks import Blocks
from lightning_modules.token_pruning.scorers.last_window import LastWindow
from tests.lightning_modules.token_pruning.models import LAYERS, build, shared, tokens

N = 60


@torch.no_grad()
def test_tail_means_are_the_eager_models_own_attention():
    ids = tokens(1, N)
    wanted = shared("llama", "eager")(ids, output_attentions=True).attentions
    got = tail_means(shared("llama"), ids[0], [4, 9])
    assert got.shape == (LAYERS, 2, 4, N) and got.dtype == torch.float16
    for layer, attention in enumerate(wanted):
        for number, window in enumerate((4, 9)):
            torch.testing.assert_close(
                got[layer, number].float(), attention[0, :, -window:].mean(1), atol=1e-3, rtol=1e-2
            )


@pytest.mark.parametrize("pool", [1, 3])
def test_the_share_needed_is_the_least_that_keeps_the_answer(pool):
    generator = torch.Generator().manual_seed(pool)
    scores = torch.rand(2, 3, N, generator=generator)
    evidence, left_out = torch.zeros(N, dtype=torch.bool), torch.zeros(N, dtype=torch.bool)
    evidence[20:23] = left_out[:4] = left_out[-8:] = True
    needed = share_needed(scores, evidence, left_out, pool)
    assert needed.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            means = scores[i, j].clone()
            for n in range(4, N - 8):
                means[n] = scores[i, j, max(4, n - pool // 2) : min(N - 8, n + pool // 2 + 1)].mean()
            order = means[4:-8].argsort(descending=True) + 4
            fewest = next(k for k in range(1, N) if evidence[order[:k]].sum() == 3)
            assert needed[i, j] == pytest.approx(fewest / (N - 12))
    protected = torch.zeros(N, dtype=torch.bool)
    protected[15:30] = True
    assert (share_needed(scores, evidence, protected, pool) == 0).all()


def _readings():
    needed = {1: 0.9, 2: 0.5, 3: 0.2, 4: 0.25, 5: 0.02}
    return [Reading(layer, (layer,), torch.full((10,), share)) for layer, share in needed.items()]


def test_the_search_reaches_the_speedup_with_the_same_room_everywhere():
    cost, frame = Cost.of(build(layers=8)), Schedule(tail=0.0, min_tail=8, pool=3)
    found = schedules(_readings(), cost, [300, 600], 1.8, frame, 8)
    best = found[0]
    assert [merit(made) for made in found] == sorted(map(merit, found)) and all(made.keep[0] < 1 for made in found)
    assert {len(made.readings) for made in found} == {1, 2, 3}
    for made in found:
        layers = [reading.layer - 1 for reading in made.readings]
        schedule = Schedule(layers=layers, keep=list(made.keep), tail=0.0, min_tail=8)
        bounds = [cost.bound(n, schedule) for n in (300, 600)]
        assert min(bounds) == pytest.approx(1.8, abs=0.02)
        rooms = [share / reading.share for share, reading in zip(made.keep, made.readings, strict=True) if share < 1]
        assert rooms == pytest.approx([made.room] * len(rooms), rel=1e-3)
    # layer 4 needs more than layer 3 and comes later: together they are no better than layer 3 alone
    assert not any({3, 4} <= {reading.layer for reading in made.readings} for made in found)
    assert best.kept == 1.0 and best.room > 1 and only(best) == {r.layer: [r.layer] for r in best.readings}
    assert not schedules(_readings(), cost, [300], 9.0, frame, 8)


def test_of_each_layer_the_heads_that_need_least():
    one, other = (Reading(3, heads, torch.full((4,), share)) for heads, share in (((1,), 0.4), (None, 0.3)))
    assert [reading.heads for reading in best_readings([one, other])] == [None]


def test_the_file_gives_back_the_pruner_and_refuses_another_model(tmp_path):
    model = shared("llama")
    schedule, scorer = Schedule(layers=[1, 3], keep=[0.5, 0.2], pool=5), LastWindow(8, "max", {2: [1], 4: [0, 2]})
    (tmp_path / FILE).write_text(content(schedule, scorer, identity_of(model), {}))
    pruner = PromptPruner.from_file(tmp_path)
    assert repr(pruner.scorer) == repr(scorer) and pruner.schedule.arguments() == schedule.arguments()
    ids = tokens(1, N)
    with pruner.prefill(model) as run, torch.no_grad():
        model(ids)
    with PromptPruner(scorer, schedule).prefill(model) as direct, torch.no_grad():
        model(ids)
    assert torch.equal(run.kept(), direct.kept())
    with pytest.raises(ValueError, match=r"another model: num_hidden_layers is 4, not 6"):
        pruner.check(build(layers=4).config)
    other = build()
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(1.0)
    with pytest.raises(ValueError, match="another model"), pruner.prefill(other):
        pass


def test_a_scorer_inside_another_comes_back_too(tmp_path):
    scorer = Blocks(LastWindow(8, "max", {2: [1]}), 16)
    (tmp_path / FILE).write_text(content(Schedule(layers=[1]), scorer, identity_of(shared("llama")), {}))
    assert repr(PromptPruner.from_file(tmp_path).scorer) == repr(scorer)


def test_what_needs_nothing_but_the_protected_is_no_division_by_zero():
    found = schedules([Reading(2, None, torch.zeros(9))], Cost.of(shared("llama")), [300], 1.1, Schedule(), 8)
    assert found and found[0].kept == 1.0


@pytest.mark.parametrize("text", ["", "{", '{"format": "pare-pruning"}', '{"format": "x", "scorer": {"class": "A"}}'])
def test_a_damaged_file_is_named(text, tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{FILE}.*calibrate"):
        PromptPruner.from_file(tmp_path)
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ValueError, match=rf"{FILE} is damaged.*calibrate again"):
        PromptPruner.from_file(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [({"speedup": 1.0}, "speedup"), ({"facts": 2}, "facts"), ({"lengths": []}, "lengths"), ({"pools": [4]}, "odd")],
)
def test_bad_values_are_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        TokenCalibration("base", **arguments)


class _Asker:
    """Knows the answers to the first prompts that it is asked, whole or pruned."""

    def __init__(self, known):
        self.known, self.asked, self.pruned = known, 0, 0

    def __call__(self, model, tokenizer, asked, pruner=None, max_new_tokens=24):
        self.asked += 1
        self.pruned += pruner is not None
        return Answer(asked.answer if self.asked <= self.known else "", 1.0)


@pytest.fixture(scope="module")
def text():
    words = [f"w{number} said that it was so." for number in range(60)]
    sentences = [f"The {a} {b}" for a in ("man", "dog", "sea", "old house", "road") for b in words]
    return [" ".join(sentences[start::3]) for start in range(3)] * 12


@pytest.fixture(scope="module")
def setup(tmp_path_factory, text):
    """A tiny model on disk, and a DataModule of text in its tokens."""
    folder = tmp_path_factory.mktemp("calibration")
    tokenizer = train_bpe(iter([text]), 400)
    model = build(vocab_size=len(tokenizer), max_position_embeddings=2048)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    data = SimpleNamespace(tokenizer=tokenizer, inputs=list)
    data.documents = lambda: [("val", "Not this one. " * 2000), *(("train", one) for one in text)]
    return folder, data


def _calibrate(setup, tmp_path, monkeypatch, asker, **fields):
    folder, data = setup
    monkeypatch.setattr(asking, "answer_in_full", asker)
    arguments = {"facts": 8, "lengths": [450], "windows": [8], "pools": [1, 5], "speedup": 1.5, "min_tail": 8}
    module = TokenCalibration(
        str(folder / "base"), str(tmp_path / "out"), cache_dir=str(tmp_path), **arguments | fields
    )
    module.check_arguments("calibrate", data)
    return module.calibrate(data, torch.device("cpu"))["calibration"]


def test_calibrating_writes_what_reaches_the_speedup(setup, tmp_path, monkeypatch, capsys):
    found = _calibrate(setup, tmp_path, monkeypatch, _Asker(1000))
    assert min(found["bound"]) >= 1.5 and found["right"] == found["asked"] == 8
    assert [row["scorer"] for row in found["tried"]][-1] == "random" and found["tried"][0]["unpruned"] == 4
    assert [entry["layer"] for entry in found["needed"]] == [1, 2, 3, 4, 5]
    assert all(entry["share"] <= entry["all_heads"] <= 1 for entry in found["needed"])
    pruner = PromptPruner.from_file(tmp_path / "out")
    assert pruner.schedule.layers == found["layers"] and pruner.scorer.only == found["heads"]
    assert json.loads((tmp_path / "out/pare.json").read_text())["kind"] == "pruning"
    assert "PromptPruner.from_file(" in (tmp_path / "out/README.md").read_text()
    assert "answers 8 of 8 planted facts" in capsys.readouterr().out


def test_a_killed_measurement_goes_on_where_it_was(setup, tmp_path, monkeypatch):
    class Dies(_Asker):
        def __call__(self, *arguments, **others):
            if self.asked == self.known:
                raise KeyboardInterrupt
            return super().__call__(*arguments, **others)

    with pytest.raises(KeyboardInterrupt):
        _calibrate(setup, tmp_path, monkeypatch, Dies(5))
    assert not (tmp_path / "out").exists()
    again = _Asker(1000)
    found = _calibrate(setup, tmp_path, monkeypatch, again)
    assert again.asked - again.pruned == 3 + 4  # three facts were left, then four were tried out
    other = _calibrate(setup, tmp_path / "other", monkeypatch, _Asker(1000))
    assert other == found
    faster = _Asker(1000)  # another speed-up asks for no answer of the unpruned model again
    _calibrate(setup, tmp_path, monkeypatch, faster, speedup=1.7)
    assert faster.asked == faster.pruned


def test_a_model_that_answers_nothing_is_named(setup, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"answers 7 of 8 planted facts without pruning, too few"):
        _calibrate(setup, tmp_path, monkeypatch, _Asker(7))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"speedup": 6.0}, "speedup: 6.0 cannot be reached"),
        ({"lengths": [450, 2030]}, "2030 tokens and 24 of the answer, but .* has 2048 positions"),
        ({"windows": [8, 16]}, "windows must not exceed min_tail"),
        ({"lengths": [2000], "facts": 500}, "too short"),
    ],
)
def test_what_cannot_be_calibrated_is_named(fields, message, setup, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=message):
        _calibrate(setup, tmp_path, monkeypatch, _Asker(0), **fields)


def test_heads_are_chosen_and_judged_on_both_kinds_of_answers(tmp_path, monkeypatch):
    """Free answers have even numbers, begun ones odd; of few that were right, both halves get their share."""
    asked = []
    found = measured.Measured(tmp_path, [8])
    found.files = [tmp_path / f"{number:04}.safetensors" for number in (0, 1, 2, 3, 4, 5, 7, 8)]

    def needed(path, window, asking, frame, sets=None):
        asked.append((int(path.stem), sets is None))
        return torch.rand(3, 2)

    monkeypatch.setattr(measured, "_needed", needed)
    readings = found.readings(0, Schedule(pool=3))
    chosen_by = {number for number, choosing in asked if choosing}
    judged_by = {number for number, _ in asked} - chosen_by
    assert chosen_by == {0, 4, 1, 5} and judged_by == {2, 8, 3, 7} and len(readings[0].needed) == 4


@pytest.mark.parametrize("share", [0.5407961, 1.0, 0.0123456, 0.000087, 1e-6])
def test_shares_are_rounded_down_and_never_to_nothing(share):
    rounded = _rounded_down(share)
    assert 0 < rounded <= share < rounded + max(1e-4, rounded * 1.0001)


def test_the_result_never_replaces_what_is_not_its_own(setup, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("ten years")
    with pytest.raises(ValueError, match=r"model\.output: .*thesis"):
        _calibrate(setup, tmp_path, monkeypatch, _Asker(0))
