"""Write k8s/job.yaml and k8s/multiworker.yaml from their kustomizations: `make manifests`.

kustomize sorts keys and removes comments. This script restores both from the source files: it matches each key and
list item by its path (`NodePath`) in the rendered manifest and in the sources.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

K8S = Path(__file__).parent.parent / "k8s"
NodePath = tuple[str, ...]  # path of a YAML node, such as ("Job", "spec", "template"); list items by `get_item_name`

HEADERS = {
    "job.yaml": """\
# Fine-tune on one GPU node with all its GPUs; checkpoints, report and model go to a bucket (docs/kubernetes.md).
# Three edits, each marked EDIT: the image, the experiment, the bucket. Kubernetes 1.30 or later.
#
#   once     kubectl apply -k k8s/shared
#   start    kubectl apply -f k8s/job.yaml
#   watch    kubectl get pods --watch -l batch.kubernetes.io/job-name=kubetune
#   log      kubectl logs --follow $(kubectl get pods --output=name --sort-by=.metadata.creationTimestamp \\
#              --selector=batch.kubernetes.io/job-name=kubetune | tail -n 1)
""",
    "multiworker.yaml": """\
# Fine-tune on several GPU nodes, one worker each; checkpoints, report and model go to a bucket (docs/kubernetes.md).
# Three edits, each marked EDIT: the image, the experiment, the bucket; and where it is not 2, the number of workers.
# Kubernetes 1.30 or later. To continue a run on another number of workers edit both numbers, and use `again`; with
# `training.virtual_replicas` the result has the same bits as on the first number (docs/distributed.md).
#
#   once     kubectl apply -k k8s/shared
#   start    kubectl apply -f k8s/multiworker.yaml
#   watch    kubectl get pods --watch -l batch.kubernetes.io/job-name=kubetune
#   log      kubectl logs --follow $(kubectl get pods --output=name --sort-by=.metadata.creationTimestamp \\
#              --selector=batch.kubernetes.io/job-name=kubetune,batch.kubernetes.io/job-completion-index=0 | tail -n 1)
""",
}
COMMANDS = """\
#   pause    kubectl patch job kubetune --patch '{{"spec": {{"suspend": true}}}}'    (saves a checkpoint; false resumes)
#   stop     kubectl delete job kubetune --cascade=foreground    (saves a checkpoint, and waits for it)
#   again    {again}    (stop, if it runs, and start)
#
# Preempted and evicted pods are replaced automatically. The log is that of the newest pod. The output is in the bucket.
# A second `apply` of the same file changes nothing: a running Job continues, an ended Job stays, and refuses changes.
# `again` starts an ended, stopped or edited Job: under the same name the run continues from its newest checkpoint, and
# a finished run exits with 0. Another name, at &run, is another run in another folder.
# Made from k8s/{folder} by `make manifests`; change it there, or edit a copy of this file.
"""
AGAIN_COMMANDS = {  # the policy of the workers stays until their last checkpoint is saved
    "job.yaml": "kubectl replace --force --cascade=foreground -f k8s/job.yaml",
    "multiworker.yaml": """\
kubectl delete job kubetune --cascade=foreground --ignore-not-found && \\
#              kubectl apply -f k8s/multiworker.yaml""",
}
FOLDERS = {"job.yaml": "base", "multiworker.yaml": "overlays/multiworker"}
# Path of a source comment that makes sense for kustomize only -> the comment that replaces it in the written file
REPLACED_COMMENTS = {
    ("Job", "spec", "completions"): "# EDIT: workers, one GPU node each; the same number at WORKER_COUNT",
    ("Job", "spec", "template", "spec", "containers", "trainer", "env", "WORKER_COUNT", "value"): "# as completions",
    ("Job", "spec", "template", "spec", "containers", "trainer", "image"): (
        "# EDIT: the image that you built and pushed, REGISTRY/kubetune@sha256:... or :TAG"
    ),
}


class ManifestError(Exception):
    """The manifests cannot be written; the message is one sentence."""


def find_kubectl() -> str:
    """Return the path of kubectl, which contains kustomize: that of this Python's environment, else that in $PATH."""
    program = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or shutil.which("kubectl")
    if program is None:
        raise ManifestError("kubectl is not installed; `make setup` installs it into .venv")
    return program


def render(folder: str) -> list[dict[str, Any]]:
    """Render the objects that `kubectl apply --kustomize k8s/<folder>` applies."""
    command = [find_kubectl(), "kustomize", str(K8S / folder)]
    process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if process.returncode:
        raise ManifestError(f"k8s/{folder}: {process.stderr.strip()}")
    return list(yaml.safe_load_all(process.stdout))


def list_sources(folder: Path) -> list[Path]:
    """List the files with the objects and patches of a kustomization, in the order in which they are applied."""
    tree = yaml.safe_load((folder / "kustomization.yaml").read_text())
    patches = [patch["path"] for patch in tree.get("patches", []) if "path" in patch]
    files: list[Path] = []
    for name in [*tree.get("resources", []), *tree.get("components", []), *patches]:
        path = (folder / name).resolve()
        files += list_sources(path) if path.is_dir() else [path]
    return files


def get_item_name(item: Any, index: int) -> str:
    """Return a list item's identifier in a `NodePath`: its name, the key of KEY=VALUE, or its index."""
    if isinstance(item, dict):
        return str(item.get("name", index))
    return str(item).split("=")[0]


def to_plain_value(node: yaml.Node) -> Any:
    """Convert a YAML node to a Python value, to the depth that `get_item_name` needs."""
    if isinstance(node, yaml.MappingNode):
        return {key.value: value.value for key, value in node.value}
    return node.value


def index_nodes(text: str) -> dict[NodePath, tuple[int, yaml.Node]]:
    """Return the line number and the value of each key and list item in a YAML text, parents before their children."""
    nodes: dict[NodePath, tuple[int, yaml.Node]] = {}

    def walk(node: yaml.Node, path: NodePath) -> None:
        """Add the keys and list items below `node`, whose path is `path`, to `nodes`."""
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                nodes[*path, key.value] = key.start_mark.line, value
                walk(value, (*path, key.value))
        elif isinstance(node, yaml.SequenceNode) and not node.flow_style:
            for index, item in enumerate(node.value):
                item_path = (*path, get_item_name(to_plain_value(item), index))
                nodes[item_path] = item.start_mark.line, item
                walk(item, item_path)

    for document in yaml.compose_all(text):
        kind = next(value.value for key, value in document.value if key.value == "kind")
        walk(document, (kind,))
    return nodes


def collect_comments(text: str) -> tuple[dict[NodePath, list[str]], dict[NodePath, str]]:
    """Return the comments above keys and list items, and the comments at the end of their lines."""
    ends: dict[int, int] = {}
    for token in yaml.scan(text):
        if not isinstance(token, yaml.BlockEndToken | yaml.StreamEndToken):
            ends[token.end_mark.line] = token.end_mark.column
    lines = text.splitlines()
    above: dict[NodePath, list[str]] = {}
    inline: dict[NodePath, str] = {}
    visited: set[int] = set()
    for path, (number, _) in index_nodes(text).items():
        if number in visited:
            continue
        visited.add(number)
        first = number
        while first > 0 and lines[first - 1].lstrip().startswith("#"):
            first -= 1
        if lines[first:number]:
            above[path] = lines[first:number]
        if comment := lines[number][ends[number] :].strip():
            inline[path] = comment
    return above, inline


def merge_order(order: dict[NodePath, list[str]], tree: Any, path: NodePath) -> None:
    """Merge the order of keys and list items of `tree` into `order`, by path.

    A new key is inserted before the known key that follows it in `tree`.
    """
    if isinstance(tree, list):
        tree = {get_item_name(item, index): item for index, item in enumerate(tree)}
    if not isinstance(tree, dict):
        return
    known_names = order.setdefault(path, [])
    names = list(tree)
    for index, name in enumerate(names):
        if name not in known_names:
            position = next(
                (known_names.index(other) for other in names[index + 1 :] if other in known_names), len(known_names)
            )
            known_names.insert(position, name)
        merge_order(order, tree[name], (*path, name))


def arrange(tree: Any, order: dict[NodePath, list[str]], inline_lists: set[NodePath], path: NodePath) -> Any:
    """Return `tree` with keys and items in the order of `order`. Lists at the paths `inline_lists` become `_InLine`."""
    known_names = order.get(path, [])
    if isinstance(tree, dict):
        names = sorted(tree, key=lambda name: known_names.index(name) if name in known_names else len(known_names))
        return {name: arrange(tree[name], order, inline_lists, (*path, name)) for name in names}
    if isinstance(tree, list):
        items = {get_item_name(item, index): item for index, item in enumerate(tree)}
        return (_InLine if path in inline_lists else list)(arrange(items, order, inline_lists, path).values())
    return tree


class _InLine(list[Any]):
    """A list that is written on one line, as [a, b]."""


class _Dumper(yaml.SafeDumper):
    """YAML in the usual style of manifests: lists indented below their key, double quotes."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002
        super().increase_indent(flow, False)

    def represent_inline_list(self, items: list[Any]) -> yaml.Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)

    def represent_text(self, text: str) -> yaml.Node:
        style = None if isinstance(yaml.safe_load(text), str) else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(_InLine, _Dumper.represent_inline_list)
_Dumper.add_representer(str, _Dumper.represent_text)


def format_manifest(file: str) -> str:
    """Format the content of k8s/<file>."""
    trees = render(FOLDERS[file])
    above: dict[NodePath, list[str]] = {}
    inline: dict[NodePath, str] = {}
    order: dict[NodePath, list[str]] = {}
    inline_lists: set[NodePath] = set()
    for path in list_sources(K8S / FOLDERS[file]):
        text = path.read_text()
        comments_above, inline_comments = collect_comments(text)
        above, inline = above | comments_above, inline | inline_comments
        for node_path, (_, node) in index_nodes(text).items():
            if isinstance(node, yaml.SequenceNode) and node.flow_style:
                inline_lists.add(node_path)
        for tree in yaml.safe_load_all(text):
            merge_order(order, tree, (tree["kind"],))
    inline |= REPLACED_COMMENTS
    objects = [arrange(tree, order, inline_lists, (tree["kind"],)) for tree in trees]
    text = yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=1000)
    lines = text.splitlines()
    for node_path, (number, _) in reversed(index_nodes(text).items()):
        if node_path in inline:
            lines[number] += f" {inline[node_path]}"
        if node_path in above:
            lines[number:number] = above[node_path]
    body = "\n".join(lines) + "\n"
    # With YAML anchors, users edit a value once. WORKER_COUNT is a string, so it cannot refer to the number of workers.
    for name in (tree["metadata"]["name"] for tree in objects if tree["kind"] == "Job"):
        body = body.replace(f"\nmetadata:\n  name: {name}", f"\nmetadata:\n  name: &run {name}")
        body = body.replace(f"app.kubernetes.io/instance: {name}\n", "app.kubernetes.io/instance: *run\n")
    if "  completions: " in body:
        count = next(tree["spec"]["completions"] for tree in objects if tree["kind"] == "Job")
        body = body.replace(f"  completions: {count}", f"  completions: &workers {count}")
        body = body.replace(f"  parallelism: {count}", "  parallelism: *workers")
    return HEADERS[file] + COMMANDS.format(again=AGAIN_COMMANDS[file], folder=FOLDERS[file]) + "---\n" + body


def main() -> None:
    """Write all manifests; exit with a message if kubectl fails."""
    try:
        texts = {name: format_manifest(name) for name in FOLDERS}
    except ManifestError as error:
        sys.exit(f"manifests: {error}")
    for name, text in texts.items():
        (K8S / name).write_text(text)
        print(f"manifests: k8s/{name} is written")


if __name__ == "__main__":
    main()
