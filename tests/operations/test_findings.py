"""Each odd state of a node is found, by its name, with what to do; an ordinary one is not."""

from dataclasses import replace

import draws
import pytest

from raptide.operations.findings import (
    judge_clocks,
    judge_node,
    judge_speeds,
    judge_versions,
)
from raptide.operations.gpus import Gpu, parse_dcgm, parse_gpus, parse_xids
from raptide.operations.nodes import NodeFacts, Room, node_facts

GB = 10**9

H100 = Gpu(0, "NVIDIA H100 80GB HBM3", "570.1", 81_559, 81_000, 0)

FIT = NodeFacts(
    host="worker",
    versions={"python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0", "cuda": "12.9"},
    gpus=[],
    xids=[],
    dcgm=[],
    shm=Room("/dev/shm", 60 * GB, 64 * GB),
    scratch=Room("/tmp", 300 * GB, 500 * GB),
    ray_files=Room("/tmp/ray", 300 * GB, 500 * GB),
    open_files=1_048_576,
    locked_bytes=65_536,
    has_wandb_key=False,
)

WITH_GPU = replace(FIT, gpus=[H100], locked_bytes=-1)


def found(facts, **settings):
    return list(judge_node("n", facts, **settings))


@pytest.mark.parametrize("facts", [FIT, WITH_GPU, replace(WITH_GPU, xids=[])])
def test_a_fit_node_has_no_findings(facts):
    assert found(facts, store_bytes=50 * GB) == []


@pytest.mark.parametrize(
    ("change", "level", "check", "words"),
    [
        ({"scratch": Room("/s", 3 * GB, 500 * GB)}, "error", "disk", ["/s", "3.0 GB", "TMPDIR"]),
        ({"ray_files": Room("/r", 90 * GB, 2000 * GB)}, "error", "disk", ["/r", "100 GB"]),
        ({"shm": Room("/dev/shm", GB // 16, GB // 16)}, "error", "shm", ["0.1 GB", "--shm-size"]),
        ({"open_files": 1024}, "warning", "ulimits", ["1,024", "ulimit -n 65536"]),
        ({"unreachable": ["10.0.0.9:6379"]}, "error", "ports", ["10.0.0.9:6379"]),
    ],
)
def test_what_a_node_lacks_is_found_with_the_remedy(change, level, check, words):
    (one,) = found(replace(FIT, **change), store_bytes=10 * GB)
    assert (one.level, one.node, one.check) == (level, "n", check)
    assert all(word in str(one) for word in words), one
    assert one.remedy


@pytest.mark.parametrize(
    ("change", "level", "check", "words"),
    [
        ({"gpus": [replace(H100, free_mib=40_000)]}, "warning", "gpu memory", ["40,000 of"]),
        ({"gpus": [replace(H100, uncorrected_ecc=4)]}, "error", "gpu ecc", ["GPU 0 has 4"]),
        ({"xids": [("0000:1b:00", 79)]}, "error", "gpu xid", ["Xid 79", "0000:1b:00"]),
        ({"xids": [("0000:1b:00", 13)]}, "warning", "gpu xid", ["Xid 13"]),
        ({"xids": None}, "warning", "gpu xid", ["dmesg_restrict"]),
        ({"dcgm": ["GPU 3 Warning NVLink"]}, "error", "gpu health", ["GPU 3 Warning"]),
        ({"locked_bytes": 65_536}, "warning", "ulimits", ["memlock"]),
    ],
)
def test_what_is_wrong_with_gpus_is_found(change, level, check, words):
    (one,) = found(replace(WITH_GPU, **change))
    assert (one.level, one.check) == (level, check)
    assert all(word in str(one) for word in words), one


def test_a_node_with_another_version_is_named_and_the_others_are_not():
    nodes = {f"n{i}": FIT for i in range(4)}
    assert list(judge_versions(nodes)) == []
    odd = f"n{draws.generator().integers(4)}"
    name = draws.generator().choice(list(FIT.versions))
    nodes[odd] = replace(FIT, versions={**FIT.versions, str(name): "0.0.1"})
    (one,) = judge_versions(nodes)
    assert (one.level, one.node, one.check) == ("error", odd, "versions")
    assert one.found.startswith(f"{name} is 0.0.1, and {FIT.versions[name]}")


def test_drivers_are_compared_among_nodes_with_gpus_alone():
    driver = {**FIT.versions, "driver": "570.1"}
    nodes = {"head": FIT, "a": replace(WITH_GPU, versions=driver)}
    nodes["b"] = nodes["c"] = nodes["a"]
    assert list(judge_versions(nodes)) == []
    nodes["b"] = replace(WITH_GPU, versions={**driver, "driver": "535.0"})
    assert [one.node for one in judge_versions(nodes)] == ["b"]


def slow(speeds, **kinds):
    kinds = dict.fromkeys(speeds, "H100") | kinds
    return list(judge_speeds(speeds, kinds, "sum", "GB/s", "mend it"))


def test_slow_nodes_are_named_against_the_others_of_their_kind():
    rng = draws.generator()
    speeds = {f"n{i}": float(each) for i, each in enumerate(rng.uniform(0.9, 1.1, 5))}
    assert slow(speeds) == []
    (one,) = slow(speeds | {"n3": 0.4})
    assert (one.node, one.level) == ("n3", "error")
    assert "0.4 GB/s" in one.found
    assert slow(speeds | {"n3": 0.4}, n3="A10") == []
    assert slow({"n0": 1.0}) == []
    assert [one.node for one in slow({"a": 1.0, "b": 0.5})] == ["b"]


def test_clocks_that_differ_are_named_with_their_direction():
    ahead, behind = judge_clocks({"a": 0.3, "b": 7.0, "c": -60.0})
    assert (ahead.node, behind.node) == ("b", "c")
    assert "7.0 s ahead" in ahead.found
    assert "60.0 s behind" in behind.found


SMI = """0, NVIDIA H100 80GB HBM3, 570.124.06, 81559, 81008, 0
1, NVIDIA H100 80GB HBM3, 570.124.06, 81559, 20480, 2
2, NVIDIA GeForce RTX 4090, 570.124.06, 24564, 24100, [N/A]
"""

DMESG = """usb 1-1: new device
NVRM: Xid (PCI:0000:1b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.
NVRM: Xid (PCI:0000:1b:00): 79, pid=12, name=python
NVRM: Xid (PCI:0000:3d:00): 13, pid=4711, Graphics Exception
"""

DCGM = """+---------------------------+----------------------------------------+
| Health Monitor Report                                              |
+===========================+========================================+
| Overall Health            | Warning                                |
| GPU 3                     | Warning  NVLink error counter rises    |
| GPU 4                     | Healthy                                |
+---------------------------+----------------------------------------+
"""


def test_what_the_tools_print_is_read():
    gpus = parse_gpus(SMI)
    assert [(gpu.index, gpu.free_mib, gpu.uncorrected_ecc) for gpu in gpus] == [
        (0, 81_008, 0),
        (1, 20_480, 2),
        (2, 24_100, 0),
    ]
    assert {gpu.driver for gpu in gpus} == {"570.124.06"}
    assert parse_xids(DMESG) == [("0000:1b:00", 79), ("0000:3d:00", 13)]
    assert parse_dcgm(DCGM) == [
        "Overall Health Warning",
        "GPU 3 Warning NVLink error counter rises",
    ]


def test_a_node_with_the_tools_tells_all_of_it(tmp_path, monkeypatch):
    for name, text in {"nvidia-smi": SMI, "dmesg": DMESG, "dcgmi": DCGM}.items():
        (tmp_path / f"{name}.txt").write_text(text)
        (tmp_path / name).write_text(f"#!/bin/sh\n/bin/cat {tmp_path}/{name}.txt\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    facts = node_facts(str(tmp_path), [("127.0.0.1", 1)])
    assert len(facts.gpus) == 3
    assert facts.versions["driver"] == "570.124.06"
    assert facts.has_wandb_key
    assert facts.unreachable == ["127.0.0.1:1"]
    checks = {one.check for one in judge_node("n", facts, disk_gb=0.0)}
    assert {"gpu memory", "gpu ecc", "gpu xid", "gpu health", "ports"} <= checks


def test_a_node_without_them_tells_the_rest(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    facts = node_facts(str(tmp_path / "not/yet/there"), [])
    assert (facts.gpus, facts.xids, facts.dcgm) == ([], [], [])
    assert facts.ray_files.total > 0
    assert "driver" not in facts.versions
