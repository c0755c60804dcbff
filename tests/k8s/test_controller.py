"""The rules of a Job, applied to terminated pods."""

from typing import Any

import pytest

from tests.k8s.controller import RunningPod, TerminatedPod, choose_action, find_final_condition, list_indexes_to_start
from tests.k8s.rendered import JOBS, Pods, get_name

DISRUPTED = frozenset({"DisruptionTarget"})
CODES = {"containerName": "trainer", "operator": "In"}
RULES = {
    "rules": [
        {"action": "FailJob", "onExitCodes": {**CODES, "values": [2, 3]}},
        {"action": "Ignore", "onExitCodes": {**CODES, "values": [75]}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
}
INDEXED = {"completionMode": "Indexed", "completions": 2, "parallelism": 2}
PER_INDEX = {**INDEXED, "backoffLimitPerIndex": 1, "maxFailedIndexes": 0, "podFailurePolicy": RULES}


def pod(index: int, code: int, conditions: frozenset[str] = frozenset(), container: str = "trainer") -> TerminatedPod:
    return TerminatedPod(f"default/kubetune-{index}", index, {container: code}, conditions)


@pytest.mark.parametrize(
    ("rule", "terminated", "matches"),
    [
        ({"onExitCodes": {"operator": "In", "values": [3, 40]}}, pod(0, 40), True),
        ({"onExitCodes": {"operator": "In", "values": [3, 40]}}, pod(0, 4), False),
        ({"onExitCodes": {"operator": "NotIn", "values": [40]}}, pod(0, 4), True),
        ({"onExitCodes": {"operator": "NotIn", "values": [40]}}, pod(0, 40), False),
        ({"onExitCodes": {**CODES, "values": [40]}}, pod(0, 40), True),
        ({"onExitCodes": {**CODES, "values": [40]}}, pod(0, 40, container="other"), False),
        ({"onExitCodes": {"operator": "NotIn", "values": [40]}}, TerminatedPod("p", 0, {"a": 0, "b": 40}), False),
        ({"onExitCodes": {"operator": "In", "values": [40]}}, TerminatedPod("p", 0, {"a": 1, "b": 40}), True),
        ({"onPodConditions": [{"type": "DisruptionTarget"}]}, pod(0, 137, DISRUPTED), True),
        ({"onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}, pod(0, 137), False),
        ({"onPodConditions": [{"type": "Other"}, {"type": "DisruptionTarget"}]}, pod(0, 137, DISRUPTED), True),
    ],
)
@pytest.mark.parametrize("name", ["FailJob", "FailIndex", "Ignore"])
def test_a_rule_matches_a_pod(rule: dict[str, Any], terminated: TerminatedPod, matches: bool, name: str) -> None:
    spec = {"podFailurePolicy": {"rules": [{"action": name, **rule}]}}
    assert choose_action(spec, terminated)[0] == (name if matches else "Count")


def test_the_first_matching_rule_applies() -> None:
    first = {"action": "Count", "onExitCodes": {"operator": "In", "values": [75]}}
    assert choose_action({"podFailurePolicy": RULES}, pod(0, 75))[0] == "Ignore"
    assert choose_action({"podFailurePolicy": {"rules": [first, *RULES["rules"]]}}, pod(0, 75))[0] == "Count"
    assert choose_action({"podFailurePolicy": RULES}, pod(0, 2, DISRUPTED))[0] == "FailJob"
    assert choose_action({}, pod(0, 2, DISRUPTED))[0] == "Count"


@pytest.mark.parametrize(
    ("spec", "terminated", "reason"),
    [
        ({}, [], None),
        ({}, [pod(0, 0)], "CompletionsReached"),
        ({"completions": 2, "parallelism": 2}, [pod(0, 0)], None),
        ({"completions": 2, "parallelism": 2}, [pod(0, 0), pod(0, 0)], "CompletionsReached"),
        (INDEXED, [pod(0, 0), pod(0, 0)], None),
        (INDEXED, [pod(0, 0), pod(1, 0)], "CompletionsReached"),
        # Failures of all indices together.
        ({}, [pod(0, 1)] * 6, None),
        ({}, [pod(0, 1)] * 7, "BackoffLimitExceeded"),
        ({"backoffLimit": 0}, [pod(0, 1)], "BackoffLimitExceeded"),
        ({"backoffLimit": 1, **INDEXED}, [pod(0, 1), pod(1, 1)], "BackoffLimitExceeded"),
        ({"backoffLimit": 0, "podFailurePolicy": RULES}, [pod(0, 75)] * 99, None),
        ({"backoffLimit": 0, "podFailurePolicy": RULES}, [pod(0, 137, DISRUPTED)] * 99, None),
        ({"backoffLimit": 0, "podFailurePolicy": RULES}, [pod(0, 75), pod(0, 137)], "BackoffLimitExceeded"),
        ({"backoffLimit": 9, "podFailurePolicy": RULES}, [pod(0, 2)], "PodFailurePolicy"),
        ({"backoffLimit": 9, "podFailurePolicy": RULES}, [pod(0, 3)], "PodFailurePolicy"),
        # Failures of each index.
        (PER_INDEX, [pod(0, 1), pod(1, 1)], None),
        (PER_INDEX, [pod(0, 1), pod(1, 75), pod(0, 1)], "MaxFailedIndexesExceeded"),
        (PER_INDEX, [pod(0, 1), pod(0, 75), pod(0, 137, DISRUPTED)], None),
        (PER_INDEX, [pod(1, 2)], "PodFailurePolicy"),
        ({**PER_INDEX, "maxFailedIndexes": 1}, [pod(0, 1)] * 2, None),
        ({**PER_INDEX, "maxFailedIndexes": 1}, [*[pod(0, 1)] * 2, pod(1, 0)], "FailedIndexes"),
        ({**INDEXED, "backoffLimitPerIndex": 0, "backoffLimit": 0}, [pod(0, 1)], "BackoffLimitExceeded"),
        ({**INDEXED, "backoffLimitPerIndex": 9}, [pod(0, 1)] * 9, None),
    ],
)
def test_the_condition_that_ends_a_job(
    spec: dict[str, Any], terminated: list[TerminatedPod], reason: str | None
) -> None:
    condition = find_final_condition(spec, terminated)
    assert (condition and condition.reason) == reason
    assert (condition and condition.type) == (reason and ("Complete" if reason == "CompletionsReached" else "Failed"))


def test_failindex_fails_an_index_without_retries() -> None:
    rules = {"rules": [{"action": "FailIndex", "onExitCodes": {"operator": "In", "values": [42]}}]}
    spec = {**INDEXED, "backoffLimitPerIndex": 5, "podFailurePolicy": rules}
    assert find_final_condition(spec, [pod(0, 42)]) is None
    assert list_indexes_to_start(spec, [pod(0, 42)], []) == [1]
    assert find_final_condition({**spec, "maxFailedIndexes": 0}, [pod(0, 42)]) is not None


@pytest.mark.parametrize(
    ("spec", "terminated", "running", "started"),
    [
        (INDEXED, [], [], [0, 1]),
        (INDEXED, [], [RunningPod(0)], [1]),
        (INDEXED, [pod(1, 0)], [], [0]),
        (INDEXED, [pod(1, 1)], [RunningPod(0)], [1]),
        ({**INDEXED, "parallelism": 1}, [], [], [0]),
        ({**INDEXED, "parallelism": 1}, [], [RunningPod(0)], []),
        ({"completions": 3, "parallelism": 2}, [], [], [0, 0]),
        ({"completions": 3, "parallelism": 2}, [pod(0, 0), pod(0, 0)], [], [0]),
        ({}, [pod(0, 1)], [], [0]),
        # A deleted pod that still runs.
        (INDEXED, [], [RunningPod(0), RunningPod(1, deleted=True)], [1]),
        ({**INDEXED, "podReplacementPolicy": "Failed"}, [], [RunningPod(0), RunningPod(1, deleted=True)], []),
        (PER_INDEX, [], [RunningPod(0), RunningPod(1, deleted=True)], []),
        (PER_INDEX, [pod(1, 75)], [RunningPod(0)], [1]),
        # Nothing is started in a Job that has ended, and no failed index.
        (PER_INDEX, [pod(1, 2)], [], []),
        ({**PER_INDEX, "maxFailedIndexes": 1}, [pod(1, 1)] * 2, [], [0]),
    ],
)
def test_indexes_to_start(
    spec: dict[str, Any], terminated: list[TerminatedPod], running: list[RunningPod], started: list[int]
) -> None:
    assert list_indexes_to_start(spec, terminated, running) == started


@pytest.mark.parametrize("pods", JOBS, ids=get_name)
def test_every_job_continues_after_preemptions_and_a_crash_and_fails_on_a_user_error(pods: Pods) -> None:
    assert pods.job is not None
    harmless = [pod(0, 75), pod(0, 137, DISRUPTED), pod(0, 143, DISRUPTED)]
    assert find_final_condition(pods.job, [*harmless * 50, pod(0, 137)]) is None
    assert list_indexes_to_start(pods.job, harmless, []) == list(range(pods.count))
    failures = [([pod(0, 2)], "Policy"), ([pod(0, 3)], "Policy"), ([pod(0, 1)] * 4, "Exceeded")]
    if pods.is_sweep:  # its other runs continue, and then it fails
        others = [pod(index, 0) for index in range(1, pods.job["completions"])]
        for terminated, _ in failures:
            assert find_final_condition(pods.job, terminated) is None
            assert list_indexes_to_start(pods.job, terminated, []) == [1, 2]
        failures = [([*terminated, *others], "FailedIndexes") for terminated, _ in failures]
    for terminated, reason in failures:
        condition = find_final_condition(pods.job, terminated)
        assert condition is not None
        assert (condition.type, reason in condition.reason) == ("Failed", True), condition
