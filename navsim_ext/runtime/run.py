"""One training run from one configuration: seed, instantiate, resume exactly where it was, fit.

    cfg.output_dir      folder of the run; no second run may use it meanwhile
    cfg.seed            of everything
    cfg.module, cfg.datamodule, cfg.trainer, cfg.callbacks.*, cfg.logger.*    Hydra nodes with _target_
    cfg.resume          auto (default) | never | path of a checkpoint
    cfg.resume_ignore   keys whose change a resume accepts, e.g. [datamodule.root]

Configurations refer to the version folder as ``${run_dir}``. Under torchrun each process calls :func:`run`.
"""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console

from navsim_ext.errors import TriviumError
from navsim_ext.files import remove_temporaries, write_atomic
from navsim_ext.runtime.checkpoint_file import AtomicCheckpointIO, require_undamaged
from navsim_ext.runtime.checkpoint_folder import resume_point, step_of
from navsim_ext.runtime.checkpoints import BestCheckpoints, Checkpoints
from navsim_ext.runtime.collectives import connected, launched_rank
from navsim_ext.runtime.csv_log import CsvLog, MetricsCsv
from navsim_ext.runtime.lock import FolderLock
from navsim_ext.runtime.next_epoch import start_next_epoch
from navsim_ext.runtime.resume import RunPlan, check_identity, identity, plan_run, require_room, save_identity
from navsim_ext.runtime.rng_state import RngState
from navsim_ext.runtime.signals import Interrupted
from navsim_ext.runtime.torch_file import require_bounded

log = logging.getLogger(__name__)

LOG_NAME = "training_log.txt"
MACHINE = ("accelerator", "devices", "num_nodes", "strategy", "precision")  # keys that say on what a trainer computes


class ConfigError(TriviumError):
    """A configuration lacks a value that the run needs."""


def run(cfg: DictConfig) -> dict[str, Any]:
    """Trains as configured and returns where and how far.

    Keys of the result: ``output_dir``, ``run_dir``, ``global_step``, ``epoch``, ``resumed_from`` (path or None),
    ``last`` and ``best`` (checkpoint paths or None), ``best_score``, ``metrics`` (last logged values), ``module``.
    Raises ConfigError, FolderBusy, ResumeMismatch before anything is trained, and Interrupted after a signal.
    """
    missing = sorted(OmegaConf.missing_keys(with_run_dir(cfg, Path("unknown yet"))))
    if missing:
        raise ConfigError(f"these keys have no value: {', '.join(missing)}; give each as key=value")
    output_dir = Path(cfg.output_dir)
    first = launched_rank() == 0
    with FolderLock(output_dir) if first else contextlib.nullcontext():
        plan = plan_run(output_dir, str(cfg.get("resume") or "auto"))
        cfg = with_run_dir(cfg, plan.run_dir)
        with log_file(output_dir, first), process_group_left():
            return _fit(cfg, plan, first)


def _fit(cfg: DictConfig, plan: RunPlan, first: bool) -> dict[str, Any]:
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    trainer = build_trainer(cfg)
    bookkeeping = Bookkeeping(cfg, plan)
    trainer.callbacks.insert(0, bookkeeping)
    datamodule, module = make(cfg.datamodule), make(cfg.module)
    reads = datamodule.reads() if hasattr(datamodule, "reads") else {}
    bookkeeping.identity = identity(cfg, trainer.world_size, reads)
    if plan.checkpoint is not None:
        require_undamaged(plan.checkpoint)
        check_identity(plan.checkpoint, bookkeeping.identity, list(cfg.get("resume_ignore") or []))
        require_room(plan.checkpoint, cfg.trainer)
        if plan.checkpoint.is_file():
            require_bounded(plan.checkpoint)  # Lightning reads it
        log.info("continuing %s", plan.checkpoint)
        if first:
            for table in plan.run_dir.glob("*.csv"):
                if table.name != MetricsCsv.FILE_NAME:  # see Bookkeeping.on_train_start
                    CsvLog(table).truncate(step_of(plan.checkpoint))
    try:
        trainer.fit(
            module, datamodule=datamodule, ckpt_path=plan.checkpoint and str(plan.checkpoint), weights_only=True
        )
    except SystemExit as leave:  # Lightning's answer to Ctrl-C where SaveOnSignal does not listen
        saved = resume_point(plan.run_dir / "checkpoints")
        where = f"from step {step_of(saved)} ({saved})" if saved else "from the start, since nothing was saved yet"
        raise Interrupted(f"stopped by Ctrl-C: the same command continues {where}", signal.SIGINT) from leave
    best = [each for each in trainer.checkpoint_callbacks if isinstance(each, BestCheckpoints) and each.best]
    return {
        "output_dir": str(cfg.output_dir),
        "run_dir": str(plan.run_dir),
        "global_step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "resumed_from": plan.checkpoint and str(plan.checkpoint),
        "last": (newest := resume_point(plan.run_dir / "checkpoints")) and str(newest),
        "best": str(best[0].best) if best else None,
        "best_score": best[0].best_score if best else None,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "module": module,
    }


def make(node: Any, **arguments: Any) -> Any:
    """Hydra's instantiate; an error that Trivium raised in it comes out as itself, with the key it belongs to."""
    try:
        return instantiate(node, **arguments)
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, TriviumError):
            cause = cause.__cause__
        if cause is None:
            raise
        cause.add_note(str(error))
        raise cause from None


def _logger(name: str, node: Any) -> Any:
    """Loggers of other systems fail in ways of their own: an absent package, no login, a folder that is none."""
    try:
        return make(node)
    except InstantiationException as error:
        told = " ".join(str(error.__cause__ or error).split())
        raise ConfigError(
            f"logger.{name} cannot be made: {told!s:.400}\nlogger=default is the tables of the run alone"
        ) from error


def build_trainer(cfg: DictConfig) -> pl.Trainer:
    """The trainer with callbacks and loggers of a configuration whose ``run_dir`` is set.

    Raises ConfigError for what Lightning cannot make on this machine: an absent GPU, no or unknown devices, precision,
    a logger without its package.
    """
    callbacks = [make(node) for node in (cfg.get("callbacks") or {}).values() if node]
    loggers = [_logger(name, node) for name, node in (cfg.get("logger") or {}).items() if node]
    deepspeed = "deepspeed" in str(cfg.trainer.get("strategy", "")).lower()  # brings its own way of writing
    try:
        return make(
            cfg.trainer,
            callbacks=[RngState(cfg.seed), *callbacks],
            logger=loggers or False,
            plugins=[] if deepspeed else [AtomicCheckpointIO()],
            default_root_dir=str(cfg.run_dir),
        )
    except InstantiationException as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        given = {key: cfg.trainer[key] for key in MACHINE if key in cfg.trainer}
        told = ", ".join(f"trainer.{key}={value!s:.80}" for key, value in given.items())
        raise ConfigError(
            f"no trainer can be made as configured: {' '.join(str(cause).split())!s:.400}\ngiven were {told or 'no'}; "
            "trainer=cpu trains on the processor"
        ) from error


class Bookkeeping(pl.Callback):
    """Files beside the checkpoints, written once all processes have made the same plan."""

    def __init__(self, cfg: DictConfig, plan: RunPlan) -> None:
        self.cfg, self.plan = cfg, plan
        self.identity: dict[str, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        mine = (str(self.plan.run_dir), str(self.plan.checkpoint))
        theirs = trainer.strategy.broadcast(mine)
        if mine != theirs:
            raise TriviumError(f"process {trainer.global_rank} would use {mine}, process 0 {theirs}: start them again")
        resumed = self.plan.checkpoint and self.plan.checkpoint.resolve()
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, Checkpoints | BestCheckpoints):
                callback.begin(trainer, resumed)
        if not trainer.is_global_zero:
            return
        output_dir, run_dir = Path(self.cfg.output_dir), self.plan.run_dir
        for folder in (output_dir, run_dir):
            remove_temporaries(folder)
        save_identity(run_dir, self.identity)
        write_atomic(output_dir / "config.yaml", OmegaConf.to_yaml(self.cfg, resolve=True))
        nodes = {name: OmegaConf.to_container(self.cfg[name], resolve=True) for name in ("module", "datamodule")}
        write_atomic(run_dir / "hparams.yaml", yaml.safe_dump(nodes, sort_keys=False))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        start_next_epoch(trainer)
        if self.plan.checkpoint is not None:
            # Lightning's loggers count steps of the optimizer, or batches where a module steps by itself
            automatic = pl_module.automatic_optimization
            logged = trainer.global_step if automatic else trainer.fit_loop.total_batch_idx + 1
            for logger in trainer.loggers:
                if isinstance(logger, MetricsCsv) and trainer.is_global_zero:
                    logger.experiment.truncate(logged)
            log.info("continued at epoch %d, step %d", trainer.current_epoch, trainer.global_step)


def with_run_dir(cfg: DictConfig, run_dir: Path) -> DictConfig:
    """A copy of the configuration in which ``${run_dir}`` is the version folder."""
    cfg = cfg.copy()
    with open_dict(cfg):
        cfg.run_dir = str(run_dir)
    return cfg


def tell(result: dict[str, Any], title: str, names: Iterable[str], *, otherwise: str) -> None:
    """Says where a finished run's checkpoints are and what was measured, of ``names`` those that there are."""
    console = Console(stderr=True, soft_wrap=True)
    values = {name: round(result["metrics"][name], 4) for name in names if name in result["metrics"]}
    console.print(f"{result['run_dir']}: step {result['global_step']}, last {result['last']}, best {result['best']}")
    console.print(f"{title}: {values}" if values else otherwise)


@contextlib.contextmanager
def process_group_left() -> Iterator[None]:
    """Leaves the process group that the trainer joined: a thread of it that still lives when Python ends may abort."""
    try:
        yield
    finally:
        if connected():
            torch.distributed.destroy_process_group()


@contextlib.contextmanager
def log_file(output_dir: Path, first: bool) -> Iterator[None]:
    """Appends the log of the first process to ``training_log.txt`` while the run lasts."""
    if not first:
        yield
        return
    handler = logging.FileHandler(output_dir / LOG_NAME)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(min(level, logging.INFO))
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
        handler.close()
