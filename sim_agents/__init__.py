"""Traffic as a next-token model, and planners of the ego: what others build on. The rest may change its names."""

import navsim_ext  # noqa: F401 - answers --help before a command loads anything
from sim_agents.data.dataset import cut
from sim_agents.data.scene_tokens import Bounds, SceneTokens, collate, scene_tokens
from sim_agents.data.stored import StoredBatches, StoredItems
from sim_agents.model.network import Agents, NextTokenNetwork, Past, Roadside, agents_of
from sim_agents.model.rolling import Choice, ClosestOfSampled, ClosestOfTop, Rolled, Sampled, roll
from sim_agents.model.sampling import Sampling, keyed_uniform, text_key
from sim_agents.model.settings import NetworkSettings
from sim_agents.policy import TokenPolicy
from sim_agents.training.checkpoint import RECORD as AGENT_RECORD
from sim_agents.training.checkpoint import LoadedAgents, agent_record, load_agents
from sim_agents.vocabulary import MotionState, MotionVocabulary, class_of, encode, load_vocabulary

# isort: split
# Planners of the ego stand on what is above.
from sim_agents.ego.actors import EgoActor, PathActor, TokenActor
from sim_agents.ego.path.policy import load_path_planner
from sim_agents.ego.recorded import focused
from sim_agents.ego.reward import EVENTS as EGO_EVENTS
from sim_agents.ego.reward import EgoReward, outcome, semi_markov
from sim_agents.ego.token.policy import load_token_planner
from sim_agents.ego.tree.policy import load_tree_planner

__all__ = [
    "AGENT_RECORD",
    "EGO_EVENTS",
    "Agents",
    "Bounds",
    "Choice",
    "ClosestOfSampled",
    "ClosestOfTop",
    "EgoActor",
    "EgoReward",
    "LoadedAgents",
    "MotionState",
    "MotionVocabulary",
    "NetworkSettings",
    "NextTokenNetwork",
    "Past",
    "PathActor",
    "Roadside",
    "Rolled",
    "Sampled",
    "Sampling",
    "SceneTokens",
    "StoredBatches",
    "StoredItems",
    "TokenActor",
    "TokenPolicy",
    "agent_record",
    "agents_of",
    "class_of",
    "collate",
    "cut",
    "encode",
    "focused",
    "keyed_uniform",
    "load_agents",
    "load_path_planner",
    "load_token_planner",
    "load_tree_planner",
    "load_vocabulary",
    "outcome",
    "roll",
    "scene_tokens",
    "semi_markov",
    "text_key",
]
