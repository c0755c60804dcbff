"""Discover this worker's index and all workers' addresses from environment variables.

The first of these sources for which the environment has variables is used:

1. `TF_CONFIG`, as Kubeflow's TFJob writes it:
   `{"cluster": {"chief": ["host:port"], "worker": [...]}, "task": {"type": "worker", "index": 0}}`.
   The chief (formerly called master) is worker 0, and the workers follow. Evaluators in the cluster are ignored,
   because the workers themselves evaluate. A TF_CONFIG that is empty, `{}` or without a cluster counts as not set.
2. A JobSet with all workers in one replicatedJob: JOBSET_NAME, REPLICATED_JOB_NAME, JOB_INDEX (default 0) and
   REPLICATED_JOB_REPLICAS (default 1), set by the downward API from the pod labels `jobset.sigs.k8s.io/jobset-name`,
   `/replicatedjob-name`, `/job-index` and `/replicatedjob-replicas`. WORKER_COUNT is the number of pods of all child
   Jobs. Hosts are `<jobset>-<replicatedjob>-<job-index>-<pod-index>.<service>`
   (https://jobset.sigs.k8s.io/docs/concepts); SERVICE_NAME is spec.network.subdomain and defaults to the JobSet's name.
3. An Indexed Job with a headless Service: WORKER_COUNT (the Job's completions), JOB_NAME and SERVICE_NAME. Hosts are
   `<job>-<i>.<service>` (https://kubernetes.io/docs/tasks/job/job-with-pod-to-pod-communication).
4. Otherwise this process is the only worker.

Sources 2 and 3 require WORKER_COUNT. They also read WORKER_PORT (default 2222) and JOB_COMPLETION_INDEX, which
Kubernetes sets in every pod of an Indexed Job. An empty variable counts as not set, because the downward API sets an
empty one for a missing label.

The workers authenticate with a token: JOB_UID, the pod label `batch.kubernetes.io/controller-uid`, which is known only
to those who can read the pods. The token is empty if JOB_UID is not set, or if a JobSet has several child Jobs, because
each child Job has a different uid.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from trainer.errors import ConfigError

DEFAULT_PORT = 2222  # the port that Kubeflow's TFJob uses
ALONE = "this process alone"  # `Cluster.source` of a single worker without a named Job
# "host:port" or "[IPv6]:port"; the group is the port
_ADDRESS = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?):([0-9]{1,5})")
_DNS_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_MANIFEST_SOURCES = {  # environment variable -> the value that a manifest must set it to, for error messages
    "JOB_NAME": "the Job's metadata.name (the pod label batch.kubernetes.io/job-name)",
    "SERVICE_NAME": "the name of the headless Service that the pods have as their subdomain",
    "JOBSET_NAME": "the pod label jobset.sigs.k8s.io/jobset-name (by the downward API)",
    "REPLICATED_JOB_NAME": "the pod label jobset.sigs.k8s.io/replicatedjob-name (by the downward API)",
}


@dataclass(frozen=True)
class Cluster:
    """A run's workers, and this worker's index."""

    index: int  # this worker's index, 0 <= index < size; 0 is the chief
    addresses: tuple[str, ...]  # "host:port" in index order; empty for a single worker
    source: str  # what defines the cluster, for log lines: ALONE, "TF_CONFIG", "Indexed Job NAME" or "JobSet NAME"
    job: str  # name of the Job or replicatedJob, or the addresses in TF_CONFIG; equal on all workers; "" if unnamed
    token: str = field(default="", repr=False)  # proves that a peer is a worker of the same Job; "" if there is none

    @property
    def size(self) -> int:
        """Number of workers, at least 1."""
        return max(len(self.addresses), 1)

    @property
    def is_chief(self) -> bool:
        """Whether this is worker 0, the only one that writes to the run's folder."""
        return self.index == 0

    def tf_config(self) -> str:
        """Return the TF_CONFIG for TensorFlow, in which all tasks have the type worker; "{}" for a single worker."""
        if not self.addresses:
            return "{}"
        task = {"type": "worker", "index": self.index}
        return json.dumps({"cluster": {"worker": list(self.addresses)}, "task": task})


def discover(environment: Mapping[str, str]) -> Cluster:
    """Return the cluster that environment variables describe; see the module docstring.

    Raises ConfigError if a variable is missing or invalid, or if two variables contradict each other.
    """
    env = {name: value.strip() for name, value in environment.items() if value.strip()}
    if not _in_jobset(env):  # outside a JobSet, these variables have no meaning
        env = {name: value for name, value in env.items() if name not in ("JOB_INDEX", "REPLICATED_JOB_REPLICAS")}
    cluster = _parse_tf_config(env["TF_CONFIG"]) if "TF_CONFIG" in env else None
    if cluster:
        _check_against_kubernetes(cluster, env)
    else:
        cluster = _discover_in_kubernetes(env)
    return replace(cluster, token=_choose_token(env)) if cluster.size > 1 else cluster


def _choose_token(env: Mapping[str, str]) -> str:
    """Return the authentication token, the uid of the workers' Job; "" if it is not set or there are several Jobs."""
    return env.get("JOB_UID", "") if env.get("REPLICATED_JOB_REPLICAS", "1") == "1" else ""


def _parse_tf_config(tf_config: str) -> Cluster | None:
    """Parse TF_CONFIG; None if it has no cluster. Raises ConfigError if it is invalid or not supported."""
    try:
        tree = json.loads(tf_config)
    except (ValueError, RecursionError) as error:
        problem, fix = f"is not JSON ({error})", "correct it or unset it"
        raise ConfigError(problem, key="TF_CONFIG", value=_abbreviate(tf_config), fix=fix) from error
    if not isinstance(tree, dict):
        problem, fix = "is not a JSON object", 'give {"cluster": ..., "task": ...} or unset it'
        raise ConfigError(problem, key="TF_CONFIG", value=_abbreviate(tf_config), fix=fix)
    if tree.get("sparseCluster"):
        problem, fix = "has a sparseCluster, for parameter servers only", "set enableDynamicWorker: false"
        raise ConfigError(problem, key="TF_CONFIG", fix=fix)
    cluster, task = tree.get("cluster"), tree.get("task")
    if not cluster:
        return None
    if not isinstance(cluster, dict):
        problem, fix = f"the cluster {_abbreviate(cluster)} is not an object", 'give {"worker": ["host:port", ...]}'
        raise ConfigError(problem, key="TF_CONFIG", fix=fix)
    if not isinstance(task, dict) or not {"type", "index"} <= task.keys():
        problem, fix = f"the task is {_abbreviate(task)}", 'give type and index, as in {"type": "worker", "index": 0}'
        raise ConfigError(problem, key="TF_CONFIG", fix=fix)
    role, task_index = task["type"], task["index"]
    roles = _parse_roles(cluster, role)
    if not isinstance(role, str) or role not in roles:
        available = ", ".join(roles) or "no workers"
        problem = f"the task type {_abbreviate(role)} is not in the cluster, which has {available}"
        raise ConfigError(problem, key="TF_CONFIG", fix="make the two agree")
    if not isinstance(task_index, int) or isinstance(task_index, bool) or not 0 <= task_index < len(roles[role]):
        problem = f"the task index {_abbreviate(task_index)} is not one of the {len(roles[role])} in {role}"
        raise ConfigError(problem, key="TF_CONFIG", fix=f"give 0 to {len(roles[role]) - 1}")
    workers = roles.pop("worker", [])
    chiefs = [address for addresses in roles.values() for address in addresses]
    if len(chiefs) > 1:
        problem = f"there are {len(chiefs)} chiefs ({', '.join(chiefs)})"
        raise ConfigError(problem, key="TF_CONFIG", fix="keep one, and list the others as workers")
    addresses = (*chiefs, *workers)
    if duplicate := next((address for i, address in enumerate(addresses) if address in addresses[:i]), None):
        problem, fix = f"the address {duplicate} occurs twice", "give every worker (and the chief) a different address"
        raise ConfigError(problem, key="TF_CONFIG", fix=fix)
    index = task_index + (len(chiefs) if role == "worker" else 0)
    return Cluster(index, addresses if len(addresses) > 1 else (), "TF_CONFIG", ",".join(addresses))


def _parse_roles(cluster: dict[str, Any], task_type: Any) -> dict[str, list[str]]:
    """Return the addresses by role (chief, master, worker); roles without addresses are omitted.

    Raises ConfigError if there are parameter servers, unknown roles or invalid addresses, or this task is an evaluator.
    """
    if "ps" in (*(role for role in cluster if cluster[role]), task_type):
        raise ConfigError("parameter servers (ps) are not supported", key="TF_CONFIG", fix="run workers only")
    if task_type == "evaluator":
        problem = "this task is an evaluator, but evaluation happens inside the run"
        raise ConfigError(problem, key="TF_CONFIG", fix="run workers only")
    roles: dict[str, list[str]] = {}
    for role, addresses in cluster.items():
        if role in ("ps", "evaluator"):
            continue
        if role not in ("chief", "master", "worker"):
            problem = f"the cluster has the unknown role {_abbreviate(role)}"
            raise ConfigError(problem, key="TF_CONFIG", fix="use chief and worker")
        if not isinstance(addresses, list):
            problem = f"{role} is {_abbreviate(addresses)}"
            raise ConfigError(problem, key="TF_CONFIG", fix=f'give a list of addresses, as in ["host:{DEFAULT_PORT}"]')
        for address in addresses:
            match = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
            if not match or not 1 <= int(match[1]) <= 65535:
                problem = f"the {role} address {_abbreviate(address)} is not host:port with a port from 1 to 65535"
                raise ConfigError(problem, key="TF_CONFIG", fix=f"write it as in host:{DEFAULT_PORT}")
        if addresses:
            roles[role] = addresses
    return roles


def _check_against_kubernetes(cluster: Cluster, env: Mapping[str, str]) -> None:
    """Raise a ConfigError if WORKER_COUNT or the pod's index contradicts `cluster`, which TF_CONFIG describes."""
    num_workers = _parse_integer(env, "WORKER_COUNT", minimum=1)
    if num_workers is None:
        return
    if num_workers != cluster.size:
        problem = f"TF_CONFIG has a different number of workers, {cluster.size}"
        raise ConfigError(problem, key="WORKER_COUNT", value=num_workers, fix="unset one of them or make them agree")
    index = _compute_index(env, num_workers)
    if index is not None and index != cluster.index:
        problem = f"makes this worker {index}, but TF_CONFIG makes it worker {cluster.index}"
        fix, value = "unset TF_CONFIG or WORKER_COUNT, or make them agree", env["JOB_COMPLETION_INDEX"]
        raise ConfigError(problem, key="JOB_COMPLETION_INDEX", value=value, fix=fix)


def _discover_in_kubernetes(env: Mapping[str, str]) -> Cluster:
    """Discover the cluster of a JobSet or an Indexed Job; a single worker if WORKER_COUNT is 1 or not set."""
    num_workers = _parse_integer(env, "WORKER_COUNT", minimum=1)
    if num_workers is None:
        _require_single_pod(env)
        return Cluster(0, (), ALONE, "")
    index = _compute_index(env, num_workers)
    if num_workers == 1:
        jobset_names = [env[name] for name in ("JOBSET_NAME", "REPLICATED_JOB_NAME") if name in env]
        job = "-".join(jobset_names) or env.get("JOB_NAME", "")
        source = f"JobSet {jobset_names[0]}" if jobset_names else f"Indexed Job {job}" if job else ALONE
        return Cluster(0, (), source, job)
    if index is None:
        problem, fix = "JOB_COMPLETION_INDEX, the index of this worker, is not set", "set completionMode: Indexed"
        raise ConfigError(problem, key="WORKER_COUNT", value=num_workers, fix=fix)
    port = _parse_integer(env, "WORKER_PORT", minimum=1, maximum=65535) or DEFAULT_PORT
    if _in_jobset(env):
        jobset, replicated_job = (
            _require_name(env, "JOBSET_NAME", num_workers),
            _require_name(env, "REPLICATED_JOB_NAME", num_workers),
        )
        service = _require_name(env, "SERVICE_NAME", num_workers) if "SERVICE_NAME" in env else jobset
        job, source = f"{jobset}-{replicated_job}", f"JobSet {jobset}"
        pods_per_job = num_workers // (_parse_integer(env, "REPLICATED_JOB_REPLICAS", minimum=1) or 1)
        hosts = [f"{job}-{i // pods_per_job}-{i % pods_per_job}" for i in range(num_workers)]
    else:
        job, service = _require_name(env, "JOB_NAME", num_workers), _require_name(env, "SERVICE_NAME", num_workers)
        source = f"Indexed Job {job}"
        hosts = [f"{job}-{i}" for i in range(num_workers)]
    return Cluster(index, tuple(f"{host}.{service}:{port}" for host in hosts), source, job)


def _require_single_pod(env: Mapping[str, str]) -> None:
    """Raise a ConfigError if the Job or JobSet has several pods, although WORKER_COUNT is not set."""
    for name, single_pod_value in (("JOB_COMPLETION_INDEX", 0), ("JOB_INDEX", 0), ("REPLICATED_JOB_REPLICAS", 1)):
        value = _parse_integer(env, name, single_pod_value)
        if value is not None and value > single_pod_value:
            problem = "WORKER_COUNT is not set, so several pods would train the same run independently"
            raise ConfigError(problem, key=name, value=value, fix="set WORKER_COUNT to the number of pods")


def _in_jobset(env: Mapping[str, str]) -> bool:
    return "JOBSET_NAME" in env or "REPLICATED_JOB_NAME" in env


def _compute_index(env: Mapping[str, str], num_workers: int) -> int | None:
    """Compute this worker's index among the pods of all child Jobs; None if JOB_COMPLETION_INDEX is not set.

    Raises ConfigError if an index is out of range or `num_workers` is not a multiple of the number of child Jobs.
    """
    # Number of child Jobs; 1 for an Indexed Job.
    num_jobs = _parse_integer(env, "REPLICATED_JOB_REPLICAS", minimum=1) or 1
    if num_workers % num_jobs:
        problem, fix = f"is not a multiple of REPLICATED_JOB_REPLICAS={num_jobs}", "set it to the number of all pods"
        raise ConfigError(problem, key="WORKER_COUNT", value=num_workers, fix=fix)
    pods_per_job = num_workers // num_jobs
    job_index = _parse_integer(env, "JOB_INDEX", minimum=0)
    if job_index is None and num_jobs > 1:
        fix = "set it to the pod label jobset.sigs.k8s.io/job-index (by the downward API)"
        raise ConfigError("JOB_INDEX is not set", key="REPLICATED_JOB_REPLICAS", value=num_jobs, fix=fix)
    job_index = job_index or 0
    if job_index >= num_jobs:
        default_note = "" if "REPLICATED_JOB_REPLICAS" in env else " (its default)"
        problem = f"is not below REPLICATED_JOB_REPLICAS={num_jobs}{default_note}"
        fix = "set that to the pod label jobset.sigs.k8s.io/replicatedjob-replicas (by the downward API)"
        raise ConfigError(problem, key="JOB_INDEX", value=job_index, fix=fix)
    pod_index = _parse_integer(env, "JOB_COMPLETION_INDEX", minimum=0)
    if pod_index is None:
        return None
    if pod_index >= pods_per_job:
        bound = f"WORKER_COUNT={num_workers}" + (f" / REPLICATED_JOB_REPLICAS={num_jobs}" if num_jobs > 1 else "")
        problem, fix = f"is not below {bound}", "set WORKER_COUNT to the number of all pods"
        raise ConfigError(problem, key="JOB_COMPLETION_INDEX", value=pod_index, fix=fix)
    return job_index * pods_per_job + pod_index


def _parse_integer(env: Mapping[str, str], name: str, minimum: int, maximum: int = 999_999) -> int | None:
    """Parse the variable `name`; None if it is not set. Raises ConfigError unless it is an integer in the range."""
    text = env.get(name)
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,6}", text) or not minimum <= int(text) <= maximum:
        # Kubernetes sets variables for every Service: one named `worker` sets WORKER_PORT=tcp://10.0.0.7:80.
        alternative = " or set enableServiceLinks: false" if text.startswith("tcp://") else ""
        fix = f"set it in the manifest{alternative}"
        problem = f"is not a whole number from {minimum} to {maximum}"
        raise ConfigError(problem, key=name, value=_abbreviate(text), fix=fix)
    return int(text)


def _require_name(env: Mapping[str, str], name: str, num_workers: int) -> str:
    """Return a variable that becomes part of host names. Raises ConfigError if it is not set or is invalid."""
    fix = f"set it in the manifest to {_MANIFEST_SOURCES[name]}"
    if name not in env:
        raise ConfigError(f"is not set, but WORKER_COUNT={num_workers}", key=name, fix=fix)
    dns_labels = env[name].split(".") if name == "SERVICE_NAME" else [env[name]]
    if not all(re.fullmatch(_DNS_LABEL, label) for label in dns_labels):
        raise ConfigError("cannot be part of a host name", key=name, value=_abbreviate(env[name]), fix=fix)
    return env[name]


def _abbreviate(value: Any) -> str:
    """Return a value's repr for a message, truncated to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
