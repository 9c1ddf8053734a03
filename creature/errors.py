"""UserError, and how a script ends on it."""

import sys
from collections.abc import Callable
from typing import NoReturn

LONGEST_MESSAGE = 4000  # characters


class UserError(ValueError):
    """An error that the user can fix. The message is one clear sentence that ends with the remedy."""


def raise_all(problems: list[str]) -> None:
    """UserError with every one of the problems with the settings; nothing where there is none."""
    if problems:
        many = len(problems) > 1
        raise UserError((f"{len(problems)} problems with the settings: " if many else "") + "; ".join(problems))


def require_unicode(name: str, text: str) -> None:
    """
    UserError where a text holds half a character: Python turns bytes of the command line that are no UTF-8 into lone
    surrogates, which neither a tokenizer nor a file of text takes.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} holds half a character at position {error.start}: give it again, as UTF-8 (see `locale`)"
        ) from None


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """
    Run a script's `main` and exit with its return code (None means 0).

    A UserError, a full disk, a missing right or Ctrl+C ends in one line on stderr and exit code 1 (130 for Ctrl+C),
    never in a traceback. Any other exception is a bug of ours and keeps its traceback.
    """
    if hasattr(sys.stdout, "reconfigure"):  # the encoding of a file or pipe on Windows may lack characters
        sys.stdout.reconfigure(errors="replace")
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        code = _report(str(error))
    except BrokenPipeError:
        # The reader of our output, such as `head`, has ended: nothing is wrong.
        sys.stdout = None
        code = 0
    except OSError as error:
        if error.errno is None:  # raised by a library, not by the operating system
            raise
        where = f": {error.filename}" if error.filename else ""
        code = _report(f"{error.strerror}{where}")
    except KeyboardInterrupt:
        code = _report("interrupted", 130)
    sys.exit(code)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or Python reports a lack of memory."""
    words = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def one_line(message: str) -> str:
    """
    A message as one printable line: unprintable characters, such as a quoted file's escape sequences, are written as
    escapes, and the middle of a very long message is left out.
    """
    text = " ".join(message.split())
    if len(text) > LONGEST_MESSAGE:
        text = f"{text[: LONGEST_MESSAGE // 2]} [...] {text[-LONGEST_MESSAGE // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _report(message: str, code: int = 1) -> int:
    print(f"error: {one_line(message)}", file=sys.stderr, flush=True)
    return code
