"""What a creature that was trained on the room loses without each sense, on the words that only one sense can tell.

  python benchmarks/witnesses.py recordings/room --checkpoint checkpoints/whole
  python benchmarks/witnesses.py recordings/room --checkpoint checkpoints/whole --output witnesses.json

On the lives of the validation split: for every fact of `benchmarks/leaks.py` (the side of a thing, its color, how it
feels, who speaks ...) the nats of the thought word that tells it, with all senses and with some of them taken away;
then those of all words that are thought, and of all that are said. The second table is how much more they are without.
In parentheses, who knows it; n is the number of words.

The nats of a word are the sum of those of its tokens, each given all that came before it. A word with a token at the
first tick of a clip, which nothing predicts, is left out. Chance is the entropy sum(p log(1 / p)) in nats, where p is
how often each answer is the right one among the same words: what a word costs someone who knows that the fact comes now
and how often each answer does, and nothing else. The answer of the speaker is the first or the second visitor.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

# In place of this folder, whose tokenize.py would hide the standard library's module of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np  # noqa: E402

from benchmarks.leaks import WITNESS, facts_of  # noqa: E402
from creature.errors import UserError, run_main  # noqa: E402
from creature.files import user_path  # noqa: E402
from scripts.evaluate_recordings import add_arguments, open_recordings  # noqa: E402

# What is taken away; the ears hear sound and words.
TAKEN = {
    "audio": ("audio",), "external_voice": ("external_voice",), "ears": ("audio", "external_voice"),
    "eyes": ("vision",), "skin": ("touch",), "body": ("proprioception",),
}  # fmt: skip
STREAMS = {"internal_text": "labels", "external_text": "external_text_targets"}


def place_words(entries: list[dict], processor, ticks: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Where a text of a recording lies: the id of every tick, silence included, and the number of the entry that it is a
    part of, -1 for none; int32 [ticks or more] each, as the processor places them.
    """
    from ticks_creature import queue_tokens, tick_of

    texts = [(tick_of(entry["start"]), processor.encode_words(entry["word"])) for entry in entries]
    numbers = [(tick, [number] * len(ids)) for number, (tick, ids) in enumerate(texts)]
    return queue_tokens(texts, ticks, processor.config.null_token_id), queue_tokens(numbers, ticks, -1)


def token_nats(model, batch: dict) -> dict[str, np.ndarray]:
    """
    The cross entropy of every token of both texts, float32 [B, T] at its own tick; NaN at silent and at first ticks.

    batch: of `collate_clips`, on the model's device. A stream that the creature has not learned is left out.
    """
    import torch

    from losses_creature import IGNORE_INDEX, linear_token_losses
    from processing_creature import TARGETS

    found = {}
    with torch.no_grad():
        senses = {name: value for name, value in batch.items() if name not in TARGETS}
        before = model(**senses, logits_to_keep=1, use_cache=False).last_hidden_state[:, :-1]
        for stream, name in STREAMS.items():
            if not model.config.loss_weights[stream] or name not in batch:
                continue
            due = batch[name][:, 1:]
            spoken = (due != IGNORE_INDEX) & (due != model.config.null_token_id)
            states, head = before[spoken], model._head()
            if stream == "external_text":
                states, head = model.streams.external_text.proj(states), model.model.embed_tokens.weight
            nats = torch.full(batch[name].shape, float("nan"))
            nats[:, 1:][spoken.cpu()] = linear_token_losses(states, head, due[spoken])[0].cpu()
            found[stream] = nats.numpy()
    return found


def nats_of_lives(model, clips) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """
    `token_nats` [ticks] of every life, by recording_id, what is taken away ("" is nothing) and stream; beside the nats,
    under the names of their columns, the targets.
    """
    import torch

    from creature.data import collate_clips
    from creature.data.recordings.rows import ARGUMENTS, EvaluationClips
    from processing_creature import ABSENT

    columns = {taken: {name for sense in senses for name in ARGUMENTS[sense]} for taken, senses in TAKEN.items()}
    columns = {"": set()} | {taken: names for taken, names in columns.items() if names & set(clips.column_names)}
    about, rows = clips.select_columns(["recording_id", "first_tick", "ticks"])[:], EvaluationClips(clips)
    about = list(zip(*about.values(), strict=True))
    ticks = {life: max(first + count for other, first, count in about if other == life) for life, _, _ in about}
    lives = {life: defaultdict(dict) for life in ticks}
    size = 16 if model.device.type == "cuda" else 2
    for start in range(0, len(about), size):
        batch = collate_clips([rows[number] for number in range(start, min(start + size, len(about)))])
        targets = {name: batch[name].numpy() for name in STREAMS.values() if name in batch}
        batch = {name: value.to(model.device) for name, value in batch.items()}
        found = {"targets": targets}
        for taken, names in columns.items():
            gone = {name: torch.full_like(batch[name], ABSENT[name]) for name in names & batch.keys()}
            found[taken] = token_nats(model, batch | gone)
        for row, (life, first, count) in enumerate(about[start : start + size]):
            for taken, streams in found.items():
                for stream, values in streams.items():
                    empty = np.full(ticks[life], np.nan)
                    lives[life][taken].setdefault(stream, empty)[first : first + count] = values[row, :count]
    return lives


def words_of(row: dict, life: dict, processor) -> dict[str, tuple[np.ndarray, dict[str, np.ndarray]]]:
    """
    By stream: (tokens of every word [words], nats of every word [words] by what is taken away) of a row of recordings;
    NaN where one of its tokens is not predicted. AssertionError where the tokens of a clip are not those of the words.

    life: what `nats_of_lives` gives of it.
    """
    found = {}
    for stream in life[""]:
        entries, due = row[stream], life["targets"][STREAMS[stream]]
        ids, numbers = (values[: len(due)] for values in place_words(entries, processor, len(due)))
        known = due >= 0  # not NaN, nor a tick behind the end, where a burst of words that are heard may end
        assert (due == ids)[known].all(), f"{row['recording_id']}: {stream} is not at the ticks of its words"
        spoken = numbers >= 0
        sums = {
            taken: np.bincount(numbers[spoken], streams[stream][spoken], len(entries))
            for taken, streams in life.items()
            if taken != "targets"
        }
        found[stream] = np.bincount(numbers[spoken], minlength=len(entries)), sums
    return found


def entropy(answers: list[str]) -> float:
    """Of the frequencies of answers, in nats."""
    shares = np.array(list(Counter(answers).values())) / len(answers)
    return float((shares * np.log(1 / shares)).sum())


def measure(rows: list[dict], lives: dict, processor) -> dict[str, dict]:
    """
    By fact, and of all words that are `thought` and `said`: `words` (how many), `tokens`, `chance` (of facts), `nats` a
    word with all senses, `without` (nats a word, by what is taken away).

    rows: of recordings, with recording_id and texts; those without clips are left out. lives: of `nats_of_lives`.
    """
    tokens, nats, answers = defaultdict(list), defaultdict(lambda: defaultdict(list)), defaultdict(list)

    def add(name: str, counts: np.ndarray, sums: dict, numbers) -> None:
        tokens[name] += counts[numbers].tolist()
        for taken, values in sums.items():
            nats[name][taken] += values[numbers].tolist()

    for row in [row for row in rows if row["recording_id"] in lives]:
        words = words_of(row, lives[row["recording_id"]], processor)
        for stream, name in (("internal_text", "thought"), ("external_text", "said")):
            if stream in words:
                counts, sums = words[stream]
                add(name, counts, sums, ~np.isnan(sums[""]))
        at = {entry["start"]: number for number, entry in enumerate(row["internal_text"])}
        for fact, answer, time in facts_of(row):
            counts, sums = words["internal_text"]
            assert fact == "speaker" or row["internal_text"][at[time]]["word"] == answer, f"{answer} is not at {time} s"
            if not np.isnan(sums[""][at[time]]):
                add(fact, counts, sums, [at[time]])
                answers[fact].append(answer)
    found = {}
    for name in [name for name in (*WITNESS, "thought", "said") if tokens[name]]:
        means = {taken: float(np.mean(values)) for taken, values in nats[name].items()}
        found[name] = {"witness": WITNESS[name], "chance": entropy(answers[name])} if name in WITNESS else {}
        found[name] |= {"words": len(tokens[name]), "tokens": sum(tokens[name])}
        found[name] |= {"nats": means.pop(""), "without": means}
    return found


def print_tables(found: dict[str, dict]) -> None:
    from benchmarks.baselines.common import print_table

    nats, more = {}, {}
    for name, figures in found.items():
        label = f"{name} ({'+'.join(WITNESS[name])})" if name in WITNESS else name
        label = f"{label}, n = {figures['words']}"
        chance = {"chance": figures["chance"]} if "chance" in figures else {}
        nats[label] = [chance | {"all": figures["nats"]} | figures["without"]]
        more[label] = [{taken: value - figures["nats"] for taken, value in figures["without"].items()}]
    taken = list(found["thought"]["without"])
    print("nats a word, with all senses and without")
    print_table(["chance", "all", *taken], nats)
    print("\nmore nats a word without")
    print_table(taken, more)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=user_path, help="of recordings of the room, with a validation split")
    add_arguments(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    import torch
    import transformers
    from datasets import DatasetDict

    from benchmarks.baselines.common import say
    from creature.data.recordings.clips import make_clips
    from creature.files import replace_file, require_writable
    from creature.hardware import device_info
    from creature.loading import find_model, load_config, load_model, load_processor, trained_ticks
    from creature.settings import DataArguments
    from creature.world.recording import ABOUT

    transformers.utils.logging.disable_progress_bar()
    if arguments.output:
        require_writable(Path(arguments.output).parent)
    folder = find_model(arguments.checkpoint)
    config, device = load_config(folder), device_info(arguments.device)
    if not config.loss_weights["internal_text"]:
        raise UserError(f"{folder} has not learned to think: give a creature that was trained on the room")
    recordings, facts = open_recordings(arguments.folder)
    held_out = recordings["validation"]
    if set(held_out.unique("source")) != {ABOUT["source"]}:
        raise UserError(f"{arguments.folder} was not recorded in the room: give what scripts/record_world.py made")
    processor = load_processor(folder, config)
    context = trained_ticks(folder, min(DataArguments.clip_ticks, config.max_position_embeddings))
    cache = Path(arguments.cache_dir, "clips")
    clips = make_clips(DatasetDict({"validation": held_out}), facts, processor, context, cache)[0]["validation"]
    model = load_model(folder, device.kind, torch.float32)
    say(f"evaluating {folder} on {device.name}: {len(clips)} clips of up to {context} ticks")
    with torch.autocast(device.kind, dtype=torch.bfloat16, enabled=device.kind == "cuda" and device.bf16):
        lives = nats_of_lives(model, clips)
    found = measure(list(held_out.select_columns(["recording_id", "duration", *STREAMS])), lives, processor)
    print_tables(found)
    if arguments.output:
        result = {"checkpoint": str(folder), "data": arguments.folder, "clip_ticks": context, "clips": len(clips)}
        with replace_file(arguments.output, "w") as file:
            file.write(json.dumps(result | {"words": found}, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
