"""YAMNet against reference patches of ESC-10, log-mel statistics, ready-made embeddings, and the builder."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import soundfile
import torch

from fedsim.errors import ModelError
from fedsim.models.encoders import AUDIO_ENCODERS, make_audio_encoder
from fedsim.models.encoders.logmel import LogmelEncoder
from fedsim.models.encoders.mel import log_mel, mel_filters
from fedsim.models.encoders.precomputed import load_precomputed, precomputed_fingerprint
from fedsim.models.encoders.yamnet import YamnetEncoder

CLIPS = [0, 1, 29, 39, 92, 94, 120, 250, 333, 399]
"""Rows of ESC-10: short events, dither instead of silence (29, 39, 92, 94), and clips that fill their 5 s."""


@pytest.fixture(scope="module")
def esc10(shared_data):
    folder = shared_data / "esc10"
    with (folder / "metadata.csv").open(encoding="utf-8") as file:
        names = [row["filename"] for row in csv.DictReader(file)]
    return {row: soundfile.read(folder / "audio" / names[row], dtype="float32")[0] for row in CLIPS}


@pytest.fixture(scope="module")
def yamnet(shared_data):
    return YamnetEncoder(str(shared_data / "yamnet" / "yamnet.npz"), segments=4, dim=512)


@pytest.fixture
def noise():
    return np.random.default_rng(0).uniform(-0.5, 0.5, 40_000).astype(np.float32)


def test_yamnet_agrees_with_the_reference(shared_data, esc10, yamnet):
    with np.load(shared_data / "esc10" / "yamnet_patches.npz") as file:
        patches, masks = file["patches"].astype(np.float32), file["mask"]
    for row, waveform in esc10.items():
        embeddings, mask = yamnet.patches(waveform)
        np.testing.assert_array_equal(mask.numpy(), masks[row])
        assert np.abs(embeddings.numpy() - patches[row]).max() < 0.05
        assert patches[row].max() > 1.0


def test_yamnet_and_ready_made_patches_give_the_same_embedding(shared_data, esc10, yamnet):
    path = shared_data / "esc10" / "yamnet_patches.npz"
    ready = load_precomputed(path, num_rows=400, segments=4, dim=512)
    assert ready.shape == (400, 4, 512)
    rows = yamnet.encode(list(esc10.values()))
    assert rows.dtype == np.float32
    assert np.abs(rows - ready[CLIPS]).max() < 0.05
    assert np.abs(ready[CLIPS]).max() > 1.0


def test_yamnet_takes_any_length(yamnet, noise):
    empty, short, long = np.zeros(0, np.float32), noise[:300], np.tile(noise, 8)
    rows = yamnet.encode([empty, short, long])
    assert rows.shape == (3, 4, 512)
    assert np.isfinite(rows).all()
    assert len(yamnet.patches(short)[0]) == 1
    assert len(yamnet.patches(noise[:15_600])[0]) == 1
    assert len(yamnet.patches(np.tile(noise, 2))[0]) == 9
    assert yamnet.encode([]).shape == (0, 4, 512)


def test_yamnet_leaves_trailing_silence_out(yamnet, noise):
    sound, silence = noise[:15_600], np.zeros(30_720, np.float32)
    mask = yamnet.patches(np.concatenate([sound, silence]))[1]
    assert mask.tolist() == [True, True, True, False, False]
    np.testing.assert_array_equal(yamnet.patches(silence)[1], False)


def test_yamnet_rows_do_not_depend_on_the_batch(yamnet, noise):
    alone = yamnet.encode([noise])
    np.testing.assert_array_equal(alone[0], yamnet.encode([noise[:20_000], noise])[1])


def damaged(arrays, **changes):
    return {name: array for name, array in (arrays | changes).items() if array is not None}


def test_a_wrong_weights_file_is_told(shared_data, tmp_path, monkeypatch):
    good = shared_data / "yamnet" / "yamnet.npz"
    with np.load(good) as file:
        arrays = {name: file[name] for name in file.files}
    cut = tmp_path / "cut.npz"
    cut.write_bytes(good.read_bytes()[:1_000_000])
    path = tmp_path / "w.npz"
    cases = {
        "it has no array `pw13_w`": {"pw13_w": None},
        r"pw3_w has shape \[128, 64, 1, 1\], expected \[128, 128, 1, 1\]": {"pw3_w": arrays["pw3_w"][:, :64]},
        "dw2_scale has 3 values, expected 64": {"dw2_scale": np.ones(3, np.float32)},
        "`strides` must hold 14": {"strides": None},
        "`conv0_shift` must be finite": {"conv0_shift": np.full(32, np.nan, np.float32)},
        "embedding has 512 values": {f"pw13_{part}": arrays[f"pw13_{part}"][:512] for part in ("w", "scale", "shift")},
    }
    for message, changes in cases.items():
        np.savez(path, **damaged(arrays, **changes))
        with pytest.raises(ModelError, match=message) as caught:
            YamnetEncoder(str(path), segments=4, dim=512)
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=r"can't read .*cut\.npz .* must be a complete \.npz"):
        YamnetEncoder(str(cut), segments=4, dim=512)
    with pytest.raises(ModelError, match=r"no file .*nowhere\.npz; set model\.audio_encoder\.path"):
        YamnetEncoder(str(tmp_path / "nowhere.npz"), segments=4, dim=512)
    monkeypatch.delenv("FEDSIM_DATA")
    with pytest.raises(ModelError, match=r"or FEDSIM_DATA to a folder that holds yamnet/yamnet\.npz"):
        YamnetEncoder(None, segments=4, dim=512)


def test_log_mel_of_a_tone_peaks_in_its_band():
    filters = mel_filters()
    seconds = np.arange(16_000, dtype=np.float32) / 16_000
    frames = log_mel(np.sin(2 * np.pi * 1000 * seconds).astype(np.float32), filters=filters)
    assert frames.shape == (98, 64)
    centres = 700 * (np.exp(np.linspace(1127 * np.log1p(125 / 700), 1127 * np.log1p(7500 / 700), 66) / 1127) - 1)[1:-1]
    assert (frames.argmax(1) == int(np.abs(centres - 1000).argmin())).all()
    torch.testing.assert_close(log_mel(np.zeros(0, np.float32), filters=filters), torch.full((1, 64), np.log(0.001)))


def test_logmel_statistics_are_what_they_say(noise):
    encoder = LogmelEncoder(segments=1, dim=256)
    row = encoder.encode([noise])[0, 0]
    frames = (log_mel(noise, filters=mel_filters()).numpy() - np.log(0.001)) / 4
    expected = [frames.mean(0), frames.std(0), np.abs(np.diff(frames, axis=0)).mean(0), frames.max(0)]
    centres, deviations = (1.4, 0.3, 0.1, 2.2), (0.5, 0.2, 0.03, 0.33)
    scaled = [(kind - c) / d for kind, c, d in zip(expected, centres, deviations, strict=True)]
    np.testing.assert_allclose(row, np.concatenate(scaled), atol=2e-4)


def test_logmel_trims_trailing_silence_only(noise):
    encoder = LogmelEncoder(segments=4, dim=512)
    silence = np.zeros(16_000, np.float32)
    plain, leading, trailing = encoder.encode([noise, np.r_[silence, noise], np.r_[noise, silence]])
    # The last frame runs into the silence; leading silence fills a segment.
    assert np.abs(plain - trailing).mean() < 0.05 * np.abs(plain - leading).mean()
    assert (encoder.encode([silence]) == encoder.encode([silence[:0]])).all()


def test_logmel_cuts_the_recording_into_segments(noise):
    quiet_then_loud = np.r_[noise * 0.01, noise]
    rows = LogmelEncoder(segments=2, dim=256).encode([quiet_then_loud])[0]
    assert rows[1, :64].mean() > rows[0, :64].mean() + 0.5


def test_fingerprints_tell_everything_apart(shared_data, tmp_path):
    path = shared_data / "yamnet" / "yamnet.npz"
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    other = tmp_path / "other.npz"
    np.savez(other, **(arrays | {"conv0_shift": arrays["conv0_shift"] + 1}))
    copy = tmp_path / "copy.npz"
    copy.write_bytes(path.read_bytes())

    def fingerprint(name: str, segments: int = 4, dim: int = 512, file: object = path) -> str:
        path = str(file) if name == "yamnet" else None
        return make_audio_encoder(name, path=path, revision=None, segments=segments, dim=dim).fingerprint

    different = [
        fingerprint("yamnet"), fingerprint("yamnet", segments=2), fingerprint("yamnet", dim=256),
        fingerprint("yamnet", file=other), fingerprint("logmel"), fingerprint("logmel", dim=256),
        fingerprint("tiny_ast"), fingerprint("tiny_ast", segments=2),
        precomputed_fingerprint(path, segments=4, dim=512),
    ]  # fmt: skip
    assert len(set(different)) == len(different)
    assert fingerprint("yamnet", file=copy) == different[0]


def test_the_builder_knows_its_names():
    assert list(AUDIO_ENCODERS) == ["ast", "tiny_ast", "yamnet", "logmel"]
    encoder = make_audio_encoder("logmel", path=None, revision=None, segments=3, dim=16)
    assert (encoder.shape, encoder.sample_rate) == ((3, 16), 16_000)
    assert encoder.description == "log-mel statistics (no weights), 3 segments, 256 -> 16"
    with pytest.raises(ModelError, match=r"no audio encoder 'yamnett'; known: ast, .*; did you mean yamnet\?"):
        make_audio_encoder("yamnett", path=None, revision=None, segments=4, dim=512)
    with pytest.raises(ModelError, match="precomputed isn't an encoder"):
        make_audio_encoder("precomputed", path=None, revision=None, segments=4, dim=512)


def test_ready_made_vectors_are_repeated_and_sequences_pooled(tmp_path):
    sequences = np.random.default_rng(0).standard_normal((5, 6, 8)).astype(np.float32)
    np.save(tmp_path / "vectors.npy", sequences[:, 0])
    rows = load_precomputed(tmp_path / "vectors.npy", num_rows=5, segments=3, dim=8)
    np.testing.assert_array_equal(rows, np.repeat(sequences[:, :1], 3, axis=1))
    np.savez(tmp_path / "sequences.npz", embeddings=sequences, mask=np.arange(6) < np.array([[4]] * 5))
    rows = load_precomputed(tmp_path / "sequences.npz", num_rows=5, segments=2, dim=8)
    np.testing.assert_allclose(rows[:, 1], sequences[:, 2:4].mean(1), atol=1e-6)


def test_unfit_ready_made_embeddings_are_told(tmp_path):
    path = tmp_path / "e.npz"
    rows = np.ones((4, 8), np.float32)
    cases: dict[str, dict[str, np.ndarray]] = {
        "holds 4 rows, the data set has 5 recordings": {"embeddings": rows},
        "holds no `embeddings` or `patches`, only vectors": {"vectors": rows},
        r"`embeddings` is int64 \[5, 8\]": {"embeddings": np.ones((5, 8), np.int64)},
        r"`mask` is bool \[5, 3\], it must be bool \[5, 2\]": {
            "embeddings": np.ones((5, 2, 8), np.float32), "mask": np.ones((5, 3), bool),
        },
        "row 3 holds values that aren't finite": {"embeddings": np.where(np.arange(5)[:, None] == 3, np.nan, 1.0)},
        "can't read": {"embeddings": np.array([{}] * 5, dtype=object)},
    }  # fmt: skip
    for message, arrays in cases.items():
        np.savez(path, **arrays)
        with pytest.raises(ModelError, match=message) as caught:
            load_precomputed(path, num_rows=5, segments=4, dim=8)
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="no file"):
        load_precomputed(tmp_path / "none.npz", num_rows=5, segments=4, dim=8)
