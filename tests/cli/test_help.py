"""--help, --version and --cfg job of the verbs, and a reader that ends early."""

import os
import re
import subprocess
import sys
from types import ModuleType

import pytest
import yaml

import trainer
from tests.cli.surface import VERBS, arguments
from tests.cli.verbs import exit_code_of
from tests.processes import ROOT
from trainer import __main__, compare, drift, evaluate, export, plan, prepare, serve
from trainer.cli.compose import format_help
from trainer.config.keys import list_keys
from trainer.config.schema import RequestedConfig

MODULES = [compare, drift, evaluate, export, plan, prepare, serve]


@pytest.mark.parametrize("verb", MODULES)
def test_help_shows_the_own_arguments_of_a_verb_and_one_example(
    verb: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = [key.partition(" ")[0].lstrip("-") for key in arguments(verb)]
    assert exit_code_of(verb.main, "--help") == 0
    text = capsys.readouterr().out
    for key in keys:
        assert re.search(rf"^ +(-*{key}\b|formats=|max_accuracy_drop=)|{key}=", text, re.M), key
    assert len(re.findall(rf"^Example: python -m {verb.__name__} .*\S$", text, re.M)) == 1


@pytest.mark.parametrize("verb", [__main__, *MODULES])
def test_the_version_is_that_of_kubetune(verb: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(verb.main, "--version") == 0
    assert capsys.readouterr().out == f"kubetune {trainer.__version__}\n"


def test_the_main_help_names_the_verbs_and_the_documentation() -> None:
    for name in VERBS:
        assert f"python -m trainer.{name} " in format_help()
    assert "docs/README.md" in format_help()


@pytest.mark.parametrize("given", [["data=digits"], ["data=image_folder"], ["data=tfrecords", "phases=auto"]])
def test_the_printed_configuration_has_every_key(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(__main__.main, *given, "--cfg", "job") == 0
    text = capsys.readouterr().out
    tree = yaml.safe_load(text)
    assert "count:" not in text  # a length is printed as it is typed
    assert (
        "distillation: null # distillation.teacher, distillation.model, distillation.phases, distillation.alpha, "
        in text
    )
    assert list(tree) == list(RequestedConfig.model_fields)
    for key in list_keys(RequestedConfig, tree):
        branch = tree
        for part in key.split(".") if not key.startswith("distillation.") else []:
            assert part in branch, key
            branch = branch[part]


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["seed=-1"]])
def test_a_reader_that_ends_early_ends_the_command_quietly(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "trainer", *arguments]
    result = subprocess.run(
        command, stdout=writer, stderr=-1, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False, text=True
    )
    os.close(writer)
    assert result.returncode == (2 if arguments == ["seed=-1"] else 0)
    assert "Traceback" not in result.stderr
    assert "Broken" not in result.stderr
