"""A Llama small enough for laws, and slow, obvious versions of what the fast code does."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_modules.block_sparsity.layerwise import Method, prune_layers
from lightning_modules.block_sparsity.scored import Scored

VOCAB = 320


def tiny_llama(seed: int = 0, tied: bool = True) -> LlamaForCausalLM:
    """Two layers; no side of the MLP's matrices is a multiple of 8."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=42,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def save_tiny(folder: Path, **kwargs) -> Path:
    tiny_llama(**kwargs).save_pretrained(folder)
    return folder


def batches(count: int = 3, rows: int = 2, tokens: int = 12) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.randint(0, VOCAB, (rows, tokens), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def padded(batch: dict[str, torch.Tensor], lengths: list[int], side: str = "right") -> dict[str, torch.Tensor]:
    """The first tokens of every row, padded to the batch's width with token 0, as InstructData does it."""
    ids, labels = torch.zeros_like(batch["input_ids"]), torch.full_like(batch["labels"], -100)
    mask, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    width = ids.shape[1]
    for row, length in enumerate(lengths):
        here = slice(0, length) if side == "right" else slice(width - length, width)
        empty = slice(length, width) if side == "right" else slice(0, width - length)
        ids[row, here] = labels[row, here] = batch["input_ids"][row, :length]
        mask[row, here] = 1
        positions[row, here] = torch.arange(length)
        positions[row, empty] = torch.arange(width - length)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "position_ids": positions}


def prune(model, pruner, target, score, text=(), **method):
    """One iteration on the CPU; the errors that it tells."""
    return prune_layers(model, pruner, target, Method(score, **method), text, torch.device("cpu"))


def scored(scores: torch.Tensor) -> Scored:
    """These scores, whatever the weights."""
    return Scored(scores, lambda part, _: part.clone())


def loop_iteration(scores, tier_map, keep, target, block, k):
    """One demotion, one block and one group after the other, in Python. Returns a new map and mask."""
    tier_map, keep = tier_map.clone(), keep.clone()
    rows, columns = tier_map.shape

    def cut(i, j):
        return slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block)

    def mean(i, j):
        return scores[cut(i, j)][keep[cut(i, j)]].mean().item()

    def lowest(tier, count):
        places = [(i, j) for i in range(rows) for j in range(columns) if tier_map[i, j] == tier]
        return sorted(places, key=lambda place: mean(*place))[:count]

    dense, _, topk = target.counts(rows * columns)
    for place in lowest(0, int((tier_map == 0).sum()) - dense):
        piece, mask = scores[cut(*place)], keep[cut(*place)]
        for row in range(piece.shape[0]):
            for first in range(0, piece.shape[1], 4):
                group = piece[row, first : first + 4].tolist()
                best = sorted(range(len(group)), key=lambda n: -group[n])[:2]
                for n in range(len(group)):
                    mask[row, first + n] = n in best
        tier_map[place] = 1
    for place in lowest(1, topk - int((tier_map == 2).sum())):
        piece, mask = scores[cut(*place)], keep[cut(*place)]
        alive = [(r, c) for r in range(piece.shape[0]) for c in range(piece.shape[1]) if mask[r, c]]
        best = sorted(alive, key=lambda at: -piece[at].item())[:k]
        mask[:] = False
        for at in best:
            mask[at] = True
        tier_map[place] = 2
    return tier_map, keep
