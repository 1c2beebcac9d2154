"""Targets: one prompt embedding per class and head, from CLIP and T5, from a table, or seeded (offline, no meaning).

What was used is told in `TextTargets.source` and never replaced in silence: a table lifted to another width is called
"lifted", never CLIP or T5.

Legend for shapes: C classes; `*shape` is a head's output, (width,) or (tokens, width).
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedsim.errors import ModelError
from fedsim.models.encoders.text_hub import clip_targets, t5_targets
from fedsim.models.encoders.text_table import table_targets
from fedsim.seeding import rng

logger = logging.getLogger(__name__)

TEXT_ENCODERS = ("transformers", "table", "seeded")
SEEDED_SOURCE = "seeded unit vectors (offline, no meaning)"


@dataclass(frozen=True)
class TextTargets:
    """Prompt embeddings of the classes, and where they come from.

    Attributes:
        targets: head -> float32 [C, *shape].
        source: head -> what was used, in words, e.g. "lifted 384 -> 768 from minilm_text.npz".
    """

    targets: dict[str, Tensor]
    source: dict[str, str]


def make_text_targets(
    name: str,
    *,
    class_names: Sequence[str],
    heads: Mapping[str, tuple[int, ...]],
    path: str | None,
    clip: str,
    t5: str,
    revision: str | None,
    template: str,
) -> TextTargets:
    """Targets of every class for every head; the same arguments give the same numbers.

    Args:
        name: transformers, table or seeded.
        class_names: C names; underscores count as spaces, upper and lower case are the same.
        heads: output shape by head. transformers serves the heads `clip`, (width,) or (tokens, width), and `t5`,
            (tokens, width); the others serve any.
        path: table: .npz file (default $FEDSIM_DATA/text_minilm/minilm_text.npz).
        clip: transformers: CLIP checkpoint, hub id or local folder.
        t5: transformers: T5 checkpoint, hub id or local folder.
        revision: transformers: revision of the hub checkpoints.
        template: prompt; {} is the class name with spaces. A table must hold it; seeded vectors don't depend on it.

    Raises:
        ModelError: unknown encoder or head; a checkpoint or table that can't be loaded or doesn't fit the heads; a
            class the table doesn't know; two classes with one target.
    """
    if name not in TEXT_ENCODERS:
        near = difflib.get_close_matches(name, TEXT_ENCODERS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ModelError(f"no text encoder {name!r}; known: {', '.join(TEXT_ENCODERS)}{hint}")
    if name == "transformers":
        made = _from_transformers(class_names, heads, clip=clip, t5=t5, revision=revision, template=template)
    elif name == "table":
        made = table_targets(class_names, heads, path=path, template=template)
    else:
        made = {head: (_seeded(class_names, head, shape), SEEDED_SOURCE) for head, shape in heads.items()}
    for head, (target, source) in made.items():
        _check_distinct(target, class_names, head=head, source=source)
        logger.info("targets of head %s: %s", head, source)
    return TextTargets(
        targets={head: target for head, (target, _) in made.items()},
        source={head: source for head, (_, source) in made.items()},
    )


def _from_transformers(
    class_names: Sequence[str],
    heads: Mapping[str, tuple[int, ...]],
    *,
    clip: str,
    t5: str,
    revision: str | None,
    template: str,
) -> dict[str, tuple[Tensor, str]]:
    if unknown := [head for head in heads if head not in ("clip", "t5")]:
        raise ModelError(
            f"transformers has no text encoder for head {unknown[0]!r}; its heads are clip and t5, "
            "other heads need model.text_encoder.name table or seeded"
        )
    prompts = [template.replace("{}", class_name.replace("_", " ")) for class_name in class_names]
    made: dict[str, tuple[Tensor, str]] = {}
    for head, shape in heads.items():
        if head == "clip":
            made[head] = (clip_targets(prompts, shape, checkpoint=clip, revision=revision), f"CLIP {clip}")
        else:
            made[head] = (t5_targets(prompts, shape, checkpoint=t5, revision=revision), f"T5 {t5}")
    return made


def _seeded(class_names: Sequence[str], head: str, shape: tuple[int, ...]) -> Tensor:
    """Unit vectors per class name (and token): a class has the same ones in every data set.  [C, *shape]."""
    rows = []
    for class_name in class_names:
        values = rng(0, "text", " ".join(class_name.replace("_", " ").lower().split()), head).standard_normal(shape)
        rows.append(torch.from_numpy(values))
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1).float()


def _check_distinct(target: Tensor, class_names: Sequence[str], *, head: str, source: str) -> None:
    """No number is missing and no two classes share a target: accuracy would be undefined."""
    if not torch.isfinite(target).all():
        raise ModelError(f"targets of head {head} ({source}) hold values that aren't finite")
    seen: dict[bytes, int] = {}
    for number, row in enumerate(target):
        other = seen.setdefault(row.numpy().tobytes(), number)
        if other != number:
            pair = f"{class_names[other]!r} and {class_names[number]!r}"
            raise ModelError(
                f"classes {pair} have the same target for head {head} ({source}); "
                "give them names that differ, or a shorter model.text_encoder.template"
            )
