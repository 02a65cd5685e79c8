"""The one way to load a causal language model and its tokenizer: a folder, a GGUF file, or a name on the Hub.

Folders that transformers cannot read by itself (packed weights) are read by what their feature has put in ``FORMATS``.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from common.files import recover
from common.manifest import check_manifest
from common.processes import first_on_node, warn_on_node
from common.records.machine import isa_flags

GgufConfig: Any = getattr(transformers, "GgufConfig", None)  # before there was one, transformers always expanded

Dtype = Literal["auto", "fast", "float32", "bfloat16", "float16"]
"""What weights become in memory; "auto" is what they are on disk, "fast" the same but float32 on processors without
instructions for 16 bits, which take some thirty times as long in them."""

Reader = Callable[[Path, "Dtype | torch.dtype", "str | None"], PreTrainedModel]
"""Reads a folder's model as this dtype and with this attention."""

FORMATS: dict[str, Reader] = {}
"""Special formats: the file that a folder of each has, and what reads such a folder."""

_GGUF = ".gguf"


class _Source(NamedTuple):
    """Where a model is.

    Attributes:
        name: A folder that exists, or a Hub name.
        options: What transformers needs besides.
        local: Whether it is a folder.
    """

    name: str
    options: dict[str, str]
    local: bool

    @property
    def path(self) -> str:
        """What leads here again, a GGUF file within its folder too."""
        return "/".join([self.name, *self.options.values()])


def load(
    path: str | Path,
    dtype: Dtype | torch.dtype = "float32",
    attention: str | None = None,
    device_map: dict[str, int | str] | str | None = None,
    offload_folder: str | None = None,
    supported: Callable[[PretrainedConfig], Any] | None = None,
) -> Any:
    """Load a causal language model.

    Args:
        path: A Hugging Face folder, also a pruned or packed one of Pare's; a GGUF file, whose weights are expanded; or
            a name on the Hub.
        dtype: What weights become.
        attention: Attention kernel, as transformers names it: "sdpa", "eager", "flash_attention_2", …; None takes
            transformers' choice.
        device_map: Place its parts on several devices; None loads it on the CPU.
        offload_folder: For parts that the map places on "disk".
        supported: Called with the configuration before weights are read; raises where the model cannot be used.

    Returns:
        A ``PreTrainedModel``, in evaluation mode. Under ``torch.device("meta")`` without its weights, unpacked.

    Raises:
        FileNotFoundError: No such folder or file, or a name that cannot be had from the Hub; the message says how.
        ValueError: A folder without a model, damaged or missing weights, or an attention that there is not; of what
            Pare wrote, ``DamagedError`` names the file.
    """
    if isinstance(dtype, str) and dtype not in get_args(Dtype):
        raise ValueError(f"dtype must be one of {', '.join(get_args(Dtype))}; got {dtype!r}")
    config = load_config(path)
    if supported is not None:
        supported(config)
    if isinstance(dtype, str) and dtype != "auto":
        dtype = dtype_of(dtype, config.dtype)
    if torch.get_default_device().type == "meta":  # only counted
        return AutoModelForCausalLM.from_config(config, **({} if dtype == "auto" else {"dtype": dtype})).eval()
    source = _locate(path)
    folder = Path(source.name)
    if source.local and not source.options:
        check_manifest(folder, contents=first_on_node())  # once, however many ranks load it
    reader = next((read for file, read in FORMATS.items() if source.local and (folder / file).is_file()), None)
    if reader is not None:
        if device_map is not None:
            raise ValueError(f"device_map: {path} is packed, and is loaded on one device; unpack it first (export)")
        return reader(folder, dtype, attention)
    options: dict[str, Any] = {
        **source.options,
        "dtype": dtype,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }
    if "gguf_file" in source.options and GgufConfig is not None:
        options["quantization_config"] = GgufConfig(dequantize=True)  # packed, it can be neither trained nor saved
    if attention is not None:
        options["attn_implementation"] = attention
    if device_map is not None:
        options |= {"device_map": device_map, "offload_folder": offload_folder}
    transformers_logging.disable_progress_bar()  # of a file or two: says nothing
    with _explained(path, source):
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(source.name, **options)
        except (ValueError, ImportError) as error:
            if attention is None or "attention" not in str(error).lower():
                raise
            raise ValueError(f"attention {attention!r} cannot be used here: {_first_line(error)}") from error
    model, found = loaded
    wrong = sorted([*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])])
    if wrong:  # transformers would go on with random weights
        raise ValueError(
            f"{path}: {len(wrong)} weights are missing or of other shapes than config.json says, e.g. {wrong[0]}: the "
            "folder is incomplete, or its config.json is of another model; write or fetch it again"
        )
    model.name_or_path = source.path
    return model.eval()


def dtype_of(name: Dtype, stored: Any) -> torch.dtype:
    """What a name means for weights that are ``stored`` on disk; None, where nothing says, is float32."""
    if name not in ("auto", "fast"):
        found: torch.dtype = getattr(torch, name)
        return found
    stored = stored if isinstance(stored, torch.dtype) else torch.float32
    return torch.float32 if name == "fast" and is_slow(stored) else stored


_INSTRUCTIONS = {torch.bfloat16: {"avx512_bf16", "amx_bf16"}, torch.float16: {"avx512_fp16", "amx_fp16"}}


def is_slow(dtype: torch.dtype) -> bool:
    """Whether there is neither an accelerator nor an instruction for a type of 16 bits; of Arm that is not known."""
    if dtype not in _INSTRUCTIONS or torch.accelerator.is_available():
        return False
    flags = set(isa_flags())
    return "avx2" in flags and not flags & _INSTRUCTIONS[dtype]


def load_config(path: str | Path) -> PretrainedConfig:
    """A model's configuration; costs no weights. Arguments and errors as for ``load``."""
    source = _locate(path)
    with _explained(path, source):
        config: PretrainedConfig = AutoConfig.from_pretrained(source.name, **source.options)
    config.name_or_path = source.path
    return config


def hub_file(path: str, name: str) -> Path | None:
    """A file that lies beside a model's weights on the Hub; None where there is none, or nobody can be asked.

    Args:
        path: Hub name.
        name: The file's.
    """
    try:
        found = cached_file(_locate(path).name, name, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        warn_on_node(f"the Hub cannot be asked whether {path} has a file {name}; it is taken to have none: {error}")
        return None
    return Path(found) if found is not None else None


def load_on_meta(path: str | Path, supported: Callable[[PretrainedConfig], Any] | None = None) -> Any:
    """The model without its weights: for counting. Arguments and errors as for ``load``."""
    config = load_config(path)
    if supported is not None:
        supported(config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def load_tokenizer(path: str | Path, data: Any = None) -> PreTrainedTokenizerBase:
    """A model's tokenizer: the one beside the weights, or else the one that ``data.tokenizer`` names.

    Args:
        path: As for ``load``.
        data: A DataModule with a ``named_tokenizer``, or none.

    Raises:
        FileNotFoundError: See ``load``.
        ValueError: There is none, or it cannot be read.
    """
    source = _locate(path)
    try:
        with _explained(path, source):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.name, **source.options)
            if not len(tokenizer):  # what transformers makes of some folders without one
                raise ValueError("its vocabulary is empty")
            return tokenizer
    except Exception as error:  # tokenizers raises plain Exception for a broken file, transformers KeyError
        named: PreTrainedTokenizerBase | None = getattr(data, "named_tokenizer", None)
        if named is not None:
            return named
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(
            f"{path} has no tokenizer that can be read: put tokenizer.json and tokenizer_config.json beside the "
            f"weights, or name one (data.tokenizer) ({_first_line(error)})"
        ) from error


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Refuse text in other tokens than the model's own: its loss and perplexity would be wrong without a word.

    The model's own tokenizer is the one that lies beside its weights; a model without one, or without weights on disk,
    is compared by the number of tokens alone. Tokens that one of the two has been given later (a padding token) may be
    missing from the other.

    Args:
        model: A ``PreTrainedModel``, or one on the meta device.
        tokenizer: The data's tokenizer; None where the data have none.

    Raises:
        ValueError: The tokenizer has more tokens than the model embeds, or gives a token another number than the
            model's own does.
    """
    if tokenizer is None:
        return
    remedy = "use the model's own tokenizer (data.tokenizer), or train a model for this one"
    rows: int = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens but the model embeds only {rows}: {remedy}")
    path = getattr(model, "name_or_path", "")
    if not path:
        return
    try:
        own = load_tokenizer(path)
    except (FileNotFoundError, ValueError):  # it has none
        return
    here, there = tokenizer.get_vocab(), own.get_vocab()
    added = tokenizer.get_added_vocab().keys() | own.get_added_vocab().keys()
    others = {token for token, _ in here.items() ^ there.items()}
    others -= {token for token in added if token not in here or token not in there}
    if others:
        token = min(others)
        numbers = " and ".join(f"{vocab.get(token, 'none')}" for vocab in (here, there))
        raise ValueError(
            f"the data's tokenizer is not the one of {path}: {len(others)} tokens have other numbers, e.g. {token!r} "
            f"({numbers}): {remedy}"
        )


def may_be_on_hub(name: str) -> bool:
    """Whether something that is not here can be the name of a model or dataset on the Hub: ``name``, ``owner/name``."""
    return not name.startswith((".", "/", "~")) and name.count("/") <= 1


def _locate(path: str | Path) -> _Source:
    """Find a model without reading it."""
    name, local = str(path), Path(path).expanduser()
    recover(local.resolve())
    if local.is_dir():
        if not (local / "config.json").is_file():
            files = sorted(file.name for file in local.glob(f"*{_GGUF}"))
            hint = f"name the file, {local / files[0]}" if files else "give a Hugging Face folder, or a Hub name"
            raise ValueError(f"{path} has no config.json: {hint}")
        return _Source(str(local), {}, True)
    if local.is_file():
        if local.suffix != _GGUF:
            raise ValueError(f"{path} is a file: give the folder that it is in, or a GGUF file ({_GGUF})")
        return _Source(str(local.parent), {"gguf_file": local.name}, True)
    owner_name, _, file = name.rpartition("/")
    if name.endswith(_GGUF) and owner_name.count("/") == 1 and may_be_on_hub(owner_name):
        return _Source(owner_name, {"gguf_file": file}, False)
    if not may_be_on_hub(name):
        raise FileNotFoundError(f"no model folder at {path}: give a Hugging Face folder, a GGUF file or a Hub name")
    return _Source(name, {}, False)


@contextmanager
def _explained(path: str | Path, source: _Source) -> Iterator[None]:
    """Errors of transformers in words that say what to do."""
    try:
        yield
    except ImportError as error:
        if "gguf" not in str(error).lower():
            raise
        raise ValueError(f"{path}: reading GGUF files needs the package gguf: pip install -e '.[gguf]'") from error
    except SafetensorError as error:
        raise ValueError(f"{path}: weights are cut short or damaged ({error}); write or fetch them again") from error
    except OSError as error:
        if source.local:
            raise ValueError(f"{path} cannot be loaded: {_first_line(error)}") from error
        offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
        why = "HF_HUB_OFFLINE is set, and the Hub's cache here has it not" if offline else _first_line(error)
        raise FileNotFoundError(
            f"no model {source.name!r}: it is no folder here, and could not be had from the Hub ({why}); fetch it "
            f"where there is a network (hf download {source.name}), or give a folder"
        ) from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
