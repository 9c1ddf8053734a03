"""
What holds for all tests: one thread, for micro models only lose by more, and the more the busier the machine is; and
nothing is written into the home of who runs them.
"""

import os
import tempfile

os.environ["OMP_NUM_THREADS"] = "1"  # read by torch when it is imported, and inherited by what the tests start
_trackio = tempfile.TemporaryDirectory()
os.environ["TRACKIO_DIR"] = _trackio.name  # read by trackio when it is imported, perhaps by a test that is not about it

import torch  # noqa: E402


def pytest_runtest_setup(item):
    torch.set_num_threads(1)  # again: a training job takes all the cores there are
