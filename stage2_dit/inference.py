"""Batched inference: hidden states in, trajectories out, optionally compiled and captured as a CUDA graph.

Legend: B scenes, M candidates a scene, N context tokens, f width of the VLM, H history poses, F future poses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from navsim_ext.errors import DataError, MissingError, TriviumError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.hidden_cache import HiddenBatch, require_states
from navsim_ext.scene import SceneBatch
from stage2_dit.checkpoint import load_planner
from stage2_dit.diffusion.process import Exploration, Process
from stage2_dit.diffusion.sampling import check_process
from stage2_dit.noise import ChainNoise, keyed_noise
from stage2_dit.planner import DiffusionPlanner

Autocast = Literal["fp32", "fp16", "bf16"]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
WARM_UP_CALLS = 3  # before a CUDA graph is captured


class GraphError(TriviumError):
    """CUDA graphs were asked for where there are none."""


def medoid(candidates: Tensor) -> Tensor:
    """[B,F,3] of [B,M,F,3]: the candidate nearest to all others, argmin_m sum_n mean_f |p_mf - p_nf| over positions p.

    Unlike their mean it is itself a sample, so it never drives between two ways around an obstacle.
    """
    positions = candidates[..., :2]
    distance = (positions[:, :, None] - positions[:, None]).norm(dim=-1).mean(dim=-1).sum(dim=-1)  # [B,M]
    chosen = distance.argmin(dim=1)
    return candidates.take_along_dim(chosen[:, None, None, None], dim=1).squeeze(1)


class PlannerRunner:
    """Runs a planner on batches; deterministic by default, with noise keyed by (seed, token) whatever the batch.

    ``candidates``: samples drawn of each scene over shared keys and values; the plan is their :func:`medoid`. (A single
    sample is a draw from p(trajectory | scene); its error is some 1.4 times that of the distribution's centre.)

    ``compile``: torch.compile of condition and denoiser, once each, not of every step of the chain. ``cuda_graphs``:
    one graph for each shape of input, replayed from static buffers (GPU only); inputs of a new shape are captured on
    first use, so pad N to few sizes.
    """

    def __init__(
        self,
        planner: DiffusionPlanner,
        *,
        exploration: Exploration | None = None,
        process: Process | None = None,
        seed: int = 0,
        candidates: int = 1,
        autocast: Autocast = "fp32",
        compile: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        if candidates < 1:
            raise DataError(f"candidates={candidates}; at least 1 sample of a scene is needed to plan it")
        self.planner, self.seed, self.candidates, self.autocast = planner, seed, candidates, autocast
        self.exploration = exploration or Exploration.preset("deterministic")
        self.device = planner.position_embedding.weight.device
        self.process = check_process(planner, process).to(self.device)
        if autocast not in ("fp32", *DTYPES):
            raise DataError(f"autocast {autocast!r} does not exist; choose fp32, fp16 or bf16")
        if cuda_graphs and self.device.type != "cuda":
            raise GraphError(f"cuda_graphs=true needs a planner on a GPU, it is on {self.device}: set it to false")
        self.cuda_graphs = cuda_graphs
        wrap = (lambda part: torch.compile(part, dynamic=False)) if compile else lambda part: part
        self._condition, self._denoise = wrap(planner.condition), wrap(planner)
        self._graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    @torch.inference_mode()
    def plan(
        self, hidden: Tensor, mask: Tensor | None, history: Tensor, status: Tensor, tokens: Sequence[str]
    ) -> Tensor:
        """[B,F,3] float32 metres and radians on the CPU, for inputs on any device."""
        horizon = self.planner.config.horizon
        noise = keyed_noise(
            self.seed, 0, tokens, group_size=self.candidates, num_steps=self.process.num_steps, horizon=horizon
        )
        moved = [None if each is None else each.to(self.device) for each in (hidden, mask, history, status)]
        result = self.sample(*moved, noise.initial.to(self.device), noise.steps.to(self.device))
        return result.float().cpu()

    @torch.inference_mode()
    def sample(
        self,
        hidden: Tensor,
        mask: Tensor | None,
        history: Tensor,
        status: Tensor,
        initial: Tensor,
        steps: Tensor | None = None,
    ) -> Tensor:
        """[B,F,3] on the planner's device, from ``initial`` [BM,F,3] and ``steps`` [BM,K,F,3], scene-major.

        ``steps`` None: zeros (they have no effect on deterministic samples).
        """
        if steps is None:
            steps = initial.new_zeros(len(initial), self.process.num_steps, *initial.shape[1:])
        inputs = [hidden, mask, history, status, initial, steps]
        return self._replay(inputs) if self.cuda_graphs else self._sample(*inputs)

    def _sample(
        self, hidden: Tensor, mask: Tensor | None, history: Tensor, status: Tensor, initial: Tensor, steps: Tensor
    ) -> Tensor:
        dtype = DTYPES.get(self.autocast)
        precision = torch.autocast(self.device.type, dtype) if dtype else contextlib.nullcontext()
        with precision:
            conditioning = self._condition(hidden, mask, history, status)
            states = self.process.sample(
                lambda x, time: self._denoise(x, time, conditioning), ChainNoise(initial, steps), self.exploration
            )
        plans = self.planner.normaliser.denormalise(states[:, -1])
        return plans if self.candidates == 1 else medoid(plans.unflatten(0, (-1, self.candidates)))

    def _replay(self, inputs: list[Tensor | None]) -> Tensor:
        key = tuple(None if each is None else (tuple(each.shape), each.dtype) for each in inputs)
        if key not in self._graphs:
            self._graphs[key] = self._capture(inputs)
        graph, static, output = self._graphs[key]
        for buffer, value in zip(static, (each for each in inputs if each is not None)):
            buffer.copy_(value)
        graph.replay()
        return output.clone()

    def _capture(self, inputs: list[Tensor | None]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        buffers = [None if each is None else each.clone() for each in inputs]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_CALLS):
                self._sample(*buffers)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self._sample(*buffers)
        return graph, [each for each in buffers if each is not None], output


class TrajectoryPlanner:
    """A trained planner behind the planner protocol of :mod:`navsim_ext.planners`."""

    def __init__(
        self, runner: PlannerRunner, name: str, fingerprint: Fingerprint, trained_on: Fingerprint | None = None
    ) -> None:
        self.runner, self.name, self.fingerprint, self.trained_on = runner, name, fingerprint, trained_on

    def require_hidden(self, offered: Fingerprint) -> None:
        """Raises FingerprintMismatch when hidden states of another origin than the training's are offered."""
        if self.trained_on is not None:
            require_states(self.trained_on, offered)

    def plan(self, batch: SceneBatch, hidden: HiddenBatch | None = None) -> Tensor:
        """[B,F,3] float32 poses; raises MissingError without hidden states."""
        if hidden is None:
            raise MissingError(f"planner {self.name} needs hidden states: give a hidden cache or a live VLM")
        return self.runner.plan(hidden.hidden, hidden.mask, batch.history, batch.status, batch.token)


def load_trajectory_planner(
    checkpoint: str,
    *,
    name: str = "diffusion",
    ema: bool | None = None,
    exploration: str = "deterministic",
    seed: int = 0,
    candidates: int = 1,
    device: str = "cpu",
    autocast: Autocast = "fp32",
    compile: bool = False,
    cuda_graphs: bool = False,
    allow_hidden_mismatch: bool = False,
) -> TrajectoryPlanner:
    """A checkpoint of stage 2 or 3 behind the planner protocol; options as in :class:`PlannerRunner`.

    ``exploration`` is the name of a preset; ``ema`` None takes averaged weights where the file has them.
    """
    loaded = load_planner(checkpoint, ema=ema)
    runner = PlannerRunner(
        loaded.planner.to(device),
        exploration=Exploration.preset(exploration),
        seed=seed,
        candidates=candidates,
        autocast=autocast,
        compile=compile,
        cuda_graphs=cuda_graphs,
    )
    made = loaded.fingerprint
    settings = {"exploration": exploration, "seed": seed, "candidates": candidates, "autocast": autocast}
    fingerprint = Fingerprint("trajectory_planner", settings, {"planner": made})
    return TrajectoryPlanner(runner, name, fingerprint, None if allow_hidden_mismatch else loaded.hidden)
