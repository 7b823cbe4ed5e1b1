"""Canonical JSON and numbers: equal to the Pith open graph's, and strict."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpunlearn.errors import RecordError
from mpunlearn.protocol.record.canonical import canonical, digest, number, stringified
from mpunlearn.protocol.record.pith import problems_of, signature_valid
from mpunlearn.record import verify

VECTORS = json.loads((Path(__file__).parent.parent / "fixtures" / "pith-vectors.json").read_text())
KEY = VECTORS["public_key"]["public_key_b64"]
TEXT = st.text(st.characters(max_codepoint=0xD7FF), max_size=8)
VALUES = st.recursive(
    TEXT | st.integers(-(2**53) + 1, 2**53 - 1),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
)


@given(VALUES)
def test_our_canonical_form_is_the_one_of_the_open_graph(value) -> None:
    expected = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert canonical(value) == expected
    assert digest(value) == hashlib.sha256(expected).hexdigest()


@pytest.mark.parametrize("value", [1.5, {"a": [0.0]}, None, True, {1: "a"}, {"a": float("nan")}, "\ud800", 2**60])
def test_what_readers_could_read_differently_is_refused(value) -> None:
    with pytest.raises(RecordError):
        canonical(value)


def test_numbers_become_strings_that_read_back_the_same() -> None:
    plan = {"rate": 1e-05, "none": None, "on": True, "list": (0.1, 3), "nested": {"x": 1 / 3}}
    found = stringified(plan)
    assert found == {"rate": "1e-05", "on": "true", "list": ["0.1", 3], "nested": {"x": repr(1 / 3)}}
    assert float(found["nested"]["x"]) == 1 / 3
    canonical(found)


@pytest.mark.parametrize("vector", VECTORS["records"], ids=lambda vector: vector["pith_number"])
def test_records_of_the_open_graph_have_their_numbers(vector) -> None:
    assert digest(vector["canonical_record"]) == vector["canonical_sha256"]
    assert number(vector["canonical_sha256"]) == vector["pith_number"]


@pytest.mark.parametrize("vector", VECTORS["signatures"], ids=lambda vector: vector["pith_number"])
def test_receipts_of_the_open_graph_verify(vector) -> None:
    sha256, signature = vector["canonical_sha256"], vector["signature_b64"]
    assert number(sha256) == vector["pith_number"]
    assert signature_valid(sha256, signature, KEY)
    other = VECTORS["records"][0]["canonical_sha256"]
    assert not signature_valid(other, signature, KEY)
    assert not signature_valid(sha256, signature, signature)
    assert not signature_valid(sha256, "no base64!", KEY)


def bundle(**changes):
    record = VECTORS["records"][0]
    name = record["pith_number"]
    aliases = [f"pith:{name[:8]}", f"pith:{name[:12]}", f"pith:{name[:16]}", f"pith:2026:{name}", "arXiv:2602.23798"]
    return {
        "bundle_type": "pith_open_graph_bundle",
        "bundle_version": "1.0",
        "pith_number": name,
        "short_pith_number": name[:8],
        "canonical_record": record["canonical_record"],
        "canonical_sha256": record["canonical_sha256"],
        "source_aliases": [{"alias_kind": "pith", "alias_value": value} for value in aliases],
        "events": [],
        **changes,
    }


def test_a_bundle_of_the_open_graph_verifies_and_every_change_is_named(tmp_path) -> None:
    path = tmp_path / "bundle.json"
    path.write_text(json.dumps(bundle()))
    assert "XAFXD6OC723QNOKBGIFOAU5GOD" in verify([path]).text()
    record = json.loads(json.dumps(bundle()["canonical_record"]))
    record["source"]["version"] = 3
    wrong = {
        "canonical_sha256": {"canonical_record": record},
        "pith_number": {"pith_number": "XAFXD6OC723QNOKBGIFOAU5GOE"},
        "short_pith_number": {"short_pith_number": "XAFXD6OD"},
        "source_aliases": {"source_aliases": [{"alias_kind": "pith", "alias_value": "pith:XAFXD6OC72"}]},
        "receipt": {"receipt": {"kind": "pith_receipt", "signature_b64": VECTORS["signatures"][0]["signature_b64"]}},
        "canonical_record": {"canonical_record": {"year": 2026.0}},
    }
    for name, change in wrong.items():
        path.write_text(json.dumps(bundle(**change)))
        with pytest.raises(RecordError, match=name):
            verify([path], public_key=KEY)


def test_a_receipt_needs_a_key() -> None:
    assert "public-key" in problems_of(bundle(receipt={"signature_b64": ""}))[0]
