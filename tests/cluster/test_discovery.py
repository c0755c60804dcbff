"""From the environment of a process to its place among the workers, and what is said when that cannot be."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from trainer.cluster.discovery import Cluster, discover
from trainer.errors import ConfigError

JOB = {"JOB_NAME": "flowers", "SERVICE_NAME": "flowers-peers"}
JOBSET = {"JOBSET_NAME": "pets", "REPLICATED_JOB_NAME": "workers"}
TWO = {"worker": ["a:2222", "b:2222"]}
FIRST = {"type": "worker", "index": 0}


def tf_config(cluster: Any, task: Any = None) -> dict[str, str]:
    """Kubeflow's variable; `environment` is what it writes beside the two keys that count."""
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
def test_tf_config_leads_back_to_the_same_place(pod: Callable[[int], dict[str, str]]) -> None:
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


def test_tensorflow_takes_a_process_alone_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    monkeypatch.setenv("TF_CONFIG", discover({}).tf_config())
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    assert not resolver.cluster_spec()
    assert discover({"TF_CONFIG": discover({}).tf_config()}) == discover({})


@pytest.mark.parametrize(
    ("environment", "index", "addresses", "source", "job"),
    [
        pytest.param(tf_config(TWO, FIRST), 0, ("a:2222", "b:2222"), "TF_CONFIG", "a:2222,b:2222", id="workers"),
        pytest.param(
            tf_config({"worker": ["a:1", "b:1"], "master": ["m:1"]}, {"type": "worker", "index": 1}),
            2,
            ("m:1", "a:1", "b:1"),
            "TF_CONFIG",
            "m:1,a:1,b:1",
            id="master",
        ),
        pytest.param(
            tf_config({"chief": ["c:1"], "worker": ["a:1"], "evaluator": ["e:1"], "ps": []}, FIRST),
            1,
            ("c:1", "a:1"),
            "TF_CONFIG",
            "c:1,a:1",
            id="evaluator elsewhere",
        ),
        pytest.param(
            tf_config({"worker": ["[::1]:1", "10.0.0.2:65535"], "chief": []}, FIRST),
            0,
            ("[::1]:1", "10.0.0.2:65535"),
            "TF_CONFIG",
            "[::1]:1,10.0.0.2:65535",
            id="numeric addresses",
        ),
        pytest.param(
            JOB | {"WORKER_COUNT": "2", "JOB_COMPLETION_INDEX": "1", "WORKER_PORT": "7000"},
            1,
            ("flowers-0.flowers-peers:7000", "flowers-1.flowers-peers:7000"),
            "Indexed Job flowers",
            "flowers",
            id="indexed job",
        ),
        pytest.param(
            JOB | {"WORKER_COUNT": " 2\n", "JOB_COMPLETION_INDEX": "0", "SERVICE_NAME": "p.ns.svc.cluster.local"},
            0,
            ("flowers-0.p.ns.svc.cluster.local:2222", "flowers-1.p.ns.svc.cluster.local:2222"),
            "Indexed Job flowers",
            "flowers",
            id="service with its domain",
        ),
        pytest.param(
            JOBSET | {"WORKER_COUNT": "2", "JOB_COMPLETION_INDEX": "1"},
            1,
            ("pets-workers-0-0.pets:2222", "pets-workers-0-1.pets:2222"),
            "JobSet pets",
            "pets-workers",
            id="jobset of one job",
        ),
        pytest.param(
            JOBSET
            | {"WORKER_COUNT": "2", "REPLICATED_JOB_REPLICAS": "2", "JOB_INDEX": "1", "JOB_COMPLETION_INDEX": "0"}
            | {"SERVICE_NAME": "net", "WORKER_PORT": "7000", "JOB_NAME": "pets-workers-1"},
            1,
            ("pets-workers-0-0.net:7000", "pets-workers-1-0.net:7000"),
            "JobSet pets",
            "pets-workers",
            id="jobset of jobs of one pod",
        ),
    ],
)
def test_a_worker_among_others(
    environment: dict[str, str], index: int, addresses: tuple[str, ...], source: str, job: str
) -> None:
    assert discover(environment) == Cluster(index, addresses, source, job)


@pytest.mark.parametrize(
    ("environment", "source", "job"),
    [
        ({}, "this process alone", ""),
        ({"PATH": "/bin", "JOB_NAME": "nightly", "SERVICE_NAME": "x"}, "this process alone", ""),
        ({"TF_CONFIG": " "}, "this process alone", ""),
        ({"TF_CONFIG": "{}"}, "this process alone", ""),
        ({"TF_CONFIG": '{"task": {"type": "worker", "index": 0}}'}, "this process alone", ""),
        (tf_config({}, FIRST), "this process alone", ""),
        (tf_config({"worker": ["a:1"]}, FIRST), "TF_CONFIG", "a:1"),
        (tf_config({"chief": ["a:1"]}, {"type": "chief", "index": 0}), "TF_CONFIG", "a:1"),
        ({"JOB_COMPLETION_INDEX": "0"}, "this process alone", ""),
        ({"WORKER_COUNT": "1"}, "this process alone", ""),
        ({"WORKER_COUNT": "1", "JOB_COMPLETION_INDEX": "0", "JOB_NAME": "flowers"}, "Indexed Job flowers", "flowers"),
        (JOBSET | {"WORKER_COUNT": "1", "JOB_COMPLETION_INDEX": "0"}, "JobSet pets", "pets-workers"),
        (JOBSET | {"JOB_COMPLETION_INDEX": "0"}, "this process alone", ""),
        (
            {"WORKER_COUNT": "", "JOB_COMPLETION_INDEX": "", "JOBSET_NAME": "", "WORKER_PORT": ""},
            "this process alone",
            "",
        ),
    ],
)
def test_a_process_alone(environment: dict[str, str], source: str, job: str) -> None:
    cluster = discover(environment)
    assert cluster == Cluster(0, (), source, job)
    assert cluster.size == 1
    assert cluster.is_chief
    assert cluster.tf_config() == "{}"


def test_an_empty_tf_config_leaves_the_word_to_the_job() -> None:
    assert discover(indexed_job_pod(2) | {"TF_CONFIG": "{}"}) == discover(indexed_job_pod(2))


def test_the_jobset_speaks_before_the_job_in_it() -> None:
    assert discover(jobset_pod(3) | JOB | {"SERVICE_NAME": ""}) == discover(jobset_pod(3))


def test_tf_config_wins_over_a_job_that_agrees() -> None:
    agreeing = {"WORKER_COUNT": "4", "JOB_COMPLETION_INDEX": "2"}  # no names needed
    assert discover(kubeflow_pod(2) | agreeing) == discover(kubeflow_pod(2))
    assert discover(kubeflow_pod(2) | {"WORKER_COUNT": "4"}) == discover(kubeflow_pod(2))
    assert discover(kubeflow_pod(2) | {"JOB_COMPLETION_INDEX": "0"}) == discover(kubeflow_pod(2))


def test_jobs_are_told_apart() -> None:
    other_job = discover(indexed_job_pod(0) | {"JOB_NAME": "flowers-2"})
    other_part = discover(jobset_pod(0) | {"REPLICATED_JOB_NAME": "more"})
    other_peers = discover(tf_config(TWO, FIRST))
    seen = [other_job, other_part, other_peers, *(discover(pod(0)) for pod in ADDRESSES)]
    assert len({cluster.job for cluster in seen}) == len(seen)


TF_CONFIG_FAULTS = [
    pytest.param(
        {"TF_CONFIG": "{worker"},
        "TF_CONFIG='{worker' is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)); "
        "correct it or unset it",
        id="not JSON",
    ),
    pytest.param(
        {"TF_CONFIG": "[1]"},
        'TF_CONFIG=\'[1]\' is not a JSON object; give {"cluster": ..., "task": ...} or unset it',
        id="not an object",
    ),
    pytest.param(
        {"TF_CONFIG": json.dumps({"sparseCluster": {"worker": {"0": "a:1"}}, "task": FIRST})},
        "TF_CONFIG has a sparseCluster, which only parameter servers can use, and they are not supported; "
        "set enableDynamicWorker: false and run workers only",
        id="sparse cluster",
    ),
    pytest.param(
        tf_config(["a:1"], FIRST),
        'TF_CONFIG: the cluster [\'a:1\'] is not an object; give {"worker": ["host:port", ...]}',
        id="cluster not an object",
    ),
    pytest.param(
        tf_config(TWO),
        'TF_CONFIG: the task is None; give the type and index of this process, as in {"type": "worker", "index": 0}',
        id="no task",
    ),
    pytest.param(
        tf_config(TWO, {"type": "worker"}),
        "TF_CONFIG: the task is {'type': 'worker'}; "
        'give the type and index of this process, as in {"type": "worker", "index": 0}',
        id="no task index",
    ),
    pytest.param(
        tf_config(TWO, {"type": "chief", "index": 0}),
        "TF_CONFIG: the task type 'chief' is not in the cluster, which has worker; make the two agree",
        id="task type not in the cluster",
    ),
    pytest.param(
        tf_config(TWO, {"type": ["worker"], "index": 0}),
        "TF_CONFIG: the task type ['worker'] is not in the cluster, which has worker; make the two agree",
        id="task type not a name",
    ),
    pytest.param(
        tf_config({"evaluator": ["e:1"]}, FIRST),
        "TF_CONFIG: the task type 'worker' is not in the cluster, which has no workers; make the two agree",
        id="no workers",
    ),
    *(
        pytest.param(
            tf_config(TWO, {"type": "worker", "index": index}),
            f"TF_CONFIG: the task index {index!r} is not one of the 2 in worker; give 0 to 1",
            id=f"index {index!r}",
        )
        for index in (2, -1, "0", True, 0.0, None)
    ),
    pytest.param(
        tf_config(TWO | {"ps": ["p:1"]}, FIRST),
        "TF_CONFIG has parameter servers (ps), which are not supported; run workers only",
        id="ps in the cluster",
    ),
    pytest.param(
        tf_config(TWO, {"type": "ps", "index": 0}),
        "TF_CONFIG has parameter servers (ps), which are not supported; run workers only",
        id="ps task",
    ),
    pytest.param(
        tf_config(TWO | {"evaluator": ["e:1"]}, {"type": "evaluator", "index": 0}),
        "TF_CONFIG: this task is an evaluator, which is not supported: evaluation happens inside the run; "
        "run workers only",
        id="evaluator task",
    ),
    pytest.param(
        tf_config({"wroker": ["a:1"]}, FIRST),
        "TF_CONFIG: the cluster has the unknown role 'wroker'; use chief and worker",
        id="unknown role",
    ),
    pytest.param(
        tf_config({"worker": {"0": "a:1"}}, FIRST),
        "TF_CONFIG: worker is {'0': 'a:1'}; give a list of addresses, as in [\"host:2222\"]",
        id="addresses not a list",
    ),
    *(
        pytest.param(
            tf_config({"worker": ["a:2222", address]}, FIRST),
            f"TF_CONFIG: the worker address {address!r} is not host:port with a port from 1 to 65535; "
            "write it as in host:2222",
            id=f"address {address!r}",
        )
        for address in (
            "b",
            "b:",
            ":2222",
            "b:0",
            "b:65536",
            "b:http",
            "b:-1",
            "grpc://b:2222",
            "$(HOST):2222",
            "b:1\n",
            7,
        )
    ),
    pytest.param(
        tf_config({"worker": ["a:1", "b:1", "a:1"]}, FIRST),
        "TF_CONFIG: the address a:1 is there twice; give every worker (and the chief) its own",
        id="duplicate worker",
    ),
    pytest.param(
        tf_config({"chief": ["a:1"], "worker": ["a:1", "b:1"]}, FIRST),
        "TF_CONFIG: the address a:1 is there twice; give every worker (and the chief) its own",
        id="chief among the workers",
    ),
    pytest.param(
        tf_config({"chief": ["a:1", "b:1"], "worker": ["c:1"]}, FIRST),
        "TF_CONFIG: there are 2 chiefs (a:1, b:1); keep one, list the others as workers",
        id="two chiefs",
    ),
    pytest.param(
        tf_config({"chief": ["a:1"], "master": ["b:1"]}, {"type": "chief", "index": 0}),
        "TF_CONFIG: there are 2 chiefs (a:1, b:1); keep one, list the others as workers",
        id="chief and master",
    ),
    pytest.param(
        kubeflow_pod(2) | {"WORKER_COUNT": "3"},
        "TF_CONFIG has 4 workers, but WORKER_COUNT=3; unset one of them or make them agree",
        id="another size",
    ),
    pytest.param(
        tf_config({"worker": ["a:1"]}, FIRST) | {"WORKER_COUNT": "2"},
        "TF_CONFIG has 1 worker, but WORKER_COUNT=2; unset one of them or make them agree",
        id="alone or not",
    ),
    pytest.param(
        kubeflow_pod(2) | {"WORKER_COUNT": "4", "JOB_COMPLETION_INDEX": "1"},
        "TF_CONFIG makes this worker 2, but JOB_COMPLETION_INDEX=1 makes it worker 1; "
        "unset TF_CONFIG or WORKER_COUNT, or make them agree",
        id="another index",
    ),
    pytest.param(
        jobset_pod(3) | kubeflow_pod(1),
        "TF_CONFIG makes this worker 1, but JOB_COMPLETION_INDEX=1 makes it worker 3; "
        "unset TF_CONFIG or WORKER_COUNT, or make them agree",
        id="another index in a JobSet",
    ),
]


def unaware(variable: str) -> str:
    return (
        f"{variable}, but WORKER_COUNT is not set, so several pods would train the same run unaware of each other; "
        "set WORKER_COUNT to the number of pods"
    )


def nameless(variable: str, remedy: str) -> str:
    return (
        f"WORKER_COUNT=4, but {variable} is not set, so the workers cannot find each other; "
        f"set it in the manifest to {remedy}"
    )


KUBERNETES_FAULTS = [
    pytest.param({"JOB_COMPLETION_INDEX": "1"}, unaware("JOB_COMPLETION_INDEX=1"), id="no count"),
    pytest.param(JOBSET | {"JOB_INDEX": "1"}, unaware("JOB_INDEX=1"), id="no count, second job"),
    pytest.param(
        JOBSET | {"REPLICATED_JOB_REPLICAS": "2", "JOB_COMPLETION_INDEX": "0"},
        unaware("REPLICATED_JOB_REPLICAS=2"),
        id="no count, two jobs",
    ),
    pytest.param(
        JOB | {"WORKER_COUNT": "2"},
        "WORKER_COUNT=2, but JOB_COMPLETION_INDEX is not set, so the workers cannot be told apart; "
        "give the Job completionMode: Indexed",
        id="job not indexed",
    ),
    pytest.param(
        indexed_job_pod(0) | {"JOB_NAME": ""},
        nameless("JOB_NAME", "the Job's metadata.name (the pod label batch.kubernetes.io/job-name)"),
        id="no job name",
    ),
    pytest.param(
        indexed_job_pod(0) | {"SERVICE_NAME": ""},
        nameless("SERVICE_NAME", "the name of the headless Service that the pods have as their subdomain"),
        id="no service",
    ),
    pytest.param(
        jobset_pod(0) | {"JOBSET_NAME": ""},
        nameless("JOBSET_NAME", "the pod label jobset.sigs.k8s.io/jobset-name (by the downward API)"),
        id="no jobset name",
    ),
    pytest.param(
        jobset_pod(0) | {"REPLICATED_JOB_NAME": ""},
        nameless("REPLICATED_JOB_NAME", "the pod label jobset.sigs.k8s.io/replicatedjob-name (by the downward API)"),
        id="no replicated job name",
    ),
    pytest.param(
        indexed_job_pod(0) | {"JOB_NAME": "$(JOB)"},
        "JOB_NAME='$(JOB)' cannot be part of a host name; "
        "set it in the manifest to the Job's metadata.name (the pod label batch.kubernetes.io/job-name)",
        id="job name not filled in",
    ),
    pytest.param(
        indexed_job_pod(0) | {"SERVICE_NAME": "peers:2222"},
        "SERVICE_NAME='peers:2222' cannot be part of a host name; "
        "set it in the manifest to the name of the headless Service that the pods have as their subdomain",
        id="service with a port",
    ),
    *(
        pytest.param(
            indexed_job_pod(0) | {"JOB_COMPLETION_INDEX": str(index)},
            f"JOB_COMPLETION_INDEX={index} is not below WORKER_COUNT=4; set WORKER_COUNT to the number of all pods",
            id=f"index {index} of 4",
        )
        for index in (4, 17)
    ),
    pytest.param(
        {"WORKER_COUNT": "1", "JOB_COMPLETION_INDEX": "1"},
        "JOB_COMPLETION_INDEX=1 is not below WORKER_COUNT=1; set WORKER_COUNT to the number of all pods",
        id="second of one",
    ),
    pytest.param(
        jobset_pod(0) | {"JOB_COMPLETION_INDEX": "2"},
        "JOB_COMPLETION_INDEX=2 is not below WORKER_COUNT=4 / REPLICATED_JOB_REPLICAS=2; "
        "set WORKER_COUNT to the number of all pods",
        id="index beyond the child job",
    ),
    pytest.param(
        jobset_pod(0) | {"WORKER_COUNT": "5"},
        "WORKER_COUNT=5 is not a multiple of REPLICATED_JOB_REPLICAS=2; "
        "set it to the number of pods in all child Jobs together",
        id="uneven jobs",
    ),
    pytest.param(
        jobset_pod(0) | {"JOB_INDEX": ""},
        "REPLICATED_JOB_REPLICAS=2, but JOB_INDEX is not set, so the child Jobs cannot be told apart; "
        "set it to the pod label jobset.sigs.k8s.io/job-index (by the downward API)",
        id="no job index",
    ),
    pytest.param(
        jobset_pod(0) | {"JOB_INDEX": "2"},
        "JOB_INDEX=2 is not below REPLICATED_JOB_REPLICAS=2; "
        "set that to the pod label jobset.sigs.k8s.io/replicatedjob-replicas (by the downward API)",
        id="job index beyond the replicas",
    ),
    pytest.param(
        jobset_pod(2) | {"REPLICATED_JOB_REPLICAS": ""},
        "JOB_INDEX=1 is not below REPLICATED_JOB_REPLICAS=1 (its default); "
        "set that to the pod label jobset.sigs.k8s.io/replicatedjob-replicas (by the downward API)",
        id="no replicas",
    ),
    *(
        pytest.param(
            jobset_pod(0) | {name: value},
            f"{name}={value!r} is not a whole number from {least} to {most}; set {name} in the manifest",
            id=f"{name} {value}",
        )
        for name, values, least, most in [
            ("WORKER_COUNT", ("0", "-1", "two", "2.0", "1_0", "٣", "1000000"), 1, 999_999),
            ("JOB_COMPLETION_INDEX", ("-1", "x", "0x1"), 0, 999_999),
            ("WORKER_PORT", ("0", "65536", "-1", "http", "9" * 60), 1, 65535),
            ("REPLICATED_JOB_REPLICAS", ("0", "-1", "x"), 1, 999_999),
            ("JOB_INDEX", ("-1", "x"), 0, 999_999),
        ]
        for value in values
    ),
    pytest.param(
        {"JOB_COMPLETION_INDEX": "x"},
        "JOB_COMPLETION_INDEX='x' is not a whole number from 0 to 999999; set JOB_COMPLETION_INDEX in the manifest",
        id="index of a process alone",
    ),
    pytest.param(
        indexed_job_pod(0) | {"WORKER_PORT": "tcp://10.0.0.7:80"},
        "WORKER_PORT='tcp://10.0.0.7:80' is not a whole number from 1 to 65535; "
        "set WORKER_PORT in the manifest or set the pod's enableServiceLinks: false",
        id="a Service named worker",
    ),
]


@pytest.mark.parametrize(("environment", "message"), [*TF_CONFIG_FAULTS, *KUBERNETES_FAULTS])
def test_what_is_wrong_is_said(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        discover(environment)
    assert str(caught.value) == message


def test_a_long_value_is_cut() -> None:
    with pytest.raises(ConfigError, match=r"^TF_CONFIG='\{x{75}\.\.\. is not JSON"):
        discover({"TF_CONFIG": "{" + "x" * 10_000})
    with pytest.raises(ConfigError, match=r"^TF_CONFIG='\[{76}\.\.\. is not JSON"):
        discover({"TF_CONFIG": "[" * 100_000})


def test_finding_the_cluster_needs_no_tensorflow() -> None:
    heavy = "{'tensorflow', 'keras', 'numpy', 'pydantic'}"
    program = f"import sys, trainer.cluster.discovery; print(sorted({heavy} & sys.modules.keys()))"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout == "[]\n"
