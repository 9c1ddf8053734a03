"""Documents cut into pieces of a size to tokenize, where that changes no token id.

A document is cut only where the GPT-2 pre-tokenizer always splits, so that the ids of the pieces are those of the whole
document. A run of a million characters without any such place is cut anyway: the text is still kept, only the ids at
the cut differ. (Other tokenizers get larger pieces, cut at the same places.)
"""

import hashlib
import unicodedata
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field

from creature.data.text.readers import Documents
from creature.data.text.sources import find_sources

PIECE = 1 << 18  # characters tokenized at a time: large enough for speed, small enough for any number of threads
LONGEST_RUN = 1 << 20  # characters without a safe place to cut, after which the cut is made anyway
HASHED = 1 << 16  # characters of a document's beginning that choose its split


def last_safe_cut(text: str, start: int = 1) -> int:
    """
    The last position >= `start` where `text` can be cut without changing any GPT-2 id; 0 when there is none.

    No GPT-2 pre-token holds a non-space followed by white space, a letter followed by a non-letter, or a digit
    followed by a non-digit, and none of its patterns looks back: cut at such a place, the two parts have the ids of the
    whole.
    """
    # Only categories on which all Unicode versions since 3.0 agree count: no cut beside an unassigned character.
    for i in range(len(text) - 1, max(start, 1) - 1, -1):
        left, right = text[i - 1], text[i]
        if right in " \n":
            if not left.isspace():
                return i
        elif left.isalnum():
            a, b = unicodedata.category(left), unicodedata.category(right)
            if a[0] in "LN" and b[0] != a[0] and b != "Cn":
                return i
    return 0


@dataclass
class Batch:
    """About PIECE characters as pieces: (text, whether it ends its document, its split: 0 train, 1 validation)."""

    pieces: list[tuple[str, bool, int]] = field(default_factory=list)
    characters: int = 0


class Cutter:
    """Cuts streamed documents into batches of pieces, and counts empty documents and forced cuts."""

    def __init__(self, validation_fraction: float = 0.0, seed: int = 0, large: bool = False):
        self.limit = int(validation_fraction * 2**64)
        self.key = seed.to_bytes(8, "little", signed=True)
        self.piece = LONGEST_RUN if large else PIECE
        self.empty = self.forced = 0

    def batches(self, texts: Iterator[tuple[str, bool]]) -> Iterator[Batch]:
        """The documents that `texts` streams as (text, whether it ends its document)."""
        batch = Batch()
        for piece in self._pieces(texts):
            batch.pieces.append(piece)
            batch.characters += len(piece[0])
            if batch.characters >= self.piece or len(batch.pieces) >= 4096:
                yield batch
                batch = Batch()
        if batch.pieces:
            yield batch

    def _pieces(self, texts: Iterator[tuple[str, bool]]) -> Iterator[tuple[str, bool, int]]:
        waiting, length, searched, split = [], 0, 0, -1
        # The split is known once HASHED characters are there: no piece is given out before.
        enough = max(self.piece, HASHED)
        for text, ends in texts:
            if text:
                waiting.append(text)
                length += len(text)
            if ends:
                if length or split >= 0:
                    whole = "".join(waiting)
                    yield whole, True, split if split >= 0 else self._split(whole)
                else:
                    self.empty += 1
                waiting, length, searched, split = [], 0, 0, -1
                continue
            while length >= enough:
                whole = "".join(waiting)
                if split < 0:
                    split = self._split(whole)
                cut = last_safe_cut(whole[:LONGEST_RUN], searched)
                if not cut and length >= LONGEST_RUN:
                    cut = LONGEST_RUN
                    self.forced += 1
                if not cut:
                    waiting, searched = [whole], len(whole)
                    break
                yield whole[:cut], False, split
                waiting, length, searched = [whole[cut:]], length - cut, 0

    def _split(self, beginning: str) -> int:
        digest = hashlib.blake2b(beginning[:HASHED].encode("utf-8"), digest_size=8, key=self.key).digest()
        return int(int.from_bytes(digest, "little") < self.limit)


def read_pieces(
    inputs: list[str], text_column: str = "text", progress: bool = True
) -> Iterator[list[tuple[str, bool]]]:
    """The text of `inputs` in batches of (piece, whether it ends its document), cut where no pre-token is split."""
    documents = [Documents(source, text_column) for source in find_sources(inputs)[0]]
    with closing(stream_documents(documents, progress, "reading")) as texts:
        for batch in Cutter().batches(texts):
            yield [(text, ends) for text, ends, _ in batch.pieces]


def stream_documents(documents: list[Documents], progress: bool, title: str) -> Iterator[tuple[str, bool]]:
    """All documents of all sources, under a progress bar in bytes of the files, with an ETA where sizes are known."""
    from tqdm import tqdm

    sizes = [one.source.size for one in documents]
    known = all(one.source.kind not in ("hub", "arrow") for one in documents)
    with tqdm(total=sum(sizes) if known else None, unit="B", unit_scale=True, disable=not progress, desc=title) as bar:
        for one in documents:
            done = 0
            for text, ends in one:
                if one.bytes_read != done:
                    bar.update(one.bytes_read - done)
                    done = one.bytes_read
                yield text, ends
            bar.update(one.bytes_read - done)
