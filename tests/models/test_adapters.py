"""Adapters as stacks: shapes, independence of clients to the bit, gradients, parameter counts and messages."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from fedsim.errors import ModelError
from fedsim.models.adapters import PRESETS, HeadSpec, make_adapter, num_weights, stack, unstack
from fedsim.models.saved import digest

S, D = 3, 12
SHAPES = {"clip": (8,), "t5": (5, 16)}


def adapter_of(preset: str, shapes=SHAPES, *, hidden=(16, 10), width=8, num_heads=4, input_shape=(S, D)):
    specs = {head: HeadSpec(preset, shape, tuple(hidden), width, num_heads) for head, shape in shapes.items()}
    centre = {head: torch.linspace(-1, 1, int(np.prod(shape))).view(shape) for head, shape in shapes.items()}
    return make_adapter(input_shape, specs, centre=centre, scale=dict.fromkeys(shapes, 0.5))


def stack_of(adapter, clients: int):
    """Clients that all differ, in every tensor."""
    states = [adapter.init(seed) for seed in range(clients)]
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.stack([s[name] for s in states])
        + 0.1 * torch.randn(clients, *states[0][name].shape, generator=generator)
        for name in states[0]
    }


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("clients", [1, 3])
@pytest.mark.parametrize("batch", [0, 1, 4])
def test_shapes_of_both_ranks_also_for_no_rows(preset, clients, batch):
    adapter = adapter_of(preset)
    out = adapter.forward(stack(adapter.init(0), clients), torch.zeros(clients, batch, S, D))
    assert {head: tuple(o.shape) for head, o in out.items()} == {
        "clip": (clients, batch, 8),
        "t5": (clients, batch, 5, 16),
    }


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("clients", [2, 5, 8, 32])
def test_a_stack_equals_single_clients_bit_for_bit(preset, clients):
    adapter = adapter_of(preset)
    params, x = stack_of(adapter, clients), rows(clients, 4, S, D)
    together = adapter.forward(params, x)
    for k in range(clients):
        alone = adapter.forward({name: p[k : k + 1] for name, p in params.items()}, x[k : k + 1])
        for head in SHAPES:
            assert torch.equal(together[head][k], alone[head][0])


@pytest.mark.parametrize("preset", PRESETS)
def test_rows_of_a_batch_do_not_see_each_other(preset):
    adapter = adapter_of(preset)
    params, x = stack_of(adapter, 1), rows(1, 4, S, D)
    changed = x.clone()
    changed[:, 1:] = torch.nan
    for head in SHAPES:
        assert torch.equal(adapter.forward(params, x)[head][:, 0], adapter.forward(params, changed)[head][:, 0])


@pytest.mark.parametrize("preset", PRESETS)
def test_the_gradient_of_a_client_touches_no_other_client(preset):
    adapter = adapter_of(preset)
    params = {name: p.requires_grad_() for name, p in stack_of(adapter, 3).items()}
    out = adapter.forward(params, rows(3, 4, S, D))
    grads = torch.autograd.grad(sum(o[1].square().sum() for o in out.values()), list(params.values()))
    for name, grad in zip(params, grads, strict=True):
        assert not grad[0].any(), name
        assert not grad[2].any(), name
        assert grad[1].any(), f"{name} gets no gradient from its own client"


@pytest.mark.parametrize("preset", ["map", "slim"])
def test_pooling_ignores_the_order_of_segments_and_depends_on_all_of_them(preset):
    adapter = adapter_of(preset)
    params, x = stack_of(adapter, 1), rows(1, 2, S, D)
    turned = adapter.forward(params, x.flip(2))
    for head, out in adapter.forward(params, x).items():
        torch.testing.assert_close(out, turned[head])
    for segment in range(S):
        changed = x.clone()
        changed[:, :, segment] += rows(D)
        assert not torch.allclose(adapter.forward(params, x)["t5"], adapter.forward(params, changed)["t5"])


@pytest.mark.parametrize("preset", PRESETS)
def test_tokens_of_a_head_differ(preset):
    adapter = adapter_of(preset)
    out = adapter.forward(stack_of(adapter, 1), rows(1, 1, S, D))["t5"][0, 0]
    assert torch.pdist(out).min() > 1e-3


def test_output_is_centre_plus_scale_times_raw():
    specs = {"clip": HeadSpec("mlp", (8,), (6,), 8, 4)}
    plain = make_adapter((S, D), specs, centre={"clip": torch.zeros(8)}, scale={"clip": 1.0})
    centre = torch.arange(8.0)
    scaled = make_adapter((S, D), specs, centre={"clip": centre}, scale={"clip": 0.25})
    params, x = stack(plain.init(3)), rows(1, 4, S, D)
    torch.testing.assert_close(scaled.forward(params, x)["clip"], centre + 0.25 * plain.forward(params, x)["clip"])


def test_mlp_by_hand():
    adapter = adapter_of("mlp", {"clip": (8,)}, hidden=(16,))
    state, x = adapter.init(0), rows(4, S, D)
    normed = torch.nn.functional.layer_norm(x, (D,))
    hidden = torch.nn.functional.gelu(normed @ state["clip.mlp.layer0.weight"]).mean(1)
    wanted = adapter.centre["clip"] + 0.5 * (hidden @ state["clip.last.weight"])
    torch.testing.assert_close(adapter.forward(stack(state), x.unsqueeze(0))["clip"][0], wanted)


def test_attention_pooling_equals_torch_multi_head_attention():
    adapter = adapter_of("map", {"t5": (5, 16)}, hidden=(16,))
    state = unstack(stack_of(adapter, 1))
    own = {name.removeprefix("t5."): t for name, t in state.items()}
    x = rows(4, S, D)
    tokens = torch.nn.functional.layer_norm(x, (D,)) * own["mlp.norm.gain"] + own["mlp.norm.bias"]
    tokens = torch.nn.functional.gelu(tokens @ own["mlp.layer0.weight"] + own["mlp.layer0.bias"])
    tokens = tokens @ own["mlp.layer1.weight"] + own["mlp.layer1.bias"]
    attention = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        attention.in_proj_weight.copy_(torch.cat([own["pool.q.weight"].T, own["pool.kv.weight"].T]))
        attention.in_proj_bias.zero_()
        attention.out_proj.weight.copy_(own["pool.out.weight"].T)
        attention.out_proj.bias.copy_(own["pool.out.bias"])
        latents = own["pool.latents"].expand(4, -1, -1)
        tokens = tokens @ own["pool.project.weight"] + own["pool.project.bias"]
        attended = attention(latents, tokens, tokens, need_weights=False)[0]

    def rms(h, gain):
        return h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain

    h = rms(latents + attended, own["pool.attention_norm.gain"])
    gate, up = (h @ own["pool.up.weight"] + own["pool.up.bias"]).chunk(2, -1)
    mixed = (torch.nn.functional.silu(gate) * up) @ own["pool.down.weight"] + own["pool.down.bias"]
    wanted = adapter.centre["t5"] + 0.5 * rms(h + mixed, own["pool.mlp_norm.gain"])
    torch.testing.assert_close(adapter.forward(stack(state), x.unsqueeze(0))["t5"][0], wanted)


def test_init_is_a_function_of_seed_and_head_and_leaves_the_global_random_state_alone():
    adapter = adapter_of("slim")
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    assert digest(adapter.init(3)) == digest(adapter_of("slim").init(3))
    assert digest(adapter.init(3)) != digest(adapter.init(4))
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    same = adapter_of("slim", {"a": (8,), "b": (8,)}).init(3)
    assert not torch.equal(same["a.last.weight"], same["b.last.weight"])


def test_adding_a_head_leaves_the_init_of_the_others():
    alone, both = adapter_of("mlp", {"clip": (8,)}).init(3), adapter_of("mlp").init(3)
    assert all(torch.equal(both[name], tensor) for name, tensor in alone.items())


def parameters(dim: int, shape: tuple[int, int], hidden: list[int], width: int | None) -> int:
    """Parameters of `map` (width None) and `slim` by hand."""
    pool = shape[-1] if width is None else width
    widths = [dim, *hidden, pool]
    mlp = 2 * dim + sum(i * o + o for i, o in pairwise(widths))
    # latents; projection, q, kv, out; two biases; norm
    attention = shape[0] * pool + 5 * pool**2 + 2 * pool + pool
    swiglu = pool * 8 * pool + 8 * pool + 4 * pool * pool + pool + pool
    return mlp + attention + swiglu + (0 if width is None else width * shape[-1] + shape[-1])


@pytest.mark.parametrize(("dim", "shape", "hidden", "width"), [(12, (5, 16), [6], 8), (7, (2, 8), [9, 3], 4)])
def test_parameters_of_map_and_slim(dim, shape, hidden, width):
    for preset, pool in (("map", None), ("slim", width)):
        adapter = adapter_of(preset, {"t5": shape}, hidden=hidden, width=width, input_shape=(S, dim))
        assert sum(t.numel() for t in adapter.init(0).values()) == parameters(dim, shape, hidden, pool)


def test_slim_has_a_seventeenth_of_the_parameters_of_map_for_t5():
    assert parameters(768, (17, 4096), [1024, 2048, 2048], None) == pytest.approx(301e6, rel=0.005)
    assert parameters(512, (17, 4096), [1024, 2048], 768) == pytest.approx(17.5e6, rel=0.03)


def test_stack_and_unstack_own_their_memory():
    state = {"w": torch.ones(2)}
    stacked = stack(state, 2)
    stacked["w"][0] += 1
    assert state["w"].tolist() == [1, 1]
    assert stacked["w"].tolist() == [[2, 2], [1, 1]]
    own = unstack(stacked, 1)
    own["w"] += 5
    assert stacked["w"][1].tolist() == [1, 1]


@pytest.mark.parametrize("shape", [(1, 2, S, D + 1), (1, 2, S + 1, D), (2, S, D)])
def test_other_embeddings_are_refused_with_both_shapes(shape):
    adapter = adapter_of("mlp")
    with pytest.raises(ModelError, match="incompatible dimensions") as caught:
        adapter.forward(stack(adapter.init(0)), torch.zeros(shape))
    assert f"[K, B, {S}, {D}], got {list(shape)}" in str(caught.value)
    assert "model.audio_encoder.segments and .dim" in str(caught.value)


@pytest.mark.parametrize(
    ("preset", "shape", "changes", "message"),
    [
        ("mpl", (8,), {}, r"model\.adapters\.clip: unknown preset 'mpl'; known: mlp, map, slim"),
        ("mlp", (2, 3, 4), {}, r"a head's shape is \[width\] or \[tokens, width\], got \[2, 3, 4\]"),
        ("mlp", (8,), {"hidden": ()}, r"at least one hidden layer, got hidden: \[\]"),
        ("map", (10,), {}, r"4 attention heads don't divide the width 10"),
        ("slim", (8,), {"width": 6}, r"4 attention heads don't divide the width 6"),
    ],
)
def test_what_can_not_be_built_is_refused(preset, shape, changes, message):
    with pytest.raises(ModelError, match=message):
        adapter_of(preset, {"clip": shape}, **changes)


def test_targets_of_another_shape_are_refused():
    with pytest.raises(ModelError, match=r"head 'clip' has shape \[8\], its text targets have \[9\]"):
        make_adapter(
            (S, D), {"clip": HeadSpec("mlp", (8,), (4,), 8, 4)}, centre={"clip": torch.zeros(9)}, scale={"clip": 1.0}
        )


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", [(64,), (5, 64)])
def test_the_number_of_weights_is_never_overestimated_and_little_less_than_there_are(preset, shape):
    params = adapter_of(preset, {"head": shape}, width=64).init(0)
    there = sum(tensor.numel() for tensor in params.values())
    assert 0.5 * there < num_weights(D, HeadSpec(preset, shape, (16, 10), 64, 4)) <= there
