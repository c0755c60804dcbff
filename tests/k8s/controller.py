"""Rules of the Job controller of Kubernetes, as pure functions of the terminated pods.

Source: https://kubernetes.io/docs/concepts/workloads/controllers/job and pkg/controller/job of Kubernetes 1.33. Reasons
and messages are those of `kubectl describe job`. Not implemented: success policies, deadlines, suspension, and the
pause before a replacement (10 s, doubled with every failure of the index, ignored ones too, up to 10 minutes).
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Spec = Mapping[str, Any]  # of a Job
NO_LIMIT = 2**31 - 1  # default of backoffLimit where backoffLimitPerIndex is set
DEFAULT_LIMIT = 6


@dataclass(frozen=True)
class TerminatedPod:
    """A pod with phase Succeeded or Failed."""

    name: str
    index: int  # completion index; 0 in a Job that is not Indexed
    exit_codes: Mapping[str, int]  # by container
    conditions: frozenset[str] = frozenset()  # those that are true, such as DisruptionTarget

    @property
    def succeeded(self) -> bool:
        return not any(self.exit_codes.values())


@dataclass(frozen=True)
class RunningPod:
    """A pod whose containers run; a deleted pod runs until they have terminated."""

    index: int
    deleted: bool = False


@dataclass(frozen=True)
class JobCondition:
    """The condition that ends a Job."""

    type: str  # Complete or Failed
    reason: str
    message: str


def choose_action(spec: Spec, pod: TerminatedPod) -> tuple[str, str]:
    """Return the action of the first podFailurePolicy rule that matches a failed pod (default: Count), and its message."""
    for number, rule in enumerate(spec.get("podFailurePolicy", {}).get("rules", [])):
        if "onExitCodes" in rule:
            codes = rule["onExitCodes"]
            for container, code in pod.exit_codes.items():
                selected = codes.get("containerName", container) == container
                if selected and code != 0 and (code in codes["values"]) == (codes["operator"] == "In"):
                    cause = f"Container {container} for pod {pod.name} failed with exit code {code}"
                    return rule["action"], f"{cause} matching {rule['action']} rule at index {number}"
        for pattern in rule.get("onPodConditions", []):
            if pattern["type"] in pod.conditions and pattern.get("status", "True") == "True":
                cause = f"Pod {pod.name} has condition {pattern['type']}"
                return rule["action"], f"{cause} matching {rule['action']} rule at index {number}"
    return "Count", ""


def succeeded_indexes(terminated: Sequence[TerminatedPod]) -> set[int]:
    return {pod.index for pod in terminated if pod.succeeded}


def failed_indexes(spec: Spec, terminated: Sequence[TerminatedPod]) -> set[int]:
    """Indexes that are not retried: FailIndex, or more counted failures than backoffLimitPerIndex."""
    if "backoffLimitPerIndex" not in spec:
        return set()
    actions = [(pod.index, choose_action(spec, pod)[0]) for pod in terminated if not pod.succeeded]
    counted = Counter(index for index, name in actions if name == "Count")
    return {index for index, name in actions if name == "FailIndex" or counted[index] > spec["backoffLimitPerIndex"]}


def find_final_condition(spec: Spec, terminated: Sequence[TerminatedPod]) -> JobCondition | None:
    """The condition that ends the Job, by its pods in the order of termination; None while the Job runs."""
    actions = [choose_action(spec, pod) for pod in terminated if not pod.succeeded]
    for name, message in actions:
        if name == "FailJob":
            return JobCondition("Failed", "PodFailurePolicy", message)
    per_index = "backoffLimitPerIndex" in spec
    counted = sum(name in ("Count", "FailIndex") for name, _ in actions)
    if counted > spec.get("backoffLimit", NO_LIMIT if per_index else DEFAULT_LIMIT):
        return JobCondition("Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit")
    succeeded, failed = succeeded_indexes(terminated), failed_indexes(spec, terminated)
    if len(failed) > spec.get("maxFailedIndexes", NO_LIMIT):
        message = "Job has exceeded the specified maximal number of failed indexes"
        return JobCondition("Failed", "MaxFailedIndexesExceeded", message)
    completions = spec.get("completions", 1)
    if failed and len(succeeded | failed) >= completions:
        return JobCondition("Failed", "FailedIndexes", "Job has failed indexes")
    indexed = spec.get("completionMode") == "Indexed"
    if (len(succeeded) if indexed else sum(pod.succeeded for pod in terminated)) >= completions:
        return JobCondition("Complete", "CompletionsReached", "Reached expected number of succeeded pods")
    return None


def list_indexes_to_start(
    spec: Spec, terminated: Sequence[TerminatedPod], running: Collection[RunningPod]
) -> list[int]:
    """Indexes that need a pod now, in ascending order; a 0 per pod in a Job that is not Indexed."""
    if find_final_condition(spec, terminated):
        return []
    policy = spec.get("podReplacementPolicy", "Failed" if "podFailurePolicy" in spec else "TerminatingOrFailed")
    occupied = [pod.index for pod in running if policy == "Failed" or not pod.deleted]
    room = spec.get("parallelism", 1) - len(occupied)
    if spec.get("completionMode") != "Indexed":
        missing = spec.get("completions", 1) - sum(pod.succeeded for pod in terminated) - len(occupied)
        return [0] * max(min(room, missing), 0)
    excluded = succeeded_indexes(terminated) | failed_indexes(spec, terminated) | set(occupied)
    return [index for index in range(spec["completions"]) if index not in excluded][: max(room, 0)]
