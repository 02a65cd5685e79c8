"""What the report computes, apart from drawing it."""

import math
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from bench import report
from bench.report import drawing, export, groups, values
from bench.report.content import Chart
from bench.report.evidence import sort
from bench.report.features import tokens
from bench.report.link import link_label
from bench.report.palette import HUES, Colours
from bench.report.sections import breakdown, curves, prefill, quality, rates, scaling, tiers
from common.tables import Table
from tests.bench import report_records as synthetic
from tests.conftest import ROOT


def run(method="none", **fields):
    return {"run_name": "r", "compress_method": method, "world_size": 2, "seed": 1, **fields}


def test_mean_and_sample_deviation_rounded_to_the_deviation():
    spread = values.spread([1.0, 2.0, 3.0, None])
    assert (spread.mean, spread.sd, spread.n) == (2.0, 1.0, 3)
    assert str(values.Spread(150.7839, 0.3012, 3)) == "150.78 ± 0.30"
    assert str(values.Spread(37_607.4, 32.2, 3)) == "37,607 ± 32"
    assert str(values.Spread(37_607.4, 1234.0, 3)) == "37,600 ± 1,200"
    assert str(values.Spread(2.0, 0.0, 3)) == "2" and str(values.Spread(math.inf, None, 1)) == "inf"
    assert values.spread([None]) is None


def test_a_ratio_carries_both_errors_and_needs_both_sides():
    found = values.ratio(values.Spread(10.0, 0.3, 3), values.Spread(5.0, 0.2, 3))
    assert found.mean == 2.0 and found.sd == pytest.approx(2.0 * math.hypot(0.03, 0.04))
    assert values.ratio(None, values.Spread(1.0, None, 1)) is None
    assert values.ratio(values.Spread(1.0, None, 1), values.Spread(0.0, None, 1)) is None


def test_a_sum_with_a_part_missing_is_missing():
    assert values.total([1.0, 2.0]) == 3.0 and values.total([1.0, None]) is None


def test_seeds_are_grouped_and_settings_kept_apart():
    records = [run(seed=s, link_rate=link, step_time_ms_p50=100.0 * s) for link in ("1gbit", "10gbit") for s in (1, 2)]
    found = groups.group(records)
    assert [(g.setting["link"], g.seeds, g.step_ms.mean) for g in found] == [
        ("1 Gbit/s", 2, 150),
        ("10 Gbit/s", 2, 150),
    ]


def test_arguments_appear_in_a_name_only_where_they_differ():
    records = [run("topk", compress_config={"density": d, "values": {"bits": 8}}) for d in (0.01, 0.1)]
    records += [run("int8", compress_config={"block": 256}, parameter_compress_method="int8"), run("none")]
    names = groups.method_labels(records)
    assert names == ["topk density=0.01", "topk density=0.1", "int8 + int8 parameters", "none"]


def test_speed_up_is_against_the_uncompressed_run_of_the_same_setting():
    times = (("int8", "1gbit", 50.0), ("none", "1gbit", 100.0), ("int8", "10gbit", 45.0), ("none", "10gbit", 40.0))
    records = [run(method, link_rate=link, step_time_ms_p50=ms) for method, link, ms in times]
    panels = groups.panels(groups.group(records))
    assert [p.groups[0].method for p in panels] == ["none", "none"]
    assert [p.speedup(p.groups[1]).mean for p in panels] == [2.0, pytest.approx(8 / 9)]
    lonely = groups.panels(groups.group(records[:1]))[0]
    assert lonely.baseline is None and lonely.speedup(lonely.groups[0]) is None


def test_a_modelled_link_gives_modelled_times_and_says_so():
    record = run(link_rate="1gbit", link_emulated=False, step_time_ms_p50=1.0, step_time_ms_modelled=9.0)
    assert link_label(record) == "1 Gbit/s (modelled)" and groups.group([record])[0].step_ms.mean == 9.0
    assert breakdown.phases({**record, "step_time_ms_mean": 1.0, "steps_measured": 1, "compress_time_ms": 0,
                             "comm_time_ms_total": 0, "decompress_time_ms": 0}) is None  # fmt: skip
    assert link_label(run()) == "not recorded" and link_label(run(link_rate=None)) == "none"
    assert link_label({"world_size": 1}) == "none"


def test_phases_add_up_to_the_step_and_need_every_part():
    record = run(
        step_time_ms_mean=100.0, steps_measured=2, compress_time_ms=20, comm_time_ms_total=100, decompress_time_ms=10
    )
    assert breakdown.phases(record) == {"compute": 35.0, "encode": 10.0, "wire": 50.0, "decode": 5.0}
    assert breakdown.phases({**record, "decompress_time_ms": None}) is None


def test_the_front_holds_what_nothing_beats():
    points = [
        quality.Point(name, values.Spread(cost, None, 1), values.Spread(ppl, None, 1))
        for name, cost, ppl in (("a", 1, 30), ("b", 2, 20), ("c", 3, 25), ("d", 4, 10), ("e", 4, 11), ("f", 5, 10))
    ]
    assert [p.group for p in quality.pareto(points)] == ["a", "b", "d"]


def test_break_even_lies_between_measured_rates():
    assert rates.break_even([1e8, 1e10], [1.5, 0.5]) == pytest.approx(1e9)
    assert rates.break_even([1e8, 1e9], [3.0, 1.2]) is None and rates.break_even([1e8, 1e9], [0.9, 0.5]) is None


def test_scaling_starts_every_link_at_the_single_rank():
    records = [run(world_size=1, tokens_per_s=100.0)]
    records += [run(world_size=n, link_rate="1gbit", tokens_per_s=t) for n, t in ((2, 150.0), (4, 240.0))]
    (line,) = scaling.lines(groups.group(records))
    assert [ranks for ranks, _ in line.points] == [1, 2, 4]
    assert [line.efficiency(i).mean for i in range(3)] == [1.0, 0.75, 0.6]


def test_curves_average_only_steps_that_all_seeds_have():
    def curve(*points):
        return {"val_curve": [{"step": s, "train_s": t, "val_ppl": p} for s, t, p in points]}

    found = curves.curve([curve((1, 1.0, 30.0), (2, 2.0, 20.0)), curve((1, 3.0, 32.0)), {"val_curve": "broken"}])
    assert [(p.step, p.seconds.mean, p.ppl.mean) for p in found] == [(1, 2.0, 31.0)]


def test_colours_are_stable_and_distinct():
    names = [f"method {i}" for i in range(len(HUES))]
    colours = Colours([*names, "none"])
    assert len({colours.colour(name) for name in names}) == len(HUES)
    assert colours.colour("none") not in HUES
    more = Colours([*names, "another", "none"])
    looks = {(more.colour(name), more.marker(name)) for name in [*names, "another"]}
    assert len(looks) == len(HUES) + 1
    assert Colours(["int8"]).colour("int8") == Colours(["int8", "none"]).colour("int8")


def test_exported_numbers_keep_their_precision():
    table = Table(["method", "PPL"], [["a", values.Spread(1.23456789, 0.5, 3)], ["b", None]])
    assert export.plain(table) == [
        ["method", "PPL mean", "PPL sd", "PPL n"],
        ["a", 1.23456789, 0.5, 3],
        ["b", "", "", ""],
    ]


def test_tier_maps_must_have_a_digit_a_block():
    found = tiers.parse(synthetic.TIERS)
    assert len(found.maps) == 3 and len(found.counts) == 4
    assert found.counts[3] == ("layers.3.mlp.down_proj", (200, 300, 188))
    assert all(sum(counts) == 16 * 43 for _, counts in found.counts)
    with pytest.raises(ValueError, match="w must have 2 × 2 blocks, not 1 \\+ 1 \\+ 1"):
        tiers.parse({"matrices": [{"name": "w", "rows": 2, "columns": 2, "dense": 1, "mid_2_4": 1, "topk": 1}]})
    for wrong in ({"map": "01"}, {"map": "0123"}):
        with pytest.raises(ValueError, match="must be 2 × 2 digits"):
            tiers.parse({"matrices": [{"name": "w", "rows": 2, "columns": 2, **wrong}]})


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ({"1024": {"pruned": {"ms_median": 1.0}}}, "arms"),
        ({"arms": [{"arm": "pruned", "ms_median": 1.0}]}, "length"),
        ({"arms": [{"arm": "pruned", "length": "1024", "ms_median": 1.0}]}, "'1024'"),
        ({"arms": [{"arm": "pruned", "length": 1024, "ms_median": None}]}, "ms_median None"),
        ({"arms": [], "skipped": {"8192": "too long"}}, "8192 too long"),
    ],
)
def test_prefill_measurements_have_one_shape(block, reason):
    with pytest.raises((KeyError, ValueError), match=reason):
        prefill.parse(block)


def test_presets_are_arms_that_prune():
    arms = [{**row, "arm": name} for row in synthetic.PREFILL["arms"] for name in _presets(row["arm"])]
    for block in ({"arms": arms}, {"arms": arms, "schedules": {"keep09": {}, "keep07": {}}}):
        evidence = sort([{**synthetic.template(), "prefill": block}])
        table, _ = prefill.section(evidence).blocks
        assert [row[1:5] for row in table.table.rows] == [
            ["keep09", 8192, 8192.0, 8192 / 2.3],
            ["keep07", 8192, 8192.0, 8192 / 2.3],
        ]
        assert table.verdict == "At best 2.30 × as fast, at 1,024 tokens, bound 2.46 ×."
        assert {speed.what.partition(" (")[0] for speed in tokens.FEATURE.speeds(evidence)} >= {
            "reading 1,024 tokens with keep09"
        }
        assert len(tokens.FEATURE.speeds(evidence)) == 8


def _presets(arm):
    return ("keep09", "keep07") if arm == "pruned" else (arm,)


def test_links_of_two_kinds_make_no_line():
    ways = [("1gbit", None, True), ("10gbit", None, True), ("100mbit", "1ms", True), ("10mbit", None, False)]
    times = {"step_time_ms_p50": 100.0, "step_time_ms_modelled": 100.0}
    runs = [run(method, link_rate=rate, link_delay=delay, link_emulated=there, **times)
            for rate, delay, there in ways for method in ("none", "int8")]  # fmt: skip
    (line,) = rates._lines(groups.group(runs)).values()
    assert [rate for rate, *_ in line] == [1e9, 1e10]
    slow = [{**one, "link_rate": "100mbit"} for one in runs if not one["link_emulated"]]
    assert {where for where, _ in rates._lines(groups.group([*runs, *slow]))} == {"", "modelled"}


def test_quantities_have_the_prefix_of_what_is_shown():
    assert values.quantity(999_700_000, "bit/s") == "1 Gbit/s" and values.quantity(999.4, "B") == "999 B"
    assert values.quantity(999.7, "B") == "1 kB" and values.quantity(1_234_000, "") == "1.23 M"


def test_no_time_of_a_run_whose_link_was_not_there_is_shown():
    points = [{"step": step, "train_s": step, "val_ppl": 30.0} for step in (1, 2)]
    runs = [run(seed=1, link_rate="1gbit", link_emulated=there, val_curve=points, target_ppl=30.0,
                time_to_target_ppl_s=1.0, val_ppl=30.0) for there in (True, False)]  # fmt: skip
    both, modelled = (curves.section(sort(some)).blocks for some in (runs, runs[1:]))
    assert [block.name for block in both] == ["ppl-by-step", "ppl-by-time", "time-to-quality"]
    assert len(both[1].data.rows) == 2 and len(both[2].table.rows) == 1
    assert [block.name for block in modelled] == ["ppl-by-step"]


def test_bounds_and_suspicions_reach_the_report():
    times = {"step_time_ms_p50": 100.0, "comm_time_ms_total": 10.0, "compress_time_ms": 0.0, "decompress_time_ms": 0.0}
    sent = {"bytes_compressed_total": 125_000_000, "bytes_parameters_total": 0}
    fast = run(link_rate="1gbit", steps_measured=1, **times, **sent)
    (record,) = sort([fast]).runs
    assert (
        record["bound_step_time_ms"] == pytest.approx(1090.0)
        and "bytes alone take 1000.0 ms" in record["suspicious"][0]
    )
    found = sort([{**fast, "link_rate": "slow"}, fast])
    assert [record.get("bound_step_time_ms") for record in found.runs] == [None, pytest.approx(1090.0)]
    assert found.problems == ["1 run without bounds: no rate in link_rate slow"]


@pytest.mark.parametrize("lying", [False, True])
def test_bars_as_one_path_stand_where_matplotlibs_own_do(lying):
    ours, theirs = Figure().subplots(1, 2)
    drawing.bars(ours, [0, 1, 2], [3.0, math.nan, 2.0], drawing.TEXT, [1.0, 0.0, 0.0], 0.6, lying=lying)
    (theirs.barh if lying else theirs.bar)([0, 2], [3.0, 2.0], 0.6, [1.0, 0.0])
    assert ours.get_xlim() == theirs.get_xlim() and ours.get_ylim() == theirs.get_ylim()
    (path,) = (patch.get_path().to_polygons() for patch in ours.patches)
    corners = [patch.get_transform().transform_path(patch.get_path()).get_extents() for patch in theirs.patches]
    for box, polygon in zip(corners, path, strict=True):
        lower, upper = theirs.transData.inverted().transform(box.get_points())
        assert polygon.min(0) == pytest.approx(lower) and polygon.max(0) == pytest.approx(upper)


@pytest.mark.parametrize("largest", [2.0, 2e9])
def test_a_title_evades_a_factor_above_the_axis(largest):
    def draw(figure):
        axes = figure.subplots()
        axes.plot([0, 1], [0, largest])
        drawing.heading(axes, "the title")

    figure = drawing.render(Chart("c", "C", "", "", draw, Table([], [])))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (axes,), (title,) = figure.axes, figure.findobj(lambda one: isinstance(one, Text) and one.get_text() == "the title")
    factor = axes.yaxis.get_offset_text()
    assert bool(factor.get_text()) == (largest > 1e6)
    if factor.get_text():
        assert not title.get_window_extent().overlaps(factor.get_window_extent())


def test_runs_that_differ_in_more_than_the_seed_stay_apart():
    base = synthetic.template()
    ways = [{}, {"backward_within": 2}, {"parameter_differences": True}]
    found = groups.group([base | way | {"seed": seed} for way in ways for seed in (1, 2)])
    assert [len(one.records) for one in found] == [2, 2, 2] and len({one.method for one in found}) == 3
    rates = [base | {"config": f"model:\n  init_args:\n    learning_rate: {rate}\n"} for rate in ("1.0e-3", "0.002")]
    assert [one.setting["learning rate"] for one in groups.group(rates)] == ["0.001", "0.002"]


def test_what_decides_a_result_keeps_runs_apart():
    base = synthetic.template()
    ways = [{}, {"ranks_per_host": 2}, {"val_stride": 64}, {"link_rate": "1gbit"}]
    ways += [{"config": "trainer:\n  num_nodes: 2\n"}]
    assert [len(one.records) for one in groups.group([base | way for way in ways])] == [1] * len(ways)
    assert link_label({"world_size": 2, "config": "trainer:\n  num_nodes: '2'\n"}) == "between 2 machines"
    assert link_label({"world_size": 2, "config": "trainer:\n  num_nodes: 1\n"}) == "none"


def test_recorded_runs_of_one_machine_and_of_two_hosts_are_no_seeds():
    found = report.read(Path(ROOT) / "docs/results/records/profile.jsonl")[0].groups
    assert sorted(run["run_name"] for one in found for run in one.records) == [
        "profile_1_rank",
        "profile_2_hosts_1gbit",
        "profile_2_ranks",
    ]
    assert len(found) == 3


def test_runs_of_other_features_are_no_training_compared():
    trained = run(val_ppl=30.0)
    other = [{**trained, name: {}} for name in ("structure", "tiers", "recovery", "ladder", "calibration")]
    other += [{**trained, "token_quality": []}, {**trained, "compress_method": None}]
    (found,) = sort([trained, *other]).groups
    assert len(found.records) == 1


def test_no_line_of_scaling_is_made_of_runs_whose_link_was_not_there():
    base = synthetic.template()
    runs = [base | {"world_size": ranks, "link_rate": "1gbit", "link_emulated": False} for ranks in (2, 4)]
    assert scaling.lines(groups.group(runs)) == []
