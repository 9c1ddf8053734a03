"""Looking at a corpus: every figure of the report against a plain count, duplicates, samples, memory, refusals."""

import functools
import tracemalloc
from collections import Counter

import matplotlib.figure
import numpy as np
import pyarrow as pa
import pytest

from creature.data.text import inspection
from creature.data.text.corpus import tokenize_corpus
from creature.data.text.inspection import inspect_stream, read_tokens
from creature.data.text.token_stream import TokenStream
from creature.plots import plot_lengths

END = 50256


def stream_of(path, documents, dtype="uint16"):
    """A .bin with an end-of-text after each document but the last, which is left open where it is None."""
    np.concatenate([np.append(document, END) for document in documents]).astype(dtype).tofile(path)
    return TokenStream("bin", (str(path),), dtype)


def random_documents(count, seed=0, longest=300):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 5000, generator.integers(0, longest)) for _ in range(count)]


def changed(document, share, seed=0):
    """The document with a share of its 8-token windows touched, in one stretch."""
    copy = document.copy()
    copy[: int(share * len(copy))] = np.random.default_rng(seed).integers(5000, 9000, int(share * len(copy)))
    return copy


@pytest.mark.parametrize("chunk", [7, 64, 1 << 20])
def test_documents_and_tokens_are_counted_wherever_a_chunk_ends(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(inspection, "CHUNK", chunk)
    documents = random_documents(40)
    stream = stream_of(tmp_path / "a.bin", documents)
    found = inspect_stream(stream, END, 50259)
    assert found.lengths.tolist() == [len(document) for document in documents]
    expected = Counter(np.concatenate(documents).tolist())
    assert {i: n for i, n in enumerate(found.counts.tolist()) if n} == expected | {END: 40}
    assert found.tokens == sum(map(len, documents)) + 40 and not found.unended
    for start, length, document in zip(found.starts, found.lengths, documents, strict=True):
        assert np.array_equal(read_tokens(stream, start, length), document)


def test_an_open_last_document_and_no_document_at_all_are_seen(tmp_path):
    np.arange(10, dtype=np.uint16).tofile(tmp_path / "open.bin")
    found = inspect_stream(TokenStream("bin", (str(tmp_path / "open.bin"),)), END, 50259)
    assert found.lengths.tolist() == [10] and found.unended
    np.array([END, END, 5], dtype=np.uint16).tofile(tmp_path / "empty.bin")
    found = inspect_stream(TokenStream("bin", (str(tmp_path / "empty.bin"),)), END, 50259)
    assert found.lengths.tolist() == [0, 0, 1] and found.copies.tolist() == [2, 2, 1]


@pytest.mark.parametrize("chunk", [50, 1 << 20])
def test_equal_documents_are_found_and_only_those(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(inspection, "CHUNK", chunk)
    first, second, third = (document[:5] for document in random_documents(3, longest=100))
    documents = [first, second, first, third, first, second, first[:-1], np.append(first, 7)]
    found = inspect_stream(stream_of(tmp_path / "a.bin", documents), END, 50259)
    assert found.copies.tolist() == [3, 2, 3, 1, 3, 2, 1, 1]
    assert np.flatnonzero(found.repeated).tolist() == [2, 4, 5]


def test_similar_documents_are_found_and_others_are_not(tmp_path):
    generator = np.random.default_rng(1)
    originals = [generator.integers(0, 5000, 300) for _ in range(100)]
    shares = {0.02: 0.95, 0.7: 0.0}  # touched -> least share of copies to be found; most is checked below
    for touched in shares:
        copies = [changed(document, touched, seed) for seed, document in enumerate(originals)]
        found = inspect_stream(stream_of(tmp_path / "a.bin", [*originals, *copies]), END, 50259)
        assert not found.similar[:100].any() and not found.repeated.any()
        part = found.similar[100:].mean()
        assert part >= 0.95 if touched < 0.1 else part <= 0.3, (touched, part)
    equal = inspect_stream(stream_of(tmp_path / "b.bin", [*originals, *originals]), END, 50259)
    assert equal.repeated.sum() == 100 and not equal.similar.any()  # counted once, as equal


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "CHUNK", 1 << 14)
    peaks = []
    for size in (1 << 18, 1 << 22):
        ids = np.random.default_rng(0).integers(0, 50000, size).astype(np.uint16)
        ids[:: size // 8] = END
        ids.tofile(tmp_path / "a.bin")
        del ids
        tracemalloc.start()
        inspect_stream(TokenStream("bin", (str(tmp_path / "a.bin"),)), END, 50259)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + (1 << 20), peaks  # the corpus itself has 8 MB


def test_arrow_batches_are_one_stream(tmp_path):
    documents = random_documents(10)
    ids = np.concatenate([np.append(document, END) for document in documents]).astype(np.uint16)
    schema = pa.schema({"input_ids": pa.list_(pa.uint16())})
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), schema) as writer:
        for start in range(0, len(ids), 100):
            part = ids[start : start + 100]
            rows = pa.ListArray.from_arrays(pa.array([0, len(part)], pa.int32()), part)
            writer.write_batch(pa.record_batch([rows], schema=schema))
    stream = TokenStream("arrow", (str(tmp_path / "a.arrow"),))
    found = inspect_stream(stream, END, 50259)
    assert found.lengths.tolist() == [len(document) for document in documents]
    assert np.array_equal(read_tokens(stream, found.starts[5], found.lengths[5]), documents[5])


# ---------------------------------------------------------------------------------------------------------------------
# The script
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tool(run_script):
    return functools.partial(run_script, "inspect_corpus")


STORIES = [f"Once upon a time there were {number} foxes. They met a hen by the river." for number in range(30)]


@pytest.fixture
def corpus(tmp_path):
    """30 stories, the first three times, as a stream and as an Arrow folder."""
    text = "\n<|endoftext|>\n".join([*STORIES, STORIES[0], STORIES[0]])
    (tmp_path / "stories.txt").write_text(text, encoding="utf-8")
    for output in ("corpus.bin", "corpus"):
        tokenize_corpus([str(tmp_path / "stories.txt")], str(tmp_path / output), progress=False, validation_fraction=0)
    return tmp_path


@pytest.mark.parametrize("name", ["corpus.bin", "corpus", "stories.txt"])
def test_the_report(tool, corpus, name):
    code, out, err = tool(name, "--samples", 40, "--output", "figure.png")
    assert code == 0, err
    facts = {line[:22].strip(): line[22:] for line in out.split("\n\n")[0].splitlines()}
    assert facts["documents"] == "32" and facts["exact duplicates"].startswith("2 documents (6.25%)")
    assert "longer than 2,048" in facts and "note" not in facts
    assert "document 0, 3 times there" in out
    assert all(out.count(story) >= 1 for story in STORIES)  # samples are decoded
    assert "' river'" in out and out.endswith("\nfigure.png\n")
    assert (corpus / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_seed_chooses_the_samples_and_block_size_what_is_long(tool, corpus):
    first, again, other = (tool("corpus.bin", "--samples", 3, "--seed", seed)[1] for seed in (0, 0, 1))
    assert first == again != other and first.endswith("\ncorpus.png\n")
    assert "longer than 5         32 documents (100.00%)" in tool("corpus.bin", "--block_size", 5)[1]


def test_a_stream_without_ends_is_told(tool, tmp_path):
    np.arange(500, dtype=np.uint16).tofile(tmp_path / "raw.bin")
    out = tool("raw.bin")[1]
    assert "the whole stream counts as one document" in out
    np.array([1, 2, END, 3], dtype=np.uint16).tofile(tmp_path / "cut.bin")
    assert "the stream may be cut off" in tool("cut.bin")[1]


def test_it_refuses_in_words(tool, corpus):
    code, _, err = tool("missing.bin")
    assert code == 1 and err.startswith("error: missing.bin does not exist")
    assert "has no validation split" in tool("corpus.bin", "--split", "validation")[2]
    np.array([1, 60000], dtype=np.uint16).tofile(corpus / "foreign.bin")
    assert "has id 60000 at position 1" in tool("foreign.bin")[2]
    assert "end in .png" in tool("corpus.bin", "--output", "x.jpg")[2] and not list(corpus.glob("x.*"))
    assert tool("corpus.bin", "--top", 0)[0] == 2


def test_the_figure_shows_the_lengths(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, *a, **k: saved.append(figure))
    plot_lengths(np.array([0, 1, 10, 10, 10, 3000]), tmp_path / "a.png", "title", 2048)
    (hist,) = saved[0].axes
    assert sum(bar.get_height() for bar in hist.patches) == 6  # none falls outside
    assert [text.get_text() for text in hist.get_legend().get_texts()] == ["median 10", "block 2,048"]
    plot_lengths(np.array([4]), tmp_path / "one.png")  # a single document
