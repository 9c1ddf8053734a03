"""The humanoid: 24 joints with the names and the tree of SMPL (Loper et al. 2015), capsules, position servos.

x points ahead, y to the left, z up. At rest, when no joint is rotated, it stands upright with its arms stretched to the
sides. Every joint but the pelvis is three hinges at one place, around x, y and z in this order. The pelvis is held
upright and slides up and down, so that the feet carry the weight.
"""

import mujoco
import numpy as np

SIDES = {"left": 1.0, "right": -1.0}  # the sign of y
PELVIS_HEIGHT = 0.94
# Joint: its parent, and its place in the frame of the parent, m; y is that of the left one.
_TREE = {
    "pelvis": (None, (0, 0, PELVIS_HEIGHT)),
    "left_hip": ("pelvis", (0, 0.09, -0.05)),
    "right_hip": ("pelvis", (0, 0.09, -0.05)),
    "spine1": ("pelvis", (0, 0, 0.10)),
    "left_knee": ("left_hip", (0, 0, -0.40)),
    "right_knee": ("right_hip", (0, 0, -0.40)),
    "spine2": ("spine1", (0, 0, 0.13)),
    "left_ankle": ("left_knee", (0, 0, -0.42)),
    "right_ankle": ("right_knee", (0, 0, -0.42)),
    "spine3": ("spine2", (0, 0, 0.08)),
    "left_foot": ("left_ankle", (0.12, 0, -0.04)),
    "right_foot": ("right_ankle", (0.12, 0, -0.04)),
    "neck": ("spine3", (0, 0, 0.22)),
    "left_collar": ("spine3", (0, 0.06, 0.14)),
    "right_collar": ("spine3", (0, 0.06, 0.14)),
    "head": ("neck", (0.01, 0, 0.10)),
    "left_shoulder": ("left_collar", (0, 0.11, 0.03)),
    "right_shoulder": ("right_collar", (0, 0.11, 0.03)),
    "left_elbow": ("left_shoulder", (0, 0.27, 0)),
    "right_elbow": ("right_shoulder", (0, 0.27, 0)),
    "left_wrist": ("left_elbow", (0, 0.25, 0)),
    "right_wrist": ("right_elbow", (0, 0.25, 0)),
    "left_hand": ("left_wrist", (0, 0.08, 0)),
    "right_hand": ("right_wrist", (0, 0.08, 0)),
}
JOINTS = list(_TREE)
HINGED = JOINTS[1:]  # all but the pelvis
# Kind of joint: capsule (from, to, radius), stiffness of its servos N m, mass kg, range of x, y, z in rad.
_PARTS = {
    "pelvis": ((0, -0.07, 0), (0, 0.07, 0), 0.10, 0, 9.0, None),
    "hip": ((0, 0, 0), (0, 0, -0.38), 0.065, 900, 7.5, (0.6, 1.8, 0.8)),
    "knee": ((0, 0, 0), (0, 0, -0.40), 0.048, 900, 3.5, (0.1, 2.3, 0.3)),
    "ankle": ((-0.03, 0, -0.04), (0.10, 0, -0.04), 0.03, 500, 0.8, (0.4, 0.7, 0.3)),
    "foot": ((0, 0, 0), (0.06, 0, 0), 0.03, 200, 0.2, (0.2, 0.6, 0.2)),
    "spine1": ((0, -0.06, 0.04), (0, 0.06, 0.04), 0.10, 2000, 6.0, (0.3, 0.6, 0.4)),
    "spine2": ((0, -0.06, 0.04), (0, 0.06, 0.04), 0.10, 2000, 6.0, (0.3, 0.6, 0.4)),
    "spine3": ((0, -0.07, 0.06), (0, 0.07, 0.06), 0.105, 2000, 8.0, (0.3, 0.5, 0.4)),
    "neck": ((0, 0, 0), (0, 0, 0.05), 0.05, 300, 1.0, (0.5, 0.9, 0.8)),
    "head": ((0.02, 0, 0.06), (0.02, 0, 0.12), 0.085, 300, 4.0, (0.5, 0.9, 0.8)),
    "collar": ((0, 0.02, 0), (0, 0.09, 0.02), 0.05, 1500, 1.0, (0.4, 0.3, 0.5)),
    "shoulder": ((0, 0, 0), (0, 0.25, 0), 0.042, 1200, 2.0, (1.8, 1.5, 2.2)),
    "elbow": ((0, 0, 0), (0, 0.23, 0), 0.035, 700, 1.2, (1.5, 1.5, 2.6)),
    "wrist": ((0, 0.01, 0), (0, 0.06, 0), 0.033, 200, 0.3, (1.0, 1.0, 1.0)),
    "hand": ((0, 0.01, 0), (0, 0.07, 0), 0.025, 100, 0.2, (1.2, 0.3, 0.5)),
}
PARENTS = [JOINTS.index(parent) if parent else -1 for parent, _ in _TREE.values()]
ARM = ("shoulder", "elbow")  # what a reach moves
EYES = {"left": (0.10, 0.032, 0.10), "right": (0.10, -0.032, 0.10)}  # place in the head
TOUCHING = (0, 0.05, 0)  # the point of a hand that a reach brings to its goal, of the left hand
# Who touches whom, as MuJoCo's bits: things touch every part, hands touch the trunk and the legs as well.
BODY_BIT, THING_BIT, HAND_BIT = 1, 2, 4
ARMATURE, DAMPING_RATIO = 0.02, 1.0


def kind_of(joint: str) -> str:
    return joint.removeprefix("left_").removeprefix("right_")


def _mirrored(joint: str, place: tuple) -> tuple:
    return (place[0], -place[1], place[2]) if joint.startswith("right_") else place


def body_xml(skin: tuple, field_of_view: float) -> tuple[str, str]:
    """(the <body> of the humanoid, its <actuator> entries) in MuJoCo's format."""

    def element(joint: str) -> str:
        start, end, radius, stiffness, mass, limits = _PARTS[kind_of(joint)]
        text = lambda numbers: " ".join(f"{number:.5g}" for number in numbers)  # noqa: E731
        lines = [f'<body name="{joint}" pos="{text(_mirrored(joint, _TREE[joint][1]))}" gravcomp="{_carried(joint)}">']
        if joint == "pelvis":
            lines.append('<joint name="pelvis_z" type="slide" axis="0 0 1" damping="400"/>')
        else:
            for axis, limit in zip("xyz", limits, strict=True):
                vector = text([axis == one for one in "xyz"])
                name = f"{joint}_{axis}"
                lines.append(
                    f'<joint name="{name}" axis="{vector}" range="{-limit} {limit}" armature="{ARMATURE}" '
                    f'damping="{0.01 * stiffness:.5g}"/>'
                )
        hand = kind_of(joint) in ("hand", "wrist")
        arm = kind_of(joint) in ("hand", "wrist", "elbow", "shoulder", "collar", "ankle", "foot")
        bits = (BODY_BIT | HAND_BIT if hand else BODY_BIT, 0 if arm else HAND_BIT)
        ends = text((*_mirrored(joint, start), *_mirrored(joint, end)))
        lines.append(
            f'<geom type="capsule" fromto="{ends}" size="{radius}" mass="{mass}" rgba="{text(skin)} 1" '
            f'contype="{bits[0]}" conaffinity="{bits[1]}" friction="0.6 0.005 0.0001"/>'
        )
        if joint == "head":
            for side, place in EYES.items():
                lines.append(f'<camera name="{side}_eye" pos="{text(place)}" fovy="{field_of_view}"/>')
        if kind_of(joint) == "hand":
            lines.append(f'<site name="{joint}" pos="{text(_mirrored(joint, TOUCHING))}" size="0.005" group="5"/>')
        lines += [element(child) for child, (parent, _) in _TREE.items() if parent == joint]
        return "\n".join([*lines, "</body>"])

    servos = [
        f'<position name="{joint}_{axis}" joint="{joint}_{axis}" kp="{_PARTS[kind_of(joint)][3]}" '
        f'dampratio="{DAMPING_RATIO}"/>'
        for joint in HINGED
        for axis in "xyz"
    ]
    return element("pelvis"), "\n".join(servos)


def _carried(joint: str) -> int:
    """Whether the weight of a part is carried by a force of its own; that of the legs and the pelvis is on the feet."""
    return int(kind_of(joint) in ("neck", "head", "collar", "shoulder", "elbow", "wrist", "hand"))


# ---------------------------------------------------------------------------------------------------------------------
# Rotations: unit quaternions (w, x, y, z), and the angles of three hinges
# ---------------------------------------------------------------------------------------------------------------------


def quaternions_of(angles: np.ndarray) -> np.ndarray:
    """Angles [..., 23, 3] of the hinges x, y, z -> rotations of the 24 joints [..., 24, 4], the pelvis upright."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles.T / 2), np.sin(angles.T / 2)
    w = cx * cy * cz - sx * sy * sz
    x, y, z = sx * cy * cz + cx * sy * sz, cx * sy * cz - sx * cy * sz, cx * cy * sz + sx * sy * cz
    found = np.zeros((*angles.shape[:-2], len(JOINTS), 4))
    found[..., 0, 0] = 1
    found[..., 1:, :] = (np.copysign(1, w) * (w, x, y, z)).T
    return found


def angles_of(rotations: np.ndarray) -> np.ndarray:
    """The inverse: rotations [..., 24, 4] of any length -> angles of the hinges [..., 23, 3]."""
    w, x, y, z = (rotations.T / np.maximum(np.sqrt(np.square(rotations).sum(-1)), 1e-9).T)[:, 1:]
    turned = (
        np.arctan2(2 * (w * x - y * z), 1 - 2 * (x * x + y * y)),
        np.arcsin(np.clip(2 * (x * z + w * y), -1, 1)),
        np.arctan2(2 * (w * z - x * y), 1 - 2 * (y * y + z * z)),
    )
    return np.array(turned).T


def reach(model: mujoco.MjModel, side: str, point: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """
    Angles [23, 3] like the given ones, with the arm of a side such that its hand is at a point, as near as it can.

    Damped least squares from a bent arm (Wampler 1986), which keeps the elbow outside and low.
    """
    data = mujoco.MjData(model)
    angles, sign = angles.copy(), SIDES[side]
    rows = [HINGED.index(f"{side}_{kind}") for kind in ARM]
    bent = np.array([[-1.1 * sign, 0, -0.5 * sign], [0, 0, -1.2 * sign]])
    angles[rows] = bent
    places = np.array([model.joint(f"{side}_{kind}_{axis}").qposadr[0] for kind in ARM for axis in "xyz"])
    columns = np.array([model.joint(f"{side}_{kind}_{axis}").dofadr[0] for kind in ARM for axis in "xyz"])
    limits = model.jnt_range[[model.joint(f"{side}_{kind}_{axis}").id for kind in ARM for axis in "xyz"]]
    site, jacobian = model.site(f"{side}_hand").id, np.zeros((3, model.nv))
    data.qpos[:] = model.qpos0
    data.qpos[hinge_places(model)] = angles.reshape(-1)
    weights = np.array([1, 0.3, 1, 0.05, 0.05, 1.0])  # the elbow is all but a hinge
    for _ in range(60):
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        error = point - data.site_xpos[site]
        if np.linalg.norm(error) < 1e-3:
            break
        mujoco.mj_jacSite(model, data, jacobian, None, site)
        part = jacobian[:, columns] * weights
        step = weights * (part.T @ np.linalg.solve(part @ part.T + 1e-3 * np.eye(3), np.clip(error, -0.15, 0.15)))
        home = 0.02 * (bent.reshape(-1) - data.qpos[places])
        data.qpos[places] = np.clip(data.qpos[places] + step + home * (np.linalg.norm(error) > 0.02), *limits.T)
    angles[rows] = data.qpos[places].reshape(len(ARM), 3)
    return angles


def hinge_places(model: mujoco.MjModel) -> np.ndarray:
    """int [69]: where in qpos the angles of the hinges lie, joint by joint."""
    return np.array([model.joint(f"{joint}_{axis}").qposadr[0] for joint in HINGED for axis in "xyz"])
