"""Recordings made by hand for the tests of the processor and of clips: every column, a second or two long."""

import io

import numpy as np

WORDS = "the robot picks up a bottle".split()


def quaternions(*shape: int, draw: np.random.Generator) -> np.ndarray:
    values = draw.standard_normal((*shape, 4))
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def picture(value: int, size: tuple[int, int] = (16, 12)) -> dict:
    """A PNG of one grey, width x height, as a column of recordings holds it."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def make_recording(seconds: float = 2.0, joints: int = 3, numbers: int = 5, commands: int = 2, seed: int = 0) -> dict:
    """Every column of a recording, with clocks of their own; random, the same for the same arguments."""
    draw = np.random.default_rng(seed)

    def times(rate: float) -> np.ndarray:
        return np.arange(0.0, seconds, 1 / rate)

    def track(rate: float, values) -> dict:
        return {"values": values(len(times(rate))).astype(np.float32), "times": times(rate)}

    def words(rate: float) -> list[dict]:
        return [
            {"word": WORDS[draw.integers(len(WORDS))], "start": time, "end": time + 0.1}
            for time in np.sort(draw.uniform(0, seconds, int(rate * seconds)))
        ]

    contacts = np.sort(draw.uniform(0, seconds, int(20 * seconds)))
    return {
        "recording_id": f"life {seed}",
        "split_group": f"group {seed}",
        "duration": seconds,
        "audio": {"array": draw.standard_normal(int(22050 * seconds)) * 0.1, "sampling_rate": 22050},
        "images": [
            {"name": name, "images": [picture(int(draw.integers(256))) for _ in times(rate)], "times": times(rate)}
            for name, rate in (("left", 15), ("right", 10))
        ],
        "external_voice": words(3),
        "internal_text": words(2),
        "external_text": words(2),
        "joint_positions": track(120, lambda n: draw.standard_normal((n, joints, 3))),
        "joint_rotations": track(120, lambda n: quaternions(n, joints, draw=draw)),
        "body_state": track(30, lambda n: draw.standard_normal((n, numbers)) * 3 + 7),
        "action": track(50, lambda n: draw.standard_normal((n, commands)) * 2 - 1),
        "touch": [
            {"time": time, "point": int(draw.integers(8)), "surface": int(draw.integers(4)), "force": 1.0, "x": 0.1,
             "y": 0.2, "z": float(draw.uniform()), "temperature": 30.0}
            for time in contacts
        ],
    }  # fmt: skip


def join(first: dict, second: dict, moment: float) -> dict:
    """A recording that is the first one before a moment and the second one from then on."""
    joined = dict(first)
    samples = int(np.ceil(moment * first["audio"]["sampling_rate"]))
    sounds = first["audio"]["array"], second["audio"]["array"]
    joined["audio"] = {**first["audio"], "array": np.concatenate((sounds[0][:samples], sounds[1][samples:]))}
    joined["images"] = []
    for cameras in zip(first["images"], second["images"], strict=True):
        pictures = _join(*(list(zip(camera["times"], camera["images"], strict=True)) for camera in cameras), moment)
        joined["images"].append(
            {"name": cameras[0]["name"], "images": [p for _, p in pictures], "times": [t for t, _ in pictures]}
        )
    for name in ("joint_positions", "joint_rotations", "body_state", "action"):
        rows = _join(*(list(zip(life[name]["times"], life[name]["values"], strict=True)) for life in (first, second)),
                     moment)  # fmt: skip
        joined[name] = {"values": np.array([v for _, v in rows]), "times": np.array([t for t, _ in rows])}
    for name, key in (("external_voice", "start"), ("internal_text", "start"), ("external_text", "start"),
                      ("touch", "time")):  # fmt: skip
        rows = _join(*([(entry[key], entry) for entry in life[name]] for life in (first, second)), moment)
        joined[name] = [entry for _, entry in rows]
    return joined


def _join(first: list, second: list, moment: float) -> list:
    return [row for row in first if row[0] < moment] + [row for row in second if row[0] >= moment]
