"""Stage 3's step against the published arithmetic and against that of the newest published code, on one core.

python benchmarks/bench_grpo.py --output benchmarks/results/grpo.json
python benchmarks/bench_grpo.py --metric-cache DIR ...     # rewards from this cache in place of the golden scenes'

The small planner (34 million parameters, 1,536-wide VLM), float32, 2 scenes x 8 samples, one update per rollout with
BC 0.1: 700 tokens against ``twins/published_grpo.py``, 2,800 tokens against ``twins/newest_grpo.py``. Both sides draw
the same noise on the same weights; times and their ratio are medians of ``--rounds`` paired rounds; peak memory is
measured in a process of its own for each side, above what weights and optimizer hold. The comparisons have a reward
that costs nothing; the share of the PDM scorer is measured after them. A quiet core needs about four minutes.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.environment import report, row
from benchmarks.twins.newest_grpo import newest_step
from benchmarks.twins.paired import paired
from benchmarks.twins.published_grpo import published_step
from benchmarks.twins.published_planner import PublishedPlanner
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.hidden_cache.schema import HiddenBatch
from navsim_ext.metric_cache.scorer import PdmScorer
from navsim_ext.pdm import PdmResult
from navsim_ext.pdm.columns import COLUMNS_ALONE
from navsim_ext.scene import SceneBatch
from stage2_dit import DiffusionPlanner, PlannerConfig, keyed_noise
from stage3_grpo.algorithm import Algorithm
from stage3_grpo.credit import assign_credit
from stage3_grpo.policies.diffusion import DiffusionPolicy, OwnSampler, ReferencePolicy
from stage3_grpo.policy import Key
from stage3_grpo.rewards import PdmTerm, Reward
from stage3_grpo.update import Updater

ROOT = Path(__file__).resolve().parents[1]
WIDTH, SCENES, GROUP = 1536, 2, 8
SHORT, LONG = 700, 2800


class NoScorer:
    """A reward that costs nothing: what the comparison of the twins is about is the network."""

    def submit(self, tokens, trajectories, reward=None):
        from concurrent.futures import Future

        future: Future = Future()
        score = 1.0 / (1.0 + np.abs(trajectories[:, -1, 0] - 20.0))
        values = np.full((len(tokens), len(COLUMNS_ALONE)), np.nan)
        for name in ("reward", "pdms_v1", "epdms_v2_no_ec_nofilter"):
            values[:, COLUMNS_ALONE.index(name)] = score
        nothing = np.full(len(tokens), "", dtype=object)
        future.set_result(PdmResult(tokens, values, np.ones(len(tokens), dtype=bool), nothing, nothing))
        return future


class Setup:
    """Planner, reference, optimizer, inputs and noise of one comparison."""

    def __init__(
        self,
        tokens: int,
        names: list[str] | None = None,
        *,
        config: PlannerConfig | None = None,
        device: str = "cpu",
    ) -> None:
        torch.manual_seed(0)
        config = config or PlannerConfig.small(WIDTH, padding="upstream")
        self.planner = DiffusionPlanner(config).eval()
        for name, parameter in self.planner.named_parameters():
            if "adaLN" in name or "modulation" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        self.planner.to(device)  # only now: each device draws random numbers of its own
        frozen = copy.deepcopy(self.planner).requires_grad_(False)
        self.reference = ReferencePolicy(frozen, Fingerprint("planner", {}))
        self.optimizer = torch.optim.AdamW(self.planner.parameters(), lr=1e-6)
        self.scenes = {
            "hidden": torch.randn(SCENES, tokens, config.hidden_width).to(device),
            "history": torch.zeros(SCENES, 4, 3, device=device),
            "status": torch.tensor([[0.0, 1, 0, 0, 5, 0, 0, 0]], device=device).repeat(SCENES, 1),
        }
        self.names = names or [f"{i:016x}" for i in range(SCENES)]
        noise = keyed_noise(0, 0, self.names, group_size=GROUP, num_steps=5, horizon=8)
        first = slice(None, None, GROUP)
        self.noise = {"initial": noise.initial, "steps": noise.steps, "teacher_initial": noise.initial[first],
                      "teacher_steps": noise.steps[first]}  # fmt: skip

    def reward_of(self, states: Tensor) -> Tensor:
        x = self.planner.normaliser.denormalise(states[:, -1].detach())[:, -1, 0]
        return 1.0 / (1.0 + (x - 20.0).abs())

    def published(self) -> Tensor:
        actor, reference = PublishedPlanner(self.planner), PublishedPlanner(self.reference.planner)
        return published_step(actor, reference, self.optimizer, self.scenes, self.noise, self.reward_of, GROUP)

    def newest(self) -> Tensor:
        return newest_step(self.planner, self.reference.planner, self.optimizer, self.scenes, self.noise,
                           self.reward_of, GROUP)  # fmt: skip

    def ours(self, scorer=None, reward: Reward | None = None) -> Tensor:
        algorithm = Algorithm("diffgrpo", group_size=GROUP)
        policy = DiffusionPolicy("", reward or Reward(PdmTerm()), scorer or NoScorer(),
                                 sampler=OwnSampler(log_prob_std_floor=0.1))  # fmt: skip
        modules = policy.adopt(self.planner, self.reference, algorithm)
        batch = SceneBatch(self.names, ["log"] * SCENES, self.scenes["history"], self.scenes["status"])
        hidden = HiddenBatch(self.scenes["hidden"], None)
        rollout = policy.roll((batch, hidden), GROUP, Key(0, 0), algorithm.needs(drift=False))
        self.seconds = rollout.own.seconds
        credit = assign_credit(algorithm, rollout)
        losses = Updater(algorithm).losses(policy, modules, rollout, credit, None, beta=0.0, bc_weight=0.1)
        self.optimizer.zero_grad()
        losses.total.backward()
        self.optimizer.step()
        return losses.total.detach()


def comparison(tokens: int, side: str, words: str, bound: str, rounds: int) -> list[dict]:
    """Rows of our step against that of a twin, from equal beginnings."""
    one, two = Setup(tokens), Setup(tokens)
    ours, theirs = one.ours, getattr(two, side)
    difference = float((ours() - theirs()).abs())  # of the first step, which also warms up both
    times = paired(ours, theirs, rounds)
    rows = [
        row(f"step, {tokens} tokens, {SCENES} scenes x {GROUP}, ours", 1e3 * times.ours, "ms"),
        row(f"step, {tokens} tokens, {words}", 1e3 * times.theirs, "ms"),
        row(f"step, {tokens} tokens, faster by", times.faster_by, "x", bound),
    ]
    if side == "published":  # the newest form has another loss value by design (its ratio is 1 at mu = 1)
        rows.append(row(f"step, {tokens} tokens, difference of the losses", difference, "", "<= 1e-5"))
    return rows


def peak_mib(side: str) -> float:
    """Peak resident memory of one step above what is resident before it, in a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--memory-of", side]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(printed.splitlines()[-1])["mib"]


def memory_of(side: str) -> None:
    torch.set_num_threads(1)
    setup = Setup(SHORT)
    for parameter in setup.planner.parameters():  # the optimizer's state exists before the step
        parameter.grad = torch.zeros_like(parameter)
    setup.optimizer.step()
    before = memory_mib("VmRSS")
    getattr(setup, side)()
    print(json.dumps({"mib": memory_mib("VmHWM") - before}))


def memory_mib(field: str) -> float:
    """A size of this process as the kernel keeps it (getrusage's peak would include that of the parent before exec)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) / 2**10


def golden_metric_cache(folder: str) -> str | None:
    """Metric caches of two golden scenes, built now; None without reference data."""
    root = os.environ.get("TRIVIUM_REFERENCE_DATA")
    golden = Path(root or "") / "golden/navsim"
    if root is None or not golden.is_dir():
        return None
    known = pd.read_parquet(golden / "scores_v11.parquet", columns=["token"])["token"].unique()
    wanted = Path(folder) / "two_scenes.yaml"
    wanted.write_text(f"tokens: [{known[0]}, {known[-1]}]\n")
    command = [sys.executable, "-m", "navsim_ext.metric_cache.build", f"data.root={golden / 'dataset'}",
               "data.split=trainval", f"data.scene_filter={wanted}", "workers=sequential",
               f"output_dir={folder}/cache"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stderr}")
    return f"{folder}/cache"


def reward_rows(cache: str, rounds: int) -> list[dict]:
    """What scoring both versions of all samples and of the reference's costs in a step."""
    scorer = PdmScorer(cache)
    known = list(scorer.cache.tokens)
    setup = Setup(SHORT, [known[0], known[-1]])
    setup.ours(scorer)
    computing, share, waiting = [], [], []
    for _ in range(rounds):
        start = time.perf_counter()
        setup.ours(scorer)
        total = time.perf_counter() - start
        computing.append(setup.seconds["score"])
        share.append(setup.seconds["score"] / total)
        waiting.append(setup.seconds["score_wait"] / total)
    return [
        row("reward of 18 trajectories, v1 and v2, computing", 1e3 * statistics.median(computing), "ms"),
        row("reward, share of the step at 700 tokens, computing", statistics.median(share), "", "<= 0.1"),
        row("reward, share of the step that waits for it", statistics.median(waiting), ""),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="benchmarks/results/<name>.json")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--metric-cache", help="folder of a metric cache for the reward's share")
    parser.add_argument("--memory-of", choices=("ours", "published"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        memory_of(arguments.memory_of)
        return
    torch.set_num_threads(1)
    rows = comparison(SHORT, "published", "published arithmetic", ">= 6", max(3, arguments.rounds // 2))
    rows += comparison(LONG, "newest", "newest published arithmetic", ">= 2", arguments.rounds)
    memory = {side: peak_mib(side) for side in ("ours", "published")}
    rows += [
        row("peak memory of a step, 700 tokens, ours", memory["ours"], "MiB"),
        row("peak memory of a step, 700 tokens, published arithmetic", memory["published"], "MiB"),
        row("peak memory, share of the published", memory["ours"] / memory["published"], "", "<= 0.3334"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        cache = arguments.metric_cache or golden_metric_cache(folder)
        if cache is not None:
            rows += reward_rows(cache, arguments.rounds)
    baseline = "benchmarks/twins/published_grpo.py and newest_grpo.py on the same weights and noise, paired"
    report("GRPO step", rows, baseline=baseline, output=arguments.output)


if __name__ == "__main__":
    main()
