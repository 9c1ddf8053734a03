"""One picture of a life at one tick: eyes, body, skin, and sound and words on one time line. A pure function of it."""

import functools
from dataclasses import dataclass, field

import numpy as np

SIZE, MARGIN, LABELS = (1080, 640), 12, 120  # width, height; the column of the names at the time line, pixels
TOP, MEL, LANE, ROWS = 224, 84, 46, 3  # heights of the upper half, of the sound, of a line of words; rows in a line
SECONDS = 6.0  # on the time line
QUIET, LOUD = -1.4, 2.0  # ends of the scale of log-mel, as the ears give it
STRONGEST, COLDEST, HOTTEST = 300.0, 0.0, 50.0  # N, C: ends of the scales of contacts
MOST_CONTACTS, MOST_NUMBERS = 9, 6
INK, FAINT, GRID = "#202020", "#707070", "#e0e0e0"
FELT, COMMANDED = "#404040", "#E69F00"
# Okabe and Ito (2008), as the words of recordings have them elsewhere; what was recorded is gray beside them.
COLORS = {"heard": "#D55E00", "thought": "#0072B2", "said": "#009E73"}


@dataclass
class Moment:
    """
    What there is to see of a life at the end of a tick. What is None or empty is not drawn.

    Args:
        seconds: since the life began.
        eyes: by the name of a camera, uint8 [H, W, 3], or None where nothing is seen.
        mel: [frames, bands] of the last `SECONDS`, as the ears give it; NaN where nothing is heard.
        words: the lines of the time line by their names, {word, start, end} in s each.
        felt, commanded: [joints, 3] places of the joints in one frame.
        bones: pairs of joints. sight: [2, 3], what is to the right and up in the picture, in that frame.
        contacts: {name, joint or None, force N, temperature C} each; none where nothing touches, None without a skin.
        numbers: by name, two rows of numbers [2, ticks] of the last `SECONDS`: what was recorded, and what was
            commanded; NaN where there was none.
        clock: {p50, p95 in s, ticks, late, dropped}, and what else is to be read at the bottom.
    """

    seconds: float = 0.0
    eyes: dict[str, np.ndarray | None] = field(default_factory=dict)
    mel: np.ndarray | None = None
    words: dict[str, list[dict]] = field(default_factory=dict)
    felt: np.ndarray | None = None
    commanded: np.ndarray | None = None
    bones: list[tuple[int, int]] = field(default_factory=list)
    sight: np.ndarray | None = None
    contacts: list[dict] | None = None
    numbers: dict[str, np.ndarray] = field(default_factory=dict)
    clock: dict = field(default_factory=dict)


def draw(moment: Moment):
    """A moment as a picture of Pillow, RGB, 1080 x 640."""
    from PIL import Image, ImageDraw

    canvas = Image.new("RGB", SIZE, "white")
    pen = ImageDraw.Draw(canvas)
    left = _draw_eyes(canvas, pen, moment.eyes)
    if moment.bones:
        _draw_body(pen, moment, left)
        left += TOP
    if moment.contacts is not None:
        _draw_contacts(pen, moment.contacts, left)
        left += 220
    if moment.numbers:
        _draw_numbers(pen, moment.numbers, left)
    is_bare = not (moment.eyes or moment.bones or moment.numbers) and moment.contacts is None
    _draw_time_line(canvas, pen, moment, MARGIN if is_bare else TOP + MARGIN)
    clock = {name: f"{value * 1e3:.1f} ms" if name in ("p50", "p95") else value for name, value in moment.clock.items()}
    text = "   ".join([f"{moment.seconds:.1f} s", *(f"{name} {value}" for name, value in clock.items())])
    pen.text((MARGIN, SIZE[1] - 24), text, INK, _font(14))
    return canvas


@functools.cache
def _font(size: int):
    from PIL import ImageFont

    return ImageFont.load_default(size)


# --- the upper half --------------------------------------------------------------------------------------------------


def _draw_eyes(canvas, pen, eyes: dict) -> int:
    """The cameras side by side; returns where they end."""
    from PIL import Image

    left, side = MARGIN, min(TOP - 36, 340 // max(len(eyes), 1))
    for name, picture in eyes.items():
        pen.text((left, MARGIN), name, FAINT, _font(12))
        if picture is None:
            pen.rectangle([left, 28, left + side, 28 + side], outline=GRID)
            pen.text((left + 8, 36), "nothing", FAINT, _font(12))
        else:
            height, width = picture.shape[:2]
            scale = side / max(height, width)
            size = max(1, round(width * scale)), max(1, round(height * scale))
            canvas.paste(Image.fromarray(picture).resize(size, Image.Resampling.NEAREST), (left, 28))
        left += side + 8
    return left + MARGIN if eyes else left


def _draw_body(pen, moment: Moment, left: int) -> None:
    """The joints as they are felt and as they are commanded, from behind; a dot where something touches."""
    poses = [pose @ moment.sight.T for pose in (moment.felt, moment.commanded) if pose is not None]
    pen.text((left, MARGIN), "body: felt", FELT, _font(12))
    pen.text((left + 66, MARGIN), "commanded", COMMANDED, _font(12))
    if not poses:
        return
    middle = (poses[0].min(axis=0) + poses[0].max(axis=0)) / 2
    scale = (TOP - 48) / max(np.ptp(poses[0], axis=0).max(), 1e-6)
    centre = np.array([left + TOP / 2, 28 + (TOP - 36) / 2])

    def dots(pose):
        return [tuple(map(float, dot)) for dot in centre + (pose @ moment.sight.T - middle) * scale * [1, -1]]

    for pose, color, width in ((moment.commanded, COMMANDED, 5), (moment.felt, FELT, 2)):
        if pose is not None:
            places = dots(pose)
            for joint, other in moment.bones:
                pen.line([places[joint], places[other]], color, width)
    places = dots(moment.felt if moment.felt is not None else moment.commanded)
    for contact in moment.contacts or ():
        if contact["joint"] is not None:
            (x, y), radius = places[contact["joint"]], 4 + 5 * _strength(contact["force"])
            pen.ellipse([x - radius, y - radius, x + radius, y + radius], _warmth(contact["temperature"]))


def _draw_contacts(pen, contacts: list[dict], left: int) -> None:
    """A bar for every part that is touched: as long as the force is strong, as red as it is warm."""
    pen.text((left, MARGIN), "touched" if contacts else "nothing touched", FAINT, _font(12))
    for row, contact in enumerate(contacts[:MOST_CONTACTS]):
        top, length = 30 + 20 * row, 6 + 60 * _strength(contact["force"])
        pen.text((left, top), contact["name"][:14], INK, _font(11))
        pen.rectangle([left + 84, top + 2, left + 84 + length, top + 12], _warmth(contact["temperature"]))
        label = f"{contact['force']:.1f} N {contact['temperature']:.0f} C"
        pen.text((left + 90 + length, top), label, FAINT, _font(11))
    if len(contacts) > MOST_CONTACTS:
        pen.text((left, 30 + 20 * MOST_CONTACTS), f"and {len(contacts) - MOST_CONTACTS} more", FAINT, _font(11))


def _strength(force: float) -> float:
    return float(np.clip(np.log1p(max(force, 0.0)) / np.log1p(STRONGEST), 0, 1))


def _warmth(temperature: float) -> tuple[int, int, int]:
    share = float(np.clip((temperature - COLDEST) / (HOTTEST - COLDEST), 0, 1))
    return int(40 + 190 * share), int(100 + 50 * (1 - abs(2 * share - 1))), int(230 - 190 * share)


def _draw_numbers(pen, numbers: dict, left: int) -> None:
    """The commands of a body without joints, recorded and commanded, on one time line each."""
    pen.text((left, MARGIN), "action: recorded", FAINT, _font(12))
    pen.text((left + 102, MARGIN), "commanded", COMMANDED, _font(12))
    shown = dict(list(numbers.items())[:MOST_NUMBERS])
    height = (TOP - 36) // max(len(shown), 1)
    for row, (name, values) in enumerate(shown.items()):
        top, right = 28 + height * row, SIZE[0] - MARGIN
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
        for line, color in zip(values, (FAINT, COMMANDED), strict=True):
            x = np.linspace(left + 90, right, len(line))
            y = top + (height - 8) * (1 - (line - low) / max(high - low, 1e-6))
            for at in np.flatnonzero(np.isfinite(line[1:]) & np.isfinite(line[:-1])):
                pen.line([x[at], y[at], x[at + 1], y[at + 1]], color, 2)
        pen.text((left, top + height / 2 - 12), name[:13], INK, _font(11))


# --- the time line ---------------------------------------------------------------------------------------------------


def _draw_time_line(canvas, pen, moment: Moment, top: int) -> None:
    """Sound and words of the last seconds below each other; now is at the right."""
    begin, width = moment.seconds - SECONDS, SIZE[0] - LABELS - MARGIN

    def place(seconds: float) -> float:
        return LABELS + (seconds - begin) / SECONDS * width

    bottom = top + (MEL + 6 if moment.mel is not None else 0) + LANE * len(moment.words)
    for second in range(max(0, int(np.ceil(begin))), int(moment.seconds) + 1):
        pen.line([place(second), top, place(second), bottom], GRID)
        pen.text((place(second) + 2, bottom), f"{second} s", FAINT, _font(11))
    if moment.mel is not None:
        pen.text((MARGIN, top + MEL / 2 - 8), "sound", INK, _font(12))
        canvas.paste(_mel_picture(moment.mel, (width, MEL)), (LABELS, top))
        top += MEL + 6
    for name, words in moment.words.items():
        color = COLORS.get(name, FAINT)
        pen.line([MARGIN, top, SIZE[0] - MARGIN, top], GRID)
        pen.text((MARGIN, top + LANE / 2 - 8), name, color, _font(12))
        ends = [0.0] * ROWS
        for word in words:
            if word["start"] < begin:
                continue
            x, text = place(word["start"]), word["word"][:24]
            row = next((row for row in range(ROWS) if ends[row] <= x), None)
            if row is None:  # too many at once to be read: a tick
                pen.line([x, top + LANE - 5, x, top + LANE - 1], color)
                continue
            pen.text((x, top + 2 + 14 * row), text, color, _font(12))
            ends[row] = x + _font(12).getlength(text) + 4
        top += LANE


def _mel_picture(mel: np.ndarray, size: tuple[int, int]):
    """[frames, bands] -> a picture, low below, light gray where there was no sound."""
    from matplotlib import colormaps
    from PIL import Image

    shares = np.clip((mel.T[::-1] - QUIET) / (LOUD - QUIET), 0, 1)
    pixels = colormaps["magma"](np.nan_to_num(shares))[..., :3] * 255
    pixels[np.isnan(shares)] = 240
    return Image.fromarray(pixels.astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
