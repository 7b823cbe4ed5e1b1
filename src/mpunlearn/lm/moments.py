"""Second moments of what a model's weights read and write on some text: how much noise in a weight matters.

E[x xᵀ] of a linear layer's input x says how much a change of its weight W matters: a perturbation Z changes the output by
Z x, whose mean square is tr(Z E[x xᵀ] Zᵀ). GPTQ (arXiv 2210.17323) and SparseGPT (2301.00774) use the same matrices.

An embedding reads tokens and writes the residual stream. There, E[g gᵀ] of the loss's gradient g at its output plays
the same role. K-FAC (arXiv 1503.05671) approximates the curvature of a loss by both kinds of moments.

Layers that read the same tensor, such as queries, keys and values, share one matrix. Each matrix is accumulated in
float32 on the model's device, so all of them must fit into memory together.

Not covered: weights that transformers does not hold as linear layers of the same name, such as those of experts; how
often each token occurs; gradients at the outputs of linear layers.
"""

from collections.abc import Collection
from typing import Any

import torch

from mpunlearn.lm.examples import IGNORED, Example, collate
from mpunlearn.lm.model import forward, pad_id
from mpunlearn.progress import progress


@torch.no_grad()
def input_moments(
    model: Any, tokenizer: Any, examples: list[Example], names: Collection[str], batch_size: int = 8
) -> tuple[dict[str, int], list[torch.Tensor]]:
    """Computes the second moments of the inputs of linear layers over all tokens of the examples.

    Args:
        model: a causal language model from transformers.
        tokenizer: its tokenizer.
        examples: the text, not empty.
        names: names of the weights to measure; those that are not linear layers of the model are left out.
        batch_size: examples per forward pass.

    Returns:
        For each weight, the index of its input; and for each input E[x xᵀ], shape (inputs, inputs), float32, on the CPU.
    """
    inputs: dict[str, int] = {}
    sums: list[torch.Tensor] = []
    last: list[tuple[Any, int]] = []
    keep: list[torch.Tensor] = []

    def hook(name: str) -> Any:
        def measure(module: Any, arguments: tuple[Any, ...]) -> None:
            (value,) = arguments[:1]
            if last and last[0][0] is value:  # the tensor that the previous layer read, too
                inputs.setdefault(name, last[0][1])
                return
            rows = value[keep[0]].float()
            if name not in inputs:
                inputs[name] = len(sums)
                sums.append(torch.zeros(rows.shape[1], rows.shape[1], device=rows.device))
            sums[inputs[name]].addmm_(rows.T, rows)
            last[:] = [(value, inputs[name])]

        return measure

    hooks = [
        module.register_forward_pre_hook(hook(f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and f"{name}.weight" in names
    ]
    device, training, count = next(model.parameters()).device, model.training, 0
    model.eval()
    try:
        for start in progress(range(0, len(examples), batch_size), "measuring the inputs of linear layers"):
            batch = collate(examples[start : start + batch_size], pad_id(tokenizer))
            batch = {key: tensor.to(device) for key, tensor in batch.items()}
            keep[:] = [batch["attention_mask"].bool()]
            count += int(batch["attention_mask"].sum())
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            last.clear()
    finally:
        for handle in hooks:
            handle.remove()
        model.train(training)
    return inputs, [(total / count).cpu() for total in sums]


def embedding_moment(model: Any, tokenizer: Any, examples: list[Example], batch_size: int = 8) -> torch.Tensor:
    """Computes the second moment of the loss's gradient at the output of the embedding.

    The loss is that of tokens drawn from the model's own predictions, which makes the moment one of the Fisher
    information. The gradients of a memorized text itself would vanish.

    Args:
        model: a causal language model from transformers.
        tokenizer: its tokenizer.
        examples: the text, not empty.
        batch_size: examples per forward and backward pass.

    Returns:
        Σ g gᵀ over all positions, divided by the number of drawn tokens, shape (hidden, hidden), float32, on the CPU.
    """
    device, training, count = next(model.parameters()).device, model.training, 0
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    outputs: list[torch.Tensor] = []

    def hook(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        outputs[:] = [output.detach().requires_grad_()]
        return outputs[0]

    handle = model.get_input_embeddings().register_forward_hook(hook)
    generator = torch.Generator().manual_seed(0)
    total: torch.Tensor | float = 0.0
    model.eval().requires_grad_(False)
    try:
        for start in progress(range(0, len(examples), batch_size), "measuring the embedding"):
            batch = collate(examples[start : start + batch_size], pad_id(tokenizer))
            output = forward(model, {key: tensor.to(device) for key, tensor in batch.items()})
            logits = output["logits"][output["targets"] != IGNORED].float()
            drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator).flatten().to(device)
            loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, outputs[0])
            rows = gradient.flatten(0, 1).float()
            total, count = total + rows.T @ rows, count + len(drawn)
    finally:
        handle.remove()
        model.train(training)
        for parameter in trainable:
            parameter.requires_grad_()
    assert isinstance(total, torch.Tensor)
    return (total / max(1, count)).cpu()
