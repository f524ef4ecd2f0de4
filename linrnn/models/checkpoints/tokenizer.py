"""The tokenizer that lies beside the weights."""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def read_tokenizer(folder: Path, *, official: bool) -> Any | None:
    """Returns transformers' tokenizer of a folder; None if it has none or transformers is not installed.

    One that needs code of its own, or is broken, is not loaded: a warning says why.

    Args:
        folder: of the checkpoint.
        official: transformers knows the config.json that lies there; else it would warn of it.
    """
    if not any((folder / name).is_file() for name in VOCABULARIES) or not importlib.util.find_spec("transformers"):
        return None
    from transformers import AutoTokenizer, PreTrainedConfig

    options = {} if official else {"config": PreTrainedConfig()}
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True, **options)
    except Exception as error:  # whatever a foreign file makes of it, the model is whole without
        warnings.warn(f"{folder}: the tokenizer cannot be loaded ({error})", stacklevel=4)
        return None
