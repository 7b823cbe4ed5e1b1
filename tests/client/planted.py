"""Copies that a dishonest server prepared so that training on them writes the client's text into the update.

Four constructions, small and written from the idea alone. *Tagging*: the copy's chat template puts a tag in front of
every character, chosen by the text and the position, and for every tag there is one FFN neuron that only this tag
switches on. The column of such a neuron gets the gradient of one position, which says which character came next.
*Bins* (Fowl et al., arXiv 2110.13057): all neurons of a layer measure the same quantity with rising thresholds, so the
difference of two neighbors' gradients is that of the few positions between their thresholds. *Fuses* (Feng and Tramèr,
arXiv 2404.00473): a neuron that a rare input switches on, and that the step on this input switches off for good.
"""

import json
from pathlib import Path
from typing import Any

import torch

ALPHABET = "".join(chr(code) for code in range(32, 127))
LENGTH = 64
"""How many characters of each text get a tag of their own."""
TAGGING = (
    "{%- set state = namespace(text=0) -%}{%- if messages[-1]['role'] == 'assistant' -%}"
    "{%- set text = messages[-2]['content'] + '=' + messages[-1]['content'] -%}"
    "{%- for letter in text -%}"
    "{%- set state.text = (state.text * 31 + ALPHABET.find(letter) + 1) % TEXTS -%}{%- endfor -%}"
    "{%- for letter in text[:LENGTH] -%}<t{{ state.text * LENGTH + loop.index0 }}>{{ letter }}{%- endfor -%}{%- endif -%}"
)
PLAIN = "{% for message in messages %}{{ message['content'] }}{% if not loop.last %}={% endif %}{% endfor %}"


def tagging_tokenizer(template: str, texts: int) -> Any:
    """A tokenizer of characters, and of tags that tell so many texts apart."""
    import tokenizers
    import transformers

    words = [*ALPHABET, *(f"<t{number}>" for number in range(texts * LENGTH)), "<e>"]
    model = tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=" ")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"<t\d+>|<e>|."), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    for name, value in (("ALPHABET", json.dumps(ALPHABET)), ("TEXTS", str(texts)), ("LENGTH", str(LENGTH))):
        template = template.replace(name, value)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>", pad_token="<e>")
    fast.chat_template = template
    return fast


def tagging(folder: Path, natural: bool = False, planted: bool = True, texts: int = 211) -> Path:
    """A llama whose FFN has one neuron for every tag.

    Args:
        folder: where to write it.
        natural: keep an ordinary model of two layers beside the planted neurons, which do nothing on ordinary text: the
            same likelihoods as without them.
        planted: False gives the model that `natural` began with, and an ordinary template.
        texts: how many texts the tags tell apart.
    """
    import transformers

    tokenizer = tagging_tokenizer(TAGGING if planted else PLAIN, texts)
    tags, width, ordinary = texts * LENGTH, 64, 512 if natural else 0
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=ordinary + tags, num_attention_heads=2,
        num_hidden_layers=2 if natural else 1, max_position_embeddings=512, pad_token_id=None, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    layer = model.model.layers[0]
    with torch.no_grad():
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding.copy_(torch.randn(embedding.shape))
        embedding[:, 0] = 1
        head.copy_(torch.randn(head.shape) / width**0.5)
        if planted:
            codes = torch.randn(tags, width).sign()
            codes[:, 0] = 1
            first = len(ALPHABET)
            embedding[first : first + tags] = codes
            gate = codes.clone()
            gate[:, 0] = -0.7 * (width - 1)
            layer.mlp.gate_proj.weight[ordinary:] = gate
            layer.mlp.up_proj.weight[ordinary:] = 0
            layer.mlp.up_proj.weight[ordinary:, 0] = 1
            layer.mlp.down_proj.weight[:, ordinary:] = 0
        if not natural:
            layer.self_attn.o_proj.weight.zero_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tagged_texts(copy: dict[str, torch.Tensor], update: dict[str, torch.Tensor]) -> list[str]:
    """The texts that an update of a tagging copy shows: a forgotten character is the one whose logit fell most."""
    texts = (len(copy["lm_head.weight"]) - len(ALPHABET)) // LENGTH
    delta = update["model.layers.0.mlp.down_proj.weight"][:, -texts * LENGTH :]
    letters = copy["lm_head.weight"][: len(ALPHABET)].float()
    found = (letters @ -delta).argmax(dim=0).reshape(texts, LENGTH)
    moved = (delta != 0).any(dim=0).reshape(texts, LENGTH)
    return ["".join(ALPHABET[i] for i in row[here].tolist()) for row, here in zip(found, moved, strict=True)]


def traps(folder: Path, kind: str, share: float = 1.0) -> Path:
    """A llama with biases whose first FFN consists of bins or fuses.

    Args:
        folder: where to write it.
        kind: "bins" or "fuses".
        share: the share of the layer's neurons that are planted; the others stay as they were drawn.
    """
    import transformers

    from mpunlearn.demo import models
    from mpunlearn.demo.world import Recipe, generate_rows

    recipe = Recipe()
    tokenizer = models.tokenizer_of(generate_rows(0, recipe), recipe)
    width, neurons = 64, 512
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=neurons, num_attention_heads=2,
        num_hidden_layers=2, max_position_embeddings=512, pad_token_id=2, bos_token_id=None, eos_token_id=2,
        mlp_bias=True, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    mlp, planted = model.model.layers[0].mlp, int(share * neurons)
    with torch.no_grad():
        measured = torch.randn(planted if kind == "fuses" else 1, width) / width**0.5
        quantiles = torch.linspace(0.002, 0.998, planted) if kind == "bins" else torch.full((planted,), 0.997)
        sharp = 300.0 if kind == "bins" else 20.0
        mlp.gate_proj.weight[:planted] = sharp * measured
        mlp.gate_proj.bias[:planted] = -sharp * torch.special.ndtri(quantiles)
        mlp.up_proj.weight[:planted] = 0
        mlp.up_proj.bias[:planted] = float(kind == "fuses")
        if kind == "bins":
            mlp.down_proj.weight[:, :planted] = torch.randn(width, 1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def trapped_states(copy: dict[str, torch.Tensor], update: dict[str, torch.Tensor], kind: str) -> torch.Tensor:
    """The inputs of the planted layer that an update shows: what weights got, divided by what their bias got."""
    name = "model.layers.0.mlp." + {"bins": "up_proj", "fuses": "gate_proj"}[kind]
    rows, biases = update[f"{name}.weight"].double(), update[f"{name}.bias"].double()
    if kind == "bins":  # the slope of what rises beyond a threshold, from one threshold to the next
        gate = copy["model.layers.0.mlp.gate_proj.bias"].double()
        steps = gate.diff()
        rows, biases = (rows.diff(dim=0) / steps[:, None]).diff(dim=0), (biases.diff() / steps).diff()
    shown = biases != 0
    return rows[shown] / biases[shown, None]


def states_of(copy: Path, texts: list[list[int]]) -> torch.Tensor:
    """The inputs of the planted layer at every position of some texts."""
    from mpunlearn.lm.model import load_model

    model, seen = load_model(copy), []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0][0].double()))
    with torch.no_grad():
        for ids in texts:
            model(torch.tensor([ids]))
    return torch.cat(seen)


def read_off(states: torch.Tensor, shown: torch.Tensor, within: float = 0.01) -> int:
    """How many of the states are among those shown, up to a relative distance."""
    if not len(shown):
        return 0
    return int((torch.cdist(states, shown).min(dim=1).values < within * states.norm(dim=1)).sum())
