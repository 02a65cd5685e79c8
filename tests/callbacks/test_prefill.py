"""Timing and memory of pruned prefill through `validate`, and the survival of prompt tokens."""

import io
import json
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from bench.report.sections import prefill
from callbacks import PrefillMemory, PrefillTiming, RunRecord, prefill_memory
from callbacks.prefill_memory import _Cpu
from callbacks.prefill_timing import pruned_read, summary_table
from callbacks.survival import show, survival
from lightning_modules.loading import load
from lightning_modules.token_pruning.flops import Cost
from lightning_modules.token_pruning.identity import identity_of
from lightning_modules.token_pruning.networks.mlp import MLP
from lightning_modules.token_pruning.prefill import PromptPruner
from lightning_modules.token_pruning.pruner import TokenPruner
from lightning_modules.token_pruning.pruning_file import FILE, content
from lightning_modules.token_pruning.schedule import Schedule, preset
from lightning_modules.token_pruning.scorers.last_window import LastWindow
from lightning_modules.token_pruning.scorers.learned import Learned
from lightning_modules.token_pruning.scorers.recency import Recency
from tests.lightning_modules.token_pruning.models import LAYERS, build, on_disk, tokens
from tests.ranks import FORKED

SCHEDULE = Schedule(layers=[1, 3], keep=0.5)


class Data(L.LightningDataModule):
    name, block_size, batch_size = "rows", 50, 2

    def val_dataloader(self):
        return DataLoader([{"input_ids": row} for row in tokens(4, 50)], batch_size=2)


class Module(L.LightningModule):
    def __init__(self, model, **attributes):
        super().__init__()
        self.__dict__.update(attributes, model=model)  # not a submodule, as in TokenPruning: Lightning does not move it

    def validation_step(self, batch, batch_idx):
        pass


def _validate(folder, callback, model=None, **attributes):
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=[callback, RunRecord(str(folder / "results.jsonl"), "a")],
        logger=TensorBoardLogger(folder, default_hp_metric=False),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.validate(Module(model or build(), **attributes), datamodule=Data(), verbose=False)
    return json.loads((folder / "results.jsonl").read_text()), trainer


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_timing_compares_four_arms_and_records_them(tmp_path, capsys):
    callback = PrefillTiming(LastWindow(), SCHEDULE, lengths=[120, 60, 5000], repeats=2, warmup=1)
    model = build()
    record, trainer = _validate(tmp_path, callback, model)
    block = record["prefill"]
    assert [(arm["length"], arm["arm"]) for arm in block["arms"]] == [
        (length, arm) for length in (60, 120) for arm in ("baseline", "pruned", "keep-1.0", "random")
    ]
    assert (
        block["layers"] == [1, 3]
        and block["keep"] == 0.5
        and block["scorer"] == {"name": "last_window", "window": 16, "heads": "max", "only": None}
    )
    assert block["kernels"] == ["aten._scaled_dot_product_flash_attention_for_cpu.default"]
    assert block["placement"] == {"devices": ["cpu"], "layers": ["cpu"] * LAYERS, "offloaded": []}
    baseline, pruned, whole, _ = block["arms"][4:]
    assert baseline["speedup"] == baseline["bound"] == 1 and whole["bound"] == 1
    assert pruned["bound"] == Cost.of(model).bound(120, SCHEDULE, LastWindow())
    assert pruned["peak_bytes"] < baseline["peak_bytes"] and pruned["ms_median"] > 0 and pruned["ms_iqr"] >= 0
    assert baseline["speedup_spread"] == 0 and pruned["speedup_spread"] >= 0
    assert "only 200 tokens" in block["skipped"]["5000"]
    assert prefill.parse(block).at(120, "pruned").speedup == pruned["speedup"]  # the report reads what was written
    output = capsys.readouterr().out
    assert "Length 120: baseline=0." in output and f"bound={pruned['bound']:.2f}x" in output
    events = EventAccumulator(trainer.logger.log_dir).Reload()
    assert [event.step for event in events.Scalars("prefill/speedup")] == [60, 120]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_presets_are_timed_side_by_side_with_their_mean(tmp_path, capsys):
    timing = PrefillTiming(Recency(), presets=["keep09", "keep07"], lengths=[150, 100], repeats=1, warmup=0)
    model = build()
    record, _ = _validate(tmp_path, timing, model)
    block = record["prefill"]
    assert [arm["arm"] for arm in block["arms"][:5]] == ["baseline", "keep09", "keep07", "keep-1.0", "random"]
    assert block["schedules"]["keep07"] == {"layers": [1, 2, 3, 4], "keep": 0.7}
    bounds = {arm["arm"]: arm["bound"] for arm in block["arms"][5:]}
    assert bounds["keep07"] == Cost.of(model).bound(150, preset("keep07"), Recency()) > bounds["keep09"] > 1
    table = summary_table(block["arms"], ["keep09", "keep07"]).rows
    assert [row[:2] for row in table] == [[a, n] for a in ("keep09", "keep07") for n in (100, 150, "mean")]
    mean = sum(arm["speedup"] for arm in block["arms"] if arm["arm"] == "keep07") / 2
    assert table[-1][4] == f"{mean:.2f}×" and "latency" in capsys.readouterr().out
    with pytest.raises(ValueError, match="presets are schedules"):
        PrefillTiming(Recency(), SCHEDULE, presets=["keep09"])
    with pytest.raises(ValueError, match="no schedule 'keep06'"):
        PrefillTiming(Recency(), presets=["keep06"])


def test_a_calibrated_pruner_is_timed(tmp_path):
    model = build()
    (tmp_path / FILE).write_text(content(SCHEDULE, LastWindow(8), identity_of(model), {}))
    record, _ = _validate(tmp_path, PrefillTiming(pruner=str(tmp_path), lengths=[64], repeats=1, warmup=0), model)
    assert record["prefill"]["scorer"]["window"] == 8 and record["prefill"]["layers"] == [1, 3]
    for callback in (PrefillTiming(pruner=str(tmp_path), lengths=[64]), PrefillMemory(pruner=str(tmp_path))):
        with pytest.raises(ValueError, match="calibrated for another model"):
            _validate(tmp_path / "other", callback, build(layers=8))
    for callback in (PrefillTiming, PrefillMemory):
        with pytest.raises(ValueError, match="leave these out"):
            callback(LastWindow(), pruner=str(tmp_path))


def test_the_modules_own_pruner_and_schedule_are_the_default(tmp_path):
    model = build()
    pruner = TokenPruner.for_model(model, [1, 3], network=MLP(16))
    own = {"pruner": pruner, "schedule": SCHEDULE}
    record, _ = _validate(tmp_path, PrefillTiming(lengths=[64], repeats=1, warmup=0), model, **own)
    assert record["prefill"]["scorer"]["name"] == "mlp"
    assert record["prefill"]["arms"][1]["bound"] == Cost.of(model).bound(64, SCHEDULE, Learned(pruner))


def test_an_offloaded_model_is_timed_where_it_is_and_its_times_are_doubted(tmp_path):
    build().save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", device_map=on_disk(), offload_folder=str(tmp_path / "disk"))
    timing = PrefillTiming(Recency(), SCHEDULE, lengths=[64], repeats=1, warmup=0)
    with pytest.warns(UserWarning, match="times measure transfers: .*lm_head"):
        record, _ = _validate(tmp_path, timing, model)
    place = record["prefill"]["placement"]
    assert place["devices"] == ["cpu"] and place["layers"] == ["cpu", "disk"] * 3
    assert {"model.embed_tokens", "model.layers.1", "lm_head"} <= set(place["offloaded"])
    assert any("transfers" in reason for reason in record["suspicious"])
    assert len(record["prefill"]["arms"]) == 4
    ids, pruner = tokens(1, 64), PromptPruner(Recency(), SCHEDULE)
    with torch.inference_mode():
        here, there = (pruned_read(one, ids, pruner)().logits for one in (build(), model))
    torch.testing.assert_close(there, here)  # mapped weights lie otherwise in memory: other sums on some processors
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="cannot be offloaded"):
        _validate(tmp_path, PrefillMemory(Recency(), SCHEDULE, start=64, limit_gb=0.25), model)


def test_positions_that_the_model_does_not_have_are_left_out(tmp_path):
    model = build("gpt2", n_positions=100)
    record, _ = _validate(tmp_path, PrefillTiming(Recency(), SCHEDULE, lengths=[64, 128], repeats=1, warmup=0), model)
    assert record["prefill"]["skipped"] == {"128": "the model has only 100 positions"}


@pytest.mark.parametrize("callback", [PrefillTiming, PrefillMemory])
def test_without_scorer_or_on_several_ranks_there_is_nothing_to_measure(callback, tmp_path):
    with pytest.raises(ValueError, match="give scorer and schedule"):
        _validate(tmp_path, callback())
    trainer = SimpleNamespace(world_size=2, state=SimpleNamespace(fn="validate"))
    with pytest.raises(ValueError, match="one process, not 2"):
        callback(Recency(), SCHEDULE).on_validation_end(trainer, None)


@pytest.mark.parametrize("bad", [{"lengths": []}, {"lengths": [1]}, {"repeats": 0}, {"warmup": -1}])
def test_bad_timing_arguments_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        PrefillTiming(**bad)


def test_another_kernel_in_one_arm_is_an_error(tmp_path):
    class Eager(Recency):
        def score(self, hidden_BNH, layer, context):
            context.anatomy.decoder.config._attn_implementation = "eager"
            return super().score(hidden_BNH, layer, context)

    with pytest.raises(RuntimeError, match="different attention kernels"):
        _validate(tmp_path, PrefillTiming(Eager(), SCHEDULE, lengths=[64], repeats=1, warmup=0))


@pytest.fixture
def forked(monkeypatch):
    """Children are forked from a process that has all imports, and given the same as if they were spawned."""
    monkeypatch.setattr(prefill_memory, "multiprocessing", SimpleNamespace(get_context=lambda _: FORKED))


def test_memory_search_finds_longer_prompts_with_pruning_and_survives(tmp_path, capsys, forked):
    # eager attention holds the square of the prompt: 4 heads × 4 bytes × n², several times over
    callback = PrefillMemory(Recency(), SCHEDULE, start=64, longest=65536, resolution=512, limit_gb=0.25)
    early = Schedule(layers=[0], keep=0.2)
    callback.schedule = early
    record, _ = _validate(tmp_path, callback, build(kernel="eager", max_position_embeddings=65536))
    block = record["prefill_memory"]
    base, pruned = block["arms"]
    assert 64 <= base["longest"] < 65536 and block["limit_bytes"] == 250_000_000
    assert pruned["longest"] >= base["longest"] - 512
    for arm in (base, pruned):
        fitting = [probe["length"] for probe in arm["probes"] if probe["fits"]]
        assert arm["longest"] == max(fitting) and all(p["peak_bytes"] for p in arm["probes"] if p["fits"])
        assert any(not probe["fits"] and probe["peak_bytes"] is None for probe in arm["probes"])
    assert "Longest prompt within 0.25 GB" in capsys.readouterr().out


def test_a_child_that_dies_counts_as_too_long_and_is_replaced(forked):
    probe = _Cpu(build(), PromptPruner(Recency(), SCHEDULE), 1 << 30)
    try:
        assert probe.peak(64)
        probe.child.kill()
        probe.child.join()
        assert probe.peak(64) is None and probe.peak(64)
    finally:
        probe.close()


def test_a_limit_above_the_free_memory_is_refused(tmp_path):
    with pytest.raises(ValueError, match="that are free"):
        _validate(tmp_path, PrefillMemory(Recency(), SCHEDULE, limit_gb=1e6))
    for bad in ({"start": 1}, {"longest": 5}, {"resolution": 0}, {"limit_gb": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            PrefillMemory(**bad)


class _Letters:
    def decode(self, ids, **_):
        return chr(97 + ids[0] % 26)


@torch.no_grad()
def test_survival_says_where_every_token_went():
    model, ids = build(), tokens(1, 100)
    with PromptPruner(Recency(), SCHEDULE).prefill(model) as run:
        model(ids)
    fields = survival(run, _Letters())
    assert fields["layers"] == [1, 3] and len(fields["tokens"]) == 100
    # recency keeps 4 sinks, the last 32, and before them half and then a quarter of the 64 that may go
    assert fields["dropped_at"] == [None] * 4 + [0] * 32 + [1] * 16 + [None] * 48
    out = io.StringIO()
    show(fields, Console(file=out, width=200))
    first = "".join(fields["tokens"][:4]) + f"[0:{fields['tokens'][4]}]"
    assert out.getvalue().startswith(first) and "52 of 100 tokens stayed" in out.getvalue()
    assert "stage 1, after layer 3: 16 tokens dropped" in out.getvalue()
