"""WOD-E2E: files written here come back as they were drawn; damage is named; plans are scored and submitted."""

import contextlib
import json
import tarfile

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from wod_worlds import RADIUS, SPEED, ego_at, frame, pictures, write_files

from navsim_ext.dataset import SceneDataset
from navsim_ext.errors import DataError, MissingError, TriviumError
from navsim_ext.evaluation.rated_frames import COLUMNS, measure, score_rated_frames
from navsim_ext.evaluation.rater_feedback import rater_feedback
from navsim_ext.evaluation.submission_file import InvalidSubmission
from navsim_ext.evaluation.waypoints import waypoints
from navsim_ext.files import write_json_atomic
from navsim_ext.frames import to_local
from navsim_ext.readers import SceneFilter, WodE2E, open_source
from navsim_ext.readers.wod_e2e import E2EFrame, driven
from navsim_ext.realism.submission import write_shards
from navsim_ext.runtime.config import compose
from navsim_ext.scene import CAMERAS, COMMANDS
from navsim_ext.scene_index import build_index
from navsim_ext.shards import ShardStore
from navsim_ext.traffic.build import NothingStored, build
from navsim_ext.traffic.tfrecord import read_records, write_records
from navsim_ext.wod_e2e.messages import frame_of, message_of, write_frames
from navsim_ext.wod_e2e.submission import MESSAGES, ServerMethod, check_submission, read_plans, write_submission
from navsim_ext.wod_e2e.unpack import FrameFiles, fingerprint_of

METHOD = ServerMethod(account_name="me", unique_method_name="one", num_model_parameters="1K")


def unpack(source, target, *, cameras=CAMERAS, every=1, skip_bad=False):
    files = FrameFiles(str(source), cameras, every)
    return build(files, target, skip_bad=skip_bad, encode=E2EFrame.to_arrays, fingerprint=fingerprint_of, what="frames")


@pytest.fixture
def root(tmp_path):
    """A data root with the split val."""
    unpack(write_files(tmp_path / "files"), tmp_path / "root" / "val")
    return tmp_path / "root"


def serialized(made: E2EFrame, **changes) -> bytes:
    message = message_of(made, pictures(made))
    for name, value in changes.items():
        setattr(message, name, value)
    return message.SerializeToString()


def test_a_frame_comes_back_from_its_message():
    made = frame()
    found, jpegs = frame_of(serialized(made), "here")
    assert jpegs == pictures(made)
    assert (found.id, found.time_us, found.intent) == (made.id, made.time_us, made.intent)
    for name in ("past", "future", "ratings"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(made, name), rtol=1e-6, atol=1e-6
        )  # float32 on the wire
    for one, other in zip(found.rated, made.rated, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    for name, camera in made.cameras.items():
        np.testing.assert_array_equal(found.cameras[name].to_vehicle, camera.to_vehicle)
        np.testing.assert_array_equal(found.cameras[name].intrinsics, camera.intrinsics)
    again = E2EFrame.from_arrays(found.id, found.to_arrays(), "record")
    assert [list(again.cameras), again.intent] == [sorted(found.cameras), found.intent]
    np.testing.assert_array_equal(again.rated[1], found.rated[1])


def test_a_known_drive_comes_back(root):
    source = open_source(root, "val", scene_filter=SceneFilter(num_history=4, num_future=10))
    assert isinstance(source, WodE2E)
    assert source.tokens == ["aaaa-000", "aaaa-001", "aaaa-002", "bbbb-000", "bbbb-001"]
    assert source.log_names == ["aaaa", "bbbb"]
    scene = source.scene("aaaa-001")
    expected = to_local(ego_at(np.arange(-3, 11) * 0.5), np.zeros(3))
    np.testing.assert_allclose(scene.ego_global[:, :2], expected[:, :2], atol=1e-5)
    np.testing.assert_allclose(
        scene.ego_global[:-1, 2], expected[:-1, 2], atol=1e-5
    )  # the chord lies along the tangent
    assert scene.ego_global[-1, 2] == pytest.approx(expected[-1, 2] - SPEED * 0.125 / RADIUS, abs=1e-5)  # one-sided
    np.testing.assert_allclose(scene.ego_dynamics[scene.now], [SPEED, 0.0, 0.0, SPEED**2 / RADIUS], atol=1e-5)
    np.testing.assert_allclose(scene.ego_dynamics[0], [SPEED, 0.0, 0.0, SPEED**2 / RADIUS], atol=1e-4)
    assert COMMANDS[scene.commands[scene.now].argmax()] == "left"
    assert (np.diff(scene.timestamps_us) == 500_000).all()
    assert not scene.annotated
    with pytest.raises(DataError, match="protocol=rater_feedback"):
        source.map_for(scene)


def test_cameras_look_where_they_are_mounted(root):
    scene = open_source(root, "val").scene("bbbb-000")
    assert sorted(scene.cameras) == sorted(CAMERAS)
    for name, camera in scene.cameras.items():
        pose = frame().cameras[name].to_vehicle
        np.testing.assert_allclose(camera.sensor2lidar_rotation @ [0.0, 0.0, 1.0], pose[:3, 0])  # optical axis: its x
        np.testing.assert_allclose(camera.sensor2lidar_rotation @ [1.0, 0.0, 0.0], -pose[:3, 1])  # right: not its y
        np.testing.assert_allclose(camera.sensor2lidar_translation, pose[:3, 3])
        assert (root / "val" / camera.path).is_file()
        np.testing.assert_array_equal(camera.intrinsics, [[50.0, 0.0, 32.0], [0.0, 51.0, 24.0], [0.0, 0.0, 1.0]])
        np.testing.assert_array_equal(camera.distortion, [0.1, 0.01, 0.001, 0.002, 0.003])


def test_headings_of_a_car_that_stands_or_backs():
    still = frame()
    past = still.past.copy()
    past[:, :3] = 0.0
    past[:, 3:] = 0.0
    ahead = np.column_stack([np.maximum(np.arange(1, 21) - 10, 0) * 1.0, np.zeros((20, 2))])
    poses, _ = driven(E2EFrame(still.id, 0, 0, past, ahead, still.cameras))
    np.testing.assert_array_equal(poses[:, 2], 0.0)
    backwards = ahead * [-1.0, 1.0, 1.0]
    poses, dynamics = driven(E2EFrame(still.id, 0, 0, past, backwards, still.cameras))
    np.testing.assert_allclose(np.abs(poses[:, 2]), 0.0, atol=1e-12)
    assert dynamics[-1, 0] == pytest.approx(-4.0)


def test_an_index_and_samples_of_it(root, tmp_path):
    index = build_index(open_source(root, "val", required_cameras=["CAM_B0"]), tmp_path / "index", cameras=("CAM_B0",))
    assert (len(index), index.logs) == (5, ("aaaa", "bbbb"))
    sample = SceneDataset(tmp_path / "index", cameras=("CAM_B0",), horizon=10)[2]
    assert sample.token == ["aaaa-002"]
    assert sample.status[0, :4].tolist() == [1.0, 0.0, 0.0, 0.0]
    np.testing.assert_allclose(sample.target[0, :, :2], ego_at(np.arange(1, 11) * 0.5)[:, :2], atol=1e-5)
    (root / "val" / sample.cameras[0]["CAM_B0"]).unlink()
    with pytest.raises(MissingError, match="unpack"):
        open_source(root, "val", required_cameras=["CAM_B0"]).scene("aaaa-002")


def test_a_filter_thins_out_and_long_windows_are_refused(root):
    assert open_source(root, "val", scene_filter=SceneFilter(frame_interval=2)).tokens == [
        "aaaa-000", "aaaa-002", "bbbb-000",
    ]  # fmt: skip
    assert open_source(root, "val", scene_filter=SceneFilter(tokens=["bbbb-001"])).tokens == ["bbbb-001"]
    with pytest.raises(DataError, match="8 poses up to now and 10 after it"):
        open_source(root, "val", scene_filter=SceneFilter(num_future=11))


def test_unpacking_keeps_what_is_rated_and_says_what_it_found(tmp_path):
    report = unpack(write_files(tmp_path / "files"), tmp_path / "val", cameras=["CAM_F0"], every=10)
    assert ShardStore(tmp_path / "val").tokens == ["aaaa-000", "aaaa-002", "bbbb-000", "bbbb-001"]
    assert report["notes"] == {"frames with a future": 4, "frames with rated trajectories": 2}
    assert sorted(path.name for path in (tmp_path / "val" / "pictures").rglob("*.jpg")) == [
        "000000_CAM_F0.jpg", "000000_CAM_F0.jpg", "000001_CAM_F0.jpg", "000002_CAM_F0.jpg",
    ]  # fmt: skip


def test_a_split_with_a_hidden_future_ends_now(tmp_path):
    unpack(write_files(tmp_path / "files", hidden=True), tmp_path / "test")
    source = open_source(tmp_path, "test")
    assert (len(source), source.scene("bbbb-001").num_future) == (5, 0)


def damaged(made: E2EFrame, how: str) -> bytes:
    message = message_of(made, pictures(made))
    if how == "no cameras":
        del message.frame.images[:]
    elif how == "no calibration":
        del message.frame.context.camera_calibrations[2]
    elif how == "unknown camera":
        message.frame.images[0].name = 9
    elif how == "camera twice":
        message.frame.images[0].name = 2
    elif how == "no picture":
        message.frame.images[0].image = b"none"
    elif how == "extrinsic":
        message.frame.context.camera_calibrations[0].extrinsic.transform.pop()
    elif how == "skewed":
        message.frame.context.camera_calibrations[0].extrinsic.transform[0] = 2.0
    elif how == "intrinsic":
        message.frame.context.camera_calibrations[0].intrinsic.pop()
    elif how == "intent":
        message.intent = 7
    elif how == "past":
        message.past_states.pos_y.pop()
    elif how == "future":
        message.future_states.pos_x.append(1.0)
    elif how == "nan":
        message.future_states.pos_x[3] = float("nan")
    elif how == "rating":
        message.preference_trajectories[0].preference_score = 11.0
    elif how == "empty rated":
        del message.preference_trajectories[0].pos_x[:], message.preference_trajectories[0].pos_y[:]
    elif how == "name":
        message.frame.context.name = "../../etc"
    return message.SerializeToString()


DAMAGES = {
    "no cameras": "has no camera", "no calibration": "and no calibration", "unknown camera": "camera 9",
    "camera twice": "each once", "no picture": "cannot be read", "extrinsic": "15 numbers", "skewed": "no rotation",
    "intrinsic": r"intrinsic has shape \(8,\)", "intent": "intent is 7", "past": "pos_y has 15 points",
    "future": "pos_x has 21 points", "nan": "not finite", "rating": "preference_score is 11", "name": "SEQUENCE-NUMBER",
    "empty rated": r"shape \(0, 2\)",
}  # fmt: skip


@pytest.mark.parametrize("how", DAMAGES)
def test_a_frame_that_breaks_the_format_is_named(how):
    with pytest.raises(DataError, match=DAMAGES[how]):
        frame_of(damaged(frame(), how), "file, record at byte 0")


def test_flipped_bits_of_a_message_are_named_or_leave_a_whole_frame():
    """What a checksum would have caught: no bit of a message makes anything but a frame that keeps its promises."""
    made = frame()
    message = message_of(made, {name: b"" for name in made.cameras})
    del message.frame.images[1:]
    message.frame.images[0].image = pictures(made)["CAM_F0"]
    whole, rng, refused = message.SerializeToString(), np.random.default_rng(0), 0
    for place in rng.integers(len(whole), size=400):
        content = bytearray(whole)
        content[place] ^= 1 << rng.integers(8)
        with contextlib.suppress(DataError):
            frame_of(bytes(content), "file, record at byte 0")[0].validate()
            continue
        refused += 1
        with pytest.raises(DataError, match=r"^file, record at byte 0"):
            frame_of(bytes(content), "file, record at byte 0")
    assert refused > 20


def test_bad_frames_are_refused_by_place_or_skipped_and_counted(tmp_path):
    (tmp_path / "files").mkdir()
    kept, bad = frame("aaaa-000"), damaged(frame("aaaa-001"), "no cameras")
    write_records(tmp_path / "files" / "a.tfrecord", [serialized(kept), bad])
    offset = list(read_records(tmp_path / "files" / "a.tfrecord"))[1][0]
    with pytest.raises(DataError, match=f"record at byte {offset}"):
        unpack(tmp_path / "files", tmp_path / "val")
    report = unpack(tmp_path / "files", tmp_path / "val", skip_bad=True)
    assert (report["stored"], report["skipped"], report["counts"]) == (1, 1, {"DataError": 1})


def test_flipped_and_cut_records_are_named_with_offset_and_checksum(tmp_path):
    file = write_files(tmp_path / "files", [frame("aaaa-000"), frame("bbbb-000")]) / "val.tfrecord-00000-of-00002"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    report = unpack(tmp_path / "files", tmp_path / "val", skip_bad=True)
    (entry,) = report["entries"]
    assert (report["stored"], entry["kind"]) == (1, "CorruptRecord")
    assert "record at byte 0" in entry["reason"]
    assert "CRC-32C" in entry["reason"]
    file.write_bytes(content[:-9])
    with pytest.raises(DataError, match="cut short"):
        unpack(tmp_path / "files", tmp_path / "other")


def test_a_frame_that_is_there_twice_is_refused(tmp_path):
    made = frame("aaaa-000")
    (tmp_path / "files").mkdir()
    for name in ("a.tfrecord", "b.tfrecord"):
        write_frames(tmp_path / "files" / name, [(made, pictures(made))])
    with pytest.raises(DataError, match="'aaaa-000' occurs twice"):
        unpack(tmp_path / "files", tmp_path / "val")


def test_a_split_of_bad_frames_alone_is_no_split(tmp_path):
    (tmp_path / "files").mkdir()
    write_records(tmp_path / "files" / "a.tfrecord", [damaged(frame(), "intent")])
    with pytest.raises(NothingStored, match="0 frames were stored"):
        unpack(tmp_path / "files", tmp_path / "val", skip_bad=True)


def test_a_rating_of_minus_one_is_none():
    made = frame()
    message = message_of(made, pictures(made))
    message.preference_trajectories[0].preference_score = -1.0
    message.preference_trajectories[1].ClearField("preference_score")
    found, _ = frame_of(message.SerializeToString(), "here")
    assert (found.rated, len(found.ratings)) == ((), 0)


@pytest.mark.parametrize("interval", [0.25, 0.5])
def test_waypoints_of_constant_acceleration_are_exact_and_of_a_circle_go_on(interval):
    times = np.arange(1, round(5 / interval) + 1) * interval
    plan = np.column_stack([4.0 * times + 0.7 * times**2, np.zeros((len(times), 2))])
    wanted = np.arange(1, 21) / 4
    np.testing.assert_allclose(waypoints(plan, interval)[:, 0], 4.0 * wanted + 0.7 * wanted**2, atol=1e-9)
    short = ego_at(times[times <= 4.0])
    np.testing.assert_allclose(waypoints(short, interval), ego_at(wanted)[:, :2], atol=2e-3)  # the fifth second too


@pytest.mark.parametrize(
    ("plan", "interval"), [(np.zeros((5, 3)), 0.5), (np.full((8, 3), np.nan), 0.5), (np.zeros((8, 2)), 0.5),
                           (np.zeros((8, 3)), 0.0)]
)  # fmt: skip
def test_plans_that_cannot_be_judged_are_refused(plan, interval):
    with pytest.raises(DataError, match="plan of"):
        waypoints(plan, interval)


def test_figures_of_a_plan_whose_answers_are_known():
    made = frame()
    figures = measure(made.future[:, :2], made)
    assert set(figures) == set(COLUMNS)
    assert (figures["rfs"], figures["rfs_within"], figures["ade_5s"], figures["ade_rated_3s"]) == (9.0, 1.0, 0.0, 0.0)
    beside = made.future[:, :2] + [0.0, 30.0]
    assert measure(beside, made)["ade_3s"] == pytest.approx(30.0)
    assert (
        measure(beside, made)["rfs"] == rater_feedback(beside[None], np.ones(1), made.rated, made.ratings, SPEED).score
    )
    late = made.future[:, :2].copy()
    late[12:] += [8.0, 0.0]
    assert measure(late, made)["ade_3s"] == 0.0
    assert measure(late, made)["ade_5s"] == pytest.approx(8.0 * 8 / 20)
    unrated = measure(beside, frame(rated=False))
    assert np.isnan([unrated["rfs"], unrated["ade_rated_5s"]]).all()
    assert np.isnan(measure(beside, frame(rated=False, hidden=True))["ade_3s"])


def scored(root, tmp_path, *overrides: str) -> pd.DataFrame:
    index = tmp_path / "index"
    build_index(open_source(root, "val"), index)
    options = ["protocol=rater_feedback", f"data.index={index}", f"data.root={root}", "data.split=val",
               f"output_dir={tmp_path / 'out'}", *overrides]  # fmt: skip
    return score_rated_frames(compose("score", options), Console(quiet=True))


def test_the_human_gets_the_rating_of_what_was_driven(root, tmp_path):
    scores = scored(root, tmp_path, "planner=human", "planner.poses=10")
    assert scores["valid"].all()
    np.testing.assert_allclose(scores.set_index("token")["rfs"][["aaaa-002", "bbbb-001"]], 9.0)
    assert scores["rfs"].isna().sum() == 3
    assert scores["ade_5s"].max() < 5e-3  # a spline through every second point of a circle
    aggregate = json.loads((tmp_path / "out" / "aggregate.json").read_text())
    assert (aggregate["rated"], aggregate["extended_s"], aggregate["tokens"]) == (2, 0.0, 5)
    assert aggregate["estimates"]["rfs"]["mean"] == 9.0


def test_constant_velocity_is_off_by_what_the_curve_bends(root, tmp_path):
    scores = scored(root, tmp_path)
    times = np.arange(1, 21) / 4
    apart = np.linalg.norm(ego_at(times)[:, :2] - np.column_stack([SPEED * times, 0 * times]), axis=-1)
    np.testing.assert_allclose(scores["ade_3s"], apart[:12].mean(), rtol=1e-4)
    np.testing.assert_allclose(scores["ade_5s"], apart.mean(), rtol=1e-4)
    assert json.loads((tmp_path / "out" / "aggregate.json").read_text())["extended_s"] == 1.0


@pytest.mark.parametrize(
    ("change", "error"),
    [("traffic=reactive", "traffic"), ("data.root=null", "unpack"), ("metric_cache=here", "metric_cache")],
)
def test_what_the_protocol_cannot_do_is_refused(root, tmp_path, change, error):
    with pytest.raises(TriviumError, match=error):
        scored(root, tmp_path, change)


def plans_of(root) -> dict[str, np.ndarray]:
    source = open_source(root, "val")
    return {token: source.frame(token).future[:, :2] for token in source.tokens}


def test_a_submission_comes_back_whole_and_is_scored(root, tmp_path):
    scored(root, tmp_path, "planner=human", "planner.poses=10")
    plans = read_plans(tmp_path / "out" / "trajectories.parquet")
    file = tmp_path / "submission.tar.gz"
    write_submission(file, plans, METHOD, list(plans), shards=2)
    with tarfile.open(file) as archive:
        assert archive.getnames() == [f"submission.binproto-0000{k}-of-00002" for k in range(2)]
    found, faults = check_submission(file, list(plans))
    assert faults == []
    for token, points in plans.items():
        np.testing.assert_allclose(found[token], points, atol=1e-5)


def test_what_is_wrong_with_a_submission_is_listed(root, tmp_path):
    plans, file = plans_of(root), tmp_path / "submission.tar.gz"
    with pytest.raises(InvalidSubmission, match="frame aaaa-000 has no trajectory"):
        write_submission(file, {k: v for k, v in plans.items() if k != "aaaa-000"}, METHOD, list(plans))
    with pytest.raises(InvalidSubmission, match="account_name is empty"):
        write_submission(file, plans, ServerMethod(), list(plans))
    assert not file.exists()
    good = MESSAGES["Submission"](
        submission_type=2, account_name="me", unique_method_name="x", num_model_parameters="1"
    )
    added = [("aaaa-000", 20, 0.0), ("aaaa-000", 20, 0.0), ("cccc-000", 20, 0.0), ("aaaa-001", 19, 0.0)]
    for name, count, value in [*added, ("aaaa-002", 20, float("inf"))]:
        one = good.predictions.add(frame_name=name).trajectory
        one.pos_x.extend([value] * count)
        one.pos_y.extend([0.0] * count)
    write_shards(file, [good], 1)
    _, faults = check_submission(file, list(plans))
    for words in ("submission_type is 2", "aaaa-000 is there already", "cccc-000 is none of those", "19 x and 19 y",
                  "aaaa-002 has a point that is not finite", "bbbb-000 is missing", "bbbb-001 is missing"):  # fmt: skip
        assert sum(words in fault for fault in faults) == 1, (words, faults)
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(DataError, match=r"no \.tar\.gz"):
        check_submission(file, list(plans))


def test_a_store_of_something_else_or_a_lost_report_is_named(root):
    write_json_atomic(root / "val" / "report.json", {})
    with pytest.raises(DataError, match=r"report\.json has no notes"):
        WodE2E(root, "val")
    with pytest.raises(MissingError):
        WodE2E(root, "nowhere")
