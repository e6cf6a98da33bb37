import pytest
import torch

from landscape import memory


@pytest.mark.parametrize(
    ("limit", "free"), [("max", 6000 << 10), ("5000", 5000 - 4000 + 1500), ("2000", 0)]
)
def test_free_memory_is_that_of_the_container_without_files_that_can_be_forgotten(
    tmp_path, monkeypatch, limit, free
):
    files = {
        "meminfo": "MemTotal: 9000 kB\nMemAvailable: 6000 kB\n",
        "memory.max": f"{limit}\n",
        "memory.current": "4000\n",
        "memory.stat": "anon 2000\nfile 2000\ninactive_file 1500\nactive_file 500\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.free_memory(torch.device("cpu")) == free
