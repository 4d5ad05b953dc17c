"""
SmolVLA, pi0 and pi0.5 with LeRobot's own code, a few thousand random weights and a tokenizer of a few words: no download.

What is not LeRobot's own here: pi0 and pi0.5 have fixed sizes and ask for a patched transformers, which PyPI does not have.
Their sizes are made small, and transformers as it is on PyPI is let pass. There a decoding step writes into the cache of the
prefix, so each gets a copy. And the action expert of pi0.5 does not hear of the time step, so that its chunks are not what the
real model would make of the same weights; how noise, features and sentence go through is the same.
"""

import sys
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch as th
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

STATE, TOP, WRIST = "observation.state", "observation.images.top", "observation.images.wrist"
A, D, SIDE, T, H = 2, 3, 32, 6, 4
WORDS = [
    "<pad>",
    "<unk>",
    "<eos>",
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "push",
    "the",
    "T",
    "Task:",
    "State:",
]


def tokenizer() -> PreTrainedTokenizerFast:
    """Knows the words above and the numbers that pi0.5 writes its state in."""
    vocabulary = {word: i for i, word in enumerate([*WORDS, *map(str, range(-1, 257))])}
    splitter = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    splitter.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(";", "isolated")])
    return PreTrainedTokenizerFast(
        tokenizer_object=splitter,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        extra_special_tokens=dict(
            image_token="<image>", fake_image_token="<fake_token_around_image>", global_image_token="<global-img>"
        ),
    )


def features() -> dict[str, Any]:
    """A state, two cameras and an action; and how they are normalised."""
    image = PolicyFeature(FeatureType.VISUAL, (3, SIDE, SIDE))
    return dict(
        input_features={STATE: PolicyFeature(FeatureType.STATE, (D,)), TOP: image, WRIST: image},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (A,))},
        normalization_mapping=dict(
            VISUAL=NormalizationMode.IDENTITY, STATE=NormalizationMode.MIN_MAX, ACTION=NormalizationMode.MIN_MAX
        ),
        chunk_size=T,
        n_action_steps=H,
        max_state_dim=8,
        device="cpu",
    )


def stats() -> dict[str, Any]:
    """Statistics of a dataset: states from 0 to 1, actions from -40 to 40."""
    return {
        STATE: dict(min=th.zeros(D), max=th.ones(D)),
        "action": dict(min=th.full((A,), -40.0), max=th.full((A,), 40.0)),
    }


def smolvla(folder: Path, **settings: Any) -> tuple[Any, Any]:
    """SmolVLA and its processors; the folder is for the backbone's files."""
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig
    from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

    text = dict(
        model_type="llama", hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, vocab_size=len(tokenizer()), pad_token_id=0,
    )  # fmt: skip
    vision = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=SIDE, patch_size=8
    )
    SmolVLMConfig(text_config=text, vision_config=vision, scale_factor=2, image_token_id=3).save_pretrained(folder)
    SmolVLMProcessor(SmolVLMImageProcessor(), tokenizer(), SmolVLMVideoProcessor()).save_pretrained(folder)
    th.manual_seed(0)
    config = SmolVLAConfig(
        **(features() | dict(max_action_dim=A, num_steps=5, resize_imgs_with_padding=(SIDE, SIDE)) | settings),
        vlm_model_name=str(folder),
        num_vlm_layers=2,
        expert_width_multiplier=0.5,
    )
    policy = SmolVLAPolicy(config).float().eval()
    return policy, make_pre_post_processors(config, dataset_stats=stats())


def pi(name: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[Any, Any]:
    """pi0 or pi0.5 ("pi05") and its processors."""
    import transformers
    from lerobot.policies.factory import make_policy_config, make_pre_post_processors
    from lerobot.policies.pi0 import modeling_pi0
    from lerobot.policies.pi05 import modeling_pi05

    module = dict(pi0=modeling_pi0, pi05=modeling_pi05)[name]
    check = ModuleType("transformers.models.siglip.check")
    check.check_whether_transformers_replace_is_installed_correctly = lambda: True  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, check.__name__, check)
    monkeypatch.setattr("transformers.models.siglip.check", check, raising=False)
    gemma = module.GemmaConfig(width=32, depth=2, mlp_dim=64, num_heads=2, num_kv_heads=1, head_dim=16)
    monkeypatch.setattr(module, "get_gemma_config", lambda variant: gemma)
    vision = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=8, projection_dim=2048)
    small = lambda: transformers.PaliGemmaConfig(vision_config=dict(model_type="siglip_vision_model", **vision))  # noqa: E731
    mapping = {"paligemma": small, "gemma": transformers.GemmaConfig}
    monkeypatch.setattr(module, "CONFIG_MAPPING", mapping)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: tokenizer())
    th.manual_seed(0)
    kwargs = features() | dict(max_action_dim=A, num_inference_steps=5, image_resolution=(SIDE, SIDE), dtype="float32")
    config = make_policy_config(name, **(kwargs | settings))
    policy = getattr(module, dict(pi0="PI0Policy", pi05="PI05Policy")[name])(config)
    denoise_step = policy.model.denoise_step
    policy.model.denoise_step = lambda **inputs: denoise_step(
        **(inputs | dict(past_key_values=deepcopy(inputs["past_key_values"])))
    )
    projector = policy.model.paligemma_with_expert.paligemma.model.multi_modal_projector
    projector.linear = nn.Linear(32, 32)  # LeRobot has its width written into the code
    return policy.eval(), make_pre_post_processors(config, dataset_stats=stats())
