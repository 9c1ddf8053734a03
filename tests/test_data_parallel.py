"""Data parallel processes: equal weights, the mean of their gradients, a lost one, a resume by fewer or more."""

import itertools
import os
import shutil
import signal
import socket
import sys
import time
from multiprocessing import get_context

import pytest
import torch
from test_run import curve, place, run, start  # noqa: F401

from creature import checkpoints, data_parallel
from creature.data_parallel import LostProcess, average_gradients, share_weights
from creature.errors import UserError
from creature.job import _check_batches_agree

SIZES = ((3, 2), (5,), (4, 4), (1,))


def join(rank, port):
    """Make this process one of two."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", rank=rank, world_size=2, store=torch.distributed.TCPStore("127.0.0.1", port, 2, rank == 0)
    )


def start_two(function, *arguments):
    """Two processes that run function(rank, port, *arguments)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn = get_context("spawn")
    ranks = [spawn.Process(target=function, args=(rank, port, *arguments)) for rank in range(2)]
    for process in ranks:
        process.start()
    return ranks


def average(rank, port, folder):
    join(rank, port)
    torch.manual_seed(rank)
    model = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(size)) for size in SIZES])
    model.register_buffer("table", torch.full((2,), float(rank)))
    share_weights(model)
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 10.0 * number + 2 * rank)
    model[2].grad = model[2].grad.mT.clone().mT  # of another memory format
    model[3].grad = None if rank == 0 else model[3].grad
    before = [parameter.grad for parameter in model]
    data_parallel.BUCKET = 12  # three buckets
    average_gradients(model)
    kept = [parameter.grad is gradient for parameter, gradient in zip(model, before, strict=True)]
    torch.save({"weights": model.state_dict(), "gradients": [p.grad for p in model], "kept": kept}, folder / str(rank))


def test_processes_begin_with_equal_weights_and_share_the_mean_of_their_gradients(tmp_path):
    for process in start_two(average, tmp_path):
        process.join(100)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
    assert first["weights"]["table"].tolist() == [0.0, 0.0]
    for both in (first, second):
        assert [gradient.unique().tolist() for gradient in both["gradients"]] == [[1.0], [11.0], [21.0], [16.0]]
        assert both["kept"][:3] == [True, True, True]


def test_gradients_are_added_up_in_buckets_of_a_size(monkeypatch):
    tensors = [torch.zeros(size) for size in SIZES]
    for limit, lengths in ((1, [1, 1, 1, 1]), (12, [2, 1, 1]), (17, [2, 2]), (1000, [4])):
        monkeypatch.setattr(data_parallel, "BUCKET", limit)
        buckets = list(data_parallel._buckets(tensors))
        assert [len(bucket) for bucket in buckets] == lengths
        assert all(a is b for a, b in zip(itertools.chain(*buckets), tensors, strict=True))


def wait_without_python(rank, port, folder, ends):
    """A process whose main thread hears of nothing, as one that waits on its GPU; the second ends as `ends` says."""
    os.dup2(os.open(folder / f"said{rank}", os.O_WRONLY | os.O_CREAT), 2)
    join(rank, port)
    LostProcess.grace_seconds = 0.2
    watch = LostProcess()
    watch.on_train_begin(None, None, None)
    torch.distributed.barrier()
    if ends == "killed":
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(100)
    watch.on_train_end(None, None, None)
    time.sleep(1)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize(("ends", "codes"), [("killed", [1, -signal.SIGKILL]), ("in order", [0, 0])])
def test_a_process_that_is_lost_ends_the_other_with_a_sentence(tmp_path, ends, codes):
    began = time.monotonic()
    ranks = start_two(wait_without_python, tmp_path, ends)
    for process in ranks:
        process.join(90)
    left = time.monotonic() - began
    assert [process.exitcode for process in ranks] == codes, left
    lines = [line for line in (tmp_path / "said0").read_text().splitlines() if line.startswith("error: ")]
    assert lines == ([] if ends == "in order" else [f"error: {data_parallel.LOST_PROCESS_MESSAGE}"])


def test_processes_that_chose_different_micro_batches_are_told_the_one_that_fits_all():
    _check_batches_agree([(8, 2), (8, 2)])
    with pytest.raises(UserError, match="micro-batches of 8, 4 fit.*--per_device_train_batch_size 4"):
        _check_batches_agree([(8, 2), (4, 4)])


def interrupt(folder, copy):
    """A copy of a run as it was after its first checkpoint."""
    shutil.copytree(folder, copy)
    for later in checkpoints.list_checkpoints(copy)[1:]:
        shutil.rmtree(later)
    checkpoints.update_run(copy, status="stopped")


def test_a_run_goes_on_with_fewer_and_with_more_processes(place, monkeypatch):  # noqa: F811
    """The checkpoint is in the middle of a logging window, whose sums the processes had divided among themselves."""
    settings = ("--max_steps", 12, "--logging_steps", 4, "--save_steps", 6, "--eval_steps", 12)
    settings += ("--attention_dropout", "0.0", "--batch_warmup_steps", 0, "--per_device_train_batch_size", 1)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu"]

    def run_two(*flags):
        pair = start(*settings, *flags, launcher=launcher)
        output, errors = pair.communicate(timeout=200)
        assert pair.returncode == 0, output[-1000:] + errors[-2000:]
        assert "x accumulation 2 x 2 process(es)" in output and output.count("step     12/12 | loss") == 1

    run_two("--output_dir", "two")
    run(monkeypatch, *settings, "--output_dir", "one")
    interrupt("two", "fewer")
    interrupt("one", "more")
    with pytest.raises(UserError, match="world_size was 2 and is now 1; the batches stay the same, .*--accept_changes"):
        run(monkeypatch, *settings, "--output_dir", "fewer", "--resume")
    run(monkeypatch, *settings, "--output_dir", "fewer", "--resume", "--accept_changes")
    run_two("--output_dir", "more", "--resume", "--accept_changes")
    for name in ("two", "fewer", "more"):
        described = checkpoints.read_run(name)["must_match"]
        assert (described["world_size"], described["accumulation"]) == ((1, 4) if name == "fewer" else (2, 2))
        for key in ("loss", "loss_internal_text", "grad_norm", "eval_loss", "eval_accuracy", "tokens"):
            assert curve(name, key) == pytest.approx(curve("one", key), rel=1e-4), (name, key)
