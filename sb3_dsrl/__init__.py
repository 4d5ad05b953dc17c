"""Latent steering of frozen flow policies with Stable-Baselines3.

"DSRL" is here dual-stage RL with latent steering: stage 1 offline, stage 2 online with stock PPO. Diffusion Steering via RL
(https://arxiv.org/abs/2506.15799), which has the same initials, trains SAC on the noise.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sb3_contrib import TRPO
from stable_baselines3 import A2C, PPO

import sb3_dsrl.envs  # noqa: F401  steered envs recognise ManiSkill's
from sb3_dsrl.auto.improve import improve
from sb3_dsrl.auto.report import ImproveReport
from sb3_dsrl.envs.factory import make_chunk_env, make_latent_env
from sb3_dsrl.envs.workers import WorkerSettings
from sb3_dsrl.evaluation.best_of import BestOfM
from sb3_dsrl.evaluation.choice import PolicyChoice, choose_policy
from sb3_dsrl.evaluation.play import evaluate
from sb3_dsrl.evaluation.residual import without_residual
from sb3_dsrl.evaluation.results import EvalResult, results_table
from sb3_dsrl.evaluation.rollouts import Rollouts, collect_rollouts
from sb3_dsrl.evaluation.search import NoiseSearch, search_noise
from sb3_dsrl.evaluation.search_result import SearchResult
from sb3_dsrl.evaluation.steerability import steerability
from sb3_dsrl.evaluation.steerability_report import SteerabilityReport
from sb3_dsrl.evaluation.ticket_bandit import TicketBandit, find_ticket_bandit
from sb3_dsrl.evaluation.tickets import Ticket, find_ticket
from sb3_dsrl.policies.awsc import load_awsc_checkpoint
from sb3_dsrl.policies.base import SteerablePolicy
from sb3_dsrl.policies.encoders import ImageEncoder, StateEncoder
from sb3_dsrl.policies.flow import FlowPolicy
from sb3_dsrl.policies.inversion import Inversion
from sb3_dsrl.policies.lerobot import LeRobotPolicy
from sb3_dsrl.policies.networks import EnsembleChunkCritic, VelocityMLP, VelocityUNet
from sb3_dsrl.stage0.critic import train_critic
from sb3_dsrl.stage0.demo_files import load_demos
from sb3_dsrl.stage0.demo_starts import DemoStarts
from sb3_dsrl.stage0.demos import Demos
from sb3_dsrl.stage0.features import demo_transitions
from sb3_dsrl.stage0.flow_matching import AdvantageWeighting, ImageTraining, create_flow, train_flow
from sb3_dsrl.stage0.lerobot_demos import load_lerobot
from sb3_dsrl.stage0.minari_demos import load_minari
from sb3_dsrl.stage0.robomimic_demos import load_robomimic
from sb3_dsrl.stage0.validation import Validation
from sb3_dsrl.stage1.aw_mle import aw_mle_loss
from sb3_dsrl.stage1.fit import fit_candidates, fit_executed, fit_inverted, fit_searched
from sb3_dsrl.stage1.gate import Gate
from sb3_dsrl.stage1.pretrain import pretrain_latent
from sb3_dsrl.stage1.settings import CandidateSettings, ExecutedSettings, InvertedSettings, SearchedSettings
from sb3_dsrl.stage2.bootstrap import ExactBootstrap
from sb3_dsrl.stage2.callbacks import SuccessEvalCallback
from sb3_dsrl.stage2.correlation import CorrelatedRolloutBuffer
from sb3_dsrl.stage2.gamma_check import install_gamma_check
from sb3_dsrl.stage2.keep_best import KeepBest
from sb3_dsrl.stage2.latent_critics import ActionCritic, DistilledCritic, NoiseCritic
from sb3_dsrl.stage2.latent_policy import LatentPolicy
from sb3_dsrl.stage2.latent_sac import LatentSAC
from sb3_dsrl.stage2.resume import ResumeCallback, resume
from sb3_dsrl.stage2.sac_settings import sac_kwargs
from sb3_dsrl.stage2.settings import policy_defaults, ppo_kwargs
from sb3_dsrl.stage2.start import start_around
from sb3_dsrl.stage2.steered_policy import SteeredPolicy
from sb3_dsrl.stage2.value_warmup import ValueWarmup
from sb3_dsrl.steering.chunk_env import ActionChunkWrapper
from sb3_dsrl.steering.latent_env import LatentSteeringWrapper
from sb3_dsrl.steering.noise_space import NoiseSpace
from sb3_dsrl.steering.starts import StateStarts
from sb3_dsrl.steering.vec_env import VecLatentSteering
from sb3_dsrl.utils.checkpoint import TrainingCheckpoint

if TYPE_CHECKING:
    from sb3_dsrl.envs.state_layout import state_layout
    from sb3_dsrl.evaluation.video import record_video

__version__ = "0.1.0"

for _algorithm in (PPO, A2C, TRPO):
    _algorithm.policy_aliases["LatentPolicy"] = LatentPolicy
install_gamma_check()

__all__ = [
    "ActionChunkWrapper",
    "ActionCritic",
    "AdvantageWeighting",
    "BestOfM",
    "CandidateSettings",
    "DemoStarts",
    "CorrelatedRolloutBuffer",
    "Demos",
    "DistilledCritic",
    "EnsembleChunkCritic",
    "EvalResult",
    "ExactBootstrap",
    "ExecutedSettings",
    "FlowPolicy",
    "Gate",
    "ImageEncoder",
    "ImageTraining",
    "ImproveReport",
    "KeepBest",
    "Inversion",
    "InvertedSettings",
    "LatentPolicy",
    "LatentSAC",
    "LatentSteeringWrapper",
    "LeRobotPolicy",
    "SteerablePolicy",
    "SteeredPolicy",
    "NoiseCritic",
    "NoiseSearch",
    "NoiseSpace",
    "PolicyChoice",
    "ResumeCallback",
    "Rollouts",
    "SearchResult",
    "SearchedSettings",
    "StateEncoder",
    "StateStarts",
    "SteerabilityReport",
    "SuccessEvalCallback",
    "Ticket",
    "TicketBandit",
    "TrainingCheckpoint",
    "Validation",
    "ValueWarmup",
    "VecLatentSteering",
    "VelocityMLP",
    "VelocityUNet",
    "WorkerSettings",
    "__version__",
    "aw_mle_loss",
    "choose_policy",
    "collect_rollouts",
    "create_flow",
    "demo_transitions",
    "evaluate",
    "find_ticket",
    "find_ticket_bandit",
    "fit_candidates",
    "fit_executed",
    "fit_inverted",
    "fit_searched",
    "improve",
    "load_awsc_checkpoint",
    "load_demos",
    "load_lerobot",
    "load_minari",
    "load_robomimic",
    "make_chunk_env",
    "make_latent_env",
    "policy_defaults",
    "ppo_kwargs",
    "pretrain_latent",
    "record_video",
    "results_table",
    "search_noise",
    "state_layout",
    "start_around",
    "steerability",
    "resume",
    "sac_kwargs",
    "train_critic",
    "train_flow",
    "without_residual",
]


#: Importing sb3_dsrl must not import ManiSkill.
_LAZY = {
    "record_video": "sb3_dsrl.evaluation.video",
    "state_layout": "sb3_dsrl.envs.state_layout",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
