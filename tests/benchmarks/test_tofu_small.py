"""The benchmark on real text, at a size for tests: one author of four is forgotten."""

import os
from pathlib import Path

import pytest

from mpunlearn.demo.world import Recipe
from tofu_small import tofu_small

TOFU = Path(os.environ.get("MPUNLEARN_TOFU", Path(__file__).parents[3] / "shared" / "data" / "tofu"))


@pytest.mark.slow
@pytest.mark.skipif(not (TOFU / "forget01.json").is_file(), reason="the TOFU files are not part of the repository")
def test_real_authors_are_forgotten(tmp_path: Path) -> None:
    recipe = Recipe(vocabulary=1500, epochs=32, hidden=96, ffn=256)
    lines = tofu_small(TOFU, tmp_path, forget_authors=1, retain_authors=3, recipe=recipe, rounds=3)
    original, retrained, free, single, mpu = lines
    assert original.forget.probability > 0.9
    assert original.retain.probability > 0.9
    assert retrained.forget.probability < 0.05
    for line in (free, single, mpu):
        assert line.forget.probability < 0.5
    assert mpu.retain.probability > 0.85
    assert mpu.forget.rouge_l < 0.5
