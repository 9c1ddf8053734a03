"""
A room with a body in it: what its senses get in every tick of 80 ms, and what it does.

    room = Room(split="train")
    room.reset(seed=0)
    while not room.done:
        senses = room.perceive()
        room.act(**commands_of(senses))
    print([(request.text, request.succeeded(), request.chance) for request in room.requests])

A command takes effect one tick after it was given, as nerves and muscles take their time: in tick t, `perceive` tells
what was sensed while the body did what was given with the `act` before the last.
"""

from dataclasses import replace

import mujoco
import numpy as np

from creature.errors import UserError, first_line
from creature.world import NO_OPENGL
from creature.world.body import (
    ARM,
    BODY_BIT,
    HINGED,
    JOINTS,
    SIDES,
    THING_BIT,
    angles_of,
    hinge_places,
    quaternions_of,
    reach,
)
from creature.world.grammar import HANDS
from creature.world.scene import SHAPES, SURFACES, Setting, build
from creature.world.script import LED_SECONDS, Request, remembered
from creature.world.speech import SAMPLING_RATE
from creature.world.visit import SAMPLES, TAIL, Lead, Visit
from ticks_creature import TICK_SECONDS, tick_of

LIFE_TICKS = 1024  # 81.92 s, if no other number is asked for
SUBFRAMES, STEPS = 4, 4  # of a tick; of MuJoCo in a sub-frame
SETTLE_STEPS = 100  # of MuJoCo, until what was put down is at rest
NUM_BLEND_SHAPES = 51
# A joint feels its angle with an error that wanders, so that what a load bends it by, 0.1 degrees, is not felt.
JOINT_ERROR, JOINT_ERROR_SECONDS = np.radians(0.6), 1.0
FORCE_ERROR, TEMPERATURE_ERROR = 0.05, 0.5  # of the skin: share, C
WEAKEST, OWN_WARMTH, ROOM_WARMTH = 0.1, 33.0, {"floor": 18.0, "table": 21.0}  # N; C
OWN_LOUDNESS = 0.4
STRAIGHT_AHEAD = np.array([0.0, 0.0, 1.0, 1.0])  # gaze to the left, up, ahead; openness
ALL = mujoco.mjtCatBit.mjCAT_ALL
LIDS = 0.2  # an eye that is less open sees nothing
OVER = np.array([0.26, 0.16, 1.25])  # where a led hand passes, of the left one, m
GAZE_LIMIT = np.radians(35)
SEEN, MOVED = np.radians(8), 0.03  # of a thing that is looked at: rad from the gaze; of one that was pushed, m


class Room:
    """
    Args:
        seed: of the first life; `reset` begins another.
        split: "train" or "validation": they share no room, no voice, no place to stand and no way to ask.
        eye: pixels of a side of the pictures.

    `requests` holds what was asked so far, `done` whether the life is over, `visit` who is there, `setting` the room as
    it is now; a creature learns of them through its senses alone. UserError without the libraries or without OpenGL.
    """

    def __init__(self, seed: int = 0, split: str = "train", eye: int = 64):
        self.split, self.eye, self._renderer = split, eye, None
        self.reset(seed)

    def reset(self, seed: int, ticks: int = LIFE_TICKS) -> None:
        """Begin the life of a seed; the same one is the same life, and begins so if it is to have more ticks."""
        self.seed, self.ticks, self.tick, self.requests, self.felt = seed, ticks, 0, [], []
        self.visit, self._sounding = None, np.zeros(TAIL, np.float32)
        self._next_visit()
        self._furnish(self.visit.setting)
        self.start = self._starting_pose()
        self.data.qpos[self._hinges] = self.data.ctrl[:] = self.start.reshape(-1)
        self._settle()
        self._error = JOINT_ERROR * self._draw.standard_normal(len(self._hinges))
        self._waiting = self.resting()
        self._advance(self._waiting)

    @property
    def done(self) -> bool:
        return self.tick >= self.ticks

    @property
    def time(self) -> float:
        """The second at which the present tick begins."""
        return self.tick * TICK_SECONDS

    def resting(self) -> dict:
        """The command that the creature begins with, as the arguments of `act`: to stay as it is, eyes open."""
        rotations = quaternions_of(np.broadcast_to(self.start, (SUBFRAMES, *self.start.shape)))
        eyes = np.tile(STRAIGHT_AHEAD, (2, 1))
        return {"rotations": rotations, "blend_shapes": np.zeros(NUM_BLEND_SHAPES), "eyes": eyes, "voice": None}

    def perceive(self) -> dict:
        """
        What the senses get in the present tick, in physical units.

        `audio` [1280] float32 at 16 kHz; `images` [2, H, W, 3] uint8, left eye first; `joint_positions` [4, 24, 3] m in
        the frame of the pelvis and `joint_rotations` [4, 24, 4] quaternions relative to the parent, at the beginning of
        each sub-frame of 20 ms; `touch`, the contacts: point (number of the joint whose part is touched), surface
        (`SURFACES`), force N, x, y, z m on that part, temperature C; `external_voice`, the words that begin in the
        tick, each with its `start` in s.
        """
        return self._senses

    def act(self, rotations, blend_shapes=None, eyes=None, voice=None, words=()) -> None:
        """
        Advance one tick.

        Args:
            rotations: [4, 24, 4] quaternions relative to the parent, of any length; that of the pelvis is not used.
            blend_shapes: [51] in [0, 1]; None is a face at rest.
            eyes: [2, 4]: gaze (to the left, up, ahead) in the frame of the head, and openness; None is straight ahead
                and open.
            voice: [1280] samples, or None for silence. They are heard as any sound.
            words: what these samples say, for the judgement of answers alone.
        """
        expected = {"rotations": (SUBFRAMES, len(JOINTS), 4), "blend_shapes": (NUM_BLEND_SHAPES,), "eyes": (2, 4)}
        given = {"rotations": rotations, "blend_shapes": blend_shapes, "eyes": eyes, "voice": voice}
        for name, shape in (expected | {"voice": (SAMPLES,)}).items():
            if given[name] is not None:
                given[name] = np.asarray(given[name], np.float64)
                if given[name].shape != shape or not np.isfinite(given[name]).all():
                    raise ValueError(f"{name} must be finite numbers of shape {list(shape)}.")
        if self.done:
            raise ValueError("This life is over: begin another with reset(seed).")
        if given["eyes"] is None:
            given["eyes"] = np.tile(STRAIGHT_AHEAD, (2, 1))
        command, self._waiting = self._waiting, given
        self.tick += 1
        self._advance(command)
        self._judge_words(words)

    # ----------------------------------------------------------------------------------------------------------------
    # One tick
    # ----------------------------------------------------------------------------------------------------------------

    def _advance(self, command: dict) -> None:
        """Live through the present tick with a command, and keep what the senses get."""
        if self.tick == self.visit.end:
            self._next_visit()
        if self.visit.number and self.tick == self.visit.light - 1:
            self._set_table(self.visit.setting)
            self.felt = []
        self._harden()
        led = self._led()
        self.dark = led is not None or self._changing() or self.tick < self.visit.light
        angles = np.clip(angles_of(command["rotations"]).reshape(SUBFRAMES, -1), *self._limits)
        joints, contacts = [], {}
        for subframe in range(SUBFRAMES):
            joints.append(self._feel_joints())
            if subframe == SUBFRAMES - 1:
                images = self._see(command["eyes"])
            self.data.ctrl[:] = angles[subframe]
            if led is not None:
                self.data.ctrl[led.rows] = led.pose(self.time + subframe * TICK_SECONDS / SUBFRAMES)
            mujoco.mj_step(self.model, self.data, STEPS)
            self._feel_contacts(contacts, subframe)
        positions, bent = map(np.array, zip(*joints, strict=True))
        begin = (self.tick - self.visit.begin) * SAMPLES
        audio = self._sounding[begin : begin + SAMPLES].copy()
        if command["voice"] is not None:
            audio += OWN_LOUDNESS * np.clip(command["voice"], -1, 1)
        heard = self._hear_words()
        self._senses = {
            "audio": np.clip(audio, -1, 1).astype(np.float32),
            "images": images,
            "joint_positions": positions.astype(np.float32),
            "joint_rotations": quaternions_of(bent).astype(np.float32),
            "touch": self._contacts_of(contacts, led),
            "external_voice": heard,
        }
        self._judge_deeds(contacts)

    def _hear_words(self) -> list[dict]:
        """The words that begin in the present tick; what was asked becomes a request at its first word."""
        end, words = self.time + TICK_SECONDS, []
        self.requests += [request for request in self.visit.script if tick_of(request.begins) == self.tick]
        for request in self.requests[-2:]:
            words += [{"word": word, "start": start} for word, start in request.words if self.time <= start < end]
            if request.kind == "felt" and request.answer is None and request.heard < end:
                request.answer = remembered(self.felt, request.details["quality"])
        return words

    def _led(self) -> "Lead | None":
        """
        How a visitor leads a hand now, or None.

        While it is dark, a visitor takes a hand and puts it somewhere: the command says nothing of where it is.
        """
        for request in self.visit.script:
            if request.kind == "hand" and request.begins - LED_SECONDS <= self.time + 1e-9 < request.until - 0.3:
                if self._leading is None:
                    self._leading = self._lead(request)
                return self._leading
        self._leading = None
        return None

    def _changing(self) -> bool:
        """Whether a visitor changes the table now: in the dark, and all at once in the last tick of it."""
        for request in self.visit.script:
            if request.kind == "change" and request.begins <= self.time + 1e-9 < request.heard:
                if (self.tick + 1) * TICK_SECONDS >= request.heard:
                    self._set_table(replace(self.setting, things=request.things))
                return True
        return False

    def _lead(self, request: Request) -> "Lead":
        """How the hand of a request is led: over the table first, then to its place."""
        side, turned = request.details["which"], np.array([1, SIDES[request.details["which"]], 1])
        rows = [HINGED.index(f"{side}_{kind}") * 3 + axis for kind in ARM for axis in range(3)]
        place = np.array(HANDS[request.details["where"]]) + self._draw.uniform(-0.03, 0.03, 3)
        poses = [reach(self.model, side, point * turned, self.start).reshape(-1)[rows] for point in (OVER, place)]
        return Lead(side, request.begins - LED_SECONDS, rows, [self.data.ctrl[rows].copy(), *poses])

    def _feel_joints(self) -> tuple[np.ndarray, np.ndarray]:
        """(positions [24, 3], angles [23, 3]) as the joints feel them."""
        share = np.exp(-TICK_SECONDS / SUBFRAMES / JOINT_ERROR_SECONDS)
        drawn = JOINT_ERROR * self._draw.standard_normal(len(self._error))
        self._error = share * self._error + np.sqrt(1 - share**2) * drawn
        angles = self.data.qpos[self._hinges] + self._error
        self._scratch.qpos[:] = self.data.qpos
        self._scratch.qpos[self._hinges] = angles
        mujoco.mj_kinematics(self.model, self._scratch)
        places = self._scratch.xpos[self._bodies] - self._scratch.xpos[self._bodies[0]]
        return places, angles.reshape(-1, 3)

    def _see(self, eyes: np.ndarray) -> np.ndarray:
        """[2, H, W, 3] uint8; the eyes turn to where the command looks, within their limits."""
        images = np.zeros((2, self.eye, self.eye, 3), np.uint8)
        for camera, eye in zip(self._cameras, eyes, strict=True):
            self.model.cam_quat[camera] = gaze_quaternion(eye[:3])
        mujoco.mj_camlight(self.model, self.data)
        for number, (camera, eye) in enumerate(zip(self._cameras, eyes, strict=True)):
            if eye[3] >= LIDS and not self.dark:
                self._view.fixedcamid = camera
                # `Renderer.update_scene` would show the table with which it was opened.
                mujoco.mjv_updateScene(self.model, self.data, self._shown, None, self._view, ALL, self._renderer.scene)
                self._renderer.render(out=images[number])
        return images

    def _feel_contacts(self, contacts: dict, subframe: int) -> None:
        """
        Add the contacts of a sub-frame, by (part of the body, what it touches): force, and place times force.

        Sounds of things that meet are added to what is heard; how loud they are tells nothing of weight or surface.
        """
        force, moment, begun, data = np.zeros(6), np.ones(4), set(), self.data
        matrices, places = data.xmat.reshape(-1, 3, 3), data.xpos
        for number, (pair, place) in enumerate(zip(data.contact.geom.tolist(), data.contact.pos, strict=True)):
            mujoco.mj_contactForce(self.model, data, number, force)
            if force[0] < WEAKEST:
                continue
            if not self._things.keys().isdisjoint(pair):
                begun.add(tuple(pair))
            share = float(force[0]) / SUBFRAMES
            for own, other in (pair, pair[::-1]):
                if own in self._parts:
                    part, joint = self._parts[own]
                    mujoco.mju_mulMatTVec(moment[1:], matrices[joint], place - places[joint])
                    sums = contacts.setdefault((part, other), np.zeros(4))
                    sums += share * moment
        for pair in sorted(begun - self._loud):
            thing = self._things.get(pair[0], self._things.get(pair[1]))
            self._knock(SHAPES[self.setting.things[thing].kind][3], self.tick + subframe / SUBFRAMES)
        self._loud = begun

    def _knock(self, pitch: float, tick: float) -> None:
        """A thing knocks: its shape has a pitch, and the loudness is that of chance."""
        times = np.arange(int(0.15 * SAMPLING_RATE)) / SAMPLING_RATE
        sound = np.exp(-times / 0.03) * (np.sin(2 * np.pi * pitch * times) + 0.4 * np.sin(5.5 * np.pi * pitch * times))
        begin = int((tick - self.visit.begin) * SAMPLES)
        part = self._sounding[begin : begin + len(sound)]
        part += (self._draw.uniform(0.03, 0.12) * sound)[: len(part)].astype(np.float32)

    def _contacts_of(self, contacts: dict, led) -> list[dict]:
        """The contacts of a tick, one for every part that is touched: a thing comes before floor and table."""
        best = {}
        for (part, other), sums in contacts.items():
            rank = (other in self._things, sums[0])
            if part not in best or rank > best[part][0]:
                best[part] = (rank, other, sums)
        felt = []
        for part, (_, other, sums) in sorted(best.items()):
            surface, temperature = self._surface(other)
            felt.append(self._contact(part, surface, sums[0], sums[1:4] / sums[0], temperature))
        if led is not None:
            wrist = JOINTS.index(f"{led.side}_elbow")  # a visitor holds the forearm
            felt = [contact for contact in felt if contact["point"] != wrist]
            place = np.array([0.0, SIDES[led.side] * 0.2, 0.03])
            felt.append(self._contact(wrist, SURFACES["skin"], 4.0, place, OWN_WARMTH))
        return felt

    def _contact(self, part: int, surface: int, force: float, place: np.ndarray, temperature: float) -> dict:
        errors = self._draw.standard_normal(2)
        felt = {"point": part, "surface": surface, "force": float(force * np.exp(FORCE_ERROR * errors[0]))}
        felt |= dict(zip("xyz", map(float, place), strict=True))
        return felt | {"temperature": float(temperature + TEMPERATURE_ERROR * errors[1])}

    def _surface(self, geom: int) -> tuple[int, float]:
        """(what skin feels there, C)."""
        if geom in self._things:
            thing = self.setting.things[self._things[geom]]
            return SURFACES[thing.feel], thing.temperature
        name = self.model.geom(geom).name
        return (SURFACES[name], ROOM_WARMTH[name]) if name in ROOM_WARMTH else (SURFACES["skin"], OWN_WARMTH)

    # ----------------------------------------------------------------------------------------------------------------
    # Whether it did as it was asked
    # ----------------------------------------------------------------------------------------------------------------

    def touching(self) -> set[int]:
        """The numbers of the things that the creature touched in the present tick."""
        return self._touched

    def thing_place(self, number: int) -> np.ndarray:
        """The middle of a thing, m."""
        return self.data.xpos[self.model.body(f"thing{number}").id].copy()

    def _open_requests(self) -> list[Request]:
        now = self.time
        return [
            one
            for one in self.requests[-2:]
            if one.heard <= now < one.until and (one.outcome is None or one.kind == "look")
        ]

    def _judge_deeds(self, contacts: dict) -> None:
        """Settle what is asked to be touched, pushed and looked at by what comes first."""
        self._touched = {self._things[other] for _, other in contacts if other in self._things}
        requests = self._open_requests()
        last = self.requests[-1] if self.requests else None
        kind = last.kind if last and last.begins > self.visit.begin * TICK_SECONDS else ""
        things = [self.setting.things[number] for number in sorted(self._touched)]
        self.felt += [(thing, kind) for thing in things if (thing, kind) not in self.felt[-2:]]
        for request in requests:
            if request.kind == "touch" and self._touched:
                request.outcome = request.thing in self._touched
            elif request.kind == "push":
                moved = [n for n, place in self._places.items() if np.linalg.norm(self.thing_place(n) - place) > MOVED]
                if moved:
                    request.outcome = request.thing in moved
            elif request.kind == "look":
                self._judge_gaze(request)
        if not any(request.kind == "push" for request in requests):
            self._places = {number: self.thing_place(number) for number in self._places}

    def _judge_gaze(self, request: Request) -> None:
        """The last thing that the gaze rested on for half a second is the one that was looked at."""
        seen = None
        for number in self._places:
            apart = []
            for camera in self._cameras:
                ahead = -self.data.cam_xmat[camera].reshape(3, 3)[:, 2]
                to = self.thing_place(number) - self.data.cam_xpos[camera]
                apart.append(np.arccos(np.clip(ahead @ to / np.linalg.norm(to), -1, 1)))
            if np.mean(apart) < SEEN:
                seen = number
        self._stared = (seen, self._stared[1] + 1) if seen is not None and seen == self._stared[0] else (seen, 1)
        if seen is not None and self._stared[1] >= 6:
            request.outcome = seen == request.thing

    def _judge_words(self, words) -> None:
        """The first word that is one of the options is the answer."""
        for request in self._open_requests():
            for word in words:
                if request.options and request.outcome is None and word in request.options:
                    request.outcome = word == request.answer
                elif request.kind == "felt" and request.outcome is None and word == "nothing":
                    request.outcome = request.answer == "nothing"

    # ----------------------------------------------------------------------------------------------------------------
    # The beginning of a life, and of a visit
    # ----------------------------------------------------------------------------------------------------------------

    def _next_visit(self) -> None:
        """The next visitors come; on the table is still what those before them have left there."""
        self.visit = Visit(self.seed, self.split, self.visit)
        self._draw, self._sounding = self.visit.draw, self.visit.sounds(self._sounding)

    def _furnish(self, setting: Setting) -> None:
        """Build the room of a setting, and the body in it with all angles 0."""
        self.setting = setting
        self.model = build(self.setting, self.eye)
        self.data = mujoco.MjData(self.model)
        if self._renderer is None:
            self._open_eyes()
        self._index()
        self._through = set()

    def _settle(self) -> None:
        """The things, and the feet, come to rest."""
        mujoco.mj_forward(self.model, self.data)
        mujoco.mj_step(self.model, self.data, SETTLE_STEPS)
        self._places = {number: self.thing_place(number) for number in range(len(self.setting.things))}
        self._loud = {tuple(pair) for pair in self.data.contact.geom.tolist() if self._things.keys() & set(pair)}

    def _set_table(self, setting: Setting) -> None:
        """Put the things of a setting on the table, at rest; the body is as it was, and touches none of them."""
        before, body = self.data, slice(-1 - len(self._hinges), None)
        self._furnish(setting)
        self._settle()
        for name in ("qpos", "qvel", "qacc_warmstart"):
            getattr(self.data, name)[body] = getattr(before, name)[body]
        mujoco.mj_fwdPosition(self.model, self.data)
        for pair in self.data.contact.geom.tolist():
            if not self._parts.keys().isdisjoint(pair):
                self._through |= self._things.keys() & set(pair)
        self.model.geom_conaffinity[list(self._through)] = THING_BIT

    def _harden(self) -> None:
        """A thing that was put where a part of the body is can be touched once that part has left it."""
        for geom in sorted(self._through):
            if all(mujoco.mj_geomDistance(self.model, self.data, geom, part, 0.01, None) > 0 for part in self._parts):
                self.model.geom_conaffinity[geom] = BODY_BIT | THING_BIT
                self._through.remove(geom)

    def _index(self) -> None:
        """Where in the model the parts of the body and the things lie."""
        model = self.model
        self._hinges = hinge_places(model)
        self._limits = model.actuator_trnid[:, 0]
        self._limits = tuple(model.jnt_range[self._limits].T)
        self._bodies = np.array([model.body(joint).id for joint in JOINTS])
        # The geom of a part of the body: number of its joint, and of its body in MuJoCo.
        self._parts = {int(model.body_geomadr[body]): (part, int(body)) for part, body in enumerate(self._bodies)}
        self._things = {model.geom(f"thing{number}").id: number for number in range(len(self.setting.things))}
        self._cameras = [model.camera(f"{side}_eye").id for side in SIDES]
        self._scratch, self._leading, self._stared, self._touched = mujoco.MjData(model), None, (None, 0), set()

    def _open_eyes(self) -> None:
        """OpenGL for all lives and tables: they differ in no mesh and no texture, which is all that it keeps."""
        try:
            self._renderer = mujoco.Renderer(self.model, self.eye, self.eye)
        except Exception as error:  # mujoco raises whatever its OpenGL library does
            raise UserError(NO_OPENGL.format(reason=first_line(error))) from error
        self._shown, self._view = mujoco.MjvOption(), mujoco.MjvCamera()
        self._view.type = mujoco.mjtCamera.mjCAMERA_FIXED
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._renderer.scene.flags[flag] = 0

    def _starting_pose(self) -> np.ndarray:
        """Angles [23, 3] of one who stands at the table, the hands on the edge of it, and looks down at it, about."""
        angles = np.zeros((len(HINGED), 3))
        for side in SIDES:
            angles = reach(self.model, side, self._resting_place(side), angles)
            angles[HINGED.index(f"{side}_knee"), 1] = 0.06
            angles[HINGED.index(f"{side}_hip"), 1] = -0.03
            angles[HINGED.index(f"{side}_ankle"), 1] = -0.03
        return angles

    def _resting_place(self, side: str) -> np.ndarray:
        """Where a hand rests: on the edge of the table, in every life, so that it is known where it belongs."""
        return np.array([0.27, 0.42 * SIDES[side], self.setting.table_height + 0.02])


def gaze_quaternion(gaze: np.ndarray) -> np.ndarray:
    """The rotation of a camera in the head that looks along a gaze (left, up, ahead), within the eyes' limits."""
    left, up = gaze[:2] / max(gaze[2], 1e-3)
    left, up = np.array((left, up)) * min(1.0, np.tan(GAZE_LIMIT) / max(np.hypot(left, up), 1e-9))
    yaw, pitch = np.arctan(left), np.arctan2(up, np.hypot(1, left))
    rotation = np.zeros(4)  # a camera that is not turned looks down, its head to the left
    mujoco.mju_euler2Quat(rotation, [yaw - np.pi / 2, 0, pitch + np.pi / 2], "zyx")
    return rotation
