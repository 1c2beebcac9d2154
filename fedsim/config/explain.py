"""What a configuration key means, printed from the schema: `fedsim config --explain KEY`."""

from __future__ import annotations

import json

from fedsim.config.keys import Key, find_key, known_keys, suggestion
from fedsim.errors import ConfigError


def explain(key: str) -> str:
    """Explain one key in full, or a section with one line per key.

    Args:
        key: dotted name, e.g. "training.learning_rate", "nodes.0.dataset", "training"; "" for all sections.

    Returns:
        Lines of text: name, meaning, type, default, unit, allowed values and section of a key; the keys of a section.

    Raises:
        ConfigError: there is no such key; the message names the nearest one.
    """
    if not key:
        return "\n".join(_line(entry) for entry in known_keys().values() if "." not in entry.name)
    entry = find_key(key)
    if entry is None:
        raise ConfigError(f"unknown key {key!r}: {suggestion(key)}")
    if entry.is_section:
        below = [other for name, other in known_keys().items() if name.startswith(entry.name + ".")]
        return "\n".join([f"{entry.name}: {entry.help}", *("  " + _line(other) for other in below)])
    rows = {
        "type": entry.kind,
        "default": _shown(entry.default),
        "unit": entry.unit,
        "allowed": ", ".join(map(str, entry.choices)) or entry.limits,
        "section": entry.name.rpartition(".")[0],
    }
    return "\n".join([f"{entry.name}: {entry.help}", *(f"  {name}: {text}" for name, text in rows.items() if text)])


def _line(entry: Key) -> str:
    """One key on one line."""
    if entry.is_section:
        return f"{entry.name}: {entry.help}"
    unit = f" {entry.unit}" if entry.unit and entry.default is not None else ""
    return f"{entry.name} = {_shown(entry.default)}{unit}: {entry.help}"


def _shown(default: object) -> str:
    """A default value as it would be written in a file."""
    return "nothing" if default is None else json.dumps(default)
