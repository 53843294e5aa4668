"""Models from disk or the Hub."""

from __future__ import annotations

import platform
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

import sparse_cl

from .processes import processes


def load_model(
    source: str, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer, with a padding token.

    Args:
        device: where the model goes; None: to this process's.

    Raises:
        ValueError: there is no such folder, or what is there cannot be loaded; or the tokenizer cannot pad.
    """
    tokenizer, _ = load_tokenizer(source)
    with _loading(source):
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    return model.to(processes().device if device is None else device), tokenizer


def load_tokenizer(source: str, beside: str | None = None) -> tuple[Any, int]:
    """A model's tokenizer, with a padding token, and the rows of the model's input embedding, without its weights.

    Args:
        beside: folder or name of the tokenizer, where it is not the model's.

    Raises:
        ValueError: as `load_model`.
    """
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{source} is no model's folder: it has no config.json; there are {_listed(path)}")
    elif path.exists() or source.startswith((".", "/", "~")):
        raise ValueError(f"{source}: there is no such folder; give a model's folder, or its name on the Hub")
    with _loading(source):
        config = transformers.AutoConfig.from_pretrained(source)
        tokenizer = transformers.AutoTokenizer.from_pretrained(beside or source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{source}: its tokenizer has no token to pad with, and no end token; give it one (pad_token)")
    return tokenizer, getattr(config.get_text_config(), "vocab_size", sys.maxsize)


@contextmanager
def _loading(source: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{source} cannot be loaded as a causal language model and its tokenizer: {error}") from error


def _listed(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "no files in it"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    packages = ("torch", "transformers", "peft", "accelerate", "datasets")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    # The metadata of an editable install may be older than the source.
    return found | {"sparse_cl": sparse_cl.__version__}


def quiet() -> None:
    """Silences transformers' progress bars, advice and deprecation warnings; errors remain."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
