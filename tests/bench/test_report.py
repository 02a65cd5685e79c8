import json
import math
import re
from html.parser import HTMLParser

import pytest

from bench.__main__ import main
from bench.report import build
from bench.report.sections import tiers
from tests.bench import report_records as synthetic

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Structure of a page: nesting is checked while reading, the rest collected."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text.append(data)

    def named(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def report(tmp_path, records, *lines, options=()):
    results = synthetic.write(tmp_path / "results.jsonl", records, *lines)
    assert main(["report", str(results), "-o", str(tmp_path / "report.html"), *map(str, options)]) == 0
    text = (tmp_path / "report.html").read_text()
    return Page(text), text


def sections(page):
    return [a["id"].removesuffix("-section") for a in page.named("section")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A report with something in every section."""
    folder = tmp_path_factory.mktemp("whole")
    base = synthetic.template()
    features = [
        {**base, "run_name": "<script>alert(1)</script>", "prefill": synthetic.PREFILL, "survival": synthetic.SURVIVAL,
         "prefill_memory": synthetic.PREFILL_MEMORY, "token_quality": synthetic.TOKEN_QUALITY,
         "calibration": synthetic.CALIBRATION},
        {**base, "run_name": "slim", "structure": synthetic.STRUCTURE, "inference": synthetic.INFERENCE},
        {**base, "run_name": "blocks", "tiers": {**synthetic.TIERS, "sparsity": 0.4}, "val_ppl": 33.0},
        {**base, "run_name": "all", "ladder": synthetic.LADDER, "val_ppl": 30.0},
    ]  # fmt: skip
    figure = {"kind": "figure", "figure": "f", "what": "Speed & size", "value": 2.0, "unit": "×", "target": "≥ 1 ×",
              "reached": True, "spread": None, "command": "python -m x", "details": {}}  # fmt: skip
    sparse = {**figure, "figure": "2:4-novel", "command": "python -m bench experiment block_peers", "reached": None,
              "details": {"model": "m", "text": "novel", "arm": "2:4", "tiers": {"sparsity": 0.5}}}  # fmt: skip
    failure = {"kind": "failure", "run_name": "topk/x", "error": "line 1\nValueError: <b>no</b>", "exit_status": 1}
    records = [*synthetic.varied(165), *features, figure, sparse, failure, synthetic.COLLECTIVES, {"kind": "alien"}]
    page, text = report(
        folder, records, '{"torn":', "[1]", options=("--tables", folder / "tables", "--figures", folder / "figures")
    )
    return folder, page, text


def test_every_section_appears_when_its_records_are_there(whole):
    _, page, _ = whole
    assert sections(page) == [
        "overview", "tradeoff-gradient_compression", "headline", "quality", "step-time", "bytes", "rates", "scaling",
        "curves", "collectives", "tradeoff-token_pruning", "prefill", "frontier", "calibration", "survival",
        "tradeoff-structured_pruning", "structure", "tradeoff-block_sparsity", "tiers", "together", "figures",
        "trouble", "runs", "origins",
    ]  # fmt: skip
    targets = {a["href"].removeprefix("#") for a in page.named("a")}
    assert targets <= {attributes.get("id") for _, attributes in page.elements}


def test_the_page_stands_alone_and_says_what_each_picture_shows(whole):
    _, page, text = whole
    assert not page.named("script") and not page.named("link")[1:]
    assert not [a for _, a in page.elements for name in ("src", "href", "xlink:href")
                if (a.get(name) or "#").split(":")[0] not in ("#", "data") and not a[name].startswith("#")]  # fmt: skip
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    charts = [a for _, a in page.elements if a.get("role") == "img"]
    assert len(charts) == len(page.named("svg")) > 10 and all(len(a["aria-label"]) > 40 for a in charts)
    assert all(a["alt"] for a in page.named("img")) and len(page.named("img")) == 3
    assert len(page.named("caption")) >= len(charts)  # the numbers behind each
    assert page.named("html")[0]["lang"] == "en" and {"header", "nav", "main"} <= {tag for tag, _ in page.elements}
    assert "prefers-color-scheme: dark" in text and len(text) < 5_000_000


def test_paper_is_white_whatever_the_screen_is(whole):
    style = whole[2].partition("<style>")[2].partition("</style>")[0]
    dark, paper = (
        {
            name
            for rules in re.findall(medium + r" \{\s*:root \{(.*?)\}", style, re.DOTALL)
            for name in re.findall(r"--[\w-]+", rules)
        }
        for medium in (r"\(prefers-color-scheme: dark\)", "@media print")
    )
    assert dark == paper and len(dark) > 20


def test_names_and_errors_are_text_not_markup(whole):
    _, page, text = whole
    assert "<script>alert" not in text and "<b>no" not in text and "<b>house" not in text
    assert "<script>alert(1)</script>" in page.text and "line 1\nValueError: <b>no</b>" in page.text
    assert "<b>house " in page.text


def test_what_was_skipped_is_counted_and_shown(whole):
    _, page, _ = whole
    shown = " ".join(page.text)
    assert "2 broken line(s) skipped" in shown and "1 foreign record(s) skipped" in shown and "1 of kind alien" in shown


def test_pruned_prefill_shows_where_the_model_was_and_what_fits(whole):
    folder, page, _ = whole
    rows = [line.split(",") for line in (folder / "tables/prefill.csv").read_text().splitlines()]
    assert rows[1][1:7] == ["pruned", "8192", "8192.0", str(8192 / 2.3), "2.3", "2.46"] and float(rows[1][7]) == 25.0
    assert "Ran on cuda:0. Offloaded, so times measure transfers: model.layers.3." in page.text
    assert (folder / "tables/prefill-memory.csv").read_text().splitlines()[1].endswith("8000000000,12288,20480")
    quality = (folder / "tables/frontier-table.csv").read_text().splitlines()
    assert quality[2].split(",")[1:8] == ["suffix", "random", "0.7", "0.25", "0.2", "0.31", "0.4"]
    assert quality[2].split(",")[-2:] == ["0.34", "0.6"]
    assert quality[1].split(",")[5:7] == ["", ""]  # not recorded
    drawn = (folder / "tables/frontier-0.csv").read_text().splitlines()
    assert [line.split(",")[1:4] for line in drawn[1:]] == [
        ["random", "0.7", "0.6"],
        ["random", "0.5", "0.4"],
        ["oracle_gate_gradient", "0.7", "0.6"],
    ]
    speed = (folder / "tables/structure-speed.csv").read_text().splitlines()[1]
    assert speed == "slim,prefill,1,30.0,20.0,1.5,,1.6,1.4,False"


def test_tables_and_figures_are_written_for_papers(whole):
    folder, page, _ = whole
    names = {path.name for path in (folder / "tables").iterdir()}
    assert {"headline.md", "headline.csv", "step-time.csv", "tiers-0.md", "failures.csv"} <= names
    header, first, *_ = (folder / "tables/headline.csv").read_text().splitlines()
    assert "validation PPL mean,validation PPL sd,validation PPL n" in header and "±" not in first
    assert (folder / "tables/headline.md").read_text().startswith("**Methods by setting**\n\n| setting | method |")
    pictures = {path.suffix: path for path in (folder / "figures").iterdir() if path.name != "pare.json"}
    assert set(pictures) == {".png", ".svg"} and len(list((folder / "figures").glob("*.png"))) == len(page.named("svg"))
    assert pictures[".png"].read_bytes().startswith(b"\x89PNG") and "var(--" not in pictures[".svg"].read_text()
    assert not list(folder.rglob(".*"))  # nothing half-written is left


def test_one_run_with_almost_nothing_recorded_says_so(tmp_path):
    page, _ = report(tmp_path, [{"run_name": "bare", "train_loss": 3.0}])
    assert sections(page) == ["headline", "runs", "origins"]
    columns = [text for text in page.text if text in ("validation PPL", "ideal step (ms)", "speed-up (×)")]
    assert not columns and any(text.startswith("Not recorded in any row: validation PPL") for text in page.text)
    assert not [text for text in page.text if text.strip() in ("0", "0.0", "nan", "None")]


def test_long_texts_and_names_that_repeat_stand_once(tmp_path):
    base = synthetic.template()
    other = {**base, "machine": {**base["machine"], "cpu": "Another processor"}, "val_ppl": None}
    page, text = report(tmp_path, [{**base, "run_name": "a"}, {**other, "run_name": "b"}, {**other, "run_name": "c"}])
    details = [part.split("</details>")[0] for part in text.split('<details class="run">')[1:]]
    assert text.count("Another processor, isa") == 1
    assert [part.count("<dd>machine 1</dd>") for part in details] == [1, 0, 0]
    assert [part.count("<dd>machine 2</dd>") for part in details] == [0, 1, 1]
    tables = [{**base, "run_name": "slim", "structure": synthetic.STRUCTURE}] * 2
    page, _ = report(tmp_path, tables)
    bands = [a for a in page.named("th") if a.get("scope") == "rowgroup"]
    # on the front and in its table by name, once above both rows of the table of structure
    assert [a["class"] for a in bands].count("band") == len(bands) >= 1 and all("colspan" in a for a in bands)


def test_what_a_run_lacks_is_listed(tmp_path):
    lacking = {key: value for key, value in synthetic.template().items() if key != "train_loss"}
    _, text = report(tmp_path, [synthetic.template(), {**lacking, "run_name": "b", "step_time_ms_p90": None}])
    missing = text.split("<dt>not recorded</dt><dd>")[-1].split("</dd>")[0].split(", ")
    assert {"train_loss", "step_time_ms_p90"} <= set(missing) and "step_time_ms_p50" not in missing


def test_only_the_last_of_many_runs_are_drawn_and_the_section_says_so(tmp_path):
    runs = [{"run_name": f"prompt {i}", "survival": synthetic.SURVIVAL} for i in range(20)]
    page, _ = report(tmp_path, runs)
    captions = [text for text in page.text if text.startswith("Tokens left after each stage")]
    assert captions[::2] == captions[1::2]  # a heading, and the caption of its table
    assert captions[::2] == [f"Tokens left after each stage: prompt {i}" for i in range(12, 20)]
    assert "Drawn: the last 8 of 20 runs." in " ".join(page.text)


def test_pictures_of_blocks_have_a_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(tiers, "_MAP_BYTES", 1)
    page, _ = report(tmp_path, [{"run_name": "blocks", "tiers": {"matrices": synthetic.TIERS["matrices"]}}])
    assert len(page.named("img")) == 1 and "2 further matrices are not drawn." in page.text


def test_one_real_run(tmp_path):
    page, _ = report(tmp_path, [synthetic.template()])
    assert sections(page) == ["headline", "step-time", "bytes", "runs", "origins"]
    shown = " ".join(page.text)
    assert (
        "python -m bench configuration RESULTS.jsonl profile_2_ranks > run.yaml" in shown
        and "git checkout d9c748c" in shown
    )


def test_values_of_the_wrong_type_and_broken_blocks_are_reported_not_fatal(tmp_path):
    run = {**synthetic.template(), "step_time_ms_p50": "fast", "link_rate": "slow", "tiers": {"matrices": [{}]}}
    page, _ = report(tmp_path, [run, {**run, "run_name": "b", "survival": {"tokens": ["a"], "dropped_at": [7]}}])
    shown = " ".join(page.text)
    assert "step_time_ms_p50 is str 'fast', expected number" in shown
    assert "block 'tiers' not understood (KeyError: 'rows')" in shown and "block 'survival' not understood" in shown


def test_a_diverged_run_is_shown_and_drawn_around(tmp_path):
    runs = synthetic.varied(33)[3:] + [{**run, "val_ppl": math.nan} for run in synthetic.varied(3)]
    results = tmp_path / "r.jsonl"
    results.write_text("".join(json.dumps(run).replace("NaN", '"NaN"') + "\n" for run in runs))
    assert main(["report", str(results), "-o", str(tmp_path / "r.html")]) == 0
    assert "nan" in Page((tmp_path / "r.html").read_text()).text


@pytest.mark.parametrize("content", ["", "\n", "not json\n[]\n"])
def test_no_records_is_an_error_and_leaves_no_file(tmp_path, capsys, content):
    (tmp_path / "r.jsonl").write_text(content)
    (tmp_path / "old.html").write_text("old")
    assert main(["report", str(tmp_path / "r.jsonl"), "-o", str(tmp_path / "old.html")]) == 1
    assert "no records" in capsys.readouterr().err
    assert (tmp_path / "old.html").read_text() == "old" and len(list(tmp_path.iterdir())) == 2


def test_only_foreign_records_is_an_error_too(tmp_path, capsys):
    synthetic.write(tmp_path / "r.jsonl", [{"kind": "alien"}])
    assert main(["report", str(tmp_path / "r.jsonl"), "-o", str(tmp_path / "r.html")]) == 1
    assert "foreign" in capsys.readouterr().err and not (tmp_path / "r.html").exists()


def test_a_thousand_records_stay_under_five_megabytes(tmp_path):
    records = [{**run, "run_name": f"{run['run_name']}#{i}"} for i, run in enumerate(synthetic.varied(990))]
    page, text = report(tmp_path, records + synthetic.varied(10))
    assert len(text.encode()) < 5_000_000
    assert len([a for a in page.named("details") if a.get("class") == "run"]) == 1000


def test_the_recorded_configuration_comes_back(tmp_path, capsys):
    run = synthetic.template()
    results = synthetic.write(tmp_path / "r.jsonl", [run])
    assert main(["configuration", str(results), run["run_name"]]) == 0
    assert capsys.readouterr().out == run["config"]
    assert main(["configuration", str(results), "other"]) == 1


@pytest.mark.parametrize("field", ["tables", "figures"])
def test_a_folder_of_somebody_elses_is_refused_before_anything_is_written(field, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("ten years")
    with pytest.raises(ValueError, match=rf"^{field}: .*thesis\.tex"):
        build(tmp_path / "none.jsonl", tmp_path / "page.html", **{field: tmp_path / "mine"})
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("output", "tables", "figures"),
    [
        ("p.html", "out", "out"),
        ("p.html", "out", "out/figures"),
        ("out/p.html", None, "out"),
        ("p.html", "p.html", None),
    ],
)
def test_destinations_that_would_replace_each_other_are_refused(output, tables, figures, tmp_path):
    given = {field: tmp_path / name for field, name in (("tables", tables), ("figures", figures)) if name}
    with pytest.raises(ValueError, match="keep them apart"):
        build(tmp_path / "none.jsonl", tmp_path / output, **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("results", "against", "output", "field"), [
    ("a.jsonl", None, "a.jsonl", "results"),
    ("a.jsonl", "b.jsonl", "b.jsonl", "against"),
    ("a.jsonl", None, "link.html", "results"),
    (".", None, "b.jsonl", "results"),
])  # fmt: skip
def test_records_that_are_read_are_never_written_over(results, against, output, field, tmp_path, capsys):
    for name in ("a.jsonl", "b.jsonl"):
        synthetic.write(tmp_path / name, [synthetic.template()])
    (tmp_path / "link.html").symlink_to("a.jsonl")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    options = ["--against", str(tmp_path / against)] if against else []
    assert main(["report", str(tmp_path / results), "-o", str(tmp_path / output), *options]) == 1
    said = capsys.readouterr().err
    assert f"output ({tmp_path / output}) is {tmp_path}/" in said and f"read ({field})" in said
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
