"""Imitation learning: it learns, resumes bit for bit, refuses what does not belong together, and stops at NaN."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import forked
import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent))
import planner_world
from planner_world import VLM, build_world, config

from navsim_ext.dataset import SceneDataset
from navsim_ext.errors import DataError, MissingError
from navsim_ext.fingerprint import Fingerprint, FingerprintMismatch
from navsim_ext.hidden_cache import HiddenCacheWriter, states_fingerprint
from navsim_ext.runtime.checkpoint_file import load_checkpoint
from navsim_ext.runtime.config import compose
from navsim_ext.runtime.learning_rate import warmup_cosine_factor
from navsim_ext.runtime.run import run
from navsim_ext.shards import ShardStore
from stage2_dit import CheckpointMismatch, Exploration, load_planner, require_hidden, sample_chain, save_planner
from stage2_dit.inference import PlannerRunner, load_trajectory_planner
from stage2_dit.not_finite import NotFiniteLoss

PROGRAM = Path(planner_world.__file__)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory) -> dict:
    return run(config(world, tmp_path_factory.mktemp("finished") / "run"))


def spawn(world: Path, output: Path, trouble: dict, *overrides: str, rank: int | None = None, port: int = 0):
    environment = {"PLANNER_TROUBLE": json.dumps(trouble), "OMP_NUM_THREADS": "1"}
    if rank is not None:
        environment |= forked.rank_variables(rank, 2, port)
    return forked.start(PROGRAM, world, output, *overrides, environment=environment)


def equal_checkpoints(first: str | Path, second: str | Path) -> None:
    one, two = load_checkpoint(first), load_checkpoint(second)
    assert one["global_step"] == two["global_step"]
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, two["state_dict"][name]), name
    for name, state in one["callbacks"].items():
        if name.startswith("EMA"):
            for key, tensor in state["shadow"].items():
                assert torch.equal(tensor, two["callbacks"][name]["shadow"][key]), key


def test_layout_and_learning(world, tmp_path):
    result = run(config(world, tmp_path / "run", "trainer.max_epochs=40", "trainer.check_val_every_n_epoch=40"))
    version = tmp_path / "run" / "version_0"
    assert (tmp_path / "run" / "config.yaml").is_file()
    assert (tmp_path / "run" / "training_log.txt").is_file()
    assert (version / "checkpoints" / "last.ckpt").exists()
    assert yaml.safe_load((version / "hparams.yaml").read_text())["module"]["planner"]["num_layers"] == 2
    rows = list(csv.DictReader((version / "metrics.csv").open()))
    losses = [float(row["train/loss"]) for row in rows if row.get("train/loss")]
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    assert any(row.get("lr-AdamW") for row in rows)
    assert any(row.get("samples_per_s") for row in rows)
    standing_still = 10.0  # [m] about the mean distance of the driven poses from the origin
    assert result["metrics"]["val/ade"] < 0.5 * standing_still
    assert "best-epoch=" in result["best"]


def test_killed_run_ends_with_the_same_weights(world, finished, tmp_path):
    process = spawn(world, tmp_path / "run", {"epoch": 1, "batch": 2, "signal": "SIGKILL"})
    process.communicate(timeout=300)
    assert process.returncode == -9
    result = run(config(world, tmp_path / "run"))
    assert result["resumed_from"] is not None
    equal_checkpoints(result["last"], finished["last"])


def test_sigterm_saves_and_the_run_goes_on(world, finished, tmp_path):
    process = spawn(world, tmp_path / "run", {"epoch": 0, "batch": 2, "signal": "SIGTERM"})
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 143, errors
    assert "stopped by SIGTERM after step 3" in errors
    equal_checkpoints(run(config(world, tmp_path / "run"))["last"], finished["last"])


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(world, tmp_path):
    def train(output: Path, trouble: dict) -> list[int]:
        port = forked.free_port()
        overrides = ("trainer=ddp_cpu", "datamodule.batch_size=4")
        processes = [spawn(world, output, trouble, *overrides, rank=rank, port=port) for rank in (0, 1)]
        processes[1].wait(timeout=300)
        if trouble:
            processes[0].kill()
        errors = [process.communicate(timeout=300)[1] for process in processes]
        codes = [process.returncode for process in processes]
        assert trouble or codes == [0, 0], errors
        return codes

    assert train(tmp_path / "killed", {"epoch": 1, "batch": 2, "signal": "SIGKILL", "rank": 1})[1] == -9
    train(tmp_path / "killed", {})
    train(tmp_path / "whole", {})
    checkpoints = "version_0/checkpoints/last.ckpt"
    equal_checkpoints(tmp_path / "killed" / checkpoints, tmp_path / "whole" / checkpoints)


def test_loaded_planner_is_the_trained_one(world, finished, tmp_path):
    loaded = load_planner(finished["last"])
    assert loaded.averaged
    assert loaded.hidden == finished["module"].hidden_fingerprint
    assert loaded.planner.config.normaliser.source.startswith("fitted to")
    live = load_planner(finished["last"], ema=False)
    assert live.fingerprint.digest != loaded.fingerprint.digest
    for name, tensor in finished["module"].planner.state_dict().items():
        assert torch.equal(tensor, live.planner.state_dict()[name])
    again = load_planner(save_planner(tmp_path / "one", loaded.planner, loaded.hidden, averaged=True))
    assert again.fingerprint.digest == loaded.fingerprint.digest
    other = Fingerprint("hidden_states", {"codec": "bf16"}, {"vlm": Fingerprint("vlm", {"weights": "other"})})
    with pytest.raises(FingerprintMismatch, match=r"weights.*'toy'.*'other'"):
        require_hidden(loaded, other)
    with pytest.warns(UserWarning, match="other"):
        require_hidden(loaded, other, allow_mismatch=True)


def test_initialising_from_a_checkpoint(world, finished, tmp_path):
    cfg = config(world, tmp_path / "run", f"module.init_from='{finished['last']}'", "trainer.max_steps=1")
    result = run(cfg)
    start = load_planner(finished["last"]).planner.state_dict()
    largest = max((result["module"].planner.state_dict()[name] - start[name]).abs().max().item() for name in start)
    assert 0 < largest < 5e-3  # one step away from where it started
    with pytest.raises(CheckpointMismatch, match=r"num_layers: 2 in .* 3 configured"):
        run(config(world, tmp_path / "other", f"module.init_from='{finished['last']}'", "planner.num_layers=3"))


def rewritten_cache(world: Path, folder: Path, vlm: Fingerprint, skip: int = 0, change=None) -> Path:
    store = ShardStore(world / "hidden")
    from navsim_ext.hidden_cache import CachedHiddenStates

    source = CachedHiddenStates(world / "hidden", dtype="float32")
    with HiddenCacheWriter(folder, vlm) as writer:
        for token in store.tokens[skip:]:
            batch = source.fetch([token])
            states = batch.hidden[0][batch.mask[0]]
            writer.put(token, states if change is None else change(states))
    return folder


def test_other_hidden_states_are_refused(world, finished, tmp_path):
    other = rewritten_cache(world, tmp_path / "hidden", Fingerprint("vlm", {"weights": "other"}))
    with pytest.raises(FingerprintMismatch, match=r"toy.*other"):
        run(config(world, tmp_path / "run", f"module.init_from='{finished['last']}'", f"data.hidden_cache={other}"))


def test_width_and_missing_tokens(world, finished, tmp_path):
    wide = rewritten_cache(world, tmp_path / "wide", VLM, change=lambda states: torch.cat([states, states], 1))
    with pytest.raises(Exception, match="hidden states are 24 wide, the planner was built for 12"):
        run(config(world, tmp_path / "run", "planner.hidden_width=12", f"data.hidden_cache={wide}"))
    few = rewritten_cache(world, tmp_path / "few", VLM, skip=3)
    with pytest.raises(MissingError, match=str(few)):
        run(config(world, tmp_path / "run2", f"data.hidden_cache={few}"))


def test_nan_stops_the_run_and_names_tokens(world, tmp_path):
    cfg = config(world, tmp_path / "run", "module.optimizer.lr=1e9", "module.optimizer.warmup_share=0",
                 "module.optimizer.min_lr=1e9", "trainer.max_epochs=30")  # fmt: skip
    with pytest.raises(NotFiniteLoss, match=r"lower the rate or use float32; the batch's tokens are in"):
        run(cfg)
    (record,) = (tmp_path / "run" / "version_0").glob("not_finite_loss_step*.json")
    assert len(json.loads(record.read_text())["tokens"]) == 8


def test_nan_in_the_data_is_named(world, tmp_path):
    own = ("datamodule.hidden=null", "+module.backbone._target_=planner_world.BlindSpot")
    with pytest.raises(NotFiniteLoss, match=r"at step 0; not finite in the data: \{'hidden': \['[0-9a-f]{16}'\]\}"):
        run(config(world, tmp_path / "run", *own))
    (record,) = (tmp_path / "run" / "version_0").glob("not_finite_loss_step0*.json")
    content = json.loads(record.read_text())
    assert content["not_finite"]["hidden"] == content["tokens"][1:2]


@pytest.mark.parametrize("field", ["hidden", "target", "history", "status"])
def test_nan_anywhere_in_a_batch_saves_its_tokens(world, finished, tmp_path, field, monkeypatch):
    module = finished["module"]
    monkeypatch.setattr(module.trainer, "_default_root_dir", str(tmp_path))
    before = {name: weight.clone() for name, weight in module.planner.state_dict().items()}
    scenes, hidden = next(iter(module.trainer.datamodule.train_dataloader()))
    values = hidden.hidden if field == "hidden" else getattr(scenes, field)
    values[1] = float("nan")
    named = rf"not finite in the data: \{{'{field}': \['{scenes.token[1]}'\]\}}; the batch's tokens are in"
    with pytest.raises(NotFiniteLoss, match=named):
        module.training_step((scenes, hidden), 0)
    (record,) = tmp_path.glob("not_finite_loss_step*.json")
    content = json.loads(record.read_text())
    assert content["tokens"] == scenes.token
    assert content["not_finite"] == {name: [] for name in content["not_finite"]} | {field: [scenes.token[1]]}
    assert all(torch.equal(weight, before[name]) for name, weight in module.planner.state_dict().items())


def test_nan_targets_end_the_fit_of_bounds(world, tmp_path, monkeypatch):
    original = SceneDataset.__getitem__

    def spoiled(self, index):
        sample = original(self, index)
        if self.tokens.index(sample.token[0]) == 2:
            sample.target[0, -1] = float("nan")
        return sample

    monkeypatch.setattr(SceneDataset, "__getitem__", spoiled)
    token = SceneDataset(world / "index", cameras=()).tokens[2]
    with pytest.raises(DataError, match=rf"SceneBatch.target is not finite for tokens \['{token}'\]"):
        run(config(world, tmp_path / "run"))


def test_a_checkpoint_behind_the_planner_protocol(world, finished):
    scenes, hidden = next(iter(finished["module"].trainer.datamodule.val_dataloader()))
    loaded = load_planner(finished["last"])
    planner = load_trajectory_planner(finished["last"], name="mine")
    poses = planner.plan(scenes, hidden)
    wanted = PlannerRunner(loaded.planner).plan(hidden.hidden, hidden.mask, scenes.history, scenes.status, scenes.token)
    assert planner.name == "mine"
    assert poses.dtype == torch.float32
    assert torch.equal(poses, wanted)
    others = {"live weights": {"ema": False}, "another seed": {"seed": 1},
              "stochastic": {"exploration": "published_evaluation"}, "candidates": {"candidates": 7}}  # fmt: skip
    for change in others.values():
        other = load_trajectory_planner(finished["last"], **change)
        assert other.fingerprint.digest != planner.fingerprint.digest, change
        assert not torch.equal(other.plan(scenes, hidden), poses), change
    with pytest.raises(MissingError, match="planner mine needs hidden states"):
        planner.plan(scenes)
    with pytest.raises(DataError, match="exploration preset 'nothing' does not exist"):
        load_trajectory_planner(finished["last"], exploration="nothing")
    strange = states_fingerprint(Fingerprint("vlm", {"weights": "other"}))
    planner.require_hidden(loaded.hidden)
    with pytest.raises(FingerprintMismatch, match=r"'toy'.*'other'"):
        planner.require_hidden(strange)
    load_trajectory_planner(finished["last"], allow_hidden_mismatch=True).require_hidden(strange)


def test_the_plan_is_the_candidate_nearest_to_all_others(world, finished):
    scenes, hidden = next(iter(finished["module"].trainer.datamodule.val_dataloader()))
    planner = load_planner(finished["last"]).planner
    inputs = (hidden.hidden, hidden.mask, scenes.history, scenes.status, scenes.token)
    runner = PlannerRunner(planner, candidates=5)
    poses = runner.plan(*inputs)
    with torch.inference_mode():
        chain = sample_chain(planner, planner.condition(*inputs[:4]), tokens=scenes.token, group_size=5,
                             exploration=Exploration.preset("deterministic"))  # fmt: skip
        samples = planner.trajectories(chain).unflatten(0, (-1, 5))
    chosen = set()
    for plan, candidates in zip(poses, samples):
        distances = [sum((a[:, :2] - b[:, :2]).norm(dim=1).mean() for b in candidates) for a in candidates]
        best = int(torch.tensor(distances).argmin())
        torch.testing.assert_close(plan, candidates[best])
        chosen.add(best)
    assert len(chosen) > 1  # not simply the first of each scene
    assert torch.equal(PlannerRunner(planner).plan(*inputs), PlannerRunner(planner, candidates=1).plan(*inputs))
    with pytest.raises(DataError, match="candidates=0"):
        PlannerRunner(planner, candidates=0)


def test_targets_outside_the_bounds_are_counted(world, tmp_path, caplog):
    run(config(world, tmp_path / "run", "module.fit_bounds=null", "planner.normaliser.low=[-1,-1,-1]",
               "planner.normaliser.high=[9,1,1]", "trainer.max_epochs=1"))  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "run" / "version_0" / "metrics.csv").open()))
    counts = [float(row["train/outside_bounds"]) for row in rows if row.get("train/outside_bounds")]
    assert counts
    assert counts[0] > 0
    assert "can never be produced" in (tmp_path / "run" / "training_log.txt").read_text()


def test_training_the_backbone_too(world, tmp_path):
    own = ("datamodule.hidden=null", "+module.backbone._target_=planner_world.Watcher", "module.backbone_lr=0.01")
    result = run(config(world, tmp_path / "run", *own, "trainer.max_epochs=1"))
    module = result["module"]
    torch.manual_seed(0)
    saved = load_checkpoint(result["last"])["state_dict"]
    assert module.planner_config.hidden_width == 6
    assert torch.equal(saved["backbone.layer.weight"], module.backbone.layer.weight)
    optimizer = module.trainer.optimizers[0]
    moments = optimizer.state[module.backbone.layer.weight]["exp_avg"]
    assert moments.abs().max() > 0  # gradients reached it
    assert load_planner(result["last"]).hidden == planner_world.Watcher.fingerprint
    with pytest.raises(MissingError, match="from one place"):
        run(config(world, tmp_path / "none", "datamodule.hidden=null"))


def test_a_blind_planner_does_not_see(world, tmp_path):
    result = run(config(world, tmp_path / "run", "planner.zero_hidden=true", "trainer.max_steps=1"))
    planner = load_planner(result["last"]).planner
    history, status, x, time = torch.zeros(1, 4, 3), torch.zeros(1, 8), torch.zeros(1, 8, 3), torch.zeros(1)
    first = planner(x, time, planner.condition(torch.ones(1, 5, 12), None, history, status))
    second = planner(x, time, planner.condition(torch.randn(1, 5, 12), None, history, status))
    assert torch.equal(first, second)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_reduced_precision_trains(world, tmp_path, precision):
    if precision == "16-mixed" and not torch.cuda.is_available():
        with torch.autocast("cpu", torch.float16):
            pass  # Lightning refuses float16 without a GPU: only the forward pass is checked below
        planner_forward_in_half()
        return
    result = run(config(world, tmp_path / "run", f"trainer.precision={precision}", "trainer.max_epochs=1"))
    assert result["metrics"]["train/loss"] < 10
    assert all(tensor.dtype == torch.float32 for tensor in result["module"].planner.state_dict().values())


def planner_forward_in_half() -> None:
    from stage2_dit import DiffusionPlanner, PlannerConfig

    torch.manual_seed(0)
    planner = DiffusionPlanner(PlannerConfig(12, num_heads=2, head_width=8, num_layers=2, output_width=16,
                                             encoder_width=16))  # fmt: skip
    hidden, history, status = torch.randn(2, 5, 12), torch.randn(2, 4, 3), torch.randn(2, 8)
    target, noise, time = torch.randn(2, 8, 3), torch.randn(2, 8, 3), torch.tensor([0, 99])
    losses = []
    for dtype in (None, torch.float16):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            conditioning = planner.condition(hidden, None, history, status, queries_per_scene=8)
            losses.append(planner.training_loss(conditioning, target, noise, time))
    losses[1].backward()
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0.02)
    assert all(torch.isfinite(p.grad).all() for p in planner.parameters() if p.grad is not None)


def test_schedule_warms_up_and_falls():
    factors = [warmup_cosine_factor(s, warmup=10, total=110, floor=0.01) for s in range(130)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1.0
    assert factors[60] == pytest.approx(0.505)
    assert factors[110] == factors[129] == pytest.approx(0.01)
    assert factors[10:] == sorted(factors[10:], reverse=True)


@pytest.mark.parametrize("name", ["demo", "demo_gpu", "recogdrive_2b", "recogdrive_8b"])
def test_experiments_compose(name, tmp_path):
    from hydra.utils import instantiate

    cfg = compose("stage2", [f"experiment={name}", f"output_dir={tmp_path}", "data.train=a", "data.hidden_cache=b"])
    planner = instantiate(cfg.planner)
    assert planner.width == planner.num_heads * planner.head_width
    assert instantiate(cfg.module.optimizer).lr == cfg.module.optimizer.lr
