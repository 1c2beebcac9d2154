"""The README tells the truth: files, commands, code and messages."""

import re
from pathlib import Path

import pytest

from fedsim.algorithms.generation import NO_STATISTICS
from fedsim.models.generators.rows import NOT_FITTED

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    return [text for found, text in fenced if found == language]


def test_every_module_is_in_the_file_tree():
    tree = next(block for block in blocks("") if block.startswith("fedsim/"))
    named = set(re.findall(r"^ *(\S+\.py) ", tree, flags=re.MULTILINE))
    assert named == {path.name for path in (ROOT / "fedsim").rglob("*.py")}


def test_files_of_the_table_exist():
    table = README[README.index("## What is implemented") : README.index("## How to add")]
    paths = [p for p in re.findall(r"`([a-z_/*]+(?:\.py|/))`", table) if "/" in p]
    assert len(paths) > 10
    for path in paths:
        assert list((ROOT / "fedsim").glob(path.rstrip("/"))), path


def test_commands_exist():
    from fedsim.cli.app import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    used = re.findall(r"^fedsim (\w+)", "".join(blocks("bash")), flags=re.MULTILINE)
    assert set(used) == known


def test_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    tiny = (
        '["federation.global_rounds=1", "data.clips_per_class=4", "model.heads={clip: [8]}", '
        '"model.adapters={clip: {preset: mlp, hidden: [8]}}", "privacy.min_count=1", '
    )
    code = code.replace('["federation.global_rounds=2", ', tiny)
    assert tiny in code
    scope: dict[str, object] = {}
    exec(code, scope)
    assert scope["result"]["rounds"] == 1
    assert scope["adapter"].heads == {"clip": (8,)}


@pytest.mark.parametrize(
    "message",
    [
        NO_STATISTICS.format(min_count=3),
        NOT_FITTED,
        "generator not initialised: feda2v.use_generator is false; refinement uses the clients' class means alone",
    ],
)
def test_messages_of_the_troubleshooting_are_those_printed(message):
    assert message in README


def test_the_message_about_dimensions_is_the_one_printed():
    import torch

    from fedsim.errors import ModelError
    from fedsim.models.adapters import HeadSpec, make_adapter, stack

    spec = HeadSpec("mlp", (2,), (3,), 0, 1)
    adapter = make_adapter((4, 512), {"clip": spec}, centre={"clip": torch.zeros(2)}, scale={"clip": 1.0})
    with pytest.raises(ModelError) as caught:
        adapter.forward(stack(adapter.init(0)), torch.zeros(1, 2, 4, 768))
    assert str(caught.value) in README


def test_the_no_generator_warning_is_printed(tmp_path, monkeypatch, caplog):
    import fedsim

    monkeypatch.chdir(tmp_path)
    sets = ["federation.global_rounds=1", "data.clips_per_class=4", "model.heads={clip: [8]}", "privacy.min_count=1"]
    sets += ["model.adapters={clip: {preset: mlp, hidden: [8]}}", "feda2v.use_generator=false"]
    sets += ["resources.client_actors=0", "tracking.enabled=false"]
    monkeypatch.setattr("logging.Logger.propagate", True, raising=False)
    fedsim.run(fedsim.load_config(None, sets), output="out")
    assert any("generator not initialised" in record.getMessage() for record in caplog.records)
