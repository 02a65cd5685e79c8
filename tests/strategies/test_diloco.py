"""Local training: what meetings do, against an outer optimizer of torch's, and that nothing is lost when it stops."""

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from strategies import CompressedDiLoCo
from strategies.compressors.bidirectional import Bidirectional
from strategies.compressors.dgc import DGC
from strategies.compressors.error_feedback import ErrorFeedback
from strategies.compressors.int4 import Int4
from strategies.compressors.int8 import Int8
from strategies.compressors.warmup import WarmUp
from strategies.outer import Meetings, _cut, _fill
from tests.ranks import Ranks
from tests.strategies.engines import Module, rows

STREAMING = {"num_fragments": 2, "fragment_sync_delay": 1, "fragment_update_alpha": 0.25}
CODED = Bidirectional(ErrorFeedback(Int4(16)), Int8(16))


class Local(Module):
    """AdamW, so that replicas have states of their own; keeps its weights after every local step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, torch.Tensor]] = []
        self.validated: list[dict[str, torch.Tensor]] = []

    def training_step(self, batch, batch_idx):
        # every replica has its own data, by step: where a resumed loader begins is the data's business
        return super().training_step([_batch(self.global_rank, self.trainer.global_step)], batch_idx)

    def on_before_optimizer_step(self, optimizer):
        self.norms.append(self.trainer.strategy.grad_norm().item())

    def on_train_batch_end(self, *_):
        self.seen.append(_copy(self))

    def validation_step(self, batch, batch_idx):
        self.validated.append(_copy(self))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


def _batch(rank, step):
    return rows(10 * rank + step % 4)[:4]


def _copy(module):
    return {name: p.detach().clone() for name, p in module.net.named_parameters()}


class Interrupted(RuntimeError):
    """The run is over."""


class StopAfter(L.Callback):
    """Saves a checkpoint after a step, as a run that is killed later would have."""

    def __init__(self, step, path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise Interrupted


def local(compressor=None, steps=8, save=None, ckpt_path=None, val_every=None, precision="32-true", **options):
    """Train on this rank; ``save=(step, path)`` is where it is interrupted."""
    module = Local()
    strategy = CompressedDiLoCo(compressor, **{"sync_every": 4, "bucket_cap_mb": 1, **options})
    trainer = L.Trainer(
        accelerator="cpu",
        devices=torch.distributed.get_world_size(),
        strategy=strategy,
        max_steps=steps,
        precision=precision,
        val_check_interval=val_every,
        check_val_every_n_epoch=None if val_every else 1,
        limit_val_batches=1 if val_every else 0,
        num_sanity_val_steps=0,
        callbacks=[StopAfter(*save)] if save else [],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
    )
    loader = DataLoader(TensorDataset(torch.zeros(16, 5)), batch_size=4)
    try:
        trainer.fit(module, loader, loader if val_every else None, ckpt_path=ckpt_path)
    except Interrupted:
        return None
    outer = strategy.outer
    return {
        "seen": module.seen,
        "validated": module.validated,
        "weights": _copy(module),
        "losses": module.losses,
        "adam": [s["exp_avg"].clone() for s in trainer.optimizers[0].state.values()],
        "velocity": [piece.velocity.clone() for piece in outer._pieces()],
        "state": {u.name: {name: part.clone() for name, part in u.state.items()} for u in outer.units},
        "traffic": strategy.traffic.take(),
    }


def _equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def _flat(weights):
    return torch.cat([weight.flatten() for weight in weights.values()])


def _by_hand(every, steps, lr, momentum):
    """DiLoCo in one process: torch's own optimizers inside and outside."""
    replicas, common = [Local() for _ in range(2)], Local()
    inner = [module.configure_optimizers() for module in replicas]
    outer = torch.optim.SGD(common.parameters(), lr, momentum=momentum, nesterov=momentum > 0)
    for step in range(steps):
        for rank, (module, optimizer) in enumerate(zip(replicas, inner, strict=True)):
            optimizer.zero_grad()
            module.net(_batch(rank, step)).pow(2).mean().backward()
            optimizer.step()
        if (step + 1) % every == 0 or step + 1 == steps:
            for p, *own in zip(common.parameters(), *(module.parameters() for module in replicas), strict=True):
                p.grad = p.detach() - torch.stack([q.detach() for q in own]).mean(0)
            outer.step()
            for module in replicas:
                module.load_state_dict(common.state_dict())
    return _copy(common)


@pytest.mark.parametrize(("every", "steps", "momentum"), [(4, 8, 0.9), (3, 8, 0.9), (1, 5, 0.0)])
def test_it_is_diloco_as_torchs_own_optimizers_have_it(every, steps, momentum, two_ranks):
    wanted = _by_hand(every, steps, 0.7, momentum)
    results = two_ranks.run(local, steps=steps, sync_every=every, outer_momentum=momentum)
    for result in results:
        torch.testing.assert_close(_flat(result["weights"]), _flat(wanted), rtol=1e-5, atol=1e-7)
    assert _equal(results[0]["weights"], results[1]["weights"])


def test_replicas_part_within_a_round_and_agree_after_it(two_ranks):
    first, second = two_ranks.run(local, CODED)
    agreed = [_equal(one, other) for one, other in zip(first["seen"], second["seen"], strict=True)]
    assert agreed == [False, False, False, True] * 2
    assert any(not torch.equal(a, b) for a, b in zip(first["adam"], second["adam"], strict=True))


def test_fragments_meet_in_turn_and_arrive_late(two_ranks):
    first, second = two_ranks.run(local, steps=9, **(STREAMING | {"fragment_update_alpha": 0.0}))
    names = [name for name, weight in first["seen"][0].items() if not torch.equal(weight, second["seen"][0][name])]
    agreed = [
        [name for name in names if torch.equal(one[name], other[name])]
        for one, other in zip(first["seen"], second["seen"], strict=True)
    ]
    half = agreed[4]  # sent after step 4, taken up after 5
    assert 0 < len(half) < len(names) and agreed[2] == [name for name in names if name not in half]
    assert [bool(some) for some in agreed] == [False, False, True, False, True, False, True, False, True]
    assert agreed[8] == names  # the last step: all of them


@pytest.mark.parametrize("options", [{}, STREAMING], ids=["whole", "streaming"])
def test_coded_meetings_are_close_to_exact_ones(options, two_ranks):
    exact, coded = (two_ranks.run(local, method, **options) for method in (None, CODED))
    moved = _flat(exact[0]["weights"]) - _flat(_copy(Local()))
    error = _flat(coded[0]["weights"]) - _flat(exact[0]["weights"])
    assert 0 < error.norm() < 0.2 * moved.norm()
    for results in (exact, coded):
        assert _equal(results[0]["weights"], results[1]["weights"])


@pytest.mark.parametrize("step", [3, 4, 5, 6])
@pytest.mark.parametrize("options", [{}, STREAMING], ids=["whole", "streaming"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(options, step, two_ranks, tmp_path):
    path = str(tmp_path / "last.ckpt")
    whole = two_ranks.run(local, CODED, **options)
    two_ranks.run(local, CODED, save=(step, path), **options)
    for rank, resumed in enumerate(two_ranks.run(local, CODED, ckpt_path=path, **options)):
        for one, other in zip(whole[rank]["seen"][step:], resumed["seen"], strict=True):
            assert _equal(one, other)
        assert resumed["losses"] == whole[rank]["losses"][step:]
        for part in ("adam", "velocity"):
            assert all(torch.equal(a, b) for a, b in zip(whole[rank][part], resumed[part], strict=True))
        for unit, state in whole[rank]["state"].items():
            assert state["residual"].any() and torch.equal(state["residual"], resumed["state"][unit]["residual"])


def test_common_weights_survive_a_dtype_that_cannot_hold_them(two_ranks, tmp_path):
    path, options = str(tmp_path / "last.ckpt"), {"precision": "bf16-true"}
    whole = two_ranks.run(local, CODED, **options)
    two_ranks.run(local, CODED, save=(6, path), **options)
    for rank, resumed in enumerate(two_ranks.run(local, CODED, ckpt_path=path, **options)):
        assert _equal(whole[rank]["weights"], resumed["weights"])
        assert next(iter(resumed["weights"].values())).dtype == torch.bfloat16


def test_validation_and_checkpoints_hold_what_all_agree_on(two_ranks, tmp_path):
    path = str(tmp_path / "last.ckpt")
    results = two_ranks.run(local, CODED, val_every=2)
    for result in results:
        second, fourth, *_ = result["validated"]
        assert _equal(second, _copy(Local())) and _equal(fourth, result["seen"][3])
        assert not _equal(second, result["seen"][1])
    undisturbed = two_ranks.run(local, CODED)
    assert all(_equal(a["weights"], b["weights"]) for a, b in zip(results, undisturbed, strict=True))
    two_ranks.run(local, CODED, save=(6, path))
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(saved[f"net.{name}"], weight) for name, weight in undisturbed[0]["seen"][3].items())


def _three_go_on(path, **options):
    try:
        return local(CODED, ckpt_path=path, **options)["weights"]
    except ValueError as error:
        return str(error)


def test_another_number_of_replicas_goes_on_where_all_agree_and_is_refused_elsewhere(two_ranks, three_ranks, tmp_path):
    paths = {step: str(tmp_path / f"{step}.ckpt") for step in (4, 6)}
    for step, path in paths.items():
        two_ranks.run(local, CODED, save=(step, path))
    for message in three_ranks.run(_three_go_on, paths[6]):
        assert "saved by 2 replicas in the middle of a round" in message and paths[6] in message
    first, *others = three_ranks.run(_three_go_on, paths[4])
    assert all(_equal(first, other) for other in others)


@pytest.mark.parametrize(
    ("options", "fix"), [({"sync_every": 5}, "sync_every=4"), (STREAMING, "num_fragments")], ids=["round", "parts"]
)
def test_a_checkpoint_of_other_meetings_is_refused_by_name(options, fix, two_ranks, tmp_path):
    path = str(tmp_path / "last.ckpt")
    two_ranks.run(local, CODED, save=(6, path))
    assert all(fix in message and path in message for message in two_ranks.run(_three_go_on, path, **options))


def _bytes(method, **options):
    traffic = local(method, **options)["traffic"]
    return traffic.gradient_bytes(), sum(traffic.ideal.values()), dict(traffic.calls)


@pytest.mark.parametrize("options", [{}, STREAMING], ids=["whole", "streaming"])
def test_bytes_are_those_of_the_meetings_against_a_reduction_in_every_step(options, two_ranks):
    numel = sum(p.numel() for p in Local().parameters())
    # of the whole model after 4 and 8 steps; or of its halves after 2, 4, 6 and 8, and of what has been trained since
    models = 2 if not options else 2 * 2 * 0.5 + 1
    for sent, ideal, _ in two_ranks.run(_bytes, None, **options):
        assert ideal == 8 * 2 * 4 * numel / 2
        assert sent == pytest.approx(models * 2 * 4 * numel / 2, rel=0.2 if options else 0)  # halves are not quite
    fp32, coded = (two_ranks.run(_bytes, method, **options)[0][0] for method in (None, Bidirectional(Int8(64))))
    assert coded < 0.35 * fp32


class Diverging(Local):
    def on_before_optimizer_step(self, optimizer):
        if self.global_rank == 1:
            for p in self.parameters():
                p.data.fill_(torch.nan)


def _diverged():
    from tests.strategies import test_diloco

    kept, test_diloco.Local = test_diloco.Local, Diverging
    try:
        test_diloco.local(CODED)
    except FloatingPointError as error:
        return str(error)
    finally:
        test_diloco.Local = kept


def test_a_replica_that_diverged_stops_all_of_them(two_ranks):
    for message in two_ranks.run(_diverged):
        assert "not finite after local step 4" in message


class Leaving(Local):
    def on_train_batch_start(self, *_):
        if self.global_rank == 1 and self.trainer.global_step == 2:
            import os

            os._exit(1)


def _left_alone():
    from tests.strategies import test_diloco

    test_diloco.Local = Leaving
    try:
        test_diloco.local(CODED)
    except RuntimeError as error:
        return str(error)


def test_a_replica_that_leaves_is_an_error_with_the_way_on():
    ranks = Ranks(2)
    try:
        (message,) = ranks.end(ranks.start(_left_alone)[:1])
    finally:
        ranks.close()
    assert "a replica has left" in message and "--ckpt_path last" in message


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sync_every": 0}, "sync_every"),
        ({"num_fragments": 9, "sync_every": 8}, "num_fragments"),
        ({"fragment_sync_delay": 64}, "fragment_sync_delay"),
        ({"fragment_update_alpha": 1.0}, "fragment_update_alpha"),
        ({"outer_lr": 0}, "outer_lr"),
        ({"outer_momentum": 1.0}, "outer_momentum"),
        ({"compressor": WarmUp(DGC())}, "every step"),
    ],
)
def test_what_cannot_work_is_refused_by_name(options, named):
    with pytest.raises(ValueError, match=named):
        CompressedDiLoCo(**options)


def test_parts_meet_once_a_round_at_steps_of_their_own():
    meetings = Meetings(every=6, fragments=3)
    due = [[f for f in range(3) if meetings.due(f, step)] for step in range(13)]
    assert due == [[], [], [1], [], [2], [], [0], [], [1], [], [2], [], [0]]


def test_parts_are_cut_about_evenly_and_units_are_bounded():
    named = [(str(i), torch.empty(n)) for i, n in enumerate([80, 5, 5, 5, 5, 40])]

    def names(groups):
        return ["".join(name for name, _ in group) for group in groups]

    assert names(_cut(named, 1)) == ["012345"] and names(_cut(named, 2)) == ["0", "12345"]
    assert names(_cut(named, 3)) == ["0", "1234", "5"] and names(_cut(named[:2], 3)) == ["0", "1"]
    assert names(_fill(named, 12)) == ["0", "12", "34", "5"]
