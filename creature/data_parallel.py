"""Data parallel training: equal weights to begin with, the mean of all gradients, and an end when a process is lost.

The job does this itself and leaves torch's DistributedDataParallel out. That one adds up gradients while the backward
pass is still under way, for which it divides a compiled step into pieces with Python between them; such a step cannot
be recorded as CUDA graphs, and two GPUs wait for Python where one does not (docs/scaling_out.md). Here a step is the
same as on one GPU, and the gradients are added up when it is over.
"""

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from itertools import chain

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from creature.launch import LOST_PROCESS_MESSAGE
from creature.terminal import give_terminal_back

BUCKET = 2**25  # numbers that are added up at once: 128 MiB in float32


def share_weights(model: torch.nn.Module) -> None:
    """Give all processes the weights and buffers of the first one."""
    for tensor in chain(model.parameters(), model.buffers()):
        dist.broadcast(tensor.data, src=0)


@torch.no_grad()
def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """
    Replace the gradient of every parameter by its mean over all processes, in place.

    parameters: the same ones in the same order in each process. One without a gradient counts as zero, because another
    process may have one.
    """
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        flat /= dist.get_world_size()  # gloo adds up, but knows no mean
        dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [part.view(gradient.shape) for part, gradient in zip(parts, bucket, strict=True)])


def _buckets(tensors: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The tensors in their order, in lists of at most BUCKET numbers, or of one tensor."""
    bucket, size = [], 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


class LostProcess(TrainerCallback):
    """
    Ends this process, in one sentence, when another one of the run has ended while it trains.

    A process that waits on its GPU for gradients that never come waits for half an hour, and no signal reaches Python
    meanwhile. So a thread of each process listens to the next one: the connection breaks when that one ends, however it
    does, and the end goes around.
    """

    grace_seconds = 5.0  # this process may be about to end with a message that says more

    def __init__(self):
        self._group = self._thread = None

    def on_train_begin(self, args, state, control, **kwargs):
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
        self._thread = threading.Thread(target=self._listen, args=((dist.get_rank() + 1) % dist.get_world_size(),))
        self._thread.daemon = True
        self._thread.start()

    def on_train_end(self, args, state, control, **kwargs):
        dist.send(torch.zeros(1), dst=(dist.get_rank() - 1) % dist.get_world_size(), group=self._group)
        self._thread.join()

    def _listen(self, neighbour: int) -> None:
        """Wait for the word of the next process that its training is over; leave where it cannot come any more."""
        try:
            dist.recv(torch.zeros(1), src=neighbour, group=self._group)
        except RuntimeError:
            time.sleep(self.grace_seconds)
            print(f"error: {LOST_PROCESS_MESSAGE}", file=sys.stderr, flush=True)
            give_terminal_back()
            os._exit(1)
