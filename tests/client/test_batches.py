"""Which examples make up which step, and that dividing a step changes nothing."""

from hypothesis import given
from hypothesis import strategies as st

from mpunlearn.client.batches import Examples, MicroBatches, optimizer_steps
from mpunlearn.lm.examples import IGNORED, Example


def test_a_round_sees_every_forget_example_once_an_epoch_and_never_depends_on_the_copy() -> None:
    steps = optimizer_steps(10, 3, batch_size=4, epochs=2, seed=1, round_number=1)
    assert [len(batch) for batch in steps] == [4, 4, 2] * 2
    for epoch in (steps[:3], steps[3:]):
        assert sorted(pick.forget for batch in epoch for pick in batch) == list(range(10))
        assert {pick.retain for batch in epoch for pick in batch} <= {0, 1, 2}
    assert steps == optimizer_steps(10, 3, batch_size=4, epochs=2, seed=1, round_number=1)
    assert steps != optimizer_steps(10, 3, batch_size=4, epochs=2, seed=2, round_number=1)
    assert steps != optimizer_steps(10, 3, batch_size=4, epochs=2, seed=1, round_number=2)
    assert steps[:3] != steps[3:]
    alone = optimizer_steps(10, 0, batch_size=4, epochs=1, seed=1, round_number=1)
    assert {pick.retain for batch in alone for pick in batch} == {None}


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2))
def test_micro_batches_hold_every_step_once(
    examples: int, batch_size: int, size: int, processes: int, retain: int
) -> None:
    """Over all processes, every example of a step is in one micro-batch, and all of them know the totals of the step."""
    steps = optimizer_steps(examples, retain, batch_size=batch_size, epochs=2, seed=0, round_number=1)
    forget = [Example([1, 100 + number], [IGNORED, 100 + number]) for number in range(examples)]
    kept = [Example([1, 50 + number, 2], [IGNORED, 50 + number, 2]) for number in range(retain)]
    parts = [
        MicroBatches(steps, Examples(forget, kept), size=size, pad=0, processes=processes, rank=rank)
        for rank in range(processes)
    ]
    for number, step in enumerate(steps):
        batches = [batch for part in parts for batch in part.step(number)]
        assert len({len(part.step(number)) for part in parts}) == 1
        assert all(len(batch["forget"]["labels"]) <= size for batch in batches)
        seen = [label for batch in batches for row in batch["forget"]["labels"].tolist() for label in row]
        assert sorted(label - 100 for label in seen if label != IGNORED) == sorted(pick.forget for pick in step)
        assert {batch["forget"]["step_tokens"] for batch in batches} == {len(step)}
        assert {batch["forget"]["step_examples"] for batch in batches} == {len(step)}
        if retain:
            seen = [label for batch in batches for row in batch["retain"]["labels"].tolist() for label in row]
            assert sorted(label - 50 for label in seen if label >= 50) == sorted(pick.retain for pick in step)
            assert {batch["retain"]["step_tokens"] for batch in batches} == {2 * len(step)}
