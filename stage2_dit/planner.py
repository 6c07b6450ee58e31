"""The diffusion planner: VLM tokens, history and ego status in, a denoiser of trajectories out.

Legend: S scenes, R rows scene-major (R = S G), F poses of the horizon, N context tokens, f width of the VLM,
d inner width, H history poses. x, t: a noisy trajectory in the normalised box and its network time.

    e = feature_encoder(VLM tokens),  m = mean of e over tokens,  g = his_traj_encoder(history)
    y_j = fusion_projector([g; m; action_encoder(x_j, t) + position_j])
    prediction = action_decoder(DiT(y; t, ego_status_encoder(status), e))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Float32, Shaped
from torch import Tensor, nn

from navsim_ext.errors import DataError
from navsim_ext.frames import NUM_FUTURE_POSES, NUM_HISTORY_POSES
from stage2_dit.conditioning import Conditioning, Padding, token_weights
from stage2_dit.diffusion.process import Chain
from stage2_dit.diffusion.sampling import build_process
from stage2_dit.dit import DiT, deferred_is_cheaper
from stage2_dit.layers import ActionEncoder, EgoStatusAttention, Mlp
from stage2_dit.normaliser import PUBLISHED, NormaliserBounds, TrajectoryNormaliser

POSE_CHANNELS = 3
STATUS_CHANNELS = 8  # command one-hot, vx, vy, ax, ay


@dataclass(frozen=True)
class PlannerConfig:
    """Everything that decides the arithmetic of a planner; saved with its weights.

    ``hidden_width`` f of the VLM; ``encoder_width`` hidden width of every Mlp; ``output_width`` of the DiT;
    ``process`` and ``num_steps`` the diffusion it is trained with (steps None: the process's default);
    ``padding`` see :func:`stage2_dit.conditioning.token_weights`; ``ego_dropout`` of the attention variant;
    ``zero_hidden`` blinds the planner (a control: it must not do as well as a seeing one);
    ``mean_variance``: the decoder has 6 outputs of which the first 3 are used (a published flow variant).
    """

    hidden_width: int
    num_heads: int = 8
    head_width: int = 48
    num_layers: int = 16
    output_width: int = 512
    encoder_width: int = 1024
    horizon: int = NUM_FUTURE_POSES
    num_history: int = NUM_HISTORY_POSES
    ego_encoder: Literal["mlp", "attention"] = "mlp"
    ego_dropout: float = 0.75
    padding: Padding = "masked"
    padded_length: int | None = None
    process: str = "ddim"
    num_steps: int | None = None
    mean_variance: bool = False
    zero_hidden: bool = False
    normaliser: NormaliserBounds = field(default_factory=lambda: PUBLISHED["waypoint"])

    @property
    def width(self) -> int:
        """Inner width d."""
        return self.num_heads * self.head_width

    def __post_init__(self) -> None:
        for name in ("num_heads", "head_width", "num_layers", "output_width", "encoder_width",
                     "horizon", "num_history"):  # fmt: skip
            if getattr(self, name) < 1:
                raise DataError(f"planner {name} is {getattr(self, name)}; a positive number was expected")
        if self.head_width % 2:
            raise DataError(f"planner head_width is {self.head_width}; rotary positions need an even one")
        if self.ego_encoder not in ("mlp", "attention"):
            raise DataError(f"ego_encoder {self.ego_encoder!r} does not exist; choose mlp or attention")
        if self.padding not in ("masked", "upstream"):
            raise DataError(f"padding {self.padding!r} does not exist; choose masked or upstream")

    @classmethod
    def small(cls, hidden_width: int, **changes: Any) -> PlannerConfig:
        """The published small planner (8 heads x 48, 16 layers; 34 million parameters)."""
        return cls(hidden_width=hidden_width, **changes)

    @classmethod
    def large(cls, hidden_width: int, **changes: Any) -> PlannerConfig:
        """The published large planner (32 heads x 48, 16 layers)."""
        return cls(**{"hidden_width": hidden_width, "num_heads": 32, "output_width": 1536, **changes})

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> PlannerConfig:
        """Raises DataError for a field that this version does not know."""
        known = {item.name for item in dataclasses.fields(cls)}
        unknown = sorted(set(content) - known)
        if unknown:
            raise DataError(f"planner configuration has unknown fields {unknown}; known are {sorted(known)}")
        values = dict(content)
        if isinstance(values.get("normaliser"), Mapping):
            values["normaliser"] = NormaliserBounds(**values["normaliser"])
        return cls(**values)


SHARDED_METHODS = ("condition",)
"""What is called beside ``forward`` and needs whole weights (:mod:`navsim_ext.runtime.sharding`)."""


class DiffusionPlanner(nn.Module):
    """The network, its diffusion process and its normaliser. Parameter names are those of published checkpoints."""

    def __init__(self, config: PlannerConfig) -> None:
        super().__init__()
        if config.hidden_width < 1:
            raise DataError(
                f"planner hidden_width is {config.hidden_width}; the width of the VLM's states was expected"
            )
        d, hidden = config.width, config.encoder_width
        self.config = config
        self.feature_encoder = nn.Linear(config.hidden_width, d)
        self.his_traj_encoder = Mlp(config.num_history * POSE_CHANNELS, hidden, d)
        if config.ego_encoder == "mlp":
            self.ego_status_encoder: nn.Module = Mlp(STATUS_CHANNELS, hidden, d)
        else:
            self.ego_status_encoder = EgoStatusAttention(STATUS_CHANNELS, d, dropout=config.ego_dropout)
        self.action_encoder = ActionEncoder(POSE_CHANNELS, d)
        self.fusion_projector = nn.Linear(3 * d, d)
        self.position_embedding = nn.Embedding(config.horizon, d)
        nn.init.normal_(self.position_embedding.weight, std=0.02)
        self.model = DiT(config.num_heads, config.head_width, config.num_layers, config.output_width, config.horizon)
        outputs = POSE_CHANNELS * (2 if config.mean_variance else 1)
        self.action_decoder = Mlp(config.output_width, hidden, outputs)
        self.process = build_process(config.process, config.num_steps)
        self.normaliser = TrajectoryNormaliser(config.normaliser)

    def condition(
        self,
        hidden: Float[Tensor, "S N f"],
        mask: Bool[Tensor, "S N"] | None,
        history: Float[Tensor, "S H 3"],
        status: Float[Tensor, "S 8"],
        *,
        queries_per_scene: int | None = None,
    ) -> Conditioning:
        """Encodes S scenes once for all rows and steps.

        ``hidden`` [S,N,f], ``mask`` [S,N] bool (None: all valid), ``history`` [S,H,3] metres and radians, ``status``
        [S,8]. ``queries_per_scene``: pose tokens that will ask each scene in total, when known to be few (training:
        the horizon); values are then projected after the attention average. None: keys and values are both projected.
        """
        width = self.config.hidden_width
        if hidden.shape[-1] != width:
            raise DataError(f"hidden states are {hidden.shape[-1]} wide, the planner was built for {width}: use the "
                            "VLM that it was trained with, or build a planner of that hidden_width")  # fmt: skip
        if history.shape[1:] != (self.config.num_history, POSE_CHANNELS):
            raise DataError(f"history has shape {tuple(history.shape)}, [S,{self.config.num_history},3] was expected")
        if self.config.zero_hidden:
            hidden = torch.zeros_like(hidden)
        weights, zero_row = token_weights(mask, self.config.padding, self.config.padded_length)
        if zero_row:
            hidden = torch.cat([hidden, hidden.new_zeros(len(hidden), 1, width)], dim=1)
        tokens = self.feature_encoder(hidden.to(self.feature_encoder.weight.dtype))
        if weights is None:
            bias, mean = None, tokens.mean(dim=1)
        else:
            bias = torch.log(weights)
            share = weights / weights.sum(dim=1, keepdim=True)
            mean = torch.matmul(share[:, None].to(tokens.dtype), tokens)[:, 0]
        dtype = self.fusion_projector.weight.dtype
        project = queries_per_scene is None or not deferred_is_cheaper(
            queries_per_scene, self.config.num_heads, self.config.width
        )
        return Conditioning(
            tokens=tokens,
            bias=bias,
            history=self.his_traj_encoder(history.flatten(1).to(dtype)),
            mean=mean,
            ego=self.ego_status_encoder(status.to(dtype)),
            layers=self.model.context(tokens, project_values=project),
        )

    def forward(
        self, x: Float[Tensor, "R F 3"], time: Shaped[Tensor, " R"], conditioning: Conditioning
    ) -> Float32[Tensor, "R F 3"]:
        """Prediction [R,F,3] float32 (noise or velocity) for x [R,F,3] at network time [R]; R a multiple of S."""
        return self.decode(*self.denoise(x, time, conditioning)[:1])

    def denoise(
        self, x: Float[Tensor, "R F 3"], time: Shaped[Tensor, " R"], conditioning: Conditioning
    ) -> tuple[Float[Tensor, "R F o"], list[Float[Tensor, "R F d"]], Float[Tensor, "R F d"]]:
        """The DiT's output [R,F,o], its states, and its input [R,F,d]."""
        rows, scenes = len(x), len(conditioning)
        if rows == 0 or rows % scenes:
            raise DataError(f"{rows} rows cannot be shared among {scenes} scenes: rows are scene-major, G per scene")
        group = rows // scenes
        per_scene = torch.cat([conditioning.history, conditioning.mean], dim=-1).repeat_interleave(group, dim=0)
        ego = conditioning.ego.repeat_interleave(group, dim=0)
        action = self.action_encoder(x, time) + self.position_embedding.weight
        fused = torch.cat([per_scene[:, None].expand(-1, x.shape[1], -1).to(action.dtype), action], dim=-1)
        y = self.fusion_projector(fused)
        out, states = self.model(y, time, ego, conditioning.tokens, conditioning.bias, conditioning.layers)
        return out, states, y

    def decode(self, out: Float[Tensor, "R F o"]) -> Float32[Tensor, "R F 3"]:
        return self.action_decoder(out)[..., :POSE_CHANNELS].float()

    def training_loss(
        self,
        conditioning: Conditioning,
        target: Float[Tensor, "R F 3"],
        noise: Float[Tensor, "R F 3"],
        time: Shaped[Tensor, " R"],
    ) -> Float[Tensor, ""]:
        """Mean squared error of the prediction: [] for target [R,F,3] in metres and radians."""
        x0 = self.normaliser.normalise(target.float())
        corrupted = self.process.corrupt(x0, noise, time)
        prediction = self(corrupted.x, corrupted.time, conditioning)
        return torch.nn.functional.mse_loss(prediction, corrupted.target)

    def trajectories(self, chain: Chain) -> Float[Tensor, "R F 3"]:
        """[R,F,3] metres and radians of a chain's samples."""
        return self.normaliser.denormalise(chain.samples)
