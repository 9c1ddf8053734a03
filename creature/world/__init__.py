"""The room: a simulated humanoid among objects, with six senses, and what records lives in it (docs/room.md)."""

import ctypes.util
import os
import sys

from creature.errors import UserError, first_line

NO_OPENGL = (
    "the eyes need OpenGL ({reason}): install libegl1 or libosmesa6 with the packages of the system, or set MUJOCO_GL "
    "to egl or osmesa, whichever is there"
)
if sys.platform == "linux" and not os.environ.get("MUJOCO_GL"):  # read when mujoco is imported
    os.environ["MUJOCO_GL"] = "egl" if ctypes.util.find_library("EGL") else "osmesa"
# Mesa's threads cost more than they do in pictures this small, and workers have a core each.
os.environ.setdefault("LP_NUM_THREADS", "0")
try:
    import mujoco  # noqa: F401
except ModuleNotFoundError as error:
    raise UserError(
        f"{error.name} is not installed: pip install -c constraints.txt -e '.[world]' brings what the room needs"
    ) from error
except (AttributeError, ImportError, RuntimeError) as error:  # of a library that is missing, or MUJOCO_GL is no name
    raise UserError(NO_OPENGL.format(reason=first_line(error))) from error
