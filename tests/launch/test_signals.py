"""Ctrl-C and SIGTERM, sent to real runs: once ends cleanly with a checkpoint and a line, twice at once."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "federation"))

from worlds import OWN_GENERATORS, SERVER_STEP, tiny_config

from fedsim.cli import session
from fedsim.config import resolved_yaml
from fedsim.federation.checkpoint_files import checkpoints_of, round_of
from fedsim.federation.run_directory import read_history
from fedsim.tracking.calls import open_client
from fedsim.tracking.mlflow_tracker import MlflowTracker

ROUNDS = 12
# Checkpoints are far apart: the one that a stop leaves is its own.
CONFIG = (
    *SERVER_STEP,
    f"federation.global_rounds={ROUNDS}",
    "federation.local_epochs=30",
    "experiment.checkpoint_every=100",
)
ACTORS = ("resources.client_actors=2", "resources.num_cpus=2")
CODES = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> str:
    return session.run(tiny_config(*CONFIG), output=tmp_path_factory.mktemp("runs") / "whole")["digest"]


@contextmanager
def running(tmp_path: Path, *overrides: str, rounds: int) -> Iterator[subprocess.Popen]:
    """A run in a process group of its own, as a terminal makes it, after some rounds."""
    (tmp_path / "config.yaml").write_text(resolved_yaml(tiny_config(*CONFIG, *overrides)))
    hidden = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-m", "fedsim", "run", "config.yaml", "--output", "run"],
        cwd=tmp_path,
        env={**hidden, "PYTHONPATH": str(Path(session.__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell without job control starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        end = time.monotonic() + 240
        while rounds and len(read_history(tmp_path / "run")) < rounds:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end, "the rounds didn't come"
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.communicate()


def last_line(run_dir: Path) -> str:
    done = round_of(checkpoints_of(run_dir)[0])
    return f"warning: stopped after round {done} of {ROUNDS}; go on with `fedsim resume run`"


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.parametrize(("number", "code"), CODES)
@pytest.mark.parametrize("actors", [(), pytest.param(ACTORS, marks=pytest.mark.ray)], ids=["in process", "actors"])
def test_one_signal_keeps_the_last_finished_round(undisturbed, tmp_path, number, code, actors):
    run_dir = tmp_path / "run"
    with running(tmp_path, *actors, rounds=3) as process:
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # a terminal sends it to every process of the group
        else:
            process.send_signal(number)
        out, err = process.communicate(timeout=90)
    assert process.returncode == code, out + err
    assert last_line(run_dir) in out.splitlines()
    assert "Traceback" not in out + err
    finished = len(read_history(run_dir))
    assert [round_of(folder) for folder in checkpoints_of(run_dir)] == [finished]
    assert 3 <= finished < ROUNDS
    assert {path.name for path in run_dir.iterdir()} == {"config.yaml", "metrics.jsonl", "checkpoints"}
    text = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(text.replace("client_actors: 2", "client_actors: 0"))
    assert session.resume(run_dir)["digest"] == undisturbed
    assert [record["round"] for record in read_history(run_dir)] == list(range(1, ROUNDS + 1))


@pytest.mark.slow
@pytest.mark.parametrize("actors", [(), pytest.param(ACTORS, marks=pytest.mark.ray)], ids=["in process", "actors"])
def test_an_interrupted_run_is_killed_in_mlflow(tmp_path, actors):
    with running(tmp_path, *actors, "tracking.enabled=true", rounds=2) as process:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=90)
    assert process.returncode == 143, out + err
    run_id, uri = MlflowTracker(tmp_path / "run").address()
    assert open_client(uri).get_run(run_id).info.status == "KILLED"


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.parametrize(("number", "code"), CODES)
def test_two_signals_end_at_once_and_what_is_left_can_be_resumed(undisturbed, tmp_path, number, code):
    # One thread that can't be interrupted for minutes: a clean end would wait for it.
    with running(tmp_path, "experiment.checkpoint_every=1", "federation.local_epochs=30", rounds=2) as process:
        process.send_signal(number)
        process.send_signal(number)
        began = time.monotonic()
        out, err = process.communicate(timeout=60)
    assert process.returncode == code, out + err
    assert time.monotonic() - began < 15
    text = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(text)
    assert session.resume(tmp_path / "run")["digest"] == undisturbed


SLOW_END = """
import signal, sys, time
from fedsim.launch.signals import ended_by_signals
with ended_by_signals():
    try:
        print("ready", flush=True)
        time.sleep(600)
    finally:
        print("ending", flush=True)
        end = time.monotonic() + 600
        while time.monotonic() < end:
            time.sleep(0.1)
"""


@pytest.mark.parametrize(("first", "second", "code"), [
    (signal.SIGINT, signal.SIGINT, 130), (signal.SIGTERM, signal.SIGTERM, 143), (signal.SIGTERM, signal.SIGINT, 143),
])  # fmt: skip
def test_the_second_signal_does_not_wait_for_a_clean_end(first, second, code):
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_END],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(first)
        assert process.stdout.readline() == "ending\n"
        process.send_signal(second)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, err) == (code, "stopped at once\n")


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("generators", [(), OWN_GENERATORS], ids=["adapters", "generators"])
def test_blocks_under_way_are_left_at_their_next_step(tmp_path, threads, generators):
    # Each block would train for minutes: the adapter's steps, or those of a network of its own.
    long = ("federation.local_epochs=1", "feda2v.generator_epochs=1000000") if generators else ()
    config = ("federation.local_epochs=20000", "tracking.plots=false", *generators, *long)
    with running(tmp_path, *config, f"resources.num_cpus={threads}", rounds=0) as process:
        end = time.monotonic() + 120
        while not (tmp_path / "run" / "config.yaml").is_file():
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(4)
        assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        out, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 15  # with the end of the interpreter, which takes seconds on a busy machine
    assert process.returncode == 143, out + err
    assert "Traceback" not in out + err


@pytest.mark.slow
def test_a_signal_before_the_first_round_leaves_nothing(tmp_path):
    with running(tmp_path, "federation.local_epochs=2000", rounds=0) as process:
        end = time.monotonic() + 120
        while not (tmp_path / "run" / "config.yaml").is_file():
            assert time.monotonic() < end
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=90)
    assert process.returncode == 143, out + err
    assert "warning: stopped before a round was finished: nothing is kept" in out.splitlines()
    assert not (tmp_path / "run").exists()


class Swallowing(logging.Handler):
    """A library that catches everything, in whose midst a signal comes."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if "held out" in record.getMessage():
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)
        except:  # noqa: E722
            self.swallowed = True


@pytest.mark.parametrize("threads", [1, 2])
def test_a_signal_that_a_library_swallows_still_ends_the_run(tmp_path, threads):
    library, logger = Swallowing(), logging.getLogger("fedsim")
    logger.handlers = [library]
    logger.setLevel(logging.INFO)
    config = tiny_config("federation.local_epochs=1000000", f"resources.num_cpus={threads}")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as error:
        session.run(config, output=tmp_path / "run")
    assert (error.value.code, library.swallowed) == (143, True)
    assert not (tmp_path / "run").exists()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_a_round_under_way_is_abandoned_bit_for_bit(tmp_path):
    # The signal comes at every place where the server tells of its progress.
    from fedsim.launch.session import open_experiment

    config = tiny_config(*SERVER_STEP, "experiment.checkpoint_every=100", "federation.global_rounds=2")
    setup = session.prepare_with_bar(config, session.Console(quiet=True))
    whole = session.run(config, output=tmp_path / "whole")
    steps: list[str] = []

    def count(status) -> None:
        steps.append(json.dumps(status, default=str))

    with open_experiment(setup, _made(tmp_path / "count"), status=count) as experiment:
        experiment.round(), experiment.round()
    total, half = len(steps), len(steps) // 2
    for place in range(half + 1, total + 1, 3):
        run_dir, seen = _made(tmp_path / str(place)), []

        def interrupt(status, seen=seen, place=place) -> None:
            seen.append(status)
            if len(seen) == place:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), open_experiment(setup, run_dir, status=interrupt) as experiment:
            experiment.round(), experiment.round()
        assert [folder.name for folder in checkpoints_of(run_dir)] == ["round-1"]
        (run_dir / "config.yaml").write_text(resolved_yaml(config))
        assert session.resume(run_dir)["digest"] == whole["digest"]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
