"""Generated configurations: hypothesis strategies that walk the schema, so that new keys are covered by themselves."""

from __future__ import annotations

import copy
import json
import re
import types
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from fedsim.config.schema import Config, Section

NAMES = ("clip", "t5", "a", "dog", "rain", "0", "training.learning_rate", "federation.alpha", "x")
WORDS = (
    "dog",
    "rain",
    "sneezing",
    "clip",
    "auto",
    "eval/top1",
    "{}",
    "a {}",
    "x",
    "ünï — 犬",
    "1e-3",
    "null",
    "~",
    "no",
)
WRONG = (
    "",
    " ",
    "x" * 2000,
    "a\nb",
    "\x00",
    "\ud800",
    "x" * 5000,
    "\u202e\u2028",
    "../..",
    "/dev/zero",
    "NaN",
    "0x10",
    "1:30",
    "2026-01-01",
    None,
    True,
    False,
    -1,
    0,
    1.5,
    -0.0,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
    -float("inf"),
    2**31,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    10**400,
    -(2**63),
    [],
    [[]],
    [None],
    {},
    {"": 1},
    {"x": {"y": []}},
    [1e308] * 3,
    list(range(300)),
)
SMALL = 8
"""Sizes that a whole run is given."""
TEXTS = (
    "",
    "# nothing",
    "- a\n- b",
    "text",
    "3",
    "null",
    "~",
    "[",
    "{",
    "a: [1, 2",
    "a: b: c",
    "\t",
    "%YAML 9.9\n---\na: 1",
    "a: 1\na: 2",
    "data: {name: csv, name: csv}",
    "--- {}\n--- {}",
    "!!python/object:os.system {}",
    "a: !!python/object/apply:os.system ['true']",
    "a: !!python/name:os.system",
    "a: !<x> b",
    "a: !!binary 'aGk='",
    "a: !!set {a, b}",
    "a: !!omap [a: 1]",
    "a: !!pairs [a: 1]",
    "a: !!int x",
    "a: !!float x",
    "a: !!bool x",
    "a: !!null x",
    "a: !!timestamp x",
    "a: !!timestamp 2026-99-99",
    "experiment: {seed: !!int 0b}",
    "a: *b",
    "a: &a [*a]",
    "a: &a {b: *a}",
    "&a {federation: *a}",
    "&a [*a]",
    "data: &d {<<: *d}",
    "data: {<<: 3}",
    "data: {<<: [1]}",
    "data: {<<: {name: csv}}",
    "? [a]\n: b",
    "? {a: b}\n: c",
    "!!str a: !!str b",
    "1: 2",
    "null: 1",
    "true: 1",
    "[]: 1",
    "{}: 1",
    ".nan: 1",
    "=: 1",
    "experiment: {seed: 0x" + "f" * 10_000 + "}",
    "experiment: {seed: " + "9" * 5000 + "}",
    "training: {learning_rate: 1e999}",
    "experiment: {seed: 1_000}",
    "experiment: {seed: 0o17}",
    "experiment: {seed: 017}",
    "experiment: {name: =}",
    "experiment: {name: 12}",
    "experiment: {name: 2026-01-01}",
    "experiment: {description: |\n  a\n  b\n}",
    "a: " + "[" * 5000,
    "a: " + "{b: " * 5000,
    "[" * 100_000,
    '{"a":' * 50_000,
    "- " * 3000,
    "? " * 3000,
    "a" * 100_000 + ": 1",
    "!" * 5000,
    "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{c}: &{c} [{','.join(['*' + p] * 9)}]\n" for p, c in pairwise("abcdefghij")),
    "a: &a {x: 1}\n" + "".join(f"{c}: &{c} {{<<: [*{p}, *{p}, *{p}, *{p}]}}\n" for p, c in pairwise("abcdefghijklmn")),
    '{"a": 1, "a": 2}',
    '{"a": NaN}',
    '{"experiment": {"seed": 1e400}}',
    '{"a": "\\ud800"}',
    '{"experiment": {"name": "\\u0000"}}',
    '{"experiment": null}',
    '{"experiment": []}',
    "\ufeffexperiment: {}",
    'experiment: {name: "\\ud800"}',
    "\x85",
    "\u2028",
    '{"%s": 1}' % ("k" * 100_000),
    '{"experiment": {"%s": 1}}' % ("k" * 3000),
    '{"nodes": {"a\\nb": {}}}',
    '{"nodes": {"\\ud800": {}}}',
    '{"nodes": {"": {}, " ": {}}}',
    '{"experiment": {' + ",".join(f'"k{n}": {n}' for n in range(5000)) + "}}",
    '{"data": {"classes": [' + ",".join(['"dog"'] * 5000) + "]}}",
    '{"experiment": {"description": "%s"}}' % ("x" * 3_000_000),
    "nodes: {x: {diffusion_type: 0x" + "f" * 10_000 + "}}",
    "experiment: {seed: [0x" + "f" * 10_000 + "]}",
)
"""Documents that somebody could leave in place of a configuration."""


@dataclass(frozen=True, repr=False)
class Leaf:
    """One key of the schema: where it stands and what it takes."""

    path: tuple[str, ...]
    values: st.SearchStrategy[Any]


def leaves(model: type[Section] = Config, path: tuple[str, ...] = (), *, largest: int = 2**40) -> list[Leaf]:
    """All keys; what a user names gets one of `NAMES`.

    Args:
        model: the section.
        path: where it stands.
        largest: number where the schema has no limit.
    """
    found = []
    for name, field in model.model_fields.items():
        below, here = _section(field.annotation), (*path, name)
        if below is None:
            found.append(Leaf(here, _of(field.annotation, _limits(field), largest)))
        elif get_origin(field.annotation) is dict:
            found += [leaf for named in NAMES for leaf in leaves(below, (*here, named), largest=largest)][
                :: len(NAMES) - 1
            ]
        else:
            found += leaves(below, here, largest=largest)
    return found


def _section(annotation: Any) -> type[Section] | None:
    parts = (annotation, *get_args(annotation))
    return next((part for part in parts if isinstance(part, type) and issubclass(part, Section)), None)


def _limits(field: FieldInfo) -> dict[str, Any]:
    limits: dict[str, Any] = {}
    for rule in field.metadata:
        for name in ("ge", "gt", "le", "lt", "pattern", "min_length"):
            if getattr(rule, name, None) is not None:
                limits[name] = getattr(rule, name)
    return limits


def _of(annotation: Any, limits: dict[str, Any], largest: int) -> st.SearchStrategy[Any]:
    """Values of a type within limits, its borders more often than not."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [rule for rule in parts[1:] if isinstance(rule, FieldInfo)]
        return _of(parts[0], limits | {k: v for rule in inner for k, v in _limits(rule).items()}, largest)
    if origin is Literal:
        return st.sampled_from(parts)
    if origin in {Union, types.UnionType}:
        return st.one_of([_of(part, limits, largest) for part in parts])
    if origin is list:
        return st.lists(_of(parts[0], {}, largest), max_size=3)
    if origin is dict:
        return st.dictionaries(st.sampled_from(NAMES), _of(parts[1], {}, largest), max_size=2)
    if annotation is int:
        low = limits.get("ge", limits.get("gt", -1) + 1)
        high = max(low, min(limits.get("le", largest), largest))
        return st.one_of(
            st.integers(low, min(high, low + 8)), st.sampled_from([low, high, low + 1 if low < high else low])
        )
    if annotation is float:
        return _floats(limits, largest)
    if annotation is str and "pattern" in limits:
        said = ("none", "all", "last:1", "last:999999999", "{}", "a sound of {}, {}")
        return st.sampled_from([word for word in said if re.search(limits["pattern"], word)])
    simple = {
        str: st.sampled_from(WORDS),
        bool: st.booleans(),
        type(None): st.none(),
        Any: st.sampled_from((*WORDS, 1, 0.1)),
    }
    return simple[annotation]


def _floats(limits: dict[str, Any], largest: int) -> st.SearchStrategy[float]:
    low, high = limits.get("ge", limits.get("gt")), limits.get("le", limits.get("lt"))
    border = [float(value) for name, value in limits.items() if name in {"ge", "le"}]
    inside = st.floats(
        low,
        float(largest) if high is None else high,
        exclude_min="gt" in limits,
        exclude_max="lt" in limits,
        allow_subnormal=True,
    )
    usual = [x for x in (1e-3, 0.1, 0.5, 0.9, 1.0, 10.0) if (low is None or x > low) and (high is None or x < high)]
    return st.one_of(st.sampled_from(usual + border), inside)


def placed(values: list[tuple[tuple[str, ...], Any]], base: Any = None) -> dict[str, Any]:
    """Keys put in their places in a copy of a document; a place that is no section any more is left."""
    document = json.loads(json.dumps(base or {}))
    for path, value in values:
        place: Any = document
        for part in path[:-1]:
            place = place.setdefault(part, {}) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place[path[-1]] = copy.deepcopy(value)
    return document


@st.composite
def documents(
    draw: st.DrawFn, known: list[Leaf], *, base: Any, broken: bool = True, most: int = 8, always: bool = False
) -> dict[str, Any]:
    """Some keys with values of theirs, on top of a base always or in every second document.

    Where asked for, up to two of them are wrong, misspelt or elsewhere.
    """
    chosen = draw(st.lists(st.sampled_from(known), max_size=most))
    values = [(leaf.path, draw(leaf.values)) for leaf in chosen]
    for _ in range(draw(st.integers(0, 2)) if broken else 0):
        path = draw(st.sampled_from(known)).path
        kind = draw(st.integers(0, 6))
        if kind == 0:
            path = (*path[:-1], path[-1][:-1] + draw(st.sampled_from(["", "x", " ", "é", "\x00", "."])))
        elif kind == 1:
            path = path[: draw(st.integers(1, len(path)))]
        elif kind == 2:
            path = (*path, draw(st.sampled_from(["x", "", "low"])))
        elif kind == 3 and len(path) > 2:
            path = (
                *path[:-2],
                draw(st.sampled_from(["", "a\nb", "\ud800", "encoder", "k" * 300, "1", "../x"])),
                path[-1],
            )
        values.append((path, draw(st.sampled_from(WRONG))))
    return placed(values, base if always or draw(st.booleans()) else None)


@st.composite
def files(draw: st.DrawFn, known: list[Leaf], base: Any) -> tuple[str, str]:
    """A suffix and what stands in a file."""
    if draw(st.integers(0, 24)) == 0:
        return draw(st.sampled_from([".yaml", ".json"])), draw(st.sampled_from(TEXTS))
    document = draw(documents(known, broken=draw(st.booleans()), base=base))
    if draw(st.booleans()) or not json.dumps(document, ensure_ascii=False).isprintable():
        return ".json", json.dumps(document)  # YAML can't write every text
    return ".yaml", yaml.dump(
        document, Dumper=yaml.CSafeDumper, allow_unicode=True, default_flow_style=draw(st.booleans())
    )


@st.composite
def spaces(draw: st.DrawFn, known: list[Leaf]) -> dict[str, Any]:
    """A section `search.space` over some keys, with values that they take; one in six has something wrong."""
    space = {}
    for leaf in draw(st.lists(st.sampled_from(known), min_size=1, max_size=2)):
        if draw(st.booleans()):
            searched = {"choices": draw(st.lists(leaf.values, min_size=1, max_size=3))}
        else:
            ends = sorted([draw(leaf.values), draw(leaf.values)], key=lambda value: (str(type(value)), str(value)))
            searched = {"low": ends[0], "high": ends[1]} | {draw(st.sampled_from(["log", "integer"])): True}
        if draw(st.integers(0, 5)) == 0:
            searched[draw(st.sampled_from(["low", "high", "log", "integer", "choices", "x"]))] = draw(
                st.sampled_from(WRONG)
            )
        space[".".join(leaf.path)] = searched
    return space


@st.composite
def overrides(draw: st.DrawFn, known: list[Leaf]) -> list[str]:
    """Texts of --set."""
    found = []
    for _ in range(draw(st.integers(0, 2))):
        leaf, wrong = draw(st.sampled_from(known)), draw(st.integers(0, 3)) == 0
        value = draw(st.sampled_from(WRONG) if wrong else leaf.values)
        found.append(".".join(leaf.path) + "=" + (value if isinstance(value, str) else json.dumps(value)))
        if draw(st.integers(0, 9)) == 0:
            found.append(
                draw(
                    st.sampled_from(["", "=", "x", ".=1", "a..b=1", "data=", "data=3", "data.x.y=1", "=1", "a=&a [*a]"])
                )
            )
    return found
