"""Log a summary of a finished run: scores, files and the next command."""

from collections.abc import Mapping
from typing import Any

from trainer.monitoring import termination
from trainer.monitoring.display import format_duration
from trainer.monitoring.log import log


def log_summary(report: Mapping[str, Any], address: str) -> None:
    """Log the results in report.json, and set the scores and the page's path as the termination message.

    Args:
        report: content of a run's report.json.
        address: the run's output_dir, as given by the user.
    """
    test = report["test"]
    folder = address.rstrip("/")
    timing = report["timing"]
    low, high = test["interval"]
    lines = [
        "",
        f"{test['split']} accuracy {test['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f}, n = {test['n']})"
        + (f"; top-5 {test['top_5']:.4f}" if "top_5" in test else "") + f"; macro F1 {test['macro_f1']:.4f}",
        *_describe_gap(test),
        *_describe_teacher(report),
        *(f"  after {name}: {_describe_phase(phase)}" for name, phase in report["phases"].items()),
        f"{format_duration(sum(timing['seconds'].values()))} in all: trained {timing['images']:,} images in "
        f"{format_duration(timing['seconds']['train'])} ({timing['images_per_second']:,.0f} images/s; "
        f"goodput {timing['goodput']:.0%})",
        f"  report   {folder}/report/index.html",
        *(f"  export   {folder}/{export['path']}  ({export['bytes'] / 1e6:,.2f} MB; {_describe_export(export)})"
          for export in report["export"].values()),
        f"next:  tensorboard --logdir {folder}/logs",
    ]  # fmt: skip
    log.info("\n".join(lines))
    termination.set_success_message(f"{lines[1]}; {folder}/report/index.html")


def _describe_phase(phase: Mapping[str, Any]) -> str:
    """Describe the weights that a phase ends with: their scores, and their phase if it is an earlier one."""
    description = f"val_accuracy {phase['val_accuracy']:.4f}"
    if "val_interval" in phase:
        low, high = phase["val_interval"]
        description += f" ({low:.4f} to {high:.4f}, n = {phase['val_n']})"
    if "kept_from" in phase:
        description += f", weights of {phase['kept_from']}; its own best {phase['own_val_accuracy']:.4f}"
    if "epoch_val_accuracy" in phase:
        epoch_description = f"; whole split, after its epoch {phase['epoch_val_accuracy']:.4f}"
        description += epoch_description + (f" of {phase['epoch_val_n']}" if "epoch_val_n" in phase else "")
    return description


def _describe_teacher(report: Mapping[str, Any]) -> list[str]:
    if not (teacher := report.get("teacher")):
        return []
    low, high = teacher["interval"]
    suffix = "" if teacher["same_data"] else ", of other data"
    interval = f"95 % interval {low:.4f} to {high:.4f}, n = {teacher['n']}{suffix}"
    return [f"  teacher: {teacher['split']} accuracy {teacher['accuracy']:.4f} ({interval})"]


def _describe_gap(test: Mapping[str, Any]) -> list[str]:
    gap = test.get("groups", {}).get("gap")
    if not gap:
        return []
    group_names = f"between {gap['highest']} and {gap['lowest']}"
    overlap = "overlap" if gap["overlap"] else "do not overlap"
    field = test["groups"]["field"]
    return [f"  by {field}: largest gap {gap['accuracy']:.4f}, {group_names} (their 95 % intervals {overlap})"]


def _describe_export(export: dict[str, Any]) -> str:
    accuracy = f"accuracy {export['accuracy']:.4f}, trainer {export['trainer_accuracy']:.4f}"
    if export["refused"]:
        return f"deleted: {accuracy}"
    if export["lost"] == export["gained"] == 0:
        accuracy = "same predictions as the trainer"
    return f"{accuracy}; {export['timing']['milliseconds_per_image']:.2f} ms per image"
