"""`auto` becomes numbers: the same on every machine for the block size, by measured time for the actors."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest
from worlds import digest_after, reconfigured, tiny_config

from fedsim.cli import session
from fedsim.config import load_config
from fedsim.config.schema import Resources
from fedsim.errors import ClientError, ConfigError
from fedsim.federation.blocks import BlockTrainer
from fedsim.federation.setup import prepare
from fedsim.launch import auto
from fedsim.launch.auto import Machine, choose_actors, choose_block_size, settle

MUCH = 1e12  # FLOP


@pytest.mark.parametrize(
    ("cohort", "wanted"),
    [
        (1, 1),
        (7, 2),
        (10, 4),
        (100, 16),
        (256, 16),
        (1000, 64),
        (5000, 512),
        (65_536, 2048),
        (1_000_000, 2048),
    ],
)
def test_about_sixteen_blocks_of_16_to_2048_clients(cohort, wanted):
    assert choose_block_size(cohort, client_flops=MUCH, client_bytes=1) == wanted


@pytest.mark.parametrize(("flops", "wanted"), [(MUCH, 64), (1e7, 128), (1e6, 512), (1.0, 512)])
def test_clients_with_little_to_compute_go_out_in_larger_blocks(flops, wanted):
    # Two blocks at least, one for each of two actors.
    assert choose_block_size(1000, client_flops=flops, client_bytes=1) == wanted


@pytest.mark.parametrize(("budget_mb", "wanted"), [(6144, 2048), (100, 64), (95, 32), (1, 1), (0.1, 1)])
def test_the_memory_budget_beats_all_else(budget_mb, wanted):
    size = choose_block_size(1_000_000, client_flops=1.0, client_bytes=1.5 * 2**20, budget=budget_mb * 2**20)
    assert size == wanted


def actors(training_s: float, blocks: int = 100, *, cpus: float = 8, gpus: float = 0, **resources) -> int:
    return choose_actors(
        training_s=training_s, blocks=blocks, machine=Machine(cpus, gpus), resources=Resources(**resources)
    )


def test_a_short_run_starts_no_ray():
    assert actors(11.9) == 0
    assert actors(12.1) == 8


def test_actors_are_bounded_by_cpus_and_blocks():
    assert actors(1e4) == 8
    assert actors(1e4, client_cpus=3) == 2
    assert actors(1e4, server_cpus=1) == 7
    assert actors(1e4, blocks=5) == 5
    assert actors(1e4, client_cpus=0) == 100
    # One actor would only cost its start.
    assert actors(1e4, cpus=1) == 0
    assert actors(1e4, blocks=1) == 0


def test_actors_are_bounded_by_fractions_of_gpus():
    assert actors(1e4, gpus=2, client_gpus=0.25) == 8
    assert actors(1e4, cpus=64, gpus=2, client_gpus=0.25) == 8
    assert actors(1e4, cpus=64, gpus=2, client_gpus=0.25, server_gpus=1) == 4
    assert actors(1e4, cpus=64, gpus=2, client_gpus=0.25, server_gpus=0.5) == 6
    assert actors(1e4, cpus=64, gpus=2, client_gpus=0.4) == 4  # two on each, the rest of a GPU is no use
    assert actors(1e4, cpus=64, gpus=8, client_gpus=2) == 4


def test_numbers_are_left_alone(setup):
    assert settle(setup) is setup


def test_a_block_is_measured_and_the_choice_is_said(setup, caplog):
    both = reconfigured(setup, "resources.block_size=auto", "resources.client_actors=auto")
    with caplog.at_level(logging.INFO, logger="fedsim"):
        resources = settle(both).config.resources
    assert (resources.num_actors, resources.clients_per_block) == (0, 4)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "fedsim.launch.auto"]
    assert line.startswith("resources: block_size 4, client_actors 0 (auto: cohort of 7, ")
    assert "a block of 4 took 0.0" in line
    assert "s of local training in all without Ray, starting it takes 12 s, 2 blocks a round" in line


def test_clients_that_only_send_statistics_are_sized_by_those(setup, caplog):
    idle = ("federation.local_epochs=0", "feda2v.global_model_train=true")
    with caplog.at_level(logging.INFO, logger="fedsim"):
        resources = settle(reconfigured(setup, *idle, "resources.block_size=auto")).config.resources
        settle(reconfigured(setup, "resources.block_size=auto"))
    assert resources.clients_per_block == 4
    zero, one = (float(re.search(r"([\d.]+) MFLOP", record.getMessage())[1]) for record in caplog.records)
    assert one == pytest.approx(3 * zero, rel=0.01)


def test_the_block_size_does_not_depend_on_the_machine_and_small_ones_cost_no_measurement(setup, monkeypatch):
    monkeypatch.setattr(BlockTrainer, "train", None)
    only = reconfigured(setup, "resources.block_size=auto", "resources.client_actors=2")
    assert settle(only).config.resources.clients_per_block == 4


@pytest.fixture(scope="module")
def many():
    """Seventy clients: blocks of 64."""
    setup = prepare(tiny_config("federation.num_clients=70", "data.clips_per_class=80"))
    return reconfigured(setup, "federation.num_clients=70", "data.clips_per_class=80", "resources.block_size=auto")


def test_a_block_that_does_not_fit_is_halved_and_that_is_said(many, monkeypatch, caplog):
    sizes, train = [], BlockTrainer.train

    def scarce(self, block, broadcast, prepared=None):
        sizes.append(len(block.client_ids))
        if sizes[-1] > 4:
            try:
                raise MemoryError
            except MemoryError as error:
                raise ClientError("local training failed") from error
        return train(self, block, broadcast, prepared)

    monkeypatch.setattr(BlockTrainer, "train", scarce)
    assert settle(many).config.resources.clients_per_block == 4
    assert sizes == [64, 32, 16, 8, 4, 4]
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "out of memory with blocks of 16 clients: resources.block_size is halved to 8" in warned


def test_other_errors_of_the_measured_block_are_raised(many, monkeypatch):
    def broken(self, block, broadcast, prepared=None):
        raise ClientError("client 3, round 1: broken")

    monkeypatch.setattr(BlockTrainer, "train", broken)
    with pytest.raises(ClientError, match="broken"):
        settle(many)


def test_the_measured_share_is_that_of_the_batches(many):
    cohort = auto._first_cohort(many)
    measured = auto.measure_block(many, cohort, 16)
    assert measured.clients == 16
    batches = -(-many.partition.counts_of(cohort) // 4)
    assert measured.share == batches[32:48].sum() / batches.sum()
    assert measured.seconds > 0
    assert measured.peak_bytes > 2**20


def test_a_run_writes_the_numbers_into_its_configuration(tmp_path):
    unsettled = tiny_config("resources.block_size=auto", "resources.client_actors=auto", "federation.global_rounds=1")
    result = session.run(unsettled, output=tmp_path / "run")
    resources = load_config(tmp_path / "run" / "config.yaml").resources
    assert (resources.client_actors, resources.block_size) == (0, 4)
    numbers = tiny_config("resources.block_size=4", "federation.global_rounds=1")
    assert result["digest"] == digest_after(prepare(numbers))


def test_an_unsettled_number_is_an_error_where_one_is_needed():
    with pytest.raises(ConfigError, match=r"resources\.block_size is auto: a run settles it"):
        Resources().clients_per_block  # noqa: B018
    assert Resources().num_actors == 2
    assert np.iinfo(np.int32).max > Resources(block_size=4096).clients_per_block
