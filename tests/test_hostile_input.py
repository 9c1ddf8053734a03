"""Hostile and broken input: one sentence, no hang, no hoard of memory, and nothing in a file is ever executed.

Good files are damaged at random, always in the same way (`derandomize`). What opens them may succeed, where the damage
does no harm, or say what is wrong in one short sentence; anything else is a bug.
"""

import functools
import gzip
import json
import os
import pickle
import shutil
import struct
import sys
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from damage import BROKEN_JSON, answer, changed, damaged, dumped, examples, no_hang
from hypothesis import example, given
from hypothesis import strategies as st

from creature import settings
from creature.data import DataArguments, load_data
from creature.data.text import readers
from creature.data.text.corpus import tokenize_corpus
from creature.data.text.readers import Documents
from creature.data.text.sources import find_sources
from creature.errors import UserError, run_main

TOKENS = np.random.default_rng(0).integers(0, 50257, 400).astype("<u2")


# ---------------------------------------------------------------------------------------------------------------------
# Token files
# ---------------------------------------------------------------------------------------------------------------------


def open_tokens(path, block_size=64):
    """Open, and read every row: a file that is accepted must be readable to the end."""
    splits, _ = load_data(DataArguments(str(path), cache_dir=str(path.parent / "cache")), block_size, 50304)
    for rows in splits.values():
        ids = np.asarray(rows["input_ids"][:])
        assert ids.shape[1] == block_size and 0 <= ids.min() and ids.max() < 50304


@functools.cache
def token_file(kind: str) -> bytes:
    import io

    sink = io.BytesIO()
    if kind == "npy":
        np.save(sink, TOKENS)
    elif kind == "pt":
        torch.save(torch.from_numpy(TOKENS.astype(np.int32)), sink)
    elif kind == "old.pt":
        torch.save(torch.from_numpy(TOKENS.astype(np.int32)), sink, _use_new_zipfile_serialization=False)
    else:
        if kind == "header.bin":  # as llm.c and modded-nanogpt
            sink.write(np.array([20240520, 1, len(TOKENS), *[0] * 253], "<i4").tobytes())
        sink.write(TOKENS.tobytes())
    return sink.getvalue()


@pytest.mark.parametrize("kind", ["bin", "header.bin", "npy", "pt", "old.pt"])
def test_a_damaged_token_file_is_accepted_or_refused_in_words(kind, tmp_path):
    @examples(60)
    @given(damaged(token_file(kind)))
    def check(data):
        path = tmp_path / f"tokens.{kind}"
        path.write_bytes(data)
        answer(open_tokens, path)

    check()


def test_a_damaged_index_of_megatron_is_accepted_or_refused_in_words(tmp_path):
    TOKENS.tofile(tmp_path / "a.bin")
    lengths, ends = np.array([100, 250, 50], "<i4"), np.arange(4, dtype="<i8")
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 3, 4)

    @examples(100)
    @given(damaged(head + lengths.tobytes() + np.array([0, 200, 700], "<i8").tobytes() + ends.tobytes()))
    def check(data):
        (tmp_path / "a.idx").write_bytes(data)
        answer(open_tokens, tmp_path / "a.bin")

    check()


def test_a_tensor_that_is_larger_in_memory_than_on_disk_is_refused(tmp_path):
    torch.save(torch.zeros(1, dtype=torch.int32).expand(1 << 34), tmp_path / "expanded.pt")
    torch.save(torch.zeros(1 << 10, dtype=torch.int32)[::2], tmp_path / "strided.pt")
    torch.save(torch.sparse_coo_tensor([[0]], [1], (1 << 34,), check_invariants=True), tmp_path / "sparse.pt")
    torch.save(torch.zeros(1 << 34, dtype=torch.int32, device="meta"), tmp_path / "meta.pt")
    for path in sorted(tmp_path.glob("*.pt")):
        assert "torch.save" in answer(open_tokens, path), path.name


MANIFEST = {
    "dtype": "uint16",
    "tokenizer": "gpt2",
    "tokenizer_hash": "",
    "splits": {
        "train": {"file": "a.bin", "tokens": len(TOKENS), "largest_id": 50256},
        "validation": {"file": "a.valid.bin", "tokens": 9, "largest_id": 7},
    },
}


def test_a_damaged_manifest_is_accepted_or_refused_in_words(tmp_path):
    TOKENS.tofile(tmp_path / "a.bin")
    from creature.data.text.tokenizer import gpt2_hash

    manifest = MANIFEST | {"tokenizer_hash": gpt2_hash()}

    @examples(100)
    @given(changed(manifest).map(dumped) | st.sampled_from(BROKEN_JSON) | damaged(dumped(manifest).encode()))
    @example(dumped(manifest))
    def check(text):
        (tmp_path / "a.manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        answer(open_tokens, tmp_path / "a.bin")

    check()


def test_a_damaged_arrow_folder_is_accepted_or_refused_in_words(tmp_path):
    good = tmp_path / "good"
    datasets.Dataset.from_dict({"input_ids": [[1, 2, 3, 4] * 16] * 20}).save_to_disk(good)
    contents = {path.name: path.read_bytes() for path in good.iterdir()}
    arrow = next(name for name in contents if name.endswith(".arrow"))
    jsons = {name: json.loads(data) for name, data in contents.items() if name.endswith(".json")}
    damage = st.sampled_from(sorted(jsons)).flatmap(
        lambda name: st.tuples(st.just(name), changed(jsons[name]).map(lambda d: dumped(d).encode()))
    ) | st.tuples(st.just(arrow), damaged(contents[arrow]))  # fmt: skip

    @examples(60)
    @given(damage)
    def check(damage):
        folder = tmp_path / "bad"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, data in (contents | dict([damage])).items():
            (folder / name).write_bytes(data)
        answer(open_tokens, folder)

    check()


# Text


GOOD_TEXT = {
    "a.txt": "some words\n<|endoftext|>\nand more äöü 漢字\n".encode(),
    "a.jsonl": b'{"text": "some words", "id": 1}\n{"text": "more"}\n',
    "a.json": b'[{"text": "some words", "more": [1, {"x": "]"}]}, {"text": "more"}]',
    "a.csv": b'id,text\n1,"some, words"\n2,more\n',
}


@pytest.mark.parametrize("name", GOOD_TEXT)
def test_damaged_text_is_accepted_or_refused_in_words(name, tmp_path):
    deep = [b"[" * 100_000, b'{"text":' * 100_000, b'{"text": ' + b"1" * 5000 + b"}", b'{"' + b"x" * 99_999 + b'": 1}']

    @examples(40)
    @given(damaged(GOOD_TEXT[name]) | st.binary(max_size=200) | st.sampled_from(deep))
    def check(data):
        path = tmp_path / name
        path.write_bytes(data)
        answer(tokenize_corpus, [str(path)], str(tmp_path / "out.bin"), progress=False, workers=1, overwrite=True)

    check()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a pipe among the files is a thing of POSIX")
def test_pipes_devices_and_links_in_a_folder_are_left_out(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("some words")
    os.mkfifo(folder / "b.txt")
    (folder / "c.txt").symlink_to("/dev/zero")
    (folder / "d.txt").symlink_to(folder / "nowhere")
    (folder / "e").symlink_to(folder)
    for i, name in enumerate((str(folder), str(folder / "*"), str(folder / "**"))):
        with no_hang():
            manifest = tokenize_corpus([name], str(tmp_path / f"{i}.bin"), progress=False, workers=1)
        assert [Path(entry["name"]).name for entry in manifest["inputs"]] == ["a.txt"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are Unicode")
def test_a_file_name_that_is_not_unicode_is_accepted(tmp_path):
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / name).write_text("some words")
    manifest = tokenize_corpus([str(tmp_path)], str(tmp_path / "out.bin"), progress=False, workers=1)
    assert manifest["inputs"][0]["name"].endswith("caf\ufffd.txt")
    (tmp_path / "out.bin").rename(tmp_path / os.fsdecode(b"\xe9.bin"))
    TOKENS.tofile(tmp_path / os.fsdecode(b"\xe9.bin"))
    assert answer(open_tokens, tmp_path / os.fsdecode(b"\xe9.bin")) is None


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x.bin", "a\0b", "a\0*", "\udcff/x", "x" * 5000, "**", "a/b\n"])
def test_an_impossible_name_is_refused_in_words(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the Hub"))
    for work in (
        lambda: load_data(DataArguments(name), 64, 50304, progress=False),
        lambda: tokenize_corpus([name], str(tmp_path / "out.bin"), progress=False),
        lambda: tokenize_corpus([__file__], name, progress=False),
    ):
        with no_hang(), pytest.raises(SystemExit):
            run_main(work)


# ---------------------------------------------------------------------------------------------------------------------
# YAML and the command line
# ---------------------------------------------------------------------------------------------------------------------

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{c}: &{c} [{', '.join(['*' + p] * 10)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
)
YAMLS = [
    "model: !!python/object/apply:os.system ['touch trapped']\n",
    "model: !!python/name:os.system\n",
    "model:\n  ? !!set {a}\n  : 1\n",
    "model: {hidden_size: !!int ''}\n",
    "model: {hidden_size: !!float ''}\n",
    "model: {hidden_size: !!bool perhaps}\n",
    "model: {hidden_size: !!timestamp soon}\n",
    "model: {hidden_size: 2001-99-99}\n",
    "model: &m\n  loss_weights: *m\n",
    "training: {save_steps: .nan, logging_steps: .inf, eval_steps: -.inf}\n",
    'data: {data: "a\\0b", cache_dir: "\\0"}\n',
    f"model: {{hidden_size: -0x{'f' * 6000}}}\n",
    f"training: {{tokens_per_step: -0x{'f' * 6000}}}\n",
    "model: " + "[" * 20_000,
    "{" * 20_000,
    "model: {" + ", ".join(f"field_{i}: {i}" for i in range(3_000)) + "}\n",
    LAUGHS + "model: {loss_weights: {internal_text: *i}}\n",
    "%YAML 9.9\n---\nmodel: {}\n--- \ntraining: {}\n",
    "!!omap [model: {hidden_size: 3}]\n",
    "\u2028model: {hidden_size: 64}\n",
]


@pytest.fixture
def fields_once(monkeypatch):
    """Read the table of fields once, not for every example."""
    monkeypatch.setattr(settings, "known_fields", functools.cache(settings.known_fields))


def settle(argv) -> None:
    """What happens to settings before torch is needed; then what the model's own checks say."""
    from creature.job import build_config

    build_config(settings.parse_settings(argv))


def test_a_damaged_yaml_file_is_accepted_or_refused_in_words(tmp_path, monkeypatch, fields_once):
    monkeypatch.chdir(tmp_path)
    good = Path(__file__).parent.parent / "configs" / "small_config.yaml"
    good = "".join(line for line in good.read_text().splitlines(True) if not line.startswith("#"))
    import yaml

    document = yaml.safe_load(good)

    @examples(60)
    @given(
        changed(document).map(lambda d: dumped(d).encode())
        | damaged(good.encode())
        | st.sampled_from(YAMLS).map(str.encode)
    )
    def check(data):
        (tmp_path / "c.yaml").write_bytes(data)
        answer(settle, ["--config", str(tmp_path / "c.yaml")])

    check()
    for text in YAMLS:
        (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
        answer(settle, ["--config", str(tmp_path / "c.yaml")])
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


FLAGS = ["--config", "--data", "--resume", "--dry_run", "--max_steps", "--hidden_size", "--learning-rate", "--tf32"]
FLAGS += ["--loss_weights", "--report_to", "--no_tf32", "--eval_steps", "--output_dir", "--lr_scheduler_kwargs"]
FLAGS += ["--block_size", "--validation_fraction", "--save_steps", "--", "-", "-h3", "--optim", "--rope_parameters"]
FLAGS += ["--x=1", "--tokens_per_step"]
WORDS = ["", " ", "3", "-1", "0", "1e999", "nan", "-inf", "0x10", "1_0,0", "true", "none", "~nobody/x", "../..", "{"]
WORDS += ["[" * 5000, "{a: !!int ''}", "{a: &a [*a]}", "!!python/name:os.system", "9" * 5000, "9" * 15, "x" * 5000]
WORDS += ["\udcff", "\x1b[2J", "%s%n", "@f"]
WORDS += ["{internal_text: -0x" + "f" * 6000 + "}", "{? !!set {a} : 1}", "[!!timestamp x]", "{internal_text: .nan}"]


@examples(100)
@given(argv=st.lists(st.sampled_from(FLAGS) | st.sampled_from(WORDS) | st.text(max_size=8), max_size=6))
def test_any_command_line_is_accepted_or_refused_in_words(fields_once, argv):
    printed = []
    with pytest.MonkeyPatch.context() as patch, no_hang():
        patch.setattr(sys, "stderr", type("Sink", (), {"write": printed.append, "flush": lambda self: None})())
        patch.setattr(sys, "stdout", type("Sink", (), {"write": lambda *_: None, "flush": lambda self: None})())
        with pytest.raises(SystemExit) as end:
            run_main(lambda: settle(argv))
    text = "".join(printed)
    assert end.value.code in (0, 1, 2)
    if end.value.code == 1:
        assert text.startswith("error: ") and text.count("\n") == 1 and text[:-1].isprintable() and len(text) < 5000


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (["x" * 1001], "record of more than"),
        (["some words " * 90] * 300, "unpacks .* bytes to .*, which no text does"),
        ([b"bytes"], "the column 'text' is of type binary, not text; .*--text_column"),
        ([["a", "b"]], "is of type list<.*>, not text"),
    ],
)
def test_a_parquet_column_that_cannot_be_text_is_refused_in_words(tmp_path, monkeypatch, column, words):
    monkeypatch.setattr(readers, "MAX_RECORD", 1000)
    monkeypatch.setattr(readers, "MAX_UNPACKED", 100_000)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", use_dictionary=False, compression="zstd")
    with pytest.raises(UserError, match=words):
        list(Documents(find_sources([str(tmp_path / "a.parquet")])[0][0]))


def peak_of(work) -> int:
    """Bytes by which the memory of this process grew at most while `work` ran, whatever it ended with."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

    before = status("VmRSS")
    answer(work)
    return status("VmHWM") - before


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from Linux's /proc")
def test_no_file_takes_more_than_twice_the_memory_of_a_good_one(tmp_path):
    """Small files that speak of much: against good ones of some megabytes, with 32 MiB for what allocators keep."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.mkdir()
    bad.mkdir()
    count = 1 << 20
    torch.save(torch.ones(count, dtype=torch.int32), good / "a.pt")
    np.save(good / "a.npy", np.ones(count, np.int32))
    np.ones(count, "<i2").tofile(good / "a.bin")
    with gzip.open(good / "a.jsonl.gz", "wt") as file:
        file.write('{"text": "' + "some words " * 100_000 + '"}\n')

    with zipfile.ZipFile(good / "a.pt") as whole, zipfile.ZipFile(bad / "zip.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in whole.namelist():
            bomb.writestr(name, pickle.dumps(" " * (1 << 28)) if name.endswith("data.pkl") else whole.read(name))
    torch.save(torch.ones(1, dtype=torch.int32).expand(1 << 28), bad / "expanded.pt")
    header = (good / "a.npy").read_bytes()[:128]
    (bad / "a.npy").write_bytes(header.replace(b"(1048576,)", b"(1<<30,)  ") + b"\0" * 999)
    (bad / "b.npy").write_bytes(header.replace(b"(1048576,)", b"(99999999,") + b"\0" * 999)
    (bad / "a.bin").write_bytes(bytes(64))
    manifest = MANIFEST | {"splits": {"train": {"file": "a.bin", "tokens": 1 << 60, "largest_id": 1}}}
    (bad / "a.manifest.json").write_text(dumped(manifest))
    (bad / "a.jsonl.gz").write_bytes(b"".join(gzip.compress(b"x" * (1 << 24), 1) for _ in range(16)))
    (bad / "a.yaml").write_text(LAUGHS + "model: {loss_weights: {internal_text: *i}}\n")

    text = "some words " * 500_000
    pq.write_table(pa.table({"text": [text] * 2}), good / "a.parquet")
    packed = {"dictionary_pagesize_limit": 1 << 30}, {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"}
    for number, options in enumerate(packed):  # each text once in the file, however many rows mean it
        pq.write_table(pa.table({"text": [*"abc", *[text] * 80]}), bad / f"{number}.parquet", **options)
    pq.write_table(pa.table({"text": [text] * 80}), bad / "plain.parquet", use_dictionary=False, compression="zstd")

    def work(path):
        if path.suffix == ".parquet":
            return lambda: sum(len(text) for text, _ in Documents(find_sources([str(path)])[0][0]))
        if path.suffix == ".gz":
            return lambda: tokenize_corpus([str(path)], str(tmp_path / "out.bin"), overwrite=True, progress=False)
        if path.suffix == ".yaml":
            return lambda: settle(["--config", str(path)])
        return lambda: open_tokens(path, 1 << 14)

    (good / "a.yaml").write_text("model: {hidden_size: 64}\n")
    for path in good.iterdir():  # what is imported, and kept by allocators, once
        answer(work(path))
    allowed = {path.suffix: 2 * peak_of(work(path)) + (32 << 20) for path in good.iterdir()}
    for path in sorted(path for path in bad.iterdir() if path.suffix != ".json"):
        assert peak_of(work(path)) <= allowed[path.suffix], path.name
