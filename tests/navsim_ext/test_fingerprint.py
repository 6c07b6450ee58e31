"""Fingerprints: digest laws, refusal of mixing, round trip, tampering."""

import importlib.metadata
import json

import pytest

from navsim_ext.errors import MissingError
from navsim_ext.fingerprint import FILE_NAME, Fingerprint, FingerprintMismatch, digest_tokens, package_versions


def make(codec="bf16", width=64, **info):
    parent = Fingerprint("weights", {"sha": "abc"})
    return Fingerprint("hidden_cache", {"codec": codec, "width": width}, {"vlm": parent}, info)


def test_digest_ignores_key_order_and_info_but_not_values_or_parents():
    base = make()
    assert base.digest == make(host="a").digest
    assert base.digest == Fingerprint("hidden_cache", {"width": 64, "codec": "bf16"}, base.parents).digest
    assert base.digest != make(codec="int8").digest
    assert base.digest != Fingerprint("hidden_cache", base.fields).digest


def test_mismatch_names_every_difference_with_both_values():
    with pytest.raises(FingerprintMismatch) as error:
        make().require_equal(make(codec="int8", width=32), mine="the planner", theirs="the cache", remedy="Re-export.")
    message = str(error.value)
    for part in ("fields.codec: 'bf16' | 'int8'", "fields.width: 64 | 32", "the planner", "the cache", "Re-export."):
        assert part in message


def test_round_trip_and_tampering(tmp_path):
    make().save(tmp_path)
    assert Fingerprint.load(tmp_path) == make()
    content = json.loads((tmp_path / FILE_NAME).read_text())
    content["fields"]["width"] = 65
    (tmp_path / FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(FingerprintMismatch, match="edited"):
        Fingerprint.load(tmp_path)


def test_absent_fingerprint_says_what_to_do(tmp_path):
    with pytest.raises(MissingError, match="build it again"):
        Fingerprint.load(tmp_path)


def test_token_digest_is_order_free_and_counts_duplicates():
    assert digest_tokens(["b", "a"]) == digest_tokens(["a", "b"])
    assert digest_tokens(["a", "a"]) != digest_tokens(["a"])


def test_a_package_that_a_machine_does_without_is_recorded_as_absent():
    assert package_versions("torch", "no-such-distribution") == {
        "torch": importlib.metadata.version("torch"),
        "no-such-distribution": "absent",
    }
