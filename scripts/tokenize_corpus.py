"""Tokenize text into a corpus to train on.

examples:
  python scripts/tokenize_corpus.py --input books/ --output data/corpus.bin
  python scripts/tokenize_corpus.py --input a.txt "more/*.jsonl.zst" --text_column content --output data/corpus.bin
  python scripts/tokenize_corpus.py --input roneneldan/TinyStories --output data/tinystories
  python scripts/tokenize_corpus.py --input HuggingFaceFW/fineweb-edu:sample-10BT --train_tokens 1000000000 \\
      --output data/fineweb.bin

Reads .txt, .md, .jsonl, .json, .csv, .tsv and .parquet files, plain or as .gz, .bz2, .xz, .zst, and datasets on the
Hub (owner/name, owner/name:configuration:split, or a folder laid out as one), as a stream. A file of plain text is one
document, or several separated by lines that read <|endoftext|>; an end-of-text token follows each. Memory stays small
whatever the size of the input. Writes corpus.bin (uint16 ids), corpus.valid.bin and corpus.manifest.json, or an Arrow
folder.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from creature.errors import run_main  # noqa: E402
from creature.files import user_path  # noqa: E402
from creature.settings import CORPUS_FLAGS, spellings  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", nargs="+", type=user_path, required=True, metavar="NAME", help="files, folders, globs, or Hub names")
    add(
        "--output",
        type=user_path,
        required=True,
        help="a .bin file, or (without an ending) a folder for an Arrow dataset",
    )
    add(*spellings("validation_fraction"), **CORPUS_FLAGS["validation_fraction"])
    add("--seed", type=int, default=0, help="another seed gives another validation split (default 0)")
    add("--workers", type=int, metavar="N", help="threads (default: all cores)")
    add(
        *spellings("tokenizer_name"),
        type=user_path,
        default="gpt2",
        metavar="NAME",
        help="gpt2 (needs no network), a folder with a saved tokenizer, or a Hub name (default gpt2)",
    )
    add(*spellings("text_column"), **CORPUS_FLAGS["text_column"])
    add(
        *spellings("train_tokens"),
        type=int,
        metavar="N",
        help="stop after that many training tokens, and read the input no further",
    )
    add("--overwrite", action="store_true", help="replace an output that exists")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from creature.data.text.corpus import tokenize_corpus

    manifest = tokenize_corpus(
        arguments.input,
        arguments.output,
        validation_fraction=arguments.validation_fraction,
        seed=arguments.seed,
        workers=arguments.workers,
        tokenizer_name=arguments.tokenizer_name,
        text_column=arguments.text_column,
        train_tokens=arguments.train_tokens,
        overwrite=arguments.overwrite,
    )
    report(arguments, manifest)


def report(arguments: argparse.Namespace, manifest: dict) -> None:
    tokens, characters, text_bytes = manifest["tokens"], manifest["characters"], manifest["text_bytes"]
    size = tokens * (2 if manifest["dtype"] == "uint16" else 4)
    rows = [
        ("documents", f"{manifest['documents']:,}"),
        ("characters", f"{characters:,}"),
        ("tokens", f"{tokens:,}"),
        ("characters per token", f"{characters / tokens:.3f}"),
        ("bytes per token", f"{text_bytes / tokens:.3f}"),
        ("size", f"{size / 1e6:,.1f} MB as {manifest['dtype']}, from {text_bytes / 1e6:,.1f} MB of text"),
        ("time", f"{manifest['seconds']:.1f} s, {text_bytes / 1e6 / manifest['seconds']:.1f} MB/s"),
    ]
    for name, entry in manifest["splits"].items():
        rows.append((name, f"{entry['tokens']:,} tokens in {entry['documents']:,} documents: {entry['file']}"))
    if manifest["validation_fraction"] and "validation" not in manifest["splits"]:
        rows.append(("validation", "no document fell into it; a run holds out the end of the token stream"))
    for name in ("empty_documents", "forced_cuts", "repaired_records", "files_left_out"):
        if manifest[name]:
            rows.append((name.replace("_", " "), f"{manifest[name]:,}"))
    rows.append(("written to", arguments.output))
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    run_main(main)
