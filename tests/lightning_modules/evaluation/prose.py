"""Texts with items in them."""

import json
import random

NAMES = ["baker", "captain", "daughter", "engineer", "farmer", "gardener", "hunter", "keeper", "lawyer", "miller"]
ENDS = ["went home", "took a long walk", "spoke of the harbour", "read the letter twice", "sang in the yard"]


def prose(sentences: int, seed: int = 0) -> str:
    """Sentences that end in a name, which often stands in those before."""
    rng = random.Random(seed)
    return " ".join(
        f"The {rng.choice(NAMES)} {rng.choice(ENDS)}, said number {i}, and met the {rng.choice(NAMES)}."
        for i in range(sentences)
    )


def gsm8k(count: int) -> str:
    """Records as GSM8K has them."""
    records = [
        {
            "question": f"Ann has {i} apples and buys {i + 7} more, at $2 each. How many has she?",
            "answer": f"She has {i}+{i + 7}=<<{i}+{i + 7}={2 * i + 7}>>{2 * i + 7} apples.\n#### {2 * i + 7}",
        }
        for i in range(10, 10 + count)
    ]
    return "".join(json.dumps(one) + "\n" for one in records)
