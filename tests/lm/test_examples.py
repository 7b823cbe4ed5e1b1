import pytest

from mpunlearn.demo import models
from mpunlearn.demo.world import Recipe, generate_rows
from mpunlearn.errors import CheckpointError, DataError
from mpunlearn.lm.examples import IGNORED, Example, collate, encode, encode_alternates, prompt_and_answer
from mpunlearn.lm.records import Record, in_chat
from mpunlearn.lm.sources import Data


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
    prompt, rest = prompt_and_answer(tokenizer, Record(question, answer))
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
    with pytest.raises(DataError, match="leaves no room for its answer within --max-length 16"):
        encode([Record(text, "Lyon")], tokenizer, 16)


def test_batches_are_padded_and_masked(tokenizer) -> None:
    examples = encode([Record("Where?", "Lyon."), Record(None, "Lyon is in France and so is the sea.")], tokenizer, 64)
    batch = collate(examples, 7)
    for row, example in enumerate(examples):
        n = len(example.input_ids)
        assert batch["input_ids"][row].tolist() == example.input_ids + [7] * (batch["input_ids"].shape[1] - n)
        assert batch["attention_mask"][row].tolist() == [1] * n + [0] * (batch["input_ids"].shape[1] - n)
        assert batch["labels"][row, n:].eq(IGNORED).all()


def test_earlier_messages_stand_in_the_prompt(tokenizer) -> None:
    history = (("user", "Who is Ada?"), ("assistant", "An author."))
    for template in (tokenizer.chat_template, None):
        kept, tokenizer.chat_template = tokenizer.chat_template, template
        record = Record("Where was she born?", "In Lyon.", history)
        prompt, answer = prompt_and_answer(tokenizer, record)
        [example] = encode([record], tokenizer, 64)
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


def test_a_chat_that_the_template_refuses_is_an_error_of_the_data(tokenizer) -> None:
    """As Gemma's template refuses system messages."""
    refusal = "{{ raise_exception('System role not supported') if messages[0].role == 'system' }}"
    template, tokenizer.chat_template = tokenizer.chat_template, refusal + models.CHAT_TEMPLATE
    try:
        record = Record("Where?", "Lyon.", (("system", "be kind"),), where="x.jsonl, line 3")
        refused = (
            "x.jsonl, line 3: the model's chat template rejects messages with the roles system, user, assistant: System"
        )
        with pytest.raises(DataError, match=refused):
            encode([record], tokenizer, 64)
        assert len(encode([Record("Where?", "Lyon.")], tokenizer, 64)) == 1
        tokenizer.chat_template = "{% if %}"
        with pytest.raises(CheckpointError, match="template is broken"):  # not the data's fault
            encode([record], tokenizer, 64)
    finally:
        tokenizer.chat_template = template


def test_what_the_owner_of_the_data_says_stands_in_the_prompt(tokenizer) -> None:
    data = Data(system_prompt="Be kind.", template_kwargs={"date_string": "10 Apr 2025"})
    kept, template = tokenizer.chat_template, "{{ date_string }}|" + tokenizer.chat_template
    tokenizer.chat_template = template
    try:
        [told] = encode([in_chat(Record("Where?", "Lyon."), data)], tokenizer, 64)
        [untold] = encode([Record("Where?", "Lyon.")], tokenizer, 64)
        [_, answer] = prompt_and_answer(tokenizer, Record("Where?", "Lyon."))
    finally:
        tokenizer.chat_template = kept
    assert tokenizer.decode(told.input_ids).startswith("10 Apr 2025|<|system|>Be kind.<|user|>Where?")
    assert tokenizer.decode(untold.input_ids).startswith("1 January 2025|<|user|>Where?")
    for example in (told, untold):
        assert tokenizer.decode([label for label in example.labels if label != IGNORED]) == answer
