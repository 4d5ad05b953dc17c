"""
Starts along recorded episodes: training begins near their end, where success is near, and moves towards their beginning.

This is a reverse curriculum, as in RFCL (https://arxiv.org/abs/2405.03379). Each env has its own, so that nothing has to be
sent to worker processes and back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

#: Starts are spread over so much of an episode, from the place that the curriculum has reached on.
SPREAD = 0.1


class Recorded(NamedTuple):
    """
    A piece of a recorded episode, which is replayed before training begins: the simulator itself then knows of contacts,
    targets of controllers and earlier frames, which are in no state.

    :param state: what the env's ``set_sim_state`` takes after a reset, of before the first action
    :param actions: (n, A), in [-1, 1]
    :param elapsed_steps: env steps of the episode before the first action
    :param options: of the env's reset before that
    """

    state: Any
    actions: np.ndarray
    elapsed_steps: int
    options: dict[str, Any]


class RecordedStarts(ABC):
    """
    Recorded episodes that training can start from. :class:`~sb3_dsrl.DemoStarts` are those of demo files,
    :class:`StateStarts` what is in memory; a subclass with :meth:`read` brings others.

    An env with starts draws at each reset: with probability ``true_starts`` it starts as it would without, else from a
    recorded episode, at about the place that its curriculum has reached. After a success from such a place that moves
    ``step`` of an episode towards the beginning, after a failure ``step * target / (1 - target)`` towards the end, so that it
    stays where ``target`` of the episodes succeed (weighted up-down method, Kaernbach 1991). An episode's clock starts with
    the steps that were recorded before, so that the time limit is that of the whole episode.

    :param last_starts: of each recorded episode the last step to start from: the one whose action brought success, or its last
    :param where: they come from, for error messages
    :param true_starts: share of episodes that start as without recordings
    :param step: see above
    :param target: see above
    :param env_id: environment that they were recorded in; None if nobody knows
    :param control_mode: controller of their actions; None if there is none
    :raises ValueError: if there is no episode or an argument is out of range
    """

    def __init__(
        self,
        last_starts: Sequence[int],
        *,
        where: str = "recorded episodes",
        true_starts: float = 0.25,
        step: float = 0.05,
        target: float = 0.5,
        env_id: str | None = None,
        control_mode: str | None = None,
    ) -> None:
        if not len(last_starts):
            raise ValueError(f"{where}: there is no episode to start from")
        if not 0 <= true_starts < 1:
            raise ValueError(f"true_starts is a share and must lie in [0, 1), found {true_starts}")
        if not 0 < step <= 1:
            raise ValueError(f"step is a part of an episode and must lie in (0, 1], found {step}")
        if not 0 < target < 1:
            raise ValueError(f"target is a share of successes and must lie in (0, 1), found {target}")
        self.last_starts, self.where = list(last_starts), where
        self.true_starts, self.step, self.target = true_starts, step, target
        self.env_id, self.control_mode = env_id, control_mode

    @abstractmethod
    def read(self, episode: int, start: int, stop: int) -> Recorded:
        """
        :param episode: number of a recorded episode
        :param start: env step before which the state is wanted
        :param stop: env step before which the actions end
        """

    def check_env(self, env_id: str | None, control_mode: str | None) -> None:
        """
        :param env_id: of the env that should start from them; None if it has none
        :param control_mode: its controller; None if it has none
        :raises ValueError: if they were recorded in another one
        """
        for what, own, found in (("env", self.env_id, env_id), ("control_mode", self.control_mode, control_mode)):
            if None not in (own, found) and own != found:
                raise ValueError(f"{self.where} was recorded with {what} {own!r}, but episodes should start in {found!r}")


class StateStarts(RecordedStarts):
    """
    Recorded episodes in memory, for any env with ``get_sim_state`` and ``set_sim_state``.

    :param states: of each episode what the env's ``get_sim_state()`` returned before each action, and perhaps at the end
    :param actions: of each episode, (L, A), in [-1, 1]
    :param last_starts: see :class:`RecordedStarts`; None is the last action of each
    :param kwargs: further arguments of :class:`RecordedStarts`
    :raises ValueError: if states and actions do not fit each other
    """

    def __init__(
        self,
        states: Sequence[Sequence[Any]],
        actions: Sequence[np.ndarray],
        last_starts: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        lengths = [len(own) for own in actions]
        if len(states) != len(lengths) or any(len(own) < n for own, n in zip(states, lengths, strict=True)):
            raise ValueError(
                f"There must be a state for each of {lengths} actions, found {[len(own) for own in states]} states"
            )
        super().__init__([n - 1 for n in lengths] if last_starts is None else last_starts, **kwargs)
        self.states, self.actions = states, actions

    def read(self, episode: int, start: int, stop: int) -> Recorded:
        """See :meth:`RecordedStarts.read`."""
        return Recorded(self.states[episode][start], self.actions[episode][start:stop], start, {})


class StartCurriculum:
    """
    What one env starts from.

    :param starts: recorded episodes
    :param n_replayed: actions that are replayed before an episode begins
    :raises ValueError: if no episode is long enough
    """

    def __init__(self, starts: RecordedStarts, n_replayed: int) -> None:
        self.starts, self.n_replayed = starts, n_replayed
        self._long_enough = [i for i, last in enumerate(starts.last_starts) if last >= n_replayed]
        if not self._long_enough:
            raise ValueError(
                f"{starts.where}: no episode has a step to start from after the {n_replayed} that are replayed (obs_horizon)"
            )
        self._rng = np.random.default_rng()
        #: how far from the end starts are, as a part of an episode: 1 is its beginning
        self.progress = 0.0
        self.on = True
        self._counts = False

    def seed(self, seed: int) -> None:
        """
        :param seed: of the env; which starts follow depends on nothing else
        """
        self._rng = np.random.default_rng([seed, 1])  # not the numbers that the env draws from the same seed

    def draw(self) -> Recorded | None:
        """
        :return: what the next episode starts from; None is a true start
        """
        rng, starts = self._rng, self.starts
        self._counts = False
        if not self.on or rng.random() < starts.true_starts:
            return None
        episode = self._long_enough[rng.integers(len(self._long_enough))]
        place = max(0.0, self.progress - SPREAD * rng.random())
        span = starts.last_starts[episode] - self.n_replayed
        stop = self.n_replayed + round((1 - place) * span)
        self._counts = True
        return starts.read(episode, stop - self.n_replayed, stop)

    def record(self, success: bool | None) -> None:
        """
        Moves on after an episode. True starts do not count.

        :param success: None if the env reports none
        :raises ValueError: if it reports none
        """
        if not self._counts:
            return
        self._counts = False
        if success is None:
            raise ValueError(
                f"{self.starts.where}: starts move as success allows, but the env reports none: it needs 'success' or "
                f"'is_success' in its info"
            )
        target = self.starts.target
        move = self.starts.step if success else -self.starts.step * target / (1 - target)
        self.progress = min(1.0, max(0.0, self.progress + move))
