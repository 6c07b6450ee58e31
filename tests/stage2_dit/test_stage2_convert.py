"""Published checkpoints there and back: every key accounted for, nothing that does not fit accepted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from navsim_ext.errors import MissingError
from stage2_dit import CheckpointMismatch, load_planner
from stage2_dit.convert import read_published, to_ours, to_theirs
from stage2_dit.published import PREFIXES, from_published

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
