"""What text_perplexity.yaml calls: the documents that scripts/evaluate_text.py reads, and what each is divided by."""

import datasets

from creature.errors import UserError
from creature.evaluation import whole_documents


def load_documents(data: str | None = None, text_column: str = "text", **metadata) -> dict[str, datasets.Dataset]:
    """The split `test` with the columns name and text; lm_eval passes everything under --metadata and --model_args."""
    if not data:
        raise UserError("the task text_perplexity needs a text: add --metadata data=FILE (or a folder, or a glob)")
    names, texts = zip(*whole_documents(data, text_column), strict=True)
    return {"test": datasets.Dataset.from_dict({"name": names, "text": texts})}


def process_results(document: dict, results: list) -> dict[str, tuple[float, int]]:
    """(log-likelihood in nats, words or bytes of the text) for each metric of the task."""
    (log_likelihood,) = results
    text_bytes = len(document["text"].encode("utf-8"))
    return {
        "word_perplexity": (log_likelihood, max(len(document["text"].split()), 1)),
        "byte_perplexity": (log_likelihood, text_bytes),
        "bits_per_byte": (log_likelihood, text_bytes),
    }
