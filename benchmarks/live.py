"""Speed and endurance of a live creature, tick by tick through `LiveCreature`.

examples:
  python benchmarks/live.py                                       # tiny, untrained: time a tick, on one CPU thread
  python benchmarks/live.py --endurance --ticks 45000             # an hour of life: memory, silence, words
  python benchmarks/live.py --endurance --checkpoint checkpoints/hear --data recordings/speech

Time: with all senses (two eyes, ears, 24 joints, ten contacts, words) and all streams, without eyes, and with words
and thoughts alone; everything in `tick` is counted, from raw senses to numpy. "wall" is what passed, "CPU" the
processor time of the thread, which other processes on the machine change less.

Endurance: a creature lives on its own outputs; at every tenth of the ticks, memory, and since the last line the share
of silent ticks and words a minute. Then a recorded life of two windows is replayed exactly, between other recorded
life, at its start, from tick 3,000 and from tick 40,000 on (as far as --ticks reach), and the loss of what is predicted
in it is printed. Without recordings, the life is made up.
"""

import argparse
import sys
import time
from pathlib import Path

# In place of this folder, whose tokenize.py would hide the standard library's module of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from creature.files import user_path  # noqa: E402

STREAMS = ("internal_text", "external_text", "audio", "animation")
# Name: the senses and the streams.
ROWS = {
    "all senses and streams": (("audio", "images", "body", "touch", "words"), STREAMS),
    "all but the eyes": (("audio", "body", "touch", "words"), STREAMS),
    "words and thoughts": (("words",), ("internal_text",)),
}
MOMENTS = (0, 3000, 40_000)
LINES = 10


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=user_path, help="a creature; default: an untrained tiny one")
    parser.add_argument("--data", type=user_path, help="folder of recordings for the endurance; default: made up")
    parser.add_argument("--ticks", type=int, help="(default 400; of the endurance 45,000)")
    parser.add_argument("--endurance", action="store_true", help="memory, silence and loss over many ticks")
    parser.add_argument("--window", type=int, help="ticks that attention sees (default: the checkpoint's, else 512)")
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU (default 1)")
    return parser.parse_args()


def make_creature(options: argparse.Namespace, streams: tuple[str, ...] | None = None):
    """The creature of the checkpoint, or tiny, untrained, with all streams."""
    import torch

    from configuration_creature import CreatureConfig
    from creature.data.text.tokenizer import load_tokenizer
    from creature.live import LiveCreature
    from creature.settings import CONFIGS, parse_settings
    from modeling_creature import MultiModalCreature
    from processing_creature import CreatureProcessor

    named = {"window": options.window} if options.window else {}
    named |= {} if streams is None else {"streams": streams}
    if options.checkpoint:
        return LiveCreature.from_pretrained(options.checkpoint, device=options.device, **named)
    torch.manual_seed(0)
    settings = parse_settings(["--config", str(CONFIGS / "text_only_config.yaml")]).model
    config = CreatureConfig(**settings | {"loss_weights": dict.fromkeys(STREAMS, 1.0)})
    model = MultiModalCreature(config).to(options.device)
    return LiveCreature(model, CreatureProcessor.from_config(config, load_tokenizer()), **{"window": 512} | named)


def raw_senses(config, senses: tuple[str, ...], draw) -> dict:
    """One tick of noise, as `tick` takes it."""
    import numpy as np

    height, width = config.image_shape
    joints = config.num_joints
    given = {
        "audio": {"audio": draw.standard_normal(1280).astype(np.float32) * 0.1},
        "images": {"images": draw.integers(0, 256, (config.num_cameras, height, width, 3), dtype=np.uint8)},
        "body": {"joint_positions": draw.standard_normal((4, joints, 3)),
                 "joint_rotations": draw.standard_normal((4, joints, 4))} if joints else {},
        "touch": {"touch": [{"point": point, "surface": 1, "force": 2.0, "x": 0.1, "y": 0.0, "z": 0.2,
                             "temperature": 30.0} for point in range(10)]},
        "words": {"words": "robot" if draw.random() < 0.2 else []},
    }  # fmt: skip
    return {name: value for sense in senses for name, value in given[sense].items()}


def time_ticks(options: argparse.Namespace, name: str) -> str:
    """The line of a row."""
    import numpy as np

    senses, streams = ROWS[name]
    creature, draw = make_creature(options, streams), np.random.default_rng(0)
    wall, cpu = [], []
    for _ in range(options.ticks or 400):
        given = raw_senses(creature.config, senses, draw)
        started, before = time.perf_counter(), time.thread_time()
        creature.tick(**given)
        cpu.append(1000 * (time.thread_time() - before))
        wall.append(1000 * (time.perf_counter() - started))
    figures = [np.percentile(times[20:], share) for times in (wall, cpu) for share in (50, 95)]
    return f"{name:26}" + "".join(f"{figure:11.1f}" for figure in figures)


def recorded_ticks(options: argparse.Namespace, creature):
    """The arguments of one tick after another: of the recordings in turn, for ever, or made up."""
    import numpy as np

    if options.data:
        from creature.data.recordings.schema import load_recordings
        from processing_creature import TARGETS

        splits, _ = load_recordings(options.data)
        split = splits["validation" if "validation" in splits else "train"]
        while True:
            for row in split:
                life = creature.processor.encode(row)
                life = {name: value for name, value in life.items() if name not in TARGETS}
                yield from ({name: value[t] for name, value in life.items()} for t in range(len(life["input_ids"])))
    config, draw = creature.config, np.random.default_rng(1)
    while True:
        yield {
            "input_ids": draw.choice([config.null_token_id, int(draw.integers(1000))], p=[0.85, 0.15]),
            "input_features": draw.standard_normal(config.audio_feature_size).astype(np.float32),
            "pixel_values": draw.integers(0, 256, (config.num_cameras, 3, *config.image_shape), dtype=np.uint8),
        }


def memory() -> float:
    """MiB that the process holds."""
    import psutil

    return psutil.Process().memory_info().rss / 2**20


def live_long(options: argparse.Namespace, creature) -> None:
    """Print memory, silence and words of a life on its own outputs."""
    from creature.live import Emission

    def silence(emission: Emission) -> bool:
        return emission.thought_id == creature.config.null_token_id

    ticks, outer = options.ticks or 45_000, recorded_ticks(options, creature)
    own = {"input_ids", "external_text_ids", "audio_codes", "animation", "animation_mask", "action", "action_mask"}
    print(
        f"{'tick':>8}  {'MiB':>8}  {'p50 ms':>7}  {'p95 ms':>7}  {'silent':>7}  {'words/min thought':>18}  {'said':>6}"
    )
    silent = thought = said = 0
    since = 0
    for tick in range(ticks):
        now = creature.step({name: value for name, value in next(outer).items() if name not in own})
        silent, thought, said = silent + silence(now), thought + len(now.thought), said + len(now.said)
        if (tick + 1) % max(1, ticks // LINES) == 0:
            count, clock = tick + 1 - since, creature.clock
            print(
                f"{tick + 1:8,}  {memory():8.0f}  {1000 * clock.p50:7.1f}  {1000 * clock.p95:7.1f}  "
                f"{silent / count:7.3f}  {750 * thought / count:18.1f}  {750 * said / count:6.1f}", flush=True,
            )  # fmt: skip
            silent = thought = said = 0
            since = tick + 1


def replay_losses(options: argparse.Namespace, creature) -> None:
    """Print the loss of a recorded life at each of `MOMENTS`."""
    import numpy as np
    import torch.nn.functional as F

    null, length = creature.config.null_token_id, 2 * creature.window
    filler = recorded_ticks(options, creature)
    probe = [next(filler) for _ in range(length)]
    creature.reset()
    print(f"\nthe loss of a recorded life of {length:,} ticks, replayed exactly: nats an id of internal text")
    for moment in [moment for moment in MOMENTS if moment + length <= (options.ticks or 45_000)]:
        while creature.now < moment:
            creature.step(next(filler), feed_back=False)
        losses, words = [], []
        for tick, following in zip(probe, [*probe[1:], None], strict=True):
            step = creature.step(tick, feed_back=False).step
            if following is not None and following["input_ids"] >= 0:
                target = step.logits.new_tensor([following["input_ids"]]).long()
                losses.append(F.cross_entropy(step.logits.float(), target).item())
                words.append(int(following["input_ids"]) != null)
        losses, words = np.array(losses), np.array(words)
        print(f"from tick {moment:6,}: {losses.mean():.4f}, words alone {losses[words].mean():.4f}", flush=True)


def main() -> None:
    options = parse_arguments()
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    where = f"{options.threads} thread(s) of a CPU" if options.device == "cpu" else torch.cuda.get_device_name()
    print(f"{where}, torch {torch.__version__}")
    if options.endurance:
        creature = make_creature(options)
        live_long(options, creature)
        replay_losses(options, creature)
        return
    print(f"{'':26}{'wall p50':>11}{'wall p95':>11}{'CPU p50':>11}{'CPU p95':>11}   ms a tick")
    for name in ROWS:
        print(time_ticks(options, name), flush=True)


if __name__ == "__main__":
    main()
