"""A budget of env steps, from which everything that is played is paid."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn
from tqdm import tqdm

from sb3_dsrl.evaluation.play import count_env_steps


class StepBudget:
    """
    Counts the env steps of all envs that it watches, by what they were for, with one progress bar over all of it.

    :param total: env steps
    :param progress_bar: show the bar
    """

    def __init__(self, total: int, progress_bar: bool = False) -> None:
        self.total = total
        #: env steps of each part so far
        self.spent: dict[str, int] = {}
        self._bar = tqdm(total=total, unit=" env steps", disable=not progress_bar)
        self._part = ""

    @property
    def left(self) -> int:
        """Env steps that are not spent."""
        return self.total - sum(self.spent.values())

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """
        :param name: of what is played in the block
        """
        self._part = name
        self.spent.setdefault(name, 0)
        self._bar.set_description(name)
        yield

    def watch(self, venv: VecEnv) -> VecEnv:
        """
        :param venv: steered envs
        :return: the same envs, whose steps are counted
        """
        return _Counted(venv, self)

    def count(self, env_steps: int) -> None:
        """
        :param env_steps: that were made for the present part
        """
        self.spent[self._part] += env_steps
        self._bar.update(env_steps)

    def close(self) -> None:
        """Ends the progress bar."""
        self._bar.close()


class _Counted(VecEnvWrapper):
    def __init__(self, venv: VecEnv, budget: StepBudget) -> None:
        super().__init__(venv)
        self._budget = budget

    def reset(self) -> VecEnvObs:
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        obs, rewards, dones, infos = self.venv.step_wait()
        self._budget.count(count_env_steps(infos))
        return obs, rewards, dones, infos
