# Copyright 2026 The MultiModalCreature developers. Licensed under the Apache License, Version 2.0.
"""CreatureFeatureExtractor: from sound of any sampling rate to the log-mel frames of a tick, causal."""

import functools
import io
import math
import wave

import numpy as np
from transformers import AutoFeatureExtractor, BatchFeature, SequenceFeatureExtractor
from transformers.audio_utils import mel_filter_bank, optimal_fft_length, spectrogram, window_function

try:
    from .configuration_creature import CreatureConfig
    from .ticks_creature import TICK_SECONDS
except ImportError:
    from configuration_creature import CreatureConfig
    from ticks_creature import TICK_SECONDS

ZERO_CROSSINGS = 16  # on either side of the resampling filter: more is sharper and later
KAISER_BETA = 8.6  # its side lobes are below -80 dB
MOST_CHANNELS = 32  # of a sound [N, channels]; with more, it is the other way round
PIECE_SECONDS = 2.0  # of a long sound, framed at a time: memory does not grow with its length


class CreatureFeatureExtractor(SequenceFeatureExtractor):
    r"""
    Log-mel frames, `frames_per_tick` of them in a tick of 80 ms.

    A frame is the window that ends with it: it never looks past its own end, so a sound that arrives tick by tick
    (`stream`) gives the same numbers as the whole. Other sampling rates are resampled by a filter that looks back only,
    which delays the sound by 1 to 2 ms.

    Args:
        feature_size (`int`, defaults to 64): mel bands, from 20 Hz to half the sampling rate.
        sampling_rate (`int`, defaults to 16000): in Hz, after resampling.
        frames_per_tick (`int`, defaults to 8): a divisor of the samples in a tick.
        mel_floor (`float`, defaults to 1e-5): energies below it count as silence.
        mean, std (`float`, default to -6 and 4): what is subtracted from the logarithm, and what that is divided by:
            about those of speech. They are constants, because the statistics of a recording would look ahead.
    """

    model_input_names = ["input_features", "input_features_mask"]

    def __init__(
        self,
        feature_size: int = 64,
        sampling_rate: int = 16000,
        padding_value: float = 0.0,
        frames_per_tick: int = 8,
        mel_floor: float = 1e-5,
        mean: float = -6.0,
        std: float = 4.0,
        **kwargs,
    ):
        if round(TICK_SECONDS * sampling_rate) % frames_per_tick:
            raise ValueError(
                f"frames_per_tick ({frames_per_tick}) must divide the {round(TICK_SECONDS * sampling_rate)} samples "
                f"of a tick at {sampling_rate} Hz."
            )
        super().__init__(feature_size, sampling_rate, padding_value, **kwargs)
        self.frames_per_tick = frames_per_tick
        self.mel_floor = mel_floor
        self.mean = mean
        self.std = std

    def __call__(
        self, raw_speech: np.ndarray | list[np.ndarray], sampling_rate: int | None = None, return_tensors=None, **kwargs
    ) -> BatchFeature:
        """
        The ticks of one sound, or of a list of sounds, as a batch.

        Args:
            raw_speech: samples [N] in [-1, 1] or integers, or [N, channels], which are averaged.
            sampling_rate: of the sound, in Hz.
            return_tensors: "pt" or "np".

        Returns:
            `input_features` [B, T, frames_per_tick * feature_size], `input_features_mask` [B, T] bool. The last tick is
            filled up with silence; shorter sounds are absent after their end.

        Raises:
            ValueError: without a sampling rate, for sound that is no array of samples or not finite.
        """
        sounds = raw_speech if isinstance(raw_speech, list | tuple) and np.ndim(raw_speech[0]) else [raw_speech]
        ticks = [self.extract(sound, sampling_rate) for sound in sounds]
        shape = (len(ticks), max(map(len, ticks)), self.frames_per_tick * self.feature_size)
        features, mask = np.full(shape, self.padding_value, np.float32), np.zeros(shape[:2], dtype=bool)
        for row, values in enumerate(ticks):
            features[row, : len(values)], mask[row, : len(values)] = values, True
        return BatchFeature({"input_features": features, "input_features_mask": mask}, tensor_type=return_tensors)

    def extract(self, sound: np.ndarray, sampling_rate: int) -> np.ndarray:
        """One sound as float32 [T, frames_per_tick * feature_size]; the last tick is filled up with silence."""
        stream, sound = self.stream(sampling_rate), to_mono(sound)
        piece = max(1, round(PIECE_SECONDS * sampling_rate))
        ticks = [stream(sound[start : start + piece]) for start in range(0, len(sound), piece)]
        return np.concatenate([*ticks, stream.finish()])

    def stream(self, sampling_rate: int) -> "LogMelStream":
        """What turns a sound that arrives piece by piece into ticks."""
        return LogMelStream(self, sampling_rate)


class LogMelStream:
    """The ticks of one sound that arrives in pieces of any length; the pieces change nothing in the numbers."""

    def __init__(self, extractor: CreatureFeatureExtractor, sampling_rate: int):
        self.extractor = extractor
        self.resampler = None
        if sampling_rate != extractor.sampling_rate:
            self.resampler = _Resampler(sampling_rate, extractor.sampling_rate)
        self.tick = round(TICK_SECONDS * extractor.sampling_rate)
        self.hop = self.tick // extractor.frames_per_tick
        self.window = self.hop * 5 // 2  # 25 ms for frames of 10 ms
        self.samples = np.zeros(self.window - self.hop, np.float32)  # before the sound, silence

    def __call__(self, sound: np.ndarray) -> np.ndarray:
        """The next samples [n] (or [n, channels]) -> [ticks completed by them, frames_per_tick * feature_size]."""
        sound = to_mono(sound)
        if self.resampler is not None:
            sound = self.resampler(sound)
        self.samples = np.concatenate((self.samples, sound))
        before = self.window - self.hop
        ticks = (len(self.samples) - before) // self.tick
        frames = self._log_mel(self.samples[: before + ticks * self.tick])
        self.samples = self.samples[ticks * self.tick :]
        return frames.reshape(ticks, self.extractor.frames_per_tick * self.extractor.feature_size)

    def finish(self) -> np.ndarray:
        """The tick that the sound ended in, filled up with silence: [1, ...], or [0, ...] where it was complete."""
        last = len(self.samples) - (self.window - self.hop)
        self.resampler = None
        return self(np.zeros(self.tick - last if last else 0, np.float32))

    def _log_mel(self, samples: np.ndarray) -> np.ndarray:
        """samples [before + frames * hop] -> [frames, feature_size]"""
        extractor, fft = self.extractor, optimal_fft_length(self.window)
        if len(samples) < self.window:
            return np.zeros((0, extractor.feature_size), np.float32)
        log_mel = spectrogram(
            samples, window_function(self.window, "hann"), self.window, self.hop, fft, power=2.0, center=False,
            mel_filters=_mel_filters(fft, extractor.feature_size, extractor.sampling_rate),
            mel_floor=extractor.mel_floor, log_mel="log",
        )  # fmt: skip
        return (log_mel.T - extractor.mean) / extractor.std


class _Resampler:
    """
    A change of sampling rate for a sound that arrives in pieces: a windowed sinc (Smith, "Digital Audio Resampling"),
    delayed by half its length, so that a sample never depends on later ones.
    """

    def __init__(self, rate: int, target: int):
        if not rate or rate != int(rate) or rate < 1:
            raise ValueError(f"The sampling rate is {rate}: give that of the sound, such as 16000 (in Hz).")
        rate = int(rate)
        divisor = math.gcd(rate, target)
        self.up, self.down = target // divisor, rate // divisor
        cutoff = 0.94 * min(1.0, self.up / self.down)  # of half the input's rate
        half = ZERO_CROSSINGS / cutoff
        self.taps = math.ceil(2 * half)
        # Row p: the weights of the last `taps` input samples for an output p / up of a sample after the last of them.
        places = np.arange(self.up)[:, None] / self.up + (self.taps - 1 - np.arange(self.taps)) - half
        shape = np.i0(KAISER_BETA * np.sqrt(np.maximum(1 - (places / half) ** 2, 0.0)))
        weights = np.where(np.abs(places) < half, np.sinc(cutoff * places) * shape, 0.0)
        self.weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
        self.samples, self.next = np.zeros(self.taps - 1, np.float32), 0  # the next output's place, in 1 / up samples

    def __call__(self, sound: np.ndarray) -> np.ndarray:
        if not len(sound):
            return sound
        self.samples = np.concatenate((self.samples, sound))
        arrived = len(self.samples) - (self.taps - 1)
        places = np.arange(self.next, arrived * self.up, self.down)
        windows = np.lib.stride_tricks.sliding_window_view(self.samples, self.taps)[places // self.up]
        resampled = np.einsum("nk,nk->n", windows, self.weights[places % self.up])
        self.samples = self.samples[arrived:]
        self.next += len(places) * self.down - arrived * self.up
        return resampled


def resample(samples: np.ndarray, rate: int, target: int) -> np.ndarray:
    """Samples [N] at one sampling rate -> at another, 1 to 2 ms later."""
    if rate == target:
        return samples
    resampler, piece = _Resampler(rate, target), max(1, round(PIECE_SECONDS * rate))
    return np.concatenate([resampler(samples[start : start + piece]) for start in range(0, len(samples) + 1, piece)])


def to_mono(sound) -> np.ndarray:
    """Samples [N] or [N, channels], floats or integers -> float32 [N]; ValueError for anything else."""
    sound = np.asarray(sound)
    channels = sound.shape[1] if sound.ndim == 2 else 1
    if sound.ndim not in (1, 2) or not 1 <= channels <= MOST_CHANNELS or sound.dtype.kind not in "fiu":
        raise ValueError(
            f"The sound is an array of {sound.dtype} of shape {sound.shape}: give samples [N] or [N, channels]."
        )
    if sound.dtype.kind != "f":
        limits = np.iinfo(sound.dtype)
        half = (int(limits.max) - int(limits.min) + 1) // 2
        sound = (sound.astype(np.float32) - (limits.min + half)) / half
    if sound.ndim == 2:
        sound = sound.mean(axis=1)
    sound = sound.astype(np.float32, copy=False)
    if not np.isfinite(sound).all():
        raise ValueError("The sound has samples that are not finite numbers: record or convert it again.")
    return sound


def read_sound(audio: dict) -> tuple[np.ndarray, int]:
    """
    (samples [N] or [N, channels], sampling rate) of {"array", "sampling_rate"}, or {"bytes", "path"} of a sound file.

    Without soundfile, WAV files of 16 bits can be read, and all others raise ImportError. ValueError for what it cannot
    read.
    """
    if audio.get("array") is not None:
        return np.asarray(audio["array"]), audio["sampling_rate"]
    try:
        import soundfile
    except ImportError as error:
        try:
            return _read_wav(audio)
        except (wave.Error, EOFError, OSError, TypeError, KeyError):
            raise ImportError("Sound files are read by soundfile: pip install soundfile.") from error
    try:
        return soundfile.read(io.BytesIO(audio["bytes"]) if audio.get("bytes") else audio["path"], dtype="float32")
    except (soundfile.LibsndfileError, OSError, TypeError, KeyError) as error:
        reason = getattr(error, "error_string", error)  # without the address of the bytes
        raise ValueError(f"The sound cannot be read ({reason}): convert it to FLAC or WAV.") from error


def wav_bytes(samples: np.ndarray, sampling_rate: int) -> bytes:
    """Samples [N] in [-1, 1] as a WAV file of 16 bits, mono."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setparams((1, 2, sampling_rate, len(samples), "NONE", ""))
        sound.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return file.getvalue()


def _read_wav(audio: dict) -> tuple[np.ndarray, int]:
    """What soundfile would return of a WAV file of 16 bits; wave.Error for any other."""
    with wave.open(io.BytesIO(audio["bytes"]) if audio.get("bytes") else str(audio["path"]), "rb") as file:
        channels = file.getnchannels()
        if file.getsampwidth() != 2:
            raise wave.Error("not of 16 bits")
        content = file.readframes(file.getnframes())
    whole = len(content) // (2 * channels) * channels  # a file that breaks off may end within a sample
    samples = np.frombuffer(content, "<i2", whole).astype(np.float32) / 32768
    return samples.reshape(-1, channels) if channels > 1 else samples, file.getframerate()


@functools.lru_cache(maxsize=8)
def _mel_filters(fft: int, bands: int, rate: int) -> np.ndarray:
    """[fft // 2 + 1, bands]"""
    return mel_filter_bank(fft // 2 + 1, bands, 20.0, rate / 2, rate, mel_scale="htk")


AutoFeatureExtractor.register(CreatureConfig, CreatureFeatureExtractor, exist_ok=True)
CreatureFeatureExtractor.register_for_auto_class("AutoFeatureExtractor")

__all__ = ["CreatureFeatureExtractor", "LogMelStream"]
