"""A short film of lives in the room: what both eyes see, the body, the words, the skin, and what the ears hear."""

import io
from pathlib import Path

import numpy as np

from creature.data.recordings.schema import TEXTS
from creature.data.recordings.sheet import TEXT_COLORS
from creature.files import replace_file
from creature.world.body import JOINTS, PARENTS
from creature.world.scene import SURFACES
from feature_extraction_creature import read_sound
from ticks_creature import TICK_SECONDS

WIDTH, HEIGHT, EYE = 800, 480, 256  # pixels
SECONDS_OF_WORDS = 4.0  # how long a word stays to be read
LABELS = dict(zip(TEXTS, ("heard", "thought", "said"), strict=True))
STRONGEST, COLDEST, HOTTEST = 300.0, 0.0, 60.0  # N, C: ends of the scales


def write_film(output: str | Path, lives: dict[str, dict]) -> None:
    """
    Write lives side by side to an .mp4 file (H.264, AAC), with what the first one hears.

    lives: rows of recordings of the room by their titles; as long as the shortest of them.
    """
    import av

    rows, file = list(lives.values()), io.BytesIO()
    sound, rate = read_sound(rows[0]["audio"])
    ticks = min(round(row["duration"] / TICK_SECONDS) for row in rows)
    with av.open(file, "w", format="mp4") as container:
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        pictures = container.add_stream(codec, rate=int(1 / TICK_SECONDS * 2))
        pictures.width, pictures.height, pictures.pix_fmt = WIDTH * len(rows), HEIGHT, "yuv420p"
        pictures.bit_rate = 900_000 * len(rows)
        voice = container.add_stream("aac", rate=rate)
        voice.layout = "mono"
        for tick in range(ticks):
            picture = np.concatenate([draw_tick(row, tick, title) for title, row in lives.items()], axis=1)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            for half in range(2):  # 25 frames a second
                frame.pts = 2 * tick + half
                container.mux(pictures.encode(frame))
        container.mux(pictures.encode(None))
        samples = np.ascontiguousarray(sound, np.float32)[None, : int(ticks * TICK_SECONDS * rate)]
        for begin in range(0, samples.shape[1], 1024):
            piece = av.AudioFrame.from_ndarray(samples[:, begin : begin + 1024], format="fltp", layout="mono")
            piece.sample_rate, piece.pts = rate, begin
            container.mux(voice.encode(piece))
        container.mux(voice.encode(None))
    with replace_file(output) as out:
        out.write(file.getvalue())


def draw_tick(row: dict, tick: int, title: str = "") -> np.ndarray:
    """One tick of a recording of the room as a picture, uint8 [480, 800, 3]."""
    from PIL import Image, ImageDraw, ImageFont

    canvas = Image.new("RGB", (WIDTH, HEIGHT), (24, 24, 28))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(18)
    for place, camera in enumerate(row["images"]):
        picture = Image.open(io.BytesIO(camera["images"][tick]["bytes"]))
        canvas.paste(picture.resize((EYE, EYE), Image.Resampling.NEAREST), (place * (EYE + 4), 0))
    _draw_body(draw, row, tick)
    _draw_skin(draw, ImageFont.load_default(12), row, tick)
    now = (tick + 1) * TICK_SECONDS
    for line, name in enumerate(TEXTS):
        words = [one["word"] for one in row[name] if now - SECONDS_OF_WORDS <= one["start"] < now]
        top = EYE + 14 + 34 * line
        draw.text((10, top), LABELS[name], font=font, fill=(150, 150, 150))
        draw.text((95, top), " ".join(words), font=font, fill=TEXT_COLORS[name])
    draw.text((2 * EYE + 14, 6), title, font=font, fill=(150, 150, 150))
    draw.text((WIDTH - 70, HEIGHT - 26), f"{tick * TICK_SECONDS:.1f} s", font=font, fill=(150, 150, 150))
    return np.asarray(canvas)


def _draw_body(draw, row: dict, tick: int) -> None:
    """The joints from behind, as they are felt, and where skin is touched."""
    at = int(np.searchsorted(row["joint_positions"]["times"], tick * TICK_SECONDS + 1e-6)) - 1
    places = np.asarray(row["joint_positions"]["values"][max(at, 0)], np.float64)
    dots = [(660 - 125 * y, 120 - 125 * z) for _, y, z in places]
    for joint, parent in enumerate(PARENTS):
        if parent >= 0:
            draw.line([dots[parent], dots[joint]], fill=(230, 190, 160), width=4)
    for contact in row["touch"]:
        if tick * TICK_SECONDS <= contact["time"] < (tick + 1) * TICK_SECONDS:
            x, y = dots[contact["point"]]
            draw.ellipse([x - 7, y - 7, x + 7, y + 7], fill=_warmth(contact["temperature"]))


def _draw_skin(draw, font, row: dict, tick: int) -> None:
    """A bar for every part that is touched: as long as the force is strong, as red as it is hot."""
    felt = [one for one in row["touch"] if tick * TICK_SECONDS <= one["time"] < (tick + 1) * TICK_SECONDS]
    names = {number: name for name, number in SURFACES.items()}
    for line, contact in enumerate(felt[:10]):
        left, top = 10 + 395 * (line // 5), EYE + 122 + 19 * (line % 5)
        length = 190 * min(1.0, np.log1p(contact["force"]) / np.log1p(STRONGEST))
        draw.rectangle([left + 90, top, left + 90 + length, top + 12], fill=_warmth(contact["temperature"]))
        draw.text((left, top - 1), JOINTS[contact["point"]], font=font, fill=(170, 170, 170))
        label = f"{names[contact['surface']]} {contact['force']:.1f} N {contact['temperature']:.0f} C"
        draw.text((left + 95 + length, top - 1), label, font=font, fill=(170, 170, 170))


def _warmth(temperature: float) -> tuple[int, int, int]:
    share = min(1.0, max(0.0, (temperature - COLDEST) / (HOTTEST - COLDEST)))
    return int(60 + 195 * share), int(110 + 40 * (1 - abs(2 * share - 1))), int(255 - 205 * share)
