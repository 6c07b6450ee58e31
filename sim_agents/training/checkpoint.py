"""What a checkpoint of a traffic model carries beside its weights, and reading one back.

The vocabulary travels inside: a checkpoint can drive without the folder that it was built in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from navsim_ext.errors import DataError, MissingError
from navsim_ext.fingerprint import Fingerprint, digest_json
from navsim_ext.runtime.checkpoint_file import ema_weights, load_checkpoint, record_of
from sim_agents.data.scene_tokens import Bounds
from sim_agents.model.network import NextTokenNetwork
from sim_agents.model.settings import NetworkSettings
from sim_agents.policy import TokenPolicy
from sim_agents.vocabulary import MotionVocabulary, ShapeVocabulary, VerletVocabulary

RECORD = "sim_agents"
PREFIX = "network."
KEYS = {"network", "vocabulary", "tables", "scenes", "bounds"}


@dataclass(frozen=True)
class LoadedAgents:
    """A model that can drive: network (in eval mode), vocabulary, how much of a scene it was trained to see, and what
    all was made from."""

    network: NextTokenNetwork
    vocabulary: MotionVocabulary
    bounds: Bounds
    fingerprint: Fingerprint

    def policy(self, **options: Any) -> TokenPolicy:
        """The model as a policy of the moving world; ``options`` are :class:`TokenPolicy`'s. It drives everybody,
        however many road users it was trained with; of the map it sees as many pieces and lights as in training."""
        policy = TokenPolicy(self.network, self.vocabulary, bounds=self.bounds, **options)
        policy.fingerprint = self.fingerprint
        return policy


def agent_record(
    settings: NetworkSettings,
    vocabulary: MotionVocabulary,
    made_from: Fingerprint,
    scenes: Fingerprint | None,
    bounds: Bounds,
) -> str:
    """JSON text of the record."""
    if isinstance(vocabulary, VerletVocabulary):
        tables: dict[str, Any] = {"width": vocabulary.width, "changes": vocabulary.changes}
    else:
        tables = {"shapes": vocabulary.shapes.tolist(), "counts": vocabulary.counts.tolist()}
    return json.dumps(
        {
            "network": asdict(settings),
            "vocabulary": made_from.to_json(),
            "tables": tables,
            "scenes": None if scenes is None else scenes.to_json(),
            "bounds": asdict(bounds),
        }
    )


def read_record(checkpoint: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What :func:`agent_record` put into a checkpoint; raises DataError for none or another."""
    return record_of(checkpoint, RECORD, KEYS, where, "sim_agents.train")


def load_agents(path: str | os.PathLike[str], *, ema: bool | None = None) -> LoadedAgents:
    """Reads a checkpoint of ``sim_agents.train`` on the CPU. ``ema`` None takes averaged weights where there are some.

    Raises MissingError, DataError for a checkpoint of something else or weights that do not fit its record.
    """
    path = Path(path)
    if not path.exists():
        raise MissingError(f"checkpoint {path} does not exist: check the path or train it first")
    checkpoint = load_checkpoint(path)
    record = read_record(checkpoint, str(path))
    averaged = ema_weights(checkpoint)
    if ema and averaged is None:
        raise DataError(f"{path} holds no averaged weights, ema=true was asked for")
    weights = checkpoint["state_dict"] if averaged is None or ema is False else averaged
    vocabulary = vocabulary_of(record["tables"])
    network = NextTokenNetwork(NetworkSettings(**record["network"]), vocabulary)
    own = {name.removeprefix(PREFIX): value for name, value in weights.items() if name.startswith(PREFIX)}
    require_fit(network, own, path)
    network.load_state_dict(own, strict=True)
    parents = {"vocabulary": Fingerprint.from_json(record["vocabulary"])}
    if record["scenes"] is not None:
        parents["scenes"] = Fingerprint.from_json(record["scenes"])
    digest = digest_json({name: [float(value.double().sum()), float(value.double().pow(2).sum())]
                          for name, value in sorted(own.items())})  # fmt: skip
    fields = {"network": record["network"], "bounds": record["bounds"], "weights": digest}
    fingerprint = Fingerprint(RECORD, fields, parents, {"path": str(path)})
    return LoadedAgents(network.eval(), vocabulary, Bounds(**record["bounds"]), fingerprint)


def vocabulary_of(tables: dict[str, Any]) -> MotionVocabulary:
    """The vocabulary that a record carries as ``tables``."""
    if "shapes" in tables:
        return ShapeVocabulary(torch.tensor(tables["shapes"]), torch.tensor(tables["counts"]))
    return VerletVocabulary(tables["width"], tables["changes"])


def initialise(
    network: NextTokenNetwork, path: str | os.PathLike[str], settings: NetworkSettings, made_from: Fingerprint
) -> None:
    """Takes the weights of another run of the same network and vocabulary; raises DataError naming what differs."""
    loaded = load_agents(path)
    if loaded.network.settings != settings:
        raise DataError(f"{path} has the network {loaded.network.settings}, the configured one is {settings}")
    theirs = loaded.fingerprint.parents["vocabulary"]
    theirs.require_equal(
        made_from, mine=f"the vocabulary of {path}", theirs="the configured one", remedy="set vocabulary to its folder"
    )
    network.load_state_dict(loaded.network.state_dict(), strict=True)


def require_fit(network: nn.Module, weights: dict[str, torch.Tensor], path: str | os.PathLike[str]) -> None:
    """Raises DataError naming the weights that do not fit a recorded network exactly."""
    wanted = network.state_dict()
    wrong = sorted(set(wanted) ^ set(weights))
    wrong += [
        f"{name}: {tuple(weights[name].shape)} in the file, {tuple(wanted[name].shape)} by its record"
        for name in sorted(set(wanted) & set(weights))
        if wanted[name].shape != weights[name].shape
    ]
    if wrong:
        raise DataError(f"{path}: weights do not fit the recorded network: {'; '.join(wrong[:8])}")
