"""The AST encoder: pooling against a slow version, padding, training, and checkpoints without a network."""

from __future__ import annotations

import json
import logging
import os
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedsim.errors import ModelError
from fedsim.models.encoders import make_audio_encoder
from fedsim.models.encoders.ast import AstEncoder, load_ast, make_tiny_ast
from fedsim.models.encoders.pooling import projection
from fedsim.models.encoders.threads import available_cores


@pytest.fixture(scope="module")
def tiny():
    return make_tiny_ast(segments=4, dim=16)


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, int(seconds * 16_000)).astype(np.float32)


def save_checkpoint(folder, *, num_mel_bins=32, max_length=64, head=False, **changes):
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification, ASTModel

    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    config = ASTConfig(**sizes, num_mel_bins=num_mel_bins, max_length=max_length, **changes)
    torch.manual_seed(0)
    model = (ASTForAudioClassification if head else ASTModel)(config).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extractor = ASTFeatureExtractor(num_mel_bins=num_mel_bins, max_length=max_length)
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return (model.audio_spectrogram_transformer if head else model), extractor


def test_lengths_are_whole_time_patches_of_real_audio(tiny):
    features, lengths = tiny.inputs([noise(s) for s in (0.0, 0.01, 0.3, 1.0, 5.0, 9.0)])
    assert features.shape == (6, *tiny.input_shape) == (6, 512, 32)
    assert features.dtype == np.float32
    # 5 s: 498 frames, (498 - 16) // 10 + 1 = 49; longer than 5.12 s: all 50
    assert lengths.tolist() == [1, 1, 2, 9, 49, 50]
    assert lengths.dtype == np.int64


def test_pooling_is_the_mean_over_frequency_and_real_time_patches(tmp_path):
    model, extractor = save_checkpoint(tmp_path)
    encoder = load_ast(str(tmp_path), revision=None, segments=3, dim=16)
    waveforms = [noise(0.3), noise(0.5, seed=1)]
    rows = encoder.encode(waveforms)
    for row, waveform in zip(rows, waveforms, strict=True):
        features = extractor(waveform, sampling_rate=16_000, return_tensors="pt")["input_values"]
        with torch.no_grad():
            hidden = model(features).last_hidden_state[0]
        valid = ((1 + (len(waveform) - 400) // 160) - 16) // 10 + 1
        assert valid < 5
        grid = hidden[2:].view(2, 5, 24)  # (32 - 16) // 10 + 1 and (64 - 16) // 10 + 1
        pooled = F.adaptive_avg_pool1d(grid.mean(0)[:valid].T[None], 3)[0].T
        np.testing.assert_allclose(row, (pooled @ projection(24, 16)).numpy(), atol=1e-5)


def test_the_patch_grid_is_frequency_first(tmp_path):
    """A sound in the first half only must move the early time patches of the model's own output."""
    model, _ = save_checkpoint(tmp_path, num_mel_bins=64, max_length=128)
    patches = model.embeddings.patch_embeddings
    early = torch.zeros(1, 128, 64)
    early[:, :16] = 1.0
    moved = (patches(early) - patches(torch.zeros(1, 128, 64))).abs().sum(-1)[0]
    assert moved.view(5, 12)[:, 2:].sum() == 0
    assert (moved.view(5, 12)[:, 0] > 0).all()


def test_encode_is_inputs_and_forward(tiny):
    waveforms = [noise(2.0), noise(4.0, seed=1)]
    features, lengths = tiny.inputs(waveforms)
    rows = tiny.forward(None, torch.from_numpy(features), torch.from_numpy(lengths))
    assert rows.shape == (2, 4, 16)
    assert not rows.requires_grad
    np.testing.assert_array_equal(tiny.encode(waveforms), rows.numpy())
    assert tiny.encode([]).shape == (0, 4, 16)


def test_all_cores_embed_to_the_bit_what_one_does_and_give_the_threads_back(tiny, monkeypatch):
    waves = [np.random.default_rng(n).standard_normal(16_000 * n).astype(np.float32) for n in (1, 2, 4, 5)]
    rows, seen, forward = {}, [], tiny.forward
    monkeypatch.setattr(tiny, "forward", lambda *args: seen.append(torch.get_num_threads()) or forward(*args))
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
        rows[threads] = tiny.encode(waves)
        assert torch.get_num_threads() == before
    assert seen == [1, 2, 3]
    assert np.array_equal(rows[1], rows[2])
    assert np.array_equal(rows[1], rows[3])
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


def test_tiny_ast_is_fixed_and_leaves_the_random_state_alone(tiny):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    again = make_tiny_ast(segments=4, dim=16)
    assert torch.equal(before, torch.get_rng_state())
    assert again.fingerprint == tiny.fingerprint
    np.testing.assert_array_equal(tiny.encode([noise(1.0)]), again.encode([noise(1.0)]))


def test_tiny_ast_tells_sounds_apart(tiny):
    tone = np.sin(np.arange(32_000) * 0.3).astype(np.float32)
    a, b, c = tiny.encode([noise(2.0), noise(2.0, seed=1), tone]).reshape(3, -1)
    assert np.linalg.norm(a - c) > 3 * np.linalg.norm(a - b)


def test_gradients_reach_the_trained_tensors_only(tiny):
    features, lengths = map(torch.from_numpy, tiny.inputs([noise(1.0)]))
    params = {name: tensor.requires_grad_() for name, tensor in tiny.trainable_state("last:1").items()}
    loss = tiny.forward(params, features, lengths).square().sum()
    gradients = torch.autograd.grad(loss, list(params.values()))
    # Keys' biases shift all attention scores of a query alike, so softmax doesn't see them.
    seen = {name: gradient.abs().max() for name, gradient in zip(params, gradients, strict=True)}
    assert all(value > 1e-6 for name, value in seen.items() if not name.endswith("k_proj.bias"))
    frozen = tiny.forward(None, features, lengths)
    torch.testing.assert_close(tiny.forward(params, features, lengths), frozen)
    changed = {name: tensor.detach() + 0.1 for name, tensor in params.items()}
    assert not torch.allclose(tiny.forward(changed, features, lengths), frozen)
    assert torch.equal(tiny.forward(None, features, lengths), frozen)


def test_forward_may_be_vmapped_over_clients(tiny):
    features, lengths = map(torch.from_numpy, tiny.inputs([noise(1.0), noise(3.0, seed=1)]))
    state = tiny.trainable_state("all")
    stacked = {name: torch.stack([tensor, tensor + 0.05]) for name, tensor in state.items()}

    def loss(params, features, lengths):
        return tiny.forward(params, features, lengths).square().sum()

    with sdpa_kernel(SDPBackend.MATH):
        both = torch.func.vmap(tiny.forward)(stacked, features[:, None], lengths[:, None])
        slopes = torch.func.vmap(torch.func.grad(loss))(stacked, features[:, None], lengths[:, None])
    for client in range(2):
        own = {name: tensor[client] for name, tensor in stacked.items()}
        alone = tiny.forward(own, features[client : client + 1], lengths[client : client + 1])
        torch.testing.assert_close(both[client], alone, atol=1e-5, rtol=1e-4)
        slope = torch.func.grad(loss)(own, features[client : client + 1], lengths[client : client + 1])
        torch.testing.assert_close(slopes["layernorm.weight"][client], slope["layernorm.weight"], atol=1e-4, rtol=1e-3)


def test_trainable_states(tiny):
    assert tiny.trainable_state("none") == {}
    everything = tiny.trainable_state("all")
    last = tiny.trainable_state("last:1")
    assert {name.rsplit(".", 1)[0].split(".")[0] for name in last} == {"layers", "layernorm"}
    assert {name.split(".")[1] for name in last if name.startswith("layers")} == {"1"}
    assert len(last) == 16 + 2
    assert set(everything) - set(tiny.trainable_state("last:2")) == {
        "embeddings.cls_token", "embeddings.distillation_token", "embeddings.position_embeddings",
        "embeddings.patch_embeddings.projection.weight", "embeddings.patch_embeddings.projection.bias",
    }  # fmt: skip
    before = tiny.encode([noise(1.0)])
    for tensor in everything.values():
        tensor.zero_()
    np.testing.assert_array_equal(before, tiny.encode([noise(1.0)]))
    with pytest.raises(ModelError, match=r"'last:3', but the encoder has 2 layers; use last:1 \.\.\. last:2"):
        tiny.trainable_state("last:3")
    with pytest.raises(ModelError, match="'first:1'; allowed: none, last:N"):
        tiny.trainable_state("first:1")
    with pytest.raises(ModelError, match="no tensor 'extra'"):
        tiny.forward({"extra": torch.ones(1)}, torch.zeros(1, 512, 32), torch.ones(1, dtype=torch.int64))


def test_a_classifier_checkpoint_gives_its_encoder(tmp_path, caplog):
    model, _ = save_checkpoint(tmp_path, head=True)
    encoder = make_audio_encoder("ast", path=str(tmp_path), revision=None, segments=2, dim=24)
    assert isinstance(encoder, AstEncoder)
    for name, tensor in model.named_parameters():
        assert torch.equal(encoder.trainable_state("all")[name], tensor)
    assert encoder.description.startswith(f"AST {tmp_path} (weights sha256 ")


def test_the_real_number_of_mel_bins_loads_without_a_warning(tmp_path):
    save_checkpoint(tmp_path, num_mel_bins=128)
    assert load_ast(str(tmp_path), revision=None, segments=2, dim=24).encode([noise(0.5)]).shape == (1, 2, 24)


def test_the_fingerprint_holds_weights_and_pre_processing_but_not_the_folder(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    save_checkpoint(first)
    save_checkpoint(second)
    plain = load_ast(str(first), revision=None, segments=2, dim=24).fingerprint
    assert plain == load_ast(str(second), revision=None, segments=2, dim=24).fingerprint
    settings = json.loads((second / "preprocessor_config.json").read_text(encoding="utf-8"))
    (second / "preprocessor_config.json").write_text(json.dumps(settings | {"mean": -3.0}), encoding="utf-8")
    assert plain != load_ast(str(second), revision=None, segments=2, dim=24).fingerprint
    save_checkpoint(second, layer_norm_eps=1e-5)
    assert plain != load_ast(str(second), revision=None, segments=2, dim=24).fingerprint


def test_dropout_is_announced_and_off(tmp_path, caplog):
    save_checkpoint(tmp_path, hidden_dropout_prob=0.3)
    with caplog.at_level(logging.WARNING):
        encoder = load_ast(str(tmp_path), revision=None, segments=2, dim=24)
    assert "has dropout 0.3, which is off" in caplog.text
    np.testing.assert_array_equal(encoder.encode([noise(0.5)]), encoder.encode([noise(0.5)]))


def refused(path, message: str) -> str:
    with pytest.raises(ModelError, match=message) as caught:
        load_ast(str(path), revision=None, segments=2, dim=24)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unreachable_checkpoint_is_one_line_that_says_what_to_do():
    text = refused("nobody/no-such-ast", "nobody/no-such-ast isn't in the Hugging Face cache")
    for hint in ("HF_HUB_OFFLINE", "`hf download nobody/no-such-ast`", "tiny_ast, yamnet or logmel"):
        assert hint in text
    with pytest.raises(ModelError, match=r"MIT/ast-finetuned-audioset-10-10-0\.4593 \(revision no-such\) isn't in"):
        load_ast(None, revision="no-such", segments=2, dim=24)


def test_unfit_folders_are_told(tmp_path):
    refused(tmp_path / "none", "no folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "can't load the configuration")
    refused("not an id", "neither a folder nor a hub id")
    folder = tmp_path / "ast"
    save_checkpoint(folder)
    (folder / "preprocessor_config.json").unlink()
    refused(folder, "can't load the feature extractor")
    save_checkpoint(folder)
    settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"max_length": 99}), encoding="utf-8")
    refused(folder, "the model has max_length 64, its feature extractor 99")


def test_incomplete_pickled_and_foreign_weights_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import T5Config, T5EncoderModel

    save_checkpoint(tmp_path)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    lost = next(name for name in tensors if "layer.1" in name or "layers.1" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, weights, metadata={"format": "pt"})
    refused(tmp_path, "lacks 1 tensors of ASTModel")
    weights.write_bytes(weights.read_bytes()[:500])
    refused(tmp_path, "can't load the weights")
    weights.unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    refused(tmp_path, r"can't load the weights \(safetensors only\)")
    T5EncoderModel(T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(
        tmp_path / "t5"
    )
    refused(tmp_path / "t5", "is a 't5' model; expected one of")
