"""Mixtures with exact counts, line indices that list what they skip, grouping and packing that really save padding."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import damages, judge_damage
from hypothesis import given, settings
from hypothesis import strategies as st

from navsim_ext.errors import CorruptFile, DataError, MissingError
from navsim_ext.runtime.checksums import file_checksums
from navsim_ext.runtime.config import config_root
from navsim_ext.runtime.sampler import LengthGrouped, PositionSampler
from stage1_vlm.data import line_index
from stage1_vlm.data.datamodule import DrivingQuestionData
from stage1_vlm.data.line_index import LineRules, build_index, write_skipped
from stage1_vlm.data.mixture import DatasetEntry, read_mixture
from stage1_vlm.data.packing import (
    CLASS_RATIO,
    balanced_plan,
    length_classes,
    packing_plan,
    padding_share,
    waiting_share,
)
from stage1_vlm.data.questions import DrivingQuestions
from stage1_vlm.loading import load_processor

PUBLISHED_COUNTS = {
    "Navsim": (85109, 2), "Navsim_QA": (85109, 1), "CODA-LM": (20318, 1), "DriveLM": (4072, 1), "LingoQA": (26824, 1),
    "MAPLM": (10612, 1), "Nuinstruct": (57317, 1), "Omnidrive": (28010, 1), "SUTD": (9916, 1), "Talk2Car": (8079, 1),
    "NuScenes-QA": (24988, 1), "Drivegpt4": (26319, 1), "Senna": (27813, 1), "Drama": (16404, 1),
    "llava": (665298, 0.2),
}  # fmt: skip


@pytest.fixture(scope="module")
def processor(tiny_internvl):
    return load_processor(tiny_internvl, max_image_tokens=16)


def entry(folder: Path, lines: list, **fields) -> DatasetEntry:
    path = folder / "data.jsonl"
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return DatasetEntry("toy", path, folder, **fields)


def text_line(question: str, answer: str) -> dict:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def test_published_mixture_has_the_published_counts(monkeypatch):
    monkeypatch.setenv("DRIVING_QA_ROOT", "/qa")
    monkeypatch.setenv("OPENSCENE_DATA_ROOT", "/openscene")
    entries = read_mixture(config_root() / "stage1" / "recogdrive_pretrain.json")
    found = {one.name: (one.length, float(one.repeat_time)) for one in entries}
    assert found == PUBLISHED_COUNTS
    assert not any(one.data_augment for one in entries)
    total = sum(one.repeated_count(one.length) for one in entries)
    assert total == sum(n for n, r in PUBLISHED_COUNTS.values() if r == 1) + 2 * 85109 + 133059  # floor(665298 / 5)


@settings(max_examples=100, deadline=None)
@given(count=st.integers(1, 400), repeat=st.fractions(min_value=Fraction(1, 50), max_value=4))
def test_repeat_gives_whole_copies_and_a_choice(count, repeat):
    one = DatasetEntry("d", Path(), Path(), repeat_time=repeat)
    chosen = one.repeat(count, seed=3)
    times = np.bincount(chosen, minlength=count)
    assert len(chosen) == one.repeated_count(count) == int(repeat * count)
    assert times.max() - times.min() <= 1
    assert times.min() == int(repeat) or int(repeat * count) % count == 0
    np.testing.assert_array_equal(chosen, one.repeat(count, seed=3))


def test_mixture_mistakes_are_named(tmp_path, monkeypatch):
    path = tmp_path / "m.json"
    lines = {name: {"root": ".", "annotation": "a.jsonl"} for name in ("train_qa", "train_trajectory")}
    path.write_text(json.dumps(lines))
    repeated = {one.name: one.repeat_time for one in read_mixture(path, repeat={"*_trajectory": 0.2})}
    assert repeated == {"train_qa": 1, "train_trajectory": Fraction(1, 5)}
    with pytest.raises(DataError, match="match one of"):
        read_mixture(path, repeat={"*_traj": 0.2})
    path.write_text(json.dumps({"drivelm": {"root": ".", "annotation": "$NOT_SET_HERE/a.jsonl"}}))
    with pytest.raises(DataError, match="did you mean 'drivelm'"):
        read_mixture(path, ["drivelmm"])
    monkeypatch.delenv("NOT_SET_HERE", raising=False)
    with pytest.raises(MissingError, match="NOT_SET_HERE"):
        read_mixture(path)
    for content, message in (
        ({"a": {"root": "."}}, "missing"),
        ({"a": {"root": ".", "annotation": "a", "repeats": 2}}, "repeats"),
        ({"a": {"root": ".", "annotation": "a", "repeat_time": 0}}, "positive"),
        ([], "object"),
        ({"a": "."}, "object with root"),
        ({"a": {"root": 3, "annotation": "a"}}, "no path"),
        ({"a": {"root": ".", "annotation": "a\0"}}, "no path"),
        ({"a": {"root": ".", "annotation": "a", "repeat_time": "two"}}, "positive"),
        ({"a": {"root": ".", "annotation": "a", "repeat_time": float("inf")}}, "positive"),
        ({"a": {"root": ".", "annotation": "a", "length": "many"}}, "number of lines"),
        ({"a": {"root": ".", "annotation": "a", "data_augment": "no"}}, "true or false"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(DataError, match=message):
            read_mixture(path)
    for broken in (b"{", b"\xff", b"[" * 100_000):
        path.write_bytes(broken)
        with pytest.raises(CorruptFile, match=r"m\.json is no readable JSON"):
            read_mixture(path)


PLAIN = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"image": "a.jpg"}, "<image>\nWhat?"),
        ({"images": ["a.jpg"]}, "<image>\nWhat?"),
        ({"images": ["a.jpg", "a.jpg"]}, "<image>\n<image>\nWhat?"),
        ({"image": []}, "What?"),
    ],
)
def test_pictures_without_a_placeholder_stand_before_the_question(processor, tmp_path, make_picture, fields, text):
    """InternVL's own convention; never are the pictures of a record left out without a word."""
    make_picture(0).save(tmp_path / "a.jpg")
    for system in ([], [{"from": "system", "value": "Drive."}]):
        line = {"conversations": [*system, *PLAIN], **fields}
        index = build_index(entry(tmp_path, [line]), processor, LineRules(900))
        assert index.record(0)["conversations"][len(system)]["value"] == text
        example = DrivingQuestions([index], processor)[0]
        assert (example.input_ids == processor.image_token_id).any() == ("<image>" in text)
        assert bool(example.pixels) == ("<image>" in text)


@pytest.mark.parametrize(
    "fields", [{"video": "a.mp4"}, {"videos": ["a.mp4"]}, {"audio": "a.wav"}, {"image": "a.jpg", "images": ["a.jpg"]}]
)
def test_what_is_not_read_is_not_left_out(processor, tmp_path, make_picture, fields):
    make_picture(0).save(tmp_path / "a.jpg")
    lines = [{"conversations": PLAIN, **fields}, text_line("Is it?", "yes")]
    index = build_index(entry(tmp_path, lines), processor, LineRules(900), max_skipped_share=0.5)
    assert [line.line for line in index.skipped] == [1]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("cached", [False, True])
def test_a_json_array_is_read_as_its_lines(processor, tmp_path, indent, cached):
    lines = [text_line("路口 <b>" + "x" * number, f"answer {number}\n\u2028") for number in range(5)]
    lines.insert(2, {"conversations": []})
    one = entry(tmp_path, [])
    one.annotation.write_text("\n" + json.dumps(lines, indent=indent, ensure_ascii=False), encoding="utf-8")
    cache = tmp_path / "cache" if cached else None
    if cached:
        cache.mkdir()
    for _ in range(2):
        index = build_index(one, processor, LineRules(900), cache=cache, max_skipped_share=0.5)
        assert [line.line for line in index.skipped] == [3]
        assert [index.record(i) for i in range(len(index))] == [line for line in lines if line["conversations"]]
    one.annotation.write_text(json.dumps(lines)[:-30])
    with pytest.raises(CorruptFile, match="no JSON array"):
        build_index(one, processor, LineRules(900), max_skipped_share=0.5)


def test_names_with_dots_and_separators_keep_indices_of_their_own(processor, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    for number, name in enumerate(["nuscenes-v1.0", "nuscenes-v1.1", "../../x", "a/b"]):
        one = replace(entry(tmp_path, [text_line("Is it?", f"answer {number}")]), name=name)
        build_index(one, processor, LineRules(900), cache=cache)
    assert len(list(cache.glob("*.json"))) == 4
    assert sorted(path.parent for path in tmp_path.rglob("*.json")) == [cache] * 4


WRONG = [
    None, 3, -1.5, True, "", "text", "\ud800", "\0", "x" * 5000, [], [[]], {}, {"a": 1}, [None], [3], ["a", 3],
    "../a.jpg",
]  # fmt: skip


@pytest.mark.parametrize("key", ["image", "images", "image_size", "conversations", "from", "value", "message", "video"])
def test_wrong_fields_are_skipped_with_a_reason(processor, tmp_path, make_picture, key):
    make_picture(0).save(tmp_path / "a.jpg")
    lines = []
    for value in WRONG:
        record = {"image": "a.jpg", "conversations": [dict(PLAIN[0]), dict(PLAIN[1])]}
        if key in ("from", "value"):
            record["conversations"][0][key] = value
        elif key == "message":
            record["conversations"][1] = value
        else:
            record[key] = value
        lines.append(record)
    lines.append(text_line("Is it?", "yes"))
    index = build_index(entry(tmp_path, lines), processor, LineRules(900), max_skipped_share=0.99)
    questions = DrivingQuestions([index], processor)
    assert all(len(questions[i]) for i in range(len(questions)))
    assert len(index) + len(index.skipped) == len(lines)


def test_bad_lines_are_listed_with_number_and_reason(processor, tmp_path, make_picture):
    make_picture(0).save(tmp_path / "a.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:40])
    picture = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    lines = [
        text_line("Is it?", "yes"),
        b'{"conversations": [\n',
        {"image": "gone.jpg", "conversations": picture},
        {"image": "cut.jpg", "conversations": picture},
        {"image": ["a.jpg", "a.jpg"], "conversations": picture},
        {"conversations": picture},
        text_line("Is it?", "  "),
        {"image": "a.jpg", "image_size": [9000, 10], "conversations": picture},
        text_line("word " * 600, "yes"),
        {"text": "no conversation"},
        b"\xff\xfe\n",
        b"\n",
        {"image": "a.jpg", "conversations": picture},
    ]
    rules = LineRules(max_sequence_length=300, verify_pictures=True)
    index = build_index(entry(tmp_path, lines), processor, rules, max_skipped_share=0.95)
    assert [index.record(i)["conversations"][-1]["value"] for i in range(len(index))] == ["yes", "red"]
    assert {line.line: line.reason for line in index.skipped} == {
        2: "broken line", 3: "missing picture", 4: "unreadable picture", 5: "picture count", 6: "picture count",
        7: "empty answer", 8: "wrong image_size", 9: "too long", 10: "malformed record", 11: "broken line",
    }  # fmt: skip
    assert index.num_lines == 12  # the empty line is not one
    questions = DrivingQuestions([index], processor)
    write_skipped(questions.indices, tmp_path / "skipped.jsonl")
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 10
    assert questions.report()["toy"]["reasons"]["picture count"] == 2
    with pytest.raises(DataError, match=r"10 of 12 lines.*max_skipped_share"):
        build_index(entry(tmp_path, lines), processor, rules)


def test_more_image_tokens_than_fit_are_their_own_reason(processor, tmp_path, make_picture):
    make_picture(0, 96, 48).save(tmp_path / "a.jpg")  # 2 tiles and a thumbnail: 12 tokens of picture
    picture = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    lines = [{"image": "a.jpg", "conversations": picture}, text_line("a", "b")]
    assert processor.image_tokens(96, 48) == 12
    with pytest.raises(DataError, match=r"'too many image tokens': 1.*12 of at most 12"):
        build_index(entry(tmp_path, lines), processor, LineRules(12), max_skipped_share=1.0)


def test_wrong_counts_are_errors_not_shorter_data(processor, tmp_path):
    lines = [text_line(f"Is {i}?", "yes") for i in range(4)]
    with pytest.raises(DataError, match="4 lines, the mixture says length 5"):
        build_index(entry(tmp_path, lines, length=5), processor, LineRules(200))
    with pytest.raises(MissingError, match=r"nowhere\.jsonl"):
        build_index(DatasetEntry("toy", tmp_path / "nowhere.jsonl", tmp_path), processor, LineRules(200))


def test_index_is_stored_and_follows_the_file(processor, tmp_path, monkeypatch):
    lines = [text_line(f"Is {i} even?", "yes") for i in range(6)]
    one = entry(tmp_path, lines)
    first = build_index(one, processor, LineRules(200), cache=tmp_path / "index")
    monkeypatch.setattr(line_index, "_scan", lambda *_: pytest.fail("read again"))
    second = build_index(one, processor, LineRules(200), cache=tmp_path / "index")
    np.testing.assert_array_equal(first.offsets, second.offsets)
    np.testing.assert_array_equal(first.lengths, second.lengths)
    monkeypatch.undo()
    changed = build_index(entry(tmp_path, lines[:3]), processor, LineRules(200), cache=tmp_path / "index")
    assert len(changed) == 3


def test_a_damaged_stored_index_is_made_again(processor, tmp_path):
    one = entry(tmp_path, [text_line(f"Is {i} even?", "yes") for i in range(6)])

    def read():
        index = build_index(one, processor, LineRules(200), cache=tmp_path / "index")
        return index.offsets.tolist(), index.lengths.tolist(), index.num_lines, index.skipped

    read()
    verdicts = judge_damage(tmp_path / "index", read, np.random.default_rng(0), 20)
    assert len(verdicts) == 4  # the index, and of its lines: offsets, lengths, pictures
    assert all(verdict == {"named": 0, "without effect": 20} for verdict in verdicts.values())


def test_damage_of_question_files_that_we_wrote_is_named(tmp_path):
    annotation = tmp_path / "qa.jsonl"
    annotation.write_text("".join(json.dumps(text_line(f"Is {i}?", "yes")) + "\n" for i in range(50)))
    checksum = file_checksums(tmp_path, ["qa.jsonl"])["qa.jsonl"]
    mixture = tmp_path / "mixture.json"
    mixture.write_text(json.dumps({"toy": {"root": ".", "annotation": "qa.jsonl", "checksum": checksum}}))
    content = annotation.read_bytes()
    assert [one.annotation for one in read_mixture(mixture)] == [annotation]
    for damaged in damages(content, np.random.default_rng(0), 40):
        annotation.write_bytes(damaged)
        with pytest.raises(CorruptFile, match=r"qa\.jsonl.*take 'checksum' of 'toy' out of"):
            read_mixture(mixture)
    mixture.write_text(json.dumps({"toy": {"root": ".", "annotation": "qa.jsonl"}}))  # as the remedy says
    assert len(read_mixture(mixture)) == 1


def test_lengths_are_known_before_pictures_are_read(toy_mixture, processor):
    indices = [build_index(one, processor, LineRules(400)) for one in read_mixture(toy_mixture)]
    questions = DrivingQuestions(indices, processor)
    assert len(questions) == 2 * 24 + 4
    assert [len(questions[i]) for i in range(0, len(questions), 5)] == questions.lengths[::5].tolist()


def test_a_picture_that_contradicts_its_line_is_named(processor, tmp_path, make_picture):
    make_picture(0, 96, 54).save(tmp_path / "a.jpg")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    one = entry(tmp_path, [{"image": "a.jpg", "image_size": [54, 54], "conversations": turns}])
    questions = DrivingQuestions([build_index(one, processor, LineRules(300))], processor)
    with pytest.raises(DataError, match=r"in the index; image_size is not that.*96, 54"):
        questions[0]


def test_augmentation_is_off_by_default_and_seeded_when_on(toy_mixture, processor, tmp_path):
    from dataclasses import replace

    from navsim_ext.runtime.sampler import seed_cpu

    plain = read_mixture(toy_mixture, ["seen"])[0]
    index = build_index(plain, processor, LineRules(400))
    same = DrivingQuestions([index], processor)
    varied = DrivingQuestions([replace(index, entry=replace(plain, data_augment=True))], processor)
    seed_cpu(1)
    first = varied[0].pixels["pixel_values"]
    seed_cpu(1)
    assert torch.equal(varied[0].pixels["pixel_values"], first)
    assert not torch.equal(same[0].pixels["pixel_values"], first)
    assert torch.equal(same[0].pixels["pixel_values"], same[0].pixels["pixel_values"])


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=200))
def test_packing_keeps_every_item_within_capacity_and_near_the_bound(lengths):
    rows = packing_plan(lengths, 100)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert max(sum(lengths[item] for item in row) for row in rows) <= 100
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 100) + 6 / 9 + sum(length > 50 for length in lengths)
    with pytest.raises(DataError, match="does not fit"):
        packing_plan([*lengths, 101], 100)


def test_grouping_and_packing_save_most_of_the_padding():
    lengths = np.random.default_rng(0).integers(50, 2000, 4000)
    shares = {}
    for name, grouping in (("random", None), ("grouped", LengthGrouped(lengths))):
        order = PositionSampler(4000, 8, seed=0, grouping=grouping, rank=0, world_size=1).order(0)
        assert sorted(order) == list(range(4000))
        shares[name] = padding_share(lengths, order, 8)
    filled = [lengths[row].sum() for row in packing_plan(lengths, 12_288)]
    assert shares["random"] > 0.35
    assert shares["grouped"] < 0.05
    assert 1 - np.mean(filled) / 12_288 < 0.01


def test_a_length_class_mixes_tasks_at_little_padding():
    rng = np.random.default_rng(0)
    task = rng.integers(0, 2, 2000)
    lengths = np.where(rng.random(2000) < 0.5, np.array([58, 61])[task], np.array([150, 160])[task])
    order = PositionSampler(
        2000, 16, seed=0, grouping=LengthGrouped(length_classes(lengths)), rank=0, world_size=1
    ).order(0)  # fmt: skip
    batches = order[: 2000 // 16 * 16].reshape(-1, 16)
    shares = task[batches].mean(axis=1)
    assert abs(shares - 0.5).max() < 0.5  # sorted by length, most batches would be of one task alone
    assert shares.std() == pytest.approx(0.5 / 4, rel=0.2)  # as a random draw of 16
    assert padding_share(lengths, order, 16) < 0.06
    values = np.arange(1, 5000)
    classes = length_classes(values)
    assert all(values[classes == k].max() < CLASS_RATIO * values[classes == k].min() + 1e-9 for k in set(classes))


@settings(max_examples=60, deadline=None)
@given(
    items=st.lists(st.tuples(st.integers(1, 100), st.integers(0, 100)), min_size=1, max_size=150),
    seed=st.integers(0, 3),
)
def test_balanced_rows_keep_every_item_within_capacity(items, seed):
    lengths = np.array([sum(item) if sum(item) <= 100 else item[0] for item in items])
    pictures = np.minimum([item[1] for item in items], lengths)
    rows = balanced_plan(lengths, pictures, 100, seed=seed)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert max(lengths[row].sum() for row in rows) <= 100
    assert rows == balanced_plan(lengths, pictures, 100, seed=seed)
    assert len(rows) <= 2 * -(-lengths.sum() // 100)  # two rows that are half empty would be one
    with pytest.raises(DataError, match="does not fit"):
        balanced_plan([*lengths, 101], [*pictures, 0], 100)


def test_balanced_rows_are_alike_in_tokens_and_tiles():
    """Texts, single pictures and many-tile ones: packing alone leaves rows full of texts and rows full of tiles."""
    rng = np.random.default_rng(0)
    tiles = np.where(rng.random(4000) < 0.4, 0, rng.integers(1, 13, 4000))
    pictures = 256 * tiles
    lengths = pictures + rng.integers(40, 900, 4000)
    waits = {}
    plans = {"packed": packing_plan(lengths, 12_288), "balanced": balanced_plan(lengths, pictures, 12_288)}
    for name, rows in plans.items():
        loads = [np.array([values[row].sum() for row in rows]) for values in (lengths, pictures)]
        grouping = LengthGrouped(loads[1]) if name == "balanced" else None  # as the data module orders them
        order = PositionSampler(len(rows), 1, seed=0, grouping=grouping, rank=0, world_size=8).order(0)
        assert sorted(order) == sorted(set(order))
        waits[name] = [waiting_share(load, order, 1, 8) for load in loads]
        fill = loads[0].mean() / 12_288
        assert fill > 0.97
    assert waits["packed"][1] > 0.2
    assert max(waits["balanced"]) < 0.01


def test_waiting_is_what_the_busiest_leaves():
    order = np.arange(8)
    assert waiting_share([1, 1, 1, 1, 2, 2, 2, 2], order, 2, 2) == 0.0
    assert waiting_share([3, 0, 1, 0, 2, 2, 2, 2], order, 2, 2) == pytest.approx((1 - 2 / 3) / 2)


@pytest.mark.parametrize("batching", ["grouped", "packed", "balanced", "random"])
def test_an_epoch_holds_every_entry(toy_mixture, tiny_internvl, tmp_path, batching):
    data = DrivingQuestionData(
        str(toy_mixture), str(tiny_internvl), batch_size=4, batching=batching, max_sequence_length=300,
        max_image_tokens=16, index_folder=str(tmp_path / "index"), report_folder=str(tmp_path),
    )  # fmt: skip
    data.prepare_data()
    data.setup()
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader)
    names = [name for batch in batches for name in batch.names]
    assert len(set(names)) == 24 + 4
    assert len(names) >= 52
    shares = data.report["padding"]
    assert shares["grouped"] <= shares["random"]
    if batching in ("packed", "balanced"):
        again = DrivingQuestionData(
            str(toy_mixture), str(tiny_internvl), batch_size=4, batching=batching, max_sequence_length=300,
            max_image_tokens=16, index_folder=str(tmp_path / "index"),
        )  # fmt: skip
        again.setup()
        continued = again.train_dataloader()
        continued.load_state_dict({**loader.state_dict(), "position": 1})  # after the first batch
        assert [batch.names for batch in continued] == [batch.names for batch in batches[1:]]
        assert 0 <= shares["waiting_tiles"] < 1
    assert (tmp_path / "skipped.jsonl").read_text() == ""
    with pytest.raises(DataError, match="choose one of"):
        DrivingQuestionData(str(toy_mixture), str(tiny_internvl), batching="sorted")
