"""What learns and how: loss on answers, freezing, LoRA and its merged form, checkpointing, stochastic depth."""

import pytest
import torch
from torch.nn import functional

from navsim_ext.errors import DataError
from stage1_vlm.adapters import LoraSettings, add_lora, freeze, has_adapters, merged_state_dict
from stage1_vlm.collate import pack, pad
from stage1_vlm.drop_path import add_drop_path, drop_path
from stage1_vlm.loading import load_backbone
from stage1_vlm.module import answer_loss
from stage1_vlm.processor import Turn

SETTINGS = LoraSettings(rank=4, alpha=8, dropout=0.0)


@pytest.fixture
def conversations(internvl, make_picture):
    encode = internvl.processor.encode
    return [
        encode([Turn("user", "<image>\nWhat?"), Turn("assistant", "red")], [make_picture(0)]),
        encode([Turn("user", "<image>\nIs a car ahead?"), Turn("assistant", "yes. no.")], [make_picture(1)]),
        encode([Turn("user", "Is 4 even?"), Turn("assistant", "yes")], []),
    ]


def gradients(backbone):
    return {n: p.grad.clone() for n, p in backbone.model.named_parameters() if p.grad is not None}


def test_loss_is_that_of_transformers_and_of_its_definition(backbone, make_picture):
    encode = backbone.processor.encode
    several = [
        encode([Turn("user", "<image>\nWhat?"), Turn("assistant", "red")], [make_picture(0)]),
        encode([Turn("user", "Is a car ahead?"), Turn("assistant", "yes. no.")], []),
    ]
    batch = pad(several, backbone.processor.pad_token_id)
    loss, count = answer_loss(backbone, batch)
    output = backbone.model(**backbone.model_inputs(batch), labels=batch.labels)
    torch.testing.assert_close(loss, output.loss)
    per_token = functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="none", ignore_index=-100
    )
    torch.testing.assert_close(loss, per_token.sum() / count)
    assert int(count) == sum(int((one.labels != -100).sum()) for one in several)
    several[0].labels[:] = several[1].labels[:] = -100
    with pytest.raises(DataError, match="no answer token"):
        answer_loss(backbone, pad(several, 0))


def test_packed_and_padded_batches_give_the_same_loss_and_gradients(internvl, conversations):
    answer_loss(internvl, pad(conversations, 0))[0].backward()
    expected = gradients(internvl)
    internvl.model.zero_grad()
    loss, _ = answer_loss(internvl, pack([conversations[:2], conversations[2:]], 0))
    loss.backward()
    for name, gradient in gradients(internvl).items():
        torch.testing.assert_close(gradient, expected[name], atol=2e-6, rtol=1e-4)


def test_gradient_checkpointing_changes_no_bit(internvl, conversations):
    internvl.model.train()
    loss, _ = answer_loss(internvl, pad(conversations, 0))
    loss.backward()
    expected = gradients(internvl)
    internvl.model.zero_grad()
    internvl.model.gradient_checkpointing_enable({"use_reentrant": False})
    again, _ = answer_loss(internvl, pad(conversations, 0))
    again.backward()
    assert torch.equal(loss, again)
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(internvl).items())


@pytest.mark.parametrize("frozen", ["vision", "projector", "language"])
def test_frozen_parts_get_no_gradient_and_the_others_do(backbone, make_picture, frozen):
    freeze(backbone, {frozen: True})
    turns = [Turn("user", "<image>\nWhat?"), Turn("assistant", "red")]
    answer_loss(backbone, pad([backbone.processor.encode(turns, [make_picture(0)])], 0))[0].backward()
    for part, modules in backbone.parts.items():
        learns = [p.grad is not None for module in modules for p in module.parameters()]
        assert any(learns) == (part != frozen)
    everything = {id(p) for modules in backbone.parts.values() for m in modules for p in m.parameters()}
    assert everything == {id(p) for p in backbone.model.parameters()}


def test_freezing_nothing_that_exists_or_everything_is_an_error(internvl):
    with pytest.raises(DataError, match="cannot freeze"):
        freeze(internvl, {"llm": True})
    with pytest.raises(DataError, match="nothing to train"):
        freeze(internvl, {"vision": True, "projector": True, "language": True})


def test_lora_touches_the_language_model_only_and_merges_exactly(internvl, conversations):
    batch = pad(conversations, 0)
    before = internvl.last_hidden_states(batch)
    adapter = add_lora(internvl, SETTINGS)
    trainable = [name for name, p in internvl.model.named_parameters() if p.requires_grad]
    assert all("language_model.layers" in name or "multi_modal_projector" in name for name in trainable)
    assert not any("vision_tower" in name for name in trainable)
    torch.testing.assert_close(internvl.last_hidden_states(batch), before)  # B starts at zero
    with torch.no_grad():
        for name, parameter in internvl.model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    adapted = internvl.last_hidden_states(batch)
    state = internvl.model.state_dict()
    merged = merged_state_dict(state, SETTINGS.alpha / SETTINGS.rank)
    assert has_adapters(state)
    assert not has_adapters(merged)
    plain = load_backbone(internvl.model.config.name_or_path)
    plain.model.load_state_dict(merged, strict=True)
    plain.model.eval()
    torch.testing.assert_close(plain.last_hidden_states(batch), adapted, atol=3e-6, rtol=1e-5)
    assert (adapted - before).abs().max() > 1e-2
    assert adapter.peft_config["default"].r == 4


@pytest.mark.parametrize(("change", "message"), [({"targets": "nothing"}, "matches no"), ({"save": ("mlp9",)}, "mlp9")])
def test_lora_that_hits_nothing_is_an_error(internvl, change, message):
    with pytest.raises(DataError, match=message):
        add_lora(internvl, LoraSettings(**change))


def test_drop_path_drops_whole_rows_and_keeps_the_mean():
    torch.manual_seed(0)
    branch = torch.ones(20_000, 3, 2)
    dropped = drop_path(branch, 0.25)
    rows = dropped.flatten(1)
    assert ((rows == 0).all(1) | torch.isclose(rows, torch.tensor(4 / 3)).all(1)).all()
    assert abs(float(dropped.mean()) - 1.0) < 0.02
    assert abs(float((rows == 0).all(1).float().mean()) - 0.25) < 0.02


def test_drop_path_acts_in_training_only_and_leaves_the_state_dict(internvl, conversations):
    batch = pad(conversations, 0)
    names = list(internvl.model.state_dict())
    before = internvl.last_hidden_states(batch)
    handles = add_drop_path(internvl, 0.5)
    assert len(handles) == 2  # two layers, the first with probability 0
    assert list(internvl.model.state_dict()) == names
    assert torch.equal(internvl.last_hidden_states(batch), before)
    internvl.model.train()
    torch.manual_seed(0)
    draws = [internvl.last_hidden_states(batch) for _ in range(4)]
    assert any((draw - before).abs().max() > 1e-4 for draw in draws)
    torch.manual_seed(0)
    internvl.model.gradient_checkpointing_enable({"use_reentrant": False})
    loss, _ = answer_loss(internvl, batch)
    loss.backward()  # recomputation draws the same rows
    checkpointed = gradients(internvl)
    internvl.model.zero_grad()
    internvl.model.gradient_checkpointing_disable()
    torch.manual_seed(0)
    answer_loss(internvl, batch)[0].backward()
    assert all(torch.equal(g, checkpointed[n]) for n, g in gradients(internvl).items())


def test_drop_path_refuses_a_family_without_rows(tiny_qwen):
    with pytest.raises(DataError, match="drop_path=0"):
        add_drop_path(load_backbone(tiny_qwen), 0.1)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_loss_and_gradients(backbone, make_picture):
    from stage1_vlm.module import answer_loss, compile_blocks

    turns = [Turn("user", "<image>\nWhat is ahead?"), Turn("assistant", "a car")]
    batch = pack([[backbone.processor.encode(turns, [make_picture(0)])]], backbone.processor.pad_token_id)
    found = []
    for compiled in (False, True):
        if compiled:
            compile_blocks(backbone.model)
            assert sum(module._compiled_call_impl is not None for module in backbone.model.modules()) > 4
        loss, _ = answer_loss(backbone, batch)
        backbone.model.zero_grad()
        loss.backward()
        gradients = [p.grad.flatten().clone() for p in backbone.model.parameters() if p.grad is not None]
        found.append((loss.detach(), torch.cat(gradients)))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)
