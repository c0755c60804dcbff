"""After the last phase: score the test split, export, check the export, report, and write DONE."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from trainer.errors import INTERRUPTED
from trainer.exporting.export import Scored, write_exports
from trainer.exporting.formats import refuse
from trainer.exporting.model_card import write_model_card
from trainer.monitoring import termination
from trainer.monitoring.health import FINISH, signs
from trainer.report.build import evaluated, pictures, report_on, show_in_tensorboard
from trainer.run import Run, say, score
from trainer.runs.folder import read_facts
from trainer.runs.metrics import clock
from trainer.types import EvaluationResult

AFTER = "after training had ended"


def finish(job: Run) -> None:
    """Everything that follows training; doing it again after a kill gives the same files.

    All workers score; the chief alone exports and writes, while the others wait for it.

    Raises:
        ToldToStop: the next start begins here again.
        ModelError: an export lost too much accuracy; all else is written, but not DONE.
    """
    signs.enter(FINISH)
    signs.at("evaluation")
    split = "test" if "test" in job.dataset.splits else "validation"
    say(f"evaluating {job.dataset.splits[split].count:,} {split} examples")
    batch_size = job.config.training.batch_size
    answers = score(job, job.evaluator, job.pixels(split), batch_size, f"scores of {split}")
    if job.told_to_stop("after scoring"):
        job.stop.told("stopped by another worker")
    job.stop.check(AFTER)
    job.ledger.mark("evaluation")
    if not job.peers.is_chief:
        job.stop.on_told = lambda reason: job.peers.end(INTERRUPTED, f"{reason} {AFTER}; nothing is lost")
        job.peers.from_chief("done")
        return
    job.peers.go_on_alone()
    result, indices = evaluated(job, split, *answers), answers[2]

    say("exporting")
    signs.at("export")
    exports = export(job, result, indices)
    job.stop.check(AFTER)
    job.ledger.mark("finish")

    say("writing the report")
    signs.at("report")
    report = report_on(
        job,
        job.folder / "report",
        result,
        indices,
        {
            "title": job.config.experiment_name or job.dataset.name,
            "history": job.state.history,
            "phases": job.state.finished,
            "export": exports,
            "timing": timing(job),
        },
        splits=list(job.dataset.splits),
        check=lambda: job.stop.check(AFTER),
    )
    show_in_tensorboard(job.folder / "report", job.folder / "logs" / "report", report, job.state.step)
    write_model_card(job.folder / "export" / "model_card.md", report, job.config.model_dump(mode="json"))
    job.stop.check(AFTER)
    job.ledger.mark("finish")
    job.ledger.write()
    job.telemetry.flush()
    signs.at("publishing")
    if any(facts["refused"] for facts in exports.values()):
        job.publisher.results()
        summarise(job, report)
        refuse(exports, job.config.export.max_accuracy_drop)
    job.publisher.finish(json.dumps({"test_accuracy": report["test"]["accuracy"], "step": job.state.step}) + "\n")
    job.peers.from_chief("done")
    summarise(job, report)


def timing(job: Run) -> dict[str, Any]:
    """What the report says of time: seconds by place since the first start, and what became of them."""
    seconds = {place: round(spent, 3) for place, spent in job.ledger.seconds.items()}
    rate = job.state.images / max(job.ledger.seconds["train"], 1e-9)
    return {
        "seconds": seconds,
        "goodput": round(job.ledger.goodput, 4),
        "images": int(job.state.images),
        "images_per_second": round(rate, 1),
        "starts": job.state.starts,
        "workers": job.peers.size,
        "command": command(job),
    }


def command(job: Run) -> str:
    """What the last start of this run was called with, as one types it."""
    return shlex.join(read_facts(job.folder)["attempts"][-1]["command"])


def export(job: Run, result: EvaluationResult, indices: np.ndarray) -> dict[str, Any]:
    """Write each format asked for, and try each on held-out examples."""
    home, scored = job.folder / "export", Scored(result.split, indices, result.labels, result.probabilities)
    shutil.rmtree(home, ignore_errors=True)

    def check() -> None:
        signs.moved()
        job.stop.check(AFTER)

    images = partial(pictures, job)
    outcomes = write_exports(home, job.config, job.classifier, job.dataset, scored, images, job.look, check)
    return {name: facts | {"path": f"export/{facts['path']}"} for name, facts in outcomes.items()}


def groups_apart(test: Mapping[str, Any]) -> list[str]:
    """A line on how far the groups lie apart, where there are some."""
    gap = test.get("groups", {}).get("gap")
    if not gap:
        return []
    sure = "their 95 % intervals overlap" if gap["overlap"] else "their 95 % intervals do not overlap"
    between = f"between {gap['highest']} and {gap['lowest']}"
    return [f"  by {test['groups']['field']}: at most {gap['accuracy']:.4f} apart, {between} ({sure})"]


def of_export(facts: dict[str, Any]) -> str:
    """How an exported file does beside the trainer, in a few words."""
    accuracy = f"{facts['accuracy']:.4f}"
    if facts["refused"]:
        return f"not kept: accuracy {accuracy} in place of {facts['trainer_accuracy']:.4f}"
    same = facts["lost"] == facts["gained"] == 0
    worth = "answers as the trainer" if same else f"accuracy {accuracy} in place of {facts['trainer_accuracy']:.4f}"
    return f"{worth}; {facts['timing']['milliseconds_per_image']:.2f} ms an image"


def summarise(job: Run, report: Mapping[str, Any]) -> None:
    """The last lines on the terminal: how good, where, and what to type next."""
    test, folder = report["test"], job.address.rstrip("/")
    low, high = test["interval"]
    spent = job.ledger.seconds["train"]
    lines = [
        "",
        f"{test['split']} accuracy {test['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f}, n = {test['n']})"
        + (f"; top-5 {test['top_5']:.4f}" if "top_5" in test else "") + f"; macro F1 {test['macro_f1']:.4f}",
        *groups_apart(test),
        *(f"  after {name}: val_accuracy {phase['val_accuracy']:.4f}"
          + (f" (the weights of {phase['kept_from']}; its own {phase['own_val_accuracy']:.4f} at best)"
             if "kept_from" in phase else "") for name, phase in report["phases"].items()),
        f"trained {job.state.images:,.0f} images in {clock(spent)} ({job.state.images / max(spent, 1e-9):,.0f} "
        f"images/s; goodput {job.ledger.goodput:.0%})",
        f"  report   {folder}/report/index.html",
        *(f"  export   {folder}/{facts['path']}  ({facts['bytes'] / 1e6:,.2f} MB; {of_export(facts)})"
          for facts in report["export"].values()),
        f"next:  tensorboard --logdir {folder}/logs",
    ]  # fmt: skip
    say("\n".join(lines))
    termination.outcome(f"{lines[1]}; {folder}/report/index.html")
