"""PegInsertionSide-v1: grasp the peg behind its middle, bring it in line with the hole, and push it in."""

import numpy as np
import sapien

from sb3_dsrl.experts.expert import CLOSED, OPEN, Expert, Goal, Style, up

NEAR = 0.012  # m from the grasp: the fingers may close
BEFORE = 0.005  # m between head and mouth of the hole while the peg is brought in line
IN_LINE = 0.003  # m that head and tail may be off the axis of the hole where it goes in
INSIDE = 0.015  # m behind the mouth: the hole guides the peg
FEEL, PUSH = 0.012, 0.03  # m that the peg is aimed at ahead of itself, into the mouth and elsewhere
DEEP = 0.005  # m past the middle of the box, which is where it succeeds


class PegInsertionSide(Expert):
    """A style's ``along`` moves the grasp towards the head of the peg."""

    styles = (
        Style("direct"),
        Style("slow", speed=0.7),
        Style("near the tail", along=-0.012),
        Style("high", height=0.06),
        Style("from the left", side=0.05),
    )

    def goal(self) -> Goal:
        tcp, peg = self.tcp, self.base.peg.pose.sp
        half = float(self.base.peg_half_sizes[0, 0])
        if not self.holds(self.base.peg):
            back = max(0.05, half / 2 + 0.01) - self.style.along
            axes = peg.to_transformation_matrix()[:3, :3]
            closing = np.cross([0.0, 0.0, 1.0], axes[:, 0])
            grasp = self.grasp_from_above(peg.p - back * axes[:, 0], closing)
            if np.linalg.norm(tcp.p - grasp.p) < NEAR:
                return Goal(grasp, CLOSED)
            return Goal(self.way_to(grasp, clearance=0.05), OPEN)

        hole = self.base.box_hole_pose.sp
        inside = hole.inv() * peg  # the peg in the axes of the hole, x is the way in
        matrix = inside.to_transformation_matrix()
        head, tail = matrix[:3, 3] + half * matrix[:3, 0], matrix[:3, 3] - half * matrix[:3, 0]
        off = max(float(np.linalg.norm(head[1:])), float(np.linalg.norm(tail[1:])))
        mouth = -half
        if head[0] > mouth + INSIDE:  # the hole guides it
            depth = min(head[0] + PUSH, DEEP)
        elif off < IN_LINE:
            depth = head[0] + FEEL
        else:  # the further off, the further before the mouth it waits
            depth = min(mouth - BEFORE - min(off, BEFORE), head[0] + PUSH)
        target = hole * sapien.Pose([depth - half, 0.0, 0.0], self.upright(inside))
        height = self.style.height * np.clip(5 * (off - 0.05), 0.0, 1.0)
        return Goal(sapien.Pose(up(height)) * target * peg.inv() * tcp, CLOSED)

    @staticmethod
    def upright(inside: sapien.Pose) -> np.ndarray:
        """The rotation of a peg in line with the hole: the peg is square, so that of four the nearest will do."""
        ways = [np.array([np.cos(a), np.sin(a), 0.0, 0.0]) for a in np.arange(4) * np.pi / 4]
        return max(ways, key=lambda q: abs(float(q @ inside.q)))
