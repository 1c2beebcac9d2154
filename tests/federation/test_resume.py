"""Checkpoints: a resumed run is the uninterrupted one, and whatever is wrong with a checkpoint is said."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from worlds import (
    OWN_GENERATORS,
    SERVER_STEP,
    generators_of,
    kept_of,
    make_server,
    numbers,
    reconfigured,
    run,
    slow_but,
    tiny_config,
)

from fedsim.errors import CheckpointError
from fedsim.federation.checkpoint import ServerState, load_checkpoint, save_checkpoint
from fedsim.federation.checkpoint_files import newest_checkpoint
from fedsim.models.guarded_files import sealed
from fedsim.models.saved import digest

NO_STEP = "feda2v.global_model_train=false"
SCAFFOLD = (NO_STEP, "training.optimizer=SGD", "training.control_variates=true")
FEDPROTO = ("training.prototype_weight=0.5",)
VARIANTS = {
    "vae": SERVER_STEP,
    "vae on moments": (*SERVER_STEP, "feda2v.generator_rows=moments"),
    "gan": (*SERVER_STEP, "feda2v.generator_type=gan", "feda2v.generator_rows=means"),
    "cgan": (*SERVER_STEP, "feda2v.generator_type=cgan"),
    "vae averaged and novel": (*SERVER_STEP, "feda2v.generator_ema=0.9", "feda2v.novelty_weight=0.1"),
    "vae_plain per class": (*SERVER_STEP, "feda2v.generator_type=vae_plain", "feda2v.generator_granularity=per_class"),
    "multimodal": (*SERVER_STEP, "feda2v.generator_type=multimodal", "federation.cohort_size=3"),
    "vae growing": (*SERVER_STEP, "feda2v.generator_growth=1.0"),
    "lowrank": (*SERVER_STEP, "feda2v.generator_type=lowrank"),
    "residual vae": (*SERVER_STEP, "feda2v.generator_type=residual_vae", "feda2v.generator_latent_dim=4"),
    "own generators": (NO_STEP, *OWN_GENERATORS, "federation.cohort_size=4"),
    "shared generators": (*SERVER_STEP, *OWN_GENERATORS, "feda2v.client_generator=shared"),
    "own adapters and generators": (
        NO_STEP,
        *OWN_GENERATORS,
        "feda2v.adapter_aggregation_mode=none",
        "federation.cohort_size=4",
    ),
    "full": (*SERVER_STEP, "feda2v.generator_type=full"),
    "gaussian": (*SERVER_STEP, "feda2v.generator_type=gaussian"),
    "cof without variances": (*SERVER_STEP, "feda2v.generator_type=cof", "privacy.share_variances=false"),
    "old statistics go": (*SERVER_STEP, "federation.cohort_size=3", "feda2v.generator_buffer_age=1"),
    "small cohort": (*SERVER_STEP, "federation.cohort_size=3"),
    "avg": (NO_STEP, "feda2v.adapter_aggregation_mode=avg"),
    "none": (NO_STEP, "feda2v.adapter_aggregation_mode=none", "federation.cohort_size=4"),
    "none with server step": (*SERVER_STEP, "feda2v.adapter_aggregation_mode=none"),
    "sampled statistics": (*SERVER_STEP, "feda2v.statistics_rows=3"),
    "median": (*SERVER_STEP, "feda2v.adapter_aggregation_mode=median"),
    "yogi": (*SERVER_STEP, "feda2v.server_optimizer=yogi", "feda2v.server_learning_rate=0.01"),
    "scaffold": (*SCAFFOLD, "federation.cohort_size=4"),
    "scaffold with server step": (*SERVER_STEP, *SCAFFOLD[1:], "feda2v.adapter_aggregation_mode=weighted"),
    "fedproto": (NO_STEP, *FEDPROTO, "feda2v.adapter_aggregation_mode=none", "federation.cohort_size=4"),
    "fedproto and scaffold": (*SERVER_STEP, *FEDPROTO, *SCAFFOLD[1:]),
    "kd": (*SERVER_STEP, "feda2v.adapter_aggregation_mode=kd", "feda2v.kd_epochs=2", "feda2v.kd_samples_per_class=4"),
    "server only": (*SERVER_STEP, "federation.local_epochs=0", "federation.cohort_size=3"),
    "sums": (*SERVER_STEP, "privacy.statistics=sums", "federation.cohort_size=3"),
    "secure sums": (*SERVER_STEP, "privacy.statistics=sums", "privacy.secure_sums=true"),
    "noise": (
        *SERVER_STEP,
        "privacy.statistics=sums",
        "feda2v.adapter_aggregation_mode=avg",
        "feda2v.generator_type=gaussian",
        "privacy.noise_multiplier=0.1",
    ),
    "momentum": (NO_STEP, "feda2v.server_optimizer=momentum", "federation.cohort_size=3"),
}


QUICK = ("small cohort", "none with server step", "yogi", "scaffold", "sums")


def state_of(server) -> dict[str, object]:
    """All of a server's state in a form that compares."""
    state = server.state
    tables = {"adapter": state.adapter, "generator": state.generator}
    buffer = state.buffer
    if buffer is not None:
        numbers = {name: torch.from_numpy(getattr(buffer, name)) for name in ("client", "label", "count")}
        if buffer.sampled_count is not None:
            numbers["sampled_count"] = torch.from_numpy(buffer.sampled_count)
        if buffer.seen is not None:
            numbers["seen"] = torch.from_numpy(buffer.seen)
        tables["buffer"] = {"audio_mean": buffer.audio_mean, **buffer.output_mean, **numbers}
        if buffer.audio_var is not None:
            tables["buffer"]["audio_var"] = buffer.audio_var
    if (pooled := state.learnt.pooled) is not None:
        numbers = torch.tensor([pooled.freedom])
        tables["pooled"] = {"factor": pooled.factor, "residual": pooled.residual, "freedom": numbers}
    tables["network"], tables["class_sums"] = state.learnt.network, state.learnt.class_sums
    if state.server_optimizer:
        tables["server_optimizer"] = state.server_optimizer
    if state.guides:
        tables["guides"] = state.guides
    kept = {} if server.clients is None else kept_of(server)
    tables["generators"] = {str(client): row for client, row in generators_of(server).items()}
    return {"round": state.round_number, "clients": kept} | {
        key: (sorted(table), digest(table)) for key, table in tables.items()
    }


@pytest.mark.parametrize("overrides", slow_but(QUICK, VARIANTS))
def test_a_resumed_run_is_the_uninterrupted_one(setup, tmp_path, overrides):
    setup = reconfigured(setup, *overrides)
    whole, results = run(setup)
    first, early = run(setup, 2, run_dir=tmp_path)
    first.save(tmp_path, mlflow_run_id="abc")
    state, run_id = load_checkpoint(tmp_path, setup.config)
    second = make_server(setup, state=state, run_dir=tmp_path)
    assert run_id == "abc"
    assert state_of(second) == state_of(first)
    late = [second.run_round() for _ in range(2)]
    assert state_of(second) == state_of(whole)
    assert numbers([*early, *late]) == numbers(results)


def test_a_checkpoint_does_not_disturb_the_run(setup, tmp_path):
    server = make_server(setup)
    for _ in range(4):
        server.run_round()
        server.save(tmp_path, mlflow_run_id=None)
    assert state_of(server) == state_of(run(setup)[0])
    assert newest_checkpoint(tmp_path).name == "round-4"
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {f"round-{n}" for n in range(1, 5)}


def test_beta_goes_on_where_it_was(setup, tmp_path):
    # Two epochs a round, a warm-up of half of the eight epochs: beta of each round's last epoch.
    _, results = run(setup)
    assert [r.metrics["server/generator_beta"] for r in results] == [0.5, 1.0, 1.0, 1.0]
    first, _ = run(setup, 1)
    first.save(tmp_path, mlflow_run_id=None)
    second = make_server(setup, state=load_checkpoint(tmp_path, setup.config)[0])
    assert second.run_round().metrics["server/generator_beta"] == 1.0


NONE = (NO_STEP, "feda2v.adapter_aggregation_mode=none", "federation.cohort_size=4")


def test_what_clients_keep_is_that_of_the_checkpoint_whatever_came_after_it(setup, tmp_path):
    # The process goes on for a round after its last checkpoint, and is killed.
    setup = reconfigured(setup, *NONE)
    whole, _ = run(setup)
    first, _ = run(setup, 2, run_dir=tmp_path)
    first.save(tmp_path, mlflow_run_id=None)
    first.run_round()
    state, _ = load_checkpoint(tmp_path, setup.config)
    second, _ = run(setup, state=state, run_dir=tmp_path)
    assert state_of(second) == state_of(whole)


def test_an_earlier_checkpoint_is_as_good_when_the_newest_is_deleted(setup, tmp_path):
    setup = reconfigured(setup, *NONE)
    server, states = make_server(setup, run_dir=tmp_path), {}
    for number in range(1, 5):
        server.run_round()
        server.save(tmp_path, mlflow_run_id=None)
        states[number] = state_of(server)
    for number in (4, 3, 2, 1):
        state, _ = load_checkpoint(tmp_path, setup.config)
        again = make_server(setup, state=state, run_dir=tmp_path)
        assert state_of(again) == states[number]
        if number == 2:  # a run that goes on from here leaves round 1 alone
            for later in (3, 4):
                again.run_round()
                assert state_of(again) == states[later]
        shutil.rmtree(tmp_path / "checkpoints" / f"round-{number}")


def test_a_checkpoint_of_what_clients_keep_is_an_index(setup, tmp_path):
    setup = reconfigured(setup, *NONE)
    server, _ = run(setup, 1, run_dir=tmp_path)
    server.save(tmp_path, mlflow_run_id=None)
    folder = tmp_path / "checkpoints" / "round-1"
    assert {path.name for path in folder.iterdir()} == {"state.json", "adapter.safetensors", "clients.safetensors"}
    assert (folder / "clients.safetensors").stat().st_size < 500
    row = 4 * sum(t.numel() for t in server.state.adapter.values())
    assert (tmp_path / "clients" / "rows.f32").stat().st_size == 4 * row


@pytest.mark.parametrize("damage", ["missing", "too short"])
def test_what_clients_keep_is_missed_when_it_is_gone(setup, tmp_path, damage):
    setup = reconfigured(setup, *NONE)
    server, _ = run(setup, 1, run_dir=tmp_path)
    server.save(tmp_path, mlflow_run_id=None)
    file = tmp_path / "clients" / "rows.f32"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path, setup.config)
    assert str(caught.value).startswith(f"{file} is {damage}: ")
    assert "\n" not in str(caught.value)


def test_a_damaged_older_checkpoint_is_said_to_be_given_up(setup, tmp_path, caplog):
    setup = reconfigured(setup, *NONE)
    server = make_server(setup, run_dir=tmp_path)
    for _ in range(2):
        server.run_round()
        server.save(tmp_path, mlflow_run_id=None)
    file = tmp_path / "checkpoints" / "round-1" / "clients.safetensors"
    file.write_bytes(b"no safetensors")
    state, _ = load_checkpoint(tmp_path, setup.config)
    again = make_server(setup, state=state, run_dir=tmp_path)
    assert state_of(again) == state_of(server)
    assert f"{file}: what its clients kept won't be kept any longer" in caplog.text


def test_a_checkpoint_elsewhere_would_lack_what_clients_keep(setup, tmp_path):
    server, _ = run(reconfigured(setup, *NONE), 1, run_dir=tmp_path / "here")
    with pytest.raises(ValueError, match=r"clients keep their tensors in .*here, a checkpoint in .*there lacks them"):
        server.save(tmp_path / "there", mlflow_run_id=None)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from worlds import *
from fedsim.federation.setup import prepare
run_dir, options = Path({run_dir!r}), {options!r}
server = make_server(prepare(tiny_config(*options)), run_dir=run_dir)
for number in (1, 2):
    server.run_round()
    server.save(run_dir, mlflow_run_id=None)
pool = server.pool

class Dying:
    def train(self, blocks, broadcast):
        for number, update in enumerate(pool.train(blocks, broadcast)):
            if number == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            yield update

server.pool = Dying()
server.run_round()
"""


def test_a_run_killed_in_the_middle_of_a_round_goes_on_bit_for_bit(setup, tmp_path):
    program = KILLED.format(folder=str(Path(__file__).parent), run_dir=str(tmp_path), options=NONE)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    setup = reconfigured(setup, *NONE)
    state, _ = load_checkpoint(tmp_path, setup.config)
    assert state.round_number == 2
    resumed, late = run(setup, state=state, run_dir=tmp_path)
    whole, results = run(setup)
    assert state_of(resumed) == state_of(whole)
    assert numbers(late) == numbers(results[2:])


@pytest.fixture
def saved(setup, tmp_path):
    """Run directory with the checkpoints of rounds 1 and 2, of a run with generator; that of round 1 is damaged."""
    server = make_server(setup)
    for _ in range(2):
        server.run_round()
        server.save(tmp_path, mlflow_run_id=None)
    (tmp_path / "round-1").mkdir()
    shutil.copytree(tmp_path / "checkpoints" / "round-1", tmp_path / "round-1", dirs_exist_ok=True)
    (tmp_path / "checkpoints" / "round-1" / "state.json").unlink()
    return tmp_path


def loaded(saved, *overrides: str) -> ServerState:
    return load_checkpoint(saved, tiny_config(*SERVER_STEP, *overrides))[0]


def refusal(saved, *overrides: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        loaded(saved, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_newest_checkpoint_counts_as_a_number(saved):
    newest = saved / "checkpoints" / "round-10"
    shutil.copytree(saved / "checkpoints" / "round-2", newest)
    document = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps(sealed(document | {"round": 10})))
    (saved / "checkpoints" / "round-11.bak").mkdir()
    (saved / "checkpoints" / ".round-12.partial").mkdir()
    assert newest_checkpoint(saved) == newest
    assert loaded(saved).round_number == 10


def test_a_checkpoint_is_json_and_safetensors_only(saved):
    files = {path.name for path in (saved / "checkpoints" / "round-2").iterdir()}
    assert files == {
        "state.json",
        "adapter.safetensors",
        "generator.safetensors",
        "buffer.safetensors",
        "pooled.safetensors",
    }
    json.loads((saved / "checkpoints" / "round-2" / "state.json").read_text())


def test_no_checkpoint(tmp_path):
    assert refusal(tmp_path) == f"{tmp_path} holds no checkpoint (no checkpoints/round-N); start it with `fedsim run`"
    (tmp_path / "checkpoints" / ".round-1.partial").mkdir(parents=True)
    assert "holds no checkpoint" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["adapter", "generator", "buffer"])
def test_damaged_and_missing_tensors_are_named_and_an_earlier_checkpoint_serves(saved, name, caplog):
    file = saved / "checkpoints" / "round-2" / f"{name}.safetensors"
    content = file.read_bytes()
    advice = "round-1 can't be read either; no valid checkpoint is left: restore one, or start a new run"
    earlier = saved / "checkpoints" / "round-1"
    for damage in (content[:-7], content[:-1] + bytes([content[-1] ^ 1]), None):
        file.unlink() if damage is None else file.write_bytes(damage)
        reason = f"{file} is {'missing' if damage is None else 'damaged or truncated'}"
        assert refusal(saved) == f"{reason}; {advice}"
        shutil.copytree(saved / "round-1", earlier, dirs_exist_ok=True)
        caplog.clear()
        assert loaded(saved).round_number == 1
        assert [record.getMessage() for record in caplog.records] == [
            f"passed over a checkpoint: {reason}",
            "the newest valid checkpoint is round-1",
        ]
        (earlier / "state.json").unlink()
    shutil.rmtree(earlier)
    assert refusal(saved) == f"{reason}; no valid checkpoint is left: restore one, or start a new run"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "{}",
        '{"schema": 2}',
        '{"schema": 2, "round": "2", "config": {}, "sha256": {}}',
        '{"schema": 2, "round": 2, "config": [], "sha256": {}}',
    ],
)
def test_a_damaged_document_is_named(saved, text):
    file = saved / "checkpoints" / "round-2" / "state.json"
    file.write_text(text)
    assert refusal(saved).startswith(f"{file} is damaged or missing")


def test_a_missing_document_is_named(saved):
    file = saved / "checkpoints" / "round-2" / "state.json"
    file.unlink()
    assert refusal(saved).startswith(f"{file} is damaged or missing")


def rewritten(saved, **changes) -> None:
    file = saved / "checkpoints" / "round-2" / "state.json"
    file.write_text(json.dumps(sealed(json.loads(file.read_text()) | changes)))


def test_another_schema_is_refused(saved):
    for schema in (1, 99):
        rewritten(saved, schema=schema)
        text = refusal(saved)
        assert f"checkpoint schema {schema}, this fedsim reads 2" in text
        assert "finish the run with the fedsim that began it, or start a new one" in text


def test_a_document_without_the_adapters_file_is_refused(saved):
    rewritten(saved, sha256={})
    assert "is damaged or missing" in refusal(saved)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rate=0.5", "training.learning_rate was 0.01, now 0.5"),
        ("experiment.seed=8", "experiment.seed was 7, now 8"),
        ("resources.block_size=4", "resources.block_size was 2, now 4"),
        ("federation.global_rounds=9", "federation.global_rounds was 4, now 9"),
        ("feda2v.generator_type=gan", "feda2v.generator_type was 'vae', now 'gan'"),
        ("model.heads={clip: [16]}", "model.adapters"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused_naming_the_key(saved, override, message):
    extra = ["model.adapters={clip: {preset: mlp, hidden: [16]}}"] if "heads" in override else []
    text = refusal(saved, override, *extra)
    assert text.startswith(f"{saved / 'checkpoints' / 'round-2'} belongs to another configuration: ")
    assert message in text


def test_a_sound_checkpoint_of_another_fedsim_is_not_passed_over(saved):
    shutil.copytree(saved / "round-1", saved / "checkpoints" / "round-1", dirs_exist_ok=True)
    rewritten(saved, schema=99)
    assert "checkpoint schema 99" in refusal(saved)


def test_a_changed_document_does_not_match_its_seal(saved):
    file = saved / "checkpoints" / "round-2" / "state.json"
    whole = file.read_text()
    for changes in ({"mlflow_run_id": "other"}, {"data_fingerprint": "x"}, {"bytes": {}}):
        file.write_text(json.dumps(json.loads(whole) | changes))
        assert "it doesn't match its own seal" in refusal(saved)
    document = json.loads(whole)
    del document["seal"], document["bytes"]  # as an earlier fedsim wrote it
    file.write_text(json.dumps(document))
    assert loaded(saved).round_number == 2


def test_several_other_keys_are_counted(saved):
    text = refusal(saved, "training.learning_rate=0.5", "training.batch_size=3", "data.test_share=0.3")
    assert "data.test_share was 0.2, now 0.3, and 2 more: training.batch_size, training.learning_rate" in text


@pytest.mark.parametrize(
    "override",
    [
        "resources.client_actors=3",
        "tracking.enabled=true",
        "experiment.name=other",
        "experiment.output_dir=elsewhere",
        "search.num_trials=3",
    ],
)
def test_keys_that_no_number_depends_on_may_change(saved, override):
    assert loaded(saved, override).round_number == 2


class Trap:
    """A pickle that leaves a trace when it is opened."""

    def __init__(self, trace) -> None:
        self.trace = trace

    def __reduce__(self):
        return type(self.trace).touch, (self.trace,)


def test_a_planted_pickle_is_never_opened(saved, tmp_path_factory):
    trace = tmp_path_factory.mktemp("trap") / "executed"
    folder = saved / "checkpoints" / "round-2"
    for name in ("evil.pt", "adapter.pt", "generator.pkl", "pytorch_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Trap(trace)))
    assert loaded(saved).round_number == 2
    # Even one in a tensor file's place, with a matching checksum.
    (folder / "adapter.safetensors").write_bytes(pickle.dumps(Trap(trace)))
    document = json.loads((folder / "state.json").read_text())
    checksum = hashlib.sha256((folder / "adapter.safetensors").read_bytes()).hexdigest()
    rewritten(saved, sha256=document["sha256"] | {"adapter.safetensors": checksum}, bytes={})
    assert "adapter.safetensors is not a readable safetensors file" in refusal(saved)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Trap(trace)))
    assert trace.exists(), "the trap itself must work"


def test_files_outside_of_the_checkpoint_are_not_read(saved, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "adapter.safetensors"
    shutil.copy(saved / "round-1" / "adapter.safetensors", outside)
    document = json.loads((saved / "checkpoints" / "round-2" / "state.json").read_text())
    planted = {str(outside): hashlib.sha256(outside.read_bytes()).hexdigest()}
    rewritten(saved, sha256={k: v for k, v in document["sha256"].items() if "adapter" not in k} | planted)
    assert "damaged" in refusal(saved)


def test_tensors_that_share_memory_are_saved_whole(tmp_path):
    whole = torch.arange(6.0)
    state = ServerState(1, {"a": whole[:3], "b": whole[3:], "c": whole})
    save_checkpoint(tmp_path, state, tiny_config(), mlflow_run_id=None)
    back, _ = load_checkpoint(tmp_path, tiny_config())
    assert {name: t.tolist() for name, t in back.adapter.items()} == {
        "a": [0, 1, 2],
        "b": [3, 4, 5],
        "c": [0, 1, 2, 3, 4, 5],
    }
    assert len(back.clients) == 0
    assert back.buffer is None


def test_saving_a_round_again_replaces_it(tmp_path):
    state = ServerState(1, {"a": torch.zeros(2)})
    save_checkpoint(tmp_path, state, tiny_config(), mlflow_run_id=None)
    save_checkpoint(tmp_path, replace(state, adapter={"a": torch.ones(2)}), tiny_config(), mlflow_run_id=None)
    assert load_checkpoint(tmp_path, tiny_config())[0].adapter["a"].tolist() == [1, 1]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["round-1"]
