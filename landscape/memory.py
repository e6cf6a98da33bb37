"""How much memory a device has left."""

import torch


def free_memory(device: torch.device) -> int:
    """Return an estimate of the free bytes on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    free = 8 << 30
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) << 10 for line in file if "MemAvailable" in line)
        with (
            open("/sys/fs/cgroup/memory.max") as limit,
            open("/sys/fs/cgroup/memory.current") as now,
        ):
            free = min(free, int(limit.read()) - int(now.read()))
    except (OSError, ValueError, StopIteration):
        pass  # no such files, or no limit: keep what is known
    return max(free, 0)
