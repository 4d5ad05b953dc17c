"""Where episodes of PegInsertionSide-v1 end: how many lift the peg, align it with the hole, enter it, and insert the peg.

python examples/peg_phases.py --awsc_checkpoint runs/PegInsertionSide-v1/flow
python examples/peg_phases.py --policy runs/PegInsertionSide-v1/policy
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import pandas as pd
from mani_skill.utils.wrappers import CPUGymWrapper

from sb3_dsrl import LatentSteeringWrapper, SteeredPolicy
from sb3_dsrl.cli.common import EVAL_SEED, cli, steering_of
from sb3_dsrl.envs.maniskill import maniskill_kwargs
from sb3_dsrl.evaluation.play import Actor, play
from sb3_dsrl.policies.loading import resolve_flow

ENV_ID = "PegInsertionSide-v1"

#: In the order in which an episode goes through them. Lengths in metres.
PHASES = ("lifted", "aligned", "entered", "inserted")
LIFTED, ALIGNED, BEFORE_MOUTH = 0.02, 0.01, 0.02


@dataclass
class Args:
    """Phases that the episodes of a flow, or of a steered policy, reach."""

    awsc_checkpoint: Path | None = None
    """A flow: w ~ N(0, I) and w = 0 are played."""
    policy: Path | None = None
    """A steered policy, flow and all, which is played beside the same two controls."""
    episodes: int = 100
    """Episodes of each."""
    output: Path | None = None
    """A .json file for the table."""


class Phases(gym.Wrapper):
    """``info["phases"]`` says which phases the episode has reached so far."""

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Starts an episode."""
        self._reached = dict.fromkeys(PHASES, False)
        return self.env.reset(**kwargs)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Looks where the peg's head is in the frame of the hole, whose axis is x."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        base: Any = self.env.unwrapped
        half_length, half_width = base.peg_half_sizes[0, :2].tolist()
        x, y, z = (base.box_hole_pose.inv() * base.peg_head_pose).p[0].tolist()
        at_mouth = x > -half_length - BEFORE_MOUTH
        inside = max(abs(y), abs(z)) <= float(base.box_hole_radii[0])
        now = {
            "lifted": float(base.peg.pose.p[0, 2]) > half_width + LIFTED,
            "aligned": at_mouth and (y**2 + z**2) ** 0.5 < ALIGNED,
            "entered": x > -half_length and inside,
            "inserted": bool(info["success"]),
        }
        self._reached = {name: self._reached[name] or now[name] for name in PHASES}
        return obs, reward, terminated, truncated, dict(info, phases=self._reached)


def reached(actor: Actor, env: gym.Env, episodes: int, name: str) -> dict[str, float]:
    """
    :param actor: what is played
    :param env: steered, around :class:`Phases`
    :param episodes: in all
    :param name: shown beside the bar
    :return: share of the episodes that reach each phase, and ``success_at_end``
    """
    ends = [
        step.infos[0]
        for step in play(actor, env, episodes, EVAL_SEED, progress_bar=True, name=name)
        if step.counts[0] and step.dones[0]
    ]
    shares = {phase: sum(info["phases"][phase] for info in ends) / len(ends) for phase in PHASES}
    return shares | {"success_at_end": sum(info["success_at_end"] for info in ends) / len(ends)}


def main(args: Args) -> None:
    """Prints the table."""
    if (args.awsc_checkpoint is None) == (args.policy is None):
        raise ValueError("Pass --awsc_checkpoint or --policy, one of the two")
    steered = None if args.policy is None else SteeredPolicy.from_pretrained(args.policy)
    flow = steered.flow if steered is not None else resolve_flow(str(args.awsc_checkpoint))
    kwargs = maniskill_kwargs(ENV_ID, flow.obs_mode, control_mode=flow.control_mode, reward_mode="sparse")
    below = Phases(CPUGymWrapper(gym.make(ENV_ID, **kwargs)))
    settings = {} if steered is None else steering_of(steered)
    env = LatentSteeringWrapper(below, flow, ignore_terminations=True, **settings)
    actors: dict[str, Actor] = {"prior": "prior", "zero": "zero"}
    if steered is not None:
        actors["policy"] = steered
    table = {name: reached(actor, env, args.episodes, name) for name, actor in actors.items()}
    env.close()
    print(pd.DataFrame(table).T.to_markdown(floatfmt=".2f"))
    if args.output is not None:
        args.output.write_text(json.dumps(dict(env_id=ENV_ID, episodes=args.episodes, rows=table), indent=2) + "\n")


if __name__ == "__main__":
    cli(main, Args)
