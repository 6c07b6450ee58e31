"""Which questions can teach by comparison: samples answers of each, keeps those whose groups will not be flat.

    python -m stage3_grpo.filter_flat experiment=language_demo init=VLM data.train=MIXTURE.json output_dir=DIR

Takes the options of ``stage3_grpo.train`` and writes ``tokens.json``, which ``data.tokens`` reads. Curious-VLA's rule,
per question from n samples with rewards r in [0, R] (R: the largest reward of all, unless ``filter.range`` says it):

    std(r) > min_std                                  the answers differ in reward
    p^G + (1 - p)^G < max_flat,  p = mean(r) / R      a group of G would hardly ever be flat
    |std(r) / R - s| <= tolerance s,  s = sqrt(p (1 - p))   the reward is as good as binary (null: not asked)

The expected yield is the share of groups of G that are not flat, 1 - p^G - (1 - p)^G, before and after. Every question
is journaled when its samples are scored: the same command goes on after an interruption.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from navsim_ext.errors import DataError
from navsim_ext.files import remove_temporaries, write_atomic, write_json_atomic
from navsim_ext.runtime.checksums import checked_line, checked_lines
from navsim_ext.runtime.config import job

_log = logging.getLogger(__name__)
JOURNAL, RESULT = "samples.jsonl", "tokens.json"


@dataclass(frozen=True)
class FlatRule:
    """See the module's header; ``group_size`` of the training that follows."""

    group_size: int
    min_std: float = 0.01
    max_flat: float = 0.1
    tolerance: float | None = 0.1
    range: float | None = None

    def scale(self, rewards: Mapping[str, Sequence[float]]) -> float:
        """R; raises DataError where no reward is above 0."""
        most = self.range or max((max(row) for row in rewards.values()), default=0.0)
        if not most > 0.0:
            raise DataError("no sampled answer earned anything: the model knows nothing to build on; warm it up first "
                            "(python -m stage1_vlm.train), or look at the reward")  # fmt: skip
        return most

    def keeps(self, rewards: Sequence[float], scale: float) -> bool:
        values = np.clip(np.asarray(rewards, dtype=np.float64), 0.0, scale) / scale
        p, std = float(values.mean()), float(values.std())
        binary = math.sqrt(p * (1.0 - p))
        return (
            std * scale > self.min_std
            and flat_share(p, self.group_size) < self.max_flat
            and (self.tolerance is None or abs(std - binary) <= self.tolerance * binary)
        )


def flat_share(p: float, group_size: int) -> float:
    """Share of groups whose members all earn alike, were each reward 1 with probability p and 0 otherwise."""
    return p**group_size + (1.0 - p) ** group_size


def chosen(rewards: Mapping[str, Sequence[float]], rule: FlatRule) -> dict[str, Any]:
    """The list and what it is expected to yield; ``rewards`` [n] of each scene token (invalid ones left out)."""
    known = {token: row for token, row in rewards.items() if len(row) > 1}
    scale = rule.scale(known)
    kept = [token for token, row in known.items() if rule.keeps(row, scale)]

    def fertile(tokens: Sequence[str]) -> float | None:
        shares = [1.0 - flat_share(float(np.clip(np.mean(known[token]), 0.0, scale)) / scale, rule.group_size)
                  for token in tokens]  # fmt: skip
        return float(np.mean(shares)) if shares else None

    return {
        "tokens": kept,
        "scenes": len(rewards),
        "unscored": len(rewards) - len(known),
        "expected_yield": {"all": fertile(list(known)), "kept": fertile(kept)},
        "reward_range": scale,
        "rule": asdict(rule),
    }


def sample_rewards(cfg: DictConfig) -> dict[str, list[float]]:
    """Rewards of ``filter.samples`` answers to each training question, by scene token."""
    from hydra.utils import instantiate

    from navsim_ext.fingerprint import Fingerprint
    from navsim_ext.runtime.lock import FolderLock
    from navsim_ext.runtime.progress import track
    from navsim_ext.runtime.rng import derive_seed
    from stage3_grpo.policies.language import LanguagePolicy

    policy, algorithm = instantiate(cfg.policy), instantiate(cfg.algorithm)
    if not isinstance(policy, LanguagePolicy):
        raise DataError("only answers in words are filtered: take an experiment with policy=language")
    data = instantiate(cfg.datamodule)
    policy.build(data, algorithm, cfg.seed)
    policy.begin(data, "cpu")
    prompts, folder = data.dataset("train"), Path(cfg.output_dir)
    fields = {"questions": prompts.fingerprint.digest, "samples": cfg.filter.samples, "seed": cfg.seed}
    fields |= {"sampling": asdict(policy.sampling), "reward": repr(cfg.reward)}
    plan = Fingerprint("flat_filter", fields, parents={"model": policy.fingerprint})
    with FolderLock(folder):
        remove_temporaries(folder)
        if (folder / "fingerprint.json").is_file():
            plan.require_equal(Fingerprint.load(folder), mine="this command", theirs=f"what {folder} was begun with",
                               remedy="choose another output_dir")  # fmt: skip
        else:
            plan.save(folder)
        done = _journal(folder / JOURNAL)
        todo = [place for place, name in enumerate(prompts.names) if name not in done]
        with open(folder / JOURNAL, "a", encoding="utf-8") as journal:
            for place in track(todo, "sampled questions", total=len(prompts), done=len(prompts) - len(todo)):
                prompt = prompts[place]
                keys = [derive_seed(cfg.seed, "filter", prompt.name, number) for number in range(cfg.filter.samples)]
                drawn = policy.answers([prompt], [keys], policy.sampling, reference=False)
                scores = policy.reward.submit(policy.scorer, policy.replies([prompt], drawn)).result()
                rewarded = scores.reward[scores.valid].tolist()
                row = {"name": prompt.name, "token": prompt.prompted.token, "rewards": rewarded}
                journal.write(checked_line(row))
                journal.flush()
                os.fsync(journal.fileno())
                done[prompt.name] = row
    rewards: dict[str, list[float]] = {}
    for name in prompts.names:
        rewards.setdefault(done[name]["token"], []).extend(done[name]["rewards"])
    return rewards


def _journal(path: Path) -> dict[str, dict[str, Any]]:
    """Finished questions by name; lines that are damaged or cut short are sampled again."""
    if not path.is_file():
        return {}
    rows = [row for _, row in checked_lines(path.read_bytes(), required=False) if row is not None]
    write_atomic(path, "".join(map(checked_line, rows)))
    return {row["name"]: row for row in rows}


@job("stage3")
def main(cfg: DictConfig) -> None:
    """Samples what is missing, writes the list, and says what it yields."""
    if cfg.get("filter") is None:
        raise DataError("only answers in words are filtered: take experiment=language_demo or policy=language")
    rule = FlatRule(cfg.algorithm.group_size, cfg.filter.min_std, cfg.filter.max_flat, cfg.filter.tolerance,
                    cfg.filter.range)  # fmt: skip
    result = chosen(sample_rewards(cfg), rule)
    write_json_atomic(Path(cfg.output_dir) / RESULT, result)
    told = {name: value for name, value in result.items() if name != "tokens"}
    _log.info("%s: %d scenes kept; %s", Path(cfg.output_dir) / RESULT, len(result["tokens"]), json.dumps(told))
    if not result["tokens"]:
        where = Path(cfg.output_dir) / RESULT
        raise DataError(f"no scene passes the filter: see {where} and loosen filter.max_flat or filter.tolerance")


if __name__ == "__main__":
    main()
