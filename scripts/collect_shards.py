"""Collect the tokens that datatrove wrote, on one machine or many, into one corpus.

examples:
  python scripts/collect_shards.py --input tokenized/ --output data/corpus.bin
  python scripts/collect_shards.py --input tokenized/ --tokenizer_name data/tokenizer --output data/corpus.bin

--input is the output_folder of datatrove's DocumentTokenizer (or DocumentTokenizerMerger): .ds files, each with its
.ds.index. docs/data.md has a pipeline that writes them. Writes corpus.bin, corpus.valid.bin and corpus.manifest.json,
as tokenize_corpus.py does.
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
    add("--input", type=user_path, required=True, metavar="FOLDER", help="where datatrove wrote its .ds files")
    add("--output", type=user_path, required=True, help="a .bin file")
    add(
        *spellings("tokenizer_name"),
        type=user_path,
        default="gpt2",
        metavar="NAME",
        help="the tokenizer of the shards: gpt2, a folder, or a Hub name (default gpt2)",
    )
    add(*spellings("validation_fraction"), **CORPUS_FLAGS["validation_fraction"])
    add("--seed", type=int, default=0, help="another seed gives another validation split (default 0)")
    add("--overwrite", action="store_true", help="replace an output that exists")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    from creature.data.text.shards import collect_shards

    manifest = collect_shards(
        arguments.input,
        arguments.output,
        tokenizer_name=arguments.tokenizer_name,
        validation_fraction=arguments.validation_fraction,
        seed=arguments.seed,
        overwrite=arguments.overwrite,
    )
    print(f"{len(manifest['inputs']):,} shards, {manifest['tokens']:,} tokens in {manifest['seconds']:.1f} s")
    for name, entry in manifest["splits"].items():
        print(f"{name:<10}  {entry['tokens']:,} tokens in {entry['documents']:,} documents: {entry['file']}")


if __name__ == "__main__":
    run_main(main)
