"""StackCube-v1: put cube A on cube B and let go."""

import numpy as np
import sapien

from sb3_dsrl.experts.expert import CLOSED, OPEN, Expert, Goal, Style, level_axis, up

NEAR = 0.012  # m from the centre of the cube: the fingers may close
SIZE = 0.04  # m, of both cubes
OVER = 0.01  # m, sideways, within which a cube may be let go
ON = 0.004  # m, the same in height


class StackCube(Expert):
    """A style's ``along`` is the height of the grasp above the centre of the cube."""

    styles = (
        Style("direct"),
        Style("slow", speed=0.8),
        Style("high", height=0.03, along=0.006),
        Style("from the left", side=0.04),
        Style("from the right", side=-0.04, along=0.003),
    )

    def goal(self) -> Goal:
        tcp, cube, under = self.tcp, self.base.cubeA.pose.sp, self.base.cubeB.pose.sp
        off = under.p + up(SIZE) - cube.p
        sideways = float(np.hypot(off[0], off[1]))
        if self.holds(self.base.cubeA):
            if sideways < OVER and abs(off[2]) < ON:
                return Goal(tcp, OPEN)
            off[2] += np.clip(3.0 * (sideways - OVER / 2), 0.0, 0.03 + self.style.height)
            return Goal(sapien.Pose(tcp.p + off, tcp.q), CLOSED)
        if sideways < 2 * OVER and abs(off[2]) < 2 * ON:  # it lies where it should
            return Goal(sapien.Pose(tcp.p + up(0.03), tcp.q), OPEN)
        grasp = self.grasp_from_above(cube.p + up(self.style.along), level_axis(cube), quarters=True)
        if np.linalg.norm(tcp.p - grasp.p) < NEAR:
            return Goal(grasp, CLOSED)
        return Goal(self.way_to(grasp, clearance=0.06), OPEN)
