"""PickCube-v1: grasp the cube from above and carry it to the goal."""

import numpy as np

from sb3_dsrl.experts.expert import CLOSED, OPEN, Expert, Goal, Style, level_axis, up

NEAR = 0.012  # m from the centre of the cube: the fingers may close
CARRY_HEIGHT = 0.05  # m: a cube that is carried sideways stays above this


class PickCube(Expert):
    """A style's ``along`` is the height of the grasp above the centre of the cube."""

    styles = (
        Style("direct"),
        Style("slow", speed=0.7),
        Style("high", height=0.05, along=0.006),
        Style("from the left", side=0.05),
        Style("from the right", side=-0.05, along=-0.004),
    )

    def goal(self) -> Goal:
        tcp, cube = self.tcp, self.base.cube.pose.sp
        if self.holds(self.base.cube):
            off = self.base.goal_site.pose.sp.p - cube.p
            sideways = float(np.hypot(off[0], off[1]))
            lowest = min(CARRY_HEIGHT, 2.0 * sideways) + self.style.height * min(1.0, 10 * sideways)
            off[2] = max(off[2], lowest - cube.p[2]) if lowest > 0.02 else off[2]
            return Goal(self.carried(off), CLOSED)
        grasp = self.grasp_from_above(cube.p + up(self.style.along), level_axis(cube), quarters=True)
        if np.linalg.norm(tcp.p - grasp.p) < NEAR:
            return Goal(grasp, CLOSED)
        return Goal(self.way_to(grasp, clearance=0.06), OPEN)
