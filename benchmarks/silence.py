"""Why a creature falls silent: a micro creature learns to name what it hears, and lives on with each way of drawing.

examples:
  python benchmarks/silence.py                                  # two minutes of one CPU thread
  python benchmarks/silence.py --steps 300 --ticks 1000         # a look
  python benchmarks/silence.py --ticks 1000 --long 45000        # an hour of life

Now and then it hears one of eight tones; after a while, whose length nobody can know, it thinks the tone's word of two
tokens, and later says it. In between it is silent. "true" is the life that it learned from; "forced" is the likeliest
id where all ids before are those of that life; in all other rows it lives on its own ids. Printed are the share of
silent ticks of both texts in the first and the last quarter, words a minute of thoughts, and the share of words thought
that name the latest tone.

Then it lives --long ticks as a live creature does by default, and the recorded life is replayed exactly: the loss of
its ids within the first window, and from ticks 3,000 and 40,000 on.
"""

import argparse
import math
import sys
import time
from pathlib import Path

# In place of this folder, whose tokenize.py would hide the standard library's module of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

NULL, TONES, TONE_TICKS = 60, 8, 3
TICKS_A_MINUTE = 750


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800, help="training steps of 32 x 64 ticks (default 800)")
    parser.add_argument("--ticks", type=int, default=4000, help="ticks of each life (default 4000)")
    parser.add_argument("--long", type=int, default=0, help="ticks of one long life (default: none)")
    parser.add_argument("--null_weight", type=float, default=0.3, help="null_loss_weight in training (default 0.3)")
    parser.add_argument("--window", type=int, default=64, help="ticks that attention sees when it lives (default 64)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def make_life(ticks: int, draw) -> dict:
    """`input_features` [ticks, 8], and the ids of both texts [ticks]; `tones`: the latest tone of each tick, or -1."""
    import numpy as np

    features = 0.1 * draw.standard_normal((ticks, TONES)).astype(np.float32)
    thought, said, tones = np.full(ticks, NULL), np.full(ticks, NULL), np.full(ticks, -1)
    tick = int(draw.integers(20))
    while tick < ticks:
        tone = int(draw.integers(TONES))
        features[tick : tick + TONE_TICKS, tone] += 1.0
        thinks = tick + TONE_TICKS + int(draw.geometric(0.25))
        says = thinks + 2 + int(draw.geometric(0.25))
        for stream, begin in ((thought, thinks), (said, says)):
            for place, token in enumerate((tone, TONES + tone)):
                if begin + place < ticks:
                    stream[begin + place] = token
        following = says + 2 + int(draw.integers(1, 12))
        tones[tick:following] = tone
        tick = following
    return {"input_features": features, "input_ids": thought, "external_text_ids": said, "tones": tones}


def train(options: argparse.Namespace):
    """The micro creature."""
    import numpy as np
    import torch

    from configuration_creature import CreatureConfig
    from modeling_creature import MultiModalCreature

    torch.manual_seed(options.seed)
    config = CreatureConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, null_token_id=NULL, null_loss_weight=options.null_weight, sense_hidden_size=32,
        num_mel_bins=TONES, audio_frames_per_tick=1, num_cameras=0, num_joints=0, num_touch_points=0,
        num_audio_codebooks=0, num_blend_shapes=0, loss_weights={"internal_text": 1.0, "external_text": 1.0},
    )  # fmt: skip
    model, draw = MultiModalCreature(config), np.random.default_rng(options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / options.steps)
    for step in range(options.steps):
        lives = [make_life(64, draw) for _ in range(32)]
        batch = {name: torch.from_numpy(np.stack([life[name] for life in lives])) for name in lives[0]}
        del batch["tones"]
        loss = model(**batch, labels=batch["input_ids"], external_text_targets=batch["external_text_ids"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 200 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    return model.eval()


def live(model, life: dict, how, options: argparse.Namespace, own: bool = True, window: int | None = None):
    """The ids of thoughts and words of a life [ticks] that hears `life`: on its own ids, or on those of `life`."""
    import numpy as np
    import torch

    from stepping_creature import Stepper

    past, generator = Stepper(model, window=window or options.window), torch.Generator().manual_seed(options.seed)
    sampling = {"internal_text": how, "external_text": how}
    thought, said, ids = [], [], {"input_ids": NULL, "external_text_ids": NULL}
    for tick in range(options.ticks):
        if not own:
            ids = {name: int(life[name][tick]) for name in ids}
        senses = {name: torch.tensor([[token]]) for name, token in ids.items()}
        senses["input_features"] = torch.from_numpy(life["input_features"][None, tick : tick + 1])
        step = model.step(past, sampling=sampling, generator=generator, **senses)
        ids = {"input_ids": int(step.internal_text), "external_text_ids": int(step.external_text)}
        thought.append(ids["input_ids"])
        said.append(ids["external_text_ids"])
    return np.array(thought), np.array(said)


def live_long(model, how, options: argparse.Namespace) -> None:
    """Print the shares of a long life, tenth by tenth, and the loss of a life that is replayed at several moments."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    from stepping_creature import Stepper

    options.ticks = options.long
    life = make_life(options.long + 1, np.random.default_rng(options.seed + 1000))
    thought, said = live(model, life, how, options)
    print(f"\n{options.long:,} ticks; silent share of thoughts, of words said, in each tenth, and the true one")
    for ids in (thought, said, life["input_ids"][1:]):
        print("  ".join(f"{(part == NULL).mean():.3f}" for part in np.array_split(ids, 10)))
    probe, past = slice(0, options.window), Stepper(model, window=options.window)
    moments = [moment for moment in (0, 3000, 40_000) if moment + 2 * options.window < options.long]
    order = []  # the life, with its first window once more at each moment; None: nobody looks at the loss
    for moment in moments:
        order += [(tick, False) for tick in range(options.window, options.window + moment - len(order))]
        order += [(tick, True) for tick in range(*probe.indices(options.long))]
    losses = []
    for tick, counts in order:
        senses = {name: torch.tensor([[int(life[name][tick])]]) for name in ("input_ids", "external_text_ids")}
        senses["input_features"] = torch.from_numpy(life["input_features"][None, tick : tick + 1])
        step = model.step(past, **senses)
        if counts:
            target = torch.tensor([int(life["input_ids"][tick + 1])])
            losses.append(F.cross_entropy(step.logits, target).item())
    for moment, part in zip(moments, np.array_split(losses, len(moments)), strict=True):
        half = options.window // 2  # before, what came earlier still counts
        print(f"loss from tick {moment:,} on: {part.mean():.4f}, of its second half {part[half:].mean():.4f}")


def report(name: str, thought, said, tones) -> str:
    import numpy as np

    quarter = len(thought) // 4
    silent = [(ids[part] == NULL).mean() for ids in (thought, said) for part in (slice(quarter), slice(-quarter, None))]
    begins = np.flatnonzero(thought < TONES)
    right = (thought[begins] == tones[begins]).mean() if len(begins) else float("nan")
    shares = "  ".join(f"{share:8.3f}" for share in silent)
    return f"{name:38}  {shares}  {len(begins) * TICKS_A_MINUTE / len(thought):9.1f}  {right:7.3f}"


def main() -> None:
    options = parse_arguments()
    import numpy as np
    import torch

    from sampling_creature import Sampling

    torch.set_num_threads(1)
    started = time.process_time()
    model = train(options)
    print(f"trained in {time.process_time() - started:.0f} s of processor time; null_loss_weight {options.null_weight}")
    life = make_life(options.ticks + 1, np.random.default_rng(options.seed + 1000))
    truth = {name: life[name][1:] for name in ("input_ids", "external_text_ids", "tones")}
    bias = -math.log(options.null_weight)
    rows = [
        ("greedy", Sampling()),
        ("greedy, bias", Sampling(null_bias=bias)),
        ("temperature 0.8", Sampling(temperature=0.8)),
        ("temperature 0.8, bias", Sampling(temperature=0.8, null_bias=bias)),
        ("temperature 1", Sampling(temperature=1.0)),
        ("temperature 1, bias", Sampling(temperature=1.0, null_bias=bias)),
        ("silence drawn at 1, words 0.8", Sampling(temperature=0.8, null_temperature=1.0)),
        ("silence drawn at 1, bias, words 0.8", Sampling(temperature=0.8, null_temperature=1.0, null_bias=bias)),
        ("silence drawn at 1, bias, words greedy", Sampling(null_temperature=1.0, null_bias=bias)),
    ]
    heads = ("thought 1", "thought 4", "said 1", "said 4")
    print(f"{'':38}  {'  '.join(f'{head:>8}' for head in heads)}  {'words/min':>9}  {'right':>7}")
    print(report("true", truth["input_ids"], truth["external_text_ids"], truth["tones"]))
    for name, how in rows[:2]:
        print(report(f"forced, {name}", *live(model, life, how, options, own=False), truth["tones"]), flush=True)
    for name, how in rows:
        print(report(name, *live(model, life, how, options), truth["tones"]), flush=True)
    for window in (options.window * 2, options.ticks):
        ids = live(model, life, rows[-2][1], options, window=window)
        print(report(f"{rows[-2][0][:24]}..., window {window}", *ids, truth["tones"]), flush=True)
    if options.long:
        live_long(model, rows[-2][1], options)


if __name__ == "__main__":
    main()
