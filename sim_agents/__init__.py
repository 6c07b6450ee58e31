"""Traffic as a next-token model: what others build on. The rest of the package may change its names."""

import navsim_ext  # noqa: F401 - answers --help before a command loads anything
from sim_agents.data.scene_tokens import Bounds, SceneTokens, collate, scene_tokens
from sim_agents.model.network import Agents, NextTokenNetwork, Past, Roadside, agents_of
from sim_agents.model.rolling import Choice, ClosestOfTop, Rolled, Sampled, roll
from sim_agents.model.sampling import Sampling, keyed_uniform, text_key
from sim_agents.model.settings import NetworkSettings
from sim_agents.policy import TokenPolicy
from sim_agents.training.checkpoint import LoadedAgents, load_agents
from sim_agents.vocabulary import MotionState, MotionVocabulary, class_of, load_vocabulary

__all__ = [
    "Agents",
    "Bounds",
    "Choice",
    "ClosestOfTop",
    "LoadedAgents",
    "MotionState",
    "MotionVocabulary",
    "NetworkSettings",
    "NextTokenNetwork",
    "Past",
    "Roadside",
    "Rolled",
    "Sampled",
    "Sampling",
    "SceneTokens",
    "TokenPolicy",
    "agents_of",
    "class_of",
    "collate",
    "keyed_uniform",
    "load_agents",
    "load_vocabulary",
    "roll",
    "scene_tokens",
    "text_key",
]
