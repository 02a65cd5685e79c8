"""The trained part of token pruning: one small network per pruning layer that scores hidden states.

Shape legend: B sequences, N tokens, H hidden size.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from common.files import replacing
from common.variants import variants
from lightning_modules.card import card, code, table, write_card
from lightning_modules.token_pruning.identity import config_differences, differences, identity_of
from lightning_modules.token_pruning.networks import Network
from lightning_modules.token_pruning.networks.mlp import MLP

WEIGHTS, CONFIG = "model.safetensors", "config.json"
_FORMAT = "pare-token-pruner"


class TokenPruner(nn.Module):
    """Scores tokens at several decoder layers: a higher score means keep.

    Args:
        hidden_size: Width of the base model's hidden states.
        layers: Decoder layers (from 0) whose output is scored.
        network: Kind and size of the scorers; None takes ``MLP()``.
        base: Identity of the model that it is trained for, see ``identity_of``; None until it is known.
        notes: How it was trained (schedule, target, data), kept in the configuration; JSON-able.

    Raises:
        ValueError: no layers, or a layer twice.
    """

    def __init__(
        self,
        hidden_size: int,
        layers: Sequence[int],
        network: Network | None = None,
        base: dict[str, Any] | None = None,
        notes: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not layers or len(set(layers)) != len(layers) or min(layers) < 0:
            raise ValueError(f"layers: need at least one decoder layer, each once, from 0 up; got {list(layers)}")
        self.hidden_size, self.layers, self.network = hidden_size, tuple(sorted(layers)), network or MLP()
        self.base, self.notes = base, dict(notes or {})
        self.scorers = nn.ModuleDict({str(layer): self.network.build(hidden_size) for layer in self.layers})

    @classmethod
    def for_model(cls, model: PreTrainedModel, layers: Sequence[int], network: Network | None = None) -> Self:
        """An untrained pruner that belongs to ``model``."""
        base = identity_of(model)
        pruner = cls(base["hidden_size"], layers, network, base)
        for scorer in pruner.scorers.values():
            pruner.network.start(scorer, model)
        return pruner

    def forward(self, hidden_BNH: Tensor, layer: int, there_BN: Tensor | None = None) -> Tensor:
        """Scores of a layer's output, computed in the precision of the scorers.

        Args:
            hidden_BNH: Output of decoder layer ``layer``.
            layer: One of ``layers``.
            there_BN: Tokens of the prompt that are still there, bool; None when all are.

        Returns:
            float32 [B, N]; higher means keep.

        Raises:
            ValueError: a layer that has no scorer, or hidden states of another width.
        """
        if layer not in self.layers:
            raise ValueError(f"layer {layer} has no trained scorer; there are scorers for {list(self.layers)}")
        if hidden_BNH.shape[-1] != self.hidden_size:
            raise ValueError(f"hidden states are {hidden_BNH.shape[-1]} wide, the scorers take {self.hidden_size}")
        scorer: nn.Module = self.scorers[str(layer)]
        weight = next(scorer.parameters())
        scores_BN: Tensor = scorer(hidden_BNH.to(weight.device, weight.dtype), there_BN)
        return scores_BN.float()

    def spread(self, devices: Sequence[torch.device]) -> Self:
        """Put each scorer on the device of the layer that it scores.

        Args:
            devices: Of the base model's layers, see ``layer_devices``.
        """
        for layer in self.layers:
            self.scorers[str(layer)].to(devices[layer])
        return self

    def check_base(self, model: PreTrainedModel | PretrainedConfig) -> None:
        """Refuse a model other than the one that this pruner was trained for.

        Args:
            model: Of a configuration alone, weights are not compared.

        Raises:
            ValueError: naming the first difference.
        """
        compare: Any = config_differences if isinstance(model, PretrainedConfig) else differences
        found = compare(self.base, model) if self.base is not None else []
        if found:
            raise ValueError(
                f"this token pruner was trained for another base model: {'; '.join(found)}. Load the model that it was "
                "trained for, or train a pruner for this one (configs/token_pruning/train.yaml)"
            )

    def save(self, folder: str | Path, inputs: Iterable[str | Path | None] = (), overwrite: bool = False) -> None:
        """Write ``model.safetensors``, ``config.json`` and ``README.md``; the folder appears complete or not at all.

        Args:
            folder: Destination.
            inputs: See ``common.files.check_output``.
            overwrite: See ``common.files.check_output``.

        Raises:
            ValueError: See ``common.files.check_output``.
        """
        weights = {name: tensor.detach().contiguous().cpu() for name, tensor in self.state_dict().items()}
        with replacing(folder, "token pruner", inputs, overwrite) as beside:
            save_file(weights, beside / WEIGHTS, metadata={"format": "pt"})
            (beside / CONFIG).write_text(json.dumps(self.config(), indent=2) + "\n", encoding="utf-8")
            write_card(beside, self._card())

    def config(self) -> dict[str, Any]:
        """What ``config.json`` holds: the constructor's arguments."""
        return {
            "format": _FORMAT,
            "hidden_size": self.hidden_size,
            "layers": list(self.layers),
            "network": self.network.describe(),
            "base": self.base,
            "notes": self.notes,
        }

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel | None = None) -> Self:
        """Load a saved pruner.

        Args:
            path: Folder, or a name on the Hugging Face hub.
            model: The base model that it is to prune; checked where given.

        Raises:
            FileNotFoundError: neither such a folder nor such a name.
            ValueError: the folder holds no (whole) token pruner, or it was trained for another model.
        """
        folder = _folder(path)
        try:
            config = json.loads((folder / CONFIG).read_text())
            if config.pop("format", None) != _FORMAT:
                raise ValueError(f"{CONFIG} is not that of a token pruner")
            network = _network(config)
            pruner = cls(network=network, **config)
            pruner.load_state_dict(load_file(folder / WEIGHTS))
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{path} holds no usable token pruner: {error}") from error
        if model is not None:
            pruner.check_base(model)
        return pruner.eval()

    def _card(self) -> str:
        base = f" for a {self.base['model_type']} of hidden size {self.hidden_size}" if self.base else ""
        load = code(
            "from lightning_modules.token_pruning.pruner import TokenPruner",
            'pruner = TokenPruner.load("{here}", model)',
        )
        notes = f"\n{table(self.notes, ('trained with', ''))}" if self.notes else ""
        text = f"Scores prompt tokens after decoder layers {', '.join(map(str, self.layers))}{base}.\n\n{load}{notes}"
        return card("Token pruner", text, tags=["token-pruning"], library="pare")


def _network(config: dict[str, Any]) -> Network:
    """Take the network out of a configuration; before there was a choice, its width stood for it."""
    described = config.pop("network", None) or {"class": "MLP", "width": config.pop("width")}
    name = described.pop("class")
    found = next((cls for cls in variants(Network) if cls.__name__ == name), None)
    if found is None:
        raise ValueError(f"no network {name!r}; there are: {', '.join(cls.__name__ for cls in variants(Network))}")
    return found(**described)


def _folder(path: str | Path) -> Path:
    """The local folder of a path or hub name."""
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    try:
        return Path(snapshot_download(str(path), allow_patterns=[WEIGHTS, CONFIG]))
    except (OSError, ValueError) as error:  # offline, no such repository, or a path that is no repository's name
        raise FileNotFoundError(f"no such folder, nor a pruner of this name on the hub: {path}") from error
