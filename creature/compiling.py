"""torch.compile as the job uses it: a compiler that fails stops nothing, and no short batch is compiled by itself."""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from creature.errors import first_line, is_out_of_memory


def or_eager(function: Callable, *args, undo: Callable[[], None] | None = None, **kwargs) -> Any:
    """
    function(*args, **kwargs); where the compiler fails in it, the call is made again, and all later ones, uncompiled.

    Args:
        undo: puts back what a failed call has changed. Where it is given, any error but lack of memory counts as the
            compiler's: if it was not, it comes again.
    """
    try:
        return function(*args, **kwargs)
    except Exception as error:
        failed = isinstance(error, torch._dynamo.exc.BackendCompilerFailed) or undo is not None
        if not failed or is_out_of_memory(error):
            raise
        reason = _reason(error)
    if undo is not None:
        undo()
    _compile_no_more(reason)
    return function(*args, **kwargs)


def _compile_no_more(reason: str) -> None:
    """Run everything uncompiled from here on, and say why in one line."""
    torch.compiler.set_stance("force_eager")
    use_plain_kernels()
    if os.environ.get("RANK", "0") == "0":
        print(
            f"torch.compile failed ({reason}): going on without it, slower; --torch_compile false leaves it out",
            flush=True,
        )


def _reason(error: BaseException) -> str:
    """The line of a compiler's output that names the error, else the first line."""
    named = [line for line in str(error).splitlines() if "error:" in line]
    return " ".join((named[0] if named else first_line(error)).split())[:200]


def fill_rows(inputs: dict[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
    """
    A short batch of text with rows without targets added, so that the last batch of a pass is not compiled by itself.

    inputs: input_ids and labels, [B, T] -> [rows, T]; a batch with other senses stays as it is.
    """
    missing = rows - len(inputs["input_ids"])
    if missing <= 0 or inputs.keys() != {"input_ids", "labels"}:
        return inputs
    values = {"input_ids": 0, "labels": -100}
    return {name: F.pad(tensor, (0, 0, 0, missing), value=values[name]) for name, tensor in inputs.items()}


def use_plain_kernels() -> None:
    """Leave the model's Triton kernels alone: they take the same compiler, and plain torch does the same."""
    import kernels_creature

    kernels_creature.triton = None
