"""What each sense can tell in recordings of the room, just before the word that tells it: a table against chance.

  python benchmarks/leaks.py recordings/room

For every fact (the side of a thing, its color, how it feels, who speaks ...) a logistic regression is trained on every
subset of the senses, cross-validated over rooms; figures are the share of right answers. Each sense is known until the
tick before the word. The features are small: colors and where they lie, words heard and the spectrum of the voice,
contacts, joints, commands. Chance is the most frequent answer; a * marks what is 3.1 standard deviations of a binomial
above it, as luck is once in a thousand. The last figure is the best of the 15 subsets without the witness: the best of
15 lucky ones, where nothing leaks. Needs scikit-learn.
"""

import argparse
import io
import itertools
import sys
from collections import Counter, defaultdict
from pathlib import Path

# In place of this folder, whose tokenize.py would hide the standard library's module of that name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np  # noqa: E402

from benchmarks.baselines.common import need_scikit_learn  # noqa: E402
from creature.errors import run_main  # noqa: E402
from creature.files import user_path  # noqa: E402

TICK = 0.08
SENSES = ("eyes", "ears", "skin", "body", "command")
WITNESS = {
    "request": ("ears",), "speaker": ("ears",), "side": ("eyes", "ears"), "color": ("eyes",), "shape": ("eyes", "ears"),
    "heat": ("skin",), "surface": ("skin",), "weight": ("skin",), "hand": ("body",),
    "seen color": ("eyes",), "seen shape": ("eyes",), "seen side": ("eyes",),
}  # fmt: skip
HEARD_SECONDS = 8.0  # of what was heard before a word
RECENT, TOUCHED = 6, 14  # ticks of the body, and of the skin, before it
HANDS_AND_ARMS = range(16, 24)  # joints
STRENGTH = 3.0  # C of the regression, of blocks of features with a length of about 1
LUCK = 3.1  # standard deviations, 1 in 1,000


def facts_of(row: dict) -> list[tuple[str, str, float]]:
    """
    (fact, what it is, s at which its word is thought) of a life, from the frames of `creature/world/grammar.py`.

    The speaker is the first or the second visitor of those who are there. A thought that the end of the life cuts tells
    nothing.
    """
    from creature.world.grammar import HANDS
    from creature.world.scene import COLORS, FEELS, SHAPES, SIDE_PLACES, TEMPERATURES, WEIGHTS

    sentences, found, names = [], [], []
    for entry in row["internal_text"]:
        if not sentences or entry["start"] - sentences[-1][-1][1] > 2.5 * TICK:
            sentences.append([])
        sentences[-1].append((entry["word"], entry["start"]))
    if sentences and row["duration"] - sentences[-1][-1][1] < 2.5 * TICK:
        sentences.pop()
    for sentence in sentences:
        if [word for word, _ in sentence[:2]] == ["that", "is"]:
            names = [*names[len(names) // 2 * 2 :], sentence[2][0]]
            sentence = sentence[3:]
            if not sentence:
                continue
        words, times = [word for word, _ in sentence], [time for _, time in sentence]
        if words[:2] == ["I", "see"]:
            found += _seen(sentence[2:], list(SIDE_PLACES))
            continue
        found += [("speaker", str(names.index(word)), time) for word, time in sentence if word in names]
        if words[0] in ("touch", "push", "look", "find", "the"):  # "touch the red can left", "the can is green"
            named = words.index("the") + 1
            found.append(("request", words[named], times[named]))
            if words[named] in COLORS:
                found.append(("shape", words[named + 1], times[named + 1]))
            found.append(("color" if words[-1] in COLORS else "side", words[-1], times[-1]))
        elif words[:2] == ["it", "feels"]:
            for word, time in sentence[2:]:
                for fact, options in (("heat", TEMPERATURES), ("surface", FEELS), ("weight", WEIGHTS)):
                    found += [(fact, word, time)] if word in options else []
        elif words[-1] in HANDS and "hand" in words:
            found.append(("hand", words[-1], times[-1]))
    assert set(SHAPES).isdisjoint(COLORS)
    return found


def _seen(sentence: list[tuple[str, float]], sides: list[str]) -> list[tuple[str, str, float]]:
    """The facts of "the red ball left the blue box right", without what is told by the words before."""
    found, count = [], len(sentence) // 4
    for number in range(count):
        (color, at), (shape, then), (side, last) = sentence[4 * number + 1 : 4 * number + 4]
        found += [("seen color", color, at), ("seen shape", shape, then)]
        if count - number < len(sides):  # things come from the left to the right: it has more than one place to be
            found.append(("seen side", side, last))
        sides = sides[sides.index(side) + 1 :]
    return found


class Life:
    """A recorded life, from which the features of a moment are taken."""

    def __init__(self, row: dict):
        from feature_extraction_creature import CreatureFeatureExtractor, read_sound

        self.row = row
        mel = CreatureFeatureExtractor().extract(*read_sound(row["audio"]))
        self.mel = mel.reshape(len(mel), 8, -1).mean(axis=1)
        tracks = ("joint_positions", "joint_rotations", "command_rotations")
        self.tracks = {name: np.asarray(row[name]["values"], np.float32) for name in tracks}
        self.tracks |= {name: np.asarray(row[name]["values"], np.float32) for name in ("blend_shapes", "eyes")}
        self.touch = defaultdict(list)
        for contact in row["touch"]:
            self.touch[int(contact["time"] / TICK)].append(contact)
        self.heard = [(entry["word"].lower(), entry["start"]) for entry in row["external_voice"]]
        begins = [
            first["start"]
            for first, then in itertools.pairwise(row["internal_text"])
            if (first["word"], then["word"]) == ("that", "is")
        ]
        self.greetings = [(time, self.voice_before(time)) for time in begins]

    def voice_before(self, time: float) -> np.ndarray:
        """[bands]: the mean spectrum while the words of the last sentence before a moment are heard."""
        starts = [start for _, start in self.heard if start < time]
        first = last = starts[-1]
        for start in reversed(starts):
            first = start if first - start < 1.0 else first
        return self.mel[int(first / TICK) : int(last / TICK) + 2].mean(axis=0)

    def features(self, time: float, vocabulary: dict[str, int]) -> dict[str, list[np.ndarray]]:
        """Of every sense what it knows before the tick of a moment, in blocks."""
        tick = int(time / TICK + 1e-3)
        bag = np.zeros(len(vocabulary))
        for word, start in self.heard:
            if time - HEARD_SECONDS < start < tick * TICK and word in vocabulary:
                bag[vocabulary[word]] = 1
        voice = self.voice_before(tick * TICK)
        first, second = [greeting for begin, greeting in self.greetings if begin < time][-2:]  # of who is there
        felt = {
            name: self.tracks[name].reshape(-1, 4, 24, self.tracks[name].shape[-1]) for name in list(self.tracks)[:3]
        }
        recent, before = slice(tick - RECENT, tick), slice(tick - 25, tick - 20)
        places, turns, commands = (values[recent].mean(axis=(0, 1)) for values in felt.values())
        moved = places - felt["joint_positions"][before].mean(axis=(0, 1))
        commanded = commands - felt["command_rotations"][before].mean(axis=(0, 1))
        arms = list(HANDS_AND_ARMS)
        return {
            "eyes": self._eyes(tick - 1),
            "ears": [bag, voice, np.abs(voice - first) - np.abs(voice - second)],
            "skin": self._skin(tick),
            "body": [places[arms].reshape(-1), places.reshape(-1), turns.reshape(-1), moved.reshape(-1)],
            "command": [commands[arms].reshape(-1), commands.reshape(-1), commanded.reshape(-1),
                        self.tracks["blend_shapes"][tick - 1], self.tracks["eyes"][tick - 1].reshape(-1)],
        }  # fmt: skip

    def _eyes(self, tick: int) -> list[np.ndarray]:
        """How much of each color both eyes see, in which column, how wide and high; and a thumbnail of 8 x 8."""
        from PIL import Image

        from creature.world.scene import COLORS

        while tick > 0 and not self._picture(0, tick).any():  # a blink
            tick -= 1
        shares, places, sizes = [], [], []
        for eye in range(2):
            picture = self._picture(eye, tick).astype(np.float32)
            bright = picture / np.maximum(np.linalg.norm(picture, axis=-1, keepdims=True), 1)
            columns = np.linspace(-1, 1, picture.shape[1])[None]
            for color in COLORS.values():
                tone = np.array(color) / np.linalg.norm(color)
                grey = np.ptp(color) < 0.1
                near = (bright @ tone > 0.985) & (np.ptp(picture, axis=-1) > 60 if not grey else True)
                near &= (picture.mean(axis=-1) > 200) == (np.mean(color) > 0.9)
                share = near.mean()
                shares.append(min(share, 0.02) * 50)
                rows, across = np.nonzero(near)
                places.append((near * columns).sum() / max(near.sum(), 1))
                sizes += [rows.std(), across.std()] if len(rows) else [0.0, 0.0]
        small = Image.fromarray(self._picture(0, tick)).resize((8, 8), Image.Resampling.BOX)
        return [np.array(shares), np.array(places), np.array(sizes), np.asarray(small, np.float32).reshape(-1) / 255]

    def _picture(self, eye: int, tick: int) -> np.ndarray:
        from PIL import Image

        return np.asarray(Image.open(io.BytesIO(self.row["images"][eye]["images"][tick]["bytes"])))

    def _skin(self, tick: int) -> list[np.ndarray]:
        """Of every part: how long it touched what, mean temperature, force and place; the same of the last thing."""
        parts, things = np.zeros((24, 11)), []
        for contact in [one for at in range(tick - TOUCHED, tick) for one in self.touch[at]]:
            felt = [contact["temperature"], np.log(contact["force"]), contact["x"], contact["y"], contact["z"]]
            parts[contact["point"]] += np.concatenate((np.eye(6)[contact["surface"]], felt)) / TOUCHED
            if contact["surface"] >= 3:
                warmth = contact["temperature"]
                things.append([*np.eye(3)[contact["surface"] - 3], warmth, abs(warmth - 30), np.log(contact["force"])])
        return [parts.reshape(-1), np.mean(things, axis=0) if things else np.zeros(6)]


def accuracy(blocks: list[np.ndarray], labels: np.ndarray, rooms: np.ndarray) -> float:
    """Share of right answers on rooms that the probe was not trained on, in five parts."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold

    right = 0
    for train, test in GroupKFold(5).split(labels, labels, rooms):
        scaled = [(block - block[train].mean(axis=0)) / (block[train].std(axis=0) + 1e-6) for block in blocks]
        features = np.concatenate([np.clip(block, -5, 5) / np.sqrt(block.shape[1]) for block in scaled], axis=1)
        # As many features as moments say the same, and are fitted sooner.
        features = features @ np.linalg.svd(features[train], full_matrices=False)[2].T
        model = LogisticRegression(C=STRENGTH, max_iter=200, tol=1e-3).fit(features[train], labels[train])
        right += (model.predict(features[test]) == labels[test]).sum()
    return right / len(labels)


def inputs_of(moments: list[dict], subset: tuple[str, ...], vocabulary: dict[str, int]) -> list[np.ndarray]:
    """Blocks [N, features] of a subset of senses; of eyes and ears, also where and how large the heard color is."""
    from creature.world.scene import COLORS

    blocks = [np.stack(block) for sense in subset for block in zip(*(one[sense] for one in moments), strict=True)]
    if {"eyes", "ears"} <= set(subset):
        heard = np.zeros((len(moments), len(COLORS)))
        for number, color in enumerate(COLORS):
            if color in vocabulary:
                heard[:, number] = [moment["ears"][0][vocabulary[color]] for moment in moments]
        shares, places, sizes = (np.stack([moment["eyes"][block] for moment in moments]) for block in range(3))
        count = len(COLORS)  # of the left eye
        share, column = ((heard * block[:, :count]).sum(axis=1) for block in (shares, places))
        high, wide = ((heard * sizes[:, at : 2 * count : 2]).sum(axis=1) for at in range(2))
        seen = (column, np.abs(column), share, high, wide, high - wide, high * wide)
        blocks.append(np.stack(seen, axis=1))
    return blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=user_path, help="of recordings of the room")
    folder = parser.parse_args().folder
    need_scikit_learn()
    from creature.data.recordings.schema import load_recordings
    from creature.world.recording import read_row

    splits, _ = load_recordings(folder)
    moments, labels, rooms = defaultdict(list), defaultdict(list), defaultdict(list)
    texts = [text for split in splits.values() for text in split["external_voice"]]
    heard = (entry["word"].lower() for text in texts for entry in text)
    common = [word for word, count in Counter(heard).items() if count >= 5]
    vocabulary = {word: at for at, word in enumerate(common)}
    for split in splits.values():
        for number in range(len(split)):
            row = read_row(split.data.table.slice(number, 1))
            life = Life(row)
            for fact, label, time in facts_of(row):
                moments[fact].append(life.features(time, vocabulary))
                labels[fact].append(label)
                rooms[fact].append(row["split_group"])
    subsets = [subset for size in range(1, 6) for subset in itertools.combinations(SENSES, size)]
    heads = "".join(f"{sense:<9}" for sense in SENSES)
    print(f"fact        times  chance  {heads}all     witness          without it, at best")
    for fact, witness in WITNESS.items():
        truth, groups = np.array(labels[fact]), np.array(rooms[fact])
        share = max(Counter(labels[fact]).values()) / len(truth)
        bound = share + LUCK * np.sqrt(share * (1 - share) / len(truth))
        found = {}
        for subset in subsets:
            found[subset] = accuracy(inputs_of(moments[fact], subset, vocabulary), truth, groups)
        mark = lambda value, bound=bound: f"{value:.2f}{'*' if value > bound else ' '}"  # noqa: E731
        best = max((subset for subset in subsets if witness[0] not in subset), key=found.get)
        cells = "".join(f"{mark(found[sense,]):<9}" for sense in SENSES) + f"{mark(found[SENSES]):<8}"
        cells += f"{mark(found[witness])} {'+'.join(witness):<11}{mark(found[best])} {'+'.join(best)}"
        print(f"{fact:<11} {len(truth):>5}  {share:.2f}    {cells}", flush=True)


if __name__ == "__main__":
    run_main(main)
