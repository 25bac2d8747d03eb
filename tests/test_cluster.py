"""Which processes a run has, from what launchers leave in the environment; alone where nothing does."""

import os
import re
import socket
import threading

import jax
import pytest

from input_pipeline.errors import UserError
from navit_jax import cluster, distributed, peers

LAUNCHERS = ("OMPI_", "PMIX_", "SLURM_", "TPU_", "MEGASCALE_", "JAX_COORDINATOR", "CUDA_VISIBLE")


@pytest.fixture
def environment(monkeypatch):
    """Sets variables in an environment without a launcher, a TPU or a network."""
    for name in list(os.environ):
        if name.startswith(LAUNCHERS):
            monkeypatch.delenv(name)
    monkeypatch.setattr(cluster, "_has_tpu", lambda: False)
    monkeypatch.setattr(cluster.glob, "glob", lambda pattern: [])
    return lambda **given: [monkeypatch.setenv(name, str(value)) for name, value in given.items()]


def slurm(nodes="gpu[003-004,007]", tasks=8, per_node="4(x2)", index=5, local=1, node=1):
    return dict(
        SLURM_JOB_ID=123456,
        SLURM_STEP_NODELIST=nodes,
        SLURM_NTASKS=tasks,
        SLURM_STEP_NUM_TASKS=tasks,
        SLURM_STEP_TASKS_PER_NODE=per_node,
        SLURM_PROCID=index,
        SLURM_LOCALID=local,
        SLURM_NODEID=node,
    )


def mpi(size=4, rank=2, local=0, local_size=2, **more):
    ours = dict(
        OMPI_COMM_WORLD_SIZE=size,
        OMPI_COMM_WORLD_RANK=rank,
        OMPI_COMM_WORLD_LOCAL_RANK=local,
        OMPI_COMM_WORLD_LOCAL_SIZE=local_size,
    )
    return ours | more


OPEN_MPI_4 = dict(OMPI_MCA_orte_hnp_uri="1531576320.0;tcp://10.96.0.1,10.148.0.1:34911")


def test_a_laptop_is_alone_and_asks_nobody(environment, monkeypatch):
    def asked(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "create_connection", asked)
    monkeypatch.setattr(socket, "getaddrinfo", asked)
    monkeypatch.setattr(jax.distributed, "initialize", asked)
    threads = threading.active_count()
    assert cluster.find() is None and cluster.find("", 1, 0) is None
    with distributed.session():
        pass
    assert threading.active_count() == threads


@pytest.mark.parametrize(
    "given",
    [
        dict(SLURM_JOB_ID=1, SLURM_NTASKS=8, SLURM_PROCID=0, SLURM_LOCALID=0),  # the script of sbatch
        slurm() | dict(SLURM_STEP_NUM_TASKS=1, SLURM_PROCID=0),  # a shell in an allocation of 8 tasks
        slurm(tasks=1, per_node="1", index=0, local=0, node=0),
        mpi(1, 0),
        mpi(1, 0, **slurm(), **OPEN_MPI_4),
    ],
)
def test_one_process_under_a_launcher_is_alone(given, environment):
    environment(**given)
    assert cluster.find() is None


@pytest.mark.parametrize(
    "given, visible, wanted",
    [
        (slurm(), "0,1,2,3", ("gpu003", 8, 5, [1])),
        (slurm("a,b", 2, "1(x2)", 1, 0), "0,1,2,3", ("a", 2, 1, [])),  # one a node takes all of its GPUs
        (slurm(), "0", ("gpu003", 8, 5, [])),  # --gpus-per-task: it sees its own alone
        (slurm("node7", 2, "2", 1, 1, 0), "0,1,2,3,4,5,6,7", ("node7", 2, 1, [4, 5, 6, 7])),
        (slurm("n[1-3]", 7, "2(x2),3", 6, 2, 2), "0,1,2", ("n1", 7, 6, [2])),
        (mpi(**OPEN_MPI_4), "0,1", ("10.96.0.1", 4, 2, [0])),
        (mpi(**OPEN_MPI_4, **slurm()), "0,1", ("10.96.0.1", 4, 2, [0])),
        (mpi(2, 1, 1, 2, PMIX_NAMESPACE="prterun-host-77@1"), "", ("127.0.0.1", 2, 1, [])),
    ],
)
def test_launchers(given, visible, wanted, environment):
    environment(**given, CUDA_VISIBLE_DEVICES=visible)
    found = cluster.find()
    host, port = found.coordinator.split(":")
    assert (host, *found[1:4]) == wanted and 1024 < int(port) < 65536
    assert cluster.find("10.0.0.9:77").coordinator == "10.0.0.9:77"
    assert cluster.find("10.0.0.9:77")[1:] == found[1:]


@pytest.fixture
def tpu(environment, monkeypatch):
    """A TPU host whose metadata server answers `metadata`."""
    from jax._src.clusters import cloud_tpu_cluster

    metadata = {}

    def ask(key):
        if not metadata:
            raise ConnectionError("no metadata server")
        return metadata.get(key, ""), 200 if key in metadata else 404

    monkeypatch.setattr(cluster, "_has_tpu", lambda: True)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", ask)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "10.0.0.1")
    return metadata


def test_tpu_pod(tpu):
    tpu |= {
        "agent-worker-number": "3",
        "worker-network-endpoints": "a:1:10.0.0.1,b:1:10.0.0.2,c:1:10.0.0.3,d:1:10.0.0.4",
    }
    assert cluster.find() == ("10.0.0.1:8482", 4, 3, [], "the TPU pod")
    tpu |= {"agent-worker-number": "0", "worker-network-endpoints": "a:1:10.0.0.1"}
    assert cluster.find() is None


def test_tpu_on_gke(tpu, environment):
    tpu["tpu-env"] = ""
    environment(TPU_WORKER_HOSTNAMES="run-0.run,run-1.run,run-2.run", TPU_WORKER_ID=2)
    assert cluster.find() == ("run-0.run:8482", 3, 2, [], "the TPU pod")
    environment(MEGASCALE_NUM_SLICES=2, MEGASCALE_SLICE_ID=1, MEGASCALE_COORDINATOR_ADDRESS="first:8080")
    assert cluster.find()[:3] == ("first:8482", 6, 5)
    environment(TPU_WORKER_HOSTNAMES="localhost", MEGASCALE_NUM_SLICES=1)
    assert cluster.find() is None


def test_a_tpu_host_without_metadata_says_how_to_name_the_run(tpu):
    with pytest.raises(UserError, match="no metadata server.*--num_processes=1 --process_id=0"):
        cluster.find()


@pytest.mark.parametrize("platforms, chips", [("cpu", True), ("cuda,cpu", True), ("tpu,cpu", True), (None, False)])
def test_chips_count_only_where_jax_may_use_them(platforms, chips, monkeypatch):
    monkeypatch.setattr(cluster.glob, "glob", lambda pattern: ["/dev/accel0"] if chips else [])
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if platforms:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert cluster._has_tpu() == (chips and platforms == "tpu,cpu")


@pytest.mark.parametrize(
    "flags, message",
    [
        (("host:1", 2, -1), "--process_id from 0 to N-1, both given"),
        (("host:1", -1, 0), "--num_processes=N of 1 or more"),
        (("host:1", 2, 2), "from 0 to N-1"),
        (("", 2, 0), "need --coordinator=HOST:PORT"),
        (("host", 2, 0), "expected HOST:PORT"),
        (("host:99999", 2, 0), "expected HOST:PORT"),
        (("host:1", -1, -1), "says how many processes there are"),
    ],
)
def test_flags_that_do_not_fit_together(flags, message, environment):
    with pytest.raises(UserError, match=re.escape(message)):
        cluster.find(*flags)


@pytest.mark.parametrize(
    "given, message",
    [
        (slurm() | dict(SLURM_PROCID="x"), "SLURM_PROCID is 'x'"),
        (mpi(4, 2, PMIX_NAMESPACE="n"), "does not say where process 0 is"),
    ],
)
def test_an_environment_that_lacks_something(given, message, environment):
    environment(**given)
    with pytest.raises(UserError, match=message):
        cluster.find()


def test_what_jax_is_told(environment, monkeypatch):
    told = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: told.update(options))
    monkeypatch.setattr(distributed.rendezvous, "meet", lambda *place: told.update(place=place) or ([], 4321))
    monkeypatch.setattr(distributed, "Peers", lambda *args: None)
    environment(**slurm(), CUDA_VISIBLE_DEVICES="0,1,2,3")
    distributed.initialize(timeout=7)
    assert told["place"][1:] == (8, 5, 7) and told["place"][0].startswith("gpu003:")
    assert told["coordinator_address"] == "gpu003:4321" and told["coordinator_bind_address"] == "[::]:4321"
    assert (told["num_processes"], told["process_id"], told["local_device_ids"]) == (8, 5, [1])
    assert peers.SILENCE < told["heartbeat_timeout_seconds"] <= 20
    distributed.initialize("127.0.0.1:9", 2, 1)
    assert told["coordinator_bind_address"] == "127.0.0.1:4321" and told["local_device_ids"] is None
