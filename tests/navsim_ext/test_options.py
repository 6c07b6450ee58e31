"""The law of options: what nothing reads cannot be given, what is given has the type and range that its file declares,
and arrives as it was typed."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from navsim_ext.runtime.command_line import flags_of, overrides_from, quote
from navsim_ext.runtime.config import checked, composed, config_root, options_of
from navsim_ext.runtime.options import Declaration, OptionError, check, missing_keys, taken_by
from navsim_ext.runtime.usage import usage

JOBS = sorted(str(path.parent.relative_to(config_root())) for path in config_root().rglob("config.yaml"))
GIVEN = {"text": "x", "path": "x", "list": "[x]", "mapping": "{a: [x]}", "word": None}


def required(job: str, *overrides: str) -> list[str]:
    """A value for each option that has none."""
    options, made = options_of(job), []
    for key in missing_keys(OmegaConf.to_container(composed(job, overrides))):
        kind = options[key].declaration.kinds[0]
        made.append(f"{key}={kind.word or GIVEN[kind.name]}")
    return [*overrides, *made]


def with_experiments() -> list[tuple[str, str]]:
    found = [(job, path.stem) for job in JOBS for path in (config_root() / job / "experiment").glob("*.yaml")]
    return [(job, "null") for job in JOBS] + sorted(found)


@pytest.mark.parametrize("job", JOBS)
def test_every_option_declares_what_it_may_be(job):
    """A file that lacks one leaves its key unchecked: ``key: value  # KIND; words`` (see runtime/options.py)."""
    undeclared = [
        key
        for key, field in options_of(job).items()
        if field.declaration is None and not isinstance(field.value, dict) and not typed_by_target(job, key)
    ]
    assert not undeclared


def typed_by_target(job: str, key: str) -> bool:
    """Whether the key is a parameter of its node's ``_target_`` (checked by its annotation) or stands for another."""
    above = key.rpartition(".")[0]
    field = options_of(job).get(above)
    a_node = field is not None and field.declaration and any(kind.name == "node" for kind in field.declaration.kinds)
    in_node = field is not None and isinstance(field.value, dict) and ("_target_" in field.value or not field.value)
    in_node = in_node or bool(a_node)
    return in_node or "${" in str(options_of(job)[key].value) or key.startswith(("algorithm.", "reward."))


@pytest.mark.parametrize(("job", "experiment"), with_experiments())
def test_what_the_files_give_is_what_they_allow(job, experiment):
    chosen = [] if experiment == "null" else [f"experiment={experiment}"]
    try:
        checked(job, required(job, *chosen))
    except OptionError as error:
        if "CUDA devices" not in str(error):
            raise


@pytest.mark.parametrize(
    ("job", "experiment"),
    [pair for pair in with_experiments() if pair[0].endswith("_experiment") and pair[1] != "null"],
)
def test_trainings_that_an_experiment_starts_take_its_overrides(job, experiment):
    stage, overrides = job.removesuffix("_experiment"), composed(job, [f"experiment={experiment}"]).training
    checked(stage, required(stage, *overrides_from(overrides, options_of(stage))))


@pytest.mark.parametrize("reward", ["traffic", "traffic_log", "traffic_safe", "realism"])
def test_terms_can_be_left_out_by_a_file(reward):
    """``terms: {contact: null}``: several files declare the terms of a reward, and the first one counts for all."""
    checked("stage3", required("stage3", "experiment=traffic", f"reward={reward}"))


@pytest.mark.parametrize("job", JOBS)
def test_what_nothing_reads_cannot_be_given(job):
    given = required(job)
    with pytest.raises(OptionError, match=re.escape("no key nonsense")):
        checked(job, [*given, "+nonsense=1"])
    cfg = composed(job, given)
    nodes = [key for key, node in nodes_of(cfg) if not taken_by(get_object(node._target_)).others]
    for key in (f"{above}.nonsense" for above in nodes):  # as + adds it, without composing all anew
        with_it = cfg.copy()
        OmegaConf.update(with_it, key, 1, force_add=True)
        with pytest.raises(OptionError, match=re.escape(f"no key {key}")):
            check(with_it, config_root() / job, config_root() / "shared", [*given, f"+{key}=1"])


def nodes_of(cfg: DictConfig, above: str = "") -> Iterator[tuple[str, DictConfig]]:
    for name in cfg:
        key = f"{above}.{name}" if above else str(name)
        if not OmegaConf.is_missing(cfg, name) and not OmegaConf.is_interpolation(cfg, name):
            if isinstance(node := cfg[name], DictConfig):
                if "_target_" in node:
                    yield key, node
                yield from nodes_of(node, key)


@pytest.mark.parametrize(
    ("job", "override", "word"),
    [
        ("metric_cache", "+data.scene_filer=x.yaml", "data.scene_filter"),
        ("score", "batchsize=3", "batch_size"),
        ("stage2", "+trainer.max_epoch=3", "trainer.max_epochs"),
        ("stage2", "+module.optimizer.learning_rate=1", "module.optimizer"),
        ("stage3", "+algorithm.groupsize=3", "algorithm.group_size"),
        ("stage1", "+tiny={widht:3}", "tiny.width"),
        ("score", "+reward={version:v1,progres:3}", "progress"),
        ("stage2", "run_dir=here", "the command sets it"),
    ],
)
def test_the_nearest_key_is_named(job, override, word):
    with pytest.raises(OptionError, match=re.escape(word)):
        checked(job, [*required(job), override])


def test_a_users_own_experiment_is_checked_too(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ntrainer: {max_epochs: 3}\ntrainr: {x: 1}\n"
    )
    _, rest = flags_of(["--config-dir", str(tmp_path), "experiment=mine"])
    with pytest.raises(OptionError, match="no key trainr"):
        checked("stage2", [*rest, *required("stage2")])
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ntrainer: {max_epochs: 3}\n")
    assert checked("stage2", [*rest, *required("stage2")]).trainer.max_epochs == 3


@pytest.mark.parametrize(
    ("job", "override"),
    [
        ("score", "batch_size=0"),
        ("score", "batch_size=1.5"),
        ("score", "batch_size=1,2"),
        ("score", "min_coverage=nan"),
        ("score", "min_coverage=.nan"),
        ("score", "min_coverage=1.01"),
        ("score", "workers=thread"),
        ("score", "device=gpu"),
        ("score", "device=cuda:99"),
        ("score", "two_frame=maybe"),
        ("score", "data.cameras=CAM_F0"),
        ("score", "metric_cache="),
        ("score", "metric_cache='  '"),
        ("stage2", "seed=x"),
        ("stage2", "seed=-1"),
        ("stage2", "module.optimizer.lr=-1"),
        ("stage2", "module.optimizer.lr=inf"),
        ("stage2", "module.optimizer.betas=[0.9]"),
        ("stage2", "callbacks.checkpoint.keep=0"),
        ("stage2", "trainer.precision=8"),
        ("stage2", "trainer.accelerator=abacus"),
        ("stage2", "planner.process=dimm"),
        ("synthetic", "scenes=1000000000000"),
        ("synthetic", "scenes=10^12"),
        ("synthetic", "recipe.mix.turn=-1"),
        ("render", "image_size=[960]"),
        ("stage3", "algorithm.group_size=0"),
        ("stage3", "policy.scorer._target_=stage3_grpo.rewards.Scorer"),
        ("stage3", "policy.scorer._target_=3"),
    ],
)
def test_values_out_of_range_name_key_value_and_range(job, override):
    key = override.partition("=")[0]
    options = options_of(job)
    with pytest.raises(OptionError, match=re.escape(key)) as refused:
        checked(job, overrides_from([*required(job), override], options))
    declaration = options[key].declaration if key in options else None
    if declaration is not None and "CUDA" not in str(refused.value):
        assert str(declaration) in str(refused.value)


def test_an_option_of_another_choice_has_no_effect_and_is_refused():
    with pytest.raises(
        OptionError, match=r"ray_address=auto would have no effect.*workers=ray; workers is processes"
    ):
        checked("metric_cache", [*required("metric_cache"), "ray_address=auto"])
    assert checked("metric_cache", [*required("metric_cache"), "ray_address=auto", "workers=ray"]).ray_address == "auto"
    with pytest.raises(OptionError, match=r"no key planner\.checkpoint"):
        checked("score", [*required("score"), "planner=human", "+planner.checkpoint=x"])


def test_declarations_are_read_from_comments():
    assert str(Declaration.parse("int >= 1 <= 5 or auto; words").kinds[0]) == "int >= 1 <= 5"
    assert Declaration.parse("of processes and ray") is None
    assert Declaration.parse("a | b, with c=d|e; words").condition == ("c", ("d", "e"))
    pairs = Declaration.parse("list of list of 2 float > 0 or null").kinds[0]
    assert [pairs.admits(each) for each in ([[1, 2.5]], [[1]], [[1, 0]])] == [True, False, False]
    assert not Declaration.parse("float").kinds[0].admits(math.nan)
    assert not Declaration.parse("int").kinds[0].admits(True)
    assert Declaration.parse("mapping of bool").kinds[0].admits({"a": True})


NAMES = [
    "runs/version_0/checkpoints/epoch=1-step=4.ckpt", "my data/with blanks", "a[1]/b{2}", "#1", "路径/文件", "it's",
    "a,b", "C:\\x\\", '"', "$HOME", "~/x", "null/x", "123", "1e5", "true", "a=b=c", "%s", "x:y", "(z)", "\\'",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_paths_arrive_as_they_were_typed(name, tmp_path):
    options = options_of("score")
    arguments = [f"metric_cache={name}", f"data.index=x/{name}", f"output_dir={tmp_path}"]
    cfg = checked("score", overrides_from([*required("score"), *arguments], options))
    assert (cfg.metric_cache, cfg.data.index) == (name, f"x/{name}")
    cfg = checked(
        "score", overrides_from([*required("score"), "planner=diffusion", f"planner.checkpoint={name}"], options)
    )
    assert cfg.planner.checkpoint == name


def test_lists_of_paths_and_mappings_with_paths():
    options = options_of("report")
    arguments = ["scores=[a=1/b c,路径]", "training=[{title: Stage 1, folder: runs/epoch=1, columns: null}]"]
    cfg = composed("report", overrides_from(arguments, options))
    assert list(cfg.scores) == ["a=1/b c", "路径"]
    brackets = composed("report", overrides_from(["scores=[job=[1] #2/a, b[2,3]c,#]"], options))
    assert list(brackets.scores) == ["job=[1] #2/a", "b[2,3]c", "#"]
    for wrong in ("scores=[a]b]", "scores=[a[b]", "scores=[[a],b]"):
        with pytest.raises(OptionError):
            checked("report", overrides_from([*required("report"), wrong], options))
    assert cfg.training[0] == {"title": "Stage 1", "folder": "runs/epoch=1", "columns": None}


def test_quoting_keeps_every_text():
    parser, letters = OverridesParser.create(), random.Random(0)
    for _ in range(500):
        text = "".join(letters.choice("ab \\'\"=,[]{}#$:()路~!%\t.0") for _ in range(letters.randint(1, 9)))
        assert parser.parse_override(f"k={quote(text)}").value() == text


@pytest.mark.parametrize("value", ["[a,b]]", "[[a]", "{a:[b}"])
def test_a_list_that_cannot_be_read_is_named_as_it_was_typed(value):
    with pytest.raises(OptionError, match=re.escape(f"training={value} cannot be read")):
        overrides_from([f"training={value}"], options_of("stage2_experiment"))


@pytest.mark.parametrize("argument", ["word", "--multirun", "-x", "=3"])
def test_what_is_no_option_is_named(argument):
    with pytest.raises(OptionError):
        overrides_from(flags_of([argument])[1], {})


@pytest.mark.parametrize("job", JOBS)
def test_help_has_a_sentence_an_example_and_every_option(job):
    shared = config_root() / "shared"
    text = usage(config_root() / job, shared, options_of(job))
    lines = text.splitlines()
    assert lines[0][0].isupper()
    assert any(line.strip().startswith("python -m ") for line in lines[:5])
    assert all(len(line) <= 80 or line.startswith("  ") for line in lines if not line.startswith("  python"))
    for key, field in options_of(job).items():
        if not isinstance(field.value, dict):
            assert key in text, key


def test_help_lists_the_bounds(tmp_path):
    text = usage(config_root() / "score", config_root() / "shared", options_of("score"))
    assert "float >= 0 <= 1; refuse when the metric cache holds fewer of the tokens" in " ".join(text.split())
    assert Path(config_root() / "score").is_dir()
