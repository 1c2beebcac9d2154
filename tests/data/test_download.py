"""Fetching ESC-50, from a server on this machine."""

import functools
import http.server
import threading
import zipfile

import numpy as np
import pytest
import soundfile

from fedsim.data import open_recordings
from fedsim.data.download import fetch_esc50
from fedsim.errors import DataError


@pytest.fixture
def server(tmp_path):
    """A server of a small archive in the layout of ESC-50; yields (url of the folder, requests seen)."""
    site, seen = tmp_path / "site", []
    site.mkdir()
    rows = ["filename,fold,target,category,esc10,src_file,take"]
    with zipfile.ZipFile(site / "esc.zip", "w") as bundle:
        for number in range(20):
            name = f"{1 + number // 10}-{number}-A-{number % 10}.wav"
            soundfile.write(tmp_path / name, np.random.default_rng(number).normal(0, 0.1, 4410), 44100)
            bundle.write(tmp_path / name, f"ESC-50-master/audio/{name}")
            rows.append(f"{name},{1 + number // 10},{number % 10},class{number % 10},True,{number},A")
        bundle.writestr("ESC-50-master/meta/esc50.csv", "\n".join(rows) + "\n")
        bundle.writestr("ESC-50-master/../../evil.wav", "x")
        bundle.writestr("ESC-50-master/tests/test_dataset.py", "x")
    with zipfile.ZipFile(site / "other.zip", "w") as bundle:
        bundle.writestr("README.md", "x")
    (site / "broken.zip").write_bytes((site / "esc.zip").read_bytes()[:500])

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            seen.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=site)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", seen
        server.shutdown()
        thread.join()


def test_it_is_fetched_once_and_opens(server, tmp_path):
    url, seen = server
    steps = []
    folder = fetch_esc50(tmp_path / "cache", url=f"{url}/esc.zip", progress=lambda *step: steps.append(step))
    assert steps[-1][0] == steps[-1][1] == (tmp_path / "site" / "esc.zip").stat().st_size
    recordings = open_recordings("esc10", path=str(folder), classes=None, clips_per_class=2, seed=0)
    assert len(recordings) == 20
    assert not list(tmp_path.rglob("evil.wav"))
    assert not (folder / "tests").exists()
    assert fetch_esc50(tmp_path / "cache", url=f"{url}/esc.zip") == folder
    assert len(seen) == 1
    assert sorted(p.name for p in folder.parent.iterdir()) == ["ESC-50", "ESC-50.lock"]


@pytest.mark.parametrize("name", ["other.zip", "broken.zip", "missing.zip"])
def test_what_is_not_esc50_is_refused(server, tmp_path, name):
    with pytest.raises(DataError, match=name):
        fetch_esc50(tmp_path / "cache", url=f"{server[0]}/{name}")
    assert not (tmp_path / "cache" / "datasets" / "ESC-50").exists()


def test_no_network_is_one_line(tmp_path):
    with pytest.raises(DataError, match=r"set data\.path to its folder"):
        fetch_esc50(tmp_path, url="http://127.0.0.1:9/esc.zip")
