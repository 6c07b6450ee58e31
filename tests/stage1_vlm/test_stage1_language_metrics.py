"""BLEU, ROUGE-L and CIDEr-D against the captioning toolkit's figures, and under their laws."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from navsim_ext.errors import DataError, MissingError
from stage1_vlm.language_metrics import bleu, cider, meteor_1_5, rouge_l, tokens

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "language" / "metrics.json").read_text())
CANDIDATES = [tokens(item["candidate"]) for item in GOLDEN["items"]]
REFERENCES = [[tokens(text) for text in item["references"]] for item in GOLDEN["items"]]


def test_tokens_are_the_toolkits():
    assert [" ".join(words) for words in CANDIDATES] == GOLDEN["tokenised"]["candidate"]
    assert [[" ".join(words) for words in known] for known in REFERENCES] == GOLDEN["tokenised"]["references"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's 12 m, stop.", "it 's 12 m stop"),
        ("Don't turn: 3.5 m/s!", "do n't turn 3.5 m/s"),
        ('"Left-hand" lane; (clear)', "left-hand lane clear"),
        ("", ""),
    ],
)
def test_tokens_by_hand(text, expected):
    assert " ".join(tokens(text)) == expected


def test_figures_are_the_toolkits():
    ours = bleu(CANDIDATES, REFERENCES)
    assert [ours[order].mean for order in (1, 2, 3, 4)] == pytest.approx(GOLDEN["bleu"], abs=1e-12)
    np.testing.assert_allclose(ours[4].each, GOLDEN["bleu4_each"], atol=1e-12)
    for name, score in (("rouge_l", rouge_l(CANDIDATES, REFERENCES)), ("cider", cider(CANDIDATES, REFERENCES))):
        assert score.mean == pytest.approx(GOLDEN[name], abs=1e-12)
        np.testing.assert_allclose(score.each, GOLDEN[f"{name}_each"], atol=1e-12)


def test_the_same_text_has_full_marks_and_an_empty_one_none():
    texts = [["the", "car", "ahead", "is", "braking"], ["we", "follow", "the", "left", "lane"]]
    same = [[text] for text in texts]
    assert bleu(texts, same)[4].mean == pytest.approx(1, abs=1e-8)
    assert rouge_l(texts, same).mean == 1
    assert cider(texts, same).mean == pytest.approx(10)
    nothing = [[], []]
    assert rouge_l(nothing, same).mean == 0
    assert cider(nothing, same).mean == 0
    assert bleu(nothing, same)[1].mean < 1e-9


def test_order_of_items_and_of_references_does_not_matter():
    order = np.random.default_rng(0).permutation(len(CANDIDATES))
    candidates = [CANDIDATES[row] for row in order]
    references = [REFERENCES[row][::-1] for row in order]
    np.testing.assert_allclose(cider(candidates, references).each, cider(CANDIDATES, REFERENCES).each[order])
    np.testing.assert_allclose(rouge_l(candidates, references).each, rouge_l(CANDIDATES, REFERENCES).each[order])
    assert bleu(candidates, references)[4].mean == pytest.approx(bleu(CANDIDATES, REFERENCES)[4].mean)


def test_items_without_reference_are_refused():
    with pytest.raises(DataError, match=r"items \[1\] have no reference"):
        rouge_l([["a"], ["b"]], [[["a"]], []])
    with pytest.raises(DataError, match="0 candidates"):
        bleu([], [])


def test_meteor_names_what_is_absent_or_equals_the_program():
    texts, known = [item["candidate"] for item in GOLDEN["items"]], [item["references"] for item in GOLDEN["items"]]
    if find_spec("pycocoevalcap") is None or shutil.which("java") is None:
        with pytest.raises(MissingError, match=r"pycocoevalcap|Java runtime"):
            meteor_1_5(texts, known)
    else:
        assert meteor_1_5(texts, known).mean == pytest.approx(GOLDEN["meteor_1.5"], abs=1e-6)
