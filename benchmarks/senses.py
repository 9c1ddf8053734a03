"""Training speed and memory of the tiny creature with all of its senses and streams, beside text alone.

examples:
  python benchmarks/senses.py --compile                                      # one GPU: 32 clips of 256 ticks a step
  python benchmarks/senses.py --clips 2 --ticks 64 --steps 3 --warmup 1      # a laptop

The ticks are made up: every sense is there at every tick, with up to ten contacts on the skin. A step is forward,
backward and the job's optimizer, in bfloat16 on a GPU; the figure is the median of the timed steps, on a CPU of their
processor time. FLOPs are those of the matrix products and attention in a forward and a backward pass, counted by torch.
"""

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path

# In place of this folder, whose tokenize.py would hide the standard library's module of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

CONTACTS = 10
# Name: the senses beside the internal voice, and the streams beside the internal text.
ROWS = {
    "text only": ((), ()),
    "all": (("external_voice", "audio", "vision", "proprioception", "touch"), ("external_text", "audio", "animation")),
    "all but the eyes": (
        ("external_voice", "audio", "proprioception", "touch"),
        ("external_text", "audio", "animation"),
    ),
    "all senses, text alone": (("external_voice", "audio", "vision", "proprioception", "touch"), ()),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=32, help="clips a step (default 32)")
    parser.add_argument("--ticks", type=int, default=256, help="ticks a clip (default 256)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps (default 20)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them (default 5)")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="(default: all)")
    parser.add_argument("--compile", action="store_true", help="compile model and optimizer")
    return parser.parse_args()


def made_up_ticks(config, rows: int, ticks: int, device: str) -> dict:
    """Every argument of `forward` for a creature of this configuration, by the table of senses."""
    import torch
    from torch.nn.functional import normalize

    from losses_creature import IGNORE_INDEX
    from senses_creature import SENSE_TABLE, sense_shapes

    def numbers(*sizes):
        return torch.randn(rows, ticks, *sizes, device=device)

    def ids(limit, *sizes, dtype=torch.long):
        return torch.randint(0, limit, (rows, ticks, *sizes), device=device, dtype=dtype)

    limits = {
        "touch_points": config.num_touch_points,
        "touch_surfaces": config.num_touch_surfaces,
        "audio_codes": config.audio_codebook_size,
    }
    batch = {"input_ids": ids(config.vocab_size), "labels": ids(config.vocab_size)}
    shapes = sense_shapes(config)
    for sense in SENSE_TABLE:
        for name in sense.arguments_of(config):
            sizes = [CONTACTS if size == "C" else size for size in shapes[name][2:]]
            if name == "pixel_values":
                batch[name] = ids(256, *sizes, dtype=torch.uint8)
            elif name in limits or sense.arguments[name] == IGNORE_INDEX:
                batch[name] = ids(limits.get(name, config.vocab_size), *sizes)
            else:
                batch[name] = numbers(*sizes)
            if sense.mask:
                mask = (CONTACTS,) if sense.name == "touch" else ()
                batch[sense.mask] = torch.rand(rows, ticks, *mask, device=device) < (0.3 if mask else 1.0)
    joints = config.subframes_per_tick, config.num_joints, 4
    return batch | {
        "external_text_targets": ids(config.vocab_size),
        "audio_targets": ids(config.audio_codebook_size, config.num_audio_codebooks),
        "rotation_targets": normalize(numbers(*joints), dim=-1),
        "blend_shape_targets": numbers(config.num_blend_shapes).sigmoid(),
        "eye_targets": normalize(numbers(2, 4), dim=-1),
    }


def chosen(batch: dict, senses: tuple[str, ...], streams: tuple[str, ...]) -> dict:
    """The arguments of a row: its senses, the efference copies of its streams, its targets."""
    from senses_creature import SENSE_TABLE

    targets = {
        "external_text": ("external_text_targets",),
        "audio": ("audio_targets",),
        "animation": ("rotation_targets", "blend_shape_targets", "eye_targets"),
    }
    names = {"input_ids", "labels"} | {name for stream in streams for name in targets[stream]}
    for sense in SENSE_TABLE:
        if sense.copy_of in streams if sense.copy_of else sense.name in senses:
            names |= {*sense.arguments, sense.mask}
    return {name: value for name, value in batch.items() if name in names}


def measure(name: str, config, batch: dict, options: argparse.Namespace) -> tuple[float, str]:
    """(ticks a second, the line of the table) of one row."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from creature import fast
    from creature.optimizer import MuonAdamW, parameter_groups
    from modeling_creature import MultiModalCreature

    senses, streams = ROWS[name]
    given = chosen(batch, senses, streams)
    device = given["input_ids"].device
    cuda = device.type == "cuda"
    torch._dynamo.reset()
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    model = MultiModalCreature(config).to(device).train()
    model.train_only(("internal_voice", *senses), ("internal_text", *streams))
    with FlopCounterMode(display=False) as counter, torch.autocast(device.type, torch.bfloat16, enabled=cuda):
        model(**{key: value[:1] for key, value in given.items()}).loss.backward()
    flops = counter.get_total_flops() / options.ticks
    model.zero_grad()
    fast.apply(model)
    trained = torch.compile(model, dynamic=False) if options.compile else model
    optimizer = MuonAdamW(parameter_groups(model, 8e-3, 0.03, 0.05), compiled=options.compile)
    clock, seconds = time.perf_counter if cuda else time.process_time, []
    try:
        for _ in range(options.warmup + options.steps):
            start = clock()
            with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
                loss = trained(**given).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if cuda:
                torch.cuda.synchronize()
            seconds.append(clock() - start)
    except torch.OutOfMemoryError:
        return float("nan"), f"{name:24}  out of memory"
    step = statistics.median(seconds[options.warmup :])
    speed = options.clips * options.ticks / step
    memory = torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
    return speed, f"{name:24}  {flops / 1e9:11.3f}  {1000 * step:10.1f}  {speed:10,.0f}  {memory:9.2f}"


def main() -> None:
    options = parse_arguments()
    import torch

    from configuration_creature import STREAMS, CreatureConfig
    from creature.settings import CONFIGS, parse_settings

    settings = parse_settings(["--config", str(CONFIGS / "text_only_config.yaml")]).model
    config = CreatureConfig(**settings | {"loss_weights": dict.fromkeys(STREAMS, 1.0)})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    batch = made_up_ticks(config, options.clips, options.ticks, device)
    how = "compiled" if options.compile else "eager"
    print(f"{options.clips} x {options.ticks} ticks a step, {how}, median of {options.steps} steps on {device}")
    print(f"{'':24}  {'GFLOPs/tick':>11}  {'ms a step':>10}  {'ticks/s':>10}  {'peak GiB':>9}  {'of the first':>12}")
    first = None
    for name in options.rows:
        speed, line = measure(name, config, batch, options)
        first = first or speed
        print(f"{line}  {first / speed:12.2f}", flush=True)


if __name__ == "__main__":
    main()
