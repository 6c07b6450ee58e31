"""Every configuration makes its objects: defaults, experiments and each choice of each group, node by node.

A node is a mapping with ``_target_``. Its object is found, its keys are compared with what the object takes, and it is
made, innermost node first, unless it opens files of the user's, joins processes or starts a device; these are in
:data:`COMPARED_ONLY` and only compared.
"""

from __future__ import annotations

import functools
import inspect

import pytest
from hydra.errors import HydraException
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

from navsim_ext.runtime.config import compose, config_root

ROOTS = sorted(file.parent for file in config_root().rglob("config.yaml"))
JOBS = [str(root.relative_to(config_root())) for root in ROOTS]
SHARED = config_root() / "shared"
TOGETHER = {
    ("closed_loop_drive", "encoder=vlm"): ["cameras=rendered"],
    ("closed_loop_drive", "planner=vlm_text"): ["cameras=rendered"],
    **{
        ("stage3", f"algorithm={name}"): ["policy=traffic"]
        for name in ("traffic_dapo", "traffic_plan_r1", "traffic_ppo", "traffic_reinforce", "traffic_rlftsim")
    },
}
"""What a choice cannot do without."""

COMPARED_ONLY = {
    "lightning.pytorch.Trainer": "devices and precision of another machine",
    "lightning.pytorch.loggers.MLFlowLogger": "needs a package that set-up leaves out",
    "lightning.pytorch.loggers.WandbLogger": "needs a package that set-up leaves out",
    "navsim_ext.hidden_cache.CachedHiddenStates": "opens a hidden-state cache",
    "navsim_ext.metric_cache.scorer.PdmScorer": "opens a metric cache",
    "navsim_ext.metric_cache.schema.MetricCache": "opens a metric cache",
    "navsim_ext.pdm.closed.planner.PdmClosed": "opens a metric cache",
    "navsim_ext.datamodule.SceneDataModule": "opens an index",
    "stage1_vlm.data.datamodule.DrivingQuestionData": "opens a mixture",
    "stage1_vlm.module.InstructionTuning": "opens a checkpoint",
    "stage1_vlm.live.LiveSceneEncoder": "opens a checkpoint",
    "stage1_vlm.live.live_states": "opens a checkpoint",
    "stage1_vlm.text_planner.VlmText": "opens a checkpoint",
    "stage2_dit.inference.load_trajectory_planner": "opens a checkpoint",
    "sim_agents.data.dataset.TrafficDataModule": "opens a store",
    "sim_agents.training.module.AgentModule": "opens a vocabulary",
    "sim_agents.ego.actors.traffic": "opens a checkpoint",
    "sim_agents.ego.open_loop.OpenLoop": "opens a store",
    "sim_agents.ego.path.policy.load_path_planner": "opens a checkpoint",
    "sim_agents.ego.token.module.GoalModule": "opens a checkpoint",
    "sim_agents.ego.token.policy.load_token_planner": "opens a checkpoint",
    "sim_agents.ego.tree.module.TreeModule": "opens a checkpoint, with init_from",
    "sim_agents.ego.tree.policy.load_tree_planner": "opens a checkpoint",
    "stage3_grpo.module.GrpoModule": "opens a checkpoint",
    "stage3_grpo.policies.scenes.SceneBatches": "opens a store",
    "navsim_ext.traffic.womd.WomdRecords": "opens a folder",
    "navsim_ext.traffic.gpudrive.GpuDriveJson": "opens a folder",
    "navsim_ext.traffic.scenarionet.ScenarioNetTraffic": "opens a folder",
    "navsim_ext.traffic.navsim.NavsimTraffic": "opens a folder",
    "navsim_ext.traffic.scene_v1.NeutralNpz": "opens a folder",
    "navsim_ext.synthetic.traffic_scenes.SyntheticTraffic": "drives for a while",
}
GIVEN_LATER = {
    "lightning.pytorch.Trainer": {"callbacks", "logger", "plugins", "default_root_dir"},
    "stage1_vlm.live.live_states": {"root", "index", "sensor_root"},
    "navsim_ext.hidden_cache.CachedHiddenStates": {"root"},
}
"""Arguments that the code adds when it makes the node."""
STAND_INS = {"year": 2025, "planner.name": "idm_0"}
"""For keys without a value, by name; all others are paths or names and get a text."""


def choices() -> list[tuple[str, str]]:
    """(job, override): its defaults, its experiments, each choice of its own groups; the shared ones with stage 2."""
    found = []
    for job, root in zip(JOBS, ROOTS):
        found.append((job, ""))
        files = [file for folder in sorted(root.iterdir()) if folder.is_dir() for file in sorted(folder.glob("*.yaml"))]
        found += [(job, f"{file.parent.name}={file.stem}") for file in files if file.parent.name != "callbacks"]
    found += [
        ("stage2", f"{group}={file.stem}")
        for group in ("trainer", "logger")
        for file in sorted((SHARED / group).glob("*"))
    ]
    found += [("stage2", "callbacks=[default,best,storage,ema]")]
    found += [(job, "logger=csv") for job in ("stage1", "stage3", "sim_agents")]
    return found


def filled(node, path=""):
    """Plain data of a node, with a stand-in for each missing value."""
    if isinstance(node, dict):
        return {key: filled(value, f"{path}.{key}".lstrip(".")) for key, value in node.items()}
    if isinstance(node, list):
        return [filled(value, path) for value in node]
    return STAND_INS.get(path, "stand_in") if node == "???" else node


def nodes(node, path=""):
    """(path, node) of every node with a ``_target_``, innermost first."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in children:
        yield from nodes(value, f"{path}.{key}".lstrip("."))
    if isinstance(node, dict) and "_target_" in node:
        yield path, node


def refused(path: str, node: dict) -> str | None:
    """Why the object of a node does not take its keys, or None."""
    target, thing = node["_target_"], get_object(node["_target_"])
    keys = {key for key in node if not (key.startswith("_") and key.endswith("_"))}
    parameters = inspect.signature(thing).parameters.values()
    names = {one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    needed = {one.name for one in parameters if one.name in names and one.default is one.empty}
    if not any(one.kind is one.VAR_KEYWORD for one in parameters) and keys - names:
        return f"{path}: {target} takes no {', '.join(sorted(keys - names))}; it takes {', '.join(sorted(names))}"
    lacking = needed - keys - GIVEN_LATER.get(target, set())
    if lacking and not node.get("_partial_"):
        return f"{path}: {target} needs {', '.join(sorted(lacking))}"
    return None


@functools.cache
def made(text: str):
    """The object of a node, written down, or the error that it raised."""
    try:
        instantiate(OmegaConf.create(text))
    except HydraException as error:
        return error
    return None


def opens_files(node: dict) -> bool:
    return any(inner["_target_"] in COMPARED_ONLY for _, inner in nodes(node))


@pytest.mark.parametrize(("job", "override"), choices())
def test_every_choice_makes_its_objects(job, override, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cfg = filled(
        OmegaConf.to_container(
            compose(job, [*filter(None, [override]), *TOGETHER.get((job, override), [])]), resolve=False
        )
    )
    cfg = OmegaConf.to_container(OmegaConf.create(cfg), resolve=True)
    faults = [
        f"{group}.{name} has no _target_"
        for group in ("callbacks", "logger")
        for name, node in (cfg.get(group) or {}).items()
        if node and "_target_" not in node
    ]
    for path, node in nodes(cfg):
        fault = refused(path, node)
        if fault is None and not opens_files(node):
            error = made(OmegaConf.to_yaml(OmegaConf.create(node), sort_keys=True))
            fault = error and f"{path}: {error}"
        faults += [fault] if fault else []
    assert faults == []


def test_a_key_that_nothing_takes_is_found_out():
    node = {"_target_": "navsim_ext.planners.ConstantDeceleration", "decelaration": 2.0}
    assert "takes no decelaration" in refused("planner", node)
    assert "needs" in refused("planner", {"_target_": "stage2_dit.planner.PlannerConfig"})
    assert made("{_target_: navsim_ext.planners.ConstantDeceleration, deceleration: -1.0}") is not None
