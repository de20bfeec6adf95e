"""Free memory: the least of what the machine and every control group around the process leave."""

import psutil
import pytest

from sparsity import memory


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Lays out control groups: files by their paths, and the groups that the process is in."""
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 10_000}))

    def lay_out(own="", **files):
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name.replace("__", "/").replace("_DOT_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")

    return lay_out


def test_without_groups_the_machine_counts(groups):
    groups()
    assert memory.free_bytes() == 10_000


def test_limits_of_the_second_version(groups):
    groups(memory_DOT_max="5000", memory_DOT_high="max", memory_DOT_current="1500")
    assert memory.free_bytes() == 3500
    groups(memory_DOT_stat="anon 700\ninactive_file 500\nactive_file 1")
    assert memory.free_bytes() == 4000
    groups(memory_DOT_high="2000")
    assert memory.free_bytes() == 1000
    groups(memory_DOT_current="9000")
    assert memory.free_bytes() == 0


def test_limits_of_the_first_version(groups):
    groups(memory__memory_DOT_limit_in_bytes=2**63 - 4096, memory__memory_DOT_usage_in_bytes=7)
    assert memory.free_bytes() == 10_000
    groups(
        "5:cpu,cpuacct:/job\n4:memory:/slurm/job_1/step_0\n1:name=systemd:/init\n",
        memory__slurm__job_1__memory_DOT_limit_in_bytes=4000,
        memory__slurm__job_1__memory_DOT_usage_in_bytes=1000,
        memory__slurm__job_1__memory_DOT_stat="inactive_file 1\ntotal_inactive_file 300",
    )
    assert memory.free_bytes() == 3300


@pytest.mark.parametrize("own", ["0::/a/b/c\n", "0::/a/b\n", "0::/a\n"])
def test_groups_around_the_own_one_count(groups, own):
    groups(own, a__memory_DOT_max="6000", a__memory_DOT_current="2000", a__b__c__memory_DOT_max="max")
    assert memory.free_bytes() == 4000
    groups("0::/elsewhere\n")
    assert memory.free_bytes() == 10_000


def test_damaged_files_are_no_limits(groups):
    groups("nonsense\n0::/../..\n", memory_DOT_max="many", memory_DOT_current="?")
    assert memory.free_bytes() == 10_000
