"""torch.compile in the job: a failing compiler does not stop a run, and a short batch is not compiled by itself."""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from creature.errors import first_line, is_out_of_memory


def with_eager_fallback(function: Callable, *args, undo: Callable[[], None] | None = None, **kwargs) -> Any:
    """
    function(*args, **kwargs); where compiling it fails, the call is repeated, and the rest of the run stays, eager.

    Args:
        undo: restores what a failed call has changed. Where it is given, any error except out-of-memory triggers the
            eager retry; a real bug raises again.
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
    _turn_compiling_off(reason)
    return function(*args, **kwargs)


def _turn_compiling_off(reason: str) -> None:
    """Run everything eager from here on, and print the reason in one line."""
    from creature import fast

    torch.compiler.set_stance("force_eager")
    fast.disable()
    if os.environ.get("RANK", "0") == "0":
        print(
            f"torch.compile failed ({reason}): continuing without it, slower; --torch_compile false does not try it",
            flush=True,
        )


def _reason(error: BaseException) -> str:
    """The line of a compiler's output that names the error, else the first line."""
    named = [line for line in str(error).splitlines() if "error:" in line]
    return " ".join((named[0] if named else first_line(error)).split())[:200]


def pad_batch(inputs: dict[str, torch.Tensor], rows: int) -> dict[str, torch.Tensor]:
    """
    A short batch of text padded with rows without targets, so that the last batch of an epoch needs no compilation.

    inputs: input_ids and labels, [B, T] -> [rows, T]; a batch with anything else is returned as it is.
    """
    missing = rows - len(inputs["input_ids"]) if inputs.keys() == {"input_ids", "labels"} else 0
    if missing <= 0:
        return inputs
    values = {"input_ids": 0, "labels": -100}
    return {name: F.pad(tensor, (0, 0, 0, missing), value=values[name]) for name, tensor in inputs.items()}
