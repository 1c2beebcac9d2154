"""Prompt embeddings by CLIP and T5 through transformers, the way the image pipelines make them.

As FLUX and Stable Diffusion do: prompts padded to the full number of tokens, no attention mask. FLUX takes CLIP's
pooled output and T5's last hidden state, Stable Diffusion takes CLIP's last hidden state.

Legend for shapes: C prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedsim.errors import ModelError
from fedsim.models.encoders.hub import guarded, load_model

OFFLINE = "model.text_encoder.name table or seeded, which need no network"
PROMPTS_AT_ONCE = 8


def clip_targets(prompts: Sequence[str], shape: tuple[int, ...], *, checkpoint: str, revision: str | None) -> Tensor:
    """CLIP text embeddings, float32 [C, *shape]: pooled for (width,), last hidden state for (tokens, width).

    Raises:
        ModelError: the checkpoint can't be loaded or its output has another shape.
    """
    from transformers import CLIPTextModel

    model = load_model(
        CLIPTextModel, checkpoint, revision=revision, model_types={"clip", "clip_text_model"}, instead=OFFLINE
    )
    tokens, width = int(model.config.max_position_embeddings), int(model.config.hidden_size)
    pooled = len(shape) == 1
    _check_shape("clip", shape, (width,) if pooled else (tokens, width), checkpoint)
    tokenizer = _load_tokenizer(checkpoint, revision=revision, vocab_size=int(model.config.vocab_size))
    rows = []
    for output in _outputs(model, tokenizer, prompts, num_tokens=tokens):
        rows.append(output.pooler_output if pooled else output.last_hidden_state)
    return torch.cat(rows).float()


def t5_targets(prompts: Sequence[str], shape: tuple[int, ...], *, checkpoint: str, revision: str | None) -> Tensor:
    """T5 encoder's last hidden state, float32 [C, tokens, width]; longer prompts are cut to `tokens`.

    Raises:
        ModelError: the checkpoint can't be loaded or its output has another shape.
    """
    from transformers import T5EncoderModel

    model = load_model(T5EncoderModel, checkpoint, revision=revision, model_types={"t5"}, instead=OFFLINE)
    width = int(model.config.d_model)
    _check_shape("t5", shape, (shape[0], width) if len(shape) == 2 else ("tokens", width), checkpoint)
    tokenizer = _load_tokenizer(checkpoint, revision=revision, vocab_size=int(model.config.vocab_size))
    outputs = _outputs(model, tokenizer, prompts, num_tokens=shape[0])
    return torch.cat([output.last_hidden_state for output in outputs]).float()


@torch.no_grad()
def _outputs(model: Any, tokenizer: Any, prompts: Sequence[str], *, num_tokens: int) -> list[Any]:
    outputs = []
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        batch = tokenizer(
            list(prompts[start : start + PROMPTS_AT_ONCE]),
            padding="max_length", max_length=num_tokens, truncation=True, return_tensors="pt",
        )  # fmt: skip
        outputs.append(model(input_ids=batch["input_ids"]))
    return outputs


def _check_shape(head: str, wanted: tuple[int, ...], given: tuple[int | str, ...], checkpoint: str) -> None:
    if wanted != given:
        raise ModelError(
            f"head {head} has shape {list(wanted)}, but {checkpoint} gives [{', '.join(map(str, given))}]; "
            "set model.heads or model.diffusion_type to it, or take another checkpoint"
        )


def _load_tokenizer(checkpoint: str, *, revision: str | None, vocab_size: int) -> Any:
    """The checkpoint's tokenizer.

    transformers makes an almost empty tokenizer, without a word, where files are missing (T5: 104 tokens), so its size
    is compared with the model's vocabulary; real ones fill it but for padding (T5: 32,100 of 32,128).
    """
    from transformers import AutoTokenizer

    tokenizer = guarded(
        lambda: AutoTokenizer.from_pretrained(checkpoint, revision=revision),
        checkpoint=checkpoint, revision=revision, what="tokenizer", instead=OFFLINE,
    )  # fmt: skip
    if not vocab_size / 2 <= len(tokenizer) <= vocab_size:
        raise ModelError(
            f"the tokenizer of {checkpoint} has {len(tokenizer)} tokens, its model {vocab_size}: tokenizer files are "
            f"missing or of another model; `hf download {checkpoint}`, or save the tokenizer into the folder"
        )
    return tokenizer
