import json
import os
import subprocess

import pytest

from lightning_modules.data import json_records, readers
from lightning_modules.data.corpus import find_corpus
from lightning_modules.data.readers import (
    check_percent,
    document_text,
    in_validation,
    read_json_array,
    read_json_lines,
    read_records,
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
    files = find_corpus(tmp_path).files
    positions = [position for _, _, position in read_records(files)]
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


def test_a_line_end_is_not_cut_in_two(tmp_path):
    cut = 2 * readers.TEXT_DOCUMENT
    content = "x" * (cut - 1) + "\r\n" + "y" * 100
    assert "".join(texts(read_text, write(tmp_path / "a.txt", content))) == content.replace("\r\n", "\n")


@pytest.mark.parametrize("content", ["word " * 20_000, "x" * 100_000, "line\n" * 20_000])
def test_text_without_blank_lines_is_cut_all_the_same(tmp_path, content):
    pieces = texts(read_text, write(tmp_path / "a.txt", content))
    assert "".join(pieces) == content
    assert max(map(len, pieces)) <= 2 * readers.TEXT_DOCUMENT
    if "x" not in content:
        assert all(piece[-1].isspace() for piece in pieces[:-1])


@pytest.mark.parametrize("content, message", [
    ('[{"text": "a"}, {"text": "b', "the file ends in record 2, at byte 27; is it cut short"),
    ('[{"text": "a"}', "the file ends in record 1"),
    ('[{"text": "a"},', "the file ends in record 2"),
    ('[{"text": "grün', "the file ends in record 1"),
    ('[{"text": "gr\u00fc'.encode()[:-1], "the file ends in record 1"),
    ('[{"text": "a\\', "the file ends in record 1"),
    ('[{"text": "a"}] x', "something follows the array at byte 16"),
    ('[{"text": "a"}]]', "something follows the array at byte 15"),
    ('[{"text": "a"} {"text": "b"}]', r"record 1 is not JSON \(Extra data at byte 15"),
    ('[{"text": "a"},]', r"record 2 is not JSON \(Expecting value at byte 15"),
    ('[{"text": "a"}, ü]', r"record 2 is not JSON \(Expecting value at byte 16"),
    ('[{"text": "a" ] }, 1]', r"record 1 is not JSON \(Expecting ',' delimiter at byte 14"),
    ('[{"text": "a\n"}]', r"record 1 is not JSON \(.*control character at byte 12"),
    ('[{"text": "a}, {"text": "b"}, {"text": "c"}]', r"record 1 is not JSON \(Expecting ',' delimiter at byte 17"),
    ("[{'text': 'a'}]", r"record 1 is not JSON \(Expecting property name.* at byte 2"),
    ('{"text": "a"}', "starts with '{', .* name the file .jsonl"),
    ("3", "starts with '3'"),
    ("ü", "starts with 'ü'"),
    ("[]", "no records"),
    (" [ \n ] ", "no records"),
    ("  \n ", "only white space"),
    ('[{"text": "a"}, {"title": "b"}]', r"record 2 has no field 'text' \(its fields: title\)"),
    ('["a"]', "record 1 is a str"),
    (b'[{"text": "caf\xe9"}]', "not UTF-8 at byte 14"),
    (b'[{"text": "a"}, \xe9]', "not UTF-8 at byte 16"),
    (b'\xe9[{"text": "a"}]', "not UTF-8 at byte 0"),
    ('[{"text": "a"}]'.encode("utf-16-le"), "NUL byte at byte 1.*iconv -f UTF-16LE -t UTF-8 bad.json"),
    ('[{"text": "a"}]'.encode("utf-16-be"), "NUL byte at byte 0"),
    ('[{"text": "a\0b"}]', "NUL byte at byte 12"),
])  # fmt: skip
def test_bad_json_array(tmp_path, content, message):
    path = write(tmp_path / "bad.json", content)
    with pytest.raises(ValueError, match=message) as caught:
        texts(read_json_array, path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content, message", [
    ('{"text": "a"}\n{"text": "b', r"record 2 \(line 2\) is not JSON .*; one record a line is expected"),
    ('{"text": "a"}\n\n{"title": "b"}\n', r"record 2 \(line 3\) has no field 'text'"),
    ('[{"text": "a"}]\n', r"record 1 \(line 1\) is a list; name a file that is one JSON array .json"),
    (b'{"text": "a"}\n{"text": "caf\xe9"}\n', "not UTF-8 at byte 27"),
    ("\n\n", "no records"),
    ('{"text": "a"}\n'.encode("utf-16-le"), "NUL byte at byte 1"),
])  # fmt: skip
def test_bad_json_lines(tmp_path, content, message):
    path = write(tmp_path / "bad.jsonl", content)
    with pytest.raises(ValueError, match=message) as caught:
        texts(read_json_lines, path)
    assert str(path) in str(caught.value)


BOTH = [(read_json_array, "[%s]"), (read_json_lines, "%s\n")]


@pytest.mark.parametrize("reader, around", BOTH)
@pytest.mark.parametrize("unread", [
    "12345678901234567890", "-9223372036854775809", "9" * 5000, "NaN", "-Infinity", "1e999", "1.5e-400",
    '"half \\ud83d"', '"\\u0000"', '[[[{"a": [{}]}]]]', '{"text": "inner", "text": "twice"}', "null", '"]},"', '"\\\\"',
    "[" * 300 + "]" * 300,
])  # fmt: skip
def test_what_nobody_reads_may_be_anything(tmp_path, reader, around, unread):
    path = write(tmp_path / "a", around % f'{{"id": {unread}, "text": "a", "id": 2}}')
    assert texts(reader, path) == ["a"]


@pytest.mark.parametrize("reader, around", BOTH)
@pytest.mark.parametrize("record, message", [
    ('{"text": "half \\ud83d"}', "'text' has half a surrogate pair at character 5"),
    ('{"text": "a\\u0000b"}', "'text' has a NUL at character 1; remove it"),
    ('{"text": "a", "text": "b"}', "'text' stands more than once"),
    ('{"title": "a", "title": "b", "text": "c"}', "'title' stands more than once"),
    ('{"text": 3}', "'text' is int, not a string"),
    ('{"text": "a", "title": 3}', "'title' is int"),
    ('{"text": "a", "x": ' + "[" * 50_000 + "]" * 50_000 + "}", "nested too deeply"),
    ('{"text": "a", "x": 01}', "is not JSON"),
    ('{"text": "a", "x": +1}', "is not JSON"),
    ('{"text": "a\\x"}', "is not JSON"),
    ("nul", "is not JSON"),
])  # fmt: skip
def test_both_kinds_of_file_refuse_the_same_records(tmp_path, reader, around, record, message):
    path = write(tmp_path / "a", around % record)
    with pytest.raises(ValueError, match=message) as caught:
        texts(reader, path)
    assert f"{path}: record 1" in str(caught.value)


@pytest.mark.parametrize("reader", [read_json_array, read_json_lines, read_text])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_other_encodings_get_advice_that_works(tmp_path, monkeypatch, reader, encoding):
    monkeypatch.chdir(tmp_path)
    suffix = ".json" if reader is read_json_array else ".jsonl"
    path = write(
        tmp_path / f"a{suffix}",
        ('[{"text": "ü"}]' if reader is read_json_array else '{"text": "ü"}\n').encode(encoding),
    )
    with pytest.raises(ValueError, match=f"is {encoding.upper()}, not UTF-8; convert it first: iconv") as caught:
        texts(reader, path)
    subprocess.run(str(caught.value).split(": ")[-1], shell=True, check=True)
    expected = '{"text": "ü"}\n' if reader is read_text else "ü"
    assert texts(reader, tmp_path / f"a.utf8{suffix}") == [expected]


def test_records_do_not_depend_on_where_the_file_is_read_in_pieces(tmp_path, monkeypatch):
    records = [{"text": 'q"\\]}, é\U0001f600\n', "n": [1, {"a": "]"}]}, {"text": "x" * 50}, {"text": "\\\\"}]
    content = " [" + " ,\n".join(json.dumps(r, ensure_ascii=i % 2) for i, r in enumerate(records)) + " ] \n"
    path = write(tmp_path / "a.json", content)
    for size in range(1, 40):
        monkeypatch.setattr(json_records, "_READ", size)
        assert [record for record, _, _ in read_json_array(path)] == records


@pytest.mark.parametrize("content, message", [
    (b"x" * 70_000 + b"\xe9" + b"y" * 70_000, "not UTF-8 at byte 70000"),
    ("ü".encode() * 40_000 + b"\xc3", "not UTF-8 at byte 80000"),
    (" \n\t ", "only white space"),
    (b"x" * 70_000 + b"\0", "NUL byte at byte 70000"),
    ("text".encode("utf-16-le"), "NUL byte at byte 1"),
])  # fmt: skip
def test_bad_text_file(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        texts(read_text, write(tmp_path / "bad.txt", content))


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
