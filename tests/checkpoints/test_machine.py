"""What the system says of memory, of a system that is made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from acemerge.checkpoints.machine import folder_in_memory, free_memory

MOST = 9223372036854771712  # what the older control groups say where there is no limit


def _written(system: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (system / name).parent.mkdir(parents=True, exist_ok=True)
        (system / name).write_text(text)
    return system


def _group(place: str, most: object, used: int, cache: str) -> dict[str, str]:
    names = ("limit_in_bytes", "usage_in_bytes") if place.startswith("sys/fs/cgroup/memory") else ("max", "current")
    return {f"{place}/memory.{name}": f"{n}\n" for name, n in zip(names, (most, used), strict=True)} | {
        f"{place}/memory.stat": cache
    }


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({"proc/self/cgroup": "0::/\n"}, 8_000_000 << 10),
        ({"proc/self/cgroup": "0::/job/step\n", **_group("sys/fs/cgroup/job/step", "max", 5, "")}, 8_000_000 << 10),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n0::/job/step\n",
                **_group("sys/fs/cgroup/job/step", "max", 700, "anon 9\n"),
                **_group("sys/fs/cgroup/job", 1000, 700, "anon 9\nactive_file 30\ninactive_file 20\nshmem 400\n"),
            },
            350,
        ),
        (
            {
                "proc/self/cgroup": "4:memory,hugetlb:/job\n0::/\n",
                **_group("sys/fs/cgroup/memory/job", 2000, 900, "active_file 5\ntotal_active_file 50\n"),
                **_group("sys/fs/cgroup/memory", MOST, 9000, ""),
            },
            1150,
        ),
        (  # within a container the folder is the group's own, under another name
            {"proc/self/cgroup": "0::/../far/away\n", **_group("sys/fs/cgroup", 100, 300, "")},
            0,
        ),
    ],
    ids=["no groups", "no limit", "unified", "of the controller", "container"],
)
def test_free_memory_is_what_the_control_groups_leave(tmp_path: Path, groups: dict[str, str], expected: int) -> None:
    memory = {"proc/meminfo": "MemTotal: 9000000 kB\nMemAvailable:   8000000 kB\n"}
    assert free_memory(_written(tmp_path, groups | memory)) == expected


def test_a_system_that_says_nothing_has_no_folder_in_memory(tmp_path: Path) -> None:
    assert free_memory(tmp_path) is None
    assert folder_in_memory(tmp_path) is None
    _written(tmp_path, {"proc/self/mounts": "/dev/vda /dev/shm ext4 rw 0 0\ntmpfs /run tmpfs rw 0 0\n"})
    assert folder_in_memory(tmp_path) is None
