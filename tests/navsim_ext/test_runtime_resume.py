"""A run may be killed at any moment; the same command then ends with the same weights, bit for bit."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import signal
import sys
from pathlib import Path

import forked
import pytest
import torch
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "hard"))
import runtime_toy
from folders import contents, differences
from runtime_toy import config

from navsim_ext.errors import MissingError
from navsim_ext.fingerprint import Fingerprint
from navsim_ext.runtime.checkpoint_file import ema_weights, load_checkpoint, load_weights
from navsim_ext.runtime.checkpoint_folder import RunCheckpointError, newest_complete, resume_point, step_of
from navsim_ext.runtime.checkpoints import Checkpoints
from navsim_ext.runtime.config import compose
from navsim_ext.runtime.lock import FolderBusy, FolderLock
from navsim_ext.runtime.resume import check_identity, identity, plan_run, save_identity
from navsim_ext.runtime.rng import ResumeMismatch
from navsim_ext.runtime.run import ConfigError, build_trainer, run, with_run_dir

PROGRAM = Path(runtime_toy.__file__)
CHECKPOINTS = "version_0/checkpoints"


def spawn(output: Path, trouble: dict, *overrides: str, rank: int | None = None, port: int = 0) -> forked.Process:
    environment = {"TOY_TROUBLE": json.dumps(trouble), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if rank is not None:
        environment |= forked.rank_variables(rank, 2, port)
    return forked.start(PROGRAM, output, *overrides, environment=environment)


DDP = "trainer.strategy={_target_: lightning.pytorch.strategies.DDPStrategy, process_group_backend: gloo}"
ZERO = "trainer.strategy={_target_: stage1_vlm.strategies.DeepSpeedZero, config: {zero_optimization: {stage: 1}}}"


def train_two(output: Path, trouble: dict, *overrides: str, strategy: str = DDP) -> list[int]:
    """Two processes; when one dies the other is killed, as a launcher does."""
    port, overrides = forked.free_port(), ("trainer.devices=2", strategy, *overrides)
    processes = [spawn(output, trouble if rank == 1 else {}, *overrides, rank=rank, port=port) for rank in (0, 1)]
    processes[1].wait()
    if trouble:
        processes[0].kill()
    errors = [process.communicate()[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert trouble or codes == [0, 0], errors
    return codes


def final(output: Path) -> dict:
    return load_checkpoint(newest_complete(output / CHECKPOINTS))


def assert_same_training(one: Path, two: Path) -> None:
    first, second = final(one), final(two)
    assert first["global_step"] == second["global_step"] > 0
    assert first["state_dict"].keys() == second["state_dict"].keys()
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name
    for name, value in ema_weights(first).items():
        assert torch.equal(value, ema_weights(second)[name]), name
    assert losses(one) == losses(two)


def losses(output: Path) -> list[tuple[str, str, str]]:
    with open(output / "version_0/metrics.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    found = [(row["step"], row["loss"], row.get("val/loss", "")) for row in rows]
    return [row for row in found if any(row[1:])]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole")
    run(config(output, []))
    return output


def test_kill_and_resume_with_workers_and_accumulation(whole, tmp_path):
    killed = spawn(tmp_path, {"epoch": 1, "batch": 15, "signal": "SIGKILL"}, "datamodule.num_workers=1")
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert newest_complete(tmp_path / CHECKPOINTS).name == "epoch=1-step=17.ckpt"
    result = run(config(tmp_path, []))  # another number of workers: the items are the same
    assert result["resumed_from"].endswith("epoch=1-step=17.ckpt")
    assert_same_training(whole, tmp_path)


def test_sigterm_saves_the_step_and_ends(whole, tmp_path):
    stopped = spawn(tmp_path, {"epoch": 1, "batch": 4, "signal": "SIGTERM"})
    _, errors = stopped.communicate()
    assert stopped.returncode == 143, errors
    assert "stopped by SIGTERM after step 15" in errors  # batch 4 begins an accumulation of two: 12 + 3 steps
    assert newest_complete(tmp_path / CHECKPOINTS).name == "epoch=1-step=15.ckpt"
    assert (tmp_path / CHECKPOINTS / "last.ckpt").resolve().name == "epoch=1-step=15.ckpt"
    run(config(tmp_path, []))
    assert_same_training(whole, tmp_path)


def test_ctrl_c_saves_the_step_and_says_how_to_go_on(whole, tmp_path):
    """Sent as a terminal does, to the whole group of processes, a worker of the loader included."""
    stopped = spawn(tmp_path, {"epoch": 1, "batch": 4, "signal": "SIGINT", "group": True}, "datamodule.num_workers=1")
    _, errors = stopped.communicate()
    assert stopped.returncode == 130, errors
    assert "press Ctrl-C again to stop at once" in errors
    assert "stopped by SIGINT after step 15" in errors
    assert "the same command continues from there" in errors
    run(config(tmp_path, []))
    assert_same_training(whole, tmp_path)


def test_ctrl_c_before_the_first_step_says_where_the_run_will_go_on(tmp_path):
    stopped = spawn(tmp_path, {"setup": True, "signal": "SIGINT"})
    _, errors = stopped.communicate()
    assert stopped.returncode == 130, errors
    assert "continues from the start, since nothing was saved yet" in errors


def test_sigterm_in_the_last_batch_of_an_epoch(whole, tmp_path):
    stopped = spawn(tmp_path, {"epoch": 0, "batch": 23, "signal": "SIGTERM"})
    stopped.communicate()
    assert newest_complete(tmp_path / CHECKPOINTS).name == "epoch=0-step=12.ckpt"
    run(config(tmp_path, []))
    assert_same_training(whole, tmp_path)


def test_resume_at_the_end_of_an_epoch(whole, tmp_path):
    run(config(tmp_path, ["trainer.max_epochs=2"]))
    assert newest_complete(tmp_path / CHECKPOINTS).name == "epoch=1-step=24.ckpt"
    with pytest.raises(ResumeMismatch, match=r"trainer.max_epochs: 2 \| 3"):  # schedules know the end
        run(config(tmp_path, []))
    result = run(config(tmp_path, ["resume_ignore=[trainer.max_epochs]"]))  # the toy's does not
    assert result["resumed_from"].endswith("epoch=1-step=24.ckpt")
    assert_same_training(whole, tmp_path)


def killed_once_settled(output: Path, overrides: list[str], name: str) -> int:
    """Trains in a process that dies as soon as this checkpoint counts; its exit code."""
    settle = Checkpoints._settle

    def settle_and_die(self: Checkpoints, settled: str) -> None:
        settle(self, settled)
        if settled == name and self._saved_step:  # not when it continues from there
            os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        with contextlib.suppress(BaseException):
            Checkpoints._settle = settle_and_die
            run(config(output, overrides))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


BOUNDS = {
    "epochs": ["trainer.max_epochs=3"],
    "steps": ["trainer.max_epochs=100", "trainer.max_steps=18"],
    "epochs, before steps": ["trainer.max_epochs=3", "trainer.max_steps=1000"],
    "no epochs": ["trainer.max_epochs=-1", "trainer.max_steps=17"],
}
VALIDATIONS = {
    "none": ["trainer.limit_val_batches=0"],
    "each epoch": [],
    "every other epoch": ["trainer.check_val_every_n_epoch=2"],
    "twice an epoch": ["trainer.val_check_interval=0.5"],
    "every 8 batches": ["trainer.val_check_interval=8", "trainer.check_val_every_n_epoch=null"],
}
BY_HAND = ["module.manual=true", "trainer.accumulate_grad_batches=1", "trainer.gradient_clip_val=null"]


@pytest.mark.parametrize(("bound", "validation", "more"), [
    ("epochs", "none", []), ("epochs, before steps", "none", []), ("epochs, before steps", "each epoch", []),
    ("epochs, before steps", "every 8 batches", []), ("steps", "each epoch", BY_HAND), ("epochs", "none", BY_HAND),
    ("steps", "none", ["trainer.accumulate_grad_batches=5"]),  # 12 batches an epoch: the last step is of two
    *(pytest.param(bound, each, more, marks=pytest.mark.slow) for bound, each, more in (
        ("no epochs", "none", []), ("steps", "none", []), ("epochs, before steps", "every other epoch", []),
        ("epochs, before steps", "twice an epoch", []), ("epochs, before steps", "none", BY_HAND),
        ("epochs", "each epoch", BY_HAND))),
])  # fmt: skip
def test_killed_after_each_epoch_and_continued(tmp_path, bound, validation, more):
    """With the checkpoint of an epoch's end in force and nothing of the next epoch done."""
    sizes = ["datamodule.size=24", "callbacks.checkpoint.every_n_steps=4", "callbacks.checkpoint.keep=99",
             *BOUNDS[bound], *VALIDATIONS[validation], *more]  # fmt: skip
    run(config(tmp_path / "whole", sizes))
    expected = contents(tmp_path / "whole/version_0", timed=True)
    for epoch in (0, 1):
        step = max(step_of(path) for path in (tmp_path / "whole" / CHECKPOINTS).glob(f"epoch={epoch}-*.ckpt"))
        assert killed_once_settled(tmp_path / "cut", sizes, f"epoch={epoch}-step={step}.ckpt") == -signal.SIGKILL
    result = run(config(tmp_path / "cut", sizes))
    assert result["resumed_from"].endswith(f"epoch=1-step={step}.ckpt")
    assert not differences(contents(tmp_path / "cut/version_0", timed=True), expected)


@pytest.mark.parametrize("more", [[], ["trainer.limit_val_batches=0"]], ids=["validated", "not validated"])
def test_a_run_that_its_steps_ended_within_an_epoch_goes_on_there(tmp_path, more):
    sizes = ["datamodule.size=24", "callbacks.checkpoint.every_n_steps=4", "trainer.max_epochs=100", *more]
    run(config(tmp_path / "whole", [*sizes, "trainer.max_steps=18"]))
    run(config(tmp_path / "two", [*sizes, "trainer.max_steps=9"]))
    further = ["trainer.max_steps=18", "resume_ignore=[trainer.max_steps]"]
    assert run(config(tmp_path / "two", [*sizes, *further]))["resumed_from"].endswith("epoch=1-step=9.ckpt")
    assert_same_training(tmp_path / "whole", tmp_path / "two")


def test_resume_between_validations_within_an_epoch(tmp_path):
    often = ["trainer.val_check_interval=0.25", "trainer.max_epochs=1", "callbacks.checkpoint.every_n_steps=3"]
    run(config(tmp_path / "whole", often))  # steps 3, 6, 9 fall on validations: saved one step later
    stopped = spawn(tmp_path / "cut", {"epoch": 0, "batch": 17, "signal": "SIGKILL"}, *often)
    stopped.communicate()
    assert newest_complete(tmp_path / "cut" / CHECKPOINTS).name == "epoch=0-step=7.ckpt"
    run(config(tmp_path / "cut", often))
    assert_same_training(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
def test_two_processes_killed_and_resumed(tmp_path):
    sizes = ("trainer.max_epochs=1", "callbacks.checkpoint.every_n_steps=2", "trainer.accumulate_grad_batches=1")
    train_two(tmp_path / "whole", {}, *sizes)
    train_two(tmp_path / "killed", {"epoch": 0, "batch": 7, "signal": "SIGKILL"}, *sizes)
    assert newest_complete(tmp_path / "killed" / CHECKPOINTS).name == "epoch=0-step=6.ckpt"
    train_two(tmp_path / "killed", {}, *sizes)
    assert_same_training(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [DDP, ZERO], ids=["ddp", "zero"])
def test_two_processes_killed_at_the_end_of_an_epoch(tmp_path, strategy):
    sizes = ("trainer.max_epochs=3", "trainer.max_steps=100", "datamodule.size=24", "callbacks.checkpoint.keep=99")
    train_two(tmp_path / "whole", {}, *sizes, strategy=strategy)
    train_two(tmp_path / "killed", {"epoch": 1, "batch": 0, "signal": "SIGKILL"}, *sizes, strategy=strategy)
    assert resume_point(tmp_path / "killed" / CHECKPOINTS).name == "epoch=0-step=3.ckpt"
    train_two(tmp_path / "killed", {}, *sizes, strategy=strategy)
    names = [sorted(path.name for path in (tmp_path / name / CHECKPOINTS).iterdir()) for name in ("whole", "killed")]
    assert names[0] == names[1]
    assert "epoch=2-step=9.ckpt" in names[0]
    assert_same_training(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_average_under_zero_is_that_of_ddp_and_is_restored(tmp_path):
    sizes = ("trainer.max_epochs=2", "callbacks.checkpoint.every_n_steps=2")
    train_two(tmp_path / "ddp", {}, *sizes)
    train_two(tmp_path / "zero", {}, *sizes, strategy=ZERO)
    train_two(tmp_path / "killed", {"epoch": 1, "batch": 7, "signal": "SIGKILL"}, *sizes, strategy=ZERO)
    assert newest_complete(tmp_path / "killed" / CHECKPOINTS).name == "epoch=1-step=8.ckpt"
    train_two(tmp_path / "killed", {}, *sizes, strategy=ZERO)
    newest = {name: newest_complete(tmp_path / name / CHECKPOINTS) for name in ("ddp", "zero", "killed")}
    assert {path.name for path in newest.values()} == {"epoch=1-step=12.ckpt"}
    for ema in (True, False):
        ddp, zero, killed = (load_weights(path, ema=ema) for path in newest.values())
        assert ddp.keys() == zero.keys() == killed.keys()
        for name in ddp:
            torch.testing.assert_close(zero[name], ddp[name], rtol=1e-5, atol=1e-6)
            assert torch.equal(killed[name], zero[name]), name
    assert losses(tmp_path / "killed") == losses(tmp_path / "zero")


def test_layout_of_a_run(whole):
    for name in ("config.yaml", "training_log.txt", "version_0/metrics.csv", "version_0/hparams.yaml",
                 "version_0/tensorboard/scalars.json", f"{CHECKPOINTS}/last.ckpt"):  # fmt: skip
        assert (whole / name).exists(), name
    scalars = json.loads((whole / "version_0/tensorboard/scalars.json").read_text())
    assert [event[1] for event in scalars["loss"]] == list(range(36))
    assert {"samples_per_s", "data_wait", "val/loss"} <= scalars.keys()


def test_another_configuration_is_refused_by_name(whole):
    with pytest.raises(ResumeMismatch, match=r"module.lr: 0.01 \| 0.02"):
        run(config(whole, ["module.lr=0.02"]))
    with pytest.raises(ResumeMismatch, match=r"seed: 5 \| 6"):
        run(config(whole, ["seed=6"]))
    before = final(whole)["global_step"]
    result = run(config(whole, ["module.lr=0.02", "resume_ignore=[module.lr]"]))
    assert result["global_step"] == before  # already finished: nothing to do, and no error


def test_a_run_that_would_end_before_its_checkpoint_is_named(whole):
    fewer = ["trainer.max_epochs=1", "resume_ignore=[trainer,module]"]
    with pytest.raises(ResumeMismatch, match=r"is in epoch 2 .*max_epochs=1 ends before it: set .* to 3 or more"):
        run(config(whole, fewer))
    with pytest.raises(ResumeMismatch, match=r"trainer.max_epochs: 3 \| 1"):
        run(config(whole, fewer[:1]))
    with pytest.raises(ResumeMismatch, match=r"is of step 36, trainer.max_steps=7 ends before it"):
        run(config(whole, ["trainer.max_steps=7", "resume_ignore=[trainer,module]"]))


def one_that_differs(folder: Path, *overrides: str) -> list[str]:
    """Keys in which the identity of a run differs from that without overrides."""
    one, two = (identity(with_run_dir(config(folder, each), folder), 1) for each in ([], list(overrides)))
    return sorted(key for key in one.keys() | two.keys() if one.get(key) != two.get(key))


@pytest.mark.parametrize(("override", "differs"), [
    ("trainer.max_epochs=4", True), ("trainer.max_steps=5", True), ("trainer.limit_train_batches=3", True),
    ("trainer.val_check_interval=0.5", True), ("trainer.gradient_clip_val=2.0", True),
    ("trainer.precision=bf16-mixed", True), ("trainer.accumulate_grad_batches=1", True),
    ("trainer.something_new=1", True), ("callbacks.stopper={_target_: a.B, patience: 3}", True),
    ("callbacks.ema.decay=0.5", True), ("datamodule.size=47", True), ("module.lr=0.5", True), ("seed=6", True),
    ("trainer.log_every_n_steps=7", False), ("trainer.enable_progress_bar=true", False),
    ("trainer.num_sanity_val_steps=0", False), ("callbacks.checkpoint.every_n_steps=1", False),
    ("callbacks.checkpoint.keep=9", False), ("datamodule.num_workers=3", False), ("logger.csv=null", False),
])  # fmt: skip
def test_the_identity_holds_what_changes_the_result_and_nothing_else(tmp_path, override, differs):
    assert bool(one_that_differs(tmp_path, override)) == differs


def test_files_count_by_content_wherever_they_lie(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    checkpoint = tmp_path / "checkpoints" / "epoch=0-step=1.ckpt"
    for name, text in (("a.ckpt", "1"), ("moved.ckpt", "1"), ("other.ckpt", "2")):
        (tmp_path / name).write_text(text)
    for name, text in (("model", "w"), ("model_moved", "w"), ("model_other", "v")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_text(text)
    save_identity(tmp_path, at(tmp_path, weights=str(tmp_path / "a.ckpt"), model=str(tmp_path / "model")))
    moved = at(tmp_path, weights=str(tmp_path / "moved.ckpt"), model=str(tmp_path / "model_moved"))
    check_identity(checkpoint, moved, [])
    with pytest.raises(ResumeMismatch) as caught:
        check_identity(checkpoint, at(tmp_path, weights=str(tmp_path / "other.ckpt"),
                                      model=str(tmp_path / "model_other")), [])  # fmt: skip
    assert {"datamodule.weights.fingerprint", "datamodule.model.fingerprint"} <= {
        line.split(":")[0].strip() for line in str(caught.value).splitlines()}  # fmt: skip
    (tmp_path / "a.ckpt").write_text("3")  # another file under the same name
    with pytest.raises(ResumeMismatch, match=r"weights\.fingerprint"):
        check_identity(checkpoint, at(tmp_path, weights=str(tmp_path / "a.ckpt"), model=str(tmp_path / "model")), [])


def at(folder: Path, **datamodule: str) -> dict:
    """The identity of a run in ``folder``, as it is written down."""
    cfg = with_run_dir(config(folder, []), folder)
    cfg.datamodule = OmegaConf.merge(cfg.datamodule, datamodule)
    return json.loads(json.dumps(identity(cfg, 1)))


def test_moved_folders_are_the_same_run_and_other_content_is_not(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    checkpoint = tmp_path / "checkpoints" / "epoch=0-step=1.ckpt"
    for name, tokens in (("index", 1), ("moved", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        Fingerprint("scene_index", {"tokens": tokens}).save(tmp_path / name)
    work = {"index_folder": "a/index", "report_folder": "a"}
    save_identity(tmp_path, at(tmp_path, train=str(tmp_path / "index"), weights="a.ckpt", **work))
    check_identity(checkpoint, at(tmp_path, train=str(tmp_path / "moved"), weights="a.ckpt", index_folder="b"), [])
    with pytest.raises(ResumeMismatch) as caught:
        check_identity(checkpoint, at(tmp_path, train=str(tmp_path / "other"), weights="b.ckpt"), [])
    listed = [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:-1]]
    assert listed == ["datamodule.train", "datamodule.train.fingerprint", "datamodule.weights"]
    Fingerprint("scene_index", {"tokens": 3}).save(tmp_path / "index")  # rebuilt from something else
    with pytest.raises(ResumeMismatch, match=r"train\.fingerprint"):
        check_identity(checkpoint, at(tmp_path, train=str(tmp_path / "index"), weights="a.ckpt"), [])
    save_identity(tmp_path, {"datamodule.train": str(tmp_path / "index"), "datamodule.index_folder": "c"} | {
        key: value for key, value in at(tmp_path, weights="a.ckpt").items()})  # fmt: skip
    check_identity(checkpoint, at(tmp_path, train=str(tmp_path / "index"), weights="a.ckpt"), [])  # of before: by path
    with pytest.raises(ResumeMismatch, match=r"datamodule\.train: .*index' \| .*moved'"):
        check_identity(checkpoint, at(tmp_path, train=str(tmp_path / "moved"), weights="a.ckpt"), [])


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        ("stage1", ["model_path=m", "data.mixture=q.json"]),
        ("stage2", ["data.train=i", "data.hidden_cache=h"]),
        ("stage3", ["init=p.ckpt", "data.train=i", "data.hidden_cache=h", "data.metric_cache=c"]),
    ],
)
def test_the_folder_of_a_run_is_no_part_of_its_identity(stage, overrides):
    one, two = (identity(with_run_dir(compose(stage, [*overrides, f"output_dir={folder}"]), Path(folder)), 1)
                for folder in ("/runs/one", "/archive/two"))  # fmt: skip
    assert one == two


def test_a_cut_checkpoint_is_passed_over(whole, tmp_path):
    folder = tmp_path / CHECKPOINTS
    folder.mkdir(parents=True)
    good = newest_complete(whole / CHECKPOINTS)
    (folder / "epoch=2-step=36.ckpt").write_bytes(good.read_bytes())
    (folder / "epoch=9-step=99.ckpt").write_bytes(good.read_bytes()[:-50])
    assert plan_run(tmp_path, "auto").checkpoint.name == "epoch=2-step=36.ckpt"
    assert plan_run(tmp_path, "never").run_dir.name == "version_1"
    with pytest.raises(RunCheckpointError, match="cut short"):
        load_checkpoint(folder / "epoch=9-step=99.ckpt")
    with pytest.raises(MissingError, match="does not exist"):
        plan_run(tmp_path, str(folder / "nothing.ckpt"))


def test_a_run_does_not_continue_from_a_damaged_checkpoint(whole, tmp_path):
    folder = tmp_path / CHECKPOINTS
    folder.mkdir(parents=True)
    content = bytearray(newest_complete(whole / CHECKPOINTS).read_bytes())
    content[content.index(b"state_dict") + 2] ^= 1
    (folder / "epoch=2-step=36.ckpt").write_bytes(content)
    with pytest.raises(RunCheckpointError, match=r"epoch=2-step=36\.ckpt is damaged.*an earlier one"):
        run(config(tmp_path, []))


def test_weights_come_with_or_without_the_average(whole):
    path = whole / CHECKPOINTS / "last.ckpt"
    live, average = load_weights(path, ema=False), load_weights(path)
    assert torch.equal(average["net.0.weight"], ema_weights(final(whole))["net.0.weight"])
    assert not torch.equal(live["net.0.weight"], average["net.0.weight"])
    assert torch.equal(live["seen"], average["seen"])


def test_two_runs_cannot_share_a_folder(tmp_path):
    with FolderLock(tmp_path), pytest.raises(FolderBusy, match=f"process {os.getpid()} on"):
        run(config(tmp_path, []))


def test_missing_values_are_named_before_anything_is_made(tmp_path):
    cfg = config(tmp_path / "new", [])
    cfg.module.lr = "???"
    with pytest.raises(ConfigError, match=r"module\.lr"):
        run(cfg)
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU is asked")
@pytest.mark.parametrize(("override", "said"), [
    ("trainer.accelerator=gpu", "GPU|gpu|CUDA"), ("trainer.accelerator=nonsense", "nonsense"),
    ("trainer.devices=0", r"devices=0"), ("trainer.devices=-2", r"devices=-2"), ("trainer.devices=[0,0]", "devices"),
    ("trainer.precision=nonsense", "nonsense"), ("trainer.strategy=nonsense", "nonsense"),
    ("trainer.strategy=fsdp", "GPU"), ("trainer.val_check_interval=-1", "val_check_interval"),
])  # fmt: skip
def test_a_trainer_that_cannot_be_made_here_is_named(tmp_path, override, said):
    with pytest.raises(ConfigError, match=said):
        build_trainer(with_run_dir(config(tmp_path, [override]), tmp_path))
