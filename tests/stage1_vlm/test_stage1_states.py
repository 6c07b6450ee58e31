"""Hidden states from the export and from the live source: the full model's own, resumable, the same for any split."""

import shutil
import signal
import time
from dataclasses import replace

import forked
import pytest
import torch

from navsim_ext.dataset import SceneDataset
from navsim_ext.errors import DataError, MissingError
from navsim_ext.fingerprint import FingerprintMismatch
from navsim_ext.hidden_cache import CachedHiddenStates, require_states
from navsim_ext.runtime.config import compose
from navsim_ext.scene import collate_scenes
from stage1_vlm.collate import pad
from stage1_vlm.export import export
from stage1_vlm.live import LiveSceneEncoder, TrainableStates, live_states
from stage1_vlm.states import StateEncoder

OPTIONS = {"dtype": "float32", "max_image_tokens": 16}


def config(model, index, folder, **changes):
    values = {"model_path": model, "output_dir": folder, "data.index": index, "batch_size": 1, "num_workers": 0}
    values |= OPTIONS | changes
    return compose("export", [f"{key}={'null' if value is None else value}" for key, value in values.items()])


def files_of(folder):
    names = ("store.json", *(path.name for path in folder.glob("*.safetensors")))
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def exported(tiny_internvl, scene_index, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "whole"
    counts = export(config(tiny_internvl, scene_index, folder))
    assert counts == {"stored": 20, "skipped": 0, "already": 0}
    return folder


@pytest.fixture(scope="module")
def encoder(tiny_internvl, scene_index):
    return StateEncoder.load(str(tiny_internvl), str(scene_index), **OPTIONS)


@torch.no_grad()
def test_exported_states_equal_the_full_models_last_hidden_states(exported, encoder):
    cache = CachedHiddenStates(exported)
    assert sorted(cache.tokens) == sorted(encoder.questions.tokens)
    tokens = encoder.questions.tokens[:5]
    batch = cache.fetch(tokens)
    for row, token in enumerate(tokens):
        example = encoder.questions.encode(token)
        inputs = encoder.backbone.model_inputs(pad([example], 0))
        full = encoder.backbone.model(**inputs, output_hidden_states=True).hidden_states[-1][0]
        assert int(batch.lengths[row]) == len(example)
        assert torch.equal(batch.hidden[row, : len(example)], full.to(torch.bfloat16))
    assert len({len(encoder.questions.encode(token)) for token in tokens}) > 1


def test_question_holds_the_scene(encoder):
    token = encoder.questions.tokens[3]
    text = encoder.backbone.processor.tokenizer.decode(encoder.questions.encode(token).input_ids)
    assert "t-1: (-2.00, -0.30, +0.00), t-0: (+0.00, +0.00, +0.00)" in text
    assert "[UNKNOWN]" in text
    assert text.endswith("<|im_start|>assistant\n")
    assert encoder.questions.encode(token).input_ids.tolist()[: len(encoder.questions.prefix_ids())] == (
        encoder.questions.prefix_ids()
    )


def test_a_kill_9_resumes_to_the_same_bytes(exported, tiny_internvl, scene_index, tmp_path):
    folder = tmp_path / "killed"
    values = {"model_path": tiny_internvl, "output_dir": folder, "data.index": scene_index, "batch_size": 1}
    values |= OPTIONS | {"num_workers": 0}
    process = forked.start("-m", "stage1_vlm.export", *(f"{key}={value}" for key, value in values.items()))
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size > 0 for path in folder.glob("*0*")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(folder.glob("part-*"))  # it had not come to the end
    counts = export(config(tiny_internvl, scene_index, folder))
    assert counts["stored"] + counts["already"] == 20
    assert files_of(folder) == files_of(exported)
    again = export(config(tiny_internvl, scene_index, folder))
    assert again == {"stored": 0, "skipped": 0, "already": 20}


def test_two_processes_write_the_same_bytes(exported, tiny_internvl, scene_index, tmp_path):
    folder = tmp_path / "two"
    values = {"model_path": tiny_internvl, "output_dir": folder, "data.index": scene_index, "batch_size": 1}
    values |= OPTIONS | {"num_workers": 0}
    command = ["-m", "stage1_vlm.export", *(f"{key}={value}" for key, value in values.items())]
    port = forked.free_port()
    ranks = [forked.start(*command, environment=forked.rank_variables(rank, 2, port)) for rank in range(2)]
    errors = [process.communicate()[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
    assert files_of(folder) == files_of(exported)


def test_live_states_are_those_of_the_cache_and_may_replace_it(exported, tiny_internvl, scene_index):
    live, cache = live_states(str(tiny_internvl), str(scene_index), **OPTIONS), CachedHiddenStates(exported)
    tokens = cache.tokens[3:7]
    mine, theirs = live.fetch(tokens), cache.fetch(tokens)
    assert torch.equal(mine.mask, theirs.mask)
    torch.testing.assert_close(mine.hidden, theirs.hidden, atol=2e-2, rtol=2e-2)  # last bf16 bit: other neighbours
    require_states(cache.fingerprint, live.fingerprint)
    other = live_states(str(tiny_internvl), str(scene_index), cameras=("CAM_F0", "CAM_L0"), **OPTIONS)
    with pytest.raises(FingerprintMismatch, match="prompt"):
        require_states(cache.fingerprint, other.fingerprint)


def test_scenes_that_bring_their_pictures_need_no_index(tiny_internvl, scene_index):
    live = live_states(str(tiny_internvl), str(scene_index), states_dtype="float32", **OPTIONS)
    without = LiveSceneEncoder(str(tiny_internvl), **OPTIONS)
    dataset = SceneDataset(scene_index)
    scenes = collate_scenes([dataset[3], dataset[4]])
    elsewhere = [{view: str(dataset.sensor_root / path) for view, path in row.items()} for row in scenes.cameras]
    mine = without(replace(scenes, token=["?", "?"], cameras=elsewhere))
    theirs = live.fetch(scenes.token)
    assert torch.equal(mine.hidden, theirs.hidden)
    assert torch.equal(mine.mask, theirs.mask)
    require_states(live.fingerprint, without.fingerprint)


@torch.no_grad()
def test_several_views_are_named_in_the_question(tiny_internvl, scene_index):
    cameras = ("CAM_F0", "CAM_L0")
    encoder = StateEncoder.load(str(tiny_internvl), str(scene_index), cameras=cameras, **OPTIONS)
    example = encoder.questions.encode(encoder.questions.tokens[1])
    text = encoder.backbone.processor.tokenizer.decode(example.input_ids)
    assert "FRONT VIEW: <img>" in text
    assert "FRONT LEFT VIEW: <img>" in text
    assert encoder.states([example])[0].shape == (len(example), encoder.backbone.hidden_width)


@torch.no_grad()
def test_shared_prefix_is_computed_once_and_changes_nothing_but_rounding(tiny_internvl, scene_index, tmp_path, encoder):
    export(config(tiny_internvl, scene_index, tmp_path, share_prefix="true", batch_size=4))
    cache = CachedHiddenStates(tmp_path)
    tokens = encoder.questions.tokens[:4]
    batch = cache.fetch(tokens)
    length = len(encoder.questions.prefix_ids())
    for row, token in enumerate(tokens):
        full = encoder.states([encoder.questions.encode(token)])[0]
        assert int(batch.lengths[row]) == len(full)
        assert torch.equal(batch.hidden[row, :length], batch.hidden[0, :length])
        torch.testing.assert_close(batch.hidden[row, : len(full)].float(), full, atol=3e-2, rtol=2e-2)
    before = encoder.states_after_prefix if encoder.prefix_states().ndim else None
    example = encoder.questions.encode(tokens[0])
    rest = before([example, example])[1]
    torch.testing.assert_close(rest, encoder.states([example])[0][length:], atol=5e-6, rtol=1e-4)


@torch.no_grad()
def test_published_layout_pads_on_the_left(tiny_internvl, scene_index, tmp_path, encoder):
    longest = max(len(encoder.questions.encode(token)) for token in encoder.questions.tokens)
    export(config(tiny_internvl, scene_index, tmp_path / "padded", pad_to=longest + 5, batch_size=4))
    cache = CachedHiddenStates(tmp_path / "padded", mask_padding=True)
    token = encoder.questions.tokens[1]
    batch, own = cache.fetch([token]), encoder.states([encoder.questions.encode(token)])[0]
    assert batch.hidden.shape[1] == longest + 5
    assert int(batch.mask.sum()) == len(own)
    torch.testing.assert_close(batch.hidden[0, -len(own) :].float(), own, atol=3e-2, rtol=2e-2)
    with pytest.raises(DataError, match="does not fit"):
        export(config(tiny_internvl, scene_index, tmp_path / "short", pad_to=longest - 1))
    with pytest.raises(DataError, match="exclude"):
        export(config(tiny_internvl, scene_index, tmp_path / "both", pad_to=longest, share_prefix="true"))


def test_a_missing_picture_is_named_or_listed(tiny_internvl, scene_index, tmp_path):
    scenes = SceneDataset(scene_index, horizon=None)
    copy = shutil.copytree(scenes.sensor_root, tmp_path / "sensors")
    lost = scenes[4]
    (copy / lost.cameras[0]["CAM_F0"]).unlink()
    changes = {"data.sensor_root": copy}
    with pytest.raises((DataError, MissingError), match=lost.token[0]):
        export(config(tiny_internvl, scene_index, tmp_path / "strict", **changes))
    counts = export(config(tiny_internvl, scene_index, tmp_path / "lenient", skip_bad="true", **changes))
    assert counts == {"stored": 19, "skipped": 1, "already": 0}
    assert lost.token[0] in (tmp_path / "lenient" / "skipped-0.json").read_text()


def test_the_backbone_learns_through_its_states(tiny_internvl, scene_index):
    states = TrainableStates(str(tiny_internvl), str(scene_index), lora={"rank": 4, "dropout": 0.0}, **OPTIONS)
    scenes = collate_scenes([SceneDataset(scene_index, horizon=None)[i] for i in (0, 1)])
    states.train()
    batch = states(scenes)
    assert batch.hidden.shape == (2, batch.mask.shape[1], states.hidden_width)
    assert batch.lengths[0] != batch.lengths[1]
    trainable = [p for p in states.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=3e-3)
    before = float((batch.hidden[batch.mask] - 1.0).detach().square().mean())
    for _ in range(4):
        optimizer.zero_grad()
        loss = (states(scenes).hidden[batch.mask] - 1.0).square().mean()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < before
    assert all(p.grad is not None for p in trainable)
    plain = live_states(str(tiny_internvl), str(scene_index), **OPTIONS)
    with pytest.raises(FingerprintMismatch, match="trained"):
        require_states(plain.fingerprint, states.fingerprint)
