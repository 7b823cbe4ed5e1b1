import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpunlearn.client.batches import batches, micro_batches
from mpunlearn.demo import models
from mpunlearn.demo.world import Recipe, generate_rows
from mpunlearn.errors import DataError
from mpunlearn.lm.examples import IGNORED, Example, collate, encode, encode_alternates, prompt_and_answer
from mpunlearn.lm.records import Record


@pytest.fixture(scope="module")
def tokenizer():
    recipe = Recipe()
    return models.tokenizer_of(generate_rows(0, recipe), recipe)


@pytest.mark.parametrize("chat", [True, False])
def test_only_the_answer_carries_loss(tokenizer, chat: bool) -> None:
    template, tokenizer.chat_template = tokenizer.chat_template, models.CHAT_TEMPLATE if chat else None
    question, answer = "Where was Ada born?", "Ada was born in Lyon."
    [example] = encode([Record(question, answer)], tokenizer, 64)
    learned = tokenizer.decode([label for label in example.labels if label != IGNORED])
    hidden = tokenizer.decode(example.input_ids[: example.labels.count(IGNORED)])
    prompt, rest = prompt_and_answer(tokenizer, question, answer)
    tokenizer.chat_template = template
    assert learned == rest
    assert learned.strip() == answer + "<|end|>"
    assert hidden == prompt
    assert question in hidden
    assert all(label in (IGNORED, token) for label, token in zip(example.labels, example.input_ids, strict=True))


def test_long_answers_are_cut_long_texts_are_split_and_nothing_else_is_lost(tokenizer) -> None:
    text = " ".join(["The Silent Harbour is in Lyon."] * 20)
    pieces = encode([Record(None, text)], tokenizer, 16)
    assert all(len(piece.input_ids) <= 16 for piece in pieces)
    assert tokenizer.decode([token for piece in pieces for token in piece.input_ids]) == text + "<|end|>"
    [cut] = encode([Record("Where?", text)], tokenizer, 16)
    assert len(cut.input_ids) == 16
    with pytest.raises(DataError, match="no room"):
        encode([Record(text, "Lyon")], tokenizer, 16)


def test_batches_are_padded_and_masked(tokenizer) -> None:
    examples = encode([Record("Where?", "Lyon."), Record(None, "Lyon is in France and so is the sea.")], tokenizer, 64)
    batch = collate(examples, 7)
    for row, example in enumerate(examples):
        n = len(example.input_ids)
        assert batch["input_ids"][row].tolist() == example.input_ids + [7] * (batch["input_ids"].shape[1] - n)
        assert batch["attention_mask"][row].tolist() == [1] * n + [0] * (batch["input_ids"].shape[1] - n)
        assert batch["labels"][row, n:].eq(IGNORED).all()


def test_a_round_sees_every_forget_example_once_an_epoch_and_never_depends_on_the_copy() -> None:
    plan = batches(10, 3, batch_size=4, epochs=2, seed=1, round_number=1)
    assert [len(batch) for batch in plan] == [4, 4, 2] * 2
    for epoch in (plan[:3], plan[3:]):
        assert sorted(pick.forget for batch in epoch for pick in batch) == list(range(10))
        assert {pick.retain for batch in epoch for pick in batch} <= {0, 1, 2}
    assert plan == batches(10, 3, batch_size=4, epochs=2, seed=1, round_number=1)
    assert plan != batches(10, 3, batch_size=4, epochs=2, seed=2, round_number=1)
    assert plan != batches(10, 3, batch_size=4, epochs=2, seed=1, round_number=2)
    assert plan[:3] != plan[3:]
    alone = batches(10, 0, batch_size=4, epochs=1, seed=1, round_number=1)
    assert {pick.retain for batch in alone for pick in batch} == {None}


def test_earlier_messages_stand_in_the_prompt(tokenizer) -> None:
    history = (("user", "Who is Ada?"), ("assistant", "An author."))
    for template in (tokenizer.chat_template, None):
        kept, tokenizer.chat_template = tokenizer.chat_template, template
        prompt, answer = prompt_and_answer(tokenizer, "Where was she born?", "In Lyon.", history)
        [example] = encode([Record("Where was she born?", "In Lyon.", history)], tokenizer, 64)
        tokenizer.chat_template = kept
        assert all(text in prompt for text in ("Who is Ada?", "An author.", "Where was she born?"))
        assert tokenizer.decode([label for label in example.labels if label != IGNORED]) == answer


def test_alternates_share_the_question(tokenizer) -> None:
    record = Record("Where?", "In Lyon.", alternates=("I don't know.", "In Fez."))
    [[one, two]] = encode_alternates([record], tokenizer, 64)
    [original] = encode([record], tokenizer, 64)
    prompt = original.labels.count(IGNORED)
    assert one.input_ids[:prompt] == two.input_ids[:prompt] == original.input_ids[:prompt]
    assert one.labels != two.labels


def test_skipped_tokens_carry_no_loss() -> None:
    example = Example([5, 6, 7, 8, 9], [IGNORED, IGNORED, 7, 8, 9])
    assert example.tokens == 3
    assert example.skipping(0) == example
    assert example.skipping(2).labels == [IGNORED] * 4 + [9]
    assert example.skipping(9).tokens == 0
    text = Example([5, 6, 7], [5, 6, 7])  # the first token of a text is never predicted
    assert text.tokens == 2
    assert text.skipping(1).tokens == 1


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4))
def test_micro_batches_hold_every_step_once(examples: int, batch_size: int, size: int, processes: int) -> None:
    plan = batches(examples, 0, batch_size=batch_size, epochs=2, seed=0, round_number=1)
    items, accumulated = micro_batches(plan, size, processes)
    assert len(items) == len(plan) * accumulated * processes
    assert max(map(len, items)) <= size
    for number, step in enumerate(plan):
        mine = items[number * accumulated * processes : (number + 1) * accumulated * processes]
        assert sorted(pick for item in mine for pick in item) == sorted(step)
