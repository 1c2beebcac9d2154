"""What a user can get wrong: each ends in one line that helps, exit code 2, and nothing written."""

import csv
import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fedsim.cli import main
from fedsim.errors import DataError
from fedsim.models.guarded_files import sealed

TINY = {
    "experiment": {"name": "tiny", "checkpoint_every": 1},
    "data": {"name": "synthetic", "clips_per_class": 4, "classes": ["dog", "rain", "rooster"]},
    "federation": {"num_clients": 2, "global_rounds": 1, "partition": "iid"},
    "model": {
        "heads": {"clip": [8]},
        "audio_encoder": {"name": "logmel", "segments": 1, "dim": 16},
        "text_encoder": {"name": "seeded"},
        "adapters": {"clip": {"preset": "mlp", "hidden": [8]}},
    },
    "feda2v": {"adapter_aggregation_mode": "weighted"},
    "resources": {"client_actors": 0},
    "tracking": {"enabled": False},
}


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Run a command in an empty folder; returns (exit code, lines on stderr)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))

    def call(*words: str) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["fedsim", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        code = stop.value.code
        return (code if isinstance(code, int) else int(code is not None)), capsys.readouterr().err.splitlines()

    return call


def refused(answer: tuple[int, list[str]], *parts: str) -> None:
    """Exit code 2 and one line that holds all parts."""
    code, lines = answer
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0], lines[0]


def run_tiny(cli, *sets: str, output: str = "out") -> tuple[int, list[str]]:
    return cli("run", "tiny.json", "--output", output, *(word for text in sets for word in ("--set", text)))


def write_sounds(folder: Path, rows: list[dict[str, str]]) -> Path:
    """A manifest and a second of noise for each of its files."""
    noise = np.random.default_rng(0).normal(0, 0.1, (len(rows), 8000)).astype(np.float32)
    for row, wave in zip(rows, noise, strict=True):
        soundfile.write(folder / row["path"], wave, 16000)
    with (folder / "manifest.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "manifest.csv"


def labelled(count: int, test_labels: tuple[str, ...] = ("a", "b")) -> list[dict[str, str]]:
    rows = []
    for label in ("a", "b"):
        for number in range(count):
            split = "test" if number == 0 and label in test_labels else "train"
            rows.append({"path": f"{label}{number}.wav", "label": label, "split": split})
    return rows


def test_a_good_run_exits_with_0(cli, tmp_path):
    code, _ = run_tiny(cli)
    assert code == 0
    assert json.loads((tmp_path / "out" / "result.json").read_text())["rounds"] == 1


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("federation.num_client=3", ("num_client", "federation.num_clients")),
        ("training.learning_rate=fast", ("training.learning_rate", "fast", "number")),
        ("feda2v.generator_type=vea", ("feda2v.generator_type", "vea", "vae")),
        ("resources.block_size=6", ("resources.block_size", "power of two")),
        ("federation.cohort_size=5", ("federation.cohort_size", "5", "2")),
        ("data={name: esc50, path: /nowhere}", ("/nowhere", "ESC-50")),
        ("federation={partition: classes_per_client, classes_per_client: 9, num_clients: 2}", ("9", "3")),
        ("federation.num_clients=500", ("500",)),
        ("data.classes=[dog, rian]", ("rian", "rain")),
        ("model.adapters.clip.hidden=[]", ("hidden",)),
        ("model={heads: {encoder: [8]}, adapters: {}}", ("model.heads", "'encoder'")),
        ("experiment.name=../evil", ("experiment.name", "../evil")),
        ('experiment.name="a\\0b"', ("experiment.name",)),
        ("feda2v.generator_hidden_dim=100000000", ("generator_hidden_dim", "65536")),
        ("tracking={enabled: true, uri: 'sqlite:////tmp'}", ("/tmp", "folder")),
        ("model.audio_encoder={name: yamnet, path: nowhere.npz}", ("nowhere.npz",)),
        ("model.audio_encoder={name: logmel, trainable: all}", ("trainable", "logmel")),
        ("feda2v={global_model_train: true}", ()),
    ],
)
def test_wrong_values(cli, tmp_path, override, parts):
    extra = ["privacy.min_count=100"] if "global_model_train" in override else []
    parts = parts or ("no statistics from clients", "privacy.min_count (100)")
    refused(run_tiny(cli, override, *extra), *parts)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["tiny.json"]


def test_no_such_file(cli):
    refused(cli("run", "nowhere.yaml"), "nowhere.yaml")


def test_a_file_that_is_no_configuration(cli, tmp_path):
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    refused(cli("run", "list.yaml"), "list.yaml", "sections")


def test_unreadable_audio_is_named_or_skipped(cli, tmp_path):
    manifest = write_sounds(tmp_path, labelled(6))
    (tmp_path / "a3.wav").write_bytes(b"RIFF this is no sound")
    settings = [f"data={{name: csv, path: {manifest}}}"]
    refused(run_tiny(cli, *settings), "a3.wav")
    assert not (tmp_path / "out").exists()
    code, _ = run_tiny(cli, f"data={{name: csv, path: {manifest}, on_bad_audio: skip}}")
    assert code == 0


def test_a_class_without_a_test_recording(cli, tmp_path):
    manifest = write_sounds(tmp_path, labelled(4, test_labels=("a",)))
    refused(run_tiny(cli, f"data={{name: csv, path: {manifest}}}"), "'b'", "test")


@pytest.mark.parametrize(("head", "parts"), [("[8]", ("clip", "8", "12")), ("[3, 16]", ())])
def test_a_table_wider_than_the_head(cli, tmp_path, head, parts):
    np.savez(
        tmp_path / "table.npz", names=np.array(["dog", "rain", "rooster"]), vectors=np.eye(3, 12, dtype=np.float32)
    )
    table = "model.text_encoder={name: table, path: table.npz}"
    answer = run_tiny(cli, table, f"model.heads={{clip: {head}}}")
    if parts:
        refused(answer, "head dimensions", *parts)
    else:
        assert answer[0] == 0


def test_a_table_without_a_class(cli, tmp_path):
    np.savez(tmp_path / "table.npz", names=np.array(["dog", "rain"]), vectors=np.eye(2, 4, dtype=np.float32))
    refused(run_tiny(cli, "model.text_encoder={name: table, path: table.npz}"), "rooster", "table.npz")


@pytest.mark.ray
def test_more_gpus_than_ray_has(cli, tmp_path):
    sets = ["resources={client_actors: 3, client_gpus: 0.5, client_cpus: 0, server_gpus: 1, num_cpus: 2, num_gpus: 2}"]
    refused(run_tiny(cli, *sets), "2.5 GPU", "2 free", "client_gpus")
    assert not (tmp_path / "out").exists()


def test_output_that_cant_be_written(cli, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(run_tiny(cli, output="file/run"), "file/run")
    refused(run_tiny(cli, output="file"), "already exists")
    assert (tmp_path / "file").read_text() == "mine"
    if Path("/proc/version").exists():
        refused(run_tiny(cli, output="/proc/fedsim"), "/proc/fedsim")


def test_a_finished_run_is_not_written_over(cli, tmp_path):
    assert run_tiny(cli)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    refused(run_tiny(cli), "already exists", "resume")
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_resuming_what_cant_be_resumed(cli, tmp_path):
    refused(cli("resume", "nowhere"), "nowhere", "config.yaml")
    assert run_tiny(cli, "federation.global_rounds=2")[0] == 0
    run_dir = tmp_path / "out"
    (run_dir / "result.json").unlink()
    shutil.copytree(run_dir, tmp_path / "other")
    config = (tmp_path / "other" / "config.yaml").read_text()
    (tmp_path / "other" / "config.yaml").write_text(config.replace("local_epochs: 1", "local_epochs: 2"))
    refused(cli("resume", "other"), "another configuration", "federation.local_epochs was 1, now 2")
    tensors = run_dir / "checkpoints" / "round-2" / "adapter.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-10])
    shutil.copytree(run_dir, tmp_path / "damaged")
    assert cli("resume", "out")[0] == 0  # an earlier one serves
    shutil.rmtree(tmp_path / "damaged" / "checkpoints" / "round-1")
    refused(cli("resume", "damaged"), "adapter.safetensors", "truncated")


def test_a_planted_pickle_is_never_loaded(cli, tmp_path):
    assert run_tiny(cli)[0] == 0
    (tmp_path / "out" / "result.json").unlink()
    folder = tmp_path / "out" / "checkpoints" / "round-1"
    state = json.loads((folder / "state.json").read_text())
    state["sha256"]["evil.pkl"] = "0" * 64
    (folder / "state.json").write_text(json.dumps(sealed(state)))
    (folder / "evil.pkl").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    refused(cli("resume", "out"), "evil.pkl")
    assert not (tmp_path / "pwned").exists()


def test_comparing_what_is_no_run(cli, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(cli("compare", "empty"), "empty")


def test_explaining_an_unknown_key(cli):
    refused(cli("config", "--explain", "training.learning_rat"), "training.learning_rate")


def test_a_message_is_one_line_whatever_it_quotes():
    error = DataError("no column 'path'; known: a\x1cb\n\u2028c\ud800" + "x" * 9000)
    assert str(error).startswith(r"no column 'path'; known: a\x1cb\n\u2028c\ud800xxx")
    assert len(str(error).splitlines()) == 1
    assert len(str(error)) < 5000
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
