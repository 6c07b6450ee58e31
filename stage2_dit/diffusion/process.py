"""The protocol of a diffusion process, the exploration settings of a rollout, and the chain that it leaves.

Legend: R rows, F poses, K denoising steps, K1 = K + 1 states, x_K (noise) ... x_0 (the sample) in the normalised box.

A process defines a step's mean and standard deviation in one place, :meth:`Process.step`. Sampling and
log-probability both use it; what differs between them is only the floor of the standard deviation, and both floors
stand in :class:`Exploration`, which the chain carries.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from navsim_ext.errors import DataError, TriviumError
from stage2_dit.diffusion.noise_schedule import Float32Tables
from stage2_dit.noise import ChainNoise


class NoDensity(TriviumError):
    """A log-probability was asked of a sampler that draws no step noise."""


class WrongProcess(TriviumError):
    """A chain or a network does not belong to the process that it was given to."""


@dataclass(frozen=True)
class Exploration:
    """How much a rollout wanders. Recorded in the chain; the default samples and scores with equal densities.

    ``eta``: DDIM's alone (0: no noise, 1, which None means: that of the ancestral sampler). ``noise_level``: of the
    flow SDE and CPS steps alone (None: 0.7). A sampler refuses the one that it would not read.
    ``sampling_std_floor``, ``log_prob_std_floor``: least standard deviation of a step when drawing and when scoring.
    ``noise_clip``: step noise is clipped to +- this; ``final_clip``: the last state is (None: not).
    ``last_step_noise`` False: the last step is its mean. ``deterministic``: every step is its mean (and eta 0).
    """

    eta: float | None = None
    noise_level: float | None = None
    sampling_std_floor: float = 0.04
    log_prob_std_floor: float = 0.04
    noise_clip: float | None = 5.0
    final_clip: float | None = 1.0
    last_step_noise: bool = True
    deterministic: bool = False

    @classmethod
    def preset(cls, name: str) -> Exploration:
        """A named setting of :data:`PRESETS`."""
        if name not in PRESETS:
            raise DataError(f"exploration preset {name!r} does not exist; there are {', '.join(PRESETS)}")
        return PRESETS[name]

    def sampling_std(self, std: Float[Tensor, "*any"], last: bool) -> Float[Tensor, "*any"]:
        if self.deterministic or (last and not self.last_step_noise):
            return torch.zeros_like(std)
        return std.clamp_min(self.sampling_std_floor)

    def log_prob_std(self, std: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        return std.clamp_min(self.log_prob_std_floor)


ETA, NOISE_LEVEL = 1.0, 0.7  # where the exploration sets none

PRESETS: dict[str, Exploration] = {
    # the density that a state was drawn from is the density that it is scored with
    "equal": Exploration(),
    # published stage 3: drawn with floor 0.04, scored with 0.1
    "published": Exploration(log_prob_std_floor=0.1),
    # every step is its mean: evaluation
    "deterministic": Exploration(deterministic=True),
    # published evaluation is stochastic: eta 1, floor 1e-4, noise clipped to 1
    "published_evaluation": Exploration(sampling_std_floor=1e-4, noise_clip=1.0),
    # published ddpm evaluation, the same in its stochastic and "deterministic" mode: no noise at the last step
    "published_evaluation_ddpm": Exploration(sampling_std_floor=1e-3, noise_clip=1.0, last_step_noise=False),
    # published flow rollouts: the last step is (nearly) a point mass; its log-probability carries no information
    "published_flow": Exploration(sampling_std_floor=1e-6, log_prob_std_floor=1e-6, noise_clip=None, final_clip=None),
}


@dataclass(frozen=True)
class Chain:
    """What sampling leaves: ``states`` [R,K+1,F,3] float32 (first noise, last the clipped sample), scene-major.

    ``times`` network time of each step (K); ``process`` identity of the process; ``group_size`` rows of a scene.
    """

    states: Float[Tensor, "R K1 F 3"]
    times: tuple[int, ...]
    exploration: Exploration
    process: dict[str, Any]
    group_size: int

    def __len__(self) -> int:
        return len(self.states)

    @property
    def num_scenes(self) -> int:
        return len(self.states) // self.group_size

    @property
    def samples(self) -> Float[Tensor, "R F 3"]:
        """[R,F,3] the last states, still normalised."""
        return self.states[:, -1]

    def select(self, scenes: Tensor | Sequence[int] | slice) -> Chain:
        """The chains of some scenes, all their rows; fits ``Conditioning.select`` of the same index."""
        if not isinstance(scenes, slice):
            scenes = torch.as_tensor(scenes, device=self.states.device)
        grouped = self.states.unflatten(0, (-1, self.group_size))
        return dataclasses.replace(self, states=grouped[scenes].flatten(0, 1))

    def detach(self) -> Chain:
        return dataclasses.replace(self, states=self.states.detach())

    def to(self, device: torch.device | str) -> Chain:
        return dataclasses.replace(self, states=self.states.to(device))


class Corrupted(NamedTuple):
    """One training pair: the network sees ``x`` [R,F,3] at ``time`` [R] and should predict ``target`` [R,F,3]."""

    x: Tensor
    time: Tensor
    target: Tensor


class StepDistribution(NamedTuple):
    """Of the next state: ``mean`` [R,F,3] and the process's own ``std`` [R or 1,1,1], before any floor."""

    mean: Tensor
    std: Tensor


Predict = Callable[[Tensor, Tensor], Tensor]  # (x [R,F,3], time [R]) -> prediction [R,F,3]


class Process(Float32Tables):
    """Base of all processes. Subclasses register their tables as buffers (float32 whatever the network is in)."""

    name: str
    prediction: Literal["noise", "velocity"]  # what the network is trained to say
    has_density: bool = True
    explored_by: tuple[str, ...] = ()  # which of ``eta`` and ``noise_level`` this sampler reads
    times: tuple[int, ...]  # network time of each step, in sampling order
    anchor: Tensor  # for the device

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("anchor", torch.zeros(()), persistent=False)

    @property
    def num_steps(self) -> int:
        return len(self.times)

    @property
    def device(self) -> torch.device:
        return self.anchor.device

    def identity(self) -> dict[str, Any]:
        """What a chain must share with the process that scores it."""
        return {"name": self.name, "times": list(self.times)}

    def require_read(self, exploration: Exploration) -> None:
        """Raises DataError when the exploration sets a strength that this sampler does not read."""
        for name in ("eta", "noise_level"):
            value = getattr(exploration, name)
            if value is not None and name not in self.explored_by:
                own = f"it reads {self.explored_by[0]}" if self.explored_by else "its noise cannot be set"
                raise DataError(f"exploration.{name}={value} has no effect on {self.name} ({own}): set it to null")

    @abstractmethod
    def draw_times(self, rows: int, generator: torch.Generator | None = None) -> Shaped[Tensor, " R"]:
        """[R] training times on the CPU, from a CPU generator (None: torch's own)."""

    @abstractmethod
    def corrupt(
        self, x0: Float[Tensor, "R F 3"], noise: Float[Tensor, "R F 3"], time: Shaped[Tensor, " R"]
    ) -> Corrupted:
        """The training pair of data ``x0`` [R,F,3], ``noise`` [R,F,3] and ``time`` [R] of :meth:`draw_times`."""

    @abstractmethod
    def step(
        self,
        index: int | Int[Tensor, " R"],
        x: Float[Tensor, "R F 3"],
        prediction: Float[Tensor, "R F 3"],
        exploration: Exploration,
    ) -> StepDistribution:
        """Distribution of the state after step ``index`` (an int, or [R] for rows at different steps)."""

    def sample(self, predict: Predict, noise: ChainNoise, exploration: Exploration) -> Float[Tensor, "R K1 F 3"]:
        """All states [R,K+1,F,3] from the given noise."""
        if noise.steps.shape[1] != self.num_steps:
            raise DataError(f"noise of {noise.steps.shape[1]} steps was given to {self.name} of {self.num_steps} steps")
        self.require_read(exploration)
        x = noise.initial.float()
        states, rows = [x], len(x)
        for k, time in enumerate(self.times):
            last = k == self.num_steps - 1
            prediction = predict(x, torch.full((rows,), time, device=x.device)).float()
            mean, std = self.step(k, x, prediction, exploration)
            draw = noise.steps[:, k].float()
            if exploration.noise_clip is not None:
                draw = draw.clamp(-exploration.noise_clip, exploration.noise_clip)
            x = mean + exploration.sampling_std(std, last) * draw if self.has_density else mean
            if last and exploration.final_clip is not None:
                x = x.clamp(-exploration.final_clip, exploration.final_clip)
            states.append(x)
        return torch.stack(states, dim=1)

    def at(self, table: Float[Tensor, " K"], index: int | Int[Tensor, " R"]) -> Float[Tensor, "_ 1 1"]:
        """A table's value at a step, shaped to broadcast over [R,F,3]."""
        return table[index].reshape(-1, 1, 1)
