"""Parity with the reference planner: every tensor of stage 2's arithmetic, in three cases and all samplers.

Tolerance: max(20 x the reference's own |fp32 - fp64|, 2e-6 x its largest value). Two cases travel with the
repository (``tests/golden/planner``), the third is found through the reference data.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stage2_dit import Exploration, build_process, log_prob, sample_chain
from stage2_dit.noise import ChainNoise
from stage2_dit.normaliser import PUBLISHED, TrajectoryNormaliser, to_target
from stage2_dit.published import from_published

IN_TREE = Path(__file__).parents[1] / "golden" / "planner"
CASES = ("attention_ego", "large_scaled", "small_4layer")
NETWORK_TIME_FLOW = {"process": "flow_ode"}


class Golden:
    """One case: weights, inputs, and ``check`` against the outputs of a sampler."""

    def __init__(self, folder: Path) -> None:
        self.meta = json.loads((folder / "meta.json").read_text())
        self.inputs = {name: tensor.float() if tensor.is_floating_point() else tensor
                       for name, tensor in load_file(folder / "inputs.safetensors").items()}  # fmt: skip
        self.state = load_file(folder / "checkpoint.safetensors")
        self.outputs = {}
        for sampler in self.meta["samplers"]:
            self.outputs[sampler] = load_file(folder / f"golden_{sampler}.safetensors")
        self.checked: set[tuple[str, str]] = set()

    def planner(self, **changes):
        state = self.state
        if changes:  # a planner of another process does not carry the DDIM buffers of the file
            state = {name: tensor for name, tensor in state.items() if ".ddim_" not in name and ".ddpm_" not in name}
            state = {name: tensor for name, tensor in state.items() if "eta_logit" not in name}
        planner, _ = from_published(state, **changes)
        return planner.eval()

    def condition(self, planner, **options):
        history = self.inputs["his_traj"].reshape(-1, 4, 3)
        return planner.condition(self.inputs["vl_features"], None, history, self.inputs["status_feature"], **options)

    def noise(self, prefix: str = "") -> ChainNoise:
        return ChainNoise(self.inputs[f"{prefix}init_noise"], self.inputs[f"{prefix}step_noise"])

    def check(self, sampler: str, key: str, value: torch.Tensor, clamp: tuple[float, float] | None = None) -> None:
        wanted = self.outputs[sampler][key] if key in self.outputs[sampler] else self.outputs["ddim"][key]
        noise, largest = self.meta["fp64_error"][sampler][key]
        tolerance = max(20 * noise, 2e-6 * largest)
        value = value.detach().reshape(wanted.shape)
        if clamp is not None:
            wanted, value = wanted.clamp(*clamp), value.clamp(*clamp)
        error = (value.double() - wanted.double()).abs().max().item()
        assert error <= tolerance, f"{sampler} {key}: {error:.3g} > {tolerance:.3g}"
        self.checked.add((sampler, key))


@pytest.fixture(scope="module", params=CASES)
def golden(request) -> Golden:
    folder = IN_TREE / request.param
    if not folder.is_dir():
        from reference_data import reference_path

        folder = reference_path(f"golden/planner/{request.param}")
    return Golden(folder)


def test_sub_encoders_and_transformer(golden):
    planner = golden.planner()
    inputs = golden.inputs
    with torch.no_grad():
        for deferred in (None, 8):
            conditioning = golden.condition(planner, queries_per_scene=deferred)
            assert (conditioning.layers[0].value is None) == (deferred is not None)
            out, states, fused = planner.denoise(inputs["dit.x"], inputs["dit.t"], conditioning)
            golden.check("ddim", "mod.feature_encoder", conditioning.tokens)
            golden.check("ddim", "mod.his_traj_encoder", conditioning.history)
            golden.check("ddim", "mod.ego_status_encoder", conditioning.ego)
            golden.check("ddim", "mod.action_encoder", planner.action_encoder(inputs["dit.x"], inputs["dit.t"]))
            golden.check("ddim", "mod.fused_input", fused)
            golden.check("ddim", "mod.timestep_encoder", planner.model.timestep_encoder(inputs["dit.t"]))
            golden.check("ddim", "dit.out", out)
            golden.check("ddim", "dit.hidden_states", torch.stack(states))
            golden.check("ddim", "dit.decoded", planner.decode(out))


def test_normaliser(golden):
    action = golden.inputs["action"]
    waypoint, delta = TrajectoryNormaliser(PUBLISHED["waypoint"]), TrajectoryNormaliser(PUBLISHED["delta"])
    golden.check("ddim", "norm_odo", waypoint.normalise(action))
    golden.check("ddim", "newest.waypoint_norm", waypoint.normalise(action))
    golden.check("ddim", "denorm_norm_odo", waypoint.denormalise(waypoint.normalise(action)))
    golden.check("ddim", "newest.delta", to_target(action, "delta"))
    golden.check("ddim", "newest.delta_norm", delta.normalise(action))
    golden.check("ddim", "newest.delta_denorm_of_noise", delta.denormalise(golden.inputs["init_noise"].clamp(-1, 1)))


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("sampler", ["ddim", "flow"])
def test_training_loss_and_gradients(golden, sampler, deferred):
    if sampler not in golden.meta["samplers"]:
        pytest.skip(f"the reference case has no {sampler} sampler")
    planner = golden.planner(**(NETWORK_TIME_FLOW if sampler == "flow" else {}))
    inputs = golden.inputs
    time = inputs["train.t"] if sampler == "ddim" else planner.process.time_of_beta(inputs["train.beta_sample"])
    conditioning = golden.condition(planner, queries_per_scene=8 if deferred else None)
    loss = planner.training_loss(conditioning, inputs["action"], inputs["train.noise"], time)
    golden.check(sampler, "train.loss", loss)
    loss.backward()
    check_gradients(golden, sampler, "train", planner)


def check_gradients(golden, sampler: str, prefix: str, planner) -> None:
    for key in golden.outputs[sampler]:
        if key.startswith(f"{prefix}.gradnorm."):
            module = key.removeprefix(f"{prefix}.gradnorm.")
            owner = planner if module == "TOTAL" else planner.get_submodule(module)
            squares = [p.grad.double().pow(2).sum() for p in owner.parameters() if p.grad is not None]
            golden.check(sampler, key, torch.stack(squares).sum().sqrt())
        elif key.startswith(f"{prefix}.grad."):
            golden.check(sampler, key, planner.get_parameter(key.removeprefix(f"{prefix}.grad.")).grad)


def run(golden, planner, exploration, noise=None, group_size=1, process=None):
    with torch.no_grad():
        return sample_chain(planner, golden.condition(planner), noise=noise or golden.noise(),
                            exploration=exploration, group_size=group_size, process=process)  # fmt: skip


def test_ddim_chains_and_densities(golden):
    planner = golden.planner()
    deterministic = run(golden, planner, Exploration.preset("deterministic"))
    golden.check("ddim", "chain.det", deterministic.states)
    golden.check("ddim", "chain.det.traj", planner.trajectories(deterministic))
    golden.check("ddim", "get_action.det", planner.trajectories(deterministic))
    golden.check("ddim", "get_action.stoch", planner.trajectories(
        run(golden, planner, Exploration.preset("published_evaluation"))))  # fmt: skip
    chain = run(golden, planner, Exploration.preset("published"))
    golden.check("ddim", "chain.stoch", chain.states)
    golden.check("ddim", "chain.stoch.traj", planner.trajectories(chain))
    conditioning = golden.condition(planner)
    golden.check("ddim", "logprobs", log_prob(planner, conditioning, chain))
    for mode, exploration in (("det", Exploration.preset("deterministic")), ("stoch", chain.exploration)):
        with torch.no_grad():
            rows = [step_of(planner, conditioning, chain, k, exploration) for k in range(5)]
        for i, name in enumerate(("mean", "logvar", "x_recon")):
            golden.check("ddim", f"pmv.{mode}.{name}", torch.stack([row[i] for row in rows], dim=1))


def step_of(planner, conditioning, chain, k, exploration):
    """Mean, log(std^2 + 1e-20) and clipped data estimate of one step along a chain."""
    from stage2_dit.diffusion.ddim import clipped_data

    x = chain.states[:, k]
    noise = planner(x, torch.full((len(x),), planner.process.times[k]), conditioning)
    mean, std = planner.process.step(k, x, noise, exploration)
    logvar = torch.log(std.expand(len(x), 1, 1) ** 2 + 1e-20)
    return mean, logvar, clipped_data(x, noise, planner.process.step_bar[k])


def test_groups_share_the_context(golden):
    planner, count = golden.planner(), golden.meta["group"]
    chain = run(golden, planner, Exploration.preset("published"), golden.noise("grpo."), count)
    golden.check("ddim", "grpo.chains", chain.states)
    golden.check("ddim", "grpo.trajs", planner.trajectories(chain))
    golden.check("ddim", "grpo.logprobs", log_prob(planner, golden.condition(planner), chain))
    if golden.meta["actor_is_reference"]:
        teacher = run(golden, planner, Exploration.preset("published"), golden.noise("grpo.teacher_"))
        golden.check("ddim", "grpo.teacher_chains", teacher.states)


def test_ddpm_published_variant(golden):
    if "ddpm" not in golden.meta["samplers"]:
        pytest.skip("the reference case has no ddpm sampler")
    planner = golden.planner()
    process = build_process("ddpm_published")
    evaluation = Exploration.preset("published_evaluation_ddpm")
    chain = run(golden, planner, evaluation, process=process)
    golden.check("ddpm", "get_action.det", planner.trajectories(chain))
    golden.check("ddpm", "get_action.stoch", planner.trajectories(chain))
    chain = run(golden, planner, dataclasses.replace(evaluation, noise_clip=5.0), process=process)
    golden.check("ddpm", "chain.det", chain.states)
    golden.check("ddpm", "chain.det.traj", planner.trajectories(chain))
    chain = run(golden, planner, Exploration.preset("published"), process=process)
    golden.check("ddpm", "chain.stoch", chain.states)
    golden.check("ddpm", "chain.stoch.traj", planner.trajectories(chain))


def test_flow_chains_and_densities(golden):
    if "flow" not in golden.meta["samplers"]:
        pytest.skip("the reference case has no flow sampler")
    planner = golden.planner(process="flow_ode")
    chain = run(golden, planner, Exploration(final_clip=None))
    golden.check("flow", "chain.det", chain.states)
    golden.check("flow", "chain.det.traj", planner.trajectories(chain))
    clipped = run(golden, planner, Exploration())
    golden.check("flow", "get_action.det", planner.trajectories(clipped))
    for kind in ("sde", "cps"):
        planner = golden.planner(process=f"flow_published_{kind}")
        chain = run(golden, planner, Exploration.preset("published_flow"))
        golden.check("flow", f"newest.flow_{kind}.chain", chain.states)
        density = log_prob(planner, golden.condition(planner), chain)
        average = density.mean(dim=(2, 3))
        golden.check("flow", f"newest.flow_{kind}.logprobs", average, clamp=(-5.0, 2.0))
        golden.check("flow", f"newest.flow_{kind}.t_buckets", torch.tensor(chain.times).float().expand(len(chain), -1))


def test_flow_mean_variance_head(golden):
    if "flow_mv" not in golden.meta["samplers"]:
        pytest.skip("the reference case has no mean and variance head")
    head = {name: tensor for name, tensor in golden.outputs["flow_mv"].items() if name.startswith("action_decoder")}
    original = dict(golden.state)
    golden.state |= {f"agent.action_head.{name}": tensor for name, tensor in head.items()}
    planner = golden.planner(process="flow_ode")
    golden.state = original
    assert planner.config.mean_variance
    golden.check("flow_mv", "get_action.det", planner.trajectories(run(golden, planner, Exploration())))


STAGE_3 = ("grpo.reinforce", "grpo.rpp", "clip.", "newest.grpo", "newest.adv", "newest.old_logprobs", "newest.ref")


def test_every_stage_2_tensor_was_checked(golden):
    """Runs last: names every tensor of the reference that no test above looked at."""
    left = []
    for sampler, outputs in golden.outputs.items():
        for key in outputs:
            later = key.startswith(STAGE_3) or "flow_sde.grad" in key or "flow_cps.grad" in key
            weights = key.startswith("action_decoder.")
            other = key == "grpo.teacher_chains" and not golden.meta["actor_is_reference"]
            if (sampler, key) not in golden.checked and not (later or weights or other):
                left.append(f"{sampler} {key}")
    assert not left
