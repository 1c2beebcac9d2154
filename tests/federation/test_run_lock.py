"""One process per run directory: the second is refused by name, a dead one's lock is taken over."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from worlds import tiny_config

from fedsim.cli import session
from fedsim.errors import ConfigError, FedsimError
from fedsim.federation.run_lock import locked

HOLDER = """
import sys, time
from pathlib import Path
from fedsim.federation.run_lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds a run directory."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def refusal(action) -> str:
    with pytest.raises(FedsimError) as caught:
        action()
    return str(caught.value)


@pytest.mark.slow
def test_a_second_process_is_refused_by_name_and_changes_nothing(holder, tmp_path):
    run_dir = tmp_path / "run"
    message = (
        f"{run_dir} is in use by process {holder.pid} on {socket.gethostname()}: wait until it ends, or choose another "
        "run directory"
    )
    assert refusal(lambda: session.run(tiny_config(), output=run_dir)) == message
    (run_dir / "config.yaml").write_text("{}")
    before = {path: path.read_bytes() for path in run_dir.iterdir()}
    assert refusal(lambda: session.resume(run_dir)) == message
    assert refusal(lambda: session.run(tiny_config(), output=run_dir)) == message
    assert {path: path.read_bytes() for path in run_dir.iterdir()} == before
    command = [sys.executable, "-m", "fedsim", "resume", str(run_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (2, f"error: {message}\n")


def test_a_dead_processs_lock_is_taken_over_and_that_is_said(holder, tmp_path, caplog):
    run_dir = tmp_path / "run"
    holder.kill()
    holder.wait()
    assert (run_dir / ".lock").is_file()
    for _ in range(2):
        with locked(run_dir):
            written = json.loads((run_dir / ".lock").read_text())
            assert written == {"pid": os.getpid(), "host": socket.gethostname()}
        assert list(run_dir.iterdir()) == []
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        f"{run_dir} was left locked by process {holder.pid} on {socket.gethostname()}, which is gone: taken over"
    ]


def test_a_run_begins_where_a_dead_one_left_nothing_but_its_lock(holder, tmp_path):
    holder.kill()
    holder.wait()
    result = session.run(tiny_config("federation.global_rounds=1"), output=tmp_path / "run")
    assert result["rounds"] == 1
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[1]", b'{"pid": "x"}', b'{"pid": {}, "host": 3}', b"9" * 5000])
def test_whatever_is_in_the_file_only_the_lock_counts(tmp_path, content):
    (tmp_path / ".lock").write_bytes(content)
    with locked(tmp_path):
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on "), locked(tmp_path):
            pass
        assert (tmp_path / ".lock").exists(), "a refused process leaves the holder's file alone"
    assert list(tmp_path.iterdir()) == []


def test_it_goes_with_an_error(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "run"):
        raise KeyError
    assert list((tmp_path / "run").iterdir()) == []


def test_other_peoples_folders_are_not_written_into(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    changed = tmp_path.stat().st_mtime_ns
    assert "already exists and isn't empty" in refusal(lambda: session.run(tiny_config(), output=tmp_path))
    assert tmp_path.stat().st_mtime_ns == changed


RACER = """
import sys, time
from pathlib import Path
from fedsim.errors import ConfigError
from fedsim.federation.run_lock import locked
folder, trace = Path(sys.argv[1]), Path(sys.argv[2])
entered = 0
end = time.monotonic() + 2
while time.monotonic() < end:
    try:
        with locked(folder):
            inside = trace.read_text()
            trace.write_text(inside + "x")
            assert trace.read_text() == inside + "x", "two at a time"
            trace.write_text(inside)
            entered += 1
    except ConfigError:
        pass
print(entered)
"""


@pytest.mark.slow
def test_many_that_come_and_go_are_never_two_at_a_time(tmp_path):
    (tmp_path / "trace").write_text("")
    command = [sys.executable, "-c", RACER, str(tmp_path / "run"), str(tmp_path / "trace")]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [racer.communicate(timeout=60)[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    assert sum(map(int, answers)) > 10
    assert (tmp_path / "trace").read_text() == ""
    assert Path(tmp_path / "run").is_dir()
