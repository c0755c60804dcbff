"""Cluster discovery: from the environment of a process to its index, and the errors of a wrong environment."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.errors import raises
from tests.processes import run_python
from trainer.cluster.discovery import ALONE, Cluster, discover
from trainer.errors import ConfigError

JOB = {"JOB_NAME": "flowers", "SERVICE_NAME": "flowers-peers"}
JOBSET = {"JOBSET_NAME": "pets", "REPLICATED_JOB_NAME": "workers"}
TWO = {"worker": ["a:2222", "b:2222"]}
FIRST = {"type": "worker", "index": 0}


def tf_config(cluster: Any, task: Any = None) -> dict[str, str]:
    """TF_CONFIG as Kubeflow writes it, which includes `environment`."""
    tree = {"cluster": cluster, "environment": "cloud"} | ({} if task is None else {"task": task})
    return {"TF_CONFIG": json.dumps(tree)}


def kubeflow_pod(index: int) -> dict[str, str]:
    cluster = {"worker": ["w0.ns.svc:2222", "w1.ns.svc:2222", "w2.ns.svc:2222"], "chief": ["c0.ns.svc:2222"]}
    return tf_config(cluster, {"type": "worker", "index": index - 1} if index else {"type": "chief", "index": 0})


def indexed_job_pod(index: int) -> dict[str, str]:
    return JOB | {"WORKER_COUNT": "4", "JOB_COMPLETION_INDEX": str(index)}


def jobset_pod(index: int) -> dict[str, str]:
    job, pod = divmod(index, 2)
    numbers = {"JOB_INDEX": job, "REPLICATED_JOB_REPLICAS": 2, "JOB_COMPLETION_INDEX": pod, "WORKER_COUNT": 4}
    return JOBSET | {name: str(number) for name, number in numbers.items()}


ADDRESSES: dict[Callable[[int], dict[str, str]], tuple[str, ...]] = {
    kubeflow_pod: ("c0.ns.svc:2222", "w0.ns.svc:2222", "w1.ns.svc:2222", "w2.ns.svc:2222"),
    indexed_job_pod: tuple(f"flowers-{i}.flowers-peers:2222" for i in range(4)),
    jobset_pod: tuple(f"pets-workers-{job}-{pod}.pets:2222" for job in range(2) for pod in range(2)),
}
every_source = pytest.mark.parametrize("pod", ADDRESSES, ids=lambda pod: pod.__name__)


@every_source
def test_all_workers_of_a_job_see_the_same_cluster(pod: Callable[[int], dict[str, str]]) -> None:
    clusters = [discover(pod(i)) for i in range(4)]
    assert [cluster.index for cluster in clusters] == [0, 1, 2, 3]
    assert [cluster.is_chief for cluster in clusters] == [True, False, False, False]
    assert {cluster.addresses for cluster in clusters} == {ADDRESSES[pod]}
    assert {cluster.size for cluster in clusters} == {4}
    assert len({(cluster.source, cluster.job) for cluster in clusters}) == 1


@every_source
def test_discovery_of_the_own_tf_config_gives_the_same_cluster(pod: Callable[[int], dict[str, str]]) -> None:
    for i in range(4):
        here = discover(pod(i))
        again = discover(pod(i) | {"TF_CONFIG": here.tf_config()})
        assert (again.index, again.addresses, again.source) == (i, ADDRESSES[pod], "TF_CONFIG")


@every_source
def test_tensorflow_reads_tf_config(pod: Callable[[int], dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    for i in range(4):
        monkeypatch.setenv("TF_CONFIG", discover(pod(i)).tf_config())
        resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
        spec = resolver.cluster_spec()
        assert (resolver.task_type, resolver.task_id) == ("worker", i)
        assert spec.jobs == ["worker"]
        assert spec.num_tasks("worker") == 4
        assert tuple(spec.job_tasks("worker")) == ADDRESSES[pod]


def test_tensorflow_reads_a_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    monkeypatch.setenv("TF_CONFIG", discover({}).tf_config())
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    assert not resolver.cluster_spec()
    assert discover({"TF_CONFIG": discover({}).tf_config()}) == discover({})


TF = "TF_CONFIG"
SECOND = {"type": "worker", "index": 1}


def by_tf_config(index: int, *addresses: str) -> Cluster:
    return Cluster(index, addresses, TF, ",".join(addresses))


WORKERS = [
    (tf_config(TWO, FIRST), by_tf_config(0, "a:2222", "b:2222")),
    (tf_config({"worker": ["a:1", "b:1"], "master": ["m:1"]}, SECOND), by_tf_config(2, "m:1", "a:1", "b:1")),
    (tf_config({"chief": ["c:1"], "worker": ["a:1"], "evaluator": ["e:1"], "ps": []}, FIRST), by_tf_config(1, "c:1", "a:1")),
    (tf_config({"worker": ["[::1]:1", "10.0.0.2:65535"], "chief": []}, FIRST), by_tf_config(0, "[::1]:1", "10.0.0.2:65535")),
    (JOB | {"WORKER_COUNT": "2", "JOB_COMPLETION_INDEX": "1", "WORKER_PORT": "7000"},
     Cluster(1, ("flowers-0.flowers-peers:7000", "flowers-1.flowers-peers:7000"), "Indexed Job flowers", "flowers")),
    (JOB | {"WORKER_COUNT": " 2\n", "JOB_COMPLETION_INDEX": "0", "SERVICE_NAME": "p.ns.svc.cluster.local"},
     Cluster(0, tuple(f"flowers-{i}.p.ns.svc.cluster.local:2222" for i in range(2)), "Indexed Job flowers", "flowers")),
    (JOBSET | {"WORKER_COUNT": "2", "JOB_COMPLETION_INDEX": "1"},
     Cluster(1, ("pets-workers-0-0.pets:2222", "pets-workers-0-1.pets:2222"), "JobSet pets", "pets-workers")),
    (JOBSET | {"WORKER_COUNT": "2", "REPLICATED_JOB_REPLICAS": "2", "JOB_INDEX": "1", "JOB_COMPLETION_INDEX": "0"}
     | {"SERVICE_NAME": "net", "WORKER_PORT": "7000", "JOB_NAME": "pets-workers-1"},
     Cluster(1, ("pets-workers-0-0.net:7000", "pets-workers-1-0.net:7000"), "JobSet pets", "pets-workers")),
]  # fmt: skip


@pytest.mark.parametrize(("environment", "cluster"), WORKERS)
def test_a_worker_among_others(environment: dict[str, str], cluster: Cluster) -> None:
    assert discover(environment) == cluster


@pytest.mark.parametrize(
    ("environment", "source", "job"),
    [
        ({}, ALONE, ""),
        ({"PATH": "/bin", "JOB_NAME": "nightly", "SERVICE_NAME": "x"}, ALONE, ""),
        ({"TF_CONFIG": " "}, ALONE, ""),
        ({"TF_CONFIG": "{}"}, ALONE, ""),
        ({"TF_CONFIG": '{"task": {"type": "worker", "index": 0}}'}, ALONE, ""),
        (tf_config({}, FIRST), ALONE, ""),
        (tf_config({"worker": ["a:1"]}, FIRST), "TF_CONFIG", "a:1"),
        (tf_config({"chief": ["a:1"]}, {"type": "chief", "index": 0}), "TF_CONFIG", "a:1"),
        ({"JOB_COMPLETION_INDEX": "0"}, ALONE, ""),
        ({"WORKER_COUNT": "1"}, ALONE, ""),
        ({"WORKER_COUNT": "1", "JOB_COMPLETION_INDEX": "0", "JOB_NAME": "flowers"}, "Indexed Job flowers", "flowers"),
        (JOBSET | {"WORKER_COUNT": "1", "JOB_COMPLETION_INDEX": "0"}, "JobSet pets", "pets-workers"),
        (JOBSET | {"JOB_COMPLETION_INDEX": "0"}, ALONE, ""),
        (dict.fromkeys(("WORKER_COUNT", "JOB_COMPLETION_INDEX", "JOBSET_NAME", "WORKER_PORT"), ""), ALONE, ""),
    ],
)
def test_a_process_alone(environment: dict[str, str], source: str, job: str) -> None:
    cluster = discover(environment)
    assert cluster == Cluster(0, (), source, job)
    assert cluster.size == 1
    assert cluster.is_chief
    assert cluster.tf_config() == "{}"


def test_the_precedence_of_the_sources() -> None:
    assert discover(indexed_job_pod(2) | {"TF_CONFIG": "{}"}) == discover(indexed_job_pod(2))
    assert discover(jobset_pod(3) | JOB | {"SERVICE_NAME": ""}) == discover(jobset_pod(3))
    agreeing = {"WORKER_COUNT": "4", "JOB_COMPLETION_INDEX": "2"}  # no names needed
    for variables in (agreeing, {"WORKER_COUNT": "4"}, {"JOB_COMPLETION_INDEX": "0"}):
        assert discover(kubeflow_pod(2) | variables) == discover(kubeflow_pod(2))


def test_jobs_have_different_names() -> None:
    others = [indexed_job_pod(0) | {"JOB_NAME": "flowers-2"}, jobset_pod(0) | {"REPLICATED_JOB_NAME": "more"}]
    environments = [*others, tf_config(TWO, FIRST), *(pod(0) for pod in ADDRESSES)]
    assert len({discover(environment).job for environment in environments}) == len(environments)


COUNT, INDEX, REPLICAS = "WORKER_COUNT", "JOB_COMPLETION_INDEX", "REPLICATED_JOB_REPLICAS"
A_FOUR = indexed_job_pod(0)
ONLY_WORKERS, DIFFERENT = "run workers only", "different address"
SPARSE = {"sparseCluster": {"worker": {"0": "a:1"}}}
# environment, value, problem, fix
TF_CONFIG_ERRORS = [
    ({TF: "{worker"}, "'{worker'", r"is not JSON \(Expecting property name", "correct it or unset it"),
    ({TF: "[1]"}, "'[1]'", "is not a JSON object", 'give {"cluster": ..., "task": ...}'),
    ({TF: json.dumps(SPARSE)}, None, "sparseCluster", "enableDynamicWorker: false"),
]
# cluster, task, problem, fix
CLUSTER_FAULTS: list[tuple[Any, Any, str, str]] = [
    (["a:1"], FIRST, r"the cluster \['a:1'\] is not an object", 'give {"worker"'),
    (TWO, None, "the task is None", 'as in {"type": "worker", "index": 0}'),
    (TWO, {"type": "worker"}, "the task is {'type': 'worker'}", "give type and index"),
    (TWO, {"type": "chief", "index": 0}, "type 'chief' is not in the cluster, which has worker$", "agree"),
    (TWO, {"type": ["worker"], "index": 0}, r"type \['worker'\] is not in the cluster", "agree"),
    ({"evaluator": ["e:1"]}, FIRST, "type 'worker' is not in the cluster, which has no workers", "agree"),
    *(
        (TWO, {"type": "worker", "index": i}, f"index {i!r} is not one of the 2 in worker", "give 0 to 1")
        for i in (2, -1, "0", True, 0.0, None)
    ),
    (TWO | {"ps": ["p:1"]}, FIRST, r"parameter servers \(ps\)", ONLY_WORKERS),
    (TWO, {"type": "ps", "index": 0}, r"parameter servers \(ps\)", ONLY_WORKERS),
    (TWO | {"evaluator": ["e:1"]}, {"type": "evaluator", "index": 0}, "an evaluator", ONLY_WORKERS),
    ({"wroker": ["a:1"]}, FIRST, "the unknown role 'wroker'", "use chief and worker"),
    ({"worker": {"0": "a:1"}}, FIRST, "worker is {'0': 'a:1'}", r'as in \["host:2222"\]'),
    *(
        ({"worker": ["a:1", address]}, FIRST, f"the worker address {re.escape(repr(address))} is not", "host:2222")
        for address in ("b", "b:", ":1", "b:0", "b:65536", "b:http", "b:-1", "grpc://b:1", "$(HOST):1", "b:1\n", 7)
    ),
    ({"worker": ["a:1", "b:1", "a:1"]}, FIRST, "the address a:1 occurs twice", DIFFERENT),
    ({"chief": ["a:1"], "worker": ["a:1", "b:1"]}, FIRST, "the address a:1 occurs twice", DIFFERENT),
    ({"chief": ["a:1", "b:1"], "worker": ["c:1"]}, FIRST, r"2 chiefs \(a:1, b:1\)", "as workers"),
    ({"chief": ["a:1"], "master": ["b:1"]}, {"type": "chief", "index": 0}, "2 chiefs", "as workers"),
]
TF_CONFIG_ERRORS += [(tf_config(cluster, task), None, *expected) for cluster, task, *expected in CLUSTER_FAULTS]
MANIFEST = "set it in the manifest"
HOST_NAME, SERVICE_LINK = "cannot be part of a host name", "tcp://10.0.0.7:80"
BOTH = "unset TF_CONFIG or WORKER_COUNT, or make them agree"
KUBERNETES_FAULTS = [
    (kubeflow_pod(2) | {COUNT: "3"}, COUNT, 3, "different number of workers, 4", "make them agree"),
    (
        tf_config({"worker": ["a:1"]}, FIRST) | {COUNT: "2"},
        COUNT,
        2,
        "different number of workers, 1",
        "make them agree",
    ),
    (kubeflow_pod(2) | {COUNT: "4", INDEX: "1"}, INDEX, "1", "this worker 1, but TF_CONFIG makes it worker 2", BOTH),
    (jobset_pod(3) | kubeflow_pod(1), INDEX, "1", "this worker 3, but TF_CONFIG makes it worker 1", BOTH),
    ({INDEX: "1"}, INDEX, 1, "WORKER_COUNT is not set", "set WORKER_COUNT"),
    (JOBSET | {"JOB_INDEX": "1"}, "JOB_INDEX", 1, "WORKER_COUNT is not set", "set WORKER_COUNT"),
    (JOBSET | {REPLICAS: "2", INDEX: "0"}, REPLICAS, 2, "WORKER_COUNT is not set", "set WORKER_COUNT"),
    (JOB | {COUNT: "2"}, COUNT, 2, "JOB_COMPLETION_INDEX", "completionMode: Indexed"),
    *(
        (pod | {name: ""}, name, None, "is not set, but WORKER_COUNT=4", f"{MANIFEST} to .*{source}")
        for pod, name, source in [
            (A_FOUR, "JOB_NAME", "the pod label batch.kubernetes.io/job-name"),
            (A_FOUR, "SERVICE_NAME", "the headless Service"),
            (jobset_pod(0), "JOBSET_NAME", "the pod label jobset.sigs.k8s.io/jobset-name"),
            (jobset_pod(0), "REPLICATED_JOB_NAME", "the pod label jobset.sigs.k8s.io/replicatedjob-name"),
        ]
    ),
    (A_FOUR | {"JOB_NAME": "$(JOB)"}, "JOB_NAME", "'$(JOB)'", HOST_NAME, MANIFEST),
    (A_FOUR | {"SERVICE_NAME": "peers:2222"}, "SERVICE_NAME", "'peers:2222'", HOST_NAME, MANIFEST),
    (A_FOUR | {INDEX: "4"}, INDEX, 4, "is not below WORKER_COUNT=4$", "the number of all pods"),
    (A_FOUR | {INDEX: "17"}, INDEX, 17, "is not below WORKER_COUNT=4$", "the number of all pods"),
    ({COUNT: "1", INDEX: "1"}, INDEX, 1, "is not below WORKER_COUNT=1$", "the number of all pods"),
    (jobset_pod(0) | {INDEX: "2"}, INDEX, 2, "WORKER_COUNT=4 / REPLICATED_JOB_REPLICAS=2", "the number of all pods"),
    (jobset_pod(0) | {COUNT: "5"}, COUNT, 5, "not a multiple of REPLICATED_JOB_REPLICAS=2", "the number of all pods"),
    (jobset_pod(0) | {"JOB_INDEX": ""}, REPLICAS, 2, "JOB_INDEX is not set", "label jobset.sigs.k8s.io/job-index"),
    (jobset_pod(0) | {"JOB_INDEX": "2"}, "JOB_INDEX", 2, "REPLICATED_JOB_REPLICAS=2$", "replicatedjob-replicas"),
    (
        jobset_pod(2) | {REPLICAS: ""},
        "JOB_INDEX",
        1,
        r"REPLICATED_JOB_REPLICAS=1 \(its default\)",
        "replicatedjob-replicas",
    ),
    *(
        (jobset_pod(0) | {name: value}, name, repr(value), f"is not a whole number from {least} to {most}", MANIFEST)
        for name, values, least, most in [
            (COUNT, ("0", "-1", "two", "2.0", "1_0", "٣", "1000000"), 1, 999_999),
            (INDEX, ("-1", "x", "0x1"), 0, 999_999),
            ("WORKER_PORT", ("0", "65536", "-1", "http", "9" * 60), 1, 65535),
            (REPLICAS, ("0", "-1", "x"), 1, 999_999),
            ("JOB_INDEX", ("-1", "x"), 0, 999_999),
        ]
        for value in values
    ),
    ({INDEX: "x"}, INDEX, "'x'", "is not a whole number from 0 to 999999", MANIFEST),
    (A_FOUR | {"WORKER_PORT": SERVICE_LINK}, "WORKER_PORT", repr(SERVICE_LINK), "65535", "enableServiceLinks"),
]


@pytest.mark.parametrize(
    ("environment", "key", "value", "problem", "fix"),
    [*((environment, TF, *rest) for environment, *rest in TF_CONFIG_ERRORS), *KUBERNETES_FAULTS],
)
def test_errors(environment: dict[str, str], key: str, value: object, problem: str, fix: str) -> None:
    with raises(ConfigError, key=key, value=value, problem=problem, fix=fix):
        discover(environment)


def test_a_long_value_is_cut() -> None:
    with raises(ConfigError, key=TF, value="'{" + "x" * 75 + "..."):
        discover({TF: "{" + "x" * 10_000})
    with raises(ConfigError, key=TF, value="'" + "[" * 76 + "..."):
        discover({TF: "[" * 100_000})


def test_discovery_imports_no_tensorflow() -> None:
    heavy = "{'tensorflow', 'keras', 'numpy', 'pydantic'}"
    program = f"import sys, trainer.cluster.discovery; print(sorted({heavy} & sys.modules.keys()))"
    assert run_python(program).stdout == "[]\n"
