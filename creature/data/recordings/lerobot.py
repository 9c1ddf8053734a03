"""LeRobot data sets, v2.0 to v3, as they are found: with gaps, without videos or tasks, in units of their own."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from creature.data.recordings.media import encode_picture, read_video
from creature.data.recordings.schema import RecordingError
from creature.data.recordings.sources import ImportOptions, Job, Notes, list_files
from creature.errors import UserError

BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")


class _Dataset:
    """What lies in meta/ of a LeRobot folder, and where an episode's rows and videos are."""

    def __init__(self, folder: Path, options: ImportOptions, notes: Notes):
        self.folder, self.options, self.notes = folder, options, notes
        self.info = _read_json(folder / "meta" / "info.json")
        self.features = self.info.get("features") or {}
        self.fps = float(self.info.get("fps") or 0)
        if not self.features or not 0 < self.fps < 10_000:
            raise UserError(f"{folder}/meta/info.json names no features or no fps: it is no LeRobot data set")
        self.tasks = self._read_tasks()
        self.episodes = {row["episode_index"]: row for row in self._read_episodes() if "episode_index" in row}
        self.cameras = [name for name, about in self.features.items() if about.get("dtype") in ("video", "image")]
        for name in [name for name in self.cameras if _is_depth(self.features[name])]:
            notes.leave_out("a depth camera: the eyes see colors", name)
            self.cameras.remove(name)
        used = {*self.cameras, *BOOKKEEPING, *self.numbers("observation"), *self.numbers("action")}
        for name in set(self.features) - used:
            notes.leave_out("a feature that is neither observed number, action nor camera", name)

    def numbers(self, kind: str) -> list[str]:
        """The features of numbers of a kind, the usual one first: observation.state, or action."""
        found = [
            name
            for name, about in self.features.items()
            if name.split(".")[0] == kind and about.get("dtype", "").startswith(("float", "int", "bool"))
            and len(about.get("shape") or [1]) == 1
        ]  # fmt: skip
        return sorted(found, key=lambda name: (name not in ("observation.state", "action"), name))

    def names(self, kind: str) -> list[str]:
        """The names of those numbers, made up by position where the data set has none."""
        features, result = self.numbers(kind), []
        for feature in features:
            size = (self.features[feature].get("shape") or [1])[0]
            names = list(_leaves(self.features[feature].get("names")))
            if len(names) != size:
                names = [f"{feature.split('.')[-1]}_{number}" for number in range(size)]
            main = feature in ("observation.state", "action")
            result += names if main else [f"{feature.split('.', 1)[-1]}.{name}" for name in names]
        return result

    def _read_tasks(self) -> dict[int, str]:
        meta = self.folder / "meta"
        if (meta / "tasks.parquet").is_file():  # v3: the text is the index of the frame
            rows = pq.read_table(meta / "tasks.parquet").to_pylist()
        else:
            rows = _read_lines(meta / "tasks.jsonl")
        return {
            row["task_index"]: next((value for value in row.values() if isinstance(value, str)), "")
            for row in rows
            if "task_index" in row
        }

    def _read_episodes(self) -> list[dict]:
        rows = _read_lines(self.folder / "meta" / "episodes.jsonl")
        for path in sorted((self.folder / "meta" / "episodes").rglob("*.parquet")):
            columns = [name for name in pq.read_schema(path).names if not name.startswith("stats/")]
            rows += pq.read_table(path, columns=columns).to_pylist()
        return rows

    def jobs(self) -> list[Job]:
        jobs, found = [], {}
        for path in list_files(self.folder / "data", (".parquet",)):
            try:
                column = pq.read_table(path, columns=["episode_index"])["episode_index"]
                episodes = column.unique().to_pylist()
            except (OSError, ValueError, KeyError) as error:
                self.notes.leave_out(f"the table of its frames cannot be read ({type(error).__name__})", path.name)
                continue
            for episode in episodes:
                found.setdefault(episode, []).append(path)
        for episode, paths in sorted(found.items()):
            name = f"episode_{episode:06d}"
            group = self.options.group(name, self.episodes.get(episode)) or name
            if self.options.split_group is None:
                group = name
            jobs.append(Job(name, {group}, partial(self.read, episode, name, group, paths)))
        for episode in sorted(set(self.episodes) - set(found)):
            self.notes.leave_out("listed in meta/, but its frames are missing", f"episode_{episode:06d}")
        return jobs

    def read(self, episode: int, name: str, group: str, paths: list[Path]) -> Iterator[tuple[dict, dict]]:
        held = set(pq.read_schema(paths[0]).names)
        wanted = [*self.numbers("observation"), *self.numbers("action"), *BOOKKEEPING]
        wanted += [camera for camera in self.cameras if self.features[camera]["dtype"] == "image"]
        wanted = [column for column in wanted if column in held]
        tables = [pq.read_table(path, columns=wanted, filters=[("episode_index", "=", episode)]) for path in paths]
        frames = {
            column: np.concatenate([table[column].to_numpy() for table in tables]) for column in tables[0].column_names
        }
        count = len(frames["episode_index"])
        times = frames.get("timestamp", np.full(count, np.nan)).astype(np.float64).ravel()
        times = np.round(times, 6)  # they are kept as float32
        if not np.isfinite(times).all() or (np.diff(times) <= 0).any() or times[0] < 0:
            self.notes.remark("time stamps that do not rise: frames are counted at the rate of the data set", name)
            times = np.arange(count) / self.fps
        row = {"recording_id": name, "split_group": group, "duration": float(times[-1] + 1 / self.fps)}
        names = {}
        for kind, column in (("observation", "body_state"), ("action", "action")):
            pieces = [_matrix(frames[one], count) for one in self.numbers(kind) if one in frames]
            if pieces:
                values = np.concatenate(pieces, axis=1)
                sound = np.isfinite(values).all(axis=1)
                if not sound.all():
                    self.notes.remark(
                        f"frames without {column}, as a number in them is not finite", name, int((~sound).sum())
                    )
                if sound.any():
                    row[column] = {"values": values[sound], "times": times[sound]}
                    names[column] = self.names(kind)
        row["images"] = [
            camera for camera in (self._camera(one, episode, name, frames, times) for one in self.cameras) if camera
        ]
        row["images"] = row["images"] or None
        row["external_voice"] = self._request(episode, name, frames, times)
        yield row, names

    def _request(self, episode: int, name: str, frames: dict, times: np.ndarray) -> list[dict] | None:
        """The task, heard when it is given: at the beginning, and again when it changes."""
        if self.tasks and "task_index" in frames:
            tasks = frames["task_index"].ravel()
            changes = [0, *(np.flatnonzero(np.diff(tasks)) + 1)]
            given = [(self.tasks.get(int(tasks[at]), ""), float(times[at])) for at in changes]
        else:
            given = [
                (task, 0.0) for task in (self.episodes.get(episode) or {}).get("tasks") or [] if isinstance(task, str)
            ]
        entries = [{"word": text, "start": start, "end": None} for text, start in given if text and text.strip()]
        if not entries:
            self.notes.remark("an episode without a task: no request is heard", name)
        return entries or None

    def _camera(self, camera: str, episode: int, name: str, frames: dict, times: np.ndarray) -> dict | None:
        short = camera.removeprefix("observation.").removeprefix("images.")
        size = self.options.image_size
        try:
            if camera in frames:
                chosen = _at_rate(times, self.options.image_rate)
                images = [encode_picture(frames[camera][at]["bytes"] or b"", size) for at in chosen]
                return {"name": short, "images": images, "times": times[chosen].tolist()}
            path, begin = self._video(camera, episode)
            if not path.is_file():
                raise RecordingError("the video is missing")
            end = begin + float(times[-1]) + 1 / self.fps
            images, shown = read_video(path, begin, end, self.options.image_rate, size)
        except RecordingError as error:
            self.notes.remark(f"a recording without a camera: {error}", f"{name} {short}")
            return None
        if shown[-1] < times[-1] - 0.5:
            self.notes.remark("a video that ends before its episode", f"{name} {short}")
        return {"name": short, "images": images, "times": shown}

    def _video(self, camera: str, episode: int) -> tuple[Path, float]:
        """(file, s at which the episode begins in it): up to v2.1 an episode a file, in v3 several episodes a file."""
        about = self.episodes.get(episode) or {}
        chunk = about.get(f"videos/{camera}/chunk_index")
        values = {"video_key": camera, "episode_index": episode, "chunk_index": chunk}
        values["episode_chunk"] = episode // int(self.info.get("chunks_size") or 1000)
        values["file_index"] = about.get(f"videos/{camera}/file_index")
        template = self.info.get("video_path") or ""
        try:
            path = Path(template.format(**values))
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise RecordingError("meta/ does not say where the video is") from error
        if path.is_absolute() or ".." in path.parts:
            raise RecordingError("meta/ names a video outside of the folder")
        return self.folder / path, float(about.get(f"videos/{camera}/from_timestamp") or 0.0)


def find_episodes(folder: Path, options: ImportOptions, notes: Notes) -> list[Job]:
    """A job for every episode of a LeRobot folder whose frames are there, whatever meta/ says of it."""
    return _Dataset(folder, options, notes).jobs()


def _at_rate(times: np.ndarray, rate: float) -> np.ndarray:
    """Indices of the last of `times` in every 1 / rate s, as `read_video` chooses them."""
    slots = np.ceil((times - 1e-4) * rate)
    return np.flatnonzero(np.append(np.diff(slots) > 0, True))


def _matrix(column: np.ndarray, count: int) -> np.ndarray:
    """A column of numbers or of lists of equal length -> [N, numbers]."""
    if column.dtype == object:
        column = np.stack(column)
    return column.astype(np.float64).reshape(count, -1)


def _is_depth(feature: dict) -> bool:
    about = feature.get("info") or feature.get("video_info") or {}
    return bool(about.get("video.is_depth_map") or about.get("is_depth_map"))


def _leaves(names) -> Iterator[str]:
    """The strings in nested names: ["a"], [["a"]], {"motors": ["a"]}, {"a": 0}."""
    if isinstance(names, str):
        yield names
    elif isinstance(names, dict):
        for key, value in names.items():
            yield from _leaves(value if isinstance(value, (list, dict)) else str(key))
    elif isinstance(names, list):
        for value in names:
            yield from _leaves(value)


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or no JSON: it is no LeRobot data set, or a part of one") from error


def _read_lines(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise UserError(f"{path} is no JSON Lines: repair it, or remove it") from error
    return [row for row in rows if isinstance(row, dict)]
