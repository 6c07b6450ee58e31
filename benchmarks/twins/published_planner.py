"""The published planner's arithmetic, as plainly as its description states it: the baseline of speed comparisons.

What makes it slow is kept on purpose: VLM rows are repeated for every member of a group and encoded for each, keys
and values of every cross layer are projected from them again at every denoising step (and for every row of a chain
when log-probabilities are asked), values always before the attention average. Numbers equal those of
``stage2_dit`` in unmasked mode. Weights are shared with the given planner.

Legend: R rows, N context tokens, f their width, H poses, K steps, d inner width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stage2_dit import DiffusionPlanner

STD_FLOOR_SAMPLING = 0.04
STD_FLOOR_LOG_PROB = 0.1
NOISE_CLIP = 5.0


class PublishedPlanner(nn.Module):
    """Naive twin on the weights of ``planner`` (DDIM or any noise prediction, MLP or attention ego encoder)."""

    def __init__(self, planner: DiffusionPlanner) -> None:
        super().__init__()
        self.planner = planner

    def encode(self, hidden_RNf: Tensor) -> Tensor:
        return self.planner.feature_encoder(hidden_RNf)

    def predict(self, tokens_RNd: Tensor, history_R: Tensor, status_R: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """One network call: everything but the token encoding is computed afresh for every row."""
        planner, poses = self.planner, x.shape[1]
        mean = tokens_RNd.mean(dim=1, keepdim=True).expand(-1, poses, -1)
        history = planner.his_traj_encoder(history_R.flatten(1))[:, None].expand(-1, poses, -1)
        action = planner.action_encoder(x, time) + planner.position_embedding.weight
        y = planner.fusion_projector(torch.cat([history, mean, action], dim=-1))
        c = planner.model.timestep_encoder(time) + planner.ego_status_encoder(status_R)
        for i, block in enumerate(planner.model.transformer_blocks):
            modulation = block.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation
            z = block.norm1(y) * (1 + scale1) + shift1
            y = y + gate1 * self.attention(block.attn, z, tokens_RNd if i % 2 else None)
            z = block.norm2(y) * (1 + scale2) + shift2
            y = y + gate2 * block.ffn(z)
        return planner.action_decoder(planner.model.final_layer(y, c))

    def attention(self, layer: nn.Module, z: Tensor, context: Tensor | None) -> Tensor:
        rope = self.planner.model.rotary_embedder
        source = z if context is None else context
        query = rope(layer.q_norm(layer.split(layer.to_q(z))))
        key = layer.k_norm(layer.split(layer.to_k(source)))
        if context is None:
            key = rope(key)
        out = F.scaled_dot_product_attention(query, key, layer.split(layer.to_v(source)))
        return layer.to_out(out.transpose(1, 2).flatten(2))

    def training_loss(
        self, hidden: Tensor, history: Tensor, status: Tensor, target: Tensor, noise: Tensor, time: Tensor
    ) -> Tensor:
        x0 = self.planner.normaliser.normalise(target)
        bar = self.planner.process.bar[time].reshape(-1, 1, 1)
        x = torch.sqrt(bar) * x0 + torch.sqrt(1 - bar) * noise
        return F.mse_loss(self.predict(self.encode(hidden), history, status, x, time), noise)

    def sample(
        self, hidden: Tensor, history: Tensor, status: Tensor, noise: Tensor, *, group_size: int = 1,
        step_noise: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """All DDIM states [R,K+1,H,3]; deterministic without ``step_noise`` [R,K,H,3]."""
        hidden, history, status = (tensor.repeat_interleave(group_size, dim=0) for tensor in (hidden, history, status))
        tokens, x = self.encode(hidden), noise
        states = [x]
        process = self.planner.process
        for k, time in enumerate(process.times):
            prediction = self.predict(tokens, history, status, x, torch.full((len(x),), time))
            mean, sigma = self.step(k, x, prediction, eta=0.0 if step_noise is None else 1.0)
            x = mean
            if step_noise is not None:
                draw = step_noise[:, k].clamp(-NOISE_CLIP, NOISE_CLIP)
                x = mean + sigma.clamp_min(STD_FLOOR_SAMPLING) * draw
            states.append(x)
        states[-1] = states[-1].clamp(-1, 1)
        return torch.stack(states, dim=1)

    def step(self, k: int, x: Tensor, noise: Tensor, eta: float) -> tuple[Tensor, Tensor]:
        bar, previous = self.planner.process.step_bar[k], self.planner.process.step_previous[k]
        x0 = ((x - torch.sqrt(1 - bar) * noise) / torch.sqrt(bar)).clamp(-1, 1)
        noise = (x - torch.sqrt(bar) * x0) / torch.sqrt(1 - bar)
        sigma = (eta * torch.sqrt((1 - previous) / (1 - bar) * (1 - bar / previous))).clamp_min(1e-10)
        return torch.sqrt(previous) * x0 + torch.sqrt((1 - previous - sigma**2).clamp_min(0)) * noise, sigma

    def log_prob(
        self, hidden: Tensor, history: Tensor, status: Tensor, states: Tensor, *, group_size: int = 1
    ) -> Tensor:
        """[R,K,H,3]: every step of every row is a row of its own, with its own copy of the VLM rows."""
        steps = self.planner.process.num_steps
        repeat = group_size * steps
        rows = [tensor.repeat_interleave(repeat, dim=0) for tensor in (hidden, history, status)]
        times = torch.tensor(self.planner.process.times).repeat(len(states))
        x = states[:, :-1].flatten(0, 1)
        prediction = self.predict(self.encode(rows[0]), rows[1], rows[2], x, times).unflatten(0, (-1, steps))
        densities = []
        for k in range(steps):
            mean, sigma = self.step(k, states[:, k], prediction[:, k], eta=1.0)
            sigma = sigma.clamp_min(STD_FLOOR_LOG_PROB)
            z = (states[:, k + 1] - mean) / sigma
            densities.append(-0.5 * z**2 - torch.log(sigma) - 0.5 * math.log(2 * math.pi))
        return torch.stack(densities, dim=1)
