"""Tools for training a MultiModalCreature: data, hardware, metrics, the trainer. The model files import none of it."""

import os

# OpenMP's threads sleep while they wait for each other: by default they spin, and beside another process on all cores a
# step then takes several times as long. It is read when torch is imported, so this has to come first.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
