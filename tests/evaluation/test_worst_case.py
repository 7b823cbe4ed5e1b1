"""The worst case is at least the plain answer, and finds what only another prompt gives away."""

from mpunlearn.demo.world import Recipe, generate_rows
from mpunlearn.evaluation import worst_case
from mpunlearn.evaluation.metrics import rouge_l
from mpunlearn.evaluation.probe import generate
from mpunlearn.evaluation.sets import Questions
from mpunlearn.lm.examples import encode, prompt_of
from mpunlearn.lm.model import load
from mpunlearn.lm.records import Record


def test_the_highest_score_over_all_prompts(save_tiny, monkeypatch) -> None:
    model, tokenizer = load(save_tiny())
    rows = generate_rows(0, Recipe())["forget"][:3]
    asked = [row["question"] for row in rows]
    reworded = ["Where does Ada live?", "", "Who is Bo?"]

    def said(question: str, beginning: str = "") -> str:
        [example] = encode([Record(question, "x")], tokenizer, 99)
        begun = tokenizer(beginning, add_special_tokens=False)["input_ids"] if beginning else []
        return generate(model, tokenizer, [prompt_of(example) + begun], 6)[0]

    # The truth is what the model says to another prompt each time.
    first, second = worst_case.BEGINNINGS[:2]
    answers = [said(reworded[0], second), said(asked[1], first), said(asked[2])]
    forget = Questions(asked, answers, answers, [[]] * 3, rewordings=reworded)
    assert worst_case.worst_case(model, tokenizer, forget, 6) == [1, 1, 1]
    plain = [rouge_l(answer, said(question))[0] for answer, question in zip(answers, asked, strict=True)]
    assert plain[0] < 1
    monkeypatch.setattr(worst_case, "BEGINNINGS", ())
    alone = Questions(asked, answers, answers, [[]] * 3)
    assert worst_case.worst_case(model, tokenizer, alone, 6) == plain
