"""Requests to TensorBoard, as its web page sends them."""

import json
from pathlib import Path
from typing import Any

from tensorboard import default, program
from tensorboard.backend import application
from tensorboard.backend.event_processing.data_ingester import LocalDataIngester
from werkzeug.test import Client


def post(logdir: Path, route: str, request: dict[str, Any]) -> dict[str, Any]:
    """The response of TensorBoard on `logdir` to a request at /data/plugin/<route>."""
    board = program.TensorBoard(default.get_plugins())
    board.configure(["tensorboard", "--logdir", str(logdir), "--load_fast=false"])
    read = LocalDataIngester(board.flags)
    runs = read.deprecated_multiplexer
    runs.AddRunsFromDirectory(str(logdir))
    runs.Reload()
    pages = application.TensorBoardWSGIApp(board.flags, board.plugin_loaders, read.data_provider, None, runs)
    response = Client(pages).post(f"/data/plugin/{route}", data=json.dumps(request), content_type="application/json")
    assert response.status_code == 200, response.text
    return dict(json.loads(response.text))
