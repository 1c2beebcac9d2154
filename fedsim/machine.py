"""What this process may use of the machine: cores and memory under affinity, control groups and Slurm.

A container, a Slurm job or a systemd slice sees all cores and all memory of its host, and is slowed down or killed when
it uses them. Everything in fedsim that counts cores or memory asks here. GPUs need nothing: torch and Ray count those
of CUDA_VISIBLE_DEVICES, which Slurm and containers set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

UNLIMITED = 1 << 60
"""Version 1 of control groups writes a number near 2^63 where there is no limit."""


def usable_cores(root: Path = Path("/"), environ: Mapping[str, str] | None = None) -> float:
    """Cores that this process may use: the least of its affinity, the quotas of its control groups and Slurm's share.

    In a Slurm job the share is SLURM_CPUS_PER_TASK where the job asks for it, else SLURM_CPUS_ON_NODE. A quota may be a
    fraction.

    Args:
        root: folder that holds proc/ and sys/.
        environ: environment variables (default: this process's).
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([float(affinity), *_quotas(root), *_slurm_share(os.environ if environ is None else environ)])


def whole_cores() -> int:
    """`usable_cores` for those who count in whole ones: at least one."""
    return max(1, int(usable_cores()))


def memory_limit(root: Path = Path("/")) -> int | None:
    """Bytes that the control groups of this process leave it; None where they set no limit.

    Args:
        root: folder that holds proc/ and sys/.
    """
    found = [_number(folder / name) for folder in _groups(root, "memory") for name in _MEMORY]
    limits = [int(limit) for limit in found if limit is not None and 0 < limit < UNLIMITED]
    return min(limits, default=None)


def usable_memory(root: Path = Path("/")) -> int:
    """Bytes of the machine's memory, or of the control groups' limit where that is less."""
    import psutil

    total = int(psutil.virtual_memory().total)
    return min(total, memory_limit(root) or total)


_MEMORY = ("memory.max", "memory.limit_in_bytes")


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control group and of all above it, of version 2 and of version 1's controller.

    Inside a container the path that the kernel tells may be the host's; its own group is then the top folder.
    """
    top = root / "sys" / "fs" / "cgroup"
    yield from (top, top / controller)
    try:
        lines = (root / "proc" / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        base = top / controllers if controllers and (top / controllers).is_dir() else top
        base = top / controller if controllers and base == top else base
        parts = [part for part in path.split("/") if part and part != ".."]
        yield from (base.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1))


def _quotas(root: Path) -> list[float]:
    quotas = []
    for folder in _groups(root, "cpu"):
        words = _words(folder / "cpu.max")
        if len(words) == 2 and words[0] != "max":
            quotas.append(float(words[0]) / float(words[1]))
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if quota is not None and period and quota > 0:
            quotas.append(quota / period)
    return [quota for quota in quotas if quota > 0]


def _slurm_share(environ: Mapping[str, str]) -> list[float]:
    if "SLURM_JOB_ID" not in environ:
        return []
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        if environ.get(name, "").isdecimal() and int(environ[name]) > 0:
            return [float(environ[name])]
    return []


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except (OSError, UnicodeDecodeError):
        return []


def _number(path: Path) -> float | None:
    words = _words(path)
    try:
        return float(words[0])
    except (ValueError, IndexError):
        return None
