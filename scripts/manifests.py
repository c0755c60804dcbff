"""Write k8s/job.yaml and k8s/multiworker.yaml from the kustomizations they stand for: `make manifests`.

kustomize sorts keys and drops comments. Both are taken from its sources again: every key and item that a source file
has a remark at, and every order of keys, is found in the result by its path.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

K8S = Path(__file__).parent.parent / "k8s"
StoragePath = tuple[str, ...]  # ("Job", "spec", "template", ...); items of lists by their name

HEADERS = {
    "job.yaml": """\
# Fine-tune on one GPU node with all its GPUs; checkpoints, report and model go to a bucket (docs/kubernetes.md).
# Three edits, each marked EDIT: the image, the experiment, the bucket. Kubernetes 1.30 or later.
#
#   start    kubectl apply -f k8s/job.yaml
#   watch    kubectl get pods --watch -l batch.kubernetes.io/job-name=kubetune
#   log      kubectl logs --follow job/kubetune
""",
    "multiworker.yaml": """\
# Fine-tune on several GPU nodes, one worker each; checkpoints, report and model go to a bucket (docs/kubernetes.md).
# Three edits, each marked EDIT: the image, the experiment, the bucket; and where it is not 2, the number of workers.
# Kubernetes 1.30 or later.
#
#   start    kubectl apply -f k8s/multiworker.yaml
#   watch    kubectl get pods --watch -l batch.kubernetes.io/job-name=kubetune
#   log      kubectl logs --follow -l batch.kubernetes.io/job-name=kubetune,batch.kubernetes.io/job-completion-index=0
""",
}
COMMANDS = """\
#   pause    kubectl patch job kubetune --patch '{{"spec": {{"suspend": true}}}}'    (saves first; false: it goes on)
#   stop     kubectl delete job kubetune --cascade=foreground    (saves a checkpoint, and waits for it)
#   resume   start it again: under the same name the run goes on where it stopped
#   delete   kubectl delete -f k8s/{file}    (what the run wrote stays in the bucket)
#
# Pods that were preempted or evicted are started again without you. A finished run that is started again only says so.
# A Job cannot be changed: to change something stop it, and start the new one. With another name it is another run.
# Made from k8s/{folder} by `make manifests`; change it there, or keep a copy of this file for yourself.
"""
FOLDERS = {"job.yaml": "base", "multiworker.yaml": "overlays/multiworker"}
# Remarks of the sources that speak of kustomize, as they read in a file of its own.
INSTEAD = {
    ("Job", "spec", "completions"): "# EDIT: workers, one GPU node each; the same number at WORKER_COUNT",
    ("Job", "spec", "template", "spec", "containers", "trainer", "env", "WORKER_COUNT", "value"): "# as completions",
}


class Fault(Exception):
    """Why there are no manifests, in one sentence."""


def kubectl() -> str:
    """The locked kubectl (kustomize is in it) beside this Python, else that of the machine."""
    found = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or shutil.which("kubectl")
    if found is None:
        raise Fault("kubectl is not installed; `make setup` installs it into .venv")
    return found


def rendered(folder: str) -> list[dict[str, Any]]:
    """What `kubectl apply --kustomize k8s/<folder>` would apply."""
    command = [kubectl(), "kustomize", str(K8S / folder)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if answer.returncode:
        raise Fault(f"k8s/{folder}: {answer.stderr.strip()}")
    return list(yaml.safe_load_all(answer.stdout))


def sources(folder: Path) -> list[Path]:
    """The objects and patches that a kustomization is made of, in the order in which they are applied."""
    tree = yaml.safe_load((folder / "kustomization.yaml").read_text())
    patches = [patch["path"] for patch in tree.get("patches", []) if "path" in patch]
    found: list[Path] = []
    for name in [*tree.get("resources", []), *tree.get("components", []), *patches]:
        path = (folder / name).resolve()
        found += sources(path) if path.is_dir() else [path]
    return found


def name_of(item: Any, index: int) -> str:
    """What an item of a list is called: its name, the key of KEY=VALUE, or its number."""
    if isinstance(item, dict):
        return str(item.get("name", index))
    return str(item).split("=")[0]


def plain(node: yaml.Node) -> Any:
    """A node without its place in the text, as far as `name_of` looks."""
    if isinstance(node, yaml.MappingNode):
        return {key.value: value.value for key, value in node.value}
    return node.value


def nodes_of(text: str) -> dict[StoragePath, tuple[int, yaml.Node]]:
    """The line that each key and item begins in, and its value; its own place comes before those of what is in it."""
    found: dict[StoragePath, tuple[int, yaml.Node]] = {}

    def walk(node: yaml.Node, place: StoragePath) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                found[*place, key.value] = key.start_mark.line, value
                walk(value, (*place, key.value))
        elif isinstance(node, yaml.SequenceNode) and not node.flow_style:
            for index, item in enumerate(node.value):
                here = (*place, name_of(plain(item), index))
                found[here] = item.start_mark.line, item
                walk(item, here)

    for document in yaml.compose_all(text):
        kind = next(value.value for key, value in document.value if key.value == "kind")
        walk(document, (kind,))
    return found


def remarks_of(text: str) -> tuple[dict[StoragePath, list[str]], dict[StoragePath, str]]:
    """The comments above keys and items, and those beside them."""
    ends: dict[int, int] = {}
    for token in yaml.scan(text):
        if not isinstance(token, yaml.BlockEndToken | yaml.StreamEndToken):
            ends[token.end_mark.line] = token.end_mark.column
    lines = text.splitlines()
    above: dict[StoragePath, list[str]] = {}
    beside: dict[StoragePath, str] = {}
    taken: set[int] = set()
    for place, (number, _) in nodes_of(text).items():
        if number in taken:
            continue
        taken.add(number)
        first = number
        while first > 0 and lines[first - 1].lstrip().startswith("#"):
            first -= 1
        if lines[first:number]:
            above[place] = lines[first:number]
        remark = lines[number][ends[number] :].strip()
        if remark:
            beside[place] = remark
    return above, beside


def merge_order(order: dict[StoragePath, list[str]], tree: Any, place: StoragePath) -> None:
    """Learn the order of keys and items; what is new goes before the known one that follows it."""
    if isinstance(tree, list):
        tree = {name_of(item, index): item for index, item in enumerate(tree)}
    if not isinstance(tree, dict):
        return
    known = order.setdefault(place, [])
    names = list(tree)
    for index, name in enumerate(names):
        if name not in known:
            after = next((known.index(other) for other in names[index + 1 :] if other in known), len(known))
            known.insert(after, name)
        merge_order(order, tree[name], (*place, name))


def arranged(tree: Any, order: dict[StoragePath, list[str]], in_line: set[StoragePath], place: StoragePath) -> Any:
    """The same tree in the learnt order; lists that the sources have in one line are marked."""
    known = order.get(place, [])
    if isinstance(tree, dict):
        names = sorted(tree, key=lambda name: known.index(name) if name in known else len(known))
        return {name: arranged(tree[name], order, in_line, (*place, name)) for name in names}
    if isinstance(tree, list):
        items = {name_of(item, index): item for index, item in enumerate(tree)}
        return (_InLine if place in in_line else list)(arranged(items, order, in_line, place).values())
    return tree


class _InLine(list[Any]):
    """A list that is written in one line."""


class _Dumper(yaml.SafeDumper):
    """As people write manifests: lists indented below their key, double quotes."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002
        super().increase_indent(flow, False)

    def in_line(self, items: list[Any]) -> yaml.Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)

    def text(self, text: str) -> yaml.Node:
        style = None if isinstance(yaml.safe_load(text), str) else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(_InLine, _Dumper.in_line)
_Dumper.add_representer(str, _Dumper.text)


def manifest(file: str) -> str:
    """The text of k8s/<file>."""
    trees = rendered(FOLDERS[file])
    above: dict[StoragePath, list[str]] = {}
    beside: dict[StoragePath, str] = {}
    order: dict[StoragePath, list[str]] = {}
    in_line: set[StoragePath] = set()
    for path in sources(K8S / FOLDERS[file]):
        text = path.read_text()
        over, behind = remarks_of(text)
        above, beside = above | over, beside | behind
        in_line |= {
            place
            for place, (_, node) in nodes_of(text).items()
            if isinstance(node, yaml.SequenceNode) and node.flow_style
        }
        for tree in yaml.safe_load_all(text):
            merge_order(order, tree, (tree["kind"],))
    beside |= INSTEAD
    objects = [arranged(tree, order, in_line, (tree["kind"],)) for tree in trees]
    text = yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=1000)
    lines = text.splitlines()
    for place, (number, _) in reversed(nodes_of(text).items()):
        if place in beside:
            lines[number] += f" {beside[place]}"
        if place in above:
            lines[number:number] = above[place]
    body = "\n".join(lines) + "\n"
    # One number for both: an anchor is all that plain YAML has (WORKER_COUNT is text, and needs its own).
    if "  completions: " in body:
        count = next(tree["spec"]["completions"] for tree in objects if tree["kind"] == "Job")
        body = body.replace(f"  completions: {count}", f"  completions: &workers {count}")
        body = body.replace(f"  parallelism: {count}", "  parallelism: *workers")
    return HEADERS[file] + COMMANDS.format(file=file, folder=FOLDERS[file]) + "---\n" + body


def main() -> None:
    """Entry point of `make manifests`."""
    try:
        texts = {name: manifest(name) for name in FOLDERS}
    except Fault as fault:
        sys.exit(f"manifests: {fault}")
    for name, text in texts.items():
        (K8S / name).write_text(text)
        print(f"manifests: k8s/{name} is written")


if __name__ == "__main__":
    main()
