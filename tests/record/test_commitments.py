"""Salted commitments: every text of a set can be opened, nothing else can, and no guess can be tested."""

import hashlib
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpunlearn.errors import RecordError, StateError
from mpunlearn.protocol.record.commitments import Commitments, Leaf, merkle_root, text_digest

# The leaves and roots of the tests of Certificate Transparency, whose trees have the same hashes (RFC 9162, 2.1.1).
LEAVES = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
ROOTS = {
    1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
}


@pytest.mark.parametrize("size", ROOTS)
def test_the_tree_is_that_of_certificate_transparency(size) -> None:
    hashes = [hashlib.sha256(b"\0" + bytes.fromhex(leaf)).digest() for leaf in LEAVES[:size]]
    assert merkle_root(hashes).hex() == ROOTS[size]


def committed(texts: list[str]) -> Commitments:
    return Commitments({"forget": [Leaf.of(text_digest(text)) for text in texts]})


@given(st.integers(1, 40), st.data())
def test_every_text_opens_to_the_root_and_nothing_else_does(size, data) -> None:
    texts = [f"text {number}" for number in range(size)]
    kept = committed(texts)
    root = kept.roots()["forget"]
    opening = kept.open("forget", data.draw(st.sampled_from(texts)))
    assert opening.root() == root
    changes = [{"text": "text"}, {"salt": "0" * 64}, {"index": opening.index + 1}, {"size": 2 * size + 1}]
    if opening.path:
        changes += [{"path": opening.path[:-1]}, {"path": ["0" * 64, *opening.path[1:]]}]
    for change in changes:
        with suppress(RecordError):
            assert replace(opening, **change).root() != root, change
    with pytest.raises(RecordError, match="not in the committed"):
        kept.open("forget", "another text")


def test_a_guess_cannot_be_tested_without_the_salt() -> None:
    texts = ["yes"]
    assert committed(texts).roots() != committed(texts).roots()
    unsalted = Leaf("0" * 64, text_digest("yes"))  # the control: with a known salt, a guess is confirmed
    assert (
        Commitments({"forget": [unsalted]}).roots()
        == Commitments({"forget": [Leaf("0" * 64, text_digest("yes"))]}).roots()
    )


def test_commitments_are_made_once_and_stay(tmp_path) -> None:
    path, sets = tmp_path / "c.json", {"forget": [text_digest("a"), text_digest("b")], "retain": []}
    first = Commitments.pinned(path, sets)
    assert path.stat().st_mode & 0o077 == 0
    assert Commitments.pinned(path, sets) == first == Commitments.read(path)
    assert set(first.roots()) == {"forget"}
    for other in ({"forget": [text_digest("a")]}, {**sets, "retain": [text_digest("c")]}, {}):
        with pytest.raises(StateError, match="has committed to another"):
            Commitments.pinned(path, other)
    assert Commitments.read(path) == first
