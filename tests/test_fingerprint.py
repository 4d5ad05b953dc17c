"""The hash that tells policies apart: any type of weights, no weights at all, and no work twice."""

import copy
from typing import Any

import numpy as np
import pytest
import torch as th

from sb3_dsrl.policies import base
from tests.envs import tiny_flow
from tests.test_base import NumpyPolicy

#: of known_flow, as the first version of the hash had it
KNOWN = "d650157a1302393f"


def known_flow() -> Any:
    flow = tiny_flow(normalize_actions=False)  # as all flows were then
    for value in flow.state_dict().values():
        value.copy_((th.arange(value.numel()) % 97 / 64).reshape(value.shape))
    return flow


def test_float32_fingerprints_stay_what_they_were() -> None:
    assert known_flow().fingerprint() == KNOWN


def test_weights_in_bfloat16() -> None:
    flow = known_flow().to(th.bfloat16)
    found = flow.fingerprint()
    assert found != KNOWN and copy.deepcopy(flow).fingerprint() == found
    with th.no_grad():
        flow.net.inlet.weight[0, 0] += 1
    assert flow.fingerprint() != found


def test_weights_are_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(base, "digest", lambda *args: calls.append(args) or str(len(calls)))
    flow = tiny_flow()
    assert [flow.fingerprint() for _ in range(3)] == ["1"] * 3
    flow.net.inlet.bias.data = 2 * flow.net.inlet.bias.data
    assert flow.fingerprint() == "2"
    flow.load_state_dict(tiny_flow(seed=1).state_dict(), assign=True)
    assert flow.fingerprint() == "3"
    flow.act_horizon = 2
    assert [flow.fingerprint() for _ in range(2)] == ["4"] * 2
    with th.inference_mode():
        assert tiny_flow(seed=2).fingerprint() == "5"


@pytest.mark.parametrize(
    "change",
    [
        lambda flow: flow.half().float(),  # the rounded weights may lie where the old ones were
        lambda flow: th.optim.AdamW(flow.net.parameters(), lr=1e-3).step(),
        lambda flow: flow.encoder.fit(th.randn(9, 3)),
    ],
    ids=["half and back", "optimizer", "statistics"],
)
def test_changed_weights_have_another_fingerprint(change: Any) -> None:
    flow = tiny_flow().requires_grad_(True)
    before = flow.fingerprint()
    for parameter in flow.parameters():
        parameter.grad = th.ones_like(parameter)
    change(flow)
    assert flow.fingerprint() != before
    assert copy.deepcopy(flow).fingerprint() == flow.fingerprint()


def test_policies_without_weights_are_told_apart_by_what_they_do() -> None:
    th.manual_seed(0)
    before = th.get_rng_state()
    half, other = NumpyPolicy(0.5).fingerprint(), NumpyPolicy(0.6).fingerprint()
    assert half != other and NumpyPolicy(0.5).fingerprint() == half
    assert th.equal(th.get_rng_state(), before)

    class Renamed(NumpyPolicy):
        pass

    class SeesMore(NumpyPolicy):
        def encode(self, obs: Any) -> Any:
            return 2 * super().encode(obs)

    assert len({half, Renamed(0.5).fingerprint(), SeesMore(0.5).fingerprint(), NumpyPolicy(act_horizon=2).fingerprint()}) == 4
    policy = NumpyPolicy(0.5)
    assert policy.fingerprint() == half
    policy.gain = 0.6
    assert policy.fingerprint() == other


def test_policy_without_weights_gets_images_as_bytes() -> None:
    seen: dict[str, Any] = {}

    class Camera(NumpyPolicy):
        def encode(self, obs: Any) -> Any:
            seen.update(obs)
            return np.zeros((len(obs["state"]), 6), np.float32)

    Camera(obs_shapes={"state": (3,), "rgb": (4, 5, 3)}).fingerprint()
    assert seen["rgb"].shape == (2, 2, 4, 5, 3) and seen["rgb"].dtype == th.uint8 and seen["state"].shape == (2, 2, 3)


@pytest.mark.parametrize("part", ["encode", "decode"])
def test_policy_that_fails_on_the_probe_is_named(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("no model server")

    monkeypatch.setattr(NumpyPolicy, part, fail)
    with pytest.raises(ValueError, match=rf"without weights .* its {part} failed on random input of shape .*no model server"):
        NumpyPolicy().fingerprint()
