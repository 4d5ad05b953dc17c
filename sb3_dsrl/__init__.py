"""Latent steering of frozen flow policies with Stable-Baselines3."""

from typing import TYPE_CHECKING, Any

from sb3_contrib import TRPO
from stable_baselines3 import A2C, PPO

from sb3_dsrl.best_of import BestOfM
from sb3_dsrl.callbacks import SuccessEvalCallback
from sb3_dsrl.checkpoint import TrainingCheckpoint
from sb3_dsrl.defaults import ppo_kwargs
from sb3_dsrl.demos import load_demos
from sb3_dsrl.encoders import ImageEncoder, StateEncoder
from sb3_dsrl.evaluation import EvalResult, Rollouts, collect_rollouts, evaluate, results_table
from sb3_dsrl.features import demo_transitions
from sb3_dsrl.flow import FlowPolicy
from sb3_dsrl.gate import Gate
from sb3_dsrl.legacy import load_awsc_checkpoint
from sb3_dsrl.networks import EnsembleChunkCritic, VelocityMLP, VelocityUNet
from sb3_dsrl.noise_policy import NoisePolicy
from sb3_dsrl.offline import train_critic, train_flow
from sb3_dsrl.policies import LatentPolicy
from sb3_dsrl.pretrain import aw_mle_loss, pretrain_latent
from sb3_dsrl.resuming import ResumeCallback, resume
from sb3_dsrl.steerability import SteerabilityReport, steerability
from sb3_dsrl.steering import NoiseSpace
from sb3_dsrl.tickets import Ticket, find_ticket
from sb3_dsrl.wrappers import ActionChunkWrapper, LatentSteeringWrapper, VecLatentSteering

if TYPE_CHECKING:
    from sb3_dsrl.maniskill import make_chunk_env, make_latent_env

__version__ = "0.1.0"

for _algorithm in (PPO, A2C, TRPO):
    _algorithm.policy_aliases["LatentPolicy"] = LatentPolicy

__all__ = [
    "ActionChunkWrapper",
    "BestOfM",
    "EnsembleChunkCritic",
    "EvalResult",
    "FlowPolicy",
    "Gate",
    "ImageEncoder",
    "LatentPolicy",
    "LatentSteeringWrapper",
    "NoisePolicy",
    "NoiseSpace",
    "ResumeCallback",
    "Rollouts",
    "StateEncoder",
    "SteerabilityReport",
    "SuccessEvalCallback",
    "Ticket",
    "TrainingCheckpoint",
    "VecLatentSteering",
    "VelocityMLP",
    "VelocityUNet",
    "__version__",
    "aw_mle_loss",
    "collect_rollouts",
    "demo_transitions",
    "evaluate",
    "find_ticket",
    "load_awsc_checkpoint",
    "load_demos",
    "make_chunk_env",
    "make_latent_env",
    "ppo_kwargs",
    "pretrain_latent",
    "results_table",
    "steerability",
    "resume",
    "train_critic",
    "train_flow",
]


def __getattr__(name: str) -> Any:
    # Importing sb3_dsrl must not import ManiSkill.
    if name in ("make_chunk_env", "make_latent_env"):
        from sb3_dsrl import maniskill

        return getattr(maniskill, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
