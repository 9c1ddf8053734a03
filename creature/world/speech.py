"""Speech by eSpeak NG: a sentence in a voice -> sound at 16 kHz and when each of its words begins."""

import ctypes
import functools
from dataclasses import dataclass

import numpy as np

from creature.errors import UserError

SAMPLING_RATE = 16_000
# Of espeak_ng.h: return the samples instead of playing them; the events of a piece of sound; the two parameters.
SYNCHRONOUS, END_OF_EVENTS, WORD_BEGINS, RATE, PITCH, UTF8 = 2, 0, 1, 1, 3, 1
CUTOFF, TAPS = 0.94, 24  # of the low-pass filter before resampling: share of half of 16 kHz; zero crossings on a side


@dataclass(frozen=True)
class Voice:
    """A speaker of eSpeak NG: name of the voice with its variant, words a minute, pitch (0 to 99)."""

    name: str
    rate: int
    pitch: int


class _Id(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("type", "unique_identifier", "text_position", "length")]
    _fields_ += [("audio_position", ctypes.c_int), ("sample", ctypes.c_int), ("user_data", ctypes.c_void_p)]
    _fields_ += [("id", _Id)]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


def speak(text: str, voice: Voice) -> tuple[np.ndarray, list[tuple[str, float]]]:
    """
    (float32 samples at 16 kHz in [-1, 1], the words with the second at which each begins).

    text: ASCII letters, words separated by one space; marks at the end of a word shape the melody. The library is
    loaded for every sentence, which takes 5 ms: it keeps the phase of its oscillators between sentences, and the same
    sentence must give the same sound. UserError if it is not installed, or has no such voice.
    """
    try:
        import espeakng_loader
    except ImportError as error:
        raise UserError(
            "espeakng-loader is not installed: pip install -c constraints.txt -e '.[world]' brings what the room needs"
        ) from error
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    pieces, starts = [], []

    def receive(samples, count, events) -> int:
        if count > 0:
            pieces.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        at = 0
        while events[at].type != END_OF_EVENTS:
            if events[at].type == WORD_BEGINS:
                starts.append((events[at].text_position - 1, events[at].sample))
            at += 1
        return 0

    callback = _Callback(receive)
    try:
        rate = library.espeak_Initialize(SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 0)
        if rate <= 0 or library.espeak_SetVoiceByName(voice.name.encode()):
            raise UserError(f"eSpeak NG has no voice {voice.name!r}: install espeakng-loader again")
        library.espeak_SetSynthCallback(callback)
        library.espeak_SetParameter(RATE, voice.rate, 0)
        library.espeak_SetParameter(PITCH, voice.pitch, 0)
        content = text.encode("ascii")
        library.espeak_Synth(content, ctypes.c_size_t(len(content) + 1), 0, 1, 0, UTF8, None, None)
        library.espeak_Synchronize()
    finally:
        library.espeak_Terminate()
        handle = library._handle
        del library
        _unload(handle)
    samples = resample(np.concatenate(pieces).astype(np.float32) / 32768, rate)
    return samples, _words(text, starts, rate)


def _unload(handle: int) -> None:
    import _ctypes

    (_ctypes.FreeLibrary if hasattr(_ctypes, "FreeLibrary") else _ctypes.dlclose)(handle)


def _words(text: str, starts: list[tuple[int, int]], rate: int) -> list[tuple[str, float]]:
    """The words of a text with their times; eSpeak NG runs some together ("of the"), which then share the time."""
    begins = dict(starts)
    words, at, time = [], 0, 0.0
    for word in text.split():
        time = begins.get(at, time * rate) / rate
        at += len(word) + 1
        word = word.strip(".,?!")
        words.append((word if words or word == "I" else word.lower(), time))
    return words


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """Samples at a rate above 16 kHz -> at 16 kHz, by a windowed sinc."""
    ratio = rate / SAMPLING_RATE
    places = np.arange(int(len(samples) / ratio)) * ratio
    reach = int(TAPS * ratio)
    padded = np.pad(samples, reach + 1)
    offsets, filters = _filters(rate, reach)
    first = places.astype(np.int64)
    phase = np.round((places - first) * len(filters)).astype(np.int64)
    first, phase = first + phase // len(filters), phase % len(filters)
    windows = np.lib.stride_tricks.sliding_window_view(padded, len(offsets))[first + 1]
    return np.einsum("nk,nk->n", windows, filters[phase]).astype(np.float32)


@functools.cache
def _filters(rate: int, reach: int, phases: int = 320) -> tuple[np.ndarray, np.ndarray]:
    """(offsets [K], filters [phases, K]): a low-pass for every place between two samples."""
    offsets = np.arange(-reach, reach + 1)
    apart = offsets - np.arange(phases)[:, None] / phases
    cutoff = CUTOFF * SAMPLING_RATE / rate
    window = np.cos(np.pi / 2 * np.clip(apart / (reach + 1), -1, 1)) ** 2
    return offsets, (cutoff * np.sinc(cutoff * apart) * window).astype(np.float32)
