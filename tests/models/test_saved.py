"""Adapters on disk: what is saved comes back to the bit, and whatever is wrong with a folder is said in one line."""

from __future__ import annotations

import hashlib
import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedsim.errors import ModelError
from fedsim.models.adapters import HeadSpec, make_adapter, stack
from fedsim.models.saved import digest, load_adapter, save_adapter

S, D = 2, 6
SPECS = {
    # "t5" before "clip": the first head is the primary one, so its place must survive the disk.
    "t5": HeadSpec("slim", (3, 8), (5,), 4, 2),
    "clip": HeadSpec("mlp", (4,), (5, 7), 8, 4),
}


@pytest.fixture
def adapter():
    centre = {head: torch.linspace(-1, 1, int(np.prod(spec.shape))).view(spec.shape) for head, spec in SPECS.items()}
    return make_adapter((S, D), SPECS, centre=centre, scale={"t5": 0.1 + 0.2, "clip": 3.0})


@pytest.fixture
def folder(adapter, tmp_path):
    info = {"name": "mine", "class_names": ["dog", "rain"], "audio_encoder": "logmel", "top1": 0.5}
    save_adapter(tmp_path / "adapter", adapter, adapter.init(1), info=info)
    return tmp_path / "adapter"


def test_a_saved_adapter_answers_like_the_one_it_was(adapter, folder):
    saved, x = load_adapter(folder), torch.randn(5, S, D)
    wanted = adapter.forward(stack(adapter.init(1)), x.unsqueeze(0))
    answered = saved(x)
    assert list(answered) == ["t5", "clip"] == list(saved.heads)
    for head in SPECS:
        assert torch.equal(answered[head], wanted[head][0])
        assert not answered[head].requires_grad
    assert saved.input_shape == (S, D)
    assert saved.heads == {"t5": (3, 8), "clip": (4,)}
    assert saved.adapter.specs == SPECS
    assert saved.info["class_names"] == ["dog", "rain"]
    assert saved(x[:0])["t5"].shape == (0, 3, 8)


def test_a_folder_holds_four_files_and_no_pickle(folder):
    names = {file.name for file in folder.iterdir()}
    assert names == {"adapter.safetensors", "constants.safetensors", "config.json", "README.md"}
    card = (folder / "README.md").read_text()
    assert "dog, rain" in card
    assert json.loads((folder / "config.json").read_text())["digest"] in card


def test_saving_again_replaces(adapter, folder):
    save_adapter(folder, adapter, adapter.init(2), info={})
    assert digest(load_adapter(folder).state) == digest(adapter.init(2)) != digest(adapter.init(1))


def test_encoder_tensors_travel_along_and_do_not_disturb(adapter, folder):
    before = load_adapter(folder)(torch.ones(1, S, D))
    state = adapter.init(1) | {"encoder.layernorm.weight": torch.ones(3)}
    save_adapter(folder, adapter, state, info={})
    saved = load_adapter(folder)
    assert saved.state["encoder.layernorm.weight"].tolist() == [1, 1, 1]
    assert torch.equal(saved(torch.ones(1, S, D))["clip"], before["clip"])


def test_digest_is_sha256_over_bytes_in_name_order():
    state = {"b": torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T, "a": torch.tensor([0.5])}
    raw = np.array([0.5, 1, 3, 2, 4], dtype="<f4").tobytes()
    assert digest(state) == hashlib.sha256(raw).hexdigest()
    assert digest(dict(reversed(state.items()))) == digest(state)


def test_another_width_is_refused(folder):
    with pytest.raises(ModelError, match=r"incompatible dimensions: the adapter takes audio embeddings \[K, B, 2, 6\]"):
        load_adapter(folder)(torch.zeros(1, S, D + 1))


@pytest.mark.parametrize("name", ["config.json", "adapter.safetensors", "constants.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_missing_and_damaged_files_are_named(folder, name, damage):
    file = folder / name
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(content[: len(content) // 2 if damage == "truncated" else 0])
    with pytest.raises(ModelError, match="is not a readable adapter folder") as caught:
        load_adapter(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: [],
        lambda c: {},
        lambda c: c | {"heads": []},
        lambda c: c | {"heads": {"clip": []}},
        lambda c: c | {"input_shape": [2]},
        lambda c: c | {"input_shape": None},
        lambda c: c | {"scale": {}},
        lambda c: {key: value for key, value in c.items() if key != "digest"},
    ],
)
def test_a_config_of_another_form_is_refused(folder, change):
    file = folder / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ModelError, match="is not a readable adapter folder"):
        load_adapter(folder)


def test_another_format_is_refused(folder):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 2}))
    with pytest.raises(ModelError, match="adapter format 2, this fedsim reads format 1"):
        load_adapter(folder)


def test_tensors_of_another_adapter_are_refused(folder):
    tensors = load_file(folder / "adapter.safetensors")
    save_file({name: t + 1 for name, t in tensors.items()}, folder / "adapter.safetensors")
    with pytest.raises(ModelError, match=r"doesn't match the digest in config\.json"):
        load_adapter(folder)


def test_a_pickle_is_never_opened(folder, tmp_path):
    class Trap:
        def __reduce__(self):
            return (type(tmp_path).touch, (tmp_path / "executed",))

    for name in ("adapter.safetensors", "constants.safetensors"):
        (folder / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ModelError):
        load_adapter(folder)
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(Trap()))
    assert (tmp_path / "executed").exists(), "the trap itself must work"
