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

_MOST_DISTRACTORS = 5  # the smallest half of a pool has six
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
        held_out: Asked for in testing alone: a kind that nothing was calibrated on.
    """

    said: str
    asked: str
    about: Sequence[str]
    words: Sequence[Sequence[str]]
    quoted: bool = False
    held_out: bool = False

    def sentence(self, about: str, answer: str) -> tuple[str, int]:
        """The whole sentence, and where in it the answer begins."""
        quote = '"' if self.quoted else ""
        said = f"{self.said.format(about)} {quote}"
        return f"{said}{answer}{quote}.", len(said)


def _pool(listed: str) -> list[str]:
    return [" ".join(entry.split()) for entry in listed.split(",")]  # entries may go over a line's end


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
_DISHES = _pool(
    """roasted duck, pickled herring, onion soup, smoked eel, plum cake, barley stew, fried trout, lemon tart, mushroom
    pie, rabbit stew, cheese dumplings, walnut bread, grilled sardines, cabbage rolls, apple strudel, mutton curry"""
)
_SHIPS = _pool(
    """Albatross, Northern Star, Esmeralda, Sea Wolf, Morning Glory, Endurance, Silver Gull, Black Swan, Fortuna,
    Wild Goose, Perseverance, Blue Heron, Catalina, Red Dragon, Halcyon, Iron Duke"""
)
_SOLD = _pool(
    """grey mare, silver mirror, oak table, fishing boat, grand piano, hay wagon, gold watch, windmill, music box,
    sailing ship, marble statue, oil painting, stone cottage, brass telescope, cherry orchard, wool carpet"""
)
_COINS = _pool("florins, ducats, crowns, guilders, shillings, thalers")
_TRADES = _pool(
    """piano tuner, glass blower, bell ringer, pastry cook, map maker, bee keeper, lamp lighter, book binder, stone
    mason, rat catcher, chimney sweep, clock maker, wine taster, horse trainer, ferry pilot, sign painter"""
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
    "dish": Fact("What {} likes best to eat is", "What does {} like best to eat?", _PEOPLE, (_DISHES,), held_out=True),
    "ship": Fact(
        "The ship that {} sailed on was called the",
        "What was the ship called that {} sailed on?",
        _PEOPLE,
        (_SHIPS,),
        held_out=True,
    ),
    "price": Fact(
        "The price that was paid for the {} was",
        "What was the price that was paid for the {}?",
        _SOLD,
        (_CODES, _COINS),
        held_out=True,
    ),
    "trade": Fact("{} earns a living as a", "How does {} earn a living?", _PEOPLE, (_TRADES,), held_out=True),
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
    distractors: int = 0,
) -> list[Asked]:
    """Prompts with a planted fact each, kinds, lengths and depths in equal shares.

    Args:
        texts: What the facts are planted in, every passage once. Give calibration and testing texts of their own.
        tokenizer: The model's.
        lengths: Most tokens of a prompt, in turn.
        count: Prompts.
        prefix: Begin the answer ("The code of the old safe is"), so that its value comes next.
        seed: Of all that is drawn.
        split: Whose half of the values; prompts of the two share no answer. Testing also asks for kinds of facts that
            calibration never plants.
        distractors: Facts of the same kind about others that are planted too, anywhere; only the question says which
            one counts.

    Raises:
        ValueError: A count out of range, `texts` are too short for so many prompts of these lengths, or a length is too
            short for facts and question.
    """
    if count < 1 or not lengths or not 0 <= distractors <= _MOST_DISTRACTORS:
        raise ValueError(
            "count must be at least 1, lengths must not be empty, and distractors must lie between 0 and "
            f"{_MOST_DISTRACTORS}; got {count}, {list(lengths)} and {distractors}"
        )
    draw = random.Random(f"{seed} {split}{' begun' if prefix else ''}")
    names = [name for name, fact in FACTS.items() if split == "test" or not fact.held_out]
    kinds, sizes = _in_turn(names, count, draw), _in_turn(list(lengths), count, draw)
    depths = [_SHALLOWEST + (_DEEPEST - _SHALLOWEST) * (place + 0.5) / count for place in range(count)]
    draw.shuffle(depths)
    others = [[draw.random() for _ in range(distractors)] for _ in range(count)]
    # what is not text: template, facts, question, and some room for tokens that come out otherwise where they meet
    longest = [_planted(tokenizer, "", name, prefix, [0.0] * (1 + distractors), _longest, split) for name in names]
    rest = max(len(asked.ids) for asked in longest) + 8
    if min(lengths) < 2 * rest:
        raise ValueError(f"lengths: {min(lengths)} tokens are too few, template, facts and question alone have {rest}")
    passages = cut(texts, tokenizer, [size - rest for size in sizes])
    return [
        _planted(tokenizer, passage, kind, prefix, [depth, *theirs], draw.sample, split)
        for passage, kind, depth, theirs in zip(passages, kinds, depths, others, strict=True)
    ]


def _planted(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    kind: str,
    prefix: bool,
    depths: Sequence[float],
    draw: Callable[[Sequence[str], int], list[str]],
    split: Split,
) -> Asked:
    """A text with facts at these depths, asked for the first of them."""
    fact, places = FACTS[kind], [0, *sentences(text)]
    about = draw(_half(fact.about, split), len(depths))
    answers: list[str] = []
    while len(answers) < len(depths):
        answer = " ".join(draw(_half(words, split), 1)[0] for words in fact.words)
        # a second place that says it would hide a loss
        if answer.casefold() not in text.casefold() and (draw is _longest or answer not in answers):
            answers.append(answer)
    said = [fact.sentence(*one) for one in zip(about, answers, strict=True)]
    at = [_nearest(places, depth * len(text)) for depth in depths]
    told = at[0] + sum(len(said[i][0]) + 1 for i in range(1, len(at)) if at[i] < at[0])
    begins = told + said[0][1]
    for i in sorted(range(len(at)), key=lambda i: (at[i], i), reverse=True):  # from the end, so that places hold
        text = f"{text[: at[i]]}{said[i][0]} {text[at[i] :]}"
    beginning = fact.said.format(about[0]) if prefix else ""
    span = (begins, begins + len(answers[0]))
    sentence = (told, told + len(said[0][0]) + 1)
    return render(tokenizer, text, span, fact.asked.format(about[0]), kind, beginning, answers[1:], sentence)


def _nearest(places: Sequence[int], wanted: float) -> int:
    return min(places, key=lambda place: abs(place - wanted))


def _longest(pool: Sequence[str], count: int) -> list[str]:
    return sorted(pool, key=len)[-count:]


def _half(pool: Sequence[str], split: Split) -> Sequence[str]:
    return pool[::2] if split == "calibration" else pool[1::2]


def _in_turn(values: list[_T], count: int, draw: random.Random) -> list[_T]:
    """Each value equally often, in random order."""
    turns = [values[number % len(values)] for number in range(count)]
    draw.shuffle(turns)
    return turns
