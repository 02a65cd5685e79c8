"""Synthetic facts planted in real text: a needle of a known kind at a known depth, asked for at the end.

After Needle In A Haystack (Kamradt 2023) and RULER (arXiv 2404.06654). Names, numbers and words are drawn from pools
whose two halves belong to calibration and to testing, so that nothing tuned on the one can know the other.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, TypeVar

from transformers import PreTrainedTokenizerBase

from lightning_modules.token_pruning.quality.asked import Asked, cut, render, sentences

_T = TypeVar("_T")
Split = Literal["calibration", "test"]

_SHALLOWEST, _DEEPEST = 0.05, 0.9  # shares of the passage


@dataclass(frozen=True)
class Fact:
    """A kind of fact.

    Attributes:
        said: The sentence that says it, up to the answer; `{}` is who or what it is about.
        asked: The question.
        about: Who or what it may be about.
        words: Pools of the answer's words, one a word.
        quoted: Whether the answer stands in quotation marks.
    """

    said: str
    asked: str
    about: Sequence[str]
    words: Sequence[Sequence[str]]
    quoted: bool = False

    def sentence(self, about: str, answer: str) -> tuple[str, int]:
        """The whole sentence, and where in it the answer begins."""
        quote = '"' if self.quoted else ""
        said = f"{self.said.format(about)} {quote}"
        return f"{said}{answer}{quote}.", len(said)


def _pool(listed: str) -> list[str]:
    return [word.strip() for word in listed.split(",")]


_BUILDINGS = _pool(
    """lighthouse, monastery, library, fortress, observatory, mill, garrison, castle, tavern, theatre, harbour, museum,
    bakery, chapel, granary, hospital, stable, brewery, vineyard, foundry"""
)
_LOCKED = _pool(
    """old safe, iron chest, wine cellar, garden gate, bank vault, north tower, jewel case, tool shed, medicine
    cabinet, gun room, strong box, boat house, letter box, attic door, coal cellar, side entrance"""
)
_OWNERS = _pool(
    """captain, baker, doctor, miller, judge, painter, gardener, tailor, blacksmith, colonel, widow, fisherman, bishop,
    clerk, sailor, farmer, weaver, carpenter"""
)
_PETS = ("dog", "horse", "cat", "parrot", "donkey", "goat")
_PET_NAMES = _pool(
    """Truffle, Marble, Juniper, Biscuit, Pepper, Clover, Domino, Ginger, Nugget, Pickle, Rascal, Tinker, Velvet,
    Waffle, Ziggy, Bramble, Cricket, Dumpling, Fidget, Hazel, Jasper, Kipper, Mango, Nutmeg, Olive, Pumpkin, Quaver,
    Rusty, Smokey, Thistle"""
)
_PEOPLE = _pool(
    """Ottilie Brandt, Casimir Voss, Leonora Quill, Tobias Wren, Philippa Stroud, Anselm Petrov, Isolde Marsh, Rupert
    Calloway, Winifred Achterberg, Bartholomew Finch, Seraphina Lunt, Magnus Oakley, Cordelia Zabel, Ignatius Crowe,
    Rosalind Tveit, Ambrose Kettle, Henrietta Sorel, Lysander Pike"""
)
_TOWNS = _pool(
    """Lisbon, Marseille, Bergen, Cordoba, Gdansk, Salzburg, Antwerp, Verona, Uppsala, Rotterdam, Ljubljana, Tangier,
    Odessa, Smyrna, Toledo, Utrecht, Bremen, Palermo, Dubrovnik, Krakow, Ghent, Malmo, Tallinn, Valencia, Zagreb,
    Basel, Corfu, Porto, Riga, Turin"""
)
_COLOURS = _pool("red, green, blue, yellow, purple, violet, silver, golden, crimson, turquoise, pink, brown")
_THINGS = _pool(
    """umbrella, lantern, teapot, violin, kite, blanket, bicycle, vase, hammer, basket, drum, mirror, compass, scarf,
    trumpet, saddle, candlestick, rowboat, clock, telescope"""
)
_ADJECTIVES = _pool(
    """amber, silent, crimson, frozen, hidden, golden, broken, gentle, hollow, distant, velvet, wandering, copper,
    thirsty, marble, stormy, clever, ancient, lonely, emerald"""
)
_NOUNS = _pool(
    """falcon, harbor, ladder, meadow, lantern, river, anchor, thunder, orchard, compass, pepper, glacier, wizard,
    bridge, feather, walnut, dragon, cactus, needle, planet"""
)
_CODES = [str(number) for number in range(1003, 9999, 7)]
_TIMES = [f"{hour}:{minute:02}" for hour, minute in product(range(1, 13), range(1, 60)) if minute % 5]

FACTS = {
    "password": Fact(
        "The secret password of the {} is",
        "What is the secret password of the {}?",
        _BUILDINGS,
        (_ADJECTIVES, _NOUNS),
        quoted=True,
    ),
    "code": Fact("The code of the {} is", "What is the code of the {}?", _LOCKED, (_CODES,), quoted=True),
    "name": Fact(
        "The name of the {} is",
        "What is the name of the {}?",
        [f"{owner}'s {pet}" for owner, pet in product(_OWNERS, _PETS)],
        (_PET_NAMES,),
        quoted=True,
    ),
    "place": Fact("The city where {} lives now is", "What is the city where {} lives now?", _PEOPLE, (_TOWNS,)),
    "time": Fact("The train of {} leaves at", "At what time does the train of {} leave?", _PEOPLE, (_TIMES,)),
    "object": Fact(
        "The birthday present for {} is a", "What is the birthday present for {}?", _PEOPLE, (_COLOURS, _THINGS)
    ),
}
"""Kinds of facts by name."""


def plant(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    count: int,
    prefix: bool = False,
    seed: int = 0,
    split: Split = "calibration",
) -> list[Asked]:
    """Prompts with a planted fact each, kinds, lengths and depths in equal shares.

    Args:
        texts: What the facts are planted in, every passage once. Give calibration and testing texts of their own.
        tokenizer: The model's.
        lengths: Most tokens of a prompt, in turn.
        count: Prompts.
        prefix: Begin the answer ("The code of the old safe is"), so that its value comes next.
        seed: Of all that is drawn.
        split: Whose half of the values; prompts of the two share no answer.

    Raises:
        ValueError: `texts` are too short for so many prompts of these lengths, or a length is too short for a question.
    """
    if count < 1 or not lengths:
        raise ValueError(f"count must be at least 1, and lengths must not be empty; got {count} and {list(lengths)}")
    draw = random.Random(f"{seed} {split}{' begun' if prefix else ''}")
    kinds, sizes = _in_turn(list(FACTS), count, draw), _in_turn(list(lengths), count, draw)
    depths = [_SHALLOWEST + (_DEEPEST - _SHALLOWEST) * (place + 0.5) / count for place in range(count)]
    draw.shuffle(depths)
    # what is not text: template, fact, question, and some room for tokens that come out otherwise where they meet
    longest = [_planted(tokenizer, "", kind, prefix, 0.0, lambda pool: max(pool, key=len), split) for kind in FACTS]
    rest = max(len(asked.ids) for asked in longest) + 8
    if min(lengths) < 2 * rest:
        raise ValueError(f"lengths: {min(lengths)} tokens are too few, template, fact and question alone have {rest}")
    passages = cut(texts, tokenizer, [size - rest for size in sizes])
    return [
        _planted(tokenizer, passage, kind, prefix, depth, draw.choice, split)
        for passage, kind, depth in zip(passages, kinds, depths, strict=True)
    ]


def _planted(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    kind: str,
    prefix: bool,
    depth: float,
    draw: Callable[[Sequence[str]], str],
    split: Split,
) -> Asked:
    fact = FACTS[kind]
    about = draw(_half(fact.about, split))
    answer = ""
    while not answer or answer.casefold() in text.casefold():  # a second place that says it would hide a loss
        answer = " ".join(draw(_half(words, split)) for words in fact.words)
    sentence, begins = fact.sentence(about, answer)
    at = min([0, *sentences(text)], key=lambda place: abs(place - depth * len(text)))
    begins += at
    text = f"{text[:at]}{sentence} {text[at:]}"
    beginning = fact.said.format(about) if prefix else ""
    return render(tokenizer, text, (begins, begins + len(answer)), fact.asked.format(about), kind, beginning)


def _half(pool: Sequence[str], split: Split) -> Sequence[str]:
    return pool[::2] if split == "calibration" else pool[1::2]


def _in_turn(values: list[_T], count: int, draw: random.Random) -> list[_T]:
    """Each value equally often, in random order."""
    turns = [values[number % len(values)] for number in range(count)]
    draw.shuffle(turns)
    return turns
