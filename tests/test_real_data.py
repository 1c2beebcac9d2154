"""ESC-10 from its audio files, and an AST checkpoint from a folder, without any network."""

import json

import numpy as np
import pytest

import fedsim
from fedsim.federation.setup import prepare

BASE = [
    "experiment.name=esc10",
    "data={name: esc10, test_fold: 5}",
    "federation={num_clients: 10, global_rounds: 3, local_epochs: 3, partition: dirichlet, alpha: 0.05}",
    "model.heads={clip: [768]}",
    "model.text_encoder={name: table}",
    "model.adapters={clip: {preset: mlp, hidden: [256]}}",
    "resources.client_actors=0",
    "tracking.enabled=false",
]
READY = "model.audio_encoder={name: precomputed, path: esc10/yamnet_patches.npz, segments: 1, dim: 1024}"
YAMNET = "model.audio_encoder={name: yamnet, segments: 1, dim: 1024}"


@pytest.mark.slow
def test_yamnet_from_audio_agrees_with_ready_made_embeddings(shared_data, tmp_path):
    accuracy, rows = {}, {}
    for name, encoder in (("audio", YAMNET), ("ready", READY)):
        config = fedsim.load_config(None, [*BASE, encoder])
        rows[name] = np.array(np.load(prepare(config).store_path / "rows.npy"))
        accuracy[name] = fedsim.run(config, output=tmp_path / name)["metrics"]["eval/top1"]
    assert rows["audio"].shape == (400, 1, 1024)
    assert np.abs(rows["audio"] - rows["ready"]).max() < 0.05
    # One of 80 recordings is 1.25 points; over the five folds the grid of experiments/esc10 stays within 1 point.
    assert abs(accuracy["audio"] - accuracy["ready"]) < 0.0126
    assert accuracy["audio"] > 0.85


@pytest.mark.slow
def test_an_ast_from_its_folder_embeds_real_audio(shared_data, tmp_path):
    from transformers import ASTConfig, ASTFeatureExtractor, ASTModel

    shape = {"num_mel_bins": 32, "max_length": 512}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    ASTModel(ASTConfig(**sizes, **shape)).save_pretrained(tmp_path / "ast")
    ASTFeatureExtractor(**shape).save_pretrained(tmp_path / "ast")
    encoder = f"model.audio_encoder={{name: ast, path: {tmp_path / 'ast'}, segments: 2, dim: 24}}"
    config = fedsim.load_config(None, [*BASE, encoder, "data.classes=[dog, rain]", "federation.global_rounds=1"])
    result = fedsim.run(config, output=tmp_path / "run")
    assert str(tmp_path / "ast") in result["used"]["audio_encoder"]
    saved = json.loads((tmp_path / "run" / "adapter" / "config.json").read_text())
    assert saved["input_shape"] == [2, 24]
