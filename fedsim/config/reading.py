"""Text of a configuration file or override → plain values, strictly.

Stricter than the stock parsers: a key given twice is an error, keys are always text (`nodes: {0: ...}`), `1e-3` is a
number (YAML 1.1 reads it as text), and dates or `1:30` stay text (YAML 1.1 makes other types of them).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from fedsim.errors import ConfigError

MAX_BYTES = 4 << 20
MAX_DEPTH = 32
MAX_VALUES = 100_000
_SHOWN = 200
_TAG = "tag:yaml.org,2002:"

# Plain text that is read as a number here but as text by YAML 1.1, so a writer must quote it.
EXPONENT_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+\Z")


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file.

    A file whose name ends in .json is JSON; any other is YAML, or JSON when it parses as JSON.

    Raises:
        ConfigError: the file is missing, a directory, too large, not UTF-8, empty, unparsable, nested absurdly, holds a
            key twice, or isn't a mapping at the top.
    """
    try:
        if path.is_fifo() and not str(path).startswith(("/dev/", "/proc/")):  # `<(command)` and stdin may be read
            raise ConfigError(f"{path} is a pipe, which may never end; give a YAML or JSON configuration file")
        with path.open("rb") as handle:
            raw = handle.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file; give a YAML or JSON configuration") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a directory; give a YAML or JSON configuration file") from None
    except (OSError, ValueError) as error:  # a path that holds \0 is a ValueError
        raise ConfigError(f"{str(path)!a} can't be read: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path} is over {MAX_BYTES >> 20} MiB; give a YAML or JSON configuration file")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} isn't UTF-8 text (byte {error.start}); save it as UTF-8") from None
    value = _parse_file(text, source=str(path), is_json=path.suffix.lower() == ".json")
    if value is None:
        raise ConfigError(f"{path} is empty; `fedsim config` prints the default configuration")
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path} holds a {_word(value)} at the top; expected sections such as federation: and training:"
        )
    return value


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML text: mappings with text keys, lists, text, numbers, booleans, None.

    Raises:
        ConfigError: `source` isn't valid YAML, repeats a key, or is nested deeper than 32 levels or larger (aliases
            followed) than 100 000 values.
    """
    try:
        loader = _shallow_loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _tidy(node, source, depth=0, seen=[0])
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "not valid YAML"
        raise ConfigError(f"{_at(source, mark)} can't be parsed: {' '.join(str(problem).split())[:_SHOWN]}") from None
    except (ValueError, OverflowError, LookupError, TypeError, AttributeError) as error:
        # E.g. a whole number of 5000 digits, or `!!bool x`, which PyYAML looks up in a table.
        raise ConfigError(f"{source} can't be parsed: {' '.join(str(error).split())[:_SHOWN]}") from None
    except RecursionError:
        raise ConfigError(f"{source} is nested too deeply; a configuration has at most {MAX_DEPTH} levels") from None


def _shallow_loader(text: str) -> Any:
    """A loader that gives up at the first node too deep: reading a thousand brackets to their end takes seconds."""

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.depth > MAX_DEPTH:
                raise RecursionError
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    return Loader(text)


def _parse_file(text: str, source: str, is_json: bool) -> Any:
    """JSON by name or content, else YAML. YAML alone won't do for JSON: it takes neither tabs nor all escapes."""
    if not is_json and not text.lstrip().startswith("{"):
        return parse_yaml(text, source)
    if not text.strip():
        return None
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, source))
        if _depth(value) > MAX_DEPTH:
            raise RecursionError
        require_small(value, source)
    except RecursionError:
        raise ConfigError(f"{source} is nested too deeply; a configuration has at most {MAX_DEPTH} levels") from None
    except json.JSONDecodeError as error:
        if not is_json:
            return parse_yaml(text, source)
        raise ConfigError(f"{source}, line {error.lineno} can't be parsed as JSON: {error.msg}") from None
    except ValueError as error:
        raise ConfigError(f"{source} can't be parsed: {' '.join(str(error).split())[:_SHOWN]}") from None
    return value


def _tidy(node: Any, source: str, depth: int, seen: list[int]) -> None:
    """Check a YAML node and everything below, and set the tags of plain scalars that YAML 1.1 reads in odd ways."""
    seen[0] += 1
    if depth > MAX_DEPTH or seen[0] > MAX_VALUES:
        limit = f"at most {MAX_DEPTH} levels and {MAX_VALUES} values"
        raise ConfigError(f"{source} is nested too deeply or too large; a configuration has {limit}")
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _tidy(item, source, depth + 1, seen)
    elif isinstance(node, yaml.MappingNode):
        names = set()
        for name, value in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise ConfigError(f"{_at(source, name.start_mark)}: a key must be text")
            if name.tag != _TAG + "merge":
                name.tag = _TAG + "str"
            if name.value in names:
                raise ConfigError(f"{_at(source, name.start_mark)}: key {name.value[:_SHOWN]!r} stands twice; keep one")
            names.add(name.value)
            _tidy(value, source, depth + 1, seen)
    elif node.style is None:
        if node.tag == _TAG + "str" and EXPONENT_FLOAT.match(node.value):
            node.tag = _TAG + "float"
        elif node.tag == _TAG + "timestamp" or (node.tag in {_TAG + "int", _TAG + "float"} and ":" in node.value):
            node.tag = _TAG + "str"


def _unique(pairs: list[tuple[str, Any]], source: str) -> dict[str, Any]:
    """A JSON object whose keys are all different."""
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ConfigError(f"{source}: key {twice[:_SHOWN]!r} stands twice; keep one")
    return result


def _depth(value: Any) -> int:
    """Levels of nesting; a scalar has none."""
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if below is None else 1 + max(map(_depth, below), default=0)


def require_small(value: Any, source: str) -> None:
    """Refuse a configuration of so many values that what a run writes of it couldn't be read again.

    Raises:
        ConfigError: it holds more than 100 000 values.
    """
    count, left = 0, [value]
    while left:
        place = left.pop()
        below = place.values() if isinstance(place, dict) else place if isinstance(place, list) else ()
        left += below
        count += len(below)
    if count > MAX_VALUES:
        raise ConfigError(f"{source} has {count} values, defaults included; a configuration has at most {MAX_VALUES}")


def _at(source: str, mark: Any) -> str:
    """The source with a line number where there is one."""
    return source if mark is None else f"{source}, line {mark.line + 1}"


def _word(value: object) -> str:
    """A value's type in a user's words."""
    return {"list": "list", "str": "text", "bool": "yes/no value"}.get(type(value).__name__, "number")
