"""How much memory a device has left."""

from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")  # of a container


def free_memory(device: torch.device) -> int:
    """Return an estimate of the free bytes on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    free = 8 << 30
    try:
        free = _entry(_MEMINFO, "MemAvailable:") << 10
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        # Files that were read and can be forgotten count as used there.
        free = min(free, limit - used + _entry(_CGROUP / "memory.stat", "inactive_file"))
    except (OSError, ValueError, KeyError):
        pass  # no such files, or no limit: keep what is known
    return max(free, 0)


def _entry(file: Path, name: str) -> int:
    """Return a number of a file with a name and a number a line."""
    lines = (line.split() for line in file.read_text().splitlines())
    return int({first: number for first, number, *_ in lines}[name])
