"""Text in, tokens out: lossless, ordered, in constant memory, whatever the sizes, kinds and threads."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from blocks import open_blocks
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from creature.data.text import corpus, pieces, readers
from creature.data.text.corpus import tokenize_corpus
from creature.data.text.pieces import last_safe_cut
from creature.data.text.tokenizer import END_OF_TEXT, gpt2_hash, load_encoding
from creature.errors import UserError
from creature.evaluation import whole_documents

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    "One day.\r\nTwo  days,\n\n three!",
    "  ünïcode 漢字 👍🏽 \t",
    "it's 12345 o'clock\n",
    "a\n",
    "\ufeffmark",
    " ",
]


def tokenize(inputs, output, **options) -> dict:
    options = {"validation_fraction": 0, "progress": False, "workers": 1, **options}
    return tokenize_corpus([str(name) for name in inputs], str(output), **options)


def read_back(path, dtype="<u2") -> list[str]:
    """The documents of a stream."""
    ids = np.fromfile(path, dtype)
    assert ids[-1] == END_OF_TEXT
    ends = np.flatnonzero(ids == END_OF_TEXT)
    parts = np.split(ids, ends + 1)[:-1]
    return [load_encoding().decode_bytes(part[:-1].tolist()).decode("utf-8") for part in parts]


def expected_ids(documents) -> list[int]:
    encoding = load_encoding()
    return [i for text in documents for i in (*encoding.encode_ordinary(text), END_OF_TEXT)]


def write(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
    return path


# Kinds of input


def encode_kind(kind: str, documents: list[str], column: str) -> bytes:
    if kind == "txt":
        return "\n<|endoftext|>\n".join(documents).encode("utf-8")
    if kind == "jsonl":
        return "".join(json.dumps({"id": 1, column: text}) + "\n" for text in documents).encode()
    if kind == "json":
        return json.dumps([{column: text, "more": [1, {"x": "]"}]} for text in documents], indent=1).encode()
    if kind == "parquet":
        sink = pa.BufferOutputStream()
        pa.parquet.write_table(pa.table({"n": range(len(documents)), column: documents}), sink, row_group_size=2)
        return sink.getvalue().to_pybytes()
    lines: list[str] = []
    writer = csv.writer(type("Sink", (), {"write": lines.append}), delimiter="\t" if kind == "tsv" else ",")
    writer.writerows([["n", column], *enumerate(documents)])
    return "".join(lines).encode("utf-8")


COMPRESS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv", "tsv", "parquet"])
def test_every_kind_plain_and_compressed_comes_back_byte_for_byte(kind, compression, tmp_path):
    column = "content" if kind != "txt" else "text"
    path = write(tmp_path / f"input.{kind}{compression}", COMPRESS[compression](encode_kind(kind, DOCUMENTS, column)))
    manifest = tokenize([path], tmp_path / "out.bin", text_column=column)
    assert read_back(tmp_path / "out.bin") == DOCUMENTS
    assert np.fromfile(tmp_path / "out.bin", "<u2").tolist() == expected_ids(DOCUMENTS)
    assert manifest["documents"] == len(DOCUMENTS) and manifest["characters"] == sum(map(len, DOCUMENTS))
    assert manifest["text_bytes"] == len("".join(DOCUMENTS).encode("utf-8"))
    assert manifest["inputs"][0]["sha256"] == corpus.hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
def test_records_longer_than_the_read_buffer(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", 7)
    documents = [*DOCUMENTS, 'quote " and \\ "" \n' * 40, "ü" * 100, "last"]
    path = write(tmp_path / f"input.{kind}", encode_kind(kind, documents, "text"))
    tokenize([path], tmp_path / "out.bin")
    assert read_back(tmp_path / "out.bin") == documents


def test_json_records_may_be_strings_or_follow_each_other(tmp_path):
    write(tmp_path / "a.json", '["one", "two"]')
    write(tmp_path / "b.json", '{"text": "three"}\n{"text": "four"} ')
    write(tmp_path / "c.jsonl", '\ufeff"five"\n\n{"text": null}\n{"text": "half \\ud83d pair"}\n')
    manifest = tokenize([tmp_path], tmp_path / "out.bin")
    assert read_back(tmp_path / "out.bin") == ["one", "two", "three", "four", "five", "half \ufffd pair"]
    assert manifest["empty_documents"] == 1 and manifest["repaired_records"] == 1


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view"])
@pytest.mark.parametrize("packed", [False, True])
def test_every_type_of_text_in_parquet_is_text(kind, packed, tmp_path):
    if not hasattr(pa, kind):
        pytest.skip("this pyarrow has no such type")
    texts = pa.array([*DOCUMENTS, None, *DOCUMENTS], getattr(pa, kind)())
    if packed:
        texts = texts.cast("large_string").dictionary_encode()
    pa.parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    tokenize([tmp_path / "a.parquet"], tmp_path / "out.bin")
    assert read_back(tmp_path / "out.bin") == DOCUMENTS * 2


def test_rows_of_csv_with_line_breaks_or_an_empty_column_more_or_less(tmp_path):
    rows = 'id,text,label\n1,a 5" pipe,x\n2,"many\n\nlines, ""quoted""\n",x\n3,short\n4,long,x,,\n\n5,"last\n",x'
    tokenize([write(tmp_path / "a.csv", rows)], tmp_path / "out.bin")
    assert read_back(tmp_path / "out.bin") == ['a 5" pipe', 'many\n\nlines, "quoted"\n', "short", "long", "last\n"]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 13, 14, 15, 16, 17, 4096])
def test_marker_lines_end_documents_and_nothing_else_does(newline, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", chunk)
    marker = "<|endoftext|>"
    middle = [f"a {marker} b", f"{marker} c", f" {marker}", "<|endof"]
    lines = [marker, "one", "", marker, *middle, marker, marker, "", marker, "last", marker, ""]
    tokenize([write(tmp_path / "in.txt", newline.join(lines))], tmp_path / "out.bin")
    assert read_back(tmp_path / "out.bin") == [f"one{newline}", newline.join(middle), "last"]


def test_a_marker_at_the_very_end_needs_no_line_break(tmp_path):
    tokenize([write(tmp_path / "in.txt", "one\n<|endoftext|>")], tmp_path / "out.bin")
    tokenize([write(tmp_path / "in2.txt", "one\n<|endoftext|>\r")], tmp_path / "out2.bin")
    assert read_back(tmp_path / "out.bin") == read_back(tmp_path / "out2.bin") == ["one"]


def test_a_hub_dataset_is_streamed(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(*names, **options):
        asked.append((names, options))
        return datasets.Dataset.from_dict({"text": DOCUMENTS}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    tokenize(["owner/name:config:test"], tmp_path / "out.bin")
    assert read_back(tmp_path / "out.bin") == DOCUMENTS
    assert asked == [(("owner/name", "config"), {"split": "test", "streaming": True})]


# Which files, in which order


def test_files_folders_and_globs_in_a_fixed_order_without_repeats(tmp_path):
    names = ("b.txt", "a/2.md", "a/10.txt", "c.JSONL", "skip.pdf", ".hidden.txt", ".git/x.txt", "x.manifest.json")
    for name in names:
        write(tmp_path / name, json.dumps(name) if name == "c.JSONL" else name)
    manifest = tokenize([tmp_path], tmp_path / "out.bin")
    assert read_back(tmp_path / "out.bin") == ["a/10.txt", "a/2.md", "b.txt", "c.JSONL"]
    assert manifest["files_left_out"] == 3
    tokenize([tmp_path / "b.txt", tmp_path / "**" / "*.txt", tmp_path / "skip.pdf"], tmp_path / "o.bin")
    assert read_back(tmp_path / "o.bin") == ["b.txt", "a/10.txt", "skip.pdf"]


# No token lost or duplicated


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.lists(
        st.lists(st.text(st.sampled_from("ab1 \n\t.'é漢\u00a0"), min_size=1, max_size=400), min_size=1, max_size=4),
        min_size=1,
        max_size=5,
    ),
    workers=st.integers(1, 4),
    piece=st.integers(1, 300),
    chunk=st.integers(1, 300),
    fraction=st.sampled_from([0.0, 0.3, 0.9]),
    kind=st.sampled_from(["txt", "jsonl"]),
    block_size=st.integers(2, 40),
)
@example([["a" * 300 + " b"]], 2, 8, 5, 0.0, "txt", 16)
def test_no_token_is_lost_or_duplicated(tmp_path_factory, files, workers, piece, chunk, fraction, kind, block_size):
    folder = tmp_path_factory.mktemp("property")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", piece)
        patch.setattr(pieces, "HASHED", 20)
        patch.setattr(readers, "CHUNK_BYTES", chunk)
        documents = []
        for i, texts in enumerate(files):
            write(folder / f"{i}.{kind}", encode_kind(kind, texts, "text"))
            documents += texts
        manifest = tokenize([folder], folder / "out.bin", workers=workers, validation_fraction=fraction)
    split = read_back(folder / "out.bin")
    if manifest["splits"].get("validation"):
        split += read_back(folder / "out.valid.bin")
    assert sorted(split) == sorted(documents)
    if fraction == 0:
        ids = expected_ids(documents)
        assert np.fromfile(folder / "out.bin", "<u2").tolist() == ids
        if len(ids) >= block_size:
            rows = np.concatenate(open_blocks(folder / "out.bin", block_size).train["input_ids"][:]).tolist()
            assert rows == ids[: len(ids) // block_size * block_size]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["a", "Z", "9", " ", "\n", "\t", "\r\n", "'s", ".", "é", "漢", "½", "٣", "\u0301", "\u00a0", "\x1c"]
        )
    )
    .map("".join)
    .filter(bool)
    | st.text(st.characters(exclude_categories=["Cs"]))
)
@example("a\n\n")
@example("a \n\n ")
@example("it's")
@example("don'")
def test_a_safe_cut_changes_no_id(text):
    cut = last_safe_cut(text)
    encode = load_encoding().encode_ordinary
    assert 0 <= cut < max(1, len(text))
    assert encode(text[:cut]) + encode(text[cut:]) == encode(text)


def test_a_run_without_a_place_to_cut_is_forced_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 1000)
    monkeypatch.setattr(pieces, "HASHED", 100)
    monkeypatch.setattr(pieces, "LONGEST_RUN", 4000)
    text = "x" * 9000 + " end " + " " * 9000 + "\n" + "漢" * 3000
    manifest = tokenize([write(tmp_path / "in.txt", text)], tmp_path / "out.bin")
    assert read_back(tmp_path / "out.bin") == [text]
    assert manifest["forced_cuts"] > 0


# The split


def test_the_split_is_stable_whatever_the_order_and_the_number_of_files(tmp_path):
    documents = [f"document {i} " + "words " * (i % 50) for i in range(300)]
    write(tmp_path / "one.txt", encode_kind("txt", documents, "text"))
    write(tmp_path / "two.jsonl", encode_kind("jsonl", documents[::-1], "text"))
    first = tokenize([tmp_path / "one.txt"], tmp_path / "a.bin", validation_fraction=0.2)
    tokenize([tmp_path / "two.jsonl"], tmp_path / "b.bin", validation_fraction=0.2, workers=3)
    assert sorted(read_back(tmp_path / "a.valid.bin")) == sorted(read_back(tmp_path / "b.valid.bin"))
    assert 30 < first["splits"]["validation"]["documents"] < 90
    tokenize([tmp_path / "one.txt"], tmp_path / "c.bin", validation_fraction=0.2, seed=1)
    assert sorted(read_back(tmp_path / "c.valid.bin")) != sorted(read_back(tmp_path / "a.valid.bin"))


def test_copies_of_a_document_land_on_one_side(tmp_path):
    documents = [f"document {i // 2}" for i in range(200)]
    path = write(tmp_path / "in.txt", encode_kind("txt", documents, ""))
    tokenize([path], tmp_path / "a.bin", validation_fraction=0.3)
    assert not set(read_back(tmp_path / "a.bin")) & set(read_back(tmp_path / "a.valid.bin"))


def test_a_lone_document_is_always_there_to_train_on(tmp_path):
    for seed in range(8):
        path = write(tmp_path / "in.txt", "a lone document")
        manifest = tokenize([path], tmp_path / f"{seed}.bin", validation_fraction=0.8, seed=seed)
        assert list(manifest["splits"]) == ["train"]
        assert read_back(tmp_path / f"{seed}.bin") == ["a lone document"]
        assert not (tmp_path / f"{seed}.valid.bin").exists()


# Output


def test_the_manifest_says_what_the_streams_hold(tmp_path):
    write(tmp_path / "in.txt", encode_kind("txt", DOCUMENTS, ""))
    manifest = tokenize([tmp_path / "in.txt"], tmp_path / "out.bin")
    written = json.loads((tmp_path / "out.manifest.json").read_text(encoding="utf-8"))
    assert written == {key: value for key, value in manifest.items() if key != "seconds"}
    assert written["tokenizer_hash"] == gpt2_hash() and written["dtype"] == "uint16"
    entry = written["splits"]["train"]
    assert entry["sha256"] == corpus.hashlib.sha256((tmp_path / "out.bin").read_bytes()).hexdigest()
    assert entry["tokens"] * 2 == os.path.getsize(tmp_path / "out.bin") and entry["largest_id"] == END_OF_TEXT


def test_an_arrow_folder_holds_the_same_ids(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(corpus, "ARROW_BATCH", 2048)
    documents = [f"story {i} " * 60 for i in range(40)]
    write(tmp_path / "in.txt", encode_kind("txt", documents, ""))
    tokenize([tmp_path / "in.txt"], tmp_path / "out.bin", validation_fraction=0.2)
    manifest = tokenize([tmp_path / "in.txt"], tmp_path / "folder", validation_fraction=0.2)
    loaded = datasets.load_from_disk(str(tmp_path / "folder"))
    for split, file in (("train", "out.bin"), ("validation", "out.valid.bin")):
        rows = loaded[split]["input_ids"][:]
        assert sum(rows, []) == np.fromfile(tmp_path / file, "<u2").tolist()
        assert manifest["splits"][split]["tokens"] == sum(map(len, rows))
    tokenize([tmp_path / "in.txt"], tmp_path / "folder", overwrite=True)
    assert list(datasets.load_from_disk(str(tmp_path / "folder"))) == ["train"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_another_tokenizer_and_a_large_vocabulary(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {chr(i): i for i in range(97, 123)} | {f"x{i}": i for i in range(200, 70_000)} | {"</s>": 70_000}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path / "words")
    path = write(tmp_path / "in.txt", "b c x60000 x69999 zz")
    manifest = tokenize([path], tmp_path / "out.bin", tokenizer_name=str(tmp_path / "words"))
    assert manifest["dtype"] == "uint32" and manifest["tokenizer_hash"] != gpt2_hash()
    assert np.fromfile(tmp_path / "out.bin", "<u4").tolist() == [98, 99, 60_000, 69_999, 97, 70_000]


def test_an_existing_output_is_kept_unless_told_otherwise(tmp_path):
    path = write(tmp_path / "in.txt", "some text")
    tokenize([path], tmp_path / "out.bin")
    before = (tmp_path / "out.bin").read_bytes()
    write(path, "other text")
    with pytest.raises(UserError, match="exists already.*--overwrite"):
        tokenize([path], tmp_path / "out.bin")
    assert (tmp_path / "out.bin").read_bytes() == before
    tokenize([path], tmp_path / "out.bin", overwrite=True)
    assert read_back(tmp_path / "out.bin") == ["other text"]
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "thesis.doc", "precious")
    with pytest.raises(UserError, match="holds something else"):
        tokenize([path], tmp_path / "folder", overwrite=True)
    assert (tmp_path / "folder" / "thesis.doc").read_text() == "precious"


@pytest.mark.parametrize("output", ["out.bin", "folder"])
def test_a_failure_leaves_nothing_behind_and_the_old_output_in_place(output, tmp_path):
    good = write(tmp_path / "a.txt", "good")
    tokenize([good], tmp_path / output)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    bad = write(tmp_path / "b.txt", b"fine for a while, then \xff")
    with pytest.raises(UserError, match="not UTF-8"):
        tokenize([good, bad], tmp_path / output, overwrite=True)
    bad.unlink()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == files


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("output", ["out.bin", "folder"])
def test_of_two_that_write_one_corpus_one_wins_whole(output, overwrite, tmp_path, monkeypatch):
    """The second begins after the first has looked, and is done before the first puts its files in place."""
    first, second = write(tmp_path / "a.txt", "first " * 50), write(tmp_path / "b.txt", "second and longer " * 70)
    real = corpus.one_at_a_time

    def late(folder):
        monkeypatch.setattr(corpus, "one_at_a_time", real)
        tokenize([second], tmp_path / output, validation_fraction=0.5, seed=3)
        return real(folder)

    monkeypatch.setattr(corpus, "one_at_a_time", late)
    if overwrite:
        tokenize([first], tmp_path / output, overwrite=True)
    else:
        with pytest.raises(UserError, match="exists already"):
            tokenize([first], tmp_path / output)
    manifest = json.loads(corpus.manifest_path(tmp_path / output).read_text())
    assert [Path(entry["name"]).name for entry in manifest["inputs"]] == ["a.txt" if overwrite else "b.txt"]
    if output == "out.bin":
        assert (tmp_path / output).stat().st_size == 2 * manifest["splits"]["train"]["tokens"]
        assert (tmp_path / "out.valid.bin").exists() == ("validation" in manifest["splits"])
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# Bad input


@pytest.mark.parametrize("chunk", [3, 1 << 18])
def test_text_that_is_not_utf8_is_named_with_its_position(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "CHUNK_BYTES", chunk)
    path = write(tmp_path / "latin.txt", "ü" * 10 + "abc")
    path.write_bytes(path.read_bytes() + b"caf\xe9 au lait")
    with pytest.raises(UserError, match=r"latin.txt is not UTF-8 text: byte 26 is 0xe9; convert it"):
        tokenize([path], tmp_path / "out.bin")
    path.write_bytes("ends in half a ü".encode()[:-1])
    with pytest.raises(UserError, match="byte 15 is 0xc3"):
        tokenize([path], tmp_path / "out.bin")
    assert not (tmp_path / "out.bin").exists()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize(
    "text", ["hello", "Привет, мир.\n" * 30, "一个人在一家店里。\n" * 30, "two\nlines 👍🏽, ä\n" * 30]
)
def test_the_encoding_of_wide_text_is_named(encoding, text, tmp_path):
    for name in ("a.txt", "a.jsonl", "a.csv", "a.txt.gz"):
        data = text.encode(encoding)
        path = write(tmp_path / name, gzip.compress(data) if name.endswith(".gz") else data)
        with pytest.raises(UserError) as error:
            tokenize([path], tmp_path / "out.bin")
        # iconv reads its UTF-16 and UTF-32 as Python does: by the mark, which it leaves out.
        named = re.search(r"`iconv -f (\S+) -t UTF-8 in.txt > out.txt`", str(error.value))[1]
        assert data.decode(named) == text


def test_a_nul_now_and_then_is_text(tmp_path):
    text = "\0 a list of names\0 with a NUL\0 behind each, as find -print0 writes it\0 and more\0"
    tokenize([write(tmp_path / "a.txt", text)], tmp_path / "out.bin")
    assert read_back(tmp_path / "out.bin") == [text]


def archive(kind: str) -> bytes:
    sink = io.BytesIO()
    if kind == "npz":
        np.savez(sink, np.arange(9))
    elif kind == "zip":
        with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("a.txt", "some words " * 99)
    else:
        with tarfile.open(fileobj=sink, mode="w:" + kind[4:]) as file:
            entry = tarfile.TarInfo("a.txt")
            entry.size = 1000
            file.addfile(entry, io.BytesIO(b"x" * 1000))
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.tar", archive("tar"), "is a tar archive"),
        ("a.tar.gz", archive("tar.gz"), "unpacked, is a tar archive"),
        ("a.tar.bz2", archive("tar.bz2"), "unpacked, is a tar archive"),
        ("a.txt.xz", archive("tar.xz"), "unpacked, is a tar archive"),
        ("a.tar.zst", COMPRESS[".zst"](archive("tar")), "unpacked, is a tar archive"),
        ("a.tgz", archive("tar.gz"), "is compressed with gzip"),
        ("a.zip", archive("zip"), "is a zip archive"),
        ("a.txt", archive("zip"), "is a zip archive"),
        ("a.npz", archive("npz"), "is an archive of arrays: .* numpy.save"),
        ("a.jsonl", gzip.compress(b'{"text": "x"}'), "is compressed with gzip"),
        ("a.txt", bz2.compress(b"x"), "is compressed with bzip2"),
        ("a.csv", lzma.compress(b"x"), "is compressed with xz"),
        ("a.txt", COMPRESS[".zst"](b"x"), "is compressed with zstd"),
        ("a.pdf", b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\n", "is a PDF"),
        ("a.txt", bytes(5000), "holds binary data"),
        ("a.txt", np.arange(1000, 50_000, 7).astype("<u4").tobytes(), "holds binary data"),
        ("a.ds", b"\0\1", "collect_shards"),
        ("a.idx", b"MMIDIDX", "name the .bin beside it"),
    ],
    ids=lambda value: value if isinstance(value, str) else "data",  # the bytes hold the time, and workers compare ids
)
def test_what_is_no_text_is_named(name, data, words, tmp_path):
    for work in (
        lambda path: tokenize([path], tmp_path / "out.bin"),
        lambda path: open_blocks(path, cache_dir=str(tmp_path / "cache")),
        lambda path: list(whole_documents(str(path))),
    ):
        with pytest.raises(UserError, match=words):
            work(write(tmp_path / name, data))


BAD = {
    "missing.txt": (None, "does not exist"),
    "nothing*.txt": (None, "no file matches"),
    "empty.txt": (b"", "the input is empty"),
    "only.txt": (b"<|endoftext|>\n", "the input is empty"),
    "tokens.bin": (b"\0\0", "holds tokens"),
    "folder/image.png": (b"x", "holds no text"),
    "a.jsonl": (b'{"text": "x"}\n{"text": \n', "line 2 is not JSON"),
    "b.jsonl": (b'{"body": "x"}\n', r"no field 'text' \(there is: body\).*--text_column"),
    "c.jsonl": (b'{"text": 5}\n', "is of type int"),
    "d.json": (b'[{"text": "x"}, {"text": "y"', "not JSON at record 2"),
    "e.json": (b'[{"text": "x"},', "ends inside the array"),
    "f.csv": (b"a,b\n1,2\n", r"no column 'text' \(there is: a, b\)"),
    "g.csv": (b"a,text\n1,2\n1\n", "line 3 has 1 columns"),
    "stray.csv": (b'id,text\n1,"a\nb"\n2,"a "stray" quote"\n3,c\n', "in line 4 is not CSV .*double those inside"),
    "open.csv": (b'id,text,x\n1,a,b\n2,"open,b\n3,c,d\n4,e,f\n', "in line 3 is not CSV .unexpected end"),
    "joined.csv": (b'id,text,x\n1,a,b\n2,"open,b\n3,c,d"\n4,e,f\n', "line 3 has 2 columns where the header has 3"),
    "none.tsv": (b'id\ttext\n1\t"Yes," he said.\n2\tNo.\n', "in line 2 is not CSV"),
    "comma.csv": (b"id,text\n1,one\n2,Hello, world\n", "line 3 has 3 columns"),
    "escaped.csv": (b'text\n"a \\"word\\" more"\n', "in line 2 is not CSV"),
    "h.parquet": (b"PAR1 nonsense", "not a whole parquet file"),
    "i.txt.gz": (gzip.compress(os.urandom(5000))[:-100], "damaged or cut off"),
    "j.txt.xz": (b"not xz", "damaged or cut off"),
    "k.txt.zst": (pa.compress(os.urandom(5000), "zstd", asbytes=True)[:-100], "damaged or cut off"),
    "l.txt.bz2": (bz2.compress(os.urandom(5000))[:-100], "damaged or cut off"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name, tmp_path):
    data, message = BAD[name]
    if data is not None:
        write(tmp_path / name, data)
    with pytest.raises(UserError, match=message):
        tokenize([tmp_path / Path(name).parts[0]], tmp_path / "out.bin")
    assert not (tmp_path / "out.bin").exists()


def test_a_record_beyond_the_limit_is_refused_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_RECORD", 1000)
    monkeypatch.setattr(readers, "CHUNK_BYTES", 100)
    for name, data in {"a.jsonl": '{"text": "%s"}', "a.json": '[{"text": "%s"}]', "a.csv": 'text\n"%s"'}.items():
        with pytest.raises(UserError, match="record of more than|field larger"):
            tokenize([write(tmp_path / name, data % ("x" * 10_000))], tmp_path / "out.bin")


@pytest.mark.parametrize("options", [{"validation_fraction": 1.0}, {"workers": 0}, {"tokenizer_name": "/no/such"}])
def test_bad_settings_are_refused(options, tmp_path):
    with pytest.raises(UserError):
        tokenize([write(tmp_path / "in.txt", "text")], tmp_path / "out.bin", **options)


@pytest.mark.parametrize("output", ["out.txt", "out.npy"])
def test_an_output_of_another_kind_is_refused(output, tmp_path):
    with pytest.raises(UserError, match="has to end in .bin"):
        tokenize([write(tmp_path / "in.txt", "text")], tmp_path / output)


@pytest.mark.parametrize("output", ["out.bin", "folder"])
def test_a_full_disk_is_one_sentence(output, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(pa.ipc, "new_stream", full)
    with pytest.raises(UserError, match="the disk is full"):
        tokenize([write(tmp_path / "in.txt", "text")], tmp_path / output)
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


def test_an_unreachable_hub_name_is_one_sentence(tmp_path, monkeypatch):
    import datasets

    def load_dataset(*_, **__):
        raise ConnectionError("no network\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"owner/name is neither a file .* \(no network\): check"):
        tokenize(["owner/name"], tmp_path / "out.bin")


# Memory and the script


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_one_long_line(tmp_path):
    script = (
        "import sys; from creature.data.text.corpus import tokenize_corpus;"
        "tokenize_corpus([sys.argv[1]], sys.argv[2], workers=2, progress=False, validation_fraction=0);"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    peaks = []
    for megabytes in (2, 24):
        text = write(tmp_path / "line.txt", b"a line without an end, " * (megabytes * 2**20 // 23))
        answer = subprocess.run(
            [sys.executable, "-c", script, str(text), str(tmp_path / f"{megabytes}.bin")],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        )
        peaks.append(int(answer.stdout) // 1024)
    assert peaks[1] < 500 and peaks[1] - peaks[0] < 40, peaks


def test_the_scripts_run_and_fail_in_one_line(tmp_path):
    def script(name, *arguments):
        command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    assert script("make_sample_corpus.py", "--tokens", 2000, "--output", "s.txt").returncode == 0
    made = script("tokenize_corpus.py", "--input", "s.txt", "--output", "c.bin", "--validation-fraction", "0.5")
    assert made.returncode == 0, made.stderr
    assert "bytes per token" in made.stdout and "c.valid.bin" in made.stdout and "Traceback" not in made.stderr
    assert len(read_back(tmp_path / "c.bin") + read_back(tmp_path / "c.valid.bin")) >= 5
    again = script("tokenize_corpus.py", "--input", "s.txt", "--output", "c.bin")
    assert again.returncode == 1 and again.stderr.startswith("error: ") and again.stderr.count("\n") == 1
    again = script("make_sample_corpus.py", "--output", "s.txt")
    assert again.returncode == 1 and again.stderr.startswith("error: s.txt exists already")
