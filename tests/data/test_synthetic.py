"""Synthesised sounds: deterministic, unequal, loud enough, and neither trivial nor hopeless to tell apart."""

from __future__ import annotations

import numpy as np
import pytest

from fedsim.data.esc import ESC10_CLASSES
from fedsim.data.sounds import FAMILIES
from fedsim.data.synthetic import open_synthetic

RATE = 16_000


def mel_filters():
    def edge(mel):
        return 700 * (10 ** (mel / 2595) - 1)

    edges = edge(np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 66))[:, None]
    frequency = np.fft.rfftfreq(512, 1 / RATE)
    rising = (frequency - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequency) / (edges[2:] - edges[1:-1])
    return np.clip(np.minimum(rising, falling), 0, None).T


def logmel_statistics(waveform, filters):
    """Mean and standard deviation over time of 64 log-mel bands [128]."""
    frames = np.lib.stride_tricks.sliding_window_view(waveform, 400)[::160] * np.hanning(400)
    logmel = np.log(np.abs(np.fft.rfft(frames, 512)) ** 2 @ filters + 1e-6)
    return np.concatenate([logmel.mean(0), logmel.std(0)])


def test_clips_are_a_function_of_seed_class_and_index():
    first, again, other = (open_synthetic(clips_per_class=2, seed=seed) for seed in (7, 7, 8))
    for index in (0, 9, 19):
        waveform = first.source.waveform(index, RATE)
        np.testing.assert_array_equal(waveform, again.source.waveform(index, RATE))
        assert not np.array_equal(waveform, other.source.waveform(index, RATE))
        assert first.source.content_hash(index) == again.source.content_hash(index)
        assert first.source.content_hash(index) != other.source.content_hash(index)
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != other.fingerprint
    # asking in another order, or for more clips of the same shape, changes nothing
    few, many = open_synthetic(clips_per_class=10, seed=7), open_synthetic(clips_per_class=30, seed=7)
    np.testing.assert_array_equal(few.source.waveform(12, RATE), many.source.waveform(32, RATE))
    assert few.source.content_hash(12) == many.source.content_hash(32)
    assert len({many.source.content_hash(i) for i in range(len(many))}) == 300


def test_clips_are_float32_mono_of_unequal_length_and_bounded():
    recordings = open_synthetic(clips_per_class=4, seed=1)
    waveforms = [recordings.source.waveform(i, RATE) for i in range(40)]
    for waveform in waveforms:
        assert waveform.dtype == np.float32
        assert waveform.ndim == 1
        assert 1.5 * RATE <= len(waveform) <= 5 * RATE
        assert 0.15 < np.abs(waveform).max() < 1
    assert len({len(waveform) for waveform in waveforms}) > 15


def test_another_rate_is_the_same_sound():
    recordings = open_synthetic(clips_per_class=2, seed=1)
    at_16k, at_8k = (recordings.source.waveform(0, rate) for rate in (RATE, 8000))
    assert len(at_8k) == len(at_16k) // 2
    low = np.fft.rfft(at_16k)[: len(at_8k) // 4]
    np.testing.assert_allclose(2 * np.fft.rfft(at_8k)[: len(low)], low, atol=0.02 * np.abs(low).max())


def test_names_groups_folds_and_authors():
    recordings = open_synthetic(clips_per_class=40, seed=0)
    assert recordings.class_names == ESC10_CLASSES == tuple(FAMILIES)
    groups, sizes = np.unique(recordings.group, return_counts=True)
    assert len(groups) == 200
    assert (sizes == 2).all()
    counts = np.zeros((10, 5), dtype=int)
    np.add.at(counts, (recordings.label, recordings.fold - 1), 1)
    assert (counts == 8).all()
    for values in (recordings.label, recordings.fold, recordings.columns["author"]):
        assert len(set(zip(recordings.group.tolist(), values.tolist(), strict=True))) == 200
    assert len(set(recordings.columns["author"])) > 30


def test_clips_of_one_source_recording_are_more_alike_than_others():
    recordings = open_synthetic(clips_per_class=20, seed=0)
    filters = mel_filters()
    rows = [20 * c + i for c in range(10) for i in range(4)]
    rows = np.array(rows)
    features = np.stack([logmel_statistics(recordings.source.waveform(row, RATE), filters)[:64] for row in rows])
    features -= features.mean(axis=1, keepdims=True)  # the level differs on purpose
    distance = np.linalg.norm(features[:, None] - features, axis=2)
    same_class = recordings.label[rows][:, None] == recordings.label[rows]
    same_group = recordings.group[rows][:, None] == recordings.group[rows]
    np.fill_diagonal(same_group, False)
    assert distance[same_group].mean() < 0.6 * distance[same_class & ~same_group & (distance > 0)].mean()


@pytest.mark.slow
def test_a_linear_probe_on_logmel_statistics_finds_most_but_not_all():
    pytest.importorskip("sklearn")
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    recordings = open_synthetic(clips_per_class=40, seed=42)
    filters = mel_filters()
    features = np.stack(
        [logmel_statistics(recordings.source.waveform(row, RATE), filters) for row in range(len(recordings))]
    )
    accuracy = []
    for fold in range(1, 6):
        test = recordings.fold == fold
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        probe.fit(features[~test], recordings.label[~test])
        accuracy.append(probe.score(features[test], recordings.label[test]))
    assert 0.85 < np.mean(accuracy) < 0.97
