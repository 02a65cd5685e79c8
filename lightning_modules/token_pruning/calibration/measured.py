"""Reading the attention of planted facts once, in files from which a killed run goes on."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.files import replacing_file
from common.progress import stage
from lightning_modules.data.tokenizer import fingerprint
from lightning_modules.token_pruning.calibration.retrieval import share_needed, tail_means
from lightning_modules.token_pruning.calibration.search import SURE, Heads, Reading
from lightning_modules.token_pruning.identity import identity_of
from lightning_modules.token_pruning.quality.answers import is_right
from lightning_modules.token_pruning.quality.arms import UNPRUNED
from lightning_modules.token_pruning.quality.asked import Asked
from lightning_modules.token_pruning.quality.asking import Answers
from lightning_modules.token_pruning.schedule import Schedule

_HEADS = 3  # most heads of a layer that are read together
_RULE = 2  # by which answers are judged; what was judged by another one is read again


def store(root: Path, model: Any, tokenizer: Any, windows: Sequence[int], asked: Sequence[Asked]) -> Path:
    """The folder of one measurement: another model, text or setting has another."""
    key = [_RULE, identity_of(model), fingerprint(tokenizer), list(windows), str(model.dtype)]
    key += [hashlib.sha256(str([one.ids.tolist() for one in asked]).encode()).hexdigest()]
    folder = root / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Measured:
    """The attention of every prompt's end where the unpruned model answers right.

    Args:
        folder: Where it is kept, a file for each prompt; what is there is not measured again.
        windows: Numbers of asking tokens.
    """

    def __init__(self, folder: Path, windows: Sequence[int]) -> None:
        self.folder, self.windows = folder, windows
        self.asked = 0
        self.files: list[Path] = []
        """Of the right answers."""

    def read(self, model: Any, tokenizer: Any, asked: Sequence[Asked], answers: Answers) -> None:
        """Ask every fact of the unpruned model, and keep the attention where it answers right."""
        self.asked = len(asked)
        with stage("Reading planted facts", len(asked), "facts") as show:
            for number, one in enumerate(asked):
                path = self.folder / f"{number:04}.safetensors"
                if not path.is_file():
                    self._read(model, tokenizer, one, path, answers)
                with safe_open(path, "pt") as file:
                    if file.metadata()["right"] == "1":
                        self.files.append(path)
                show(number + 1)

    def _read(self, model: Any, tokenizer: Any, asked: Asked, path: Path, answers: Answers) -> None:
        right = is_right(asked, answers.of(model, tokenizer, asked, UNPRUNED).text)
        tensors = {"evidence": asked.evidence}
        if right:  # what is not known cannot be lost
            ids = asked.ids.to(model.get_input_embeddings().weight.device)
            tensors["tails"] = tail_means(model, ids, self.windows)
        with replacing_file(path) as beside:
            save_file(tensors, beside, {"right": "1" if right else "0"})

    def readings(self, window: int, frame: Schedule) -> list[Reading]:
        """Every layer read by its best head or few, and by all of them.

        Heads are chosen on one half of the facts, and what they need is measured on the other. Both halves have free
        and begun answers, which come in turn.

        Args:
            window: Which of the windows.
            frame: What is protected, and the mean over neighbours.
        """
        asking = self.windows[window]
        files = sorted(self.files, key=lambda path: int(path.stem) % 2)  # stable: the free ones, then the begun
        singles = torch.stack([_needed(path, window, asking, frame) for path in files[::2]])  # [answers, L, A]
        layers, heads = singles.shape[1:]
        order = singles.quantile(SURE, 0).argsort(-1)
        sizes = range(1, min(_HEADS, heads - 1) + 1)
        sets: list[list[Heads]] = [
            [*(tuple(sorted(order[layer, :size].tolist())) for size in sizes), None] for layer in range(layers)
        ]
        chosen = torch.stack([_needed(path, window, asking, frame, sets) for path in files[::2]])
        best = chosen.quantile(SURE, 0).argmin(-1).tolist()  # chosen: [answers, L, sets]
        judged = [[sets[layer][best[layer]], None] for layer in range(layers)]
        needed = torch.stack([_needed(path, window, asking, frame, judged) for path in files[1::2]])
        # before the first layer nothing can be pruned
        return [Reading(n, judged[n][i], needed[:, n, i]) for n in range(1, layers) for i in range(2)]


def _needed(path: Path, window: int, asking: int, frame: Schedule, sets: list[list[Heads]] | None = None) -> Tensor:
    """Share that must stay, by layer and head, or by layer and set of heads; float32 [L, …]."""
    with safe_open(path, "pt") as file:
        tails_LAN, evidence_N = file.get_slice("tails")[:, window].float(), file.get_tensor("evidence")
    left_out = frame.protected(len(evidence_N))
    left_out[-asking:] = True
    pool = frame.pool or 1
    if sets is None:
        return share_needed(tails_LAN, evidence_N, left_out, pool)
    joined = torch.stack(
        [
            torch.stack([(heads if one is None else heads[list(one)]).amax(0) for one in chosen])
            for heads, chosen in zip(tails_LAN, sets, strict=True)
        ]
    )
    return share_needed(joined, evidence_N, left_out, pool)
