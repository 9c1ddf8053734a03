"""Write a small English corpus of generated children's stories, to try the library without a download.

examples:
  python scripts/make_sample_corpus.py --tokens 300000 --output data/stories.txt
  python scripts/make_sample_corpus.py --tokens 10000000 --seed 7 --output data/more_stories.txt

The same seed gives the same stories; no story occurs twice. Lines that read <|endoftext|> separate them.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from creature.errors import UserError, run_main  # noqa: E402
from creature.files import user_path  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=300_000, help="GPT-2 tokens to write, at least (default 300000)")
    parser.add_argument(
        "--output", type=user_path, default="data/stories.txt", help="a text file (default data/stories.txt)"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other stories (default 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    output = Path(arguments.output)
    if output.exists() and not arguments.overwrite:
        raise UserError(f"{output} exists already: choose another --output, or pass --overwrite to replace it")
    from creature.data.text.stories import write_story_corpus

    counts = write_story_corpus(output, arguments.tokens, arguments.seed)
    print(f"{counts['stories']:,} stories, {counts['characters']:,} characters, {counts['tokens']:,} tokens: {output}")


if __name__ == "__main__":
    run_main(main)
