"""How the report writes tables and verdicts, apart from the page: what readers found wrong once, as kinds."""

import math

import pytest

from bench.report import build, columns, drawing, page, palette
from bench.report.content import LONG, Sheet
from bench.report.drawing import label
from bench.report.evidence import sort
from bench.report.features import blocks, gradients, structure, tokens
from bench.report.features.base import Case, Point, Speed, verdict
from bench.report.groups import UNCOMPRESSED
from bench.report.provenance import ranges
from bench.report.sections import breakdown, comparison, frontier
from bench.report.values import Spread
from common.tables import NOT_RECORDED, Table
from tests.bench import report_records as synthetic


def figure(name, value, experiment, what="w", **fields):
    command = f"python -m bench experiment {experiment} --records x.jsonl"
    made = {"kind": "figure", "figure": name, "what": what, "value": value, "unit": "×", "target": "report",
            "reached": None, "spread": None, "command": command, "details": {}}  # fmt: skip
    return {**made, **fields}


def test_numbers_of_a_column_share_their_decimals_and_stand_right():
    table = Table(["what", "ms", "n"], [["a", 3693.4, 1], ["b", Spread(0.52, 0.031, 3), 12], ["c", None, 3]])
    what, ms, n = columns.written(table)
    assert [cell.text for cell in ms.cells] == ["3,693.4", "0.5", NOT_RECORDED] and ms.numeric and not what.numeric
    assert [cell.text for cell in n.cells] == ["1", "12", "3"]
    assert " class=n>ms</th>" in page.table(table, "t") and '<td class="missing n">' in page.table(table, "t")
    assert columns.decimals([1e-9, 2e-9]) is None and columns.decimals([math.inf]) == 0
    assert (
        columns.number(1e-7, 2) == "< 0.01" and columns.number(-1e-7, 2) == "> -0.01" and columns.number(0, 2) == "0.00"
    )


def test_decimals_are_shared_by_the_rows_of_one_unit():
    table = Table(["what", "measured", "unit"], [["a", 0.123, "s"], ["b", 12_000.5, "MB"], ["c", 0.4, "s"]])
    assert [cell.text for cell in columns.written(table, "unit")[1].cells] == ["0.123", "12,000", "0.400"]


def test_columns_of_nothing_are_left_out_and_named():
    table = Table(["what", "a", "b", "c"], [["x", None, "", 1], ["y", NOT_RECORDED, "", 2]])
    kept, missing = columns.shown(table)
    assert list(kept.headers) == ["what", "c"] and missing == ["a"]
    assert "Not recorded in any row: a." in page.scrolled(table, "t")


def test_a_long_table_needs_a_verdict():
    rows = [[str(i), i] for i in range(LONG + 1)]
    with pytest.raises(ValueError, match="needs a verdict"):
        Sheet("s", "S", Table(["a", "b"], rows))
    assert Sheet("s", "S", Table(["a", "b"], rows), verdict="All is well.").verdict


def test_every_method_is_drawn_and_has_a_colour_of_its_own():
    names = [f"method {i}" for i in range(22)] + ["int8", "int4"]
    colours = palette.Colours([*names, *UNCOMPRESSED])
    assert len({colours.colour(name) for name in names}) == len(names)
    assert len({colours.marker(name) for name in UNCOMPRESSED}) == len(UNCOMPRESSED)
    base = synthetic.varied(12)[-1]  # of two ranks or more would do as well: what counts is that it is timed
    runs = [{**base, "compress_method": f"m{i}"} for i in range(25)]
    evidence = sort(runs)
    chart = breakdown.section(evidence).blocks[0]
    assert len(chart.data.rows) == 25 and not chart.note and chart.size[1] > 25 * 0.26


def test_labels_and_titles_are_wrapped_never_cut():
    words = "gpt2 4.24 M, CompressedFSDP FULL_SHARD, 2 ranks, 100 Mbit/s, 12 steps, another machine with a long name"
    assert label(words, 30).replace("\n", " ") == words and max(map(len, label(words, 30).split("\n"))) <= 30


def test_a_setting_that_was_not_recorded_is_not_told():
    runs = [{**synthetic.template(), "replicas": n, "seed": n or 0, "link_rate": None} for n in (None, 2)]
    labels = [one.where(["replicas", "ranks"]) for one in sort(runs).groups]
    assert labels == ["2 ranks", "2 replicas, 2 ranks"]


def test_the_verdict_is_the_largest_saving_that_keeps_the_quality():
    points = [Point("weak", 1.5, 99.0), Point("good", 2.0, 96.0, records=({},)), Point("bold", 3.0, 60.0),
              Point("random", 2.05, 12.0, control=True), Point("worse", 1.9, 95.5)]  # fmt: skip
    case = Case("model, needles", points)
    said = verdict(tokens.FEATURE, [case], [Speed("reading", "m", 1.9, 2.0), Speed("reading", "m", 9.0, 2.0)])
    assert said.claim == "At 2.0 × prefill 96 % of the answers stay." and "random: 12" in said.detail
    assert "1.90 × as fast (bound 2.00 ×)" in said.speed and "1 measurement above the bound left out" in said.speed
    assert [p.name for p in tokens.FEATURE.front(points)] == ["weak", "good", "bold"]
    counted = verdict(tokens.FEATURE, [Case("m, t", [Point("good", 2.0, 96.0, arithmetic=True)])], [])
    assert counted.claim == "With 2.0 × less arithmetic in prefill 96 % of the answers stay."
    bad = verdict(tokens.FEATURE, [Case("m, t", points[2:4])], [])
    assert bad.claim.startswith("On m, t, no measured way keeps 95 % of the answers: at 3.0 ×")
    assert "No record" in bad.speed
    kept = verdict(tokens.FEATURE, [Case("m, t", points[2:4]), Case("n, t", points[:2])], [])
    assert kept.claim.endswith("60 % of the answers stay; on n, t: at 2.0 × prefill 96 % of the answers stay.")
    assert len(kept.records) == 1


def test_the_speed_that_is_told_is_the_newest_of_its_kind_and_no_luckier_than_its_bound():
    old, new = ({"date": f"2026-01-0{day}"} for day in (1, 2))
    speeds = [
        Speed("a", "m", 2.37, 2.24, (old,)),
        Speed("a", "m", 2.23, 2.24, (new,)),
        Speed("b", "m", 2.3, 2.2, (old,)),
    ]
    assert verdict(tokens.FEATURE, [], speeds).speed.startswith("Measured: 2.23 × as fast (bound 2.24 ×) for a")


def test_records_of_every_experiment_become_points():
    asked = {"model": "m", "task": "needles", "arm": "calibrated-2", "scorer": "calibrated-2", "kept_right": 0.96,
             "kept_right_low": 0.9, "kept_right_high": 0.99, "bound": 2.0}  # fmt: skip
    peers = {"model": "m", "text": "novel", "arm": "pare", "removed": 0.25}
    sparse = {"model": "m", "text": "novel", "arm": "2:4-wanda", "tiers": {"sparsity": 0.5}}
    evidence = sort([
        figure("needles-calibrated-2", 96.0, "token_answers", details=asked),
        figure("pare-25-novel", 1.4, "structured_peers", details=peers),
        figure("2:4-wanda-novel", 2.5, "block_peers", details=sparse),
        figure("quality-int8", 0.3, "method_quality", details={"bits_per_element": 8.0}),
        figure("gain-100mbit", 14.0, "local_steps", details={"network": "100mbit"}),
        figure("step-a-over-b", 2.6, "two_levels", "a step (were nothing sent: 4.18): `a` over `b`"),
    ])  # fmt: skip
    found = {one.name: one.cases(evidence)[0].points[0] for one in (gradients.FEATURE, tokens.FEATURE,
             structure.FEATURE, blocks.FEATURE)}  # fmt: skip
    values = {name: (point.saving, point.quality) for name, point in found.items()}
    assert values == {"gradient_compression": (4.0, 0.3), "token_pruning": (2.0, 96.0),
                      "structured_pruning": (25.0, 1.4), "block_sparsity": (50.0, 2.5)}  # fmt: skip
    local, levels = gradients.FEATURE.speeds(evidence)
    assert (local.value, levels.value, levels.bound) == (14.0, 2.6, 4.18)
    assert levels.what == "a training step, `a` over `b`"


def test_answers_of_a_real_model_are_points_chance_beside_them():
    row = {"model": "m", "task": "needles", "kept_right": 0.96, "bound": 2.0}
    evidence = sort([
        figure("needles-calibrated", 96.0, "real_model", details={**row, "scorer": "calibrated"}),
        figure("needles-random", 30.0, "real_model", details={**row, "scorer": "random", "kept_right": 0.3}),
    ])  # fmt: skip
    (case,) = tokens.FEATURE.cases(evidence)
    assert case.title == "m, needles of real_model"
    assert [(p.name, p.quality, p.control) for p in case.points] == [
        ("calibrated", 96.0, False),
        ("random", 30.0, True),
    ]


def test_schedules_with_a_share_for_every_stage_are_points_and_drawn():
    timed = {"task": "suffix", "nll_rise": 0.1, "accuracy": 0.45, "prefill_ms": 5.0, "prefill_ms_unpruned": 10.0}
    rows = [{**timed, "scorer": "calibrated", "keep": [0.3, 0.1]}, {**timed, "scorer": "tokens", "keep": None}]
    evidence = sort([{**synthetic.template(), "token_quality": [*synthetic.TOKEN_QUALITY, *rows]}])
    (case,) = tokens.FEATURE.cases(evidence)
    assert [(p.name, p.saving, p.quality) for p in case.points[-2:]] == [
        ("calibrated, keep 0.3, 0.1", 2.0, 90.0),
        ("tokens", 2.0, 90.0),
    ]
    assert len(case.points) == 4  # without the unpruned one and the oracle
    chart, table = frontier.section(evidence).blocks
    assert ["suffix", "calibrated", "0.3, 0.1", 0.5, 0.1] in chart.data.rows
    assert [row[3] for row in table.table.rows] == [None, 0.7, 0.5, 0.7, "0.3, 0.1", None]
    drawing.render(chart)


def test_a_budget_in_tokens_is_no_share_and_no_unpruned_model():
    timed = {"task": "suffix", "accuracy": 0.4, "nll_rise": 0.3, "prefill_ms": 5.0, "prefill_ms_unpruned": 10.0}
    rows = [
        {**timed, "scorer": "random", "keep": None, "tokens": 256},
        {**timed, "scorer": "unpruned", "keep": None, "tokens": None, "accuracy": 0.5, "prefill_ms": 10.0},
        {**timed, "scorer": "random", "keep": 0.7, "tokens": None},
        {**timed, "scorer": "random", "keep": [0.7, 0.5], "tokens": None},
    ]
    evidence = sort([{"run_name": "r", "token_quality": rows}])
    (case,) = tokens.FEATURE.cases(evidence)
    found = [(point.name, point.quality) for point in case.points]
    assert found == [("random, 256 tokens", 80.0), ("random, keep 0.7", 80.0), ("random, keep 0.7, 0.5", 80.0)]
    made = frontier.section(evidence)
    assert [row[3] for row in made.blocks[-1].table.rows] == ["256 tokens", None, 0.7, "0.7, 0.5"]
    assert "with random on suffix at 256 tokens" in made.blocks[-1].verdict


def test_what_was_tuned_is_not_compared_with_what_was_not():
    peers = {"model": "m", "text": "novel", "arm": "pare", "removed": 0.25}
    after = {**peers, "when": "after"}
    short, long = ({"recovery": {"steps": steps, "rate": 1e-3}} for steps in (16, 64))
    sparse = {"model": "m", "text": "novel", "tiers": {"sparsity": 0.5}}
    tuned = {**sparse, "arm": "tuned-2:4", "tuned_tokens": 56_320}
    evidence = sort([
        figure("pare-25-novel-before", 1.4, "structured_peers", spread=0.1, details={**peers, "when": "before"}),
        figure("pare-25-novel-after", 1.2, "structured_peers", details={**after, **short}),
        figure("flap-25-novel-after", 1.1, "structured_peers", details={**after, **long, "arm": "flap"}),
        figure("old-25-novel-after", 1.0, "structured_peers", details={**after, "arm": "old"}),
        figure("2:4-novel", 2.5, "block_peers", details={**sparse, "arm": "2:4-magnitude"}),
        figure("tuned-2:4-novel", 1.3, "block_tuning", details=tuned),
        figure("million-2:4-novel", 1.2, "block_million", details={**tuned, "arm": "million-2:4", "tuned_tokens": 1e6}),
    ])  # fmt: skip
    found = {one.title: one.points for feature in (structure, blocks) for one in feature.FEATURE.cases(evidence)}
    assert {title: (point.name, point.quality, point.control) for title, (point,) in found.items()} == {
        "m, novel, nothing trained (structured_peers)": ("pare", 1.4, False),
        "m, novel, nothing trained (block_peers)": ("2:4-magnitude", 2.5, True),
        "m, novel, recovered alike: rate 0.001 and steps 16 (structured_peers)": ("pare", 1.2, False),
        "m, novel, recovered alike: rate 0.001 and steps 64 (structured_peers)": ("flap", 1.1, False),
        "m, novel, recovered (how is not recorded) (structured_peers)": ("old", 1.0, False),
        "m, novel, fine-tuned alike on 56,320 tokens (block_tuning)": ("2:4", 1.3, False),
        "m, novel, fine-tuned alike on 1,000,000 tokens (block_million)": ("2:4", 1.2, False),
    }
    before = structure.FEATURE.cases(evidence)[0].points[0]
    assert (before.saving, before.quality, before.error) == (25.0, 1.4, (0.1, 0.1))


def test_points_of_two_settings_do_not_stand_together():
    of, more = {"model": "m", "text": "novel"}, {"evaluated_tokens": 12_288}
    sparse = {**of, "arm": "2:4", "tiers": {"sparsity": 0.5}}
    right = {"model": "m", "task": "needles", "kept_right": 0.9, "bound": 2.0, "scorer": "last_window"}
    needles = {**right, "arm": "calibrated-2"}
    evidence = sort([
        figure("2:4-novel", 2.5, "block_peers", details={**sparse, **more}),
        figure("3:4-novel", 2.5, "block_peers", details=sparse),
        figure("two-four-novel", 2.4, "real_model", details={**of, "arm": "two-four", "zeros": 50.0}),
        figure("dense-tuned-novel", 1.0, "block_tuning", details={**sparse, "tiers": {"sparsity": 0.0}}),
        figure("pare-25-novel", 1.4, "structured_peers", details={**of, **more, "arm": "pare", "removed": 0.25}),
        figure("structured-25-novel", 1.5, "real_model", details={**of, "arm": "structured-25"}),
        figure("needles-calibrated-2", 90.0, "token_answers", details=needles),
        figure("needles-more-calibrated-2", 90.0, "token_answers", details=needles),
        figure("needles-unseen-calibrated-2", 9.0, "token_answers", details={**needles, "task": "needles, unseen"}),
        figure("needles-calibrated", 90.0, "real_model", details=right),
    ])  # fmt: skip
    titles = [[one.title for one in f.FEATURE.cases(evidence)] for f in (blocks, structure, tokens)]
    assert titles == [
        [f"m, novel, nothing trained ({by})" for by in ("block_peers, 12,288 tokens", "block_peers", "real_model")],
        [f"m, novel, nothing trained ({by})" for by in ("structured_peers, 12,288 tokens", "real_model")],
        [f"m, needles{task}" for task in (" of token_answers", "-more of token_answers",
         ", unseen of token_answers", " of real_model")],
    ]  # fmt: skip


def test_dense_int8_is_no_speed_of_block_sparsity():
    fast = [figure(f"product-{name}-8", value, "block_speed", f"decode: {name} over dense")
            for name, value in (("int8", 3.0), ("packed-int8", 2.0), ("bands", 1.5))]  # fmt: skip
    assert [speed.value for speed in blocks.FEATURE.speeds(sort(fast))] == [2.0, 1.5]


def test_a_modelled_speed_is_told_as_such_and_only_without_a_measured_one():
    modelled, measured = Speed("a", "m", 9.0, modelled=True), Speed("b", "m", 2.0)
    assert verdict(gradients.FEATURE, [], [modelled]).speed == "Modelled: 9.00 × as fast for a."
    assert verdict(gradients.FEATURE, [], [modelled, measured]).speed == "Measured: 2.00 × as fast for b."
    times = {"none": 100.0, "int8": 50.0}
    runs = [{**synthetic.template(), "compress_method": name, "link_rate": "1gbit", "link_emulated": False,
             "step_time_ms_modelled": ms} for name, ms in times.items()]  # fmt: skip
    (speed,) = gradients.FEATURE.speeds(sort(runs))
    assert speed.modelled and speed.value == 2.0


def test_bytes_are_compared_with_the_baseline_of_the_headline():
    sent = {"native": 400, "none": 200, "int8": 100}
    runs = [{**synthetic.template(), "compress_method": name, "bytes_compressed_total": size,
             "bytes_parameters_total": 0, "val_ppl": 30.0} for name, size in sent.items()]  # fmt: skip
    (case,) = gradients.FEATURE.cases(sort(runs))
    assert {point.name: point.saving for point in case.points} == {"native": 0.5, "int8": 2.0}


def test_mere_runs_are_no_verdict_on_blocks():
    run = {**synthetic.template(), "val_ppl": 30.0}
    evidence = sort([run, {**run, "tiers": {**synthetic.TIERS, "sparsity": 0.4}, "val_ppl": 33.0}])
    assert blocks.FEATURE.cases(evidence) == []


def _compared(new, old):
    new.against = old
    return comparison.section(new)


def test_two_files_are_compared_figure_by_figure_and_run_by_run():
    runs = [{**run, "step_time_ms_p50": 100.0} for run in synthetic.varied(36)[33:]]
    old = sort([figure("f", 2.0, "e", reached=True, spread=0.4), figure("gone", 1.0, "e"), *runs])
    faster = ({**run, "step_time_ms_p50": 50.0} for run in runs)
    new = sort([figure("f", 1.0, "e", reached=False, spread=0.5), *faster])
    figures, pairs, only = _compared(new, old).blocks
    assert figures.table.rows[0][5:] == [-50.0, True, "target now missed", ""] and "1 now miss" in figures.verdict
    steps = [row for row in pairs.table.rows if row[1] == "step time (ms)"]
    assert [row[4:] for row in steps] == [[-50.0, True, ""]] * len(steps) and steps
    assert [row[1] for row in only.table.rows] == ["the other file"]
    assert comparison.section(old) is None


def test_runs_of_two_machines_are_never_averaged():
    run = {**synthetic.varied(36)[33], "step_time_ms_p50": 100.0}
    slow = {**run, "step_time_ms_p50": 300.0, "machine": {"cpu": "slow"}}
    pairs, only = _compared(sort([slow, run]), sort([{**run, "step_time_ms_p50": 200.0}])).blocks
    assert [row[2].mean for row in pairs.table.rows if row[1] == "step time (ms)"] == [200.0]
    assert [row[3].mean for row in pairs.table.rows if row[1] == "step time (ms)"] == [100.0]
    assert [row[1] for row in only.table.rows] == ["this file"]
    (elsewhere,) = _compared(sort([slow]), sort([run])).blocks
    assert {row[6] for row in elsewhere.table.rows} == {"another machine; no spread in the other file and this file"}


def test_without_known_spreads_nobody_knows_whether_something_changed():
    run = {**synthetic.varied(36)[33], "step_time_ms_p50": 100.0}
    old = sort([figure("f", 2.0, "e", spread=0.1), figure("g", 2.0, "e", spread=0.1, machine={"cpu": "old"}), run])
    new = sort([figure("f", 1.0, "e"), figure("g", 1.0, "e", spread=0.2), {**run, "step_time_ms_p50": 50.0}])
    figures, pairs = _compared(new, old).blocks
    assert {tuple(row[6:]) for row in figures.table.rows} == {
        (None, "", "no spread in this file"),
        (True, "", "another machine"),
    }
    assert "1 changed beyond their spread (of 1 nobody knows)" in figures.verdict
    assert pairs.table.rows[0][5:] == [None, "no spread in the other file and this file"]


def test_figures_of_two_models_or_units_are_not_compared():
    def of(model, value, unit="×"):
        return figure("f", value, "e", spread=0.1, unit=unit, details={"model": model})

    old, new = sort([of("small", 1.0), of("large", 9.0)]), sort([of("small", 2.0), of("large", 9.0)])
    (figures,) = _compared(new, old).blocks
    assert [(row[1], row[5], row[6]) for row in figures.table.rows] == [("small", 100.0, True), ("large", 0.0, False)]
    (only,) = _compared(sort([of("small", 2.0, "ms")]), sort([of("small", 1.0)])).blocks
    assert [row[1] for row in only.table.rows] == ["this file", "the other file"]


def test_remarks_on_the_other_file_are_kept(tmp_path):
    for name, lines in (("new", ""), ("old", "{torn")):
        synthetic.write(tmp_path / f"{name}.jsonl", [synthetic.template()], *filter(None, [lines]))
    build(tmp_path / "new.jsonl", tmp_path / "page.html", against=tmp_path / "old.jsonl")
    assert "the other file: " in (tmp_path / "page.html").read_text()


def test_figures_of_two_experiments_are_two_whatever_they_are_called():
    evidence = sort([figure("f", 1.0, "one"), figure("f", 2.0, "two"), figure("f", 3.0, "two")])
    assert sorted(one["value"] for one in evidence.figures) == [1.0, 3.0]
    assert evidence.provenance.numbers(evidence.figures) == [1, 2] and ranges([1, 2, 3, 7]) == [(1, 3), (7, 7)]
