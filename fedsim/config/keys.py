"""Every configuration key as a record read from the schema: the source of `explain`, of suggestions and of messages.

Keys are dotted. Where a user picks the name, a placeholder stands for it: `nodes.<id>.dataset`,
`model.adapters.<head>.preset`, `search.space.<key>.low`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, get_args

from fedsim.config.schema import Config, Section

_PLACEHOLDERS = {"nodes": "<id>", "model.adapters": "<head>", "search.space": "<key>",
                 "resources.more_actors": "<kind>"}  # fmt: skip
_TYPES = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}
_LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


@dataclass(frozen=True)
class Key:
    """One configuration key.

    Attributes:
        name: dotted name, with placeholders.
        kind: its type in words, e.g. "whole number", "list of text", "text or nothing".
        default: its default value; None for a section.
        help: what it means.
        unit: what a number counts, or None.
        limits: allowed values in words, or "" where every value of the type is allowed.
        choices: the allowed words, or ().
        is_section: whether keys lie below it by name.
    """

    name: str
    kind: str
    default: Any
    help: str
    unit: str | None = None
    limits: str = ""
    choices: tuple[Any, ...] = ()
    is_section: bool = False

    @property
    def allowed(self) -> str:
        """What may stand here, as one phrase for messages."""
        if self.choices:
            return "one of " + ", ".join(map(str, self.choices)) + (" or nothing" if "nothing" in self.kind else "")
        return self.kind + (f", {self.limits}" if self.limits else "")


@cache
def known_keys() -> Mapping[str, Key]:
    """All keys and sections by dotted name, in the schema's order."""
    return MappingProxyType({key.name: key for key in _walk(Config, "")})


def find_key(dotted: str) -> Key | None:
    """The key behind a dotted name with real names (`nodes.3.dataset`) or placeholders; None if there is none."""
    return known_keys().get(_with_placeholders(dotted))


def nearest_key(dotted: str) -> str | None:
    """The known key that a wrong one was probably meant to be.

    Looks among the keys of the same section, then for the same or a very similar last word in any section.
    """
    section, _, leaf = dotted.rpartition(".")
    prefix = _with_placeholders(section) + "." if section else ""
    siblings = [name.removeprefix(prefix) for name in known_keys() if name.startswith(prefix)]
    close = difflib.get_close_matches(leaf, [name for name in siblings if "." not in name], n=1)
    if close:
        return f"{section}.{close[0]}" if section else close[0]
    elsewhere = {
        name.rpartition(".")[2]: name for name, key in reversed(list(known_keys().items())) if not key.is_section
    }
    similar = difflib.get_close_matches(leaf, elsewhere, n=1, cutoff=0.8)
    return elsewhere[similar[0]] if similar else None


def suggestion(dotted: str) -> str:
    """The end of a message about an unknown key: the nearest key, or the keys of its section."""
    nearest = nearest_key(dotted)
    if nearest:
        return f"did you mean {nearest!r}?"
    section = _with_placeholders(dotted.rpartition(".")[0])
    prefix = section + "." if section else ""
    names = [name.removeprefix(prefix) for name in known_keys() if name.startswith(prefix)]
    return "known here: " + ", ".join(name for name in names if "." not in name)


def _with_placeholders(dotted: str) -> str:
    """The dotted name with what users name replaced by the schema's placeholders."""
    for section, placeholder in _PLACEHOLDERS.items():
        rest = dotted.removeprefix(section + ".")
        if rest == dotted:
            continue
        # A searched key holds dots itself, so only its last word can be a key of the schema.
        head, _, last = rest.rpartition(".") if section == "search.space" else rest.partition(".")
        if section == "search.space" and f"{section}.{placeholder}.{last}" not in known_keys():
            return f"{section}.{placeholder}"
        return f"{section}.{placeholder}" + (f".{last}" if head and last else "")
    return dotted


def _walk(model: type[Section], prefix: str) -> Iterator[Key]:
    """The keys of one section and below."""
    properties = model.model_json_schema()["properties"]
    for field_name, field in model.model_fields.items():
        name = prefix + field_name
        below = _section_in(field.annotation)
        if below is not None:
            purpose = (below.__doc__ or "").strip().partition("\n")[0]
            yield Key(name, "section", None, field.description or purpose, is_section=True)
            if name in _PLACEHOLDERS:
                name = f"{name}.{_PLACEHOLDERS[name]}"
                yield Key(name, "section", None, purpose, is_section=True)
            yield from _walk(below, name + ".")
            continue
        shape = properties[field_name]
        branch, *others = sorted(shape.get("anyOf", [shape]), key=lambda part: part.get("type") == "null")
        yield Key(
            name=name,
            kind=" or ".join([_kind(branch), *(part.get("const", "nothing") for part in others)]),
            default=field.get_default(call_default_factory=True),
            help=field.description or "",
            unit=shape.get("unit"),
            limits=_limits(branch),
            choices=tuple(branch.get("enum", ())),
        )


def _section_in(annotation: Any) -> type[Section] | None:
    """The section class of a field: the field itself, or the values of its mapping."""
    candidates = (annotation, *get_args(annotation))
    return next((part for part in candidates if isinstance(part, type) and issubclass(part, Section)), None)


def _kind(shape: Mapping[str, Any]) -> str:
    """A JSON schema's type in words."""
    if shape.get("type") == "array":
        return "list of " + _kind(shape["items"])
    if shape.get("type") == "object":
        return f"mapping from names to {_kind(shape['additionalProperties'])}"
    return _TYPES.get(shape.get("type", ""), "any value")


def _limits(shape: Mapping[str, Any]) -> str:
    """A JSON schema's limits in words."""
    parts = [f"{words} {shape[name]:g}" for name, words in _LIMITS.items() if name in shape]
    if "minLength" in shape:
        parts.append("not empty")
    if "pattern" in shape:
        parts.append(f"matching {json.dumps(shape['pattern'])}")
    return ", ".join(parts)
