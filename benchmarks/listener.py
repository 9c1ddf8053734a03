"""Whether the words of a creature's voice can be made out: a small recogniser of the true voice listens to it.

examples:
  python benchmarks/listener.py recordings/room --checkpoint checkpoints/whole
  python benchmarks/listener.py recordings/room --checkpoint checkpoints/whole --lives 3 --samples samples

The recogniser is a small convolutional net. It learns from the recorded voices of the training split which word begins
at a tick, given the log-mel frames from 0.16 s before that tick to 0.64 s after it. Words and ticks are those of the
creature's external text, a token a tick from the word's start on, so that recorded and own words are treated alike;
words that occur fewer than --least times in the training split are left out. The voice is the one that is commanded in
a tick: it is heard a tick later. On the validation split the recogniser hears

true voice    the recorded voice
codec         what is decoded of the codes of the recorded voice: the most that a creature can reach with its codec
recorded past the creature's, where all that it senses and emitted before is recorded: the codes of each tick are drawn
              one tick ahead; its words are the recorded ones
own past      the creature's, where it lives on its own outputs; its words are those that it says itself. It hears what
              was recorded, the recorded voice included, a tick after it was said
silence       nothing, at the recorded words

and the table shows the share of words recognised, that of the most frequent of these words, and words a minute (of
all, those that are left out included). A figure is the median over the seeds of the recogniser, lowest and highest in
parentheses.
"""

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

# In place of this folder, whose tokenize.py would hide the standard library's module of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from creature.errors import UserError, first_line, run_main  # noqa: E402
from creature.files import user_path  # noqa: E402

FRAMES_PER_TICK, BANDS = 8, 64
BEFORE, AFTER = 2, 8  # ticks of sound before and after the beginning of a word's tick
CHANNELS, KERNEL, DROPOUT = 128, 5, 0.3
BATCH, LEARNING_RATE = 64, 1e-3
LISTENED_TO = 3  # lives of which --samples writes the voices
HEAD = ["recognised", "most frequent", "words a minute"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=user_path, help="of recordings with a voice and external text")
    parser.add_argument("--checkpoint", type=user_path, required=True, help="folder of a creature that speaks")
    parser.add_argument("--lives", type=int, help="of the validation split (default: all)")
    parser.add_argument("--least", type=int, default=10, metavar="N", help="times a word occurs (default 10)")
    parser.add_argument("--steps", type=int, default=600, help="of the recogniser, 64 words each (default 600)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(default 0 1 2)")
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"), help="(default: a GPU if there is one)")
    parser.add_argument("--output", type=user_path, metavar="FILE", help="JSON for the figures")
    parser.add_argument("--samples", type=user_path, metavar="FOLDER", help="for WAV files of the first lives' voices")
    return parser.parse_args()


def windows(sound, sampling_rate: int, ticks: list[int]):
    """The log-mel frames around the beginning of each tick of a sound [N], float32 [ticks, bands, frames]."""
    import numpy as np

    from feature_extraction_creature import CreatureFeatureExtractor, to_mono
    from ticks_creature import TICK_SECONDS

    tick, length = round(TICK_SECONDS * sampling_rate), BEFORE + AFTER
    padded = np.pad(to_mono(sound), (BEFORE * tick, length * tick))
    ears = CreatureFeatureExtractor(BANDS, frames_per_tick=FRAMES_PER_TICK)
    found = np.zeros((len(ticks), BANDS, length * FRAMES_PER_TICK), np.float32)
    for row, at in zip(found, ticks, strict=True):
        mel = ears.extract(padded[at * tick : (at + length) * tick], sampling_rate)[:length]
        row[:] = mel.reshape(-1, BANDS).T
    return found


def train(heard, labels, words: int, steps: int, seed: int, device: str):
    """A recogniser of so many words from windows [N, bands, frames] and labels int64 [N], both as numpy."""
    import torch
    from torch import nn

    torch.manual_seed(seed)
    half = {"kernel_size": KERNEL, "stride": 2, "padding": KERNEL // 2}
    net = nn.Sequential(
        nn.Conv1d(BANDS, CHANNELS, **half), nn.GELU(), nn.Conv1d(CHANNELS, CHANNELS, **half), nn.GELU(), nn.Flatten(),
        nn.Dropout(DROPOUT), nn.Linear(CHANNELS * (BEFORE + AFTER) * FRAMES_PER_TICK // 4, words),
    ).to(device)  # fmt: skip
    heard, labels = torch.from_numpy(heard).to(device), torch.from_numpy(labels).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        batch = torch.randint(len(labels), (BATCH,)).to(device)
        nn.functional.cross_entropy(net(heard[batch]), labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return net.eval()


def share_right(net, heard, labels) -> float:
    """The share of the windows whose word is recognised."""
    import torch

    device = next(net.parameters()).device
    with torch.no_grad():
        answers = [net(part).argmax(-1).cpu() for part in torch.from_numpy(heard).to(device).split(1024)]
    return (torch.cat(answers) == torch.from_numpy(labels)).double().mean().item()


def draw_codes(creature, life: dict):
    """
    The codes that the creature draws for each tick of a recorded life, int64 [T, books].

    It is played in clips of as many ticks as attention sees; the first codes of each are recorded.
    """
    import numpy as np
    import torch

    from processing_creature import TARGETS, widen

    model = creature.model
    senses = {name: widen(value) for name, value in life.items() if name not in TARGETS}
    senses = {name: torch.from_numpy(value)[None].to(model.device) for name, value in senses.items()}
    stream, table = model.streams.audio, model.model.senses.own_voice.code_table
    found = life["audio_codes"].astype(np.int64)
    for begin in range(0, len(found), creature.window):
        clip = {name: value[:, begin : begin + creature.window] for name, value in senses.items()}
        with torch.inference_mode():
            hidden = model(**clip, use_cache=False, logits_to_keep=1).last_hidden_state[0]
            noise = stream.draw_noise(len(hidden), table, creature.generator)
            codes, _ = stream.emit(hidden, table, creature.sampling["audio"], noise)
        found[begin + 1 : begin + len(codes)] = codes[:-1].cpu().numpy()
    return found


def live_on(creature, life: dict) -> tuple:
    """(codes int64 [T, books], words with their seconds) of a life on own outputs that senses what was recorded."""
    import numpy as np

    from creature.live.playback import outer_senses

    creature.speaking = None  # all codes are decoded at once, which is faster and sounds the same
    codes, said, senses = [], [], outer_senses(life)
    for tick in range(len(life["input_ids"])):
        emission = creature.step({name: value[tick] for name, value in senses.items()})
        codes.append(emission.voice_codes)
        said += emission.said
    # What is emitted at a tick is said at the next one.
    return np.stack([life["audio_codes"][0], *codes[:-1]]), said + creature.saying.finish()


def voices_of(creature, recording: dict, seed: int) -> dict[str, tuple]:
    """(samples [N], sampling rate, words with their seconds) of a recorded life, by the row of the table."""
    from codec_creature import decode_voice
    from feature_extraction_creature import read_sound, to_mono

    life, codec = creature.processor.encode(recording), creature.processor.codec
    words, rate = creature.processor.decode_words(life["external_text_ids"]), codec.config.sampling_rate
    true, true_rate = read_sound(recording["voice"])
    true = to_mono(true)
    creature.reset(seed)
    drawn = draw_codes(creature, life)
    creature.reset(seed)
    own, said = live_on(creature, life)
    return {
        "true voice": (true, true_rate, words),
        "codec": (decode_voice(codec, life["audio_codes"]), rate, words),
        "recorded past": (decode_voice(codec, drawn), rate, words),
        "own past": (decode_voice(codec, own), rate, said),
        "silence": (0 * true, true_rate, words),
    }


def with_words(split):
    """The recordings of a split that have a voice and words."""
    columns = zip(split["voice"], split["external_text"], strict=True)
    return split.select([number for number, (voice, words) in enumerate(columns) if voice is not None and words])


def true_voices(processor, split) -> list[tuple]:
    """As of `voices_of`, the recorded voices of a split."""
    from feature_extraction_creature import read_sound

    found = []
    for row in split.select_columns(["duration", "voice", "external_text"]):
        ids = processor.encode({name: row[name] for name in ("duration", "external_text")})["external_text_ids"]
        found.append((*read_sound(row["voice"]), processor.decode_words(ids)))
    return found


def hear(voices: list[tuple], vocabulary: dict[str, int]) -> tuple:
    """(windows [N, bands, frames], labels int64 [N]) of the words of some voices that are in a vocabulary."""
    import numpy as np

    from ticks_creature import tick_of

    heard, labels = [], []
    for sound, sampling_rate, words in voices:
        known = [word for word in words if word["word"] in vocabulary]
        heard.append(windows(sound, sampling_rate, [tick_of(word["start"]) for word in known]))
        labels += [vocabulary[word["word"]] for word in known]
    return np.concatenate(heard), np.array(labels, np.int64)


def open_creature(options: argparse.Namespace):
    """The creature; UserError for one that does not speak."""
    from creature.live import LiveCreature

    creature = LiveCreature.from_pretrained(options.checkpoint, options.device)
    if not {"audio", "external_text"} <= set(creature.streams) or creature.processor.codec is None:
        raise UserError(
            f"{options.checkpoint} holds a creature that does not speak: train one with the streams audio and "
            "external_text, and with --codec"
        )
    return creature


def write_samples(folder: Path, number: int, voices: dict[str, tuple]) -> None:
    """A WAV file of each voice of a life but silence."""
    from feature_extraction_creature import wav_bytes

    folder.mkdir(parents=True, exist_ok=True)
    for name, (sound, sampling_rate, _) in list(voices.items())[:-1]:
        (folder / f"life_{number + 1}_{name.replace(' ', '_')}.wav").write_bytes(wav_bytes(sound, sampling_rate))


def main() -> None:
    options = parse_arguments()
    from benchmarks.baselines.common import print_table, say
    from creature.data.recordings.schema import load_recordings
    from creature.files import replace_file, require_writable

    started = time.perf_counter()
    if options.output:
        require_writable(Path(options.output).parent)
    splits, _ = load_recordings(options.folder)
    splits = {name: with_words(split) for name, split in splits.items()}
    creature = open_creature(options)
    learned = true_voices(creature.processor, splits["train"])
    counts = Counter(word["word"] for *_, words in learned for word in words)
    words = [word for word, count in counts.most_common() if count >= options.least]
    if len(words) < 2 or not splits.get("validation"):
        raise UserError(
            f"{options.folder} has {len(words)} words that its train split says {options.least} times or more, and "
            f"{len(splits.get('validation', ()))} recordings to validate: record more lives, or lower --least"
        )
    vocabulary = {word: place for place, word in enumerate(words)}
    heard, labels = hear(learned, vocabulary)
    device = creature.model.device.type
    nets = [train(heard, labels, len(words), options.steps, seed, device) for seed in options.seeds]
    say(f"{len(nets)} recognisers of {len(words)} words, from {len(labels):,}: {time.perf_counter() - started:.0f} s")

    lives, minutes = {}, 0.0
    held_out = splits["validation"]
    for number in range(min(options.lives or len(held_out), len(held_out))):
        recording = held_out[number]
        try:
            voices = voices_of(creature, recording, seed=number)
        except ValueError as error:
            raise UserError(f"{recording['recording_id']} cannot be lived: {first_line(error)}") from error
        minutes += recording["duration"] / 60
        for name, voice in voices.items():
            lives.setdefault(name, []).append(voice)
        if options.samples and number < LISTENED_TO:
            write_samples(Path(options.samples), number, voices)
        say(f"life {number + 1}: {time.perf_counter() - started:.0f} s")
    rows = {}
    for name, voices in lives.items():
        heard, labels = hear(voices, vocabulary)
        figures = {"words a minute": sum(len(said) for *_, said in voices) / minutes}
        if len(labels):
            figures["most frequent"] = max(Counter(labels.tolist()).values()) / len(labels)
        rows[f"{name}, {len(labels)} words"] = [
            figures | ({"recognised": share_right(net, heard, labels)} if len(labels) else {}) for net in nets
        ]
    print(f"{len(words)} words, {minutes:.1f} minutes of validation")
    print_table(HEAD, rows)
    if options.output:
        with replace_file(options.output, "w") as file:
            file.write(json.dumps({"words": words, "minutes": minutes, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
