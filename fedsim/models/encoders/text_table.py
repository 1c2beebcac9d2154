"""Prompt embeddings from a table, lifted to the width of a head where the table is narrower.

Two layouts of .npz:

    <set> [P, C', dim], <set>_names [C'], templates [P]     a vector per template and class (e.g. minilm_text.npz)
    names [C'], vectors [C', dim] or [C', tokens, dim]      a vector, or a sequence of them, per class

Lifting multiplies by a fixed seeded semi-orthogonal matrix, so all inner products between classes are kept. For a head
with tokens, a table of single vectors gives every token the same lifted vector under a token-specific signed
permutation of its entries: cosines between classes are those of the table, token by token and over all tokens.

Legend for shapes: C classes asked for, C' classes of the table, P templates.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedsim.errors import ModelError
from fedsim.models.encoders.files import load_arrays, locate
from fedsim.models.encoders.pooling import semi_orthogonal
from fedsim.seeding import rng

logger = logging.getLogger(__name__)

DEFAULT_TABLE = "text_minilm/minilm_text.npz"


def table_targets(
    class_names: Sequence[str], heads: Mapping[str, tuple[int, ...]], *, path: str | None, template: str
) -> dict[str, tuple[Tensor, str]]:
    """Targets and their source by head.

    Args:
        class_names: C names; underscores count as spaces, upper and lower case are the same.
        heads: output shape by head, (width,) or (tokens, width).
        path: .npz file (default $FEDSIM_DATA/text_minilm/minilm_text.npz).
        template: must be one of the table's; a table without templates is used as it is, with a warning unless "{}".

    Raises:
        ModelError: the file is missing or has another layout; template or class unknown; dimensions don't match.
    """
    file = locate(path, default=DEFAULT_TABLE, what="text table", config_key="model.text_encoder.path")
    names, vectors = _read(file, template=template)
    rows = torch.from_numpy(vectors[_row_numbers(class_names, names, file)])
    return {head: _fit(rows, head, shape, file=file) for head, shape in heads.items()}


def _read(file: Path, *, template: str) -> tuple[list[str], np.ndarray]:
    """Class names [C'] and float32 vectors [C', dim] or [C', tokens, dim]."""
    arrays = load_arrays(file, what="text table")
    sets = sorted(name for name in arrays if f"{name}_names" in arrays)
    if "names" in arrays and "vectors" in arrays:
        names, vectors = arrays["names"], arrays["vectors"]
        if template != "{}":
            logger.warning("%s holds one vector per class: the template %r isn't used", file.name, template)
    elif len(sets) == 1 and "templates" in arrays and arrays[sets[0]].ndim == 3:
        templates = [str(entry) for entry in arrays["templates"].tolist()]
        if template not in templates or len(arrays[sets[0]]) != len(templates):
            raise ModelError(
                f"{file} has no template {template!r}; set model.text_encoder.template to one of "
                + ", ".join(map(repr, templates))
            )
        names, vectors = arrays[f"{sets[0]}_names"], arrays[sets[0]][templates.index(template)]
    else:
        raise ModelError(
            f"{file} is no text table: it holds {', '.join(sorted(arrays)) or 'nothing'}; expected `names` and "
            "`vectors`, or one `<set>` [templates, classes, dim] with `<set>_names` and `templates`"
        )
    if vectors.ndim not in (2, 3) or vectors.dtype.kind != "f" or names.shape != vectors.shape[:1]:
        raise ModelError(
            f"{file}: vectors are {vectors.dtype} {list(vectors.shape)} for {names.size} names; "
            "expected floats [classes, dim] or [classes, tokens, dim]"
        )
    return [str(name) for name in names.tolist()], vectors.astype(np.float32)


def _row_numbers(class_names: Sequence[str], names: Sequence[str], file: Path) -> list[int]:
    index = {_plain(name): row for row, name in enumerate(names)}
    for class_name in class_names:
        if _plain(class_name) not in index:
            near = difflib.get_close_matches(_plain(class_name), index, n=1, cutoff=0.0)
            hint = f"; the nearest it has is {near[0]!r}" if near else ""
            raise ModelError(f"{file} has no class {class_name!r}{hint}; rename the class or give another table")
    return [index[_plain(class_name)] for class_name in class_names]


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").lower().split())


def _fit(rows: Tensor, head: str, shape: tuple[int, ...], *, file: Path) -> tuple[Tensor, str]:
    """Rows [C, dim] or [C, tokens, dim] brought to [C, *shape], and what was done."""
    table_shape = tuple(rows.shape[1:])
    width, dim = shape[-1], table_shape[-1]
    same_tokens = len(table_shape) == 1 or table_shape[:-1] == shape[:-1]
    if dim > width or not same_tokens or len(shape) > 2:
        raise ModelError(
            f"head dimensions don't match the table: head {head} is {list(shape)}, {file} holds {list(table_shape)} "
            "per class; a table may be narrower, but not wider, and must have the head's tokens or none"
        )
    if table_shape == shape:
        return rows, f"{file.name}, as it is"
    lifted = rows @ semi_orthogonal(dim, width, purpose="lift")
    if len(table_shape) == 1 and len(shape) == 2:
        lifted = _spread_over_tokens(lifted, shape[0])
    sizes = f"{'x'.join(map(str, table_shape))} -> {'x'.join(map(str, shape))}"
    return lifted, f"lifted {sizes} from {file.name}"


def _spread_over_tokens(rows: Tensor, num_tokens: int) -> Tensor:
    """[C, width] -> [C, tokens, width]: a signed permutation of the entries per token."""
    width = rows.shape[1]
    tokens = []
    for token in range(num_tokens):
        stream = rng(0, "lift", width, token)
        order = torch.from_numpy(stream.permutation(width))
        signs = torch.from_numpy(stream.choice(np.array([-1.0, 1.0], dtype=np.float32), size=width))
        tokens.append(rows[:, order] * signs)
    return torch.stack(tokens, dim=1)
