"""What the Job controller of Kubernetes makes of the pods that have ended; nothing here runs or waits.

After https://kubernetes.io/docs/concepts/workloads/controllers/job and pkg/controller/job of Kubernetes 1.33. Reasons
and messages are those that `kubectl describe job` shows. Left out: success policies, deadlines, suspension, and the
pause before a replacement (10 s, doubled with every failure of the index, ignored ones too, up to 10 minutes).
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Spec = Mapping[str, Any]  # of a Job
NO_LIMIT = 2**31 - 1  # what backoffLimit is where there is one for each index
DEFAULT_LIMIT = 6


@dataclass(frozen=True)
class Ended:
    """A pod all of whose containers have ended.

    Attributes:
        index: its completion index; without indices always 0.
        exit_codes: by container.
        conditions: those that are true, `DisruptionTarget` for example.
    """

    name: str
    index: int
    exit_codes: Mapping[str, int]
    conditions: frozenset[str] = frozenset()

    @property
    def succeeded(self) -> bool:
        return not any(self.exit_codes.values())


@dataclass(frozen=True)
class Alive:
    """A pod that runs; one that was deleted still runs until its containers have ended."""

    index: int
    deleted: bool = False


@dataclass(frozen=True)
class Verdict:
    """The condition that ends a Job."""

    type: str  # Complete or Failed
    reason: str
    message: str


def action(spec: Spec, pod: Ended) -> tuple[str, str]:
    """What the first rule that fits a failed pod says (Count where none does), and the message of FailJob."""
    for number, rule in enumerate(spec.get("podFailurePolicy", {}).get("rules", [])):
        if "onExitCodes" in rule:
            wanted = rule["onExitCodes"]
            for container, code in pod.exit_codes.items():
                named = wanted.get("containerName", container) == container
                if named and code != 0 and (code in wanted["values"]) == (wanted["operator"] == "In"):
                    what = f"Container {container} for pod {pod.name} failed with exit code {code}"
                    return rule["action"], f"{what} matching {rule['action']} rule at index {number}"
        for pattern in rule.get("onPodConditions", []):
            if pattern["type"] in pod.conditions and pattern.get("status", "True") == "True":
                what = f"Pod {pod.name} has condition {pattern['type']}"
                return rule["action"], f"{what} matching {rule['action']} rule at index {number}"
    return "Count", ""


def succeeded_indexes(ended: Sequence[Ended]) -> set[int]:
    return {pod.index for pod in ended if pod.succeeded}


def failed_indexes(spec: Spec, ended: Sequence[Ended]) -> set[int]:
    """The indices that are given up: FailIndex, or more failures that count than backoffLimitPerIndex."""
    if "backoffLimitPerIndex" not in spec:
        return set()
    actions = [(pod.index, action(spec, pod)[0]) for pod in ended if not pod.succeeded]
    counted = Counter(index for index, what in actions if what == "Count")
    return {index for index, what in actions if what == "FailIndex" or counted[index] > spec["backoffLimitPerIndex"]}


def verdict(spec: Spec, ended: Sequence[Ended]) -> Verdict | None:
    """How the Job ends; None while it goes on. The pods that still run then are deleted.

    Args:
        spec: of the Job.
        ended: all its pods that have ended so far, in this order.
    """
    actions = [action(spec, pod) for pod in ended if not pod.succeeded]
    for what, message in actions:
        if what == "FailJob":
            return Verdict("Failed", "PodFailurePolicy", message)
    per_index = "backoffLimitPerIndex" in spec
    counted = sum(what in ("Count", "FailIndex") for what, _ in actions)
    if counted > spec.get("backoffLimit", NO_LIMIT if per_index else DEFAULT_LIMIT):
        return Verdict("Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit")
    done, lost = succeeded_indexes(ended), failed_indexes(spec, ended)
    if len(lost) > spec.get("maxFailedIndexes", NO_LIMIT):
        message = "Job has exceeded the specified maximal number of failed indexes"
        return Verdict("Failed", "MaxFailedIndexesExceeded", message)
    completions = spec.get("completions", 1)
    if lost and len(done | lost) >= completions:
        return Verdict("Failed", "FailedIndexes", "Job has failed indexes")
    complete = len(done) if spec.get("completionMode") == "Indexed" else sum(pod.succeeded for pod in ended)
    if complete >= completions:
        return Verdict("Complete", "CompletionsReached", "Reached expected number of succeeded pods")
    return None


def to_start(spec: Spec, ended: Sequence[Ended], alive: Collection[Alive]) -> list[int]:
    """The indices that need a pod now, the lowest first; without indices a 0 for each pod."""
    if verdict(spec, ended):
        return []
    policy = spec.get("podReplacementPolicy", "Failed" if "podFailurePolicy" in spec else "TerminatingOrFailed")
    there = [pod.index for pod in alive if policy == "Failed" or not pod.deleted]
    room = spec.get("parallelism", 1) - len(there)
    if spec.get("completionMode") != "Indexed":
        missing = spec.get("completions", 1) - sum(pod.succeeded for pod in ended) - len(there)
        return [0] * max(min(room, missing), 0)
    settled = succeeded_indexes(ended) | failed_indexes(spec, ended) | set(there)
    return [index for index in range(spec["completions"]) if index not in settled][: max(room, 0)]
