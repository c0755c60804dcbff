"""Manifests and trainer agree on environment, command line, ports, exit codes, disk and metrics."""

import functools
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.errors import raises
from tests.k8s.rendered import (
    ALL,
    FILES,
    JOBS,
    Object,
    Pods,
    get_name,
    get_only_object,
    list_containers,
    load_documents,
    parse_bytes,
    render_objects,
)
from trainer import backbones, errors, nightly
from trainer.backbones.candidates import parse_candidates
from trainer.cli.arguments import MATCH_ALL as ALL_ARGUMENTS
from trainer.cli.arguments import parse_arguments
from trainer.cli.compose import compose
from trainer.cli.sweep import select_job
from trainer.cluster.discovery import DEFAULT_PORT, discover
from trainer.config.schema import RequestedConfig, validate_config
from trainer.data.prepare import parse_job_part
from trainer.errors import ConfigError
from trainer.storage import lease
from trainer.storage.disk import plan_disk_budget

ROOT = Path(__file__).parents[2]
VARIABLE = r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+|HOSTNAME|HOME"
READ = r'os\.(?:environ(?:\.\w+)?|getenv)[\[(]\s*"(\w+)"|"(\w+)" (?:not )?in os\.environ'
# Variables that the trainer reads and these manifests do not set, with those who set them.
SET_ELSEWHERE = {
    "JOB_COMPLETION_INDEX": "Kubernetes, in every pod of an Indexed Job",
    "HOSTNAME": "the container runtime",
    "TF_CONFIG": "Kubeflow's TFJob, instead of all the others",
    "KUBETUNE_CACHE": "the image",
    "GOOGLE_CLOUD_PROJECT": "the user, for requester-pays buckets",
    "KERAS_HOME": "the user, for another folder than ~/.keras",
    "KUBETUNE_REVISION": "the image",
    "PYTHONPATH": "the user, where the package is not installed",
    "KUBETUNE_SWEEP": "the trainer itself, as HYDRA_FULL_ERROR and TF_CPP_MIN_LOG_LEVEL",
    "HYDRA_FULL_ERROR": "",
    "TF_CPP_MIN_LOG_LEVEL": "",
    "PYTHONWARNINGS": "",
    "KUBERNETES_SERVICE_HOST": "the kubelet, in every pod",
    "STORAGE_EMULATOR_HOST": "tests",
    "GOOGLE_APPLICATION_CREDENTIALS": "users outside of Google Cloud",
    "AWS_REGION": "EKS, or the user",
    "AWS_ROLE_ARN": "EKS (IRSA), as AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE": "",
    "AWS_ACCESS_KEY_ID": "users outside of AWS",
    "AWS_SKIP_SIGNATURE": "the user, for public buckets in S3",
}


def variables_read(module: str, all_names: bool) -> set[str]:
    """Environment variables that a module reads from `os.environ`, or every string with the form of a name."""
    pattern = rf'"({VARIABLE})"' if all_names else READ
    return {name for match in re.finditer(pattern, module) for name in match.groups() if name}


def variables_read_by_the_trainer() -> set[str]:
    """All names in a module count where it passes the whole environment as a mapping."""
    names = set()
    for path in (ROOT / "trainer").rglob("*.py"):
        text = path.read_text()
        names |= variables_read(text, all_names="(os.environ)" in text or path.name in ("discovery.py", "sweep.py"))
    for path in (ROOT / "conf").rglob("*.yaml"):
        names |= set(re.findall(r"oc\.env:(\w+)", path.read_text()))
    return names


def test_every_way_to_read_the_environment_is_detected() -> None:
    source = """os.environ["A_B"]; os.environ.get("C_D", 1); os.getenv("E_F"); "G_H" in os.environ; x("I_J")"""
    assert variables_read(source, all_names=False) == {"A_B", "C_D", "E_F", "G_H"}
    assert variables_read(source, all_names=True) == {"A_B", "C_D", "E_F", "G_H", "I_J"}


def test_every_variable_that_the_trainer_reads_is_set_and_no_other() -> None:
    read = variables_read_by_the_trainer()
    set_by_manifests = {variable["name"] for pods in ALL for variable in pods.container.get("env", [])}
    assert read >= {"WORKER_COUNT", "JOB_UID", "SERVICE_NAME", "STORAGE_EMULATOR_HOST"}
    assert set_by_manifests <= read
    assert read - set_by_manifests <= SET_ELSEWHERE.keys(), "set it in a manifest, or list here who sets it"
    assert set_by_manifests.isdisjoint(SET_ELSEWHERE)


@pytest.mark.parametrize("pods", [pods for pods in JOBS if pods.overlay != "overlays/prepare"], ids=get_name)
def test_cluster_discovery_returns_the_dns_names_of_all_pods(pods: Pods) -> None:
    for index in range(pods.count):
        _, environment = select_job(pods.arguments(index), pods.environment(index))
        cluster = discover(environment)
        assert (cluster.index, cluster.size) == (index if pods.workers > 1 else 0, pods.workers)
        assert environment["JOB_NAME"] == pods.job_name
        assert environment["JOB_UID"] == pods.labels["batch.kubernetes.io/controller-uid"]
        if pods.workers == 1:
            assert cluster.addresses == ()
            continue
        (port,) = [p["containerPort"] for p in pods.container["ports"] if p["name"] == "workers"]
        service = host_domain(pods)
        assert cluster.addresses == tuple(f"{pods.job_name}-{i}.{service}:{port}" for i in range(pods.count))
        assert port == DEFAULT_PORT


def host_domain(pods: Pods) -> str:
    assert "hostname" not in pods.spec  # set by the Job
    if pods.owner["kind"] == "JobSet":  # it creates the Service and sets the pods' subdomain
        network = pods.owner["spec"]["network"]
        assert network["enableDNSHostnames"] is True
        assert network["publishNotReadyAddresses"] is True
        assert "subdomain" not in pods.spec
        return str(network.get("subdomain", pods.owner["metadata"]["name"]))
    assert pods.published
    return str(pods.spec["subdomain"])


def test_the_pods_of_a_sweep_train_all_of_its_runs_and_each_its_own() -> None:
    (pods,) = [pods for pods in JOBS if pods.is_sweep]
    assert pods.job is not None
    count = pods.job["completions"]
    first, last = configuration(pods), configuration(pods, count - 1)
    assert last.output_dir == f"gs://BUCKET/runs/{pods.job_name}/{count - 1}"
    assert (first.seed, last.seed) == (1, 3)
    assert (first.augmentation == last.augmentation) is False
    with raises(ConfigError, key="SWEEP_JOB", value=str(count), fix=f"completions of the Job to {count}"):
        configuration(pods, count)


def test_every_pod_of_the_preparing_job_has_its_own_shard() -> None:
    (pods,) = [pods for pods in JOBS if pods.overlay == "overlays/prepare"]
    assert [parse_job_part(pods.environment(i)) for i in range(pods.count)] == [
        (i, pods.count) for i in range(pods.count)
    ]


def configuration(pods: Pods, index: int = 0) -> RequestedConfig:
    return _configuration(tuple(pods.arguments(index)), pods.environment(index).get("SWEEP_JOB", ""))


@functools.cache
def _configuration(arguments: tuple[str, ...], sweep_job: str) -> RequestedConfig:
    selected, _ = select_job(list(arguments), {"SWEEP_JOB": sweep_job})
    commands = {*nightly.ARGUMENTS, *backbones.ARGUMENTS, "output"}  # "output" is also of trainer.prepare
    own = tuple(f"{key}=" for key in commands)
    composed: dict[str, Any] | None = compose([a for a in selected if not a.startswith(own)])
    assert composed is not None
    return validate_config(composed)


@pytest.mark.parametrize("pods", JOBS, ids=get_name)
def test_the_arguments_are_a_configuration(pods: Pods) -> None:
    config = configuration(pods)
    arguments = pods.arguments()
    assert all(re.fullmatch(r"-m|[\w.]+=[^\s$'\"]+( [^\s$'\"]+)*", a) for a in arguments), "there is no shell"
    mounts = [mount["mountPath"] for mount in pods.container["volumeMounts"]]
    for path in re.findall(r"=(/\S*)", "\n".join(arguments)):
        assert any(path.startswith(f"{mount}/") for mount in mounts), path  # all else is read-only
    if pods.overlay == "overlays/prepare":
        assert pods.container["command"] == ["python", "-m", "trainer.prepare"]
        assert len([a for a in arguments if a.startswith("output=gs://")]) == 1
    elif pods.overlay == "overlays/backbones":
        assert pods.container["command"] == ["python", "-m", "trainer.backbones"]
        given, _ = parse_arguments(arguments, backbones.__doc__, backbones.ARGUMENTS, other_arguments=ALL_ARGUMENTS)
        assert given["output"].startswith("gs://")
        networks = parse_candidates(given["among"])
        assert len(networks) > 1
        assert config.data.source == "image_folder"
    elif pods.overlay == "overlays/nightly":
        assert pods.container["command"] == ["python", "-m", "trainer.nightly"]
        given, rest = parse_arguments(arguments, nightly.__doc__, nightly.ARGUMENTS, other_arguments=ALL_ARGUMENTS)
        assert given.keys() >= {"to", "log", "runs"}
        assert not any(argument.startswith("output_dir=") for argument in rest)  # the night names its run
    else:
        assert "command" not in pods.container  # the image's own entry point
        runs = "/runs" if pods.overlay == "overlays/local" else "gs://BUCKET/runs"
        assert config.output_dir == f"{runs}/{pods.job_name}" + ("/0" if pods.is_sweep else "")
        gpus = int(pods.container["resources"]["limits"].get("nvidia.com/gpu", 1))
        assert config.training.batch_size % (gpus * pods.workers) == 0
        assert config.resume == "auto"


def containers_with_a_gpu() -> list[tuple[str, Object]]:
    """Every container of every overlay and file that has a GPU, with the name of the overlay or file."""
    templates = [(get_name(pods), pods.template) for pods in ALL]
    for path in FILES:
        templates += [(path.name, tree["spec"]["template"]) for tree in load_documents(path) if tree["kind"] == "Job"]
    return [
        (name, container)
        for name, template in templates
        for container in list_containers(template["spec"])
        if container["resources"]["limits"].get("nvidia.com/gpu")
    ]


def test_every_container_with_a_gpu_that_trains_uses_the_settings_of_gpus() -> None:
    """`runtime=pod` would be float32 without XLA."""
    settings = {}
    for name, container in containers_with_a_gpu():
        if container.get("command", [""])[0].endswith("/trtexec"):  # nothing of the trainer
            continue
        (choice,) = [a for a in container["args"] if a.startswith("runtime=")]
        runtime = _configuration(("data=digits", choice), "").runtime
        settings[name] = (runtime.precision, runtime.xla, runtime.http_port, runtime.cache_dir)
        overridden = [a for a in container["args"] if re.match(r"runtime\.(precision|xla|steps_per_call)=", a)]
        assert overridden == [], name
    assert set(settings.values()) == {("auto", "auto", 8080, "/cache")}
    cpu = {"local", "prepare", "serve", "serving", "serving-log", "tensorboard"}
    assert {get_name(pods) for pods in ALL} - settings.keys() - {"base"} <= cpu
    assert {"job.yaml", "multiworker.yaml", "base", "nightly", "jobset", "sweep", "backbones"} <= settings.keys()


@pytest.mark.parametrize("pods", [pods for pods in JOBS if "nvidia.com/gpu" not in str(pods.spec)], ids=get_name)
def test_pods_without_a_gpu_use_the_settings_of_pods(pods: Pods) -> None:
    assert "runtime=pod" in pods.arguments()


@pytest.mark.parametrize("pods", JOBS, ids=get_name)
def test_ports_paths_and_disk_are_those_of_the_pod_preset(pods: Pods) -> None:
    runtime = configuration(pods).runtime
    preset = yaml.safe_load((ROOT / "conf" / "runtime" / "pod.yaml").read_text())
    (port,) = [p["containerPort"] for p in pods.container["ports"] if p["name"] == "http"]
    assert port == preset["http_port"] == runtime.http_port
    assert runtime.log_format == "json"
    assert runtime.termination_log == pods.container.get("terminationMessagePath", "/dev/termination-log")
    (mount,) = [m for m in pods.container["volumeMounts"] if m["mountPath"] == runtime.cache_dir]
    (volume,) = [v for v in pods.spec["volumes"] if v["name"] == mount["name"]]
    limit = parse_bytes(volume["emptyDir"]["sizeLimit"])
    # Copies of the data and decoded images have the budget each; the rest is for weights and checkpoints.
    assert runtime.disk_budget is None
    budget, _ = plan_disk_budget(None, 10**15, int(pods.environment()["EPHEMERAL_STORAGE_BYTES"]))
    assert 2 * budget < 0.92 * limit


@pytest.mark.parametrize("pods", JOBS, ids=get_name)
def test_the_failure_policy_lists_the_exit_codes_of_the_trainer(pods: Pods) -> None:
    assert pods.job is not None
    codes = {"containerName": pods.container["name"], "operator": "In"}
    final = [errors.WRONG_INPUT, errors.GAVE_UP] + [errors.NOT_PROMOTED] * (pods.overlay == "overlays/nightly")
    failing = "FailIndex" if pods.is_sweep else "FailJob"  # the other runs of a sweep continue
    assert pods.job["podFailurePolicy"]["rules"] == [  # all other exit codes count against the backoff limit
        {"action": failing, "onExitCodes": {**codes, "values": final}},
        {"action": "Ignore", "onExitCodes": {**codes, "values": [errors.INTERRUPTED]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]


@pytest.mark.parametrize("pods", JOBS, ids=get_name)
def test_a_new_job_waits_as_long_as_the_pods_of_a_deleted_one_may_save(pods: Pods) -> None:
    assert pods.spec["terminationGracePeriodSeconds"] == lease.GRACE_SECONDS
    assert lease.choose_max_wait(pods.environment()["JOB_UID"]) < configuration(pods).runtime.stuck_after


@pytest.mark.parametrize("pods", JOBS, ids=get_name)
def test_probes_allow_the_time_that_the_trainer_needs_to_respond(pods: Pods) -> None:
    startup, liveness = pods.container["startupProbe"], pods.container["livenessProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 300  # the port opens before TensorFlow is loaded
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 60  # a busy process may miss one


def test_prometheus_scrapes_the_trainer_and_alerts_use_its_metrics() -> None:
    server = importlib.import_module("trainer.monitoring.http")
    source = Path(server.__file__ or "").read_text()
    served = {f"kubetune_{name}" for name in server.GAUGES} | set(re.findall(r'"(kubetune_\w+)"', source))
    rules = alerts()
    named = {name for rule in rules for name in re.findall(r"\bkubetune_\w+", str(rule))}
    assert named >= {"kubetune_last_progress_age_seconds", "kubetune_checkpoint_age_seconds", "kubetune_goodput_ratio"}
    assert named <= served
    assert len({rule["alert"] for rule in rules}) == len(rules)
    (endpoint,) = get_only_object("overlays/monitoring", "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert endpoint["path"] == "/metrics"
    for pods in JOBS:
        assert endpoint["port"] in {port["name"] for port in pods.container["ports"]}


def alerts() -> list[dict[str, Any]]:
    groups = get_only_object("overlays/monitoring", "PrometheusRule")["spec"]["groups"]
    return [rule for group in groups for rule in group["rules"]]


def seconds(duration: str) -> int:
    return int(duration[:-1]) * {"s": 1, "m": 60, "h": 3600}[duration[-1]]


def test_the_alert_of_a_stall_fires_before_the_liveness_probe_ends_the_pod() -> None:
    (stall,) = [rule for rule in alerts() if rule["alert"] == "KubetuneNoProgress"]
    (endpoint,) = get_only_object("overlays/monitoring", "PodMonitor")["spec"]["podMetricsEndpoints"]
    threshold = int(stall["expr"].removeprefix("kubetune_last_progress_age_seconds > "))
    # The metric is read once per interval, and the rules are evaluated once per minute by default.
    latest = threshold + seconds(stall["for"]) + seconds(endpoint["interval"]) + 60
    for pods in JOBS:
        assert latest < configuration(pods).runtime.stuck_after


def test_alerts_on_the_state_of_kubernetes_select_by_label_and_end() -> None:
    rules = {rule["alert"]: rule["expr"] for rule in alerts() if "kube_" in rule["expr"]}
    assert len(rules) == 4
    for name, expression in rules.items():
        assert "=~" not in expression, "another name is another run"
        assert 'label_app_kubernetes_io_part_of="kubetune"' in expression, name
    assert "offset 1h" in rules["KubetuneFailed"]  # the failed Job remains for a week
    for folder in ("overlays/serving", "overlays/serve"):
        (deployment,) = render_objects(folder, "Deployment")
        assert deployment["metadata"]["labels"]["app.kubernetes.io/part-of"] == "kubetune"


def test_every_job_has_its_own_output_dir_which_restarts_keep() -> None:
    """JOB_NAME comes from Kubernetes, not from the manifest, so a CronJob's Jobs do not write into one folder."""
    for pods in JOBS:
        (variable,) = [v for v in pods.container["env"] if v["name"] == "JOB_NAME"]
        assert variable["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['batch.kubernetes.io/job-name']"
    cron = get_only_object(
        "overlays/nightly", "CronJob"
    )  # its runs are named by their night, and continued by another Job
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"
    assert cron["spec"]["jobTemplate"]["spec"]["activeDeadlineSeconds"] < 24 * 3600
    assert len(cron["metadata"]["name"]) <= 52  # Kubernetes adds eleven characters


def test_queued_and_spot_jobs_differ_from_the_base_only_where_intended() -> None:
    base, queued, spot = (get_only_object(folder, "Job") for folder in ("base", "overlays/kueue", "overlays/gke-spot"))
    assert "suspend" not in queued["spec"]  # Kueue's webhook sets it; a second `apply` would end the running pods
    assert queued["metadata"]["labels"].pop("kueue.x-k8s.io/queue-name")
    assert queued == base
    pod = spot["spec"]["template"]["spec"]
    assert pod.pop("nodeSelector") == {"cloud.google.com/gke-spot": "true"}
    assert pod["tolerations"].pop()["key"] == "cloud.google.com/gke-spot"
    assert pod["containers"][0]["args"].pop() == "runtime.checkpoint_every=500 steps"
    assert spot == base
