"""Training of a CreatureCodec on the voices of recordings, and what it makes of voices that were held out."""

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers.audio_utils import mel_filter_bank

from codec_creature import CreatureCodec, decode_voice, encode_voice
from creature.callbacks import log_line
from creature.errors import UserError
from creature.files import replace_file
from feature_extraction_creature import CreatureFeatureExtractor, read_sound, resample, to_mono, wav_bytes

if TYPE_CHECKING:
    from datasets import DatasetDict

SPECTRA = ((256, 20), (512, 40), (1024, 80), (2048, 128))  # samples of the window, mel bands, of each term of the loss
SOFTEST = 1e-5  # energies below it count as silence
ROWS, TICKS = 16, 16  # of a step: 20 s of voice
LOG_STEPS = 100  # from one line to the next, where no terminal shows a progress bar
WARMUP = 0.05  # of the steps
LOUDER = (-6.0, 3.0)  # dB by which a piece is made louder, at random
JUDGED_SECONDS = 600  # of the training voices and of the held-out ones, by which a codec is judged
FRAME_SECONDS = 0.01  # of the log-mel frames by which voices are compared


def read_voices(recordings: "DatasetDict", column: str, rate: int) -> dict[str, list[np.ndarray]]:
    """
    The sounds of a column, by split, float32 [N] at the rate: an hour of them takes 230 MB of memory.

    Raises UserError where a split has none, or one cannot be read.
    """
    voices = {}
    for split, rows in recordings.items():
        voices[split] = []
        for row in rows.select_columns(["recording_id", column]):
            if row[column] is not None:
                try:
                    samples, given = read_sound(row[column])
                    sound = resample(to_mono(samples), given, rate)
                    voices[split] += [sound] if len(sound) else []
                except (ValueError, ImportError) as error:
                    raise UserError(f"{column} of {row['recording_id']} cannot be used: {error}") from error
    if not voices.get("train"):
        other = "voice" if column == "audio" else "audio"
        raise UserError(f"no recording of the training split has a {column}: choose another --column, such as {other}")
    return voices


class SpectralLoss(nn.Module):
    """The mean distance of the log-mel spectra of two sounds, summed over windows of several lengths."""

    def __init__(self, rate: int):
        super().__init__()
        for samples, bands in SPECTRA:
            filters = mel_filter_bank(samples // 2 + 1, bands, 20.0, rate / 2, rate, mel_scale="htk")
            self.register_buffer(f"filters_{samples}", torch.tensor(filters, dtype=torch.float32))

    def forward(self, decoded: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
        """Both [B, N] -> nats."""
        return sum(F.l1_loss(self._log_mel(decoded, s), self._log_mel(original, s)) for s, _ in SPECTRA)

    def _log_mel(self, samples: torch.Tensor, window: int) -> torch.Tensor:
        hann = torch.hann_window(window, device=samples.device)
        spectrum = torch.stft(samples, window, window // 4, window=hann, center=False, return_complex=True)
        energies = spectrum.abs().square().transpose(1, 2) @ getattr(self, f"filters_{window}")
        return (energies * 4 / window + SOFTEST).log()  # a louder sum in a longer window


def train_codec(
    codec: CreatureCodec, voices: list[np.ndarray], steps: int, learning_rate: float, device: str, seed: int = 0
) -> list[float]:
    """Train a codec in place on random pieces of the voices; returns the loss of every step."""
    draw, rate = np.random.default_rng(seed), codec.config.sampling_rate
    codec.to(device).train()
    criterion = SpectralLoss(rate).to(device)
    optimizer = torch.optim.AdamW(codec.parameters(), learning_rate, betas=(0.8, 0.99), weight_decay=0.01)
    warmup = max(1, round(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    losses, began, bar = [], time.perf_counter(), tqdm(range(steps), desc="codec", unit="step", disable=None)
    for _ in bar:
        original = torch.from_numpy(_draw_pieces(voices, TICKS * codec.config.tick_samples, draw)).to(device)
        loss = criterion(codec(original[:, None]).audio_values[:, 0], original)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(codec.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise UserError(f"the loss is {losses[-1]} at step {len(losses)}: lower --learning_rate")
        done, recent = len(losses), np.mean(losses[-50:])
        bar.set_postfix(loss=f"{recent:.3f}", refresh=False)
        if bar.disable and (done == 1 or done % LOG_STEPS == 0):
            left = (time.perf_counter() - began) / done * (steps - done)
            print(log_line(done, steps, {"loss": recent}, left), flush=True)
    codec.eval()
    return losses


def _draw_pieces(voices: list[np.ndarray], samples: int, draw: np.random.Generator) -> np.ndarray:
    """float32 [ROWS, samples]: every second of the voices is as likely; shorter ones end in silence."""
    lengths = np.array([len(voice) for voice in voices], np.float64)
    pieces = np.zeros((ROWS, samples), np.float32)
    for piece, at in zip(pieces, draw.choice(len(voices), ROWS, p=lengths / lengths.sum()), strict=True):
        start = draw.integers(max(1, len(voices[at]) - samples + 1))
        part = voices[at][start : start + samples]
        piece[: len(part)] = part * 10 ** (draw.uniform(*LOUDER) / 20)
    return pieces


def evaluate_codec(codec: CreatureCodec, train: list[np.ndarray], held_out: list[np.ndarray]) -> dict:
    """
    What a codec makes of held-out voices, of ten minutes of them.

    Returns:
        `distance`: mean absolute difference between the log-mel frames (10 ms, 64 bands) of a voice and of what is
        decoded, in nats of energy; `distance_mean`: of the mean frame of the training voices; `distance_silence`.
        `used`: of each book, the share of codes that occur; `perplexity`: of each, exp of the entropy of its codes.
        `seconds`: of held-out voice.
    """
    rate, books = codec.config.sampling_rate, codec.config.num_quantizers
    ears = CreatureFeatureExtractor(sampling_rate=rate)
    train, held_out = (_first(voices, JUDGED_SECONDS * rate) for voices in (train, held_out))

    def frames(sound: np.ndarray) -> np.ndarray:
        return ears.extract(sound, rate).reshape(-1, ears.feature_size) * ears.std + ears.mean

    total, count = np.zeros(ears.feature_size), 0
    for voice in train:
        found = frames(voice)
        total, count = total + found.sum(axis=0), count + len(found)
    errors, sums, codes = {"distance": 0.0, "distance_mean": 0.0, "distance_silence": 0.0}, 0, []
    for voice in held_out:
        codes.append(encode_voice(codec, voice, rate, books))
        original, decoded = frames(voice), frames(decode_voice(codec, codes[-1])[: len(voice)])
        others = {"distance": decoded, "distance_mean": total / count, "distance_silence": math.log(ears.mel_floor)}
        for name, other in others.items():
            errors[name] += np.abs(original - other).mean(axis=1).sum()
        sums += len(original)
    shares = [np.bincount(book, minlength=codec.config.codebook_size) for book in np.concatenate(codes).T]
    shares = [counts / counts.sum() for counts in shares]
    return {name: float(error / sums) for name, error in errors.items()} | {
        "used": [float((share > 0).mean()) for share in shares],
        "perplexity": [float(np.exp(-(share[share > 0] * np.log(share[share > 0])).sum())) for share in shares],
        "seconds": sum(map(len, held_out)) / rate,
    }


def _first(voices: list[np.ndarray], samples: int) -> list[np.ndarray]:
    """As many of the first voices, the last of them cut, as have so many samples together."""
    kept = []
    for voice in voices:
        kept.append(voice[:samples])
        samples -= len(kept[-1])
        if samples <= 0:
            break
    return kept


def write_samples(codec: CreatureCodec, voices: list[np.ndarray], folder: Path, seconds: float = 6.0) -> list[Path]:
    """The beginnings of some voices and what is decoded of them: WAV files, and samples.png with their spectra."""
    from matplotlib.figure import Figure

    rate, paths = codec.config.sampling_rate, []
    ears = CreatureFeatureExtractor(sampling_rate=rate)
    figure = Figure(figsize=(10, 2.2 * 2 * len(voices)), layout="constrained")
    axes = figure.subplots(2 * len(voices), squeeze=False)[:, 0]
    for number, voice in enumerate(voices):
        original = voice[: int(seconds * rate)]
        decoded = decode_voice(codec, encode_voice(codec, original, rate, codec.config.num_quantizers))[: len(original)]
        for what, sound, axis in zip(("original", "decoded"), (original, decoded), axes[2 * number :], strict=False):
            paths.append(folder / f"sample_{number + 1}_{what}.wav")
            with replace_file(paths[-1]) as file:
                file.write(wav_bytes(sound, rate))
            mel = ears.extract(sound, rate).reshape(-1, ears.feature_size).T
            axis.imshow(mel, origin="lower", aspect="auto", extent=(0, len(sound) / rate, 0, 64), cmap="magma")
            axis.set_ylabel("mel band", fontsize=8)
            axis.set_title(f"sample {number + 1}, {what}", fontsize=9)
            axis.tick_params(labelsize=7)
    axes[-1].set_xlabel("s", fontsize=8)
    paths.append(folder / "samples.png")
    with replace_file(paths[-1]) as file:
        figure.savefig(file, format="png", dpi=90)
    return paths
