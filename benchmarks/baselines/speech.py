"""The words of a sound: nats a token, with the right sound, without any, with another's; and whole answers right.

The encoder-decoder is a Speech2Text of transformers from scratch (as fairseq S2T, Wang et al. 2020), on the log-mel
frames of the creature's ears; labels are the GPT-2 ids of the text and end-of-text, whose targets are counted. It has
heads of 64, three layers that listen and two that write; at hidden size 512 that is about tiny's body and token table.
In training a tenth of the sounds are taken away (zeros), and two bands and two stretches of each are (SpecAugment, Park
et al. 2019). "all right": every token of the text, its end included, has the highest logit. Another's sound is the next
recording's of the validation split. Each of "right sound" and "all right" is that of its own best evaluation, the
nats without and with another's sound are of the evaluation with the lowest nats. Folds are counted together.

The simple models answer with the most frequent text, or with the words that a logistic regression a word finds in mean
and standard deviation of each band over the recording; it is right where the set of words is.
"""

import argparse
from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.baselines.common import count_parameters, fit, need_scikit_learn, open_clips, print_table, say, text_ids
from creature.data.text.tokenizer import load_tokenizer

BATCH = 16
# Padding. Speech2Text counts positions from it, so the creature's 50258 is too large; the byte 0 is never in a text.
PAD_ID = 188
NO_SOUND = 0.1  # share of the sounds that are taken away in training
BANDS, FRAMES = 12, 40  # most of a stretch that SpecAugment takes away
DROPOUTS = (0.1, 0.3)
STRENGTHS = (0.001, 0.01, 0.1)  # C of the logistic regressions
FEWEST = 3  # recordings with a word that is worth one
HEAD = ["right sound", "no sound", "another's", "all right"]


def report(options: argparse.Namespace) -> None:
    """Print the figures of every model on the validation splits of all folds."""
    need_scikit_learn()
    folds, config = [], None
    for folder in options.folders:
        splits, config = open_clips(folder, options.cache_dir, "input_features")
        folds.append([to_pairs(splits[name], config) for name in ("train", "validation")])
    simple = [(most_frequent(*fold), by_word(*fold)) for fold in folds]
    sizes = [len(held_out) for _, held_out in folds]
    rows = {
        name: [{"all right": float(np.average([fold[place] for fold in simple], weights=sizes))}]
        for place, name in enumerate(("most frequent text", "logistic regression a word"))
    }
    for hidden in options.hidden:
        for rate in options.learning_rates:
            for dropout in DROPOUTS:
                for seed in options.seeds:
                    torch.manual_seed(seed)
                    found, name = [], ""
                    for train, held_out in folds:
                        model = build(config, hidden, dropout).to(options.device)
                        name = f"encoder-decoder {count_parameters(model)}, rate {rate:g}, dropout {dropout:g}"
                        say(f"{name}, seed {seed}, fold {len(found)}")
                        found.append(fit_model(model, train, held_out, seed, rate, options))
                    tokens = [sum(len(ids) for _, ids in held_out) for _, held_out in folds]
                    figures = {
                        column: float(
                            np.average([one[column] for one in found], weights=sizes if column == HEAD[-1] else tokens)
                        )
                        for column in HEAD
                    }
                    rows.setdefault(name, []).append(figures)
    print(f"{len(folds)} folds, {sum(sizes)} recordings to validate")
    print_table(HEAD, rows)


def to_pairs(clips: list[dict], config) -> list[tuple[torch.Tensor, list[int]]]:
    """(log-mel frames [N, bands], ids) of every recording that has both."""
    pairs = []
    for clip in clips:
        if clip.get("labels") is not None and text_ids(clip, config):
            ticks = clip["input_features"][clip["input_features_mask"]]
            pairs.append((torch.from_numpy(ticks.reshape(-1, config.num_mel_bins)), text_ids(clip, config)))
    return pairs


def most_frequent(train: list, held_out: list) -> float:
    """The share of the recordings whose text is the most frequent one."""
    text = Counter(tuple(ids) for _, ids in train).most_common(1)[0][0]
    return float(np.mean([tuple(ids) == text for _, ids in held_out]))


def by_word(train: list, held_out: list) -> float:
    """The share of the recordings of which logistic regressions find exactly the words, at the best strength."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    tokenizer = load_tokenizer()
    words, truth = ([set(tokenizer.decode(ids[:-1]).split()) for _, ids in pairs] for pairs in (train, held_out))
    sounds, heard = (
        np.stack([torch.cat((frames.mean(0), frames.std(0))).numpy() for frames, _ in pairs])
        for pairs in (train, held_out)
    )
    scaler = StandardScaler().fit(sounds)
    sounds, heard = scaler.transform(sounds), scaler.transform(heard)
    shares = []
    for strength in STRENGTHS:
        answers = [set() for _ in truth]
        for word, count in Counter(word for some in words for word in some).items():
            if count < FEWEST:
                continue
            found = np.ones(len(truth), dtype=bool)
            if count < len(words):
                model = LogisticRegression(C=strength, max_iter=1000).fit(sounds, [word in some for some in words])
                found = model.predict(heard)
            for place in np.flatnonzero(found):
                answers[place].add(word)
        shares.append(float(np.mean([answer == some for answer, some in zip(answers, truth, strict=True)])))
    return max(shares)


def build(config, hidden: int, dropout: float):
    """An encoder-decoder with the creature's ears and token ids, untrained."""
    from transformers import Speech2TextConfig, Speech2TextForConditionalGeneration

    heads = max(1, hidden // 64)
    return Speech2TextForConditionalGeneration(
        Speech2TextConfig(
            vocab_size=config.vocab_size, d_model=hidden, encoder_layers=3, decoder_layers=2,
            encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=4 * hidden,
            decoder_ffn_dim=4 * hidden, dropout=dropout, attention_dropout=dropout, activation_dropout=dropout,
            conv_channels=hidden, input_feat_per_channel=config.num_mel_bins, pad_token_id=PAD_ID,
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, use_cache=False,
            decoder_start_token_id=config.bos_token_id,
        )
    )  # fmt: skip


def collate(pairs: list, device: str) -> dict[str, torch.Tensor]:
    """Arguments of the encoder-decoder for some recordings, padded to the longest."""
    sounds, texts = zip(*pairs, strict=True)
    lengths = torch.tensor([len(sound) for sound in sounds])
    return {
        "input_features": torch.nn.utils.rnn.pad_sequence(sounds, batch_first=True).to(device),
        "attention_mask": (torch.arange(lengths.max()) < lengths[:, None]).long().to(device),
        "labels": torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(ids) for ids in texts], batch_first=True, padding_value=-100
        ).to(device),
    }


def augmented(pairs: list, seed: int, device: str) -> Iterator[dict]:
    """Endless shuffled batches with parts of the sounds, and some whole ones, taken away."""
    draw = np.random.default_rng(seed)
    while True:
        order = draw.permutation(len(pairs))
        for first in range(0, len(order), BATCH):
            sounds = []
            for place in order[first : first + BATCH]:
                sound = pairs[place][0].clone()
                for size, most, dim in ((len(sound), FRAMES, 0), (sound.shape[1], BANDS, 1)) * 2:
                    width = draw.integers(min(most, size // 4) + 1)
                    sound.narrow(dim, draw.integers(size - width + 1), width).zero_()
                sounds.append((sound * (draw.random() >= NO_SOUND), pairs[place][1]))
            yield collate(sounds, device)


def fit_model(model, train: list, held_out: list, seed: int, rate: float, options) -> dict[str, float]:
    """The figures of one encoder-decoder on one fold."""
    batches = [held_out[first : first + BATCH] for first in range(0, len(held_out), BATCH)]
    right = []

    def evaluate() -> dict[str, float]:
        figures = {}
        sounds = [sound for sound, _ in held_out]
        others = {"right sound": sounds, "no sound": [sound * 0 for sound in sounds],
                  "another's": sounds[1:] + sounds[:1]}  # fmt: skip
        for name, given in others.items():
            nats, tokens, correct = 0.0, 0, 0
            for start, pairs in zip(range(0, len(held_out), BATCH), batches, strict=True):
                texts = [ids for _, ids in pairs]
                batch = collate(list(zip(given[start : start + BATCH], texts, strict=True)), options.device)
                logits, labels = model(**batch).logits.float(), batch["labels"]
                nats += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
                tokens += (labels >= 0).sum().item()
                correct += ((logits.argmax(-1) == labels) | (labels < 0)).all(1).sum().item()
            figures[name] = nats / tokens
            if name == "right sound":
                right.append(correct / len(held_out))
        return figures | {"now right": right[-1]}

    found = fit(
        model, lambda batch: model(**batch).loss, augmented(train, seed, options.device), evaluate, "right sound",
        options.steps, rate, weight_decay=0.1,
    )  # fmt: skip
    return found | {"all right": max(right)}
