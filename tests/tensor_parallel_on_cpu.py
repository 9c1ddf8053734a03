"""One of two CPU processes that share a creature by tensor parallelism, over gloo; tests/test_scaling.py starts it:

    torchrun --nproc_per_node 2 tests/tensor_parallel_on_cpu.py FOLDER

FOLDER holds a saved creature. The first process writes what the two gave, and what one gives, to result.pt there.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed

from modeling_creature import MultiModalCreature


def outputs(model: MultiModalCreature, ids: torch.Tensor) -> dict:
    """Logits by ids and by their embeddings, eight tokens generated greedily, the loss."""
    with torch.no_grad():
        return {
            "logits": model(ids).logits,
            "logits by embeddings": model(inputs_embeds=model.model.embed_tokens(ids)).logits,
            "generated": model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0),
            "loss": model(ids, labels=ids).loss,
        }


def main() -> None:
    folder = Path(sys.argv[1])
    shared = MultiModalCreature.from_pretrained(folder, tp_plan="auto")
    ids = torch.arange(24).view(2, 12)
    result = {
        "rows of a process": shared.model.layers[0].mlp.up_proj.weight.to_local().shape[0],
        "two": outputs(shared, ids),
        "one": outputs(MultiModalCreature.from_pretrained(folder), ids),
    }
    if os.environ["RANK"] == "0":
        torch.save(result, folder / "result.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
