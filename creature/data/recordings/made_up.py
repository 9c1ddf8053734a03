"""A minute of recordings out of nothing: tones, a moving shape, touches, a swinging arm.

To try a round without data. In each kind, one sense is the only witness of what is to be learned; everything else is
drawn independently of it.

| kind | sense | to be learned |
|---|---|---|
| hear | audio: one or two tones | internal_text behind the sound: low, middle or high, in the order of the tones |
| see | images: a square or a disc that moves | internal_text behind the pictures: colour and direction ("red left") |
| touch | touch: what the fingers of a hand meet | internal_text in the middle of a touch: heat, surface ("hot rough") |
| speak | audio: one or two tones | voice: the same pitches, each half a second after its tone begins |
| move | body_state: an arm that the wind pushes | action: a fifth of a turn ahead of where the arm was |
| whole | all of these, and external_voice: a name | what is seen and felt is thought, what is heard is said |

It needs nothing but the base install: sounds are WAV files, and Pillow, for the pictures, comes with matplotlib.
"""

import io
import os
import wave

import numpy as np

from creature.data.recordings.schema import RecordingsWriter, untimed
from creature.errors import UserError
from feature_extraction_creature import wav_bytes

SHORTEST, LONGEST = 2.0, 5.0  # s of a recording
GROUPS = 5  # instruments, sizes of shapes, hands, arms; the last one is for validation

SAMPLING_RATE = 16_000
ECHO = 8000  # samples after which a voice repeats what was heard
PITCHES = {"low": (200, 300), "middle": (600, 800), "high": (1600, 2200)}  # Hz

PICTURE_SIZE, PICTURE_RATE = 64, 12.5  # pixels, a second
COLORS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 80, 230), "yellow": (230, 210, 40)}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # of x and y in a picture

TEMPERATURES = {"cold": (5, 15), "warm": (28, 36), "hot": (42, 50)}  # C
SURFACES = ("smooth", "rough", "soft")  # by their ids
FINGERS, TOUCH_RATE = 5, 50.0

ARM_RATE, ARM_DELAY = 30.0, 0.25  # a second; s in which the arm makes up 63 % of the way to its command
REACTION = 3  # frames after which a command answers what was felt
ARM_NAMES = ["shoulder", "elbow"]
CALLED = ("anna", "ben", "carla")


def write_made_up_recordings(folder: str | os.PathLike, kind: str, seconds: float = 60.0, seed: int = 0) -> None:
    """
    Write a folder of recordings of 2 to 5 s, with the splits train (4 of 5 groups) and validation.

    Args:
        folder: as `RecordingsWriter` takes it; UserError if it is not empty.
        kind: "hear", "see", "touch", "speak", "move" or "whole".
        seconds: of all recordings together, at least; there are no fewer than five recordings.
        seed: the same one gives the same recordings.
    """
    if kind not in KINDS:
        raise UserError(f"there are no made-up recordings of the kind {kind!r}: choose one of {', '.join(KINDS)}")
    draw = np.random.default_rng(seed)
    traits, number, total = draw.random(GROUPS), 0, 0.0
    with RecordingsWriter(folder) as writer:
        while total < seconds or number < GROUPS:
            group, duration = number % GROUPS, draw.uniform(SHORTEST, LONGEST)
            row = {"recording_id": f"{kind} {number}", "split_group": f"{kind} group {group}", "duration": duration}
            row |= {"source": "made up", "license": "CC0-1.0"} | KINDS[kind](draw, duration, traits[group])
            names = {name: ARM_NAMES for name in ("body_state", "action") if name in row}
            writer.add(row, "validation" if group == GROUPS - 1 else "train", names)
            number, total = number + 1, total + duration
        writer.facts["report"] = {"made_up": kind, "seed": seed, "recordings": number, "seconds": round(total, 2)}


def _hear(draw: np.random.Generator, duration: float, trait: float) -> dict:
    """Tones in faint noise, each in its half of the recording; an instrument has its own strength of the octave."""
    times = np.arange(round(duration * SAMPLING_RATE)) / SAMPLING_RATE
    samples = 0.002 * draw.standard_normal(len(times))
    words = draw.choice(list(PITCHES), draw.integers(1, 3), replace=False)
    halves = np.sort(draw.choice(2, len(words), replace=False))
    for word, half in zip(words, halves, strict=True):
        phase = 2 * np.pi * draw.uniform(*PITCHES[word]) * times
        length = duration * draw.uniform(0.2, 0.4)
        begin = duration * half / 2 + draw.uniform(0.02, 0.08) * duration
        inside = np.clip((times - begin) / length, 0, 1)
        envelope = np.minimum(1, 8 * np.sin(np.pi * inside))  # a tone that begins at once would click
        samples += draw.uniform(0.1, 0.5) * envelope * (np.sin(phase) + 0.5 * trait * np.sin(2 * phase))
    return {"audio": _wav(samples, "tones.wav"), "internal_text": untimed(" ".join(words))}


def _speak(draw: np.random.Generator, duration: float, trait: float) -> dict:
    """Tones as in `_hear`, and a voice that repeats them half a second later, with overtones."""
    row = _hear(draw, duration, trait)
    with wave.open(io.BytesIO(row["audio"]["bytes"])) as sound:
        heard = np.frombuffer(sound.readframes(sound.getnframes()), "<i2") / 32768
    later = np.zeros_like(heard)
    later[ECHO:] = heard[: len(heard) - ECHO]
    return row | {"voice": _wav(np.tanh(4 * later) / 2, "voice.wav")}


def _wav(samples: np.ndarray, name: str) -> dict:
    """Samples [N] as a column of sound."""
    return {"bytes": wav_bytes(samples, SAMPLING_RATE), "path": name}


def _see(draw: np.random.Generator, duration: float, trait: float) -> dict:
    """A shape on grey that leaves a picture on one side and comes back on the other, so that no place says anything."""
    from PIL import Image

    color, direction = draw.choice(list(COLORS)), draw.choice(list(DIRECTIONS))
    disc, radius, grey = draw.random() < 0.5, 6 + 8 * trait, draw.integers(20, 120)
    velocity = draw.uniform(15, 40) * np.array(DIRECTIONS[direction])  # pixels a second
    start, half = draw.uniform(0, PICTURE_SIZE, 2), PICTURE_SIZE / 2
    pixels = np.stack(np.meshgrid(np.arange(PICTURE_SIZE), np.arange(PICTURE_SIZE)))  # [x and y, height, width]
    times, images = np.arange(0.0, duration, 1 / PICTURE_RATE), []
    for time in times:
        centre = (start + velocity * time)[:, None, None]
        apart = np.abs((pixels - centre + half) % PICTURE_SIZE - half)
        inside = (np.hypot(*apart) if disc else apart.max(axis=0)) < radius
        picture = np.where(inside[..., None], COLORS[color], grey).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        images.append({"bytes": file.getvalue(), "path": None})
    camera = {"name": "eye", "images": images, "times": times}
    return {"images": [camera], "internal_text": untimed(f"{color} {direction}")}


def _touch(draw: np.random.Generator, duration: float, trait: float) -> dict:
    """One thing after the other between some fingers; every hand has its own strength."""
    contacts, words = [], []
    begin = draw.uniform(0.1, 0.4)
    while begin + 1.0 < duration:
        heat, surface, length = draw.choice(list(TEMPERATURES)), int(draw.integers(len(SURFACES))), draw.uniform(0.5, 1)
        fingers = draw.choice(FINGERS, draw.integers(1, 4), replace=False)
        temperature, force = draw.uniform(*TEMPERATURES[heat]), draw.uniform(1, 3) + 6 * trait
        places = draw.uniform(-0.02, 0.02, (FINGERS, 3))
        for time in np.arange(0.0, length, 1 / TOUCH_RATE):
            pressed = force * np.sin(np.pi * (time + 0.02) / (length + 0.04))
            felt = {"time": begin + time, "surface": surface, "force": pressed, "temperature": temperature}
            contacts += [felt | {"point": int(at)} | dict(zip("xyz", places[at], strict=True)) for at in fingers]
        middle = begin + length / 2
        words.append({"word": f"{heat} {SURFACES[surface]}", "start": middle, "end": middle + 0.16})
        begin += length + draw.uniform(0.3, 0.8)
    return {"touch": contacts, "internal_text": words}


def _move(draw: np.random.Generator, duration: float, trait: float) -> dict:
    """
    An arm whose angles (rad) go round in a circle, because each command is a fifth of a turn ahead of where the arm
    was 0.1 s before. That is more than a tick: what was felt until now says the next command, whereas the commands
    until now do not, because they answer an arm that the wind had not pushed yet.
    """
    times, swing = np.arange(0.0, duration, 1 / ARM_RATE), 0.6 + trait
    angles = [swing * np.exp(2j * np.pi * draw.random())] * (REACTION + 1)  # shoulder + elbow * i, from the past on
    commands, wind = [], 0.0
    for _ in times:
        before, arm = angles[-1 - REACTION], angles[-1]
        commands.append(1.4 * swing * before / abs(before) * np.exp(0.4j * np.pi))
        wind = 0.6 * wind + 3 * draw.standard_normal()  # along the circle, rad/s
        angles.append(arm + ((commands[-1] - arm) / ARM_DELAY + 1j * wind * arm) / ARM_RATE)
    columns = {"body_state": angles[REACTION:-1], "action": commands}
    return {
        name: {"values": np.stack((np.real(numbers), np.imag(numbers)), axis=1), "times": times}
        for name, numbers in columns.items()
    }


def _whole(draw: np.random.Generator, duration: float, trait: float) -> dict:
    """Everything at once: a name is called and tones are heard, which are said; what is seen and felt is thought."""
    heard, seen, felt = (make(draw, duration, trait) for make in (_speak, _see, _touch))
    name, start = draw.choice(CALLED), draw.uniform(0.0, 0.3) * duration
    said = f"{name} {heard.pop('internal_text')[0]['word']}"
    texts = {"internal_text": felt["internal_text"] + seen["internal_text"], "external_text": untimed(said)}
    texts["external_voice"] = [{"word": name, "start": start, "end": start + 0.3}]
    return heard | seen | felt | _move(draw, duration, trait) | texts


KINDS = {"hear": _hear, "see": _see, "touch": _touch, "speak": _speak, "move": _move, "whole": _whole}
