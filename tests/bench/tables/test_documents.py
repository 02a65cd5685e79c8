"""Documents hold what their records say; a figure that was changed by hand, or measured anew, is found."""

import pytest

from bench.__main__ import main
from bench.tables import documents, figures, pictures
from common.records import record

BASE = {"unit": "×", "target": "report", "reached": None, "command": "python -m x --records old/place.jsonl"}
DOCUMENT = """# A
<!-- table: figures f.jsonl only=s* columns=figure,measured -->
<!-- end -->
It is <!-- figure: f.jsonl speed digits=2 -->fast<!-- end --> at least.
<!-- table: records f.jsonl -->old<!-- end -->
"""


@pytest.fixture
def records(tmp_path):
    folder = tmp_path / "docs/results/records"
    figures.append(folder / "f.jsonl", figure="speed", what="Speed", value=1.234, spread=0.1, **BASE)
    figures.append(folder / "f.jsonl", figure="cost", what="Cost", value=5.0, **BASE)
    return folder


def test_tables_and_figures_are_written_and_the_rest_is_left(records):
    text = documents.render(DOCUMENT, records)
    assert "\n| Speed | 1.234 ± 0.1 × |\n" in text and "| Cost" not in text
    assert "\nIt is <!-- figure: f.jsonl speed digits=2 -->1.2 ×<!-- end --> at least.\n" in text
    assert "| [f.jsonl](records/f.jsonl) | 2 | 0 |" in text
    assert "Measured again by `python -m x`." in text and "old" not in text
    assert documents.render(text, records) == text


def test_pivot_and_compare_name_every_commit_that_they_show(tmp_path):
    stamp = record.stamp()
    for method, commit in (("a", "3" * 40), ("a", "1" * 40), ("b", "2" * 40)):
        made = {**stamp, "kind": "run", "run_name": method, "compress_method": method, "world_size": 2}
        record.append(tmp_path / "runs.jsonl", {**made, "val_ppl": 3.5, "git_commit": commit})
    recipes = (
        "pivot runs.jsonl rows=compress_method column=world_size values=val_ppl where=run_name=*",
        "compare runs.jsonl fields=val_ppl",
    )
    for recipe in recipes:
        text = documents.render(f"<!-- table: {recipe} -->\n<!-- end -->", tmp_path)
        assert "3.5" in text and "1111111111" in text and "2222222222" in text
        assert ("3333333333" in text) == (recipe[:5] != "pivot"), "a superseded record does not stand in a pivot"


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        ("table: figures f.jsonl only=nothing", "no figure nothing"),
        ("table: figures g.jsonl", "g.jsonl"),
        ("table: f.jsonl", "the first word says which table: figures, pivot, compare, records, memory"),
        ("table: figures f.jsonl colour=red", "colour"),
        ("figure: f.jsonl nothing", "no figure nothing in f.jsonl"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_named(records, recipe, why):
    with pytest.raises(ValueError, match=why) as error:
        documents.render(f"<!-- {recipe} -->x<!-- end -->", records)
    assert recipe in str(error.value)


@pytest.mark.parametrize(
    "text", ["<!-- table: figures f.jsonl -->", "<!-- end -->", "<!-- figure: f.jsonl\nspeed --><!-- end -->"]
)
def test_markers_come_in_pairs(records, text):
    with pytest.raises(ValueError, match="needs a recipe in one line and one"):
        documents.render(text, records)


def test_a_damaged_records_file_is_named(records):
    with open(records / "f.jsonl", "a") as file:
        file.write('{"kind": "fig')
    with pytest.raises(ValueError, match=r"f\.jsonl: broken line 3$"):
        documents.render("<!-- table: figures f.jsonl -->x<!-- end -->", records)


def test_check_finds_what_drifted_and_table_repairs_it(records, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(documents, "ROOT", tmp_path)
    monkeypatch.setattr(pictures, "PICTURES", {})
    page = tmp_path / "docs/page.md"
    page.write_text(DOCUMENT)
    assert main(["table", "--check"]) == 1
    assert "docs/page.md differs from its records" in capsys.readouterr().err and page.read_text() == DOCUMENT
    assert main(["table"]) == 0 and main(["table", "--check"]) == 0
    page.write_text(page.read_text().replace("1.234", "1.334"))
    assert main(["table", "--check"]) == 1


def test_documents_of_this_repository_hold_what_their_records_say():
    assert not documents.drifted(documents.ROOT), "python -m bench table"
    old = [path.name for path, _, _ in pictures.drifted(documents.ROOT, documents.ROOT / documents.RECORDS)]
    assert not old, "python -m bench table"


def test_a_picture_is_old_when_its_numbers_change(tmp_path, monkeypatch):
    numbers = {"dense": [80.0, 1.0]}

    def draw(figure, taken):
        figure.subplots().plot(taken["dense"])

    picture = pictures.Picture(1, "one", lambda records: dict(numbers), draw, "bench.md")
    monkeypatch.setattr(pictures, "PICTURES", {"one": picture})
    for value in (80.0, 81.0):
        numbers["dense"] = [value, 1.0]
        [(path, *drawing)] = pictures.drifted(tmp_path, tmp_path)
        pictures.write(path, *drawing)
        assert path == tmp_path / "docs/pictures/one.png" and not list(pictures.drifted(tmp_path, tmp_path))


@pytest.mark.parametrize("path", sorted((documents.ROOT / pictures.FOLDER).glob("*.png")), ids=lambda path: path.name)
def test_pictures_are_small_and_used(path):
    assert path.stat().st_size <= 200_000
    assert any(f"pictures/{path.name})" in page.read_text() for page in documents.documents())


def test_every_records_file_is_shown():
    pages = "".join(path.read_text() for path in documents.documents())
    for file in (documents.ROOT / documents.RECORDS).glob("*.jsonl"):
        assert f" {file.name} " in pages, f"no table in docs/results shows {file.name}"


def test_the_gallery_has_every_picture_and_the_page_of_its_numbers(tmp_path):
    page = documents.render("<!-- table: pictures -->\n<!-- end -->", tmp_path)
    for name, picture in pictures.PICTURES.items():
        assert f"](pictures/{name}.png)" in page and (documents.ROOT / f"docs/results/{picture.page}").is_file()
