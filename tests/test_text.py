"""Reading documents and checking tokenizers."""

import gzip
import json
import lzma

import pytest
from training_cases import STORIES
from transformers import AutoTokenizer

from hf_sparse_attention.text import check_tokenizer, encode_documents, find_texts, load_tokenizer, read_documents

ROWS = ["first story", "second\nstory ä", "third"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(STORIES)


def _jsonl(column="text"):
    return "".join(json.dumps({"id": index, column: row}) + "\n" for index, row in enumerate([*ROWS, "  "])).encode()


def _parquet(path, column="text"):
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import table

    parquet.write_table(table({column: [*ROWS, None]}), path)


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".txt", ".parquet"])
def test_every_kind_reads_the_same(tmp_path, kind, suffix):
    path = tmp_path / f"a{kind}{suffix}"
    if kind == ".parquet":
        _parquet(tmp_path / "plain")
        content = (tmp_path / "plain").read_bytes()
    elif kind == ".txt":
        content = "\n<|endoftext|>\n".join(ROWS).encode() + b"\n<|endoftext|>\n"
    else:
        content = _jsonl()
    if suffix == ".zst":
        content = pytest.importorskip("zstandard").compress(content)
    elif suffix:
        content = {".xz": lzma.compress, ".gz": gzip.compress}.get(suffix, bytes)(content)
    path.write_bytes(content)
    assert list(read_documents([str(path)])) == ROWS


def test_plain_text_rules(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n \n\nthree\n")
    assert list(read_documents([str(path)])) == ["one\n\ntwo\n \n\nthree"]
    assert list(read_documents([str(path)], blank_lines=True)) == ["one", "two", "three"]
    path.write_text("one\n\nstill one\n<|endoftext|>\ntwo <|endoftext|> in the line\n")
    assert list(read_documents([str(path)], blank_lines=True)) == ["one\n\nstill one", "two <|endoftext|> in the line"]


def test_patterns_and_order(tmp_path):
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    assert list(read_documents([str(tmp_path / "*.txt"), str(tmp_path / "b.txt")])) == ["a.txt", "b.txt", "b.txt"]


def test_datasets_on_the_hub(monkeypatch):
    datasets = pytest.importorskip("datasets")
    seen = {}

    def load_dataset(*names, **options):
        seen["call"] = (names, options)
        return [{"body": row} for row in ROWS]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    got = read_documents(["owner/name:sub"], text_column="body", split="test", streaming=True)
    assert list(got) == ROWS
    assert seen["call"] == (("owner/name", "sub"), {"split": "test", "streaming": True})

    def broken(*names, **options):
        raise ConnectionError("cut")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(OSError, match="owner/name.*cannot be fetched: cut"):
        list(read_documents(["owner/name"]))


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.jsonl", b'{"text": 1}\n', ValueError, "line 1: 'text' is int"),
        ("a.jsonl", b'{"text": "x"}\n{oops\n', ValueError, "line 2 is not JSON"),
        ("a.jsonl", b"[1]\n", ValueError, "line 1 is a JSON list"),
        ("a.jsonl", b'{"body": "x"}\n', ValueError, "has no 'text'; it has body"),
        ("a.txt", b"\xff\xfe\xfa", ValueError, "is not UTF-8"),
        ("a.txt.xz", lzma.compress(b"hello" * 1000)[:-20], OSError, "cannot be decompressed"),
        ("a.txt.gz", b"no gzip", OSError, "cannot be decompressed"),
        ("a.parquet", b"no parquet", ValueError, "is not a parquet file"),
        ("a.docx", b"", ValueError, "readable are .txt"),
    ],
)
def test_bad_files(tmp_path, name, content, error, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(error, match=message):
        list(read_documents([str(path)]))


def test_missing_names(tmp_path):
    for name in (str(tmp_path / "no.txt"), "no.jsonl", "a/b.jsonl", "plain"):
        with pytest.raises(FileNotFoundError, match="neither a file"):
            find_texts([name])
    with pytest.raises(ValueError, match="no text"):
        find_texts([])
    _parquet(tmp_path / "a.parquet", "body")
    with pytest.raises(ValueError, match="no column 'text'; it has body"):
        list(read_documents([str(tmp_path / "a.parquet")]))


def test_encoded_documents_begin_and_end_once(tokenizer):
    lists = list(encode_documents(tokenizer, ["hello there", "", "once upon"], batch=2))
    assert len(lists) == 2
    for tokens, text in zip(lists, ["hello there", "once upon"], strict=True):
        assert tokens[0] == tokenizer.bos_token_id and tokens[-1] == tokenizer.eos_token_id
        assert tokens.count(tokenizer.bos_token_id) == 1
        assert tokenizer.decode(tokens[1:-1]).strip() == text


def test_tokenizer_must_fit(tmp_path, tokenizer):
    check_tokenizer(tokenizer, 512)
    with pytest.raises(ValueError, match="does not fit the model.*511.*vocabulary has 400"):
        load_tokenizer(STORIES, 400)
    with pytest.raises(OSError, match="cannot be loaded"):
        load_tokenizer(tmp_path, 512)


def test_a_mark_beyond_the_vocabulary_is_told_and_a_word_refused(caplog):
    with_mark = load_tokenizer(STORIES, 512)
    with_mark.add_special_tokens({"additional_special_tokens": ["<image>"]})
    check_tokenizer(with_mark, 512)
    assert "<image>" in caplog.text
    for change in ({"pad_token": "<padding>"}, ["a-word"]):
        tokenizer = load_tokenizer(STORIES, 512)
        tokenizer.add_tokens(change) if isinstance(change, list) else tokenizer.add_special_tokens(change)
        with pytest.raises(ValueError, match="does not fit the model"):
            check_tokenizer(tokenizer, 512)
