"""Golden tickets: the search finds the best of its noises from the same starts, and counts what it used."""

import zlib

import numpy as np
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_dsrl import ActionChunkWrapper, LatentSteeringWrapper, VecLatentSteering, evaluate, find_ticket
from tests.envs import FORMS, ScriptedEnv, tiny_flow
from tests.toys import BanditEnv, linear_flow

TARGET = np.array([0.5, -0.3])


class NoisyBandit(BanditEnv):
    """The reward is the target's distance plus luck, another one for every noise; success is decided by both."""

    def step(self, action: np.ndarray):
        obs, reward, *ends, _ = super().step(action)
        luck = np.random.default_rng([int(self.np_random.integers(2**31)), zlib.crc32(action.tobytes())])
        reward += 0.3 * luck.standard_normal()
        return obs, reward, *ends, {"success": reward > -0.3}


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
    macro_steps = sum(n * -(-episodes // n_envs) for n, episodes in ((20, 2), (4, 3), (2, 1)))
    assert ticket.env_steps == macro_steps * n_envs  # envs that have played their quota idle along


def test_second_round_corrects_the_luck_of_the_first() -> None:
    env = steered(8, NoisyBandit)
    worth = []
    for rounds in (((32, 1),), ((32, 2), (8, 30))):
        tickets = [find_ticket(env, rounds=rounds, seed=seed).w for seed in range(12)]
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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n_envs", [2, 3])  # 4 episodes: no env idles, or two of them do
def test_all_noises_of_a_round_play_the_same_starts(form: str, n_envs: int) -> None:
    raw = [ScriptedEnv(episode_lengths=(4, 9, 2), random_start=True) for _ in range(n_envs)]
    env = FORMS[form](tiny_flow(), raw)
    began: list[list[int]] = []
    seed = env.seed

    def noted(value: int | None = None):  # every noise begins with the seed
        began.append([len(each.starts) for each in raw])
        return seed(value)

    env.seed = noted  # type: ignore[method-assign]
    ticket = find_ticket(env, rounds=((5, 4), (2, 4)))
    assert len(began) == 5 + 2
    quotas = [4 // n_envs + (i < 4 % n_envs) for i in range(n_envs)]
    played = [[each.starts[k : k + q] for each, k, q in zip(raw, at, quotas, strict=True)] for at in began]
    assert all(starts == played[0] for starts in played[:5]) and all(starts == played[5] for starts in played[5:])
    of_rounds = [[x for starts in played[k] for x in starts] for k in (0, 5)]
    assert len(set(of_rounds[0] + of_rounds[1])) == 2 * 4  # other starts in the next round
    assert ticket.env_steps == sum(len(each.rewards) for each in raw)


def test_luck_of_the_start_chooses_no_noise() -> None:
    """The start alone decides: all noises are equally good, and the mean return, which is the noise's own, decides."""

    class Lottery(BanditEnv):
        def step(self, action: np.ndarray):
            obs, reward, *ends, _ = super().step(action)
            return obs, reward, *ends, {"success": self.wins}

        def reset(self, **kwargs):
            result = super().reset(**kwargs)
            self.wins = bool(self.np_random.uniform() < 0.5)
            return result

    ticket = find_ticket(steered(4, Lottery), rounds=((16, 4),), seed=2)
    noises = np.random.default_rng(2).standard_normal((16, 1, 2)).astype(np.float32)
    noises[0] = 0.0
    nearest = np.square(noises.clip(-1, 1) - TARGET).sum(axis=(1, 2)).argmin()
    np.testing.assert_array_equal(ticket.w, noises[nearest])
    assert ticket.first_round.shape == (16, 4) and (ticket.first_round == ticket.first_round[0]).all()


def test_rounds_play_other_episodes_with_many_envs() -> None:
    env, seeds = steered(1_100), []
    seed = env.seed
    env.seed = lambda value: seeds.append(value) or seed(value)  # type: ignore[method-assign]
    find_ticket(env, rounds=((1, 1), (1, 1)))
    assert seeds[1] - seeds[0] >= 1_100  # env i gets the seed plus i


def test_env_without_success() -> None:
    silent = BanditEnv(TARGET)
    silent.step = lambda action: (np.zeros(2, np.float32), 0.0, True, False, {})  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="find_ticket needs to know success, but the env's info holds no 'is_success'"):
        find_ticket(LatentSteeringWrapper(silent, linear_flow()))
    with pytest.raises(ValueError, match="is not steered"):
        find_ticket(BanditEnv(TARGET))


@pytest.mark.parametrize("rounds", [(), ((4, 2), (8, 2)), ((4, 0),), ((0, 3),)])
def test_refusals(rounds: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match=r"rounds must be \(noises, episodes\) with no more noises"):
        find_ticket(steered(2), rounds=rounds)
