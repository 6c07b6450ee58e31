"""Published checkpoints there and back: every key accounted for, nothing that does not fit accepted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from damage import judge_damage
from safetensors.torch import load_file, save_file

from navsim_ext.errors import MissingError
from stage2_dit import CheckpointMismatch, load_planner
from stage2_dit.checkpoint import planner_record
from stage2_dit.convert import read_published, to_ours, to_theirs
from stage2_dit.published import PREFIXES, WRAPPERS, from_published

GOLDEN = Path(__file__).parents[1] / "golden" / "planner"
CASES = ("attention_ego", "large_scaled")


@pytest.fixture(params=CASES)
def published(request) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / request.param / "checkpoint.safetensors")


def renamed(state, old: str, new: str):
    return {new + name.removeprefix(old): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("form", ["lightning", "exported"])
def test_round_trip_is_exact(published, tmp_path, form):
    source = tmp_path / "published.ckpt"
    torch.save({"state_dict": published, "epoch": 3}, source)
    ours, report = to_ours(source, tmp_path / "ours.safetensors", normaliser="waypoint")
    back, count = to_theirs(ours, tmp_path / "back.ckpt", form=form)
    prefix = {"lightning": PREFIXES[0], "exported": PREFIXES[1]}[form]
    returned = renamed(read_published(back), prefix, PREFIXES[0])
    assert count == len(published) == len(report.parameters) + len(report.recomputed)
    assert returned.keys() == published.keys()
    tables = {name for name in published if name.removeprefix(PREFIXES[0]) in set(report.recomputed)}
    for name, tensor in published.items():
        expected = tensor.to(returned[name].dtype)
        if name in tables and expected.is_floating_point():  # float32 roots differ by an ulp between machines
            torch.testing.assert_close(returned[name], expected, rtol=2.0**-22, atol=0.0)
        else:
            assert torch.equal(returned[name], expected), name
    assert tables


def test_sizes_come_from_the_shapes(published):
    config = from_published(published)[0].config
    assert (config.num_heads, config.head_width, config.output_width) == (4, 16, 64)
    assert config.hidden_width == published["agent.action_head.feature_encoder.weight"].shape[1]
    assert config.process == "ddim"
    assert config.padding == "upstream"


def test_strays_missing_eta_and_other_modules(published):
    state = dict(published)
    del state["agent.action_head.eta.eta_logit"]
    weight = published["agent.action_head.feature_encoder.bias"]
    state |= {
        "agent.action_head.old_policy.feature_encoder.bias": weight,
        "agent.action_head.ref_policy.eta.eta_logit": weight,
        "agent.backbone.layer.weight": weight,
    }
    planner, report = from_published(state)
    assert len(report.strays) == 2
    assert report.foreign == ["agent.backbone.layer.weight"]
    assert len(report.parameters) + len(report.recomputed) + 3 == len(state)
    assert torch.equal(planner.feature_encoder.bias, weight.float())


def test_every_misfit_is_listed_with_both_shapes(published):
    state = dict(published)
    state["agent.action_head.fusion_projector.weight"] = torch.zeros(3, 5)
    del state["agent.action_head.action_encoder.fc3.bias"]
    state["agent.action_head.surprise"] = torch.zeros(2)
    state["agent.action_head.ddpm_betas"] = torch.zeros(100)
    with pytest.raises(CheckpointMismatch) as error:
        from_published(state)
    text = str(error.value)
    assert "fusion_projector.weight: (3, 5) in the file | (64, 192)" in text
    assert "action_encoder.fc3.bias: missing in the file | (64,) in the planner" in text
    assert "surprise: (2,) in the file | unknown to the planner" in text
    assert "ddpm_betas: the values differ from the schedule" in text


def test_process_must_be_said_where_the_file_does_not(published):
    state = {name: tensor for name, tensor in published.items() if ".ddim_" not in name}
    with pytest.raises(CheckpointMismatch, match="process=ddpm or process=flow_ode"):
        from_published(state)
    assert from_published(state, process="ddpm_published")[0].config.process == "ddpm_published"


def test_bad_files(tmp_path, published):
    with pytest.raises(MissingError, match=r"nowhere\.ckpt does not exist"):
        read_published(tmp_path / "nowhere.ckpt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(CheckpointMismatch, match="cut short"):
        read_published(tmp_path / "cut.safetensors")
    torch.save({"state_dict": {"a": torch.zeros(1)}, "agent": Path("x")}, tmp_path / "code.ckpt")
    with pytest.raises(CheckpointMismatch, match="without executing"):
        read_published(tmp_path / "code.ckpt")
    torch.save({"weights": {"a": 1}}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointMismatch, match="no state dict of tensors"):
        read_published(tmp_path / "other.ckpt")
    with pytest.raises(CheckpointMismatch, match=r"under none of the prefixes"):
        from_published({"model.weight": torch.zeros(1)})
    save_file(published, tmp_path / "raw.safetensors")
    with pytest.raises(CheckpointMismatch, match=r"stage2_dit\.convert"):
        load_planner(tmp_path / "raw.safetensors")


def half(state):
    return {name: value.to(torch.bfloat16) if value.is_floating_point() else value for name, value in state.items()}


def wrapped(state, wrapper: str):
    """The names that DDP (in front) or torch.compile and DeepSpeed (around a part) would give."""
    return {f"{wrapper}.{name}".replace(".model.", f".model.{wrapper}."): value for name, value in state.items()}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_names_of_wrappers_and_bf16_are_understood(published, tmp_path, wrapper, dtype):
    state = half(published) if dtype == torch.bfloat16 else published
    torch.save({"state_dict": wrapped(state, wrapper)}, tmp_path / "published.ckpt")
    ours, report = to_ours(tmp_path / "published.ckpt", tmp_path / "ours.safetensors", normaliser="waypoint")
    planner = load_planner(ours).planner
    assert report.recomputed
    for name in report.parameters:
        assert torch.equal(planner.state_dict()[name], state[report.prefix + name].float()), name
    record = {"planner": planner_record(planner, None), "callbacks": {}}
    live = {f"planner.{name}": value.to(dtype) for name, value in planner.state_dict().items()}
    torch.save(record | {"state_dict": wrapped(live, wrapper)}, tmp_path / "run.ckpt")
    again = load_planner(tmp_path / "run.ckpt").planner
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in planner.state_dict().items())
    assert all(value.dtype == torch.float32 for value in again.parameters())


def test_a_table_of_another_schedule_is_refused_in_bf16_too(published):
    state = half(published)
    name = next(name for name in from_published(state)[1].recomputed if state[PREFIXES[0] + name].is_floating_point())
    with pytest.raises(CheckpointMismatch, match="differ from the schedule"):
        from_published(state | {PREFIXES[0] + name: state[PREFIXES[0] + name] * 1.02})


def test_one_weight_under_two_names_is_refused(published):
    name = next(iter(published))
    with pytest.raises(CheckpointMismatch, match="twice"):
        from_published({**published, f"module.{name}": published[name]})


def test_no_damage_of_a_planner_changes_it_in_silence(published, tmp_path):
    torch.save({"state_dict": published}, tmp_path / "published.ckpt")
    folder = tmp_path / "planner"
    ours, _ = to_ours(tmp_path / "published.ckpt", folder / "ours.safetensors", normaliser="waypoint")
    verdicts = judge_damage(folder, lambda: load_planner(ours).fingerprint.digest, np.random.default_rng(0), 60)
    assert verdicts == {"ours.safetensors": {"named": 60, "without effect": 0}}
