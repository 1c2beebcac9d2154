"""`multimodal`: outputs go with audio, blocks count alike whatever their widths, and the network ignores tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedsim.errors import ModelError
from fedsim.models.generators import Evidence, GeneratorSpec
from fedsim.models.generators.multimodal import Multimodal
from fedsim.models.generators.rows import class_centres
from fedsim.seeding import normal, rng
from fedsim.types import ClassStats

C, S, D, V = 2, 2, 4, 3
CONDITION = torch.randn(C, V, generator=torch.Generator().manual_seed(0))
SPEC = GeneratorSpec(1, 64, 8, 2e-3, rows_per_class=128, total_epochs=150, rows="means")


def evidence(clients: int = 60, *, scale: float = 50.0, wide: int = 40) -> Evidence:
    """Clients whose outputs are linear in their class means, around class means of their own; t5 is wide and large."""
    stream = np.random.default_rng(0)
    label = np.tile(np.arange(C), clients)
    mean = normal(stream, C * clients, S, D)
    x, centres = mean.flatten(1), normal(stream, C, wide)[torch.from_numpy(label)]
    heads = {"clip": x[:, :3] @ normal(stream, 3, 3), "t5": scale * (10 * centres + x @ normal(stream, S * D, wide))}
    stats = ClassStats(np.repeat(np.arange(clients), C), label, np.full(C * clients, 5), mean, None, {})
    return Evidence(stats, CONDITION, heads=heads)


def fitted(known: Evidence, *, epochs: int = 150, spec: GeneratorSpec = SPEC) -> Multimodal:
    generator = Multimodal(spec)
    generator.fit(known, epochs=epochs, stream=rng(0, "fit"))
    return generator


def test_outputs_of_a_sample_go_with_its_audio_embedding():
    known = evidence()
    generator = fitted(known, epochs=60)
    centres = class_centres(known.stats, C)
    labels = torch.arange(400) % C
    audio, shifts = generator.sample_with_heads(CONDITION[labels], 400, stream=rng(0, "x"))
    apart = (audio - centres[labels]).flatten(1)
    mine = torch.from_numpy(known.stats.label)
    x = (known.stats.audio_mean - centres[mine]).flatten(1)
    for head, rows in known.heads.items():
        table = replace(known.stats, audio_mean=rows.unsqueeze(1))
        y = rows - class_centres(table, C)[mine, 0]
        solution = torch.linalg.lstsq(x, y).solution
        right = 1 - (shifts[head] - apart @ solution).square().sum() / shifts[head].square().sum()
        assert right > 0.6  # noise kept by the decoder is the rest
        assert 0.6 < float(shifts[head].std() / y.std()) < 1.2
        # Deviations from class means: the means themselves lie 500 apart.
        assert shifts[head].mean(0).abs().max() < 0.3 * y.std()
    assert torch.equal(audio, generator.sample(CONDITION[labels], 400, stream=rng(0, "x")))


def test_blocks_count_alike_in_the_squared_error_however_wide_and_large_they_are():
    errors = []
    for known in (evidence(wide=8, scale=0.01), evidence(wide=800, scale=100.0)):
        generator = fitted(known, epochs=1, spec=replace(SPEC, loss_scaling="legacy"))
        vae, x = generator._centred._inner, torch.zeros(6, sum(generator._widths.values()))
        last = vae._network["decoder"][-1]
        with torch.no_grad():  # the audio block alone is wrong, by one deviation
            last.weight.zero_()
            last.bias.copy_(torch.arange(x.shape[1]) < S * D)
        errors.append(vae._loss_parts(x, x, torch.zeros(6, 0), rng(0, "z"))["recon"].detach())
    for error in errors:
        torch.testing.assert_close(error, torch.full((6,), 1 / 3))


def test_with_one_client_per_class_head_rows_repeat_class_means():
    known = evidence(clients=1)
    audio, shifts = fitted(known, epochs=2).sample_with_heads(CONDITION, C, stream=rng(0, "x"))
    for head, rows in known.heads.items():
        assert shifts[head].abs().max() < 1e-3 * rows.square().mean().sqrt()
    assert torch.isfinite(audio).all()


def test_without_outputs_or_with_other_widths_a_fit_is_refused():
    known = evidence()
    with pytest.raises(ModelError, match="needs the clients' adapter outputs"):
        Multimodal(SPEC).fit(replace(known, heads={}), epochs=1, stream=rng(0, "x"))
    generator = fitted(known, epochs=1)
    with pytest.raises(ModelError, match=r"incompatible dimensions: the generator was built for .*'t5': 40.*'t5': 8"):
        generator.fit(evidence(wide=8), epochs=1, stream=rng(0, "x"))


def test_a_real_t5_head_needs_tens_of_megabytes():
    known = evidence(clients=3, wide=4096)
    state = fitted(known, epochs=1, spec=replace(SPEC, hidden_dim=512)).state()
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    # Two matrices of 512 x (8 + 3 + 4096) with two moments each; its 17 tokens would make that 17 times as much.
    assert size < 80 * 2**20
