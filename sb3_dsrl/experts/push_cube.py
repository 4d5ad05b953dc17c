"""PushCube-v1: push the cube forward into the goal region."""

import numpy as np
import sapien

from sb3_dsrl.experts.expert import CLOSED, Expert, Goal, Style

BEHIND = 0.035  # m from the centre of the cube to the closed fingers that push it
AHEAD = 0.03  # m that the fingers aim at ahead of themselves; less in the end, or the cube would slide on


class PushCube(Expert):
    """A style's ``along`` is how far beyond the edge of the goal region the cube is pushed, up to its centre at 0.1."""

    styles = (
        Style("direct", along=0.06),
        Style("slow", along=0.06, speed=0.8),
        Style("high", along=0.09, height=0.05),
        Style("from the left", along=0.06, side=0.06),
        Style("from the right", along=0.03, side=-0.06),
    )

    def goal(self) -> Goal:
        tcp, cube, region = self.tcp, self.base.obj.pose.sp.p, self.base.goal_region.pose.sp.p
        closing = np.array([0.0, 1.0, 0.0])
        off = region[:2] - cube[:2]
        distance = float(np.linalg.norm(off))
        left = distance - (self.base.goal_radius - self.style.along)
        if left < 0:  # far enough
            return Goal(sapien.Pose(tcp.p - np.array([0.02, 0.0, 0.0]), tcp.q), CLOSED)
        forward = np.append(off / distance, 0.0)
        start = cube - BEHIND * forward
        gap = start - tcp.p
        aside = gap - (gap @ forward) * forward
        grasp = self.grasp_from_above(start, closing)
        if np.linalg.norm(aside) < 0.015 and gap @ forward < 0.02:  # in line, and close behind it
            return Goal(sapien.Pose(tcp.p + aside + min(AHEAD, 0.01 + 0.3 * left) * forward, grasp.q), CLOSED)
        return Goal(self.way_to(grasp, clearance=0.05, tolerance=0.02), CLOSED)
