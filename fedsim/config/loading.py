"""A checked `Config` from a file, overrides or a mapping, and back to text.

Order of precedence: overrides, the file, the schema's defaults. Every problem with a key becomes one phrase of a single
`ConfigError` line: the key, where it stands, what came, what is allowed, the nearest known name.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fedsim.config.checks import check_config
from fedsim.config.keys import find_key, suggestion
from fedsim.config.original import translate
from fedsim.config.reading import EXPONENT_FLOAT, parse_yaml, read_mapping, require_small
from fedsim.config.schema import Config, SearchRange
from fedsim.errors import ConfigError

_LOG = logging.getLogger(__name__)
_SHOWN_PROBLEMS = 3
_SHOWN_CHARACTERS = 60
_LONGEST_NAME, _LONGEST_TEXT = 200, 4096
_LARGEST = 2**63 - 1

Scalar = str | int | float | bool | None


def quickstart_path() -> Path:
    """The embedded default configuration."""
    return Path(__file__).with_name("quickstart.yaml")


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read, translate, override and check a configuration; warnings are logged.

    Args:
        path: a YAML or JSON file, also an experiment file of the original; None for the embedded quickstart.
        overrides: `key=value` texts, later ones win. The value is YAML: `federation.alpha=0.1`,
            `data.classes=[dog, rain]`, `search.space.training.learning_rate={low: 1e-4, high: 1e-2, log: true}`.

    Raises:
        ConfigError: the file can't be read, or a key or value is wrong.
    """
    path = quickstart_path() if path is None else Path(path)
    return config_from_mapping(read_mapping(path), overrides, source=str(path))


def config_from_mapping(
    mapping: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = "configuration"
) -> Config:
    """Like `load_config`, from a mapping with the shape of a file; `source` names it in messages.

    Raises:
        ConfigError: a key or value is wrong.
    """
    values = _without_comments(mapping)
    given = [_parse_override(text) for text in overrides]
    for key, parts, value in given:
        _set(values, key, parts, value)
    sources = _Sources(source, [".".join(parts) for _, parts, _ in given])
    if problems := list(_not_plain(values, "", sources)):
        raise ConfigError(_joined(problems, len(problems)))
    with _naming(source):
        values, notes = translate(_with_empty_sections(values))
    config = _validated(values, sources)
    with _naming(source):
        notes += check_config(config)
    require_small(config.model_dump(mode="json"), source)
    for note in notes:
        _LOG.warning("%s: %s", source, note)
    return _counting_nodes(config)


def resolved_yaml(config: Config) -> str:
    """The whole configuration as YAML, defaults included; loading it gives an equal `Config`."""
    dumper: Any = type("Dumper", (yaml.SafeDumper,), {})
    # Text such as "1e-3" must be quoted, for it is read as a number.
    dumper.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT_FLOAT, list("-+.0123456789"))
    values = config.model_dump(mode="json")
    text: str = yaml.dump(values, Dumper=dumper, sort_keys=False, allow_unicode=True, width=120)
    return text


def flatten(config: Config) -> dict[str, Scalar]:
    """The configuration as dotted keys and scalars (lists as JSON text), for tracking and comparison.

    Mappings that hold nothing (no `nodes`, say) leave no key.
    """

    def walk(value: Any, name: str) -> Iterator[tuple[str, Scalar]]:
        if isinstance(value, dict):
            for key, below in value.items():
                yield from walk(below, f"{name}.{key}" if name else key)
        else:
            yield name, json.dumps(value) if isinstance(value, list) else value

    return dict(walk(config.model_dump(mode="json"), ""))


class _Sources:
    """Where a key was given: by an override, or in the file."""

    def __init__(self, file: str, overridden: Sequence[str]) -> None:
        self._file = file
        self._overridden = overridden

    def of(self, key: str) -> str:
        """E.g. "in x.yaml" or "in --set"."""
        related = any(
            f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.") for other in self._overridden
        )
        return "in --set" if related else f"in {self._file}"


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Put the source before the message of a `ConfigError`."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _validated(values: Mapping[str, Any], sources: _Sources) -> Config:
    """The typed configuration; all problems with single keys in one error."""
    try:
        return Config.model_validate(values, strict=True)
    except ValidationError as error:
        details = error.errors(include_url=False)
        phrases = [_phrase(detail, sources) for detail in details[:_SHOWN_PROBLEMS]]
        raise ConfigError(_joined(phrases, len(details))) from None


def _counting_nodes(config: Config) -> Config:
    """`federation.num_clients` made to say how many explicit clients there are, so that one number holds everywhere."""
    if not config.nodes:
        return config
    federation = config.federation.model_copy(update={"num_clients": len(config.nodes)})
    return config.model_copy(update={"federation": federation})


def _without_comments(value: Any) -> Any:
    """A deep copy without keys that start with `_comment`; keys become text."""
    if isinstance(value, Mapping):
        kept = {str(key): below for key, below in value.items() if not str(key).startswith("_comment")}
        return {key: _without_comments(below) for key, below in kept.items()}
    if isinstance(value, list | tuple):
        return [_without_comments(item) for item in value]
    return value


def _with_empty_sections(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Sections that hold nothing (`training:` with all keys commented out) made empty mappings: their defaults hold."""
    filled: dict[str, Any] = {}
    for name, value in values.items():
        key = find_key(prefix + name)
        is_section = key is not None and key.is_section
        filled[name] = {} if is_section and value is None else value
        if is_section and isinstance(value, Mapping):
            filled[name] = _with_empty_sections(value, f"{prefix}{name}.")
    return filled


def _parse_override(text: str) -> tuple[str, list[str], Any]:
    """Key, path and value of one `key=value`."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")) or not key.isprintable() or len(key) > _LONGEST_NAME:
        raise ConfigError(f"--set {_shown(text)}: expected key=value, e.g. federation.num_clients=100")
    return key, _override_path(key), _without_comments(parse_yaml(value, f"--set {key}"))


def _override_path(key: str) -> list[str]:
    """Where an override goes: words between dots, but a searched key stays one word with its dots."""
    parts = key.split(".")
    if parts[:2] != ["search", "space"] or len(parts) < 4:
        return parts
    last = [parts.pop()] if parts[-1] in SearchRange.model_fields else []
    return ["search", "space", ".".join(parts[2:]), *last]


def _set(values: dict[str, Any], key: str, parts: Sequence[str], value: Any) -> None:
    """Put an override's value in its place."""
    place = values
    for part in parts[:-1]:
        if place.get(part) is None:
            place[part] = {}
        place = place[part]
        if not isinstance(place, dict):
            raise ConfigError(f"--set {key}: {part!r} holds {_shown(place)}, there are no keys below it; set it whole")
    place[parts[-1]] = value


def _not_plain(value: Any, key: str, sources: _Sources) -> Iterator[str]:
    """Phrases about numbers that aren't finite or have over 64 bits and text that isn't Unicode, anywhere."""
    if isinstance(value, dict):
        for name, below in value.items():
            if not name.isprintable() or not 0 < len(name) <= _LONGEST_NAME:
                yield f"key {_shown(name)} {sources.of(key)}: a name has 1 to {_LONGEST_NAME} printable characters"
            else:
                yield from _not_plain(below, f"{key}.{name}" if key else name, sources)
    elif isinstance(value, list):
        for item in value:
            yield from _not_plain(item, key, sources)
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{key!r} {sources.of(key)}: got {value}, expected a finite number"
    elif isinstance(value, int) and not -_LARGEST <= value <= _LARGEST:
        yield f"{key!r} {sources.of(key)}: got {_shown(value)}, expected a number of at most 64 bits ({_LARGEST})"
    elif isinstance(value, str) and any("\ud800" <= c <= "\udfff" or c == "\0" for c in value):
        yield f"{key!r} {sources.of(key)}: got {_shown(ascii(value))}, which isn't text"
    elif isinstance(value, str) and len(value) > _LONGEST_TEXT:
        yield f"{key!r} {sources.of(key)}: got {len(value)} characters, expected at most {_LONGEST_TEXT}"


def _phrase(detail: Mapping[str, Any], sources: _Sources) -> str:
    """One validation problem in one line."""
    location = detail["loc"]
    key = ".".join(str(part) for part in location if isinstance(part, str))
    where = sources.of(key)
    if detail["type"] == "extra_forbidden":
        return f"unknown key {key!r} {where}: {suggestion(key)}"
    position = "".join(f"[{part}]" for part in location if isinstance(part, int))
    got = _shown(detail["input"])
    known, mapping = find_key(key), find_key(key.rpartition(".")[0])
    if known is None and mapping is not None and not mapping.is_section:
        return f"{key + position!r} {where}: got {got}, expected what stands in a {mapping.allowed}"
    if known is None or known.is_section:
        return f"section {key!r} {where}: got {got}, expected keys below it"
    if detail["type"] == "value_error":
        return f"{key!r} {where}: got {got}, {detail['ctx']['error']}"
    close = difflib.get_close_matches(str(detail["input"]), [str(choice) for choice in known.choices], n=1)
    hint = f": did you mean {close[0]!r}?" if close else f" ({known.help})"
    return f"{key + position!r} {where}: got {got}, expected {known.allowed}{hint}"


def _joined(problems: Sequence[str], found: int) -> str:
    """Several problems on one line, the first few in full, and how many more were found."""
    shown = problems[:_SHOWN_PROBLEMS]
    return "; ".join(shown) + (f"; and {found - len(shown)} more" if found > len(shown) else "")


def _shown(value: Any) -> str:
    """A value on one short line."""
    if value is None:
        return "nothing"
    if isinstance(value, int) and not -_LARGEST <= value <= _LARGEST:
        return f"a whole number of {value.bit_length()} bits"  # Python won't print the longest
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else _written(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def _written(value: Any) -> str:
    """A value as Python writes it; long text is cut first."""
    try:
        return repr(value[: _SHOWN_CHARACTERS + 1] if isinstance(value, str) else value)
    except ValueError:  # it holds a number of thousands of digits
        return f"a {type(value).__name__}"
