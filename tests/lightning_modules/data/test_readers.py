import json
import os

import pytest

from lightning_modules.data import readers
from lightning_modules.data.readers import (
    check_percent,
    corpus_files,
    document_text,
    in_validation,
    read_documents,
    read_json_array,
    read_json_lines,
    read_text,
    text_digest,
)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(reader, path):
    return [document_text(record, where) for record, where, _ in reader(path)]


def test_json_array_puts_the_title_above_the_text(tmp_path):
    records = [{"id": "1", "title": "Über", "text": "a\nb"}, {"text": "no title"}, {"title": "", "text": "c"}]
    path = write(tmp_path / "a.json", json.dumps(records, ensure_ascii=False))
    assert texts(read_json_array, path) == ["Über\na\nb", "no title", "c"]


@pytest.mark.parametrize("reader, content", [
    (read_json_array, '\ufeff [{"text": "x"}, {"text": "y"}]'),
    (read_json_lines, '\ufeff{"text": "x"}\n\n{"text": "y"}\n'),
])  # fmt: skip
def test_byte_order_mark_and_blank_lines_are_passed_over(tmp_path, reader, content):
    assert texts(reader, write(tmp_path / "a", content)) == ["x", "y"]


def test_bytes_read_grows_to_the_size_of_the_corpus(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", "".join(json.dumps({"text": f"{name}{i}" * 50}) + "\n" for i in range(300)))
    write(tmp_path / "c.json", json.dumps([{"text": "z" * 5000} for _ in range(100)]))
    files = corpus_files(tmp_path)
    positions = [position for _, position in read_documents(files)]
    assert positions == sorted(positions)
    assert positions[0] < 1000
    assert positions[-1] == sum(file.stat().st_size for file in files)


def test_short_text_file_is_one_document(tmp_path):
    assert texts(read_text, write(tmp_path / "a.txt", "one\r\n\r\ntwo\n")) == ["one\n\ntwo\n"]


def test_long_text_file_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    paragraphs = [f"Paragraph {i}: " + "größe " * 200 for i in range(200)]
    content = "\n \n".join(paragraphs)
    pieces = texts(read_text, write(tmp_path / "a.txt", content))
    assert "".join(pieces) == content
    assert len(pieces) > 5
    assert all(piece.startswith("Paragraph") for piece in pieces)
    assert all(readers.TEXT_DOCUMENT <= len(piece) <= 2 * readers.TEXT_DOCUMENT for piece in pieces[:-1])


@pytest.mark.parametrize("content", ["word " * 20_000, "x" * 100_000, "line\n" * 20_000])
def test_text_without_blank_lines_is_cut_all_the_same(tmp_path, content):
    pieces = texts(read_text, write(tmp_path / "a.txt", content))
    assert "".join(pieces) == content
    assert max(map(len, pieces)) <= 2 * readers.TEXT_DOCUMENT
    if "x" not in content:
        assert all(piece[-1].isspace() for piece in pieces[:-1])


@pytest.mark.parametrize("content, message", [
    ('[{"text": "a"}, {"text": "b', "broken JSON after record 1"),
    ('[{"text": "a"}', "broken JSON after record 1"),
    ('[{"text": "a"}] x', "broken JSON after record 1"),
    ('[{"text": "a"} {"text": "b"}]', "broken JSON after record 1"),
    ('[{"text": "grün', "broken JSON after record 0"),
    ('[{"text": "gr\u00fc'.encode()[:-1], "broken JSON after record 0"),
    ('{"text": "a"}', "name the file .jsonl"),
    ("[]", "no records"),
    ("  \n ", "only white space"),
    ('[{"text": "a"}, {"title": "b"}]', r"record 2 has no field 'text' \(its fields: title\)"),
    ('[{"text": 3}]', "record 1: 'text' is int, not a string"),
    ('[{"text": "a", "title": 3}]', "record 1: 'title' is int"),
    ('["a"]', "record 1 is a str"),
    (b'[{"text": "caf\xe9"}]', "not UTF-8 at byte 14"),
    (b'\xe9[{"text": "a"}]', "not UTF-8 at byte 0"),
    ('[{"text": "a"}]'.encode("utf-16"), "not UTF-8 at byte 0"),
])  # fmt: skip
def test_bad_json_array(tmp_path, content, message):
    path = write(tmp_path / "bad.json", content)
    with pytest.raises(ValueError, match=message) as caught:
        texts(read_json_array, path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content, message", [
    ('{"text": "a"}\n{"text": "b', "line 2 is not a JSON record"),
    ('{"text": "a"}\n\n{"title": "b"}\n', r"record 2 \(line 3\) has no field 'text'"),
    ('{"text": "half \\ud83d"}\n', "half a surrogate pair at character 5"),
    (b'{"text": "a"}\n{"text": "caf\xe9"}\n', "not UTF-8 at byte 27"),
    ("\n\n", "no records"),
])  # fmt: skip
def test_bad_json_lines(tmp_path, content, message):
    path = write(tmp_path / "bad.jsonl", content)
    with pytest.raises(ValueError, match=message) as caught:
        texts(read_json_lines, path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content, message", [
    (b"x" * 70_000 + b"\xe9" + b"y" * 70_000, "not UTF-8 at byte 70000"),
    ("ü".encode() * 40_000 + b"\xc3", "not UTF-8 at byte 80000"),
    (" \n\t ", "only white space"),
])  # fmt: skip
def test_bad_text_file(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        texts(read_text, write(tmp_path / "bad.txt", content))


def test_folder_is_read_in_a_fixed_order_and_only_known_files(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt", "notes.pdf"):
        write(tmp_path / name, name)
    assert [text for text, _ in read_documents(corpus_files(tmp_path))] == ["a.txt", "b.txt", "sub/c.txt"]


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ValueError, match="no file that can be read in this folder"):
        corpus_files(tmp_path)
    with pytest.raises(ValueError, match=r"unknown kind of file '\.pdf'"):
        corpus_files(write(tmp_path / "a.pdf", "x"))
    with pytest.raises(ValueError, match="file is empty"):
        corpus_files(write(tmp_path / "a.json", ""))


def test_split_depends_on_the_text_alone_and_has_the_share_asked_for():
    digests = [text_digest(f"document {i}") for i in range(4000)]
    share = sum(in_validation(digest, 5) for digest in digests) / 4000
    assert 0.03 < share < 0.07
    assert in_validation(text_digest("same"), 50) == in_validation(text_digest("same"), 50)
    assert {d for d in digests if in_validation(d, 5)} < {d for d in digests if in_validation(d, 20)}


@pytest.mark.parametrize("percent", [0, 100, -1])
def test_val_percent_must_leave_both_splits(percent):
    with pytest.raises(ValueError, match="val_percent"):
        check_percent(percent)


def test_json_reader_does_not_hold_the_file(tmp_path):
    path = write(tmp_path / "big.json", json.dumps([{"text": os.urandom(500).hex()} for _ in range(3000)]))
    first, _, position = next(read_json_array(path))
    assert len(first["text"]) == 1000
    assert position < path.stat().st_size / 10
