"""A merge on a Ray cluster of two nodes: the bytes of one process, whatever is lost on the way."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import acemerge
import acemerge.output.identity
from acemerge.engine import on_ray
from acemerge.engine.execute import Progress
from acemerge.errors import AcemergeError, ResourceError, UsageError
from acemerge.output.verify import verify
from attacks.merging import Case, snapshot
from attacks.ray_cluster import NODE, cluster_of, tasks_at_work


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one processor each; this process is connected to it, as a user's program may be."""
    import ray

    with cluster_of(2) as cluster:
        ray.init(cluster.address, log_to_driver=False)
        yield cluster
        ray.shutdown()


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A merge that takes some seconds, in four files."""
    return Case(tmp_path_factory.mktemp("long"), "ace", layers=48, side=160, shards=4)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def refused(case: Case, out: Path, *words: str, of: type[AcemergeError] = UsageError, **options: Any) -> None:
    with pytest.raises(of) as failure:
        case.merge(out, **options)
    assert all(word in str(failure.value) for word in words), str(failure.value)
    assert "\n" not in str(failure.value)


def _journals(out: Path) -> bool:
    """Whether a part has begun. A walk ends with no error where a folder vanishes under it."""
    return any(".acemerge.journal" in names for _, _, names in os.walk(out))


def run_of(folder: Path) -> str:
    run: str = json.loads((folder / "acemerge.json").read_text())["run"]
    return run


@contextlib.contextmanager
def watching(act: Callable[[psutil.Process], bool]) -> Iterator[list[int]]:
    """Show every task's process to `act`, until it has had enough; the numbers of those that it has seen."""
    seen: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            for process in tasks_at_work():
                seen.append(process.pid)
                if act(process):
                    return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("method", ["ace", "ties", "emr"])
def test_two_nodes_give_the_bytes_and_the_manifest_of_one_process_and_of_parts_by_hand(
    cluster: Any, tmp_path: Path, out: Path, method: str
) -> None:
    case, told = Case(tmp_path, method), list[Progress]()
    report = case.merge(out, ray=cluster.address, on_progress=told.append)
    case.check_output(out)
    verify(out)
    for number in (3, 1, 2):
        case.merge(tmp_path / "by-hand", shard=f"{number}/3")
    case.merge(tmp_path / "by-hand", finish=True)
    assert run_of(out) == run_of(tmp_path / "by-hand") == run_of(tmp_path / "reference")
    assert (report.part, report.was_complete) == (None, False)
    last = told[-1]
    assert (last.stage, last.done, last.share) == ("merge", last.total, pytest.approx(1))
    assert (last.total, last.bytes_done) == (len(report.tensors), last.bytes_total)
    assert [now.done for now in told if now.stage == "merge"] == sorted(
        now.done for now in told if now.stage == "merge"
    )


def test_a_finished_run_is_found_complete(cluster: Any, tmp_path: Path, out: Path) -> None:
    case = Case(tmp_path, "average")
    case.merge(out, ray=cluster.address)
    assert case.merge(out, ray=cluster.address, resume=True).was_complete
    refused(case, out, "holds a finished merge", ray=cluster.address)
    case.merge_earlier(other := tmp_path / "other")
    case.merge(other, ray=cluster.address, overwrite=True)
    case.check_output(other)


def test_a_part_whose_process_is_killed_goes_on(cluster: Any, long: Case, out: Path) -> None:
    def kill(process: psutil.Process) -> bool:
        process.kill()
        return True

    with watching(kill) as killed:
        long.merge(out, ray=cluster.address)
    assert killed
    long.check_output(out)


def test_what_is_lost_again_and_again_is_one_line_and_goes_on_without_ray(cluster: Any, long: Case, out: Path) -> None:
    def kill(process: psutil.Process) -> bool:
        if _journals(out):
            process.kill()
        return False

    with watching(kill) as killed:
        refused(long, out, "was lost 3 times", "--resume", of=ResourceError, ray=cluster.address)
    assert len(set(killed)) >= 3
    assert not (out / "acemerge.json").exists()
    refused(long, out, "holds parts of an unfinished merge", "--resume", ray=cluster.address)
    long.merge(out, resume=True)
    long.check_output(out)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.torture)])
def test_a_signal_leaves_what_goes_on(cluster: Any, long: Case, out: Path, number: signal.Signals) -> None:
    """The command line, with a driver of its own; gone on with on the cluster, and by one process."""
    words = ["merge", "--base", str(long.base), *(word for e in long.experts for word in ("--expert", str(e)))]
    words += ["-o", str(out), "--ray", cluster.address, "--max-shard-size", long.options["max_shard_size"]]
    process = subprocess.Popen(
        [sys.executable, "-m", "acemerge", *words, "--method", "ace"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while process.poll() is None and not _journals(out):
        time.sleep(0.01)
    process.send_signal(number)
    said, errors = process.communicate(timeout=300)
    what, code = {signal.SIGINT: ("interrupted", 130), signal.SIGTERM: ("terminated", 143)}[number]
    assert process.returncode == code, errors
    assert errors.startswith(f"acemerge: error: {what}: nothing unfinished was published")
    assert (errors.count("\n"), said) == (1, "")
    assert not tasks_at_work()
    long.merge(out, resume=True, **({"ray": cluster.address} if number == signal.SIGINT else {}))
    long.check_output(out)


def test_nodes_with_other_versions_are_named_before_any_work(
    cluster: Any, tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, known = Case(tmp_path, "average"), acemerge.output.identity.versions()
    monkeypatch.setattr(acemerge.output.identity, "versions", lambda: {**known, "torch": "1.0"})
    told = f"on node {node_address()} (", f'version torch is "{known["torch"]}" and not "1.0", on node '
    refused(case, out, "its nodes do not go together", *told, ray=cluster.address)
    assert not out.exists()


@pytest.mark.torture  # the start of a node may take long
def test_a_node_with_another_processor_is_named(cluster: Any, tmp_path: Path, out: Path) -> None:
    case = Case(tmp_path, "average")
    node = cluster.add_node(**NODE, env_vars={"MKL_CBWR": "COMPATIBLE"})
    try:
        refused(case, out, "its nodes do not go together", "on node", "MKL_CBWR", ray=cluster.address)
        assert not out.exists()
    finally:
        cluster.remove_node(node)


def test_a_model_that_nodes_do_not_see_is_named_by_node(cluster: Any, tmp_path: Path, out: Path) -> None:
    case = Case(tmp_path, "average")
    descriptor = os.open(case.base, os.O_RDONLY)  # a folder that only this process has by this name
    case.base = Path(f"/proc/self/fd/{descriptor}")
    try:
        refused(
            case, out, "its nodes do not go together", f"node {node_address()}", str(case.base), ray=cluster.address
        )
    finally:
        os.close(descriptor)
    assert not out.exists()


def node_address() -> str:
    import ray

    address: str = ray.nodes()[0]["NodeManagerAddress"]
    return address


def test_an_error_in_a_part_is_the_error_of_the_merge_and_leaves_nothing(cluster: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    case, out = Case(tmp_path, "average"), tmp_path / "out"
    file = sorted(case.experts[1].glob("*.safetensors"))[0]
    tensors = load_file(file)
    tensors["layers.0.weight"][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(AcemergeError) as failure:
        case.merge(out, ray=cluster.address)
    with pytest.raises(type(failure.value)) as here:
        case.merge(out)
    assert here.value.what == failure.value.what
    assert "part " in str(failure.value)
    assert not out.exists()


def test_more_threads_than_any_node_has_are_refused(cluster: Any, tmp_path: Path, out: Path, two_threads: None) -> None:
    case = Case(tmp_path, "average")
    told = "none of its nodes, 2, has room for a task: 2 CPUs", "; set OMP_NUM_THREADS=1, or add nodes"
    refused(case, out, *told, ray=cluster.address)
    torch.set_num_threads(1)  # what it says
    case.merge(out, ray=cluster.address)
    case.check_output(out)


def test_a_gpu_that_no_node_has_is_refused(cluster: Any, tmp_path: Path, out: Path) -> None:
    case = Case(tmp_path, "average")
    refused(case, out, "and a GPU; use --device cpu, or add nodes", ray=cluster.address, device="cuda")
    case.merge(out, ray=cluster.address, device="cpu")
    case.check_output(out)


@pytest.mark.parametrize(
    ("node", "cure"),
    [
        ({"CPU": 4, "memory": 2e9}, "give --max-memory 1850000000, or add nodes"),
        ({"CPU": 1, "memory": 2e9}, "set OMP_NUM_THREADS=1 and give --max-memory 1850000000, or add nodes"),
        ({"CPU": 4, "memory": 6e8}, "add nodes that have as much"),  # of which the merge takes more in any case
        ({"memory": 4e9}, "add nodes that have as much"),
    ],
)
def test_what_makes_room_for_a_task_is_named(node: dict[str, float], cure: str) -> None:
    need = on_ray.Need(threads=2, memory=3_000_000_000, gpu=False)
    assert on_ray.cure_of(need, [{"Resources": node}], least=1_000_000_000) == cure


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ray": "nonsense"}, ["--ray: 'nonsense' is no Ray cluster; write HOST:PORT"]),
        ({"ray": "ray://127.0.0.1:10001"}, ["is no Ray cluster"]),
        ({"ray": "auto", "shard": "1/3"}, ["--ray auto: does not go with --shard"]),
        ({"ray": "auto", "finish": True}, ["--ray auto: does not go with --finish"]),
        ({"ray": "auto", "device": "cuda:0"}, ["--device cuda:0", "use cpu, cuda or auto"]),
        ({"ray": "auto", "as_lora": 2}, ["--ray auto: an adapter (--as-lora) is one file"]),
        ({"ray": "auto", "method": "fisher", "calibration": "tasks.yaml"}, ["fisher measures the experts on data"]),
    ],
)
def test_what_ray_cannot_do_is_refused(case: Case, options: dict[str, Any], words: list[str]) -> None:
    refused(case, case.folder / "out", *words, **options)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("case"), "average")


@pytest.mark.torture
def test_a_node_that_is_lost_when_the_merge_begins_is_left_out(cluster: Any, case: Case, out: Path) -> None:
    """Ray lists it until it misses its heartbeats."""
    node = cluster.add_node(**NODE)
    cluster.remove_node(node, allow_graceful=False)
    case.merge(out, ray=cluster.address)
    case.check_output(out)


def test_a_merge_that_is_not_done_in_parts_is_left_to_one_process(cluster: Any, case: Case, out: Path) -> None:
    out.mkdir()
    (out / ".acemerge.journal").write_text("")
    before = snapshot(out)
    refused(case, out, "not done in parts", "--resume alone", ray=cluster.address, resume=True)
    assert snapshot(out) == before


def test_without_ray_the_extra_is_named(case: Case, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    refused(case, out, "--ray local: ray is not installed; pip install 'acemerge[ray]'", ray="local")


def test_a_ray_that_is_too_old_is_named(case: Case, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "__version__", "2.40.0")
    told = "--ray local: ray 2.40.0 is older than 2.55; pip install --upgrade 'acemerge[ray]', on every machine"
    refused(case, out, told, ray="local")


def _said_alone(case: Case, out: Path, address: str, before: str = "") -> str:
    """What a merge says in a process of its own, as this one is connected already; `before` is run first."""
    words = ["merge", "--base", case.base, "--expert", case.experts[0], "-o", out, "--ray", address]
    code = f"{before}\nfrom acemerge.__main__ import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_where_no_cluster_is_that_is_said(case: Case, out: Path) -> None:
    said = _said_alone(case, out, "127.0.0.1:1")
    assert said.startswith("acemerge: error: --ray 127.0.0.1:1: no cluster is there: ")


def test_what_answers_and_is_no_cluster_is_not_waited_for(case: Case, out: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        said = _said_alone(case, out, f"127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
    assert "what answers there is no cluster's head; begin one by `ray start --head`" in said


def test_a_cluster_that_wants_a_token_is_told_apart(case: Case, out: Path) -> None:
    """As `ray start` makes one wherever the user has a token, and clients with an address send none."""
    failing = """
import ray
def init(*_, **__):
    raise ConnectionError("Failed to connect") from RuntimeError("Unauthenticated: RPC error: InvalidAuthToken: ...")
ray.init = init
"""
    said = _said_alone(case, out, "auto", failing)
    assert "the cluster wants Ray's token, and none or another one was given; set RAY_AUTH_MODE=token" in said


@pytest.fixture
def head() -> Iterator[tuple[str, psutil.Process]]:
    """A cluster of one node that no other test has: its address and its head's process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is too long a path for Ray's sockets
        words = ["start", "--head", "--block", f"--port={address.rpartition(':')[2]}", "--num-cpus=1"]
        words += [f"--object-store-memory={80 << 20}", "--include-dashboard=false", f"--temp-dir={folder}"]
        code = "from ray.scripts.scripts import main; main()"
        environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
        cluster = subprocess.Popen(
            [sys.executable, "-c", code, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
        )
        own = psutil.Process(cluster.pid)
        try:
            yield address, _begun(own, "gcs_server", "raylet")
        finally:
            for process in [*own.children(recursive=True), own]:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            cluster.wait()


def _begun(cluster: psutil.Process, *names: str) -> psutil.Process:
    """The first process of these names when all are there."""
    for _ in range(1200):
        found = {process.name(): process for process in cluster.children(recursive=True)}
        if found.keys() >= set(names):
            return found[names[0]]
        time.sleep(0.1)
    raise TimeoutError(f"no {' and '.join(names)} after two minutes")


@pytest.mark.torture  # half a minute of waiting
def test_a_head_that_is_lost_is_one_line_and_the_merge_goes_on_without_it(
    head: tuple[str, psutil.Process], long: Case, out: Path
) -> None:
    address, process = head
    words = ["merge", "--base", str(long.base), *(word for e in long.experts for word in ("--expert", str(e)))]
    words += ["-o", str(out), "--ray", address, "--max-shard-size", long.options["max_shard_size"], "--method", "ace"]
    merge = subprocess.Popen(
        [sys.executable, "-m", "acemerge", *words],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"RAY_AUTH_MODE": "disabled"},
    )
    while merge.poll() is None and not ((working := tasks_at_work()) and _journals(out)):
        time.sleep(0.01)
    process.kill()
    for task in working:
        task.suspend()  # else it would be done before anybody misses the head
    _, errors = merge.communicate(timeout=300)
    assert merge.returncode == 4, errors
    assert errors.startswith(f"acemerge: error: --ray {address}: the cluster's head has not answered for ")
    assert errors.endswith("; begin it again, then go on with --resume\n")
    long.merge(out, resume=True)
    long.check_output(out)


def test_a_cluster_of_another_version_is_told_apart(cluster: Any, case: Case, out: Path) -> None:
    said = _said_alone(case, out, cluster.address, "import ray; ray.__version__ = '2.59.0'")
    assert "the cluster has Ray 2." in said
    assert "here is Ray 2.59.0 and Python 3." in said
    assert "; install what the cluster has of Ray and Python here, too" in said


def test_one_module_imports_ray() -> None:
    source = Path(acemerge.__file__).parent
    found = [
        file for file in source.rglob("*.py") if re.search(r"^\s*(import|from) ray\b", file.read_text(), re.MULTILINE)
    ]
    assert found == [source / "engine/ray_connection.py"]
