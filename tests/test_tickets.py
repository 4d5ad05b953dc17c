"""Golden tickets: the search finds the best of its noises, counts what it used, and is the same for any number of envs."""

import numpy as np
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_dsrl import ActionChunkWrapper, LatentSteeringWrapper, VecLatentSteering, evaluate, find_ticket
from tests.toys import BanditEnv, linear_flow

TARGET = np.array([0.5, -0.3])


class NoisyBandit(BanditEnv):
    """The reward is the target's distance plus luck; success is decided by both."""

    def step(self, action: np.ndarray):
        obs, reward, *ends, _ = super().step(action)
        reward += 0.5 * self.np_random.standard_normal()
        return obs, reward, *ends, {"success": reward > -0.5}


def steered(n_envs: int, env_class: type = BanditEnv) -> VecEnv:
    return VecLatentSteering(DummyVecEnv([lambda: ActionChunkWrapper(env_class(TARGET), 1)] * n_envs), linear_flow())


@pytest.mark.parametrize("n_envs", [1, 4, 7])
def test_finds_the_nearest_noise(n_envs: int) -> None:
    ticket = find_ticket(steered(n_envs), rounds=((20, 2), (4, 3), (2, 1)), seed=5)
    noises = np.random.default_rng(5).standard_normal((20, 1, 2)).astype(np.float32)
    noises[0] = 0.0  # w = 0 is always among them
    distance = np.square(noises.clip(-1, 1) - TARGET).sum(axis=(1, 2))
    np.testing.assert_array_equal(ticket.w, noises[distance.argmin()])
    assert ticket.mean_return == pytest.approx(-distance.min(), abs=1e-5)
    assert ticket.episodes == 2 + 3 + 1
    assert ticket.tried.shape == (20,) and (np.diff(ticket.tried) <= 0).all()
    assert ticket.tried.sum() == (distance < 0.1).sum()
    played = 20 * 2 + 4 * 3 + 2 * 1
    assert played <= ticket.env_steps <= played + 3 * n_envs  # envs without a noise of their own idle along


def test_second_round_corrects_the_luck_of_the_first() -> None:
    env = steered(8, NoisyBandit)
    worth = []
    for rounds in (((32, 1),), ((32, 2), (8, 30))):
        tickets = [find_ticket(env, rounds=rounds, seed=seed).w for seed in range(5)]
        worth.append(np.mean([np.square(np.clip(w, -1, 1) - TARGET).sum() for w in tickets]))
    assert worth[1] < 0.5 * worth[0]


def test_the_mode_of_the_prior_is_tried() -> None:
    env = VecLatentSteering(DummyVecEnv([lambda: ActionChunkWrapper(BanditEnv(0.0 * TARGET), 1)] * 4), linear_flow())
    assert not find_ticket(env, rounds=((16, 1),)).w.any()
    assert find_ticket(env, rounds=((16, 1),), include_zero=False).w.all()


def test_gym_form_and_control() -> None:
    env = LatentSteeringWrapper(BanditEnv(TARGET), linear_flow())
    ticket = find_ticket(env, rounds=((8, 1),))
    assert evaluate(ticket.w, env, 3).mean_return == pytest.approx(ticket.mean_return, abs=1e-5)


def test_every_round_plays_other_episodes() -> None:
    env, seeds = steered(4), []
    seed = env.seed
    env.seed = lambda value: seeds.extend(range(value, value + 4)) or seed(value)  # type: ignore[method-assign]
    find_ticket(env, rounds=((300, 4), (30, 4)))
    assert len(set(seeds)) == len(seeds) == 1_320


def test_env_without_success() -> None:
    silent = BanditEnv(TARGET)
    silent.step = lambda action: (np.zeros(2, np.float32), 0.0, True, False, {})  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="holds no 'success_at_end' at the end of an episode"):
        find_ticket(LatentSteeringWrapper(silent, linear_flow()))


@pytest.mark.parametrize("rounds", [(), ((4, 2), (8, 2)), ((4, 0),), ((0, 3),)])
def test_refusals(rounds: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match=r"rounds must be \(noises, episodes\) with no more noises"):
        find_ticket(steered(2), rounds=rounds)
