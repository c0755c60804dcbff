"""A small API server for `kubectl`: it stores objects, and records the requests that change them.

It implements discovery, get, list by labels, create, delete, the logs of a pod, and the defaults of Kubernetes
(`tests.k8s.defaults`). A patch is recorded, unless the object already has what it sets, and is not applied. Admission
and controllers are not implemented.
"""

import http.server
import json
import threading
import uuid
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.k8s.defaults import apply_defaults

RESOURCES = {  # path of the group version -> (kind, plural)
    "api/v1": [("Pod", "pods"), ("ServiceAccount", "serviceaccounts"), ("Service", "services"),
               ("ConfigMap", "configmaps"), ("PersistentVolumeClaim", "persistentvolumeclaims")],
    "apis/apps/v1": [("Deployment", "deployments")],
    "apis/autoscaling/v2": [("HorizontalPodAutoscaler", "horizontalpodautoscalers")],
    "apis/batch/v1": [("Job", "jobs"), ("CronJob", "cronjobs")],
    "apis/jobset.x-k8s.io/v1alpha2": [("JobSet", "jobsets")],
    "apis/monitoring.coreos.com/v1": [("PodMonitor", "podmonitors"), ("PrometheusRule", "prometheusrules")],
    "apis/networking.k8s.io/v1": [("NetworkPolicy", "networkpolicies")],
    "apis/policy/v1": [("PodDisruptionBudget", "poddisruptionbudgets")],
    "apis/scheduling.k8s.io/v1": [("PriorityClass", "priorityclasses")],
}  # fmt: skip
IN_NO_NAMESPACE = {"PriorityClass"}


class ApiServer:
    """The server, on a free port inside a `with` block."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}  # by plural and name
        self.logs: dict[str, str] = {}  # of pods
        self.changes: list[str] = []  # "POST jobs/kubetune", ...
        self.queries: list[str] = []  # of deletions: their bodies
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                owner._get(self)

            def do_POST(self) -> None:
                owner._change(self)

            do_PATCH = do_DELETE = do_PUT = do_POST

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "ApiServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, plural: str, tree: dict[str, Any]) -> None:
        tree = apply_defaults(tree)
        tree["metadata"] = {"namespace": "default", "uid": str(uuid.uuid4()), "resourceVersion": "1"} | tree["metadata"]
        self.objects[plural, tree["metadata"]["name"]] = tree

    def _get(self, request: Any) -> None:
        url = urlsplit(request.path)
        path, query = url.path.strip("/"), parse_qs(url.query)
        if path == "api":
            return _send(request, {"kind": "APIVersions", "versions": ["v1"]})
        if path == "apis":
            groups = [path.split("/")[1:] for path in RESOURCES if path.startswith("apis/")]
            return _send(request, {"kind": "APIGroupList", "apiVersion": "v1", "groups": [
                {"name": name, "versions": [{"groupVersion": f"{name}/{version}", "version": version}],
                 "preferredVersion": {"groupVersion": f"{name}/{version}", "version": version}}
                for name, version in groups
            ]})  # fmt: skip
        if path in RESOURCES:
            verbs = ["get", "list", "create", "patch", "delete", "update"]
            group_version = path.removeprefix("apis/").removeprefix("api/")
            resources = [{"name": plural, "singularName": kind.lower(), "kind": kind, "verbs": verbs,
                          "namespaced": kind not in IN_NO_NAMESPACE}
                         for kind, plural in RESOURCES[path]]  # fmt: skip
            return _send(
                request,
                {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": resources},
            )
        parts = _parts(path)
        if parts[-1] == "log":
            return _send(request, self.logs[parts[1]])
        if len(parts) == 2:
            tree = self.objects.get((parts[0], parts[1]))
            return _send(request, tree) if tree else _send(request, _missing(*parts), 404)
        if len(parts) == 1 and parts[0]:
            wanted = [term.split("=") for text in query.get("labelSelector", []) for term in text.split(",")]
            items = [
                tree for (plural, _), tree in self.objects.items()
                if plural == parts[0] and all(tree["metadata"].get("labels", {}).get(k) == v for k, v in wanted)
            ]  # fmt: skip
            (kind,) = [kind for pairs in RESOURCES.values() for kind, plural in pairs if plural == parts[0]]
            version = path.partition("/namespaces/")[0].removeprefix("apis/").removeprefix("api/")
            return _send(request, {"kind": f"{kind}List", "apiVersion": version, "metadata": {}, "items": items})
        return _send(request, _missing("", path), 404)

    def _change(self, request: Any) -> None:
        content = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        parts = _parts(urlsplit(request.path).path.strip("/"))
        tree = json.loads(content) if content else {}
        name = parts[1] if len(parts) > 1 else tree["metadata"]["name"]
        if request.command == "DELETE" and (parts[0], name) not in self.objects:
            return _send(request, _missing(parts[0], name), 404)
        # kubectl always sends the selector of a PodDisruptionBudget; the API server does not write an equal object.
        if request.command != "PATCH" or not _contains(self.objects[parts[0], name], tree):
            self.changes.append(f"{request.command} {parts[0]}/{name}")
        if request.command == "POST":
            self.add(parts[0], tree)
        elif request.command == "DELETE":
            self.queries.append(content.decode())
            self.objects.pop((parts[0], name))
            return _send(request, {"kind": "Status", "apiVersion": "v1", "status": "Success"})
        return _send(request, self.objects[parts[0], name], 201 if request.command == "POST" else 200)


def _contains(tree: Any, patch: Any) -> bool:
    """True if a patch sets only what the object has; a directive, such as `$retainKeys`, sets something."""
    if isinstance(tree, dict) and isinstance(patch, dict):
        return all(key in tree and _contains(tree[key], value) for key, value in patch.items())
    return bool(tree == patch)


def _parts(path: str) -> list[str]:
    """Plural, name and subresource of a path, which are there as far as the path has them."""
    _, namespaced, rest = path.partition("/namespaces/default/")
    return (rest if namespaced else "/".join(path.split("/")[3:])).split("/")


def _missing(plural: str, name: str) -> dict[str, Any]:
    return {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404,
            "message": f'{plural} "{name}" not found', "details": {"name": name, "kind": plural}}  # fmt: skip


def _send(request: Any, content: dict[str, Any] | str, status: int = 200) -> None:
    body = (content if isinstance(content, str) else json.dumps(content)).encode()
    request.send_response(status)
    request.send_header("Content-Type", "text/plain" if isinstance(content, str) else "application/json")
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)
