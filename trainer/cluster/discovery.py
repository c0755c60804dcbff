"""The index of this process among the workers of a run, from its environment variables alone.

Four sources, of which the first that is set counts:

1. `TF_CONFIG`, as Kubeflow's TFJob writes it:
   `{"cluster": {"chief": ["host:port"], "worker": [...]}, "task": {"type": "worker", "index": 0}}`.
   The chief (old name: master) is worker 0, the workers follow. Evaluators in the cluster are ignored: a run evaluates
   itself. Empty, `{}` or without a cluster it counts as not set.
2. A JobSet, one replicatedJob of which holds all the workers: JOBSET_NAME, REPLICATED_JOB_NAME, JOB_INDEX (default 0)
   and REPLICATED_JOB_REPLICAS (default 1), which a manifest takes by the downward API from the pod's labels
   `jobset.sigs.k8s.io/jobset-name`, `/replicatedjob-name`, `/job-index` and `/replicatedjob-replicas`; WORKER_COUNT is
   the number of pods in all its child Jobs together. Hosts are
   `<jobset>-<replicatedjob>-<job-index>-<pod-index>.<service>`
   (https://jobset.sigs.k8s.io/docs/concepts); SERVICE_NAME is spec.network.subdomain, by default the JobSet's name.
3. An Indexed Job with a headless Service: WORKER_COUNT (its completions), JOB_NAME and SERVICE_NAME. Hosts are
   `<job>-<i>.<service>` (https://kubernetes.io/docs/tasks/job/job-with-pod-to-pod-communication).
4. Otherwise this process is alone.

2 and 3 also read JOB_COMPLETION_INDEX, which Kubernetes sets in every pod of an Indexed Job, and WORKER_PORT (default
2222). A variable that is set but empty counts as not set: that is what the downward API makes of a missing label.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.errors import ConfigError

DEFAULT_PORT = 2222
ALONE = "this process alone"
_ADDRESS = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?):([0-9]{1,5})")
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_SOURCES = {  # of the names, for a manifest
    "JOB_NAME": "the Job's metadata.name (the pod label batch.kubernetes.io/job-name)",
    "SERVICE_NAME": "the name of the headless Service that the pods have as their subdomain",
    "JOBSET_NAME": "the pod label jobset.sigs.k8s.io/jobset-name (by the downward API)",
    "REPLICATED_JOB_NAME": "the pod label jobset.sigs.k8s.io/replicatedjob-name (by the downward API)",
}


@dataclass(frozen=True)
class Cluster:
    """One worker's view of a run.

    Attributes:
        index: this worker, 0 <= index < size; 0 is the chief.
        addresses: "host:port" of every worker, in the order of their indices; empty for a worker alone.
        source: for printing: "this process alone", "TF_CONFIG", "Indexed Job NAME" or "JobSet NAME".
        job: the same name on all workers of one job, another in another job; "" for a nameless process alone.
    """

    index: int
    addresses: tuple[str, ...]
    source: str
    job: str

    @property
    def size(self) -> int:
        """The number of workers, at least 1."""
        return max(len(self.addresses), 1)

    @property
    def is_chief(self) -> bool:
        """Whether this worker is worker 0, which alone writes."""
        return self.index == 0

    def tf_config(self) -> str:
        """The value of TF_CONFIG for TensorFlow; with workers only, it takes worker 0 as the chief. `{}` alone."""
        if not self.addresses:
            return "{}"
        task = {"type": "worker", "index": self.index}
        return json.dumps({"cluster": {"worker": list(self.addresses)}, "task": task})


def discover(environment: Mapping[str, str]) -> Cluster:
    """Find this process among the workers of its run; the module's docstring has the sources and their order.

    Raises:
        ConfigError: a variable is missing or wrong, or two of them contradict each other.
    """
    env = {name: value.strip() for name, value in environment.items() if value.strip()}
    if not _in_jobset(env):  # without their JobSet the two say nothing
        env = {name: value for name, value in env.items() if name not in ("JOB_INDEX", "REPLICATED_JOB_REPLICAS")}
    given = _from_tf_config(env["TF_CONFIG"]) if "TF_CONFIG" in env else None
    if given:
        _check_against_kubernetes(given, env)
        return given
    return _from_kubernetes(env)


def _from_tf_config(text: str) -> Cluster | None:
    """The cluster in TF_CONFIG; None if it names none."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"TF_CONFIG={_shown(text)} is not JSON ({error}); correct it or unset it") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f'TF_CONFIG={_shown(text)} is not a JSON object; give {{"cluster": ..., "task": ...}} or unset it'
        )
    if tree.get("sparseCluster"):
        raise ConfigError(
            "TF_CONFIG has a sparseCluster, which only parameter servers can use, and they are not supported; "
            "set enableDynamicWorker: false and run workers only"
        )
    cluster, task = tree.get("cluster"), tree.get("task")
    if not cluster:
        return None
    if not isinstance(cluster, dict):
        raise ConfigError(
            f'TF_CONFIG: the cluster {_shown(cluster)} is not an object; give {{"worker": ["host:port", ...]}}'
        )
    if not isinstance(task, dict) or not {"type", "index"} <= task.keys():
        raise ConfigError(
            f"TF_CONFIG: the task is {_shown(task)}; "
            'give the type and index of this process, as in {"type": "worker", "index": 0}'
        )
    role, number = task["type"], task["index"]
    roles = _roles(cluster, role)
    if not isinstance(role, str) or role not in roles:
        raise ConfigError(
            f"TF_CONFIG: the task type {_shown(role)} is not in the cluster, which has "
            f"{', '.join(roles) or 'no workers'}; make the two agree"
        )
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(roles[role]):
        raise ConfigError(
            f"TF_CONFIG: the task index {_shown(number)} is not one of the {len(roles[role])} in {role}; "
            f"give 0 to {len(roles[role]) - 1}"
        )
    workers = roles.pop("worker", [])
    chiefs = [address for addresses in roles.values() for address in addresses]
    if len(chiefs) > 1:
        raise ConfigError(
            f"TF_CONFIG: there are {len(chiefs)} chiefs ({', '.join(chiefs)}); keep one, list the others as workers"
        )
    addresses = (*chiefs, *workers)
    twice = next((address for i, address in enumerate(addresses) if address in addresses[:i]), None)
    if twice:
        raise ConfigError(f"TF_CONFIG: the address {twice} is there twice; give every worker (and the chief) its own")
    index = number + (len(chiefs) if role == "worker" else 0)
    return Cluster(index, addresses if len(addresses) > 1 else (), "TF_CONFIG", ",".join(addresses))


def _roles(cluster: dict[str, Any], task_type: Any) -> dict[str, list[str]]:
    """The addresses of chief, master and worker, as far as there are any."""
    if "ps" in (*(role for role in cluster if cluster[role]), task_type):
        raise ConfigError("TF_CONFIG has parameter servers (ps), which are not supported; run workers only")
    if task_type == "evaluator":
        raise ConfigError(
            "TF_CONFIG: this task is an evaluator, which is not supported: evaluation happens inside the run; "
            "run workers only"
        )
    roles: dict[str, list[str]] = {}
    for role, addresses in cluster.items():
        if role in ("ps", "evaluator"):
            continue
        if role not in ("chief", "master", "worker"):
            raise ConfigError(f"TF_CONFIG: the cluster has the unknown role {_shown(role)}; use chief and worker")
        if not isinstance(addresses, list):
            raise ConfigError(
                f'TF_CONFIG: {role} is {_shown(addresses)}; give a list of addresses, as in ["host:{DEFAULT_PORT}"]'
            )
        for address in addresses:
            match = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
            if not match or not 1 <= int(match[1]) <= 65535:
                raise ConfigError(
                    f"TF_CONFIG: the {role} address {_shown(address)} is not host:port with a port from 1 to 65535; "
                    f"write it as in host:{DEFAULT_PORT}"
                )
        if addresses:
            roles[role] = addresses
    return roles


def _check_against_kubernetes(given: Cluster, env: Mapping[str, str]) -> None:
    """TF_CONFIG wins over WORKER_COUNT only if the two agree."""
    count = _integer(env, "WORKER_COUNT", 1)
    if count is None:
        return
    if count != given.size:
        raise ConfigError(
            f"TF_CONFIG has {given.size} worker{'s' * (given.size > 1)}, but WORKER_COUNT={count}; "
            "unset one of them or make them agree"
        )
    index = _index(env, count)
    if index is not None and index != given.index:
        raise ConfigError(
            f"TF_CONFIG makes this worker {given.index}, but JOB_COMPLETION_INDEX={env['JOB_COMPLETION_INDEX']} makes "
            f"it worker {index}; unset TF_CONFIG or WORKER_COUNT, or make them agree"
        )


def _from_kubernetes(env: Mapping[str, str]) -> Cluster:
    """A pod of a JobSet or of an Indexed Job, or a process alone."""
    count = _integer(env, "WORKER_COUNT", 1)
    if count is None:
        _check_alone(env)
        return Cluster(0, (), ALONE, "")
    index = _index(env, count)
    if count == 1:
        names = [env[name] for name in ("JOBSET_NAME", "REPLICATED_JOB_NAME") if name in env]
        job = "-".join(names) or env.get("JOB_NAME", "")
        source = f"JobSet {names[0]}" if names else f"Indexed Job {job}" if job else ALONE
        return Cluster(0, (), source, job)
    if index is None:
        raise ConfigError(
            f"WORKER_COUNT={count}, but JOB_COMPLETION_INDEX is not set, so the workers cannot be told apart; "
            "give the Job completionMode: Indexed"
        )
    port = _integer(env, "WORKER_PORT", 1, 65535) or DEFAULT_PORT
    if _in_jobset(env):
        jobset, name = _name(env, "JOBSET_NAME", count), _name(env, "REPLICATED_JOB_NAME", count)
        service = _name(env, "SERVICE_NAME", count) if "SERVICE_NAME" in env else jobset
        job, source = f"{jobset}-{name}", f"JobSet {jobset}"
        pods = count // (_integer(env, "REPLICATED_JOB_REPLICAS", 1) or 1)
        hosts = [f"{job}-{i // pods}-{i % pods}" for i in range(count)]
    else:
        job, service = _name(env, "JOB_NAME", count), _name(env, "SERVICE_NAME", count)
        source = f"Indexed Job {job}"
        hosts = [f"{job}-{i}" for i in range(count)]
    return Cluster(index, tuple(f"{host}.{service}:{port}" for host in hosts), source, job)


def _check_alone(env: Mapping[str, str]) -> None:
    """Refuse a pod that has siblings but does not know how many."""
    for name, alone in (("JOB_COMPLETION_INDEX", 0), ("JOB_INDEX", 0), ("REPLICATED_JOB_REPLICAS", 1)):
        value = _integer(env, name, alone)
        if value is not None and value > alone:
            raise ConfigError(
                f"{name}={value}, but WORKER_COUNT is not set, so several pods would train the same run unaware of "
                "each other; set WORKER_COUNT to the number of pods"
            )


def _in_jobset(env: Mapping[str, str]) -> bool:
    return "JOBSET_NAME" in env or "REPLICATED_JOB_NAME" in env


def _index(env: Mapping[str, str], count: int) -> int | None:
    """The index of this worker among all `count`; None if Kubernetes did not number the pod."""
    replicas = _integer(env, "REPLICATED_JOB_REPLICAS", 1) or 1  # child Jobs; an Indexed Job is one
    if count % replicas:
        raise ConfigError(
            f"WORKER_COUNT={count} is not a multiple of REPLICATED_JOB_REPLICAS={replicas}; "
            "set it to the number of pods in all child Jobs together"
        )
    pods = count // replicas
    job = _integer(env, "JOB_INDEX", 0)
    if job is None and replicas > 1:
        raise ConfigError(
            f"REPLICATED_JOB_REPLICAS={replicas}, but JOB_INDEX is not set, so the child Jobs cannot be told apart; "
            "set it to the pod label jobset.sigs.k8s.io/job-index (by the downward API)"
        )
    job = job or 0
    if job >= replicas:
        default = "" if "REPLICATED_JOB_REPLICAS" in env else " (its default)"
        raise ConfigError(
            f"JOB_INDEX={job} is not below REPLICATED_JOB_REPLICAS={replicas}{default}; "
            "set that to the pod label jobset.sigs.k8s.io/replicatedjob-replicas (by the downward API)"
        )
    pod = _integer(env, "JOB_COMPLETION_INDEX", 0)
    if pod is None:
        return None
    if pod >= pods:
        limit = f"WORKER_COUNT={count}" + (f" / REPLICATED_JOB_REPLICAS={replicas}" if replicas > 1 else "")
        raise ConfigError(
            f"JOB_COMPLETION_INDEX={pod} is not below {limit}; set WORKER_COUNT to the number of all pods"
        )
    return job * pods + pod


def _integer(env: Mapping[str, str], name: str, least: int, most: int = 999_999) -> int | None:
    """The variable as a whole number; None if it is not set."""
    text = env.get(name)
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,6}", text) or not least <= int(text) <= most:
        # Kubernetes describes every Service to every pod: one named `worker` sets WORKER_PORT=tcp://10.0.0.7:80.
        linked = " or set the pod's enableServiceLinks: false" if text.startswith("tcp://") else ""
        raise ConfigError(
            f"{name}={_shown(text)} is not a whole number from {least} to {most}; set {name} in the manifest{linked}"
        )
    return int(text)


def _name(env: Mapping[str, str], name: str, count: int) -> str:
    """The variable as a part of host names."""
    if name not in env:
        raise ConfigError(
            f"WORKER_COUNT={count}, but {name} is not set, so the workers cannot find each other; "
            f"set it in the manifest to {_SOURCES[name]}"
        )
    parts = env[name].split(".") if name == "SERVICE_NAME" else [env[name]]
    if not all(re.fullmatch(_LABEL, part) for part in parts):
        raise ConfigError(
            f"{name}={_shown(env[name])} cannot be part of a host name; set it in the manifest to {_SOURCES[name]}"
        )
    return env[name]


def _shown(value: Any) -> str:
    """The value in a message, cut where it gets long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
