"""Loading checkpoints through transformers: from the hub, from its cache, or from a local folder.

Only safetensors are read. What fails becomes one line that names the checkpoint and says what to do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fedsim.errors import ModelError

logger = logging.getLogger(__name__)

Loaded = TypeVar("Loaded")


def preflight(checkpoint: str, *, revision: str | None, instead: str) -> None:
    """Fail early, and say what is about to happen, before a checkpoint is loaded.

    Args:
        checkpoint: hub id or local folder.
        revision: of the hub checkpoint.
        instead: what to use without a network, for the message.

    Raises:
        ModelError: a folder that doesn't exist, or an uncached checkpoint while HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if Path(checkpoint).expanduser().is_dir():
        return
    if checkpoint.startswith((".", "/", "~")) or checkpoint.count("/") > 1:
        raise ModelError(f"no folder {checkpoint}; give a folder made by save_pretrained, or a hub id like MIT/ast-...")
    try:
        cached = try_to_load_from_cache(checkpoint, "config.json", revision=revision)
    except ValueError as error:
        raise ModelError(f"{checkpoint!r} is neither a folder nor a hub id (owner/name)") from error
    if isinstance(cached, str):
        return
    if constants.HF_HUB_OFFLINE:
        raise ModelError(
            f"{_named(checkpoint, revision)} isn't in the Hugging Face cache ({constants.HF_HOME}) and HF_HUB_OFFLINE "
            f"is set; {_what_to_do(checkpoint, instead)}"
        )
    logger.warning("%s isn't in the Hugging Face cache: fetching it from the hub", _named(checkpoint, revision))


def guarded(load: Callable[[], Loaded], *, checkpoint: str, revision: str | None, what: str, instead: str) -> Loaded:
    """The result of `load`, with what transformers raises turned into one line.

    Raises:
        ModelError: files are missing, unreachable, not safetensors, or of another kind.
    """
    from huggingface_hub import constants
    from safetensors import SafetensorError

    try:
        return load()
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ModelError(
            f"can't load the {what} of {_named(checkpoint, revision)} (HF_HOME {constants.HF_HOME}): {reason} … ; "
            f"{_what_to_do(checkpoint, instead)}"
        ) from error


def load_model(model_class: Any, checkpoint: str, *, revision: str | None, model_types: set[str], instead: str) -> Any:
    """A model in eval mode without gradients, complete and of the right kind.

    Args:
        model_class: transformers class.
        checkpoint: hub id or local folder.
        revision: of the hub checkpoint.
        model_types: `model_type` values of config.json that the class may read.
        instead: what to use without a network, for the message.

    Raises:
        ModelError: it can't be loaded, is of another kind, or lacks tensors (they would be random, without a word).
    """
    from transformers import AutoConfig

    preflight(checkpoint, revision=revision, instead=instead)
    config = guarded(
        lambda: AutoConfig.from_pretrained(checkpoint, revision=revision),
        checkpoint=checkpoint, revision=revision, what="configuration", instead=instead,
    )  # fmt: skip
    if config.model_type not in model_types:
        raise ModelError(f"{checkpoint} is a {config.model_type!r} model; expected one of {sorted(model_types)}")
    model, info = guarded(
        lambda: model_class.from_pretrained(
            checkpoint, revision=revision, use_safetensors=True, output_loading_info=True
        ),
        checkpoint=checkpoint, revision=revision, what="weights (safetensors only)", instead=instead,
    )  # fmt: skip
    incomplete = sorted([*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])])
    if incomplete:
        raise ModelError(
            f"{checkpoint} lacks {len(incomplete)} tensors of {model_class.__name__} or has them in other shapes "
            f"(first: {incomplete[0]}); give a complete checkpoint"
        )
    return model.eval().requires_grad_(False)


def _named(checkpoint: str, revision: str | None) -> str:
    return checkpoint if revision is None else f"{checkpoint} (revision {revision})"


def _what_to_do(checkpoint: str, instead: str) -> str:
    if Path(checkpoint).expanduser().is_dir():
        return "the folder must hold what save_pretrained writes"
    return f"`hf download {checkpoint}` where there is a network, or use {instead}"
