# Copyright 2026 The MultiModalCreature developers. Licensed under the Apache License, Version 2.0.
"""CreatureCodec: the creature's voice as codes, a few for each tick, and back; and any codec through one interface.

The interface is that of transformers' Mimi, so that a pretrained one may stand in for it: `encode(input_values)` gives
`audio_codes` [B, codebooks, ticks], `decode(audio_codes)` gives `audio_values` [B, 1, samples]. Nothing looks ahead:
the codes of a tick follow from the sound until its end, and the sound of a tick from the codes until it.
"""

import math
import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

try:
    from .feature_extraction_creature import resample, to_mono
    from .ticks_creature import TICK_SECONDS
except ImportError:
    from feature_extraction_creature import resample, to_mono
    from ticks_creature import TICK_SECONDS

CODEC_FOLDER = "codec"  # beside the files of a processor
SOFTEST = 1e-3  # amplitudes of a spectrum below it count as silence
PIECE_TICKS = 250  # of a long sound, encoded and decoded at a time: memory does not grow with its length
LOUDEST = 5.0  # the logarithm of the largest amplitude that the decoder can give


@strict
class CreatureCodecConfig(PreTrainedConfig):
    r"""
    Configuration of a [`CreatureCodec`].

    Args:
        sampling_rate (`int`, defaults to 16000): in Hz.
        num_quantizers (`int`, defaults to 8): codes of a tick.
        levels (`list[int]`, defaults to `[4, 4, 4, 4, 4]`): of each number that a code stands for, how many values it
            can take; a code is one of their product, 1,024.
        frames_per_tick (`int`, defaults to 8): spectra in a tick of 80 ms.
        frames_per_window (`int`, defaults to 4): frames that the window of a spectrum is long.
        hidden_size (`int`, defaults to 192): width of the layers.
        num_frame_layers, num_tick_layers (`int`, default to 4 and 2): layers of the encoder, and of the decoder, that
            work frame by frame and tick by tick.
        kernel_size (`int`, defaults to 7): frames, or ticks, that a layer sees, the present one among them.
    """

    model_type = "creature_codec"

    sampling_rate: int = 16000
    num_quantizers: int = 8
    levels: list[int] | tuple[int, ...] = (4, 4, 4, 4, 4)
    frames_per_tick: int = 8
    frames_per_window: int = 4
    hidden_size: int = 192
    num_frame_layers: int = 4
    num_tick_layers: int = 2
    kernel_size: int = 7
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs):
        self.levels = list(self.levels)
        super().__post_init__(**kwargs)
        counts = {name: getattr(self, name) for name in _COUNTS}
        bad = [f"{name} is {value}; it must be at least 1" for name, value in counts.items() if value < 1]
        if not self.levels or min(self.levels) < 2:
            bad.append(f"levels is {self.levels}; each must be at least 2")
        if not bad and round(TICK_SECONDS * self.sampling_rate) % self.frames_per_tick:
            bad.append(f"frames_per_tick ({self.frames_per_tick}) must divide the samples of a tick")
        if bad:
            raise ValueError("CreatureCodecConfig: " + "; ".join(bad) + ".")

    @property
    def codebook_size(self) -> int:
        """How many codes there are to choose from."""
        return math.prod(self.levels)

    @property
    def frame_rate(self) -> float:
        """Ticks in a second, as other codecs call it."""
        return 1 / TICK_SECONDS

    @property
    def tick_samples(self) -> int:
        """Samples in a tick."""
        return round(TICK_SECONDS * self.sampling_rate)


_COUNTS = (
    "sampling_rate", "num_quantizers", "frames_per_tick", "frames_per_window", "hidden_size", "num_frame_layers",
    "num_tick_layers", "kernel_size",
)  # fmt: skip


def with_past(x: torch.Tensor, count: int, state: dict | None, place: nn.Module) -> torch.Tensor:
    """
    x [B, T, ...] behind the `count` steps before it: those that `state` keeps for the module `place`, zeros at first.

    state: is given the last `count` steps of the result, for the next call; None where there is no next one.
    """
    before = None if state is None else state.get(place)
    if before is None:
        before = x.new_zeros(x.shape[0], count, *x.shape[2:])
    x = torch.cat((before, x), dim=1)
    if state is not None:
        state[place] = x[:, x.shape[1] - count :]
    return x


class CodecLayer(nn.Module):
    """A causal convolution of each channel over time, then an MLP (Liu et al. 2022, "A ConvNet for the 2020s")."""

    def __init__(self, size: int, kernel: int):
        super().__init__()
        self.kernel = kernel
        self.conv = nn.Conv1d(size, size, kernel, groups=size)
        self.norm = nn.RMSNorm(size, eps=1e-6)
        self.up_proj = nn.Linear(size, 3 * size)
        self.down_proj = nn.Linear(3 * size, size)

    def forward(self, x: torch.Tensor, state: dict | None = None) -> torch.Tensor:
        """x [B, T, size] -> the same shape; state: see `with_past`."""
        mixed = self.conv(with_past(x, self.kernel - 1, state, self).transpose(1, 2)).transpose(1, 2)
        return x + self.down_proj(F.gelu(self.up_proj(self.norm(mixed))))


class CodecEncoder(nn.Module):
    """From samples to the numbers of each tick, before they are rounded."""

    def __init__(self, config: CreatureCodecConfig):
        super().__init__()
        size = config.hidden_size
        self.hop, self.frames = config.tick_samples // config.frames_per_tick, config.frames_per_tick
        self.window = self.hop * config.frames_per_window
        self.in_proj = nn.Linear(self.window // 2 + 1, size)
        self.frame_layers = nn.ModuleList(CodecLayer(size, config.kernel_size) for _ in range(config.num_frame_layers))
        self.tick_proj = nn.Linear(self.frames * size, size)
        self.tick_layers = nn.ModuleList(CodecLayer(size, config.kernel_size) for _ in range(config.num_tick_layers))
        self.norm = nn.RMSNorm(size, eps=1e-6)
        self.out_proj = nn.Linear(size, config.num_quantizers * len(config.levels))

    def forward(self, samples: torch.Tensor, state: dict | None = None) -> torch.Tensor:
        """samples [B, N], N a multiple of the samples in a tick -> [B, T, num_quantizers * levels]."""
        samples = with_past(samples, self.window - self.hop, state, self)
        window = torch.hann_window(self.window, device=samples.device)
        spectrum = torch.fft.rfft(samples.unfold(-1, self.window, self.hop) * window).abs()
        x = self.in_proj(0.5 + 0.25 * (spectrum + SOFTEST).log())
        for layer in self.frame_layers:
            x = layer(x, state)
        x = self.tick_proj(x.unflatten(1, (-1, self.frames)).flatten(2))
        for layer in self.tick_layers:
            x = layer(x, state)
        return self.out_proj(self.norm(x))


class CodecDecoder(nn.Module):
    """
    From the rounded numbers of each tick to samples: spectra with their phases, whose windows overlap (Siuzdak 2023,
    "Vocos"). The window of a frame begins with it, so that no sample waits for a later frame.
    """

    def __init__(self, config: CreatureCodecConfig):
        super().__init__()
        size = config.hidden_size
        self.hop, self.frames = config.tick_samples // config.frames_per_tick, config.frames_per_tick
        self.overlap = config.frames_per_window
        self.in_proj = nn.Linear(config.num_quantizers * len(config.levels), size)
        self.tick_layers = nn.ModuleList(CodecLayer(size, config.kernel_size) for _ in range(config.num_tick_layers))
        self.frame_proj = nn.Linear(size, self.frames * size)
        self.frame_layers = nn.ModuleList(CodecLayer(size, config.kernel_size) for _ in range(config.num_frame_layers))
        self.norm = nn.RMSNorm(size, eps=1e-6)
        self.out_proj = nn.Linear(size, 2 * (self.hop * self.overlap // 2 + 1))

    def forward(self, numbers: torch.Tensor, state: dict | None = None) -> torch.Tensor:
        """numbers [B, T, num_quantizers * levels] -> samples [B, N]."""
        x = self.in_proj(numbers)
        for layer in self.tick_layers:
            x = layer(x, state)
        x = self.frame_proj(x).unflatten(-1, (self.frames, -1)).flatten(1, 2)
        for layer in self.frame_layers:
            x = layer(x, state)
        loudness, phase = self.out_proj(self.norm(x)).float().chunk(2, dim=-1)
        spectrum = torch.polar(loudness.clamp(max=LOUDEST).exp(), phase)
        window = torch.hann_window(self.hop * self.overlap, device=x.device)
        waves = torch.fft.irfft(spectrum, n=len(window)) * window  # [B, frames, window]
        waves = with_past(waves, self.overlap - 1, state, self).unflatten(-1, (self.overlap, self.hop))
        count = waves.shape[1] - self.overlap + 1
        # Of frame f, part 0 is its own; part 1 is the second of the frame before it, and so on.
        parts = [waves[:, self.overlap - 1 - part :][:, :count, part] for part in range(self.overlap)]
        return sum(parts).flatten(1)


@dataclass
class CodecEncoderOutput(ModelOutput):
    """audio_codes int64 [B, codebooks, ticks]"""

    audio_codes: torch.LongTensor | None = None


@dataclass
class CodecDecoderOutput(ModelOutput):
    """audio_values [B, 1, samples]"""

    audio_values: torch.FloatTensor | None = None


@dataclass
class CodecOutput(ModelOutput):
    """audio_codes int64 [B, codebooks, ticks], audio_values [B, 1, samples]"""

    audio_codes: torch.LongTensor | None = None
    audio_values: torch.FloatTensor | None = None


class CreatureCodec(PreTrainedModel):
    """
    A small causal codec of a voice: 8 codes of 1,024 for each tick of 80 ms, 1,000 bits a second.

    Each code stands for several numbers that are rounded to a few values (Mentzer et al. 2023, "Finite Scalar
    Quantization"): there is no codebook to learn, and none that collapses. `scripts/train_codec.py` trains it.
    """

    config_class = CreatureCodecConfig
    base_model_prefix = "codec"
    main_input_name = "input_values"

    def __init__(self, config: CreatureCodecConfig):
        super().__init__(config)
        self.encoder = CodecEncoder(config)
        self.decoder = CodecDecoder(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=module.in_features**-0.5)
            init.zeros_(module.bias)
            if module is self.decoder.out_proj:
                init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.Conv1d):
            init.normal_(module.weight, std=module.kernel_size[0] ** -0.5)
            init.zeros_(module.bias)
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)

    def forward(self, input_values: torch.Tensor, **kwargs) -> CodecOutput:
        """Codes and what is heard of them, for training: rounding passes its gradients on as they are."""
        numbers = self.round(self.encoder(self._samples(input_values)))
        audio_values = self.decoder(numbers)[:, None]
        return CodecOutput(audio_codes=self.codes_of(numbers), audio_values=audio_values)

    @torch.no_grad()
    def encode(self, input_values: torch.Tensor, state: dict | None = None) -> CodecEncoderOutput:
        """
        The codes of a sound, or of the next ticks of one.

        Args:
            input_values: [B, 1, N] in [-1, 1] at the codec's sampling rate; the last tick is filled up with silence.
            state: a dict, empty before the first tick, that is given what the next ones need. With it, N must be a
                multiple of the samples in a tick; tick by tick gives the same codes as the whole.
        """
        samples, state = self._samples(input_values, state), {} if state is None else state
        pieces = samples.split(PIECE_TICKS * self.config.tick_samples, dim=1)
        codes = [self.codes_of(self.round(self.encoder(piece, state))) for piece in pieces]
        return CodecEncoderOutput(audio_codes=torch.cat(codes, dim=-1))

    @torch.no_grad()
    def decode(self, audio_codes: torch.Tensor, state: dict | None = None) -> CodecDecoderOutput:
        """
        The sound of codes [B, codebooks, ticks], or of the next ticks of them; `state` is a dict as in `encode`, but
        another one.
        """
        numbers, state = self.numbers_of(audio_codes), {} if state is None else state
        pieces = [self.decoder(piece, state) for piece in numbers.split(PIECE_TICKS, dim=1)]
        return CodecDecoderOutput(audio_values=torch.cat(pieces, dim=-1)[:, None])

    def _samples(self, input_values: torch.Tensor, state: dict | None = None) -> torch.Tensor:
        """[B, 1, N] -> [B, N], filled up to whole ticks; ValueError for another shape."""
        if input_values.dim() != 3 or input_values.shape[1] != 1:
            raise ValueError(f"`input_values` has the shape {list(input_values.shape)}: give [rows, 1, samples].")
        missing = -input_values.shape[-1] % self.config.tick_samples
        if missing and state is not None:
            raise ValueError(
                f"A sound that arrives in pieces has {input_values.shape[-1]} samples: give a multiple of "
                f"{self.config.tick_samples}."
            )
        return F.pad(input_values[:, 0], (0, missing))

    # ---- Rounding ----

    def _levels(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.config.levels * self.config.num_quantizers, dtype=torch.float32, device=x.device)

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """Numbers [..., num_quantizers * levels] -> the nearest of their levels, evenly from -1 to 1."""
        levels = self._levels(x)
        steps = levels / 2 * (x.float().tanh() + 1) - 0.5  # every level is equally wide
        rounded = torch.minimum(steps.round().clamp(min=0), levels - 1)
        return (steps + (rounded - steps).detach()) * 2 / (levels - 1) - 1

    def codes_of(self, numbers: torch.Tensor) -> torch.Tensor:
        """Rounded numbers [B, T, num_quantizers * levels] -> codes int64 [B, num_quantizers, T]."""
        digits = ((numbers + 1) / 2 * (self._levels(numbers) - 1)).round().long()
        digits = digits.unflatten(-1, (self.config.num_quantizers, -1))
        return (digits * torch.tensor(self._places(), device=digits.device)).sum(-1).transpose(1, 2)

    def numbers_of(self, codes: torch.Tensor) -> torch.Tensor:
        """The inverse of `codes_of`."""
        if codes.dim() != 3 or codes.shape[1] != self.config.num_quantizers:
            raise ValueError(
                f"`audio_codes` has the shape {list(codes.shape)}: give [rows, {self.config.num_quantizers}, ticks]."
            )
        if codes.numel() and not 0 <= codes.min() <= codes.max() < self.config.codebook_size:
            raise ValueError(
                f"`audio_codes` holds {codes.min()} to {codes.max()}: a book has the codes 0 to "
                f"{self.config.codebook_size - 1}."
            )
        places, levels = (torch.tensor(x, device=codes.device) for x in (self._places(), self.config.levels))
        digits = (codes.transpose(1, 2)[..., None] // places % levels).flatten(2)
        return digits * 2 / (self._levels(digits) - 1) - 1

    def _places(self) -> list[int]:
        """What a digit of each level is worth in a code."""
        return [math.prod(self.config.levels[:place]) for place in range(len(self.config.levels))]


# ---------------------------------------------------------------------------------------------------------------------
# Any codec: this one, or a pretrained Mimi
# ---------------------------------------------------------------------------------------------------------------------


def load_codec(name: str | os.PathLike, **options) -> PreTrainedModel:
    """
    The codec in a folder, or of a name on the Hub, in evaluation mode: a [`CreatureCodec`], or a Mimi (Défossez et al.
    2024, "Moshi"), of which the first books are used.

    options: of `from_pretrained`, such as `subfolder`. Raises ValueError for what is none, or does not keep ticks of
    80 ms.
    """
    try:
        codec = AutoModel.from_pretrained(
            name, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        what = f"The codec {name} cannot be loaded ({reason})"
        if isinstance(error.__cause__, HFValidationError):  # no folder, nor could the Hub have one of this name
            what = f"There is no codec {name}"
        elif not os.path.isdir(name):
            what = f"There is no folder {name}, and from the Hub it cannot be loaded ({reason})"
        raise ValueError(
            f"{what}: train one with scripts/train_codec.py, and give the folder that it has written."
        ) from error
    config = codec.config
    if not all(hasattr(config, field) for field in ("sampling_rate", "frame_rate", "num_quantizers", "codebook_size")):
        raise ValueError(f"{name} holds a model of type {config.model_type!r}: give a codec of scripts/train_codec.py.")
    if abs(config.frame_rate * TICK_SECONDS - 1) > 1e-6:
        raise ValueError(
            f"The codec {name} gives codes {config.frame_rate:g} times a second, and a tick lasts {TICK_SECONDS:g} s: "
            f"take one of {1 / TICK_SECONDS:g}, such as scripts/train_codec.py trains, or kyutai/mimi."
        )
    return codec.eval()


def codec_organs(codec: PreTrainedModel, most: int = 8) -> dict[str, int]:
    """The fields of a creature's configuration that follow from its codec, of whose books at most `most` are used."""
    books = codec.config.num_quantizers
    if codec.config.model_type != CreatureCodecConfig.model_type:  # each book refines those before it
        books = min(books, most)
    return {"num_audio_codebooks": books, "audio_codebook_size": codec.config.codebook_size}


def check_codec(codec: PreTrainedModel, books: int, size: int) -> None:
    """ValueError where a creature with so many books of this size cannot speak through the codec."""
    has = codec_organs(codec, most=books)
    if (books, size) != (has["num_audio_codebooks"], has["audio_codebook_size"]):
        raise ValueError(
            f"The codec has {codec.config.num_quantizers} books of {codec.config.codebook_size} codes, and the model "
            f"{books} of {size}: set num_audio_codebooks and audio_codebook_size to those of the codec, or take the "
            "codec that the model was trained with."
        )


@torch.no_grad()
def encode_voice(codec: PreTrainedModel, sound: np.ndarray, sampling_rate: int, books: int) -> np.ndarray:
    """Samples [N] or [N, channels] at any rate -> codes int32 [T, books]."""
    samples = resample(to_mono(sound), sampling_rate, codec.config.sampling_rate)
    if not len(samples):
        return np.zeros((0, books), np.int32)
    values = torch.from_numpy(samples).to(codec.device)[None, None]
    return codec.encode(values).audio_codes[0, :books].T.cpu().numpy().astype(np.int32)


@torch.no_grad()
def decode_voice(codec: PreTrainedModel, codes: np.ndarray) -> np.ndarray:
    """Codes [T, books] -> samples float32 [N] at the codec's sampling rate; a tick with a negative code is silent."""
    tick = round(TICK_SECONDS * codec.config.sampling_rate)
    ids = torch.from_numpy(np.asarray(codes).clip(0).astype(np.int64)).to(codec.device)
    samples = codec.decode(ids.T[None]).audio_values[0, 0].float().cpu().numpy()[: tick * len(codes)]
    return samples * np.repeat((np.asarray(codes) >= 0).all(axis=1), tick)[: len(samples)]


AutoConfig.register(CreatureCodecConfig.model_type, CreatureCodecConfig, exist_ok=True)
AutoModel.register(CreatureCodecConfig, CreatureCodec, exist_ok=True)
CreatureCodecConfig.register_for_auto_class()
CreatureCodec.register_for_auto_class("AutoModel")

__all__ = ["CreatureCodec", "CreatureCodecConfig", "load_codec"]
