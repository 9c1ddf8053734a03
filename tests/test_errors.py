"""How scripts end: one line for people, a traceback for our own bugs."""

import io

import pytest

from creature.errors import UserError, first_line, run_main


def end(error):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run_main(main)
    return ended.value.code


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("the file is empty:\n  name another"), 1, "error: the file is empty: name another\n"),
        (PermissionError(13, "Permission denied", "a.bin"), 1, "error: Permission denied: a.bin\n"),
        (OSError(28, "No space left on device"), 1, "error: No space left on device\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (UserError("no \x1b[2J\ud800: name another"), 1, "error: no \\x1b[2J\\ud800: name another\n"),
    ],
)
def test_what_the_user_can_mend_is_one_line(error, code, line, capsys):
    assert end(error) == code
    assert capsys.readouterr().err == line


def test_a_long_quotation_is_cut_in_the_middle(capsys):
    end(UserError("no field among " + "x" * 10**6 + ": name another"))
    line = capsys.readouterr().err
    assert len(line) < 5000 and line.startswith("error: no field among xxx") and line.endswith("xxx: name another\n")


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyError("a bug"), OSError("a library's own")])
def test_a_bug_keeps_its_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        run_main(main)


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (3, 3)])
def test_the_return_value_is_the_exit_code(result, code):
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: result)
    assert ended.value.code == code


def test_a_reader_that_has_gone_is_no_error(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)  # run_main sets it so; put back when the test ends
    assert end(BrokenPipeError()) == 0


def test_a_text_that_the_output_cannot_spell_is_no_error(monkeypatch):
    """Windows writes to files and pipes in the code page of the machine."""
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="cp1252"))
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: print("caf\u00e9 \u65e5"))
    assert ended.value.code == 0 and written.getvalue().split() == [b"caf\xe9", b"?"]


def test_first_line():
    assert first_line(OSError("one\ntwo")) == "one" and first_line(TimeoutError()) == "TimeoutError"
