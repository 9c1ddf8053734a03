"""What a file is that is no UTF-8 text, told by its beginning, so that the remedy fits."""

import codecs

SAMPLE = 1 << 16  # bytes of the beginning that are looked at
CONTAINERS = (  # where a file has which bytes, and what it is
    (0, b"PK\x03\x04", "a zip archive, as .npz, .docx and .epub are"),
    (257, b"ustar\x0000", "a tar archive"),
    (257, b"ustar  \0", "a tar archive"),
    (0, b"\x1f\x8b\x08", "compressed with gzip"),
    (4, b"1AY&SY", "compressed with bzip2"),
    (0, b"\xfd7zXZ\0", "compressed with xz"),
    (0, b"(\xb5/\xfd", "compressed with zstd"),
    (0, b"7z\xbc\xaf'\x1c", "a 7z archive"),
    (0, b"Rar!\x1a\x07", "a rar archive"),
    (0, b"%PDF-", "a PDF"),
)
BYTE_ORDER_MARKS = (  # those of UTF-32 first: one of them begins with one of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def other_than_text(beginning: bytes, is_utf8: bool = True) -> str | None:
    """
    What a file with this beginning is, and the remedy, as the end of a sentence; None where it may be text.

    `is_utf8`: whether the beginning has been decoded without an error. Text in UTF-8 may hold a NUL now and then.
    """
    for place, magic, what in CONTAINERS:
        if beginning.startswith(magic, place):
            return f"is {what}, not text: unpack it or save it as text, and name that"
    sample = beginning[:SAMPLE]
    encoding = _wide_encoding(sample, is_utf8)
    if encoding:
        return (
            f"is {encoding} text, where UTF-8 is read: convert it first, for example with "
            f"`iconv -f {encoding} -t UTF-8 in.txt > out.txt`"
        )
    if sample.count(0) > (len(sample) // 10 if is_utf8 else 0):
        return "holds binary data, not text: leave it out"
    return None


def _wide_encoding(sample: bytes, is_utf8: bool) -> str | None:
    """The encoding of text in units of two or four bytes, as iconv calls it."""
    for mark, name in BYTE_ORDER_MARKS:
        if sample.startswith(mark):
            return name  # iconv finds the byte order by the mark, and leaves it out
    nuls, odd = sample.count(0), sample[1::2].count(0)
    if not nuls or (is_utf8 and nuls < len(sample) / 50):
        return None
    # ASCII in UTF-16 is valid UTF-8 with every second byte 0. Pairs of other bytes read like Chinese: that NULs stand
    # on one side alone tells them from text with NULs in it, and that side tells the byte order.
    sides = ["UTF-16LE", "UTF-16BE"] if 2 * odd > nuls else ["UTF-16BE", "UTF-16LE"]
    one_sided = not 0.05 < odd / nuls < 0.95
    for name in ("UTF-32LE", "UTF-32BE", *(sides if one_sided or not is_utf8 else ())):
        try:
            text = codecs.getincrementaldecoder(name)().decode(sample)
        except UnicodeDecodeError:
            continue
        if text and sum(c.isprintable() or c.isspace() for c in text) >= 0.99 * len(text):
            return name
    return None
