"""The rules of the architecture, read from the imports: layers, homes of foreign libraries, names of files."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "fedsim"
LAYERS = {
    "config": 0,
    "errors": 0,
    "machine": 0,
    "seeding": 0,
    "types": 0,
    "models": 1,
    "data": 1,
    "algorithms": 2,
    "federation": 3,
    "cluster": 4,
    "tracking": 4,
    "launch": 5,
    "search": 6,
    "report": 6,
    "images": 6,
    "cli": 7,
    "__init__": 8,
    "__main__": 8,
}
HOMES = {
    "ray": ("cluster", "search"),
    "mlflow": ("tracking", "search", "report"),
    "transformers": ("models/encoders",),
    "diffusers": ("images",),
    "optuna": ("search",),
}
NAMES_THAT_SAY_NOTHING = {"utils.py", "helpers.py", "common.py", "base.py", "misc.py"}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def imported(source: str, parts: tuple[str, ...]) -> Iterator[str]:
    """Absolute dotted names of everything a module imports, anywhere in it; `parts` is its place, e.g. (fedsim, x)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [start, node.module]))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def broken_rules(source: str, path: str) -> list[str]:
    """What is wrong with the imports of the module at `path`, relative to the package, e.g. "data/esc.py"."""
    inside = ("fedsim", *Path(path).parts[:-1])
    own = Path(path).parts[0].removesuffix(".py")
    found = []
    for name in imported(source, inside):
        first, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if first == "fedsim" and other in LAYERS and other != own:
            both_at_the_bottom = LAYERS[own] == LAYERS[other] == 0
            if LAYERS[other] >= LAYERS[own] and not both_at_the_bottom:
                found.append(f"{path} (layer {LAYERS[own]}) imports {name} (layer {LAYERS[other]})")
        elif first in HOMES and not path.startswith(tuple(home + "/" for home in HOMES[first])):
            found.append(f"{path} imports {name}, which lives in {' and '.join(HOMES[first])} only")
    return found


@pytest.mark.parametrize("path", [str(path.relative_to(PACKAGE)) for path in SOURCES])
def test_imports_keep_to_the_layers(path: str) -> None:
    assert Path(path).parts[0].removesuffix(".py") in LAYERS, f"{path} belongs to no layer"
    assert broken_rules((PACKAGE / path).read_text(encoding="utf-8"), path) == []


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("import ray", "federation/server.py"),
        ("def f():\n    import mlflow.pytorch", "cluster/pool.py"),
        ("from transformers import ASTModel", "models/adapters/mlp.py"),
        ("from fedsim.federation import server", "algorithms/sampling.py"),
        ("from fedsim import cluster", "federation/server.py"),
        ("from ..cluster import pool", "federation/server.py"),
        ("from fedsim.data import store", "models/saved.py"),
        ("import fedsim.cli", "config/loading.py"),
        ("from fedsim.search import tune", "launch/session.py"),
        ("from fedsim.report import compare", "search/tune.py"),
    ],
)
def test_a_broken_rule_is_found(source: str, path: str) -> None:
    assert len(broken_rules(source, path)) == 1


def test_allowed_imports_pass() -> None:
    source = "import ray\nfrom fedsim.errors import DataError\nfrom . import pool\nfrom fedsim.federation import server"
    assert broken_rules(source, "cluster/actor.py") == []


def test_file_names_say_something() -> None:
    assert [path for path in SOURCES if path.name in NAMES_THAT_SAY_NOTHING] == []


def test_import_fedsim_is_light() -> None:
    heavy = ["ray", "mlflow", "transformers", "diffusers", "torch", "matplotlib", "scipy", "sklearn", "optuna"]
    code = f"import sys, fedsim; print([name for name in {heavy} if name in sys.modules])"
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"
