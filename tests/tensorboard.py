"""Send requests to TensorBoard, as its web page does."""

import json
from pathlib import Path
from typing import Any

from tensorboard import default, program
from tensorboard.backend import application
from tensorboard.backend.event_processing.data_ingester import LocalDataIngester
from werkzeug.test import Client


def post(logdir: Path, route: str, request: dict[str, Any]) -> dict[str, Any]:
    """Send a request to /data/plugin/<route> of a TensorBoard that shows `logdir`, and return the response."""
    board = program.TensorBoard(default.get_plugins())
    board.configure(["tensorboard", "--logdir", str(logdir), "--load_fast=false"])
    ingester = LocalDataIngester(board.flags)
    multiplexer = ingester.deprecated_multiplexer
    multiplexer.AddRunsFromDirectory(str(logdir))
    multiplexer.Reload()
    wsgi_app = application.TensorBoardWSGIApp(
        board.flags, board.plugin_loaders, ingester.data_provider, None, multiplexer
    )
    response = Client(wsgi_app).post(f"/data/plugin/{route}", data=json.dumps(request), content_type="application/json")
    assert response.status_code == 200, response.text
    return dict(json.loads(response.text))
