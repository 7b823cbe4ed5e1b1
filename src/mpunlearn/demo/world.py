"""The data of the built-in benchmark: a generated world of fictitious authors.

Unlearning can be judged only by comparison with a model that never saw the forget set. This world is small enough that
such models train in seconds on two cores (see `models`). The data is in TOFU's format (JSON lines with question,
answer, paraphrased_answer and perturbed_answer), so everything that reads TOFU can read it. An answer and its
paraphrase use different templates, and a perturbed answer is the paraphrase with a wrong value, as in TOFU (Maini et
al., arXiv 2401.06121). The column entity has the value itself.

Not covered: claims about large models. The benchmark is meant to be fast and to show realistic trade-offs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

Row = dict[str, Any]
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
    """One fact about an author: the question, three ways to answer it, and its possible values."""

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
"""As in TOFU: authors to forget, authors to keep, public authors, general knowledge; and a holdout that is never seen."""


@dataclass(frozen=True)
class Recipe:
    """Sizes and hyperparameters of a world and its three models."""

    authors: int = 40
    """Fictitious authors, including those to forget."""
    forgotten: int = 4
    """Authors to forget."""
    public: int = 20
    """Public authors, which the base model knows, too."""
    unseen: int = 4
    """Authors in the holdout set."""
    vocabulary: int = 2000
    hidden: int = 96
    layers: int = 2
    heads: int = 4
    groups: int = 2
    """Key-value heads."""
    ffn: int = 256
    learning_rate: float = 4e-3
    base_epochs: int = 14
    base_batch: int = 16
    epochs: int = 16
    batch: int = 8


QUICK_RECIPE = Recipe(authors=10, forgotten=2, public=4, unseen=2, hidden=64, ffn=176, base_epochs=20, epochs=24)
"""A world that is trained in a few seconds."""


def generate_rows(seed: int, recipe: Recipe) -> dict[str, list[Row]]:
    """Generates the rows of every split, in TOFU's format."""
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
    stated, paraphrased = random.permutation(3)[:2]
    value = value or str(random.choice(field.values))
    wrong = random.permutation([other for other in field.values if other != value])[:5]
    return {
        "question": field.question.format(name=name),
        "answer": field.answers[stated].format(name=name, value=value),
        "paraphrased_answer": field.answers[paraphrased].format(name=name, value=value),
        "perturbed_answer": [field.answers[paraphrased].format(name=name, value=other) for other in wrong],
        "entity": value,
        "all_answers": [template.format(name=name, value=value) for template in field.answers],
    }
