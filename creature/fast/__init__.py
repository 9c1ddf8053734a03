"""The same mathematics, faster: GPU kernels, and the head in float8, which the job puts into a plain model.

`apply(model)` is the one call. The model files never import this package, so a checkpoint carries plain torch.
"""

from functools import partial

import torch

from creature.fast.head import float8_fits, linear_cross_entropy
from creature.fast.kernels import disable, matmul_fits
from creature.fast.layers import FastAttention, FastMLP
from layers_creature import CreatureAttention, CreatureMLP

__all__ = ["apply", "disable", "float8_fits", "matmul_fits"]


def apply(model: torch.nn.Module, float8: bool = True) -> None:
    """
    Put the fast layers and the fast head into a MultiModalCreature, in place; parameters and their names stay.

    Every fast part falls back to the plain one where its kernels do not run: on a CPU, in float32, for other sizes.

    Args:
        model: as it was built or loaded, before adapters, DDP or FSDP wrap it.
        float8: compute the internal text's head in float8 while training in bf16 on a Hopper GPU.
    """
    for layer in model.model.layers:
        if type(layer.self_attn) is CreatureAttention:
            layer.self_attn.__class__ = FastAttention
        if type(layer.mlp) is CreatureMLP and model.config.hidden_act == "relu2":
            layer.mlp.__class__ = FastMLP
    model.text_cross_entropy = partial(linear_cross_entropy, float8=float8)
