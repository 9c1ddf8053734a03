"""A picture of some recordings: frames, sound, words and numbers on one time line."""

import io
from pathlib import Path

import numpy as np

from creature.data.recordings.schema import NAMED, TEXTS, load_recordings
from creature.files import replace_file
from feature_extraction_creature import read_sound, to_mono

FRAMES = 10  # of a camera
LINES = 12  # of a track
TEXT_COLORS = {"external_voice": "#D55E00", "internal_text": "#0072B2", "external_text": "#009E73"}


def draw_recordings(folder: str | Path, count: int = 3, seconds: float = 30.0) -> Path:
    """Draw the first `seconds` of `count` recordings of the training split into FOLDER/recordings.png; returns that."""
    splits, _ = load_recordings(folder)
    dataset = next(iter(splits.values()))
    rows = [dataset[int(at)] for at in np.linspace(0, len(dataset) - 1, min(count, len(dataset)))]
    output = Path(folder) / "recordings.png"
    with replace_file(output) as file:
        file.write(picture_of(rows, seconds))
    return output


def picture_of(rows: list[dict], seconds: float = 30.0) -> bytes:
    """A PNG of the first `seconds` of some recordings below each other, each on one time line."""
    from matplotlib.figure import Figure

    panels = [(row, kind, value) for row in rows for kind, value in _panels(row)]
    heights = [{"images": 1.2, "texts": 0.7}.get(kind, 1.0) for _, kind, _ in panels]
    figure = Figure(figsize=(12, 1.3 * sum(heights) + 0.5), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False, gridspec_kw={"height_ratios": heights})
    titled = set()
    for axis, (row, kind, value) in zip(axes[:, 0], panels, strict=True):
        end = min(seconds, max(row["duration"], 1e-3))
        DRAW.get(kind, _draw_lines)(axis, value, end)
        axis.set_xlim(0, end)
        axis.grid(False)
        label = f"{value['name']}" if kind == "images" else "words" if kind == "texts" else kind
        axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
        axis.tick_params(labelsize=7)
        if row["recording_id"] not in titled:
            titled.add(row["recording_id"])
            axis.set_title(f"{row['recording_id']}  ({row['duration']:.2f} s, group {row['split_group']})", fontsize=9)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=90)
    return png.getvalue()


def _panels(row: dict) -> list[tuple[str, object]]:
    """(kind, value) of everything in a recording that can be drawn, in the order of the picture."""
    panels = [("images", camera) for camera in row["images"] or ()]
    panels += [(name, row[name]) for name in ("audio", "voice") if row[name]]
    texts = {name: row[name] for name in TEXTS if row[name]}
    panels += [("texts", texts)] if texts else []
    panels += [(name, row[name]) for name in NAMED if row.get(name)]
    return panels + ([("touch", _touch_track(row["touch"]))] if row["touch"] else [])


def _touch_track(contacts: list[dict]) -> dict:
    points = sorted({contact["point"] for contact in contacts})
    times = sorted({contact["time"] for contact in contacts})
    place_of = {time: place for place, time in enumerate(times)}
    values = np.full((len(times), len(points)), np.nan)
    for contact in contacts:
        values[place_of[contact["time"]], points.index(contact["point"])] = contact["force"]
    return {"times": times, "values": values}


def _draw_frames(axis, camera: dict, end: float) -> None:
    from PIL import Image

    times = np.array(camera["times"])
    slots = np.linspace(0, end, FRAMES, endpoint=False)
    for slot, width in zip(slots, np.full(FRAMES, end / FRAMES), strict=True):
        at = int(np.searchsorted(times, slot, "right")) - 1  # what is seen at that time, or nothing yet
        if at >= 0:
            picture = Image.open(io.BytesIO(camera["images"][at]["bytes"]))
            axis.imshow(picture, extent=(slot, slot + 0.96 * width, 0, 1), aspect="auto")
    axis.set_ylim(0, 1)
    axis.set_yticks([])


def _draw_mel(axis, sound: dict, end: float) -> None:
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    samples, rate = read_sound(sound)
    samples = to_mono(samples)[: int(end * rate)]
    if len(samples) < 400:
        return
    mel = spectrogram(samples, window_function(400, "hann"), 400, 160, power=2.0, log_mel="log10",
                      mel_filters=mel_filter_bank(201, 64, 0.0, rate / 2, rate))  # fmt: skip
    axis.imshow(mel, origin="lower", aspect="auto", extent=(0, len(samples) / rate, 0, 64), cmap="magma")
    axis.set_yticks([])


def _draw_words(axis, texts: dict[str, list[dict]], end: float) -> None:
    for level, (name, entries) in enumerate(texts.items()):
        for number, entry in enumerate(entries):
            height = 0.85 - 0.3 * level - (0.1 if number % 2 and entry["start"] is not None else 0)
            word = entry["word"] if len(entry["word"]) <= 110 else entry["word"][:107] + "..."
            start = entry["start"] or 0.0
            if start <= end:
                text = f"{name}, at the end: {word}" if entry["start"] is None else word
                axis.text(start + 0.005 * end, height, text, va="top", fontsize=8, color=TEXT_COLORS[name],
                          clip_on=True, parse_math=False)  # fmt: skip
    axis.set_ylim(0, 1)
    axis.set_yticks([])


def _draw_lines(axis, track: dict, end: float) -> None:
    times = np.array(track["times"])
    shown = times <= end
    values = np.array(track["values"], dtype=np.float64).reshape(len(times), -1)[shown]
    values = values[:, ~np.isnan(values).all(axis=0)]  # without the parts that nothing touches until then
    if len(values) == 1:  # one row: all its numbers, side by side
        axis.plot(np.linspace(0, end, values.shape[1] + 2)[1:-1], values[0], ".", markersize=4)
    else:  # those that move most
        spread, known = np.full(values.shape[1], -1.0), np.isfinite(values).any(axis=0)  # touched later: not shown
        spread[known] = np.nanstd(values[:, known], axis=0)
        chosen = np.argsort(-spread, kind="stable")[:LINES]
        axis.plot(times[shown], values[:, np.sort(chosen)], linewidth=0.8)
    axis.margins(y=0.1)


DRAW = {"images": _draw_frames, "audio": _draw_mel, "voice": _draw_mel, "texts": _draw_words}
