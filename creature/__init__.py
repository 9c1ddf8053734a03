"""Tools for training a MultiModalCreature: data, hardware, metrics, the trainer. The model files import none of it."""
