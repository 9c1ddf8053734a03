"""Sound and pictures out of files of any kind, through PyAV (FFmpeg), in pieces that fit into memory."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np

from creature.data.recordings.schema import PART_SECONDS, RecordingError
from creature.errors import UserError, first_line

try:
    import av
    import soundfile
    from PIL import Image
except ImportError as error:
    raise UserError(
        f"{error.name} is not installed: pip install -c constraints.txt -e '.[recordings]' brings what reads recordings"
    ) from error

SAMPLING_RATE = 16_000


@contextmanager
def _decoding(what: str):
    try:
        yield
    except (av.FFmpegError, ValueError, IndexError, SyntaxError) as error:  # SyntaxError: Pillow, of a broken PNG
        if isinstance(error, RecordingError):
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise RecordingError(f"the {what} cannot be decoded ({reason})") from error


def read_sound(file: Path | bytes) -> Iterator[tuple[np.ndarray, float, bool]]:
    """
    (samples [N] int16 mono at 16 kHz, s at which they begin, whether they are the last), at most PART_SECONDS at once.

    Raises RecordingError for what holds no sound or cannot be decoded.
    """
    if not (len(file) if isinstance(file, bytes) else file.stat().st_size):
        raise RecordingError("the sound file is empty")
    longest = int(PART_SECONDS * SAMPLING_RATE)
    pieces, count, begin = [], 0, 0
    with _decoding("sound"), av.open(io.BytesIO(file) if isinstance(file, bytes) else str(file)) as container:
        if not container.streams.audio:
            raise RecordingError("there is no sound in it")
        resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLING_RATE)
        for frame in chain(container.decode(audio=0), [None]):
            for piece in resampler.resample(frame):  # None flushes it
                pieces.append(piece.to_ndarray()[0])
                count += len(pieces[-1])
            if count > longest:
                samples = np.concatenate(pieces)
                yield samples[:longest], begin / SAMPLING_RATE, False
                pieces, count, begin = [samples[longest:]], count - longest, begin + longest
    if not count:
        raise RecordingError("the sound has no samples")
    yield np.concatenate(pieces), begin / SAMPLING_RATE, True


def sound_seconds(path: Path) -> float:
    """The length of a sound as its header has it, 0 where it says nothing."""
    with _decoding("sound"), av.open(str(path)) as container:
        return (container.duration or 0) / av.time_base


def encode_sound(samples: np.ndarray, name: str) -> dict:
    """samples [N] int16 -> a FLAC file as the columns `audio` and `voice` hold it."""
    file = io.BytesIO()
    soundfile.write(file, samples, SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    return {"bytes": file.getvalue(), "path": f"{Path(name).stem}.flac"}


def _small(width: int, height: int, size: int) -> tuple[int, int]:
    """Width and height with `size` pixels on the shorter side, or as they are if that would enlarge them."""
    scale = min(1.0, size / min(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _jpeg(picture: Image.Image) -> dict:
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=90)
    return {"bytes": file.getvalue(), "path": None}


def encode_picture(content: bytes, size: int) -> dict:
    """A picture file of any kind -> a JPEG with `size` pixels on the shorter side; RecordingError if it is none."""
    with _decoding("picture"):
        try:
            picture = Image.open(io.BytesIO(content)).convert("RGB")
        except OSError as error:  # PIL.UnidentifiedImageError, a truncated file
            raise RecordingError(f"the picture cannot be decoded ({first_line(error)})") from error
        return _jpeg(picture.resize(_small(*picture.size, size), Image.Resampling.LANCZOS, reducing_gap=2.0))


def read_video(path: Path, begin: float, end: float, rate: float, size: int) -> tuple[list[dict], list[float]]:
    """
    (JPEGs, their times in s after `begin`) of a video between `begin` and `end`.

    At most `rate` pictures a second: of every 1 / rate s, the last picture that is not later than it ends, with its own
    time, so that frame rates may vary. A video that breaks off gives what it had until then. Raises RecordingError if
    that is nothing.
    """
    pictures, times = [], []
    waiting, deadline = None, 0.0

    def keep() -> None:
        nonlocal waiting
        if waiting is not None:
            frame, time = waiting
            width, height = _small(frame.width, frame.height, size)
            pictures.append(_jpeg(frame.to_image(width=width, height=height, interpolation="AREA")))
            times.append(time)
            waiting = None

    try:
        with _decoding("video"), av.open(str(path)) as container:
            if not container.streams.video:
                raise RecordingError("there is no picture in it")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            if begin > 0:
                container.seek(int(begin * av.time_base))  # to the key frame before it
            for frame in container.decode(stream):
                time = (frame.time if frame.time is not None else begin) - begin
                if time < -1e-4 or (times and time <= times[-1]):
                    continue
                if time + begin >= end - 1e-4:
                    break
                time = max(0.0, time)
                if time > deadline + 1e-4:
                    keep()
                    deadline = np.ceil((time - 1e-4) * rate) / rate
                waiting = frame, time
            keep()
    except RecordingError:
        if not pictures:
            raise
    if not pictures:
        raise RecordingError("the video has no picture of that time")
    return pictures, times
