"""Tokenizing speed: this library on one core and on all, against `datasets.map` with the stock tokenizer.

  python benchmarks/tokenize.py                          # 20 MB of generated stories
  python benchmarks/tokenize.py --input books/ --megabytes 50

Every row tokenizes the same documents and must give the same ids.
"""

import sys
from pathlib import Path

# Run as a script, this file's folder comes first on the path, where "tokenize" would be this file instead of the
# standard library's module that half of Python imports. Put the project there instead.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse  # noqa: E402
import hashlib  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402

from creature.errors import UserError, run_main  # noqa: E402
from creature.files import user_path  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", type=user_path, help="text to tokenize (default: generated stories)")
    parser.add_argument("--megabytes", type=float, default=20, help="how much of it (default 20)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.megabytes <= 0:
        raise UserError("--megabytes has to be positive: 20 takes about half a minute")
    import json

    import datasets
    import numpy as np

    from creature.data.text.corpus import tokenize_corpus
    from creature.data.text.tokenizer import END_OF_TEXT, load_tokenizer
    from creature.hardware import cpu_cores

    cores = cpu_cores()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        documents = collect(arguments.input, int(arguments.megabytes * 1e6))
        size = sum(len(document.encode("utf-8")) for document in documents)
        text = Path(folder, "documents.jsonl")
        with open(text, "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": document}) + "\n" for document in documents)
        print(f"{len(documents):,} documents, {size / 1e6:.1f} MB of text, {cores} cores")
        print(f"{'':<44}{'seconds':>9}{'MB/s':>8}{'M tokens/s':>12}   ids")
        hashes = []

        def row(name: str, seconds: float, ids: np.ndarray) -> None:
            hashes.append(hashlib.sha256(ids.astype("<u2")).hexdigest())
            same = "the same" if hashes[0] == hashes[-1] else "DIFFERENT"
            print(f"{name:<44}{seconds:>9.2f}{size / 1e6 / seconds:>8.1f}{len(ids) / 1e6 / seconds:>12.2f}   {same}")

        for workers in sorted({1, cores}):
            output = Path(folder, f"corpus{workers}.bin")
            manifest = tokenize_corpus([str(text)], str(output), workers=workers, validation_fraction=0, progress=False)
            name = f"tokenize_corpus, {workers} thread{'s' * (workers > 1)}"
            row(name, manifest["seconds"], np.fromfile(output, "<u2"))

        tokenizer = load_tokenizer()

        def stock(batch: dict) -> dict:
            return {"input_ids": [ids + [END_OF_TEXT] for ids in tokenizer(batch["text"])["input_ids"]]}

        for processes in sorted({1, cores}):
            rows = datasets.load_dataset("json", data_files=str(text), split="train", cache_dir=folder)
            began = time.perf_counter()
            ids = rows.map(
                stock,
                batched=True,
                num_proc=processes if processes > 1 else None,
                remove_columns=["text"],
                load_from_cache_file=False,  # or the second way would only load what the first one did
            )
            name = f"datasets.map, {processes} process{'es' * (processes > 1)}"
            seconds = time.perf_counter() - began
            flat = [np.asarray(one["input_ids"], "<u2") for one in ids.with_format("numpy")]
            row(name, seconds, np.concatenate(flat))
    if len(set(hashes)) > 1:
        raise UserError("the ids differ: please report this, with the text")


def collect(inputs: list[str] | None, size: int) -> list[str]:
    """Documents of about `size` bytes together."""
    documents, total = [], 0
    for document in read(inputs):
        documents.append(document)
        total += len(document.encode("utf-8"))
        if total >= size:
            break
    return documents


def read(inputs: list[str] | None):
    from creature.data.text.readers import Documents
    from creature.data.text.sources import find_sources
    from creature.data.text.stories import generate_stories

    if not inputs:
        yield from generate_stories()
        return
    for source in find_sources(inputs)[0]:
        yield from Documents(source).whole()


if __name__ == "__main__":
    run_main(main)
