"""Generated input for every parser of text: it is read rightly or refused with the file's name, never anything else."""

import json
from contextlib import suppress

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lightning_modules.data import json_records, readers
from lightning_modules.data.corpus import find_corpus
from lightning_modules.data.instructions import recognise
from lightning_modules.data.readers import READERS, document_text, read_json_array, read_json_lines, read_text

TEXT = st.text(st.characters(codec="utf-8"), max_size=60)
NUMBERS = st.one_of(st.integers(), st.integers(-(10**30), 10**30), st.floats())
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXT, st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    ["text", "title", "instruction", "output", "response", "context", "input", "question", "answer"]
)
RECORDS = st.dictionaries(FIELDS, TEXT | JSON, max_size=4) | JSON
PIECES = st.sampled_from(
    ['"', "\\", "[", "]", "{", "}", ",", ":", "\n", " ", "\0", "\ufeff", "ü", "\\ud83d", "\\u0000", "NaN", "1e5", "01",
     '{"text": "a"}', '"text": ', "[[[[", '{"text": "a", "text": "b"}', "\r\n", "null"]
)  # fmt: skip
SCRAPS = st.lists(PIECES | TEXT, max_size=12).map("".join)
BYTES = st.one_of(
    st.binary(max_size=80),
    SCRAPS.map(str.encode),
    SCRAPS.map(lambda text: f"[{text}]".encode()),
    st.tuples(SCRAPS, st.sampled_from(["utf-16", "utf-16-le", "utf-32", "utf-8-sig"])).map(lambda s: s[0].encode(s[1])),
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("properties") / "file"


def outcome(reader, path, content, meaning=lambda record, where: record):
    """What a file says, or why it is refused."""
    path.write_bytes(content)
    try:
        return [meaning(record, where) for record, where, _ in reader(path)]
    except ValueError as error:
        assert str(path) in str(error)
        return None


@given(content=BYTES)
@pytest.mark.parametrize("suffix", READERS)
@pytest.mark.parametrize("meaning", [document_text, recognise])
def test_whatever_the_bytes_are_a_reader_reads_or_names_the_file(file, suffix, meaning, content):
    outcome(READERS[suffix], file.with_suffix(suffix), content, meaning)


@given(records=st.lists(RECORDS, min_size=1, max_size=5), ascii=st.booleans(), indent=st.none() | st.integers(0, 2))
def test_records_come_back_from_both_kinds_of_file(file, records, ascii, indent):
    def dump(value, indent):
        return json.dumps(value, ensure_ascii=ascii, indent=indent).encode("utf-8", "surrogatepass")

    array, lines = dump(records, indent), b"\n".join(dump(record, None) for record in records)
    expected = records
    if b"\xed" in array:  # half a surrogate pair as it stands is no UTF-8
        try:
            array.decode("utf-8")
        except UnicodeDecodeError:
            expected = None
    assert repr(outcome(read_json_array, file, array)) == repr(expected)
    if not any(isinstance(record, list) for record in records):  # a line that is a list is taken for an array
        assert repr(outcome(read_json_lines, file, lines)) == repr(expected)


@given(raw=st.one_of(SCRAPS, RECORDS.map(json.dumps), st.tuples(RECORDS.map(json.dumps), SCRAPS).map("".join)))
@example(raw='{"text": "a", "n": 12345678901234567890}')
@example(raw='{"text": NaN}')
def test_one_record_is_accepted_in_an_array_if_and_only_if_it_is_accepted_in_a_line(file, raw):
    raw = raw.replace("\n", " ").replace("\r", " ").replace("\ufeff", "")
    try:
        value = json.loads(raw)
        parts = 1
    except (ValueError, RecursionError):
        value, parts = None, None
        with suppress(ValueError, RecursionError):
            parts = len(json.loads(f"[{raw}]"))
    if not raw.strip() or isinstance(value, list) or parts not in (1, None):
        return  # nothing, an array, or several records: not one record
    array = outcome(read_json_array, file, f"[{raw}]".encode(), document_text)
    lines = outcome(read_json_lines, file, f"{raw}\n".encode(), document_text)
    assert array == lines


@given(content=BYTES, size=st.integers(1, 30))
@example(content=b'[""] x', size=3)  # the array ends where a piece ends
def test_pieces_in_which_a_file_is_read_do_not_matter(file, content, size):
    whole = [repr(outcome(reader, file, content)) for reader in (read_json_array, read_text)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_records, "_READ", size)
        patch.setattr(readers, "_READ", size)
        assert [repr(outcome(reader, file, content)) for reader in (read_json_array, read_text)] == whole


@given(
    text=st.lists(TEXT | st.sampled_from(["\r\n", "\n\n", " ", "x" * 30]), max_size=20).map("".join), mark=st.booleans()
)
def test_plain_text_comes_back_whole(file, text, mark):
    content = text.encode("utf-8-sig" if mark else "utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "TEXT_DOCUMENT", 20)
        found = outcome(read_text, file, content, document_text)
    stripped = text.removeprefix("\ufeff")
    if "\0" in text or not stripped.strip():
        assert found is None
        return
    expected = stripped.replace("\r\n", "\n")
    joined = "".join(found)
    # pieces of white space alone are left out
    assert "".join(joined.split()) == "".join(expected.split())
    assert all(len(piece) <= 40 and piece.strip() for piece in found)


NAMES = st.sampled_from(["a.txt", "b.json", "._c.txt", ".d", "e", "f.pdf", "g.md"])


@given(
    tree=st.dictionaries(
        st.lists(NAMES, min_size=1, max_size=3).map(tuple), st.sampled_from(["file", "link", "up", "gone"]), max_size=8
    )
)
def test_a_folder_is_read_once_and_accounted_for(tmp_path_factory, tree):
    root = tmp_path_factory.mktemp("tree")
    for parts, kind in tree.items():
        path = root.joinpath(*parts)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "file":
                path.write_text("x")
            else:
                path.symlink_to({"link": root / "a.txt", "up": root, "gone": root / "nowhere"}[kind])
        except (FileExistsError, NotADirectoryError, IsADirectoryError, OSError):
            continue
    try:
        found = find_corpus(root)
    except ValueError as error:
        assert str(root) in str(error)
        return
    real = [file.resolve() for file in found.files]
    assert len(set(real)) == len(real), "no file twice"
    assert not any(part.startswith(".") for file in found.files for part in file.relative_to(root).parts)
    for path in root.rglob("*"):  # which follows no links
        visible = not any(part.startswith(".") for part in path.relative_to(root).parts)
        if visible and path.suffix in READERS and path.is_file():
            assert path.resolve() in real
    assert all((root / name).is_symlink() or (root / name).exists() for name, _ in found.left_out)
