"""Look at a corpus before training on it.

examples:
  python scripts/inspect_corpus.py data/corpus.bin
  python scripts/inspect_corpus.py data/tinystories --split validation --samples 10 --output tinystories.png

Prints documents, tokens, the most frequent tokens, duplicates and decoded samples of anything that run_clm_creature.py
trains on, and draws a histogram of the lengths. A corpus may be larger than the memory.
"""

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from creature.errors import UserError, one_line, run_main  # noqa: E402
from creature.files import user_path  # noqa: E402

SAMPLE_TOKENS = 80  # decoded of a sample


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("data", type=user_path, metavar="DATA", help="token file, Arrow folder, text file or folder, or Hub name")
    add("--split", choices=("train", "validation"), default="train", help="default train")
    add("--tokenizer_name", type=user_path, default="gpt2", metavar="NAME", help="of the corpus (default gpt2)")
    add("--block_size", type=int, default=2048, metavar="N", help="count the documents that are longer (default 2048)")
    add("--top", type=int, default=25, metavar="N", help="most frequent tokens shown (default 25)")
    add("--samples", type=int, default=5, metavar="N", help="documents shown (default 5)")
    add("--seed", type=int, default=0, help="another seed shows other documents (default 0)")
    add(
        "--output",
        type=user_path,
        help="a .png, .svg or .pdf file (default: the name of DATA and .png, in this folder)",
    )
    add("--cache_dir", type=user_path, default="data", help="folder for the tokens of text (default data)")
    arguments = parser.parse_args()
    for name, least in (("block_size", 2), ("top", 1), ("samples", 0)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} must be at least {least}")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    from creature.data import DataArguments
    from creature.data.text.inspection import inspect_stream, read_tokens
    from creature.data.text.opening import open_corpus
    from creature.data.text.tokenizer import load_tokenizer
    from creature.plots import plot_lengths

    data = DataArguments(arguments.data, tokenizer_name=arguments.tokenizer_name, cache_dir=arguments.cache_dir)
    stream = getattr(open_corpus(data), arguments.split)
    if stream is None:
        raise UserError(f"{arguments.data} has no validation split of its own: leave out --split")
    tokenizer = load_tokenizer(arguments.tokenizer_name)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {arguments.tokenizer_name!r} has no end-of-text token, where documents end")
    stream.check(len(tokenizer), None)
    found = inspect_stream(stream, tokenizer.eos_token_id, len(tokenizer), progress=sys.stderr.isatty())

    frequent = [(tokenizer.decode([i]), int(found.counts[i])) for i in found.counts.argsort()[::-1][: arguments.top]]
    frequent = [(token, count) for token, count in frequent if count]
    for name, value in report(found, arguments, tokenizer.eos_token_id):
        print(f"{name:<22}{value}")
    print("\nmost frequent tokens")
    for token, count in frequent:
        print(f"  {count / found.tokens:>7.2%}  {count:>14,}  {token!r}")

    def show(title: str, document: int) -> None:
        ids = read_tokens(stream, int(found.starts[document]), int(found.lengths[document]))
        text = one_line(tokenizer.decode(ids[:SAMPLE_TOKENS]))
        print(f"\n{title}\n  {text}{' [...]' if len(ids) > SAMPLE_TOKENS else ''}")

    if found.repeated.any():
        often = int(found.copies.argmax())
        show(f"document {often:,}, {int(found.copies[often]):,} times there", often)
    if found.similar.any():
        like = int(found.similar.argmax())
        show(f"document {like:,}, similar to an earlier one", like)
    chosen = random.Random(arguments.seed).sample(range(len(found.lengths)), min(arguments.samples, len(found.lengths)))
    for document in sorted(chosen):
        show(f"document {document:,}, {int(found.lengths[document]):,} tokens", document)

    output = arguments.output or Path(arguments.data).stem + ".png"
    title = f"{Path(stream.name).name}: {len(found.lengths):,} documents, {found.tokens:,} tokens"
    print(f"\n{plot_lengths(found.lengths, output, title, arguments.block_size)}")


def report(found, arguments: argparse.Namespace, end_of_text: int) -> list[tuple[str, str]]:
    """(name, value) of every line of the report."""
    import numpy as np

    documents, lengths = len(found.lengths), found.lengths
    quantiles = np.quantile(lengths, (0, 0.05, 0.5, 0.95, 1)).astype(int)
    rows = [
        ("documents", f"{documents:,}"),
        ("tokens", f"{found.tokens:,}, end-of-text included"),
        ("ids in use", f"{np.count_nonzero(found.counts):,} of {len(found.counts):,}"),
        ("tokens a document", f"mean {lengths.mean():,.1f}, median {quantiles[2]:,}"),
        ("", "least {:,}, 5 % {:,}, 95 % {:,}, most {:,}".format(*quantiles[[0, 1, 3, 4]])),
    ]
    for name, chosen in (
        (f"longer than {arguments.block_size:,}", lengths > arguments.block_size),
        ("empty", lengths == 0),
        ("exact duplicates", found.repeated),
        ("near duplicates", found.similar),
    ):
        share, tokens = chosen.sum() / documents, lengths[chosen].sum()
        rows.append(
            (name, f"{chosen.sum():,} documents ({share:.2%}), {tokens:,} tokens ({tokens / found.tokens:.2%})")
        )
    if not found.counts[end_of_text]:
        rows.append(("note", "nothing ends with end-of-text: the whole stream counts as one document"))
    elif found.unended:
        rows.append(("note", "the last document has no end-of-text: the stream may be cut off"))
    return rows


if __name__ == "__main__":
    run_main(main)
