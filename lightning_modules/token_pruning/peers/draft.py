"""A smaller model that reads the prompt first."""

import hashlib
from pathlib import Path
from typing import Any

from lightning_modules.loading import check_vocabulary, load, load_config, load_on_meta, load_tokenizer
from lightning_modules.token_pruning.anatomy import check_supported
from lightning_modules.token_pruning.flops import Cost


class Draft:
    """Loads the model of a folder or name once, and only where its tokens are those of the model it reads for.

    Args:
        path: Hugging Face folder, GGUF file or hub name.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._cost: Cost | None = None
        self._loaded: Any = None
        self._checked = ""

    def check(self) -> None:
        """Refuse what cannot be read, before any weight is.

        Raises:
            FileNotFoundError: See `loading.load`.
            UnsupportedModelError: See `check_supported`.
        """
        check_supported(load_config(self.path))

    def digest(self) -> str:
        """Of its files' names, sizes and times, so that answers by other weights are not taken for its own."""
        here = Path(self.path).expanduser()
        files = [here] if here.is_file() else sorted(here.iterdir()) if here.is_dir() else []
        told = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.sha256(repr(told).encode()).hexdigest() if told else ""

    def cost(self) -> Cost:
        """Its costs, without its weights."""
        if self._cost is None:
            self._cost = Cost.of(load_on_meta(self.path))
        return self._cost

    def beside(self, model: Any) -> Any:
        """The draft, on the device and in the precision of a model.

        Raises:
            ValueError: It has another tokenizer, or none.
        """
        device = model.get_input_embeddings().weight.device
        wanted = f"{model.name_or_path} {device} {model.dtype}"
        if self._checked != wanted:
            self._check_tokens(model)
            self._loaded, self._checked = load(self.path, dtype=model.dtype).to(device), wanted
        return self._loaded

    def _check_tokens(self, model: Any) -> None:
        own = load_tokenizer(self.path)
        rows = load_config(self.path).get_text_config().vocab_size
        try:
            check_vocabulary(model, own)
            if not getattr(model, "name_or_path", "") and rows != model.get_input_embeddings().num_embeddings:
                raise ValueError(f"it embeds {rows} tokens, the model {model.get_input_embeddings().num_embeddings}")
        except ValueError as error:
            raise ValueError(
                f"draft: {self.path} does not read in the tokens of {model.name_or_path or 'the model'}: take a "
                f"smaller model with the same tokenizer ({error})"
            ) from error
