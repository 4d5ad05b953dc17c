"""LiftPegUpright-v1: pinch the far end of the peg loosely and lift it; the peg turns between the fingers until it stands."""

import numpy as np
import sapien

from sb3_dsrl.experts.expert import OPEN, Expert, Goal, Style

NEAR = 0.012  # m from the grasp: the fingers may close
LOOSE = 0.0  # gripper action that lifts the peg, but lets it turn
STEEP = np.deg2rad(70)
FAR, LEAN = 0.1, 4.0  # beyond x = FAR the hand leans forward, by so many rad per m: the arm is too short to point down


class LiftPegUpright(Expert):
    """A style's ``along`` moves the grasp towards the end of the peg; its ``height`` is for the way there."""

    styles = (
        Style("direct"),
        Style("slow", speed=0.75),
        Style("high", height=0.05, along=0.005),
        Style("from the left", side=0.05),
        Style("from the right", side=-0.05, along=-0.003),
    )

    def goal(self) -> Goal:
        tcp, peg, half = self.tcp, self.base.peg.pose.sp, self.base.peg_half_length
        axes = peg.to_transformation_matrix()[:3, :3].T
        axis = axes[0] * np.sign(axes[0, 2] if abs(axes[0, 2]) > 0.1 else axes[0, 0])  # to the upper end, or to the far one
        tilt = float(np.arcsin(min(axis[2], 1.0)))
        at = half - 0.02 + self.style.along
        end = peg.p + at * axis
        # Of two sides the level one; when the peg stands, the one that the fingers are at.
        present = tcp.to_transformation_matrix()[:3, 1]
        closing = max((side for side in axes[1:] if abs(side[2]) < 0.7), key=lambda side: abs(side @ present))
        grasp = self.leaning(self.grasp_from_above(end, closing))
        if self.holds(self.base.peg):
            # Lifted straight up, it draws its foot along; in the end it is pushed over its foot.
            target = tcp.p + (peg.p - half * axis - end if tilt > STEEP else 0.0)
            target[2] = half + at
            return Goal(self.leaning(sapien.Pose(target, grasp.q)), LOOSE)
        if np.linalg.norm(tcp.p - grasp.p) < NEAR:
            return Goal(grasp, LOOSE)
        return Goal(self.way_to(grasp, clearance=0.05), OPEN)

    @staticmethod
    def leaning(pose: sapien.Pose) -> sapien.Pose:
        """A pose that points down, tilted forward where it is far away."""
        lean = LEAN * np.clip(pose.p[0] - FAR, 0.0, 0.1)
        return sapien.Pose(pose.p, [np.cos(lean / 2), 0.0, -np.sin(lean / 2), 0.0]) * sapien.Pose(q=pose.q)
