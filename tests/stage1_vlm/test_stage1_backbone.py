"""One contract, two families: chat form, hidden states, padding, packing, decoding, loading."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from navsim_ext.errors import DataError, MissingError
from stage1_vlm.collate import pack, pad
from stage1_vlm.folder import CheckpointError
from stage1_vlm.loading import load_backbone
from stage1_vlm.processor import IGNORED_LABEL, Turn, turns_from_conversation
from stage1_vlm.weights import weights_digest

QUESTION = Turn("user", "<image>\nWhat does the traffic light show?")


def examples(backbone, make_picture):
    encode = backbone.processor.encode
    return [
        encode([QUESTION, Turn("assistant", "red")], [make_picture(0)], name="one"),
        encode(
            [Turn("user", "<image>\n<image>\nIs a car ahead?"), Turn("assistant", "yes")],
            [make_picture(1), make_picture(2, 54, 120)],
            name="two",
        ),
        encode([Turn("user", "Is 4 even?"), Turn("assistant", "yes. no.")], [], name="none"),
    ]


def test_chat_form_and_labels(backbone, make_picture):
    processor = backbone.processor
    turns = [QUESTION, Turn("assistant", "red"), Turn("user", "And now?"), Turn("assistant", "green")]
    example = processor.encode(turns, [make_picture(0)])
    text = processor.tokenizer.decode(example.input_ids)
    count = processor.image_tokens(96, 54)
    picture = processor.image_start + processor.image_token * count + processor.image_end
    assert text == (
        f"<|im_start|>system\n{processor.default_system}<|im_end|>\n"
        f"<|im_start|>user\n{picture}\nWhat does the traffic light show?<|im_end|>\n"
        "<|im_start|>assistant\nred<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n"
        "<|im_start|>assistant\ngreen<|im_end|>\n"
    )
    learnt = example.labels != IGNORED_LABEL
    assert torch.equal(example.labels[learnt], example.input_ids[learnt])
    assert processor.tokenizer.decode(example.labels[learnt]) == "red<|im_end|>green<|im_end|>"
    own_system = processor.encode([Turn("system", "Drive."), *turns[:2]], [make_picture(0)])
    assert processor.tokenizer.decode(own_system.input_ids).startswith("<|im_start|>system\nDrive.<|im_end|>")


def test_prompt_is_the_beginning_of_the_conversation(backbone, make_picture):
    asked = backbone.processor.encode([QUESTION], [make_picture(0)], generation_prompt=True)
    whole = backbone.processor.encode([QUESTION, Turn("assistant", "red")], [make_picture(0)])
    assert torch.equal(whole.input_ids[: len(asked)], asked.input_ids)
    assert (asked.labels == IGNORED_LABEL).all()
    assert whole.labels[len(asked)] != IGNORED_LABEL


def test_wrong_pictures_and_reserved_tokens_are_named(backbone, make_picture):
    with pytest.raises(DataError, match="1 <image> in the text, 0 pictures"):
        backbone.processor.encode([QUESTION], [])
    sneaky = Turn("user", f"<image>\nIs {backbone.processor.image_token} a car?")
    with pytest.raises(DataError, match="reserved token"):
        backbone.processor.encode([sneaky], [make_picture(0)])


@torch.no_grad()
def test_hidden_states_equal_those_of_the_full_model(backbone, make_picture):
    batch = pad(examples(backbone, make_picture), backbone.processor.pad_token_id)
    hidden = backbone.last_hidden_states(batch)
    output = backbone.model(**backbone.model_inputs(batch), output_hidden_states=True)
    valid = batch.attention_mask.bool()
    assert torch.equal(hidden[valid], output.hidden_states[-1][valid])
    torch.testing.assert_close(backbone.logits(hidden)[valid], output.logits[valid])
    assert hidden.shape[-1] == backbone.hidden_width


@torch.no_grad()
def test_neighbours_and_padding_change_nothing(backbone, make_picture):
    alone = [backbone.last_hidden_states(pad([one], 0))[0] for one in examples(backbone, make_picture)]
    padded = backbone.last_hidden_states(pad(examples(backbone, make_picture), 0))
    packed_batch = pack([examples(backbone, make_picture)[:2], examples(backbone, make_picture)[2:]], 0)
    packed = backbone.last_hidden_states(packed_batch)
    rows = [packed[0, : len(alone[0])], packed[0, len(alone[0]) : len(alone[0]) + len(alone[1])], packed[1]]
    for number, own in enumerate(alone):
        torch.testing.assert_close(padded[number, : len(own)], own, atol=3e-6, rtol=0)
        torch.testing.assert_close(rows[number][: len(own)], own, atol=3e-6, rtol=0)


@torch.no_grad()
def test_packing_with_a_mask_would_mix_conversations(internvl, make_picture):
    """The trap that pack() avoids: with an all-ones mask the positions no longer keep conversations apart."""
    several = examples(internvl, make_picture)
    batch = pack([several], 0)
    positions = internvl.position_ids(batch)
    leaky = internvl.model.model(
        **{**internvl.model_inputs(batch), "attention_mask": torch.ones_like(batch.input_ids)}, position_ids=positions
    ).last_hidden_state
    second = slice(len(several[0]), len(several[0]) + len(several[1]))
    assert (leaky - internvl.last_hidden_states(batch))[0, second].abs().max() > 1e-3


def test_packed_labels_never_cross_conversations(internvl, make_picture):
    several = examples(internvl, make_picture)
    several[1].labels[0] = 7  # were a first token ever learnt
    batch = pack([several], 0)
    assert batch.labels[0, len(several[0])] == IGNORED_LABEL
    assert batch.valid_tokens == sum(map(len, several))
    assert len(batch) == 3


def test_answers_do_not_depend_on_the_batch(backbone, make_picture):
    asked = [
        backbone.processor.encode([QUESTION], [make_picture(0)], generation_prompt=True),
        backbone.processor.encode([Turn("user", "Is it?")], [], generation_prompt=True),
    ]
    together = backbone.answer(asked, 6)
    assert together == [backbone.answer([one], 6)[0] for one in asked]


def test_saving_and_loading_round_trips(backbone, tmp_path):
    backbone.save_pretrained(tmp_path)
    again = load_backbone(tmp_path, max_image_tokens=16)
    for (name, mine), (_, theirs) in zip(backbone.model.state_dict().items(), again.model.state_dict().items()):
        assert torch.equal(mine, theirs), name
    assert again.processor.fingerprint_fields() == backbone.processor.fingerprint_fields()
    assert weights_digest(tmp_path) == weights_digest(tmp_path)


def test_bfloat16_and_empty_initialisation(tiny_internvl):
    loaded = load_backbone(tiny_internvl, dtype="bfloat16")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert not any(p.is_meta for p in loaded.model.parameters())


@pytest.mark.parametrize("damage", ["missing", "renamed"])
def test_a_weight_that_is_not_there_is_named(tiny_internvl, tmp_path, damage):
    folder = shutil.copytree(tiny_internvl, tmp_path / "damaged")
    (folder / "checksums.json").unlink()  # as somebody else would have written it
    weights = load_file(folder / "model.safetensors")
    taken = weights.pop("multi_modal_projector.linear_1.weight")
    if damage == "renamed":
        weights["multi_modal_projector.linear_9.weight"] = taken
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"multi_modal_projector\.linear_"):
        load_backbone(folder)


def test_other_folders_are_refused_with_a_remedy(tmp_path):
    with pytest.raises(MissingError, match=r"config\.json"):
        load_backbone(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["InternVLChatModel"]}))
    with pytest.raises(CheckpointError, match=r"stage1_vlm\.convert"):
        load_backbone(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(CheckpointError, match="llava"):
        load_backbone(tmp_path)


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([{"from": "human", "value": "a"}], "take turns"),
        ([{"from": "gpt", "value": "a"}, {"from": "human", "value": "a"}], "take turns"),
        ([{"from": "human", "value": "a"}, {"from": "gpt", "value": "  "}], "empty answer"),
        ([{"from": "cat", "value": "a"}], "unknown speaker"),
        ([{"from": "human", "value": 3}], "value"),
        ([], "take turns"),
    ],
)
def test_malformed_conversations_are_named(conversation, message):
    with pytest.raises(DataError, match=message):
        turns_from_conversation(conversation)


def test_cache_bytes_are_those_of_the_keys_and_values(backbone, make_picture):
    turns = [Turn("user", "<image>\nWhat does the traffic light show?")]
    batch = pad([backbone.processor.encode(turns, [make_picture(0)])], backbone.processor.pad_token_id)
    with torch.no_grad():
        cache = backbone.model(**backbone.model_inputs(batch), use_cache=True).past_key_values
    stored = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    assert stored == batch.input_ids.numel() * backbone.cache_bytes()


def test_pictures_that_a_family_cannot_take_are_named(tiny_qwen):
    processor = load_backbone(tiny_qwen, max_image_tokens=16).processor
    assert processor.image_tokens(2000, 10) > 0
    with pytest.raises(DataError, match="at most 200 times as long as wide"):
        processor.image_tokens(2001, 10)
    with pytest.raises(DataError, match="100000 pictures share"):
        processor.image_tokens(100, 100, pictures=100_000)
