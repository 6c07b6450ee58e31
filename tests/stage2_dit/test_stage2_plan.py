"""Planning from the command line, the batched runner, and the experiment's verdict."""

from __future__ import annotations

import sys
from pathlib import Path

import forked
import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from planner_world import WIDTH, build_world
from scene_worlds import token as token_of

from navsim_ext.dataset import SceneDataset, build_index
from navsim_ext.errors import DataError, MissingError
from navsim_ext.fingerprint import FingerprintMismatch
from navsim_ext.hidden_cache import CachedHiddenStates
from navsim_ext.planners import Planner, baseline
from navsim_ext.runtime.config import compose
from stage2_dit import DiffusionPlanner, PlannerConfig, load_planner, save_planner
from stage2_dit.experiment import SEEING, judge
from stage2_dit.inference import GraphError, PlannerRunner, TrajectoryPlanner
from stage2_dit.metrics import displacement
from stage2_dit.one_scene import CameraMount, EgoState, OneScene, empty_map, scene_of_picture
from stage2_dit.plan import find_scene, plan_scene, poses_table

COLUMNS = ("v1_nc", "v1_dac", "v1_ep", "v1_ttc", "v1_comfort")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return build_world(tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="module")
def checkpoint(world) -> Path:
    torch.manual_seed(0)
    planner = DiffusionPlanner(PlannerConfig(WIDTH, num_heads=2, head_width=8, num_layers=2, output_width=8,
                                             encoder_width=8))  # fmt: skip
    return save_planner(world / "planner", planner, CachedHiddenStates(world / "hidden").fingerprint)


def test_one_scene_from_the_command_line(world, checkpoint):
    token = token_of(10, "log-1")
    command = ["-m", "stage2_dit.plan", f"checkpoint={checkpoint}", f"token={token}", f"data.root={world}/data",
               "data.split=mini", f"hidden.folder={world}/hidden", f"output_dir={world}/planned"]  # fmt: skip
    done = forked.run(*command)
    assert done.returncode == 0, done.stderr
    assert "drawn without a map" in done.stdout + done.stderr
    assert "against human: ADE" in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith("│")]
    assert len(rows) == 8
    with Image.open(world / "planned" / f"{token}.png") as picture:
        assert min(picture.size) > 300
        assert np.asarray(picture.convert("L")).std() > 5  # something is drawn


def test_one_picture_becomes_a_scene(world, checkpoint, tmp_path):
    Image.new("RGB", (192, 108), "gray").save(tmp_path / "front.jpg")
    cfg = compose("plan", [f"checkpoint={checkpoint}", f"image={tmp_path}/front.jpg", "ego.command=left",
                           "ego.velocity=[4,0]", f"output_dir={tmp_path}",
                           f"hidden.folder={world}/hidden"])  # fmt: skip
    source = find_scene(cfg)
    scene = source.scene(source.tokens[0])
    assert scene.status().tolist() == [1, 0, 0, 0, 4, 0, 0, 0]
    np.testing.assert_allclose(scene.history_poses()[:, 0], [-6, -4, -2, 0])
    build_index(source, tmp_path / "index", cameras=("CAM_F0",))
    batch = SceneDataset(tmp_path / "index", horizon=None)[0]
    assert batch.token == source.tokens
    assert (SceneDataset(tmp_path / "index", horizon=None).sensor_root / batch.cameras[0]["CAM_F0"]).is_file()
    # seen from 1.5 m height, the ground 10 m ahead of the lens lies below the middle of the picture
    from navsim_ext.evaluation.drawing import project_to_camera

    camera = scene.cameras["CAM_F0"]
    ((u, v, depth),) = project_to_camera([[11.6, 0.0, 0.0]], camera, scene.lidar2ego)
    assert (u, depth) == pytest.approx((96, 10))
    assert v == pytest.approx(54 + 0.805 * 192 * 1.5 / 10)

    class Anything:
        fingerprint = load_planner(checkpoint).hidden

        def fetch(self, tokens):
            source = CachedHiddenStates(world / "hidden")
            return source.fetch(source.tokens[:1] * len(tokens))

    planned, name = plan_scene(load_planner(checkpoint), batch, Anything(), cfg)
    assert planned.shape == (1, 8, 3)
    assert name == "ddim"
    cfg.num_steps = 2  # of the planner's own sampler
    fewer, name = plan_scene(load_planner(checkpoint), batch, Anything(), cfg)
    assert name == "ddim"
    assert not torch.equal(fewer, planned)
    assert len(poses_table(planned[0].numpy(), "x").rows) == 8


@pytest.mark.parametrize(("job", "required"), [
    ("plan", ["checkpoint", "output_dir", "hidden.folder"]),
    ("convert", ["source", "target"]),
    ("stage2_experiment", ["output_dir", "data.hidden_cache", "data.metric_cache"]),
])  # fmt: skip
def test_configurations_ask_for_what_they_need(job, required):
    root = ["data.root=w"] if job == "stage2_experiment" else []
    assert OmegaConf.missing_keys(compose(job, root)) == set(required)
    if job == "stage2_experiment":
        for name in ("synthetic", "demo"):
            training = compose(job, [f"experiment={name}"]).training
            given = ["output_dir=a", "data.train=b", "data.hidden_cache=c"]
            assert not OmegaConf.missing_keys(compose("stage2", [*training, *given]))
    if job == "plan":
        assert compose(job, ["hidden=live", "device=cpu"]).hidden.index is None


def test_bad_requests(tmp_path, world, checkpoint):
    for overrides in ([], ["token=a", "image=b"]):
        with pytest.raises(DataError, match="either token"):
            find_scene(compose("plan", ["checkpoint=a", "output_dir=b", "hidden.folder=c", *overrides]))
    with pytest.raises(MissingError, match="does not exist"):
        scene_of_picture(tmp_path / "none.jpg", EgoState(), CameraMount())
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(DataError, match="cannot be read"):
        scene_of_picture(tmp_path / "text.jpg", EgoState(), CameraMount())
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="'up'; choose one of left"):
        scene_of_picture(tmp_path / "a.png", EgoState("up"), CameraMount())
    with pytest.raises(DataError, match=r"shape \(1, 3\); 3 finite poses"):
        scene_of_picture(tmp_path / "a.png", EgoState(history=[[0, 0, 0]]), CameraMount())
    scene = scene_of_picture(tmp_path / "a.png", EgoState(), CameraMount())
    with pytest.raises(MissingError, match="the only one here"):
        OneScene(scene, tmp_path, empty_map("x")).scene("other")


def test_runner_is_a_planner_and_does_not_depend_on_the_batch(world, checkpoint):
    loaded = load_planner(checkpoint)
    planner = TrajectoryPlanner(PlannerRunner(loaded.planner), "mine", loaded.fingerprint)
    assert isinstance(planner, Planner)
    dataset, hidden = SceneDataset(world / "index", cameras=()), CachedHiddenStates(world / "hidden")
    samples = [dataset[i] for i in (3, 4)]
    from navsim_ext.scene import collate_scenes

    together = planner.plan(collate_scenes(samples), hidden.fetch([sample.token[0] for sample in samples]))
    for i, sample in enumerate(samples):
        alone = planner.plan(sample, hidden.fetch(sample.token))
        torch.testing.assert_close(alone[0], together[i], atol=1e-4, rtol=0)
    with pytest.raises(MissingError, match="needs hidden states"):
        planner.plan(samples[0], None)
    with pytest.raises(GraphError, match="on cpu"):
        PlannerRunner(loaded.planner, cuda_graphs=True)


@pytest.mark.slow
def test_nothing_breaks_the_graph_of_compilation(world, checkpoint):
    """Tracing alone, without a compiler: training loss and sampler are one graph each, with the same numbers."""
    planner = load_planner(checkpoint).planner
    inputs = [torch.randn(2, 5, WIDTH), torch.tensor([[True] * 5, [True] * 3 + [False] * 2]), torch.randn(2, 4, 3),
              torch.randn(2, 8), torch.randn(2, 8, 3)]  # fmt: skip
    steps = torch.zeros(2, 5, 8, 3)
    runner = PlannerRunner(planner)
    traced = torch.compile(runner._eager, backend="eager", fullgraph=True)
    assert torch.equal(traced(*inputs, steps), runner._eager(*inputs, steps))

    def loss(hidden, mask, history, status, noise):
        conditioning = planner.condition(hidden, mask, history, status, queries_per_scene=8)
        return planner.training_loss(conditioning, torch.ones(2, 8, 3), noise, torch.tensor([3, 50]))

    assert torch.equal(torch.compile(loss, backend="eager", fullgraph=True)(*inputs), loss(*inputs))


def test_displacement_of_known_shifts():
    target = torch.zeros(2, 8, 3)
    trajectory = target + torch.tensor([[3.0, 4.0, 0.1], [0.0, 0.0, 2 * np.pi - 0.1]])[:, None]
    errors = displacement(trajectory, target)
    assert errors["ade"].tolist() == pytest.approx([5, 0])
    assert errors["fde"].tolist() == pytest.approx([5, 0])
    assert errors["heading_error"].tolist() == pytest.approx([0.1, 0.1], abs=1e-5)


def score_table(name: str, scores: np.ndarray, valid: np.ndarray | None = None) -> pd.DataFrame:
    count = len(scores)
    return pd.DataFrame(
        {"token": [f"t{i}" for i in range(count)], "name": name, "log_name": [f"log{i // 4}" for i in range(count)],
         "valid": np.ones(count, bool) if valid is None else valid, "pdms_v1": scores}
        | dict.fromkeys(COLUMNS, 1.0)
    )  # fmt: skip


def test_verdict_needs_margin_interval_and_scenes():
    rng = np.random.default_rng(0)
    rival = rng.uniform(0.4, 0.6, 80)
    options = {"required_points": 3.0, "minimum_scenes": 80}

    def verdict(gain, **changes):
        tables = {SEEING: score_table(SEEING, rival + gain), "low": score_table("low", rival - 0.2),
                  "rival": score_table("rival", rival)}  # fmt: skip
        return judge(tables, "pdms_v1", **(options | changes))

    clear = verdict(0.05 + 0.01 * rng.normal(size=80))
    assert clear.passed
    assert clear.best_rival == "rival"
    assert clear.logs == 20
    assert clear.differences["low"].mean == pytest.approx(0.25, abs=0.01)
    assert not verdict(0.02).passed  # too small
    assert not verdict(rng.choice([-0.4, 0.5], 80)).passed or verdict(0.05).passed  # noisy
    noisy = np.repeat(rng.permutation([-0.6] * 9 + [0.7] * 11), 4)
    assert noisy.mean() > 0.03
    assert not verdict(noisy).passed  # large in the mean, but the interval holds 0
    assert not verdict(0.05, minimum_scenes=81).passed
    some = {SEEING: score_table(SEEING, rival + 0.05), "rival": score_table("rival", rival, np.arange(80) > 0)}
    found = judge(some, "pdms_v1", **options)
    assert (found.scenes, found.left_out, found.enough_scenes, found.passed) == (79, 1, False, False)
    none = {SEEING: score_table(SEEING, rival), "rival": score_table("rival", rival, np.zeros(80, bool))}
    with pytest.raises(DataError, match="no test scene is valid for all planners"):
        judge(none, "pdms_v1", **options)


def test_hidden_states_of_another_origin_are_refused(world, checkpoint, tmp_path):
    cfg = compose("plan", [f"checkpoint={checkpoint}", "token=a", "output_dir=b", "hidden.folder=c"])

    class Other:
        fingerprint = CachedHiddenStates(world / "hidden").fingerprint.parents["vlm"]

    batch = SceneDataset(world / "index", cameras=())[0]
    with pytest.raises(FingerprintMismatch, match="hidden states"):
        plan_scene(load_planner(checkpoint), batch, Other(), cfg)
    assert baseline("standing_still").name == "standing_still"
