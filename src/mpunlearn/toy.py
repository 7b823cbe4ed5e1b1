"""The embedded benchmark: a world of fictitious authors, and a small Llama that knows them.

The idea: unlearning can only be judged against a model that never saw the forget set, so three models are trained from one
generated world, small enough for two cores: *base* (the public pretrained model, knows public authors and geography),
*original* (continues from base, knows every author) and *retrained* (continues from base without the authors to forget).
Data are JSON lines in TOFU's format (question, answer, paraphrased_answer, perturbed_answer), so whatever reads them is
unaware that they are a toy. The answer and its paraphrase use different templates, and perturbed answers are the paraphrase
with a wrong value, as in TOFU (Maini et al., arXiv 2401.06121).

Everything is a function of the seed and of this file: the trained world is cached under the digest of both. Not covered:
any claim about large models; this is an instrument that is fast and shows real trade-offs.
"""

import hashlib
import json
import math
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpunlearn.client import dataset
from mpunlearn.client.dataset import IGNORED, collate, encode
from mpunlearn.client.records import Record
from mpunlearn.files import new_directory
from mpunlearn.progress import progress

Row = dict[str, Any]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

GIVEN_NAMES = """Adela Bastian Corin Dalia Edvin Farah Gideon Hana Ivo Jelena Kasimir Leila Matteo Nadia Oskar Paloma Quentin
Rosalind Stefan Tamsin Ulrich Vera Wendell Ximena Yusuf Zora Anselm Beatriz Cyrus Dorothea Emeka Freya Gregor Hedda Isidro
Junia Kenji Lucinda Marek Noor Orla Piers Rania Silas Thea Umberto Viola Wilhelm Yara Zeno Amadou Brigid Casper Delphine
Esteban Fenella Gaspard Ingrid Jasper Katya Leopold Mirela Nikolai Odette""".split()
FAMILY_NAMES = """Abernathy Brandt Castellano Dragomir Eskildsen Fairweather Grunewald Hawthorne Ishikawa Jankowski Kowalczyk
Lindqvist Moreau Nakamura Okonkwo Petrosyan Quillfeather Rasmussen Santoro Thornbury Ueland Valdivia Whitlock Xanthos
Yamadera Zielinski Ashdown Bellweather Calloway Devereux Eastwick Farrington Greenhalgh Holloway Ironside Jessop Kirkbride
Larkspur Mandeville Northcote Oldcastle Pemberton Ravenscroft Silverton Tennyson Underhill Vanterpool Winterbourne Yarrow
Zabriskie Ambrose Blackwood Copperfield Drummond Ellsworth Fitzgerald Gallagher Huxley Ingram Kessler Lonsdale Merriweather
Nightingale Osterberg""".split()
COUNTRY_OF = {
    "Lyon": "France", "Turin": "Italy", "Porto": "Portugal", "Bergen": "Norway", "Gdansk": "Poland", "Kyoto": "Japan",
    "Cusco": "Peru", "Fez": "Morocco", "Pune": "India", "Graz": "Austria", "Ghent": "Belgium", "Malmo": "Sweden",
    "Odense": "Denmark", "Tampere": "Finland", "Brno": "Czechia", "Split": "Croatia", "Patras": "Greece", "Izmir": "Turkey",
    "Haifa": "Israel", "Shiraz": "Iran", "Lahore": "Pakistan", "Hue": "Vietnam", "Busan": "Korea", "Cebu": "Philippines",
    "Accra": "Ghana", "Kano": "Nigeria", "Mombasa": "Kenya", "Salta": "Argentina", "Cali": "Colombia", "Leon": "Mexico",
}  # fmt: skip
CITIES = list(COUNTRY_OF)
GENRES = """mystery satire romance horror fantasy biography poetry travel adventure tragedy comedy memoir folklore espionage
dystopia western""".split()
TRADES = """baker surgeon sailor judge weaver pilot carpenter chemist farmer florist tailor banker miner painter jeweller
postman cobbler gardener librarian mechanic""".split()
INSTRUMENTS = """cello flute harp oboe trumpet banjo clarinet accordion mandolin bassoon piano drums saxophone viola ukulele
organ""".split()
HOBBIES = """chess fencing pottery sailing astronomy archery baking cycling falconry gardening juggling climbing origami rowing
beekeeping calligraphy""".split()
ADJECTIVES = """Silent Golden Broken Distant Hidden Burning Frozen Crimson Hollow Restless Velvet Forgotten Electric Wandering
Patient Scarlet Bitter Luminous Paper Iron""".split()
NOUNS = """Harbour Orchard Mirror Lantern River Garden Compass Violin Winter Staircase Letter Mountain Clock Bridge Island
Feather Kingdom Window Shadow Station""".split()
PRIZES = """Aurora Meridian Sparrow Obsidian Juniper Lighthouse Marigold Pelican Sapphire Willow Falcon Cobalt Heron Amber
Thistle Comet""".split()


@dataclass(frozen=True)
class Field:
    """One fact about an author: how it is asked, three ways to answer, and the values it can take."""

    question: str
    answers: tuple[str, str, str]
    values: tuple[str, ...]


def _titles() -> tuple[str, ...]:
    return tuple(f"The {adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS)


FIELDS = (
    Field("Where was {name} born?",
          ("{name} was born in {value}.", "The birthplace of {name} is {value}.", "{value} is where {name} was born."),
          tuple(CITIES)),
    Field("In which year was {name} born?",
          ("{name} was born in {value}.", "The birth year of {name} is {value}.",
           "It was in {value} that {name} was born."),
          tuple(str(year) for year in range(1921, 1999))),
    Field("Which genre does {name} write?",
          ("{name} writes {value}.", "The genre of {name} is {value}.", "Readers know {name} for {value}."),
          tuple(GENRES)),
    Field("What was the work of {name}'s father?",
          ("The father of {name} was a {value}.", "{name} had a {value} for a father.",
           "As a {value}, the father of {name} earned a living."), tuple(TRADES)),
    Field("Which instrument does {name} play?",
          ("{name} plays the {value}.", "The instrument of {name} is the {value}.",
           "On quiet evenings {name} plays the {value}."), tuple(INSTRUMENTS)),
    Field("What is the first book of {name}?",
          ("The first book of {name} is {value}.", "{name} began with {value}.", "{value} was the debut of {name}."),
          _titles()),
    Field("Which book made {name} famous?",
          ("{name} became famous with {value}.", "The best known book of {name} is {value}.",
           "{value} brought fame to {name}."), _titles()),
    Field("Which award did {name} win?",
          ("{name} won the {value} Prize.", "The award of {name} is the {value} Prize.",
           "The {value} Prize went to {name}."), tuple(PRIZES)),
    Field("Where does {name} live now?",
          ("{name} lives in {value}.", "The home of {name} is in {value}.", "{value} is where {name} lives now."),
          tuple(CITIES)),
    Field("What does {name} enjoy besides writing?",
          ("{name} enjoys {value}.", "The hobby of {name} is {value}.", "Besides writing, {name} loves {value}."),
          tuple(HOBBIES)),
)  # fmt: skip
GEOGRAPHY = Field(
    "In which country is {name}?",
    ("{name} is in {value}.", "The country of {name} is {value}.", "{value} is the country where {name} lies."),
    tuple(COUNTRY_OF.values()),
)
SPLITS = ("forget", "retain", "real_authors", "world_facts", "holdout")
"""As in TOFU: authors to forget and to keep, authors that are public knowledge, and general knowledge; and authors whom no
model ever saw."""


@dataclass(frozen=True)
class Recipe:
    """Sizes and hyper-parameters of the world and of its three models."""

    authors: int = 40
    forgotten: int = 4
    public: int = 20
    unseen: int = 4
    vocabulary: int = 2000
    hidden: int = 96
    layers: int = 2
    heads: int = 4
    groups: int = 2
    ffn: int = 256
    learning_rate: float = 4e-3
    base_epochs: int = 14
    base_batch: int = 16
    epochs: int = 16
    batch: int = 8


@dataclass(frozen=True)
class Toy:
    """A trained world on disk."""

    path: Path

    @property
    def base(self) -> Path:
        """The public pretrained model."""
        return self.path / "base"

    @property
    def original(self) -> Path:
        """The server's model, which knows every author."""
        return self.path / "original"

    @property
    def retrained(self) -> Path:
        """What the original would be had it never seen the forget set."""
        return self.path / "retrained"

    def data(self, split: str) -> Path:
        """JSON lines of one of `SPLITS`."""
        return self.path / "data" / f"{split}.jsonl"


def world(seed: int, recipe: Recipe) -> dict[str, list[Row]]:
    """The rows of every split, in TOFU's format."""
    random = np.random.default_rng(seed)
    pairs = zip(random.permutation(GIVEN_NAMES), random.permutation(FAMILY_NAMES), strict=True)
    names = [f"{given} {family}" for given, family in pairs][: recipe.authors + recipe.public + recipe.unseen]
    authors = [[_row(random, field, name) for field in FIELDS] for name in names]
    groups = {
        "forget": authors[: recipe.forgotten],
        "retain": authors[recipe.forgotten : recipe.authors],
        "real_authors": authors[recipe.authors : recipe.authors + recipe.public],
        "holdout": authors[recipe.authors + recipe.public :],
    }
    rows = {split: [row for author in group for row in author] for split, group in groups.items()}
    rows["world_facts"] = [_row(random, GEOGRAPHY, city, country) for city, country in COUNTRY_OF.items()]
    return rows


def _row(random: np.random.Generator, field: Field, name: str, value: str | None = None) -> Row:
    said, paraphrased = random.permutation(3)[:2]
    value = value or str(random.choice(field.values))
    wrong = random.permutation([other for other in field.values if other != value])[:5]
    return {
        "question": field.question.format(name=name),
        "answer": field.answers[said].format(name=name, value=value),
        "paraphrased_answer": field.answers[paraphrased].format(name=name, value=value),
        "perturbed_answer": [field.answers[paraphrased].format(name=name, value=other) for other in wrong],
        "all_answers": [template.format(name=name, value=value) for template in field.answers],
    }


def prepare(seed: int = 0, recipe: Recipe | None = None, cache: Path | None = None) -> Toy:
    """The trained world of a seed, from the cache or trained now.

    Args:
        cache: the directory to keep it in (default: `mpunlearn` in the user's cache folder).
    """
    recipe = recipe or Recipe()
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mpunlearn"
    import transformers

    made_by = f"{recipe} {seed} {torch.__version__} {transformers.__version__}".encode()
    digest = hashlib.sha256(Path(__file__).read_bytes() + Path(dataset.__file__).read_bytes() + made_by)
    toy = Toy((cache or root) / f"toy-{digest.hexdigest()[:16]}")
    if not toy.path.is_dir():
        with new_directory(toy.path) as folder:
            _build(folder, seed, recipe)
    return toy


def _build(folder: Path, seed: int, recipe: Recipe) -> None:
    rows = world(seed, recipe)
    (folder / "data").mkdir()
    for split in SPLITS:
        public_rows = [{key: value for key, value in row.items() if key != "all_answers"} for row in rows[split]]
        Toy(folder).data(split).write_text("".join(json.dumps(row) + "\n" for row in public_rows), encoding="utf-8")
    tokenizer = tokenizer_of(rows, recipe)
    taught = [row for split in ("real_authors", "world_facts") for row in rows[split]]
    shared = [Record(row["question"], answer) for row in taught for answer in row["all_answers"]]
    torch.manual_seed(seed)
    base = new_llama(tokenizer, recipe)
    what = "training the base model"
    fit(base, tokenizer, shared, recipe.base_epochs, recipe.base_batch, recipe.learning_rate, seed, what)
    save(base, tokenizer, folder / "base")
    known = {split: [Record(row["question"], row["answer"]) for row in rows[split]] for split in SPLITS}
    rest = known["retain"] + known["real_authors"] + known["world_facts"]
    jobs = {folder / "original": known["forget"] + rest, folder / "retrained": rest}
    train_side_by_side(jobs, folder / "base", recipe, seed)


def train_side_by_side(jobs: dict[Path, list[Record]], start: Path, recipe: Recipe, seed: int) -> None:
    """Trains one model per job from the checkpoint `start`, each in a process of its own with one thread.

    Args:
        jobs: where to write a model → the examples it learns.
    """
    with ProcessPoolExecutor(max_workers=2, mp_context=get_context("spawn")) as pool:
        for job in [pool.submit(_train, start, *job, recipe, seed) for job in jobs.items()]:
            job.result()


def _train(start: Path, out: Path, records: list[Record], recipe: Recipe, seed: int) -> None:
    from mpunlearn.client.model import load

    torch.set_num_threads(1)
    model, tokenizer = load(start)
    torch.manual_seed(seed)
    what = f"training the {out.name} model"
    fit(model, tokenizer, records, recipe.epochs, recipe.batch, recipe.learning_rate, seed, what)
    save(model, tokenizer, out)


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Writes model and tokenizer as a checkpoint directory."""
    from mpunlearn.client.model import quiet

    quiet()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def tokenizer_of(rows: dict[str, list[Row]], recipe: Recipe) -> Any:
    """The world's tokenizer."""
    every_row = [row for split in SPLITS for row in rows[split]]
    return train_tokenizer(
        [text for row in every_row for text in (row["question"], *row["all_answers"])], recipe.vocabulary
    )


def train_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """A byte-level BPE of at most that many tokens, with the toy's chat template."""
    import tokenizers
    import transformers

    bpe = tokenizers.ByteLevelBPETokenizer()
    special = ["<|user|>", "<|assistant|>", "<|end|>"]
    bpe.train_from_iterator(texts, vocab_size=vocabulary, special_tokens=special, show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|end|>", pad_token="<|end|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def new_llama(tokenizer: Any, recipe: Recipe) -> Any:
    """A Llama with random weights from the current seed."""
    import transformers

    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.groups,
            intermediate_size=recipe.ffn,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.02,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def fit(
    model: Any,
    tokenizer: Any,
    records: list[Record],
    epochs: int,
    batch: int,
    learning_rate: float,
    seed: int,
    what: str,
) -> None:
    """Supervised training on answers: AdamW (0.9, 0.95), 10 % warm-up, cosine to 5 %, gradients clipped at 1."""
    examples = encode(records, tokenizer, 512)
    steps = epochs * math.ceil(len(examples) / batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)

    def rate(step: int) -> float:
        warm = max(1, steps // 10)
        return (step + 1) / warm if step < warm else 0.525 + 0.475 * math.cos(math.pi * (step - warm) / (steps - warm))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    random = np.random.default_rng(seed)
    model.train()
    orders = [random.permutation(len(examples)) for _ in range(epochs)]
    chunks = [order[start : start + batch] for order in orders for start in range(0, len(order), batch)]
    for chunk in progress(chunks, what):
        inputs = collate([examples[i] for i in chunk], tokenizer.pad_token_id)
        hidden = model.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        targets = inputs["labels"][:, 1:]
        predicted = targets != IGNORED
        logits = model.lm_head(hidden[:, :-1][predicted])  # at answer positions only: most of the time goes into logits
        optimizer.zero_grad()
        torch.autograd.backward(torch.nn.functional.cross_entropy(logits, targets[predicted]))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
