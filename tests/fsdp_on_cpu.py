"""One of several CPU processes that train under FSDP 2: a whole run, one resumed from its middle, and one in bfloat16.

accelerate shards over GPUs only, and uses DDP for CPU processes whatever its configuration says. A patch makes it treat
them as GPUs; torch does the sharding, over gloo. tests/test_scaling.py starts it with accelerate's launcher:

    accelerate launch --config_file configs/accelerate/fsdp2.yaml tests/fsdp_on_cpu.py --use_cpu --output_dir whole ...
"""

import os
import shutil
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType, PartialState

import run_clm_creature
from creature import checkpoints

original_init = PartialState.__init__


def treat_cpus_as_gpus(self, *args, **kwargs):
    original_init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


def main() -> None:
    PartialState.__init__ = treat_cpus_as_gpus
    Accelerator.end_training = lambda self: None  # all runs use the one process group of the launcher
    folder = Path(sys.argv[sys.argv.index("--output_dir") + 1])
    assert run_clm_creature.main() == 0
    if os.environ["RANK"] == "0":
        # As if the run had been stopped after the first checkpoint.
        copied = folder.with_name("resumed")
        shutil.copytree(folder, copied)
        for later in checkpoints.list_checkpoints(copied)[1:]:
            shutil.rmtree(later)
        checkpoints.update_run(copied, status="stopped")
    torch.distributed.barrier()
    sys.argv[sys.argv.index("--output_dir") + 1] = "resumed"
    sys.argv.append("--resume")
    assert run_clm_creature.main() == 0
    sys.argv[sys.argv.index("resumed")] = "half"
    sys.argv[sys.argv.index("--resume")] = "--bf16"
    sys.argv[sys.argv.index("--max_steps") + 1] = "1"
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    assert run_clm_creature.main() == 0


if __name__ == "__main__":
    main()
