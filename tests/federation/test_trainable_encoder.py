"""Training the audio encoder on clients: plain fine-tuning for one, FedAvg over all of its tensors for many."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from worlds import CPU, block_of, make_server, numbers, only_client, reconfigured, run, tiny_config

from fedsim.algorithms.batches import epoch_orders
from fedsim.errors import ConfigError, ModelError
from fedsim.federation.blocks import BlockTrainer
from fedsim.federation.checkpoint import load_checkpoint
from fedsim.federation.parts import build_parts, initial_state
from fedsim.federation.setup import prepare
from fedsim.models.adapters import stack
from fedsim.models.encoders.ast import make_tiny_ast
from fedsim.models.encoders.pooling import projection, segment_weights
from fedsim.models.saved import digest
from fedsim.types import Broadcast, unflatten_state

BASE = (
    "model.audio_encoder.name=tiny_ast",
    "model.audio_encoder.segments=2",
    "model.audio_encoder.dim=16",
    "data.clips_per_class=4",
    "federation.num_clients=3",
    "federation.global_rounds=2",
    "federation.local_epochs=2",
    "feda2v.adapter_aggregation_mode=weighted",
    "feda2v.global_model_train=false",
)
CHOICES = ("all", "last:1")


def trainable(which: str, *overrides: str) -> tuple[str, ...]:
    return (*BASE, f"model.audio_encoder.trainable={which}", *overrides)


@pytest.fixture(scope="module")
def ast():
    """Prepared once: the store holds spectrograms, whatever is trained."""
    return prepare(tiny_config(*trainable("all")))


def plain_fine_tuning(setup, which: str, *, epochs: int) -> dict[str, torch.Tensor]:
    """A textbook loop on the transformers model with torch.optim, for the first client's recordings."""
    parts = build_parts(setup, CPU)
    encoder = make_tiny_ast(segments=2, dim=16)
    model = encoder._model.requires_grad_(False)
    names = ("layernorm.", "layers.1.") if which == "last:1" else ("",)
    tuned = {f"encoder.{n}": p.requires_grad_() for n, p in model.named_parameters() if n.startswith(names)}
    adapter = {n: p.requires_grad_() for n, p in stack(parts.adapter.init(7)).items()}
    optimizer = torch.optim.AdamW([*tuned.values(), *adapter.values()], lr=0.01, weight_decay=1e-4)
    rows = setup.partition.client(0)
    features = torch.from_numpy(np.array(parts.store.rows[rows]))
    lengths = torch.from_numpy(np.array(parts.store.lengths[rows]))
    labels = torch.from_numpy(setup.labels[rows])
    orders = epoch_orders(7, 1, np.array([0]), np.array([len(rows)]), epochs=epochs, batch_size=4)[0]
    for take in [batch for order in orders for batch in torch.from_numpy(order).split(4)]:
        hidden = model(features[take]).last_hidden_state[:, 2:]
        over_time = hidden.reshape(len(take), 2, 50, 32).mean(1)
        embeddings = segment_weights(lengths[take], 50, 2) @ over_time @ projection(32, 16)
        loss = torch.zeros(())
        for head, out in parts.adapter.forward(adapter, embeddings.unsqueeze(0)).items():
            targets = parts.objective.targets[head]
            loss = loss + (out[0] - targets[labels[take]]).square().mean() / targets.var(0, unbiased=False).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*tuned.values(), *adapter.values()], 1.0)
        optimizer.step()
    return {n: p.detach() for n, p in tuned.items()} | {n: p.detach()[0] for n, p in adapter.items()}


@pytest.mark.parametrize("which", CHOICES)
@pytest.mark.parametrize("epochs", [1, 3])
def test_one_client_is_plain_fine_tuning_of_the_transformers_model(ast, which, epochs):
    config = trainable(which, f"federation.local_epochs={epochs}", "feda2v.adapter_aggregation_mode=none")
    setup = only_client(reconfigured(ast, *config), 0)
    parts = build_parts(setup, CPU)
    start = initial_state(setup, parts)
    (row,) = BlockTrainer(setup, CPU).train(block_of(0), Broadcast(1, 7, start)).updates
    ours = unflatten_state(torch.from_numpy(row), start)
    plain = plain_fine_tuning(setup, which, epochs=epochs)
    assert ours.keys() == plain.keys()
    for name, tensor in plain.items():
        # Keys' biases have no gradient but rounding (softmax doesn't see them): AdamW makes steps of it.
        if "key.bias" not in name and "k_proj.bias" not in name:
            torch.testing.assert_close(ours[name], tensor, atol=2e-5, rtol=1e-4, msg=name)
        assert not torch.equal(ours[name], start[name]), f"{name} was not trained"


@pytest.mark.parametrize("which", CHOICES)
def test_fedavg_covers_the_tensors_that_are_trained_and_no_others(ast, which):
    setup = reconfigured(ast, *trainable(which))
    server = make_server(setup)
    start = server.state.adapter
    encoder = {name for name in start if name.startswith("encoder.")}
    everything = {f"encoder.{name}" for name, _ in make_tiny_ast(segments=2, dim=16)._model.named_parameters()}
    last = {name for name in everything if name.startswith(("encoder.layernorm.", "encoder.layers.1."))}
    assert encoder == (everything if which == "all" else last)
    assert 0 < len(last) < len(everything)
    server.run_round()
    trainer, counts = BlockTrainer(setup, CPU), setup.partition.counts
    updates = [trainer.train(block_of(client), Broadcast(1, 7, start)).delta_sum for client in range(3)]
    for name, tensor in server.state.adapter.items():
        mean = start[name] + sum(update[name] for update in updates) / counts.sum()
        torch.testing.assert_close(tensor, mean, atol=1e-6, rtol=1e-5)
        assert not torch.equal(tensor, start[name])


def test_the_frozen_part_of_the_model_stays_as_it_was(ast):
    setup = reconfigured(ast, *trainable("last:1"))
    server, _ = run(setup)
    fresh = dict(make_tiny_ast(segments=2, dim=16)._model.named_parameters())
    model = server.parts.model.encode.__self__._model
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, fresh[name]), name


def test_embeddings_follow_the_trained_encoder(ast):
    setup = reconfigured(ast, *trainable("all"))
    server = make_server(setup)
    before = server.sample_embeddings()[0]
    server.run_round()
    assert not np.allclose(server.sample_embeddings()[0], before, atol=1e-4)


def test_runs_with_a_trained_encoder_resume_and_do_not_depend_on_blocks(ast, tmp_path):
    setup = reconfigured(ast, *trainable("last:1"))
    whole, results = run(setup)
    first, early = run(setup, 1)
    first.save(tmp_path, mlflow_run_id=None)
    second, late = run(setup, state=load_checkpoint(tmp_path, setup.config)[0])
    assert digest(second.state.adapter) == digest(whole.state.adapter)
    assert numbers([*early, *late]) == numbers(results)
    wide, _ = run(reconfigured(ast, *trainable("last:1", "resources.block_size=4")))
    assert digest(wide.state.adapter) == digest(whole.state.adapter)


def test_the_server_step_leaves_the_encoder_to_the_clients(ast):
    step = ("feda2v.global_model_train=true", "feda2v.use_generator=true", "feda2v.generator_type=gaussian")
    plain, stepped = (run(reconfigured(ast, *trainable("last:1", *more)), 1)[0] for more in ((), step))
    for name, tensor in stepped.state.adapter.items():
        assert torch.equal(tensor, plain.state.adapter[name]) == name.startswith("encoder.")


def test_only_an_ast_can_be_trained_and_only_layers_it_has(ast):
    with pytest.raises(ConfigError, match=r"only ast and tiny_ast can be trained"):
        tiny_config("model.audio_encoder.trainable=all")
    with pytest.raises(ModelError, match=r"has 2 layers; use last:1 \.\.\. last:2, or all"):
        make_server(reconfigured(ast, *trainable("last:3")))
