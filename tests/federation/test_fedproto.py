"""Whole rounds with prototypes: what they are, whom they pull, and that blocks leave no trace."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from worlds import SERVER_STEP, ReorderedPool, kept_of, numbers, reconfigured, run, tiny_config

from fedsim.algorithms.prototypes import KNOWN, PREFIX
from fedsim.errors import ConfigError, DataError
from fedsim.federation.setup import prepare
from fedsim.models.adapters import stack
from fedsim.models.saved import digest
from fedsim.types import unflatten_state

NO_STEP = "feda2v.global_model_train=false"
PROPER = (NO_STEP, "feda2v.adapter_aggregation_mode=none", "training.prototype_weight=1")


def test_prototypes_are_the_mean_outputs_of_the_adapters_that_clients_keep(setup):
    server, _ = run(reconfigured(setup, *PROPER), 1)
    parts, minimum = server.parts, setup.config.privacy.min_count
    sums, counts = {head: {} for head in parts.objective.targets}, {}
    for client in range(7):
        row = torch.from_numpy(np.array(server.clients.rows(np.array([client]), np.float32(0))[0]))
        own, rows = unflatten_state(row, server.state.adapter), setup.partition.client(client)
        outputs = parts.adapter.forward(stack(own), parts.table.inputs[rows].unsqueeze(0))
        for label in np.unique(setup.labels[rows]):
            mine = setup.labels[rows] == label
            if mine.sum() >= minimum:
                counts[label] = counts.get(label, 0) + mine.sum()
                for head, out in outputs.items():
                    sums[head][label] = sums[head].get(label, 0) + out[0][mine].double().sum(0)
    assert counts
    assert np.flatnonzero(server.state.guides[KNOWN]).tolist() == sorted(counts)
    for head, table in sums.items():
        for label, total in table.items():
            wanted = (total / counts[label]).float()
            torch.testing.assert_close(server.state.guides[PREFIX + head][label], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["none", "weighted"])
def test_the_first_round_knows_none_and_the_second_is_pulled(setup, mode):
    options = (NO_STEP, f"feda2v.adapter_aggregation_mode={mode}")

    def after(rounds, weight):
        server, _ = run(reconfigured(setup, *options, f"training.prototype_weight={weight}"), rounds)
        return kept_of(server) if mode == "none" else digest(server.state.adapter)

    assert after(1, 0) == after(1, 1)
    assert after(2, 0) != after(2, 1)


def test_clients_agree_more_on_their_classes_the_more_they_are_pulled(setup):
    def disagreement(weight):
        options = (*PROPER, f"training.prototype_weight={weight}", "privacy.min_count=1", "federation.local_epochs=4")
        server, _ = run(reconfigured(setup, *options), 3)
        spread = []
        rows = torch.from_numpy(server.clients.rows(np.arange(7), np.float32(0)))
        states = [unflatten_state(row, server.state.adapter) for row in rows]
        held = [setup.partition.client(k) for k in range(7)]
        for label in range(4):
            clips = np.flatnonzero(setup.labels == label)
            holders = [states[k] for k in range(7) if (setup.labels[held[k]] == label).any()]
            inputs = server.parts.table.inputs[clips].unsqueeze(0)
            outputs = torch.stack([server.parts.adapter.forward(stack(own), inputs)["clip"][0] for own in holders])
            spread.append(float(outputs.var(0).mean()))
        return np.mean(spread)

    assert disagreement(10.0) < 0.8 * disagreement(0.0)


@pytest.mark.parametrize("mode", ["none", "weighted", "krum"])
def test_blocks_and_their_order_leave_no_trace(setup, mode):
    options = (*PROPER, f"feda2v.adapter_aggregation_mode={mode}", "federation.cohort_size=5")
    whole, results = run(reconfigured(setup, *options, "resources.block_size=8"))
    for size in (1, 2, 4):
        some = reconfigured(setup, *options, f"resources.block_size={size}")
        other, again = run(some, pool=ReorderedPool(some, lambda updates, n: updates[n:][::-1] + updates[:n]))
        assert digest(other.state.guides) == digest(whole.state.guides)
        assert digest(other.state.adapter) == digest(whole.state.adapter)
        assert numbers(again) == numbers(results)


def test_clients_that_do_not_train_are_not_pulled():
    with pytest.raises(ConfigError, match=r"prototype_weight is 1 but federation.local_epochs is 0") as caught:
        tiny_config(*SERVER_STEP, "training.prototype_weight=1", "federation.local_epochs=0")
    assert "\n" not in str(caught.value)


def test_prototypes_that_could_never_be_made_are_refused():
    with pytest.raises(DataError, match="no statistics from clients"):
        prepare(tiny_config(*PROPER, "privacy.min_count=1000"))
