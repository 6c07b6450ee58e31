"""Published question sets become conversations: each form, its faults counted by name, and a mixture that trains."""

from __future__ import annotations

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from navsim_ext.errors import CorruptFile, DataError, MissingError
from navsim_ext.questions.answers import read_decision, read_reply
from navsim_ext.questions.meta_actions import Decision
from stage1_vlm.data.importer import import_questions
from stage1_vlm.data.line_index import LineRules, build_index
from stage1_vlm.data.mixture import read_mixture
from stage1_vlm.loading import load_processor


@pytest.fixture
def folder(tmp_path, make_picture):
    for name in ("a.jpg", "b.jpg"):
        make_picture(1).save(tmp_path / name)
    return tmp_path


def imported(folder, name="imported") -> list[dict]:
    return [json.loads(line) for line in (folder / "out" / f"{name}.jsonl").read_text().splitlines()]


def write(path, content) -> str:
    path.write_text(json.dumps(content) if isinstance(content, list) else content)
    return path


ALPHADRIVE = [
    {"image": "a.jpg", "problem": "<image>Speed 5 m/s. Plan.", "solution": "<answer> KEEP, STRAIGHT </answer>",
     "thinking": "<think> The road is free. </think>"},
    {"image": "b.jpg", "problem": "Speed 9 m/s. Plan.", "solution": "STOP, LEFT_TURN", "thinking": ""},
]  # fmt: skip


@pytest.mark.parametrize("lines", [False, True])
def test_alphadrive(folder, lines):
    content = "\n".join(map(json.dumps, ALPHADRIVE)) if lines else ALPHADRIVE
    told = import_questions(write(folder / "train.json", content), folder / "out")
    assert told == {"form": "alphadrive", "records": {"decision": 2}, "skipped": {}}
    first, second = imported(folder)
    assert first["conversations"][1]["value"] == "<think>The road is free.</think><answer>KEEP, STRAIGHT</answer>"
    assert read_reply(first["conversations"][1]["value"]).well_formed
    assert (first["answer"], first["reasoning_source"]) == ("KEEP, STRAIGHT", "published")
    assert "reasoning_source" not in second
    assert read_decision(second["conversations"][1]["value"]) == Decision("STOP", "LEFT_TURN")
    assert [one["image"] for one in (first, second)] == ["a.jpg", "b.jpg"]


def test_messages_with_pictures_beside_and_inside(folder):
    beside = {"messages": [{"role": "system", "content": "Drive."}, {"role": "user", "content": "<image>Is it red?"},
                           {"role": "assistant", "content": "yes"}], "images": ["a.jpg"]}  # fmt: skip
    inside = {"messages": [
        {"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "Which colour?"},
                                     {"type": "image_url", "image_url": {"url": "b.jpg"}}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]}  # fmt: skip
    path = write(folder / "train.jsonl", "\n".join(map(json.dumps, [beside, inside])))
    assert import_questions(path, folder / "out", name="chat")["records"] == {"chat": 2}
    first, second = imported(folder, "chat")
    assert [turn["from"] for turn in first["conversations"]] == ["system", "human", "gpt"]
    assert second["image"] == ["a.jpg", "b.jpg"]
    assert second["conversations"][0]["value"] == "<image>\nWhich colour?\n<image>"


def picture_bytes(make_picture, number, kind="PNG") -> bytes:
    stream = io.BytesIO()
    make_picture(number).save(stream, format=kind)
    return stream.getvalue()


def test_easyr1_with_pictures_inside_the_file(folder, make_picture):
    one, other = picture_bytes(make_picture, 1), picture_bytes(make_picture, 2, "JPEG")
    table = {
        "images": [[{"bytes": one, "path": None}], [{"bytes": other, "path": "x.jpg"}], [{"bytes": one, "path": None}]],
        "problem": ["<image>Plan.", "What colour?", "<image>Plan again."],
        "answer": ["<answer>KEEP, STRAIGHT</answer>", "red", "STOP, STRAIGHT"],
    }
    pq.write_table(pa.table(table), folder / "train.parquet")
    told = import_questions(folder / "train.parquet", folder / "out")
    assert told["form"] == "easyr1"
    assert told["records"] == {"decision": 2, "imported": 1}
    records = imported(folder)
    assert records[0]["image"] == records[2]["image"] != records[1]["image"]
    assert (folder / "out" / records[0]["image"]).read_bytes() == one  # as it was, once
    assert len(list((folder / "out" / "pictures").iterdir())) == 2
    assert json.loads((folder / "out" / "mixture.json").read_text())["imported"]["root"] == "."


def test_lingoqa_joins_the_references_of_a_question(folder):
    table = {
        "question_id": ["q1", "q1", "q2"], "segment_id": ["s1", "s1", "s2"],
        "images": [["a.jpg", "b.jpg"]] * 3, "question": ["Why do we stop?"] * 2 + ["What is ahead?"],
        "answer": ["The light is red.", "Because of the red light.", "A car."],
    }  # fmt: skip
    pq.write_table(pa.table(table), folder / "val.parquet")
    assert import_questions(folder / "val.parquet", folder / "out")["records"] == {"lingoqa": 2}
    first, second = imported(folder)
    assert first["references"] == ["The light is red.", "Because of the red light."]
    assert (first["scene_id"], second["references"]) == ("s1", ["A car."])


def test_drivebench(folder):
    row = {"question": "What moves?", "answer": "B. The bus", "question_type": "perception", "frame_token": "f1",
           "image_path": {"CAM_FRONT": "a.jpg", "CAM_BACK": "b.jpg"}}  # fmt: skip
    assert import_questions(write(folder / "test.json", [row]), folder / "out")["records"] == {"perception": 1}
    (record,) = imported(folder)
    assert record["conversations"][0]["value"] == "CAM_FRONT: <image>\nCAM_BACK: <image>\nWhat moves?"
    assert record["image"] == ["a.jpg", "b.jpg"]


def test_what_was_imported_is_indexed_whole(folder, tiny_internvl):
    import_questions(write(folder / "train.json", ALPHADRIVE), folder / "out")
    (entry,) = read_mixture(folder / "out" / "mixture.json")
    index = build_index(entry, load_processor(tiny_internvl, max_image_tokens=16), LineRules(4096))
    assert (len(index), index.skipped) == (2, ())


@pytest.mark.parametrize(("change", "reason"), [
    ({"solution": "KEEP"}, "no decision"), ({"solution": "KEEP, STOP, STRAIGHT"}, "no decision"),
    ({"solution": 3}, "malformed record"), ({"thinking": ["a"]}, "malformed record"), ({"problem": ""}, "malformed"),
    ({"image": 5}, "malformed record"), ({"problem": "<image><image>Plan"}, "wrong placeholders"),
])  # fmt: skip
def test_what_cannot_be_used_is_listed_by_reason(folder, change, reason):
    rows = [*ALPHADRIVE * 10, ALPHADRIVE[0] | change]
    told = import_questions(write(folder / "train.json", rows), folder / "out")
    assert list(told["skipped"]) == [next(iter(told["skipped"]))]
    (line,) = (folder / "out" / "skipped.jsonl").read_text().splitlines()
    assert reason in json.loads(line)["reason"]
    assert json.loads(line)["line"] == 21


def test_what_is_wrong_as_a_whole_is_refused(folder, make_picture):
    for content, message in (
        ([{"a": 1}], "no known form"), ([], "no known form"), ([ALPHADRIVE[0] | {"solution": "x"}], "cannot be used"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            import_questions(write(folder / "train.json", content), folder / "out")
    with pytest.raises(CorruptFile):
        import_questions(write(folder / "train.json", "[{"), folder / "out")
    (folder / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(CorruptFile):
        import_questions(folder / "bad.parquet", folder / "out")
    pq.write_table(pa.table({"problem": ["a"]}), folder / "few.parquet")
    with pytest.raises(DataError, match="images"):
        import_questions(folder / "few.parquet", folder / "out", form="easyr1")
    with pytest.raises(MissingError):
        import_questions(folder / "absent.json", folder / "out")
    with pytest.raises(MissingError, match="root"):
        import_questions(write(folder / "train.json", ALPHADRIVE), folder / "out", root=folder / "absent")
    with pytest.raises(DataError, match="form"):
        import_questions(write(folder / "train.json", ALPHADRIVE), folder / "out", form="other")


def test_bytes_that_are_no_picture_are_counted(folder, make_picture):
    good = picture_bytes(make_picture, 1)
    table = {"images": [[{"bytes": good, "path": ""}], [{"bytes": b"no", "path": ""}]],
             "problem": ["a", "b"], "answer": ["c", "d"]}  # fmt: skip
    pq.write_table(pa.table(table), folder / "train.parquet")
    told = import_questions(folder / "train.parquet", folder / "out", max_skipped_share=0.5)
    assert told["skipped"] == {"unreadable picture": 1}
