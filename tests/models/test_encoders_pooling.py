"""Segment weights against torch's adaptive mean, and the fixed projection."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fedsim.models.encoders.pooling import masked_segment_weights, projection, segment_weights, semi_orthogonal


@pytest.mark.parametrize("segments", [1, 3, 4, 7])
def test_equals_the_adaptive_mean_of_the_valid_part(segments):
    frames = torch.randn(12, 12, 5, generator=torch.Generator().manual_seed(0))
    lengths = torch.arange(1, 13)
    pooled = segment_weights(lengths, 12, segments) @ frames
    for row, length in enumerate(lengths.tolist()):
        expected = F.adaptive_avg_pool1d(frames[row, :length].T[None], segments)[0].T
        torch.testing.assert_close(pooled[row], expected)


def test_padded_frames_never_contribute():
    frames = torch.randn(2, 10, 3, generator=torch.Generator().manual_seed(0))
    changed = frames.clone()
    changed[0, 4:] = 1e6
    changed[1, 7:] = -1e6
    weights = segment_weights(torch.tensor([4, 7]), 10, 4)
    assert torch.equal(weights @ frames, weights @ changed)
    changed[0, 3] += 1
    assert not torch.equal(weights @ frames, weights @ changed)


def test_lengths_outside_the_frames_are_clipped():
    weights = segment_weights(torch.tensor([0, 1, 99, 5]), 5, 2)
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[2], weights[3])
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 2))


def test_masked_frames_are_left_out_as_if_the_others_were_adjacent():
    frames = torch.randn(1, 9, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 1, 1, 0, 1, 0, 1, 1, 0]], dtype=torch.bool)
    pooled = masked_segment_weights(mask, 4) @ frames
    torch.testing.assert_close(pooled[0], F.adaptive_avg_pool1d(frames[0, mask[0]].T[None], 4)[0].T)


def test_a_mask_without_a_true_frame_counts_as_all_true():
    mask = torch.zeros(1, 6, dtype=torch.bool)
    assert torch.equal(masked_segment_weights(mask, 3), masked_segment_weights(~mask, 3))


def test_weights_may_be_vmapped():
    lengths = torch.tensor([[1, 5, 9], [3, 2, 10]])
    stacked = torch.func.vmap(lambda part: segment_weights(part, 10, 4))(lengths)
    assert torch.equal(stacked[1], segment_weights(lengths[1], 10, 4))


@pytest.mark.parametrize(("in_dim", "dim"), [(64, 16), (16, 64)])
def test_projection_is_semi_orthogonal(in_dim, dim):
    matrix = projection(in_dim, dim)
    assert matrix.shape == (in_dim, dim)
    assert matrix.dtype == torch.float32
    gram = matrix.T @ matrix if dim < in_dim else matrix @ matrix.T
    torch.testing.assert_close(gram, torch.eye(16), atol=1e-6, rtol=0)


def test_a_wider_projection_keeps_inner_products():
    rows = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    wide = rows @ projection(16, 50)
    torch.testing.assert_close(wide @ wide.T, rows @ rows.T, atol=1e-5, rtol=0)


def test_projection_is_fixed_and_the_identity_for_equal_widths():
    torch.manual_seed(1)
    first = projection(32, 8)
    torch.manual_seed(2)
    assert torch.equal(first, projection(32, 8))
    assert torch.equal(projection(8, 8), torch.eye(8))
    assert not torch.equal(semi_orthogonal(32, 8, purpose="other"), first)
    # These digits may never change: embeddings and adapters of earlier runs depend on them.
    torch.testing.assert_close(projection(3, 2), torch.tensor(PROJECTION_3_2), atol=1e-6, rtol=0)


PROJECTION_3_2 = [[-0.7826328, -0.3480231], [0.5807885, -0.7065896], [-0.2239882, -0.6161258]]
