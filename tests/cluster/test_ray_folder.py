"""Folders of private Rays: those of killed processes go with the next start, all others stay."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fedsim
from fedsim.cluster import ray_folder
from fedsim.cluster.ray_folder import make_ray_folder, remove_dead_folders

ROOT = Path(fedsim.__file__).parents[1]
OWNER = """
import sys
from pathlib import Path
from fedsim.cluster import ray_folder
ray_folder._parent = lambda: Path(sys.argv[1])
folder = ray_folder.make_ray_folder()
(folder.path / "session_1" / "logs").mkdir(parents=True)
(folder.path / "session_1" / "logs" / "raylet.out").write_text("x")
(folder.path / "session_latest").symlink_to(folder.path / "session_1")
print(folder.path, flush=True)
sys.stdin.read()
"""


def owner_of_a_folder(parent: Path) -> tuple[subprocess.Popen, Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
    )
    return process, Path(process.stdout.readline().strip())


def test_a_folder_goes_when_its_process_was_killed_and_not_before(tmp_path):
    process, folder = owner_of_a_folder(tmp_path)
    try:
        assert remove_dead_folders(tmp_path) == []
        assert (folder / "session_1" / "logs" / "raylet.out").is_file()
    finally:
        process.kill()
        process.communicate()
    assert remove_dead_folders(tmp_path) == [folder]
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_known_to_be_ours_and_dead_stays(tmp_path):
    (tmp_path / "fs-without").mkdir()
    (tmp_path / "fs-file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "owner").write_text("1")
    (tmp_path / "fs-link").symlink_to(tmp_path / "other")
    (tmp_path / "fs-linked").mkdir()
    (tmp_path / "fs-linked" / "owner").symlink_to(tmp_path / "other" / "owner")
    assert remove_dead_folders(tmp_path) == []
    assert len(list(tmp_path.iterdir())) == 5
    assert (tmp_path / "other" / "owner").is_file()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to make another user's folder")
def test_the_folder_of_another_user_stays(tmp_path):
    folder = tmp_path / "fs-theirs"
    folder.mkdir()
    (folder / "owner").write_text("1")
    os.chown(folder, 12345, 12345)
    assert remove_dead_folders(tmp_path) == []
    os.chown(folder, 0, 0)
    assert remove_dead_folders(tmp_path) == [folder]


def test_a_folder_that_is_done_with_leaves_neither_files_nor_descriptors(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_folder, "_parent", lambda: tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        folder = make_ray_folder()
        assert remove_dead_folders() == []
        folder.remove()
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_is_written_while_it_is_removed_is_left_for_the_next_start(tmp_path, monkeypatch):
    folder = tmp_path / "fs-dying"
    (folder / "session_1").mkdir(parents=True)
    (folder / "owner").write_text("1")
    remove = ray_folder.shutil.rmtree

    def and_write_again(path):
        remove(path)
        (folder / "raylet.out").write_text("x")

    monkeypatch.setattr(ray_folder.shutil, "rmtree", and_write_again)
    assert remove_dead_folders(tmp_path) == []
    assert (folder / "owner").is_file()
    assert remove_dead_folders(tmp_path) == [folder]
