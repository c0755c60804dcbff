"""What the API server adds to an object that it stores: the defaults of Kubernetes for the kinds of these manifests.

Source: `SetDefaults_*` in pkg/apis/*/v*/defaults.go and the `+default` marks of k8s.io/api, Kubernetes 1.33; the
definition and the webhook of JobSet 0.11. Those of the Prometheus operator are not here.
"""

import copy
from typing import Any

Object = dict[str, Any]


def apply_defaults(tree: Object) -> Object:
    """Return a copy of an object with the defaults of its kind."""
    tree = copy.deepcopy(tree)
    kind, spec = tree["kind"], tree.get("spec", {})
    name = tree["metadata"]["name"]
    if kind == "Job":
        _job(spec, name)
    elif kind == "CronJob":
        _fill(spec, {"concurrencyPolicy": "Allow", "suspend": False, "successfulJobsHistoryLimit": 3,
                     "failedJobsHistoryLimit": 1})  # fmt: skip
        _template(spec["jobTemplate"]["spec"]["template"])
    elif kind == "JobSet":
        _fill(spec, {"successPolicy": {"operator": "All"}, "startupPolicy": {"startupPolicyOrder": "AnyOrder"}})
        for replicated in spec["replicatedJobs"]:
            _fill(replicated, {"groupName": "default", "replicas": 1})
            for container in replicated["template"]["spec"]["template"]["spec"]["containers"]:
                for port in container.get("ports", []):
                    _fill(port, {"protocol": "TCP"})
    elif kind == "Deployment":
        _fill(spec, {"replicas": 1, "revisionHistoryLimit": 10, "progressDeadlineSeconds": 600, "strategy": {}})
        _fill(spec["strategy"], {"type": "RollingUpdate"})
        if spec["strategy"]["type"] == "RollingUpdate":
            _fill(spec["strategy"].setdefault("rollingUpdate", {}), {"maxSurge": "25%", "maxUnavailable": "25%"})
        _template(spec["template"])
    elif kind == "Service":
        _fill(spec, {"type": "ClusterIP", "sessionAffinity": "None", "internalTrafficPolicy": "Cluster",
                     "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack", "clusterIP": "10.0.0.7"})  # fmt: skip
        _fill(spec, {"clusterIPs": [spec["clusterIP"]]})
        for port in spec.get("ports", []):
            _fill(port, {"protocol": "TCP", "targetPort": port["port"]})
    elif kind == "NetworkPolicy":
        for rule in spec.get("ingress", []):
            for port in rule.get("ports", []):
                _fill(port, {"protocol": "TCP"})
    elif kind == "HorizontalPodAutoscaler":
        _fill(spec, {"minReplicas": 1})
    elif kind == "PersistentVolumeClaim":
        _fill(spec, {"volumeMode": "Filesystem", "storageClassName": "standard"})
        tree["metadata"]["finalizers"] = ["kubernetes.io/pvc-protection"]
    elif kind == "PriorityClass":
        _fill(tree, {"preemptionPolicy": "PreemptLowerPriority"})
    elif kind == "Pod":
        _pod(spec)
    return tree


def _fill(tree: Object, defaults: Object) -> None:
    for key, value in defaults.items():
        tree.setdefault(key, copy.deepcopy(value))


def _job(spec: Object, name: str) -> None:
    limit = 2**31 - 1 if "backoffLimitPerIndex" in spec else 6
    _fill(spec, {"completions": 1, "parallelism": 1, "backoffLimit": limit, "completionMode": "NonIndexed",
                 "suspend": False, "manualSelector": False, "podReplacementPolicy": "TerminatingOrFailed"})  # fmt: skip
    for rule in spec.get("podFailurePolicy", {}).get("rules", []):
        for pattern in rule.get("onPodConditions", []):
            _fill(pattern, {"status": "True"})
    uid = "4f1c3a52-0000-4000-8000-2d5b8a6f0001"
    labels = {"controller-uid": uid, "job-name": name}
    _fill(spec["template"].setdefault("metadata", {}).setdefault("labels", {}),
          labels | {f"batch.kubernetes.io/{key}": value for key, value in labels.items()})  # fmt: skip
    _fill(spec, {"selector": {"matchLabels": {"batch.kubernetes.io/controller-uid": uid}}})
    _template(spec["template"])


def _template(template: Object) -> None:
    template.setdefault("metadata", {})["creationTimestamp"] = None
    _pod(template["spec"])


def _pod(spec: Object) -> None:
    _fill(spec, {"dnsPolicy": "ClusterFirst", "restartPolicy": "Always", "terminationGracePeriodSeconds": 30,
                 "schedulerName": "default-scheduler", "securityContext": {}, "enableServiceLinks": True})  # fmt: skip
    if "serviceAccountName" in spec:
        spec["serviceAccount"] = spec["serviceAccountName"]
    for container in (*spec.get("initContainers", []), *spec["containers"]):
        _container(container)
    for volume in spec.get("volumes", []):
        for kind in ("configMap", "secret"):
            if kind in volume:
                _fill(volume[kind], {"defaultMode": 0o644})


def _container(container: Object) -> None:
    tag = container["image"].rpartition("/")[2].partition("@")[0].partition(":")[2] or "latest"
    policy = "Always" if tag == "latest" and "@" not in container["image"] else "IfNotPresent"
    _fill(container, {"terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File",
                      "imagePullPolicy": policy, "resources": {}})  # fmt: skip
    for port in container.get("ports", []):
        _fill(port, {"protocol": "TCP"})
    for variable in container.get("env", []):
        source = variable.get("valueFrom", {})
        if "fieldRef" in source:
            _fill(source["fieldRef"], {"apiVersion": "v1"})
        if "resourceFieldRef" in source:
            _fill(source["resourceFieldRef"], {"divisor": "0"})
    for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
        if probe := container.get(kind):
            _fill(probe, {"timeoutSeconds": 1, "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3})
            if "httpGet" in probe:
                _fill(probe["httpGet"], {"path": "/", "scheme": "HTTP"})
