"""What holds for all tests: one thread, for micro models only lose by more, and the more the busier the machine is."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported, and inherited by what the tests start

import torch  # noqa: E402


def pytest_runtest_setup(item):
    torch.set_num_threads(1)  # again: a training job takes all the cores there are
