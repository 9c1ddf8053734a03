"""Tiny folders laid out like the data sets that people have: sound, robots, motion capture, tables."""

import json
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile


def write_tone(path: Path, seconds: float = 0.5, rate: int = 16_000, channels: int = 1, pitch: float = 440.0) -> None:
    """A tone in whatever format the ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = 0.5 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)
    soundfile.write(path, np.repeat(samples[:, None], channels, axis=1), rate)


def write_video(path: Path, levels: list[int], fps: int = 30, size: tuple[int, int] = (64, 48)) -> None:
    """A video whose frames are of one gray each, which tells which frame it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for level in levels:
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _episode(index: int, frames: int, fps: int, state: np.ndarray | None = None) -> dict:
    times = np.arange(frames) / fps
    state = np.stack([times, np.full(frames, 100.0 * index)], axis=1) if state is None else state
    return {
        "observation.state": list(state.astype(np.float32)),
        "action": list((state + 1).astype(np.float32)),
        "timestamp": times.astype(np.float32),
        "frame_index": np.arange(frames),
        "episode_index": np.full(frames, index),
        "task_index": np.zeros(frames, np.int64),
    }


def _info(folder: Path, version: str, fps: int, **paths) -> None:
    numbers = {"dtype": "float32", "shape": [2], "names": {"motors": ["elbow", "wrist"]}}
    info = {
        "codebase_version": version,
        "fps": fps,
        "chunks_size": 1000,
        "features": {
            "observation.state": numbers,
            "action": numbers,
            "observation.images.front": {"dtype": "video", "shape": [48, 64, 3], "names": None},
            "next.reward": {"dtype": "float32", "shape": [1], "names": None},
        },
    }
    (folder / "meta").mkdir(parents=True, exist_ok=True)
    (folder / "meta" / "info.json").write_text(json.dumps(info | paths))


def write_lerobot_2(folder: Path, episodes: dict[int, int], fps: int = 30, videos: bool = True) -> None:
    """LeRobot v2.1: a file an episode; `episodes`: index -> frames, whose gray is 2 times their number."""
    _info(
        folder, "v2.1", fps,
        data_path="data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        video_path="videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    )  # fmt: skip
    (folder / "meta" / "tasks.jsonl").write_text('{"task_index": 0, "task": "open the drawer"}\n')
    lines = [{"episode_index": index, "tasks": ["open the drawer"], "length": n} for index, n in episodes.items()]
    (folder / "meta" / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "data" / "chunk-000").mkdir(parents=True)
    for index, frames in episodes.items():
        pq.write_table(pa.table(_episode(index, frames, fps)), folder / f"data/chunk-000/episode_{index:06d}.parquet")
        if videos:
            path = folder / f"videos/chunk-000/observation.images.front/episode_{index:06d}.mp4"
            write_video(path, [2 * number for number in range(frames)], fps)


def write_lerobot_3(folder: Path, frames: tuple[int, ...], fps: int = 30) -> None:
    """LeRobot v3: all episodes in one table and one video, whose gray is 50 times the number of the episode + 20."""
    _info(
        folder, "v3.0", fps,
        data_path="data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        video_path="videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    )  # fmt: skip
    tables = [pa.table(_episode(index, count, fps)) for index, count in enumerate(frames)]
    (folder / "data" / "chunk-000").mkdir(parents=True)
    pq.write_table(pa.concat_tables(tables), folder / "data/chunk-000/file-000.parquet")
    levels = [50 * index + 20 for index, count in enumerate(frames) for _ in range(count)]
    write_video(folder / "videos/observation.images.front/chunk-000/file-000.mp4", levels, fps)
    begins = np.cumsum([0, *frames]) / fps
    key = "videos/observation.images.front"
    rows = [
        {"episode_index": index, "tasks": ["close it"], f"{key}/chunk_index": 0, f"{key}/file_index": 0,
         f"{key}/from_timestamp": begins[index], f"{key}/to_timestamp": begins[index + 1]}
        for index, count in enumerate(frames)
    ]  # fmt: skip
    (folder / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "meta/episodes/chunk-000/file-000.parquet")
    tasks = pa.table({"task_index": [0], "__index_level_0__": ["close it"]})
    pq.write_table(tasks, folder / "meta/tasks.parquet")


ARM = """HIERARCHY
ROOT {prefix}Hips
{{
  OFFSET 0 0 0
  CHANNELS 6 Xposition Yposition Zposition Zrotation Yrotation Xrotation
  JOINT {prefix}Spine
  {{
    OFFSET 0 {spine} 0
    CHANNELS 3 Xrotation Yrotation Zrotation
    JOINT {prefix}Hand
    {{
      OFFSET {arm} 0 0
      CHANNELS 3 Yrotation Xrotation Zrotation
      End Site
      {{
        OFFSET 1 0 0
      }}
    }}
  }}
}}
MOTION
Frames: {count}
Frame Time: {step}
"""


def write_bvh(path: Path, frames: np.ndarray, fps: float = 120.0, unit: float = 0.01, prefix: str = "") -> None:
    """A chain of three joints, 1.2 m and 0.5 m apart; frames [N, 12], angles in degrees."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = ARM.format(prefix=prefix, spine=1.2 / unit, arm=0.5 / unit, count=len(frames), step=f"{1 / fps:.8f}")
    path.write_text(head + "".join(" ".join(f"{value:.6f}" for value in frame) + "\n" for frame in frames))
