"""The tree of a body out of its recorded motion, and the places of its joints out of rotations."""

import re

import numpy as np

POSES = 64  # of a life, from which the tree is found


def rotation_matrices(quaternions: np.ndarray) -> np.ndarray:
    """(w, x, y, z) [..., 4], of any length -> rotation matrices [..., 3, 3]."""
    quaternions = quaternions / np.maximum(np.linalg.norm(quaternions, axis=-1, keepdims=True), 1e-9)
    w, x, y, z = np.moveaxis(quaternions, -1, 0)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


class Skeleton:
    """
    The bones of a body: `parents` [joints], the root's is -1, and `offsets` [joints, 3] m in the frame of the parent.

    A recording has no tree, only places in the frame of the root and rotations in that of the parent. The parent of a
    joint is the earlier joint in whose turning frame the joint stays in its place; of several, the nearest one.

    Args:
        positions: [N, joints, 3] m. rotations: [N, joints, 4] quaternions (w, x, y, z), at the same moments. Parents
            come before children.
    """

    def __init__(self, positions: np.ndarray, rotations: np.ndarray):
        chosen = np.linspace(0, len(positions) - 1, min(len(positions), POSES)).astype(int)
        positions, turns = positions[chosen].astype(np.float64), rotation_matrices(rotations[chosen].astype(np.float64))
        joints = positions.shape[1]
        self.parents, self.offsets = np.full(joints, -1), np.zeros((joints, 3))
        frames = np.tile(np.eye(3), (len(chosen), joints, 1, 1))  # of the joints, in that of the root
        for joint in range(1, joints):
            away = positions[:, joint, None] - positions[:, :joint]  # [N, earlier, 3]
            inside = np.einsum("njba,njb->nja", frames[:, :joint], away)
            spread = np.linalg.norm(inside - inside.mean(axis=0), axis=-1).mean(axis=0)
            # A millimetre of wandering counts as much as 10 cm of bone.
            parent = int(np.argmin(spread + 0.01 * np.linalg.norm(inside.mean(axis=0), axis=-1)))
            self.parents[joint], self.offsets[joint] = parent, inside[:, parent].mean(axis=0)
            frames[:, joint] = frames[:, parent] @ turns[:, joint]

    @property
    def bones(self) -> list[tuple[int, int]]:
        return [(joint, int(parent)) for joint, parent in enumerate(self.parents) if parent >= 0]

    def places(self, rotations: np.ndarray) -> np.ndarray:
        """Rotations [joints, 4] -> the places of the joints [joints, 3] m in the frame of the root."""
        turns, places = rotation_matrices(np.asarray(rotations, np.float64)), np.zeros((len(rotations), 3))
        frames = np.tile(np.eye(3), (len(rotations), 1, 1))
        for joint, parent in self.bones:
            frames[joint] = frames[parent] @ turns[joint]
            places[joint] = places[parent] + frames[parent] @ self.offsets[joint]
        return places


def sight_from_behind(pose: np.ndarray, names: list[str]) -> np.ndarray:
    """
    [2, 3]: what is to the right and up for somebody behind a body.

    By the names of its joints, else the two axes along which it is longest. pose: [joints, 3].
    """
    bare = [name.rpartition(":")[2] for name in names][: len(pose)]

    def middle(pattern: str) -> np.ndarray | None:
        found = [place for name, place in zip(bare, pose, strict=False) if re.search(pattern, name)]
        return np.mean(found, axis=0) if found else None

    head, feet = middle("(?i)head"), middle("(?i)foot|ankle|toe")
    left, right = middle("^((?i:left)|[lL](?=[A-Z_]))"), middle("^((?i:right)|[rR](?=[A-Z_]))")
    if any(place is None for place in (head, feet, left, right)) or np.allclose(head, feet) or np.allclose(left, right):
        longest = np.argsort(-np.ptp(pose, axis=0), kind="stable")
        return np.eye(3)[[longest[1], longest[0]]]
    up = (head - feet) / np.linalg.norm(head - feet)
    across = (right - left) - (right - left) @ up * up
    return np.stack((across / max(np.linalg.norm(across), 1e-9), up))
