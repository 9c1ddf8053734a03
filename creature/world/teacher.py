"""The teacher: what the recorded creature does, thinks and says. It knows the room; the room does not know it.

The order of events is what makes each sense a witness: what was asked is thought first, then what another sense adds,
and the body turns to a thing only after its side has been thought. Until then only eyes and head move at random.
"""

from collections import deque
from collections.abc import Iterator

import numpy as np

from creature.world.body import ARM, EYES, HINGED, SIDES, quaternions_of, reach
from creature.world.grammar import ANSWER, FEEL, THINK
from creature.world.room import NUM_BLEND_SHAPES, SUBFRAMES, Room
from creature.world.scene import OWN_VOICE, SHAPES
from creature.world.script import Request
from creature.world.speech import speak
from creature.world.visit import SAMPLES, smooth
from ticks_creature import TICK_SECONDS

PAUSE = 3  # ticks between hearing and thinking, and between the side and the first movement
# m, standard deviation: how far beside a thing a hand arrives at first, high above the table, before it finds it. So a
# creature learns to find a thing when its own hand has arrived beside it.
BESIDE = (0.04, 0.06, 0.02)
HAND_PAUSE = 0.45  # s that a hand rests on a thing before the creature says how it is
RESTING_GAZE = (0.0, -0.28, 1.0)  # left, up, ahead; the head looks down as well
RESTING_PITCH = {"neck": 0.38, "head": 0.30}  # rad
HEAD_WANDER, GAZE_WANDER = 0.07, 0.06  # rad, how far head and eyes wander
ARMS = {side: [HINGED.index(f"{side}_{kind}") for kind in ARM] for side in SIDES}
HEAD = [HINGED.index("neck"), HINGED.index("head")]
# Every 1 to 3 s arms, neck and head are thrown off their pose, rad, and lids fall, mostly by little and sometimes by
# much, and come back, by two thirds in so many s: a creature that never saw how to come back drifts away on its own
# commands, falls silent in a pose that it does not know, reaches beside what it reaches for, and shuts its eyes.
THROWN = [*((rows, np.radians(3)) for rows in ARMS.values()), (HEAD, np.radians(5))]
LIDS_FALL = 0.3  # share of an open eye
BACK_SECONDS = 0.5
# Of the 51 blend shapes in ARKit's order (without the tongue).
BLINK, JAW_OPEN, SMILE, FROWN, BROWS_DOWN = (0, 7), 17, (23, 24), (25, 26), (41, 42)


class Teacher:
    """
        room, teacher = Room(seed=0), None
        teacher = Teacher(room, seed=0)
        while not room.done:
            room.act(**teacher.act())
            print(teacher.thoughts)

    `act` returns the arguments of `Room.act` for the next tick; `thoughts` holds the words whose thought begins in it,
    `said` those whose sound begins in it, each with its second.
    """

    def __init__(self, room: Room, seed: int):
        self.room, self.draw = room, np.random.default_rng([seed, 7])
        self.angles = room.start.copy()
        self.off, self.throw = np.zeros_like(self.angles), self._in(1, 3)  # angles by which it is off its pose
        self.shut = 0.0  # how far the lids have fallen
        self.moves = {}  # group of joints: (rows, angles before, angles after, begin, seconds)
        self.face, self.mood = np.zeros(NUM_BLEND_SHAPES), np.zeros(NUM_BLEND_SHAPES)
        self.gaze, self.target = np.array(RESTING_GAZE), None
        self.waiting, self.voice, self.words = deque(), np.zeros(0, np.float32), []
        self.thoughts, self.said = [], []
        self.blink = self._in(1, 4)
        self.visit, self.answered, self.task, self.glance = room.visit, 0, None, 0
        self.aiming = False  # whether a hand is on the last part of its way to a thing
        for row, pitch in RESTING_PITCH.items():
            self.angles[HINGED.index(row), 1] = pitch

    def act(self) -> dict:
        """The command for the next tick, as the arguments of `Room.act`."""
        self.tick = self.room.tick + 1
        self._attend()
        self._idle()
        before, after = self.off, self._come_back()
        shares = np.arange(SUBFRAMES) / SUBFRAMES
        poses = [self._pose(self.tick + share) + before + share * (after - before) for share in shares]
        rotations = quaternions_of(np.stack(poses))
        voice = self._voice()
        self.thoughts = []
        if self.waiting:
            self.thoughts = [{"word": self.waiting.popleft(), "start": self.tick * TICK_SECONDS}]
        end = (self.tick + 1) * TICK_SECONDS
        self.said = [{"word": word, "start": start} for word, start in self.words if start < end]
        self.words = self.words[len(self.said) :]
        return {
            "rotations": rotations, "blend_shapes": self._face(voice), "eyes": self._eyes(), "voice": voice,
            "words": [one["word"] for one in self.said],
        }  # fmt: skip

    # ----------------------------------------------------------------------------------------------------------------
    # What it does when it is spoken to: one step of a task each tick
    # ----------------------------------------------------------------------------------------------------------------

    def _attend(self) -> None:
        if self.visit is not self.room.visit:
            self._leave_off()
        requests = self.room.requests
        if self.answered < len(requests) and requests[self.answered].heard <= self.tick * TICK_SECONDS:
            self.task, self.aiming = self._tasks(requests[self.answered]), False
            self.answered += 1
        if self.task is not None and next(self.task, "over") == "over":
            self.task = self.target = None

    def _leave_off(self) -> None:
        """Others have come: it drops what it does, and its hands rest until there is light."""
        if self.task is not None:
            for side in SIDES:
                self._rest(side, 0.4)
        self.visit, self.task, self.target, self.aiming = self.room.visit, None, None, False
        self.waiting.clear()
        self.mood = np.zeros(NUM_BLEND_SHAPES)

    def _tasks(self, request: Request) -> Iterator[None]:
        details = request.details | {"answer": request.answer}
        yield from self._wait(PAUSE)
        yield from self._think(THINK[request.kind].format(**details))
        if request.kind in ("touch", "push", "look"):
            yield from self._wait(PAUSE)
            self._look_at(request.thing)
            yield from self._wait(5)
            if request.kind != "look":
                yield from self._handle(request)
            else:
                self._say(ANSWER["look"])
                yield from self._wait(12)
            return
        if request.kind in ("change", "saw", "cook", "buy"):
            return
        kind = "nothing" if request.answer == "nothing" else request.kind
        self._say(ANSWER[kind].format(**details))

    def _handle(self, request: Request) -> Iterator[None]:
        """Touch a thing from above, or push it away from behind, and say how it is."""
        room, thing = self.room, self.room.setting.things[request.thing]
        place, height = room.thing_place(request.thing), SHAPES[thing.kind][2]
        side = "left" if place[1] > 0.1 else "right"
        top, top_of_thing = room.setting.table_height, place[2] + height
        lifted = np.array([0.26, 0.24 * SIDES[side], top + 0.26])  # above whatever may stand in the way
        yield from self._move(side, lifted, 0.4)
        if request.kind == "touch":
            back = -0.045 * (thing.kind != "plate")  # fingers reach beyond the point that is brought there
            over = place + [back, 0, height + 0.14]
        else:
            over = np.array([place[0] - SHAPES[thing.kind][1][0] - 0.11, place[1], top + 0.14])
        beside = np.array(BESIDE) * self.draw.standard_normal(3).clip(-2, 2)
        yield from self._move(side, [*over[:2], lifted[2]] + beside, 0.5)
        self.aiming = True
        yield from self._move(side, over, 0.35)
        if request.kind == "touch":
            yield from self._move(side, place + [back, 0, height], 0.4)
        else:
            level = top + min(height, 0.05) + 0.012
            yield from self._move(side, [*over[:2], level], 0.3)
            self._start_move(side, [over[0] + 0.13, place[1], level], 0.8)  # by 6 cm
        for _ in range(14):
            if request.thing in room.touching():
                break
            yield
        if request.thing in room.touching():
            yield from self._wait(int(HAND_PAUSE / TICK_SECONDS))
            felt = vars(thing)
            self.mood = np.zeros(NUM_BLEND_SHAPES)
            yield from self._think(FEEL[request.kind].format(**felt))
            self.mood[list(FROWN if request.kind == "touch" and thing.heat != "warm" else SMILE)] = 0.7
            self._say(ANSWER[request.kind].format(**felt))
        now = room.data.site(f"{side}_hand").xpos.copy()
        yield from self._move(side, now + [-0.05, 0, top_of_thing - now[2] + 0.14], 0.35)
        self.target, self.aiming = None, False
        yield from self._move(side, lifted, 0.35)
        self._rest(side, 0.7)
        yield from self._wait(int(round(0.7 / TICK_SECONDS)))
        self.mood = np.zeros(NUM_BLEND_SHAPES)

    def _wait(self, ticks: int) -> Iterator[None]:
        for _ in range(ticks):
            yield

    def _think(self, text: str) -> Iterator[None]:
        """Think a text word by word, and wait until its last word has been thought."""
        self.waiting.extend(text.split())
        while self.waiting:
            yield

    def _say(self, text: str) -> None:
        samples, words = speak(text, OWN_VOICE)
        start = self.tick * TICK_SECONDS
        self.voice, self.words = samples, [(word, start + time) for word, time in words]

    def _in(self, least: float, most: float) -> int:
        """A tick that comes so many seconds from now."""
        return self.room.tick + int(self.draw.uniform(least, most) / TICK_SECONDS)

    # ----------------------------------------------------------------------------------------------------------------
    # Hands, head, eyes, face, voice
    # ----------------------------------------------------------------------------------------------------------------

    def _move(self, side: str, point, seconds: float) -> Iterator[None]:
        self._start_move(side, point, seconds)
        yield from self._wait(int(round(seconds / TICK_SECONDS)))

    def _start_move(self, side: str, point, seconds: float) -> None:
        goal = reach(self.room.model, side, np.asarray(point, float), self._pose(self.tick))
        self._turn(side, ARMS[side], goal[ARMS[side]], seconds)

    def _rest(self, side: str, seconds: float) -> None:
        """A hand goes back to where it was when the life began."""
        self._turn(side, ARMS[side], self.room.start[ARMS[side]], seconds)

    def _turn(self, group: str, rows: list[int], goal: np.ndarray, seconds: float) -> None:
        pose = self._pose(self.tick)
        self.angles = np.where(np.isin(np.arange(len(pose)), rows)[:, None], pose, self.angles)
        self.moves[group] = (rows, pose[rows], goal, self.tick, seconds / TICK_SECONDS)

    def _pose(self, tick: float) -> np.ndarray:
        """Angles [23, 3] that are commanded at a moment, in ticks."""
        pose = self.angles.copy()
        for rows, before, after, begin, ticks in self.moves.values():
            pose[rows] = before + smooth((tick - begin) / ticks) * (after - before)
        return pose

    def _come_back(self) -> np.ndarray:
        """The angles [23, 3] by which it is off its pose at the end of the tick."""
        share = np.exp(-TICK_SECONDS / BACK_SECONDS)
        self.off, self.shut = share * self.off, share * self.shut
        if self.tick >= self.throw and not self.aiming:  # it would miss what it reaches for
            self.throw, far = self._in(1, 3), min(2.0, self.draw.exponential())
            for rows, angle in THROWN:
                self.off[rows] += far * angle * self.draw.standard_normal((len(rows), 3))
            self.shut = min(1.0, self.shut + far * LIDS_FALL * abs(self.draw.standard_normal()))
        return self.off

    def _look_at(self, thing: int) -> None:
        """Head and eyes turn to a thing, half and half."""
        self.target = thing
        head = self.room.data.body("head")
        apart = self.room.thing_place(thing) - head.xpos
        yaw, pitch = np.arctan2(apart[1], apart[0]), np.arctan2(-apart[2], np.hypot(*apart[:2]))
        goal = np.array([[0, 0.35 * pitch, 0.35 * yaw], [0, 0.3 * pitch, 0.3 * yaw]])
        self._turn("head", HEAD, goal, 0.45)

    def _idle(self) -> None:
        """What moves for no reason: gaze and head wander."""
        if self.target is None and self.tick >= self.glance:
            self.glance = self._in(0.4, 1.4)
            self.gaze = np.array(RESTING_GAZE) + [*(GAZE_WANDER * self.draw.standard_normal(2)), 0]
            if self.draw.random() < 0.5:
                wander = HEAD_WANDER * self.draw.standard_normal(2).clip(-2, 2)
                goal = [[0, pitch + wander[0] / 2, wander[1] / 2] for pitch in RESTING_PITCH.values()]
                self._turn("head", HEAD, np.array(goal), 0.6)

    def _eyes(self) -> np.ndarray:
        """[2, 4]: where each eye looks, and how open it is."""
        eyes = np.zeros((2, 4))
        head = self.room.data.body("head")
        for number, place in enumerate(EYES.values()):
            gaze = self.gaze
            if self.target is not None:
                apart = head.xmat.reshape(3, 3).T @ (self.room.thing_place(self.target) - head.xpos) - place
                gaze = np.array([apart[1], apart[2], apart[0]])
            eyes[number, :3] = gaze / np.linalg.norm(gaze)
            eyes[number, 3] = 1 - self.face[BLINK[number]]
        return eyes

    def _face(self, voice: np.ndarray | None) -> np.ndarray:
        """[51]: the jaw follows the loudness of the voice; smile and frown come and go; eyes blink."""
        loudness = 0.0 if voice is None else min(1.0, 6 * float(np.sqrt(np.mean(np.square(voice)))))
        self.face += 0.25 * (self.mood - self.face)
        self.face[JAW_OPEN] = loudness
        self.face[list(BLINK)] = self.shut
        if self.tick >= self.blink:
            self.blink = self._in(2, 6)
            self.face[list(BLINK)] = 1.0
        return self.face.copy()

    def _voice(self) -> np.ndarray | None:
        """[1280] samples of the next tick, or None."""
        if not len(self.voice):
            return None
        part, self.voice = self.voice[:SAMPLES], self.voice[SAMPLES:]
        return np.pad(part, (0, SAMPLES - len(part)))
