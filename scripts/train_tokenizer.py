"""Train a tokenizer on your own text: byte-level BPE, as GPT-2 has it.

examples:
  python scripts/train_tokenizer.py --input books/ --output data/tokenizer
  python scripts/train_tokenizer.py --input "more/*.jsonl.zst" --text_column content --vocab_size 32768 \\
      --output data/tokenizer
  python scripts/tokenize_corpus.py --input books/ --tokenizer_name data/tokenizer --output data/corpus.bin

Takes the input that tokenize_corpus.py takes, and writes a folder that AutoTokenizer loads. Give that folder to
tokenize_corpus.py and to run_clm_creature.py as --tokenizer_name; the model takes its vocab_size from it. Any text can
be encoded and decodes to the same bytes, whatever language the tokenizer was trained on.
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
    add("--output", type=user_path, required=True, metavar="FOLDER", help="a new folder for the tokenizer")
    add(
        *spellings("vocab_size"),
        type=int,
        default=8192,
        metavar="N",
        help="ids, with the special tokens, rounded up to a multiple of 64; up to 65,536 a token takes 2 bytes on disk "
        "(default 8192)",
    )
    add(*spellings("text_column"), **CORPUS_FLAGS["text_column"])
    add(
        *spellings("train_characters"),
        type=int,
        metavar="N",
        help="learn from about the first N characters; 1 to 10 billion are plenty (default: all)",
    )
    add("--overwrite", action="store_true", help="replace a tokenizer that exists")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from creature.data.text.tokenizer_training import train_tokenizer

    counts = train_tokenizer(
        arguments.input,
        arguments.output,
        vocab_size=arguments.vocab_size,
        text_column=arguments.text_column,
        train_characters=arguments.train_characters,
        overwrite=arguments.overwrite,
    )
    rows = {
        "documents": f"{counts['documents']:,}",
        "characters": f"{counts['characters']:,}",
        "vocabulary": f"{counts['vocab_size']:,} ids"
        + ("" if counts["vocab_size"] >= arguments.vocab_size else ": the text has no more to merge"),
        "bytes per token": f"{counts['bytes_per_token']:.3f} over the beginning of the text",
        "written to": arguments.output,
    }
    for name, text in rows.items():
        print(f"{name:<15}  {text}")


if __name__ == "__main__":
    run_main(main)
