"""Training from one configuration: outputs, exact resume, ZeRO on 1 and 2 processes, another number of processes."""

import json
import shutil
import signal
import time
from pathlib import Path

import forked
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from navsim_ext.errors import DataError
from navsim_ext.runtime.config import compose
from navsim_ext.runtime.rng import ResumeMismatch
from stage1_vlm.loading import load_backbone
from stage1_vlm.strategies import StrategyError, resolve_auto
from stage1_vlm.train import build_initial_model, train
from stage1_vlm.universal import to_universal

STEPS, SAVE_AT = 6, 3


def overrides(model, mixture, folder, **changes) -> list[str]:
    values = {
        "trainer": "cpu",
        "module.learning_rate": 1e-3,
        "module.drop_path": 0.0,
        "model_path": model,
        "output_dir": folder,
        "data.mixture": mixture,
        "data.batch_size": 2,
        "global_batch_size": 4,
        "data.max_sequence_length": 300,
        "data.max_image_tokens": 16,
        "data.num_workers": 0,
        "data.index_workers": 0,
        "trainer.max_steps": STEPS,
        "callbacks.checkpoint.every_n_steps": SAVE_AT,
        "callbacks.checkpoint.keep": 5,
        "callbacks.progress": "null",
    }
    return [f"{key}={value}" for key, value in (values | changes).items()]


def launch(processes: int, arguments: list[str]) -> None:
    """Trains in one process, or in so many as torchrun would start."""
    port = forked.free_port()
    environments = [forked.rank_variables(rank, processes, port) for rank in range(processes)] or [{}]
    command = ["-m", "stage1_vlm.train", *arguments]
    started = [forked.start(*command, environment=environment) for environment in environments]
    errors = [process.communicate()[1] for process in started]
    assert not any(process.returncode for process in started), "\n".join(error[-3000:] for error in errors)


def cut_back(finished: Path) -> Path:
    """Puts the run folder back to what a kill right after step SAVE_AT would have left; ``finished`` is its copy."""
    to = finished.with_name("run")
    shutil.rmtree(to)
    shutil.copytree(finished, to, symlinks=True)
    for path in (*to.glob("*.safetensors"), *to.glob("version_0/checkpoints/*")):
        if f"step={SAVE_AT}." not in path.name:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.rmtree(to / f"checkpoint-{STEPS}")
    return to


def losses(run: Path) -> list[str]:
    lines = (run / "version_0" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("loss")
    return [line.split(",")[column] for line in lines[1:]]


def same_weights(first: Path, second: Path) -> bool:
    a, b = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def zero_run(tiny_internvl, toy_mixture, tmp_path_factory):
    """ZeRO-1 on two processes over gloo, as torchrun starts them; a copy: tests may go on in the folder itself."""
    folder = tmp_path_factory.mktemp("zero") / "run"
    forked.preload(["stage1_vlm.strategies", "deepspeed"])
    launch(2, overrides(tiny_internvl, toy_mixture, folder, strategy="zero1"))
    return shutil.copytree(folder, folder.with_name("finished"), symlinks=True)


def test_output_folder_is_a_model_with_its_history(tiny_internvl, toy_mixture, tmp_path):
    metrics = train(compose("stage1", overrides(tiny_internvl, toy_mixture, tmp_path / "run", strategy="single")))
    run = tmp_path / "run"
    model = AutoModelForImageTextToText.from_pretrained(str(run))
    assert type(model).__name__ == "InternVLForConditionalGeneration"
    loaded = load_backbone(run)
    assert not same_weights(run, tiny_internvl)
    assert loaded.processor.image_token_id == load_backbone(tiny_internvl).processor.image_token_id
    state = json.loads((run / "trainer_state.json").read_text())
    assert (state["global_step"], len(state["log_history"])) == (STEPS, STEPS)
    assert {"loss", "learning_rate", "gradient_norm"} <= state["log_history"][-1].keys()
    assert metrics["data"]["datasets"]["seen"]["entries"] == 48
    assert metrics == json.loads((run / "metrics.json").read_text())
    scalars = json.loads((run / "tensorboard" / "scalars.json").read_text())
    assert len(scalars["loss"]) == STEPS
    assert {path.name for path in run.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (SAVE_AT, STEPS)}
    for step in (SAVE_AT, STEPS):
        assert (run / f"checkpoint-{step}" / "state.ckpt").exists()
        load_backbone(run / f"checkpoint-{step}")
    assert (run / "training_log.txt").read_text()
    again = train(compose("stage1", overrides(tiny_internvl, toy_mixture, run, strategy="single")))
    assert again == metrics  # finished: nothing is done again


def test_an_initial_model_whose_build_was_killed_is_no_model(toy_mixture, tmp_path, monkeypatch):
    sizes = "{width: 16, layers: 1, heads: 2, vision_width: 16, vision_layers: 1, vision_heads: 2, vocabulary: 400}"
    initial = tmp_path / "initial"
    changes = {"tiny": sizes, "strategy": "single"}
    cfg = compose("stage1", overrides(initial, toy_mixture, tmp_path, **changes))

    def dies(folder, *_, **__):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("stage1_vlm.tiny.build_tiny_internvl", dies)
        with pytest.raises(KeyboardInterrupt):
            build_initial_model(cfg)
    assert not initial.exists()
    build_initial_model(cfg)
    load_backbone(initial)
    (initial / "config.json").unlink()
    with pytest.raises(DataError, match="has files, but no config"):
        build_initial_model(cfg)


def test_an_edited_question_file_is_another_run(tiny_internvl, toy_mixture, tmp_path):
    """Of the same length and number of lines: what was asked decides, not the name and size of the file."""
    data = shutil.copytree(Path(toy_mixture).parent, tmp_path / "data")
    changes = {"trainer.max_steps": 2, "callbacks.checkpoint.every_n_steps": 2, "strategy": "single"}
    mixture = data / Path(toy_mixture).name
    train(compose("stage1", overrides(tiny_internvl, mixture, tmp_path / "run", **changes)))
    mixture = data.rename(tmp_path / "moved") / mixture.name
    train(compose("stage1", overrides(tiny_internvl, mixture, tmp_path / "run", **changes)))  # the same questions
    path = mixture.parent / "seen.jsonl"
    text = path.read_text()
    path.write_text(text.replace("the traffic", "teh traffic", 1))
    assert path.read_text() != text
    with pytest.raises(ResumeMismatch, match=r"datamodule\.mixture\.\w+\.fingerprint"):
        train(compose("stage1", overrides(tiny_internvl, mixture, tmp_path / "run", **changes)))


def test_a_lora_run_leaves_a_plain_model_and_its_adapter(tiny_internvl, toy_mixture, tmp_path):
    changes = {"module.lora": "{rank: 4, alpha: 8, dropout: 0.0}", "strategy": "single", "data.batching": "packed"}
    train(compose("stage1", overrides(tiny_internvl, toy_mixture, tmp_path / "run", **changes)))
    before, after = load_file(tiny_internvl / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(("language_model.model.layers" in n and "proj" in n) or "multi_modal" in n for n in changed)
    assert changed
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert any("lora_A" in name for name in adapter)


def test_zero_1_halves_the_optimizer_state_and_trains_as_one_process_would(
    zero_run, tiny_internvl, toy_mixture, tmp_path
):
    def state_elements(run: Path) -> list[int]:
        shards = sorted(run.glob("version_0/checkpoints/epoch=0-step=6.ckpt/checkpoint/zero_pp_rank_*"))
        totals = []
        for shard in shards:
            content = torch.load(shard, map_location="cpu", weights_only=False)["optimizer_state_dict"]
            moments = content["base_optimizer_state"]
            states = moments["state"].values() if "state" in moments else moments
            totals.append(sum(state["exp_avg"].numel() for state in states))
        return totals

    one = tmp_path / "one"
    launch(1, overrides(tiny_internvl, toy_mixture, one, strategy="zero1", **{"data.batch_size": 4}))
    parameters = sum(value.numel() for value in load_file(one / "model.safetensors").values())
    (whole,), halves = state_elements(one), state_elements(zero_run)
    assert parameters <= whole <= parameters + 64  # padded for alignment
    assert len(halves) == 2
    assert all(abs(half / whole - 0.5) < 0.01 for half in halves)
    first, second = load_file(one / "model.safetensors"), load_file(zero_run / "model.safetensors")
    start = load_file(tiny_internvl / "model.safetensors")
    # The loss is a mean over tokens of each micro batch, so the two are near, not equal.
    apart = sum(float((first[name] - second[name]).square().sum()) for name in first) ** 0.5
    moved = sum(float((first[name] - start[name]).square().sum()) for name in first) ** 0.5
    assert apart < 0.35 * moved


def test_zero_1_resumes_bit_for_bit(zero_run, tiny_internvl, toy_mixture):
    cut = cut_back(zero_run)
    launch(2, overrides(tiny_internvl, toy_mixture, cut, strategy="zero1"))
    assert losses(cut) == losses(zero_run)
    assert same_weights(cut, zero_run)


def test_a_universal_checkpoint_continues_on_another_number_of_processes(
    zero_run, tiny_internvl, toy_mixture, tmp_path
):
    cut = cut_back(zero_run)
    universal = to_universal(next((cut / "version_0" / "checkpoints").glob(f"*step={SAVE_AT}.ckpt")))
    assert to_universal(cut / "version_0" / "checkpoints" / universal.name) == universal
    ignored = "[world_size,trainer.strategy,datamodule.batch_size,trainer.accumulate_grad_batches]"
    changes = {
        "strategy": "zero1", "resume": str(universal),
        "resume_ignore": ignored, "data.batch_size": 4,
    }  # fmt: skip
    launch(1, [*overrides(tiny_internvl, toy_mixture, cut, **changes), "trainer.strategy.universal=true"])
    assert len(losses(cut)) == STEPS
    first, second = load_file(zero_run / "model.safetensors"), load_file(cut / "model.safetensors")
    start = load_file(zero_run / f"checkpoint-{SAVE_AT}" / "model.safetensors")
    moved = max(float((first[name] - start[name]).abs().max()) for name in first)
    apart = max(float((first[name] - second[name]).abs().max()) for name in first)
    assert apart < 0.5 * moved  # same state, same data; the sums of gradients are taken in another order


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp2", "ddp"])
def test_every_strategy_trains_to_the_same_weights(zero_run, tiny_internvl, toy_mixture, tmp_path, strategy):
    launch(2, overrides(tiny_internvl, toy_mixture, tmp_path / "run", strategy=strategy))
    first, second = load_file(zero_run / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=2e-5, rtol=1e-4)


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_continues(tiny_internvl, toy_mixture, tmp_path):
    steps = {"trainer.max_steps": 60, "trainer.max_epochs": 100, "callbacks.checkpoint.every_n_steps": 1000}
    arguments = overrides(tiny_internvl, toy_mixture, tmp_path / "run", strategy="ddp", **steps)
    process = forked.start("-m", "stage1_vlm.train", *arguments)
    table = tmp_path / "run" / "version_0" / "metrics.csv"
    while not (table.is_file() and len(table.read_text().splitlines()) > 5) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=120)
    assert list((tmp_path / "run").glob("checkpoint-*"))
    launch(0, arguments)
    assert len(losses(tmp_path / "run")) == 60


def test_every_auto_is_resolved_and_contradictions_are_named():
    config = {
        "zero_optimization": {"stage": 1}, "fp16": {"enabled": "auto", "loss_scale": 0}, "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999], "weight_decay": "auto"}},
        "train_batch_size": "auto", "gradient_clipping": "auto", "gradient_accumulation_steps": "auto",
    }  # fmt: skip
    optimizer = {"type": "AdamW", "lr": 4e-5, "weight_decay": 0.05, "betas": [0.9, 0.999], "eps": 1e-8}
    numbers = {"micro_batch": 1, "accumulation": 16, "world_size": 8, "gradient_clipping": 1.0, "optimizer": optimizer}
    resolved = resolve_auto(config, **numbers)
    assert "auto" not in json.dumps(resolved)
    assert resolved["train_batch_size"] == 128
    assert not {"fp16", "bf16", "optimizer"} & resolved.keys()
    for change, message in (
        ({"train_batch_size": 64}, "train_batch_size is 64.*128"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, r"optimizer\.lr is 0\.001"),
        ({"zero_optimization": {"stage": "auto"}}, r"zero_optimization\.stage"),
    ):
        with pytest.raises(StrategyError, match=message):
            resolve_auto(config | change, **numbers)


def test_a_global_batch_that_does_not_divide_is_named(tiny_internvl, toy_mixture, tmp_path):
    arguments = overrides(tiny_internvl, toy_mixture, tmp_path, global_batch_size=5, strategy="single")
    with pytest.raises(DataError, match="global_batch_size=5 is not a multiple"):
        train(compose("stage1", arguments))


@pytest.mark.parametrize("name", ["demo", "demo_gpu", "recogdrive_2b", "recogdrive_8b"])
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "fsdp2", "ddp", "single"])
def test_every_configuration_composes(name, strategy):
    cfg = compose("stage1", [f"experiment={name}", f"strategy={strategy}"])
    assert cfg.module._target_ == "stage1_vlm.module.InstructionTuning"
    assert cfg.data.max_sequence_length > 0
