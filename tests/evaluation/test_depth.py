"""UDS by hand, at the ends of its scale, between them, and for every family."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpunlearn.architecture import families
from mpunlearn.demo.world import Recipe, generate_rows
from mpunlearn.errors import PlanError
from mpunlearn.evaluation import depth
from mpunlearn.evaluation.evaluate import evaluate
from mpunlearn.evaluation.sets import Questions
from mpunlearn.lm.examples import IGNORED, collate
from mpunlearn.lm.losses import token_nll
from mpunlearn.lm.model import forward, load

FAMILIES = sorted(families.FAMILIES)


def questions(count: int = 6, entity: bool = True) -> Questions:
    rows = generate_rows(0, Recipe())["forget"][:count]
    columns = [[row[name] for row in rows] for name in ("question", "answer", "paraphrased_answer", "perturbed_answer")]
    return Questions(*columns, [row["entity"] for row in rows] if entity else [])


def test_the_score_by_hand() -> None:
    s1 = np.array([[0.04, 1.0, 3.0], [0.2, 0.4, 0.0], [0.05, 0.01, -1.0]])
    s2 = np.array([[9.0, 0.5, 3.5], [-0.3, 0.1, 7.0], [1.0, 1.0, 1.0]])
    # Layers up to the threshold do not count, more than s1 counts as s1, and less than 0 as 0.
    assert depth.unlearning_depth(s1, s2) == pytest.approx([(0.5 + 3) / 4, 0.1 / 0.6, np.nan], nan_ok=True)


@pytest.fixture(scope="module")
def pair() -> Callable[[Any, Any], Any]:
    """Trains a copy of a model on the forget answers."""

    def train(model: Any, tokenizer: Any) -> Any:
        original = copy.deepcopy(model)
        examples = questions().encoded(tokenizer).answers
        batch = collate(examples, 2)
        optimizer = torch.optim.AdamW(original.parameters(), lr=5e-3)
        for _ in range(40):
            output = forward(original, batch)
            loss = token_nll(output["logits"], output["targets"]).sum() / (output["targets"] != IGNORED).sum()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        return original

    return train


def between(original: Any, retrained: Any, share: float) -> Any:
    """A model that is so much of the way from the original to the retrained one."""
    model = copy.deepcopy(original)
    with torch.no_grad():
        for p, q in zip(model.parameters(), retrained.parameters(), strict=True):
            p.lerp_(q, share)
    return model


@pytest.mark.parametrize("entity", [True, False])
def test_depth_grows_from_the_original_to_the_retrained_model(save_tiny, pair, entity: bool) -> None:
    retrained, tokenizer = load(save_tiny())
    original, forget = pair(retrained, tokenizer), questions(entity=entity)
    s1 = depth.likelihood_drops(original, retrained, tokenizer, forget)
    assert s1.shape == (6, 2)
    assert (s1.max(axis=1) > 1).all()  # some layer carries each fact

    def score(model: Any) -> float:
        return float(depth.unlearning_depth(s1, depth.likelihood_drops(original, model, tokenizer, forget)).mean())

    assert score(original) == 0
    assert score(retrained) == 1
    curve = [score(between(original, retrained, share)) for share in (0, 0.25, 0.5, 0.75, 1)]
    assert curve == sorted(curve)
    assert curve[1] < curve[3]


def test_a_model_that_only_hides_its_knowledge_has_not_lost_it(save_tiny, pair) -> None:
    retrained, tokenizer = load(save_tiny())
    original, forget = pair(retrained, tokenizer), questions()
    hiding = copy.deepcopy(original)
    with torch.no_grad():
        hiding.lm_head.weight.neg_()  # says the opposite, and knows as much as before
    s1, s2 = (depth.likelihood_drops(original, model, tokenizer, forget) for model in (retrained, hiding))
    assert (depth.unlearning_depth(s1, s2) == 0).all()


def test_patching_against_a_forward_pass_that_is_written_out(save_tiny) -> None:
    original, tokenizer = load(save_tiny())
    other, _ = load(save_tiny("other"))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    forget = questions(2)
    drops = depth.likelihood_drops(original, other, tokenizer, forget)
    for row, example in enumerate(depth.entities(forget, tokenizer)):
        ids = torch.tensor([example.input_ids])
        positions = [i - 1 for i, label in enumerate(example.labels) if label != IGNORED]
        first, last = positions[0], positions[-1]
        assert positions == list(range(first, last + 1))
        theirs = other(ids, output_hidden_states=True).hidden_states[1]  # after the first of two layers
        ours = original(ids, output_hidden_states=True)
        mixed = ours.hidden_states[1].clone()
        mixed[:, positions] = theirs[:, positions]
        base = original.model
        angles = base.rotary_emb(mixed, torch.arange(ids.shape[1])[None])
        after = base.layers[1](mixed, position_embeddings=angles, attention_mask=None)
        patched = original.lm_head(base.norm(after[0] if isinstance(after, tuple) else after))
        likelihoods = [
            logits.log_softmax(-1)[0, positions].gather(1, ids[0, first + 1 : last + 2, None]).mean()
            for logits in (ours.logits, patched)
        ]
        assert drops[row, 0] == pytest.approx((likelihoods[0] - likelihoods[1]).item(), abs=1e-4)


def test_only_the_tokens_of_the_entity_are_labeled(save_tiny) -> None:
    _, tokenizer = load(save_tiny())
    forget = questions()
    for example, entity, answer in zip(depth.entities(forget, tokenizer), forget.entities, forget.answers, strict=True):
        said = tokenizer.decode([label for label in example.labels if label != IGNORED])
        assert entity in said
        assert len(said.strip()) < len(answer)
    unknown = Questions(forget.questions, forget.answers, forget.paraphrases, forget.wrong, ["nowhere"] * 6)
    for without in (unknown, questions(entity=False)):
        for example, answer in zip(depth.entities(without, tokenizer), forget.answers, strict=True):
            assert tokenizer.decode([label for label in example.labels if label != IGNORED]).strip() == answer


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_patched(save_tiny, family: str) -> None:
    sizes = {"num_local_experts": 2} if family == "mixtral" else {}
    sizes |= {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 24} if family == "qwen3_moe" else {}
    sizes |= {"pad_token_id": 2} if family == "gemma3_text" else {}
    original, tokenizer = load(save_tiny("original", family, **sizes))
    assert len(depth.layers_of(original)) == 2
    other = between(original, original, 0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.8)
    forget = questions(2)
    assert (depth.likelihood_drops(original, original, tokenizer, forget) == 0).all()
    assert (depth.likelihood_drops(original, other, tokenizer, forget) != 0).all()


def test_models_of_another_shape_are_refused(save_tiny) -> None:
    original, tokenizer = load(save_tiny())
    other, _ = load(save_tiny("deeper", num_hidden_layers=3))
    with pytest.raises(
        PlanError, match=r"--depth: .* found 2 layers of size 32 in the original model and 3 of size 32"
    ):
        depth.likelihood_drops(original, other, tokenizer, questions())
    with pytest.raises(PlanError, match="found no list of 2 layers in Linear"):
        module = torch.nn.Linear(1, 1)
        module.config = original.config
        depth.layers_of(module)


def test_depth_is_measured_cached_and_needs_both_other_models(save_tiny, pair, tmp_path: Path) -> None:
    path = save_tiny("retrained")
    model, tokenizer = load(path)
    pair(model, tokenizer).save_pretrained(tmp_path / "original")
    tokenizer.save_pretrained(tmp_path / "original")
    rows = generate_rows(0, Recipe())["forget"][:6]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: dict[str, Any] = {"benchmark": str(tmp_path / "data"), "cache": tmp_path / "cache", "max_new_tokens": 2}
    options |= {"retain_model": path, "depth": True}
    with pytest.raises(PlanError, match="--depth: needs --retain-model and --original-model"):
        evaluate(tmp_path / "original", **options)
    found = evaluate(tmp_path / "original", original_model=tmp_path / "original", **options)
    assert found.retrained is not None
    assert (found.metrics["UDS"], found.retrained["UDS"]) == (0, 1)
    assert found.intervals["UDS"] == [0, 0]
