"""A disk that is full in mid-write: one line, exit code 2, the last checkpoint good, nothing half read."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_resume import NONE
from worlds import SERVER_STEP, tiny_config

from fedsim.cli import session
from fedsim.config import resolved_yaml
from fedsim.errors import ResourceError
from fedsim.federation.checkpoint import load_checkpoint
from fedsim.federation.checkpoint_files import checkpoints_of
from fedsim.federation.run_directory import writing

ROUNDS = ("federation.global_rounds=12", "experiment.checkpoint_every=1", "experiment.keep_last=null")
KINDS = {"server step": (*SERVER_STEP, *ROUNDS), "clients keep": (*NONE, *ROUNDS)}


class Disk:
    """A tmpfs of its own, which can be made smaller and larger."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.call("mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder))

    @staticmethod
    def call(*words: str) -> None:
        subprocess.run(words, check=True, capture_output=True, timeout=30)

    def size(self, kilobytes: int) -> None:
        self.call("mount", "-o", f"remount,size={kilobytes}k", str(self.folder))

    def close(self) -> None:
        self.call("umount", "-l", str(self.folder))


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("a disk of its own takes root and mount")
    try:
        made = Disk(tmp_path / "disk")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this system doesn't let root mount a tmpfs: {error.stderr.decode().strip()}")
    try:
        yield made
    finally:
        made.close()


def start(*words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "fedsim", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.fixture(scope="module", params=KINDS)
def whole(request, tmp_path_factory):
    """An undisturbed run: its overrides, its configuration file, its digest, and how much it takes on a disk."""
    folder = tmp_path_factory.mktemp("whole")
    config = tiny_config(*KINDS[request.param], f"data.cache_dir={folder / 'cache'}")
    (folder / "config.yaml").write_text(resolved_yaml(config))
    result = session.run(config, output=folder / "run")
    blocks = sum(-(-path.stat().st_size // 4096) * 4 + 4 for path in (folder / "run").rglob("*"))
    return config, folder / "config.yaml", result["digest"], blocks


@pytest.mark.slow
@pytest.mark.chaos
def test_a_full_disk_ends_a_run_in_one_line_and_a_resume_has_the_same_digest(whole, disk):
    config, file, digest, kilobytes = whole
    run_dir, ended = disk.folder / "run", {}
    for share in (0.3, 0.6, 0.85):
        disk.size(int(share * kilobytes))
        code, out, err = finish(start("run", str(file), "--output", str(run_dir)))
        if code == 0:  # only a picture was missing
            assert "could not be drawn" in out
            assert f"digest {digest}" in out
        else:
            assert (code, err.count("\n")) == (2, 1), (share, out, err)
            assert err.startswith("error: can't write "), err
            assert "No space left on device" in err
            state, _ = load_checkpoint(run_dir, config)
            assert checkpoints_of(run_dir)[0].name == f"round-{state.round_number}", "the newest one is whole"
            ended[share] = state.round_number
        disk.size(65536)
        assert session.resume(run_dir)["digest"] == digest
        shutil.rmtree(run_dir)
    print(f"full disk: ended and resumed after rounds {ended}")
    assert len(set(ended.values())) > 1


LIMITED = """
import resource, sys
from fedsim.cli import main
size = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
sys.argv[0] = "fedsim"
main()
"""


@pytest.mark.slow
@pytest.mark.chaos
def test_a_file_that_may_not_grow_is_like_a_full_disk(whole, tmp_path):
    _, file, digest, _ = whole
    run_dir, ends = tmp_path / "run", []
    for size in (1_000, 5_000, 12_000):
        command = [sys.executable, "-c", LIMITED, str(size), "run", str(file), "--output", str(run_dir)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if done.returncode == 0:
            assert json.loads((run_dir / "result.json").read_text())["digest"] == digest
        else:
            assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
            assert done.stderr.startswith("error: can't write "), done.stderr
            if (run_dir / "config.yaml").exists():
                assert session.resume(run_dir)["digest"] == digest
        ends.append(done.returncode)
        shutil.rmtree(run_dir, ignore_errors=True)
    assert 2 in ends


def test_a_plot_that_can_not_be_written_is_a_warning(tmp_path, caplog):
    run_dir = tmp_path / "run"
    config = tiny_config("federation.global_rounds=1")
    whole = session.run(config, output=run_dir)
    (run_dir / "result.json").unlink()
    shutil.rmtree(run_dir / "plots")
    (run_dir / "plots").write_text("a file in the way, true for root too")
    again = session.resume(run_dir)
    assert again["digest"] == whole["digest"]
    assert "plots of" in caplog.text
    assert "could not be drawn" in caplog.text


def test_what_is_not_about_the_disk_passes(tmp_path):
    with pytest.raises(KeyError), writing(tmp_path):
        raise KeyError
    message = r"can't write to .*: Input/output error; make room, then `fedsim resume"
    with pytest.raises(ResourceError, match=message), writing(tmp_path):
        raise OSError(5, "Input/output error")
