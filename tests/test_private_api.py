"""Private API of other libraries: available in the installed versions, and used in `trainer/private_api.py` only."""

import ast
import asyncio
import contextlib
import importlib
import re
import socket
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import keras
import numpy as np
import pytest
import requests
import tensorflow as tf
import uvicorn
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from requests.adapters import HTTPAdapter

from trainer import private_api
from trainer.cli.compose import compose
from trainer.models.batch_norm import PaddingAwareBatchNormalization

PACKAGE = Path(private_api.__file__).parent
# | library | `name`, `name` | ...
ROWS = [
    (cells[1].strip(), name)
    for line in (private_api.__doc__ or "").splitlines()
    if len(cells := line.split("|")) > 3 and "`" in line
    for name in re.findall("`([^`]+)`", cells[2])
]


# ---------------------------------------------------------------------------------------------------------------
# Every row of the tables, on the installed version


@contextlib.contextmanager
def needs(library: str, name: str) -> Iterator[None]:
    """Context whose failures name the library, its version and the name."""
    try:
        yield
    except Exception as error:
        pytest.fail(
            f"{library} {version(library)} no longer has {name}, which trainer/private_api.py uses: "
            f"{type(error).__name__}: {error}"
        )


def network() -> keras.Model:
    inputs = keras.Input((4, 4, 3))
    return keras.Model(inputs, keras.layers.ReLU(name="relu")(keras.layers.Conv2D(2, 3, name="conv")(inputs)))


def runs_a_network_with_other_operations() -> None:
    model, seen = network(), []

    def operation_fn(operation: keras.Operation) -> Callable[..., object]:
        seen.append(operation.name)
        return (lambda x: -x) if operation.name == "relu" else operation

    images = tf.random.stateless_uniform([1, 4, 4, 3], [1, 2])
    outputs = private_api.run_through_graph(model, images, operation_fn)
    outputs = outputs[0] if isinstance(outputs, list) else outputs
    assert seen == ["conv", "relu"]
    np.testing.assert_array_equal(outputs, -model.get_layer("conv")(images))


def returns_the_producer_of_a_tensor() -> None:
    model = network()
    assert private_api.get_producer(model.outputs[0]) is model.get_layer("relu")


def returns_the_index_of_a_variable() -> None:
    variables = [keras.Variable(float(i), name="v") for i in range(3)]
    optimizer = keras.optimizers.Adam()
    optimizer.build(variables)
    assert [private_api.get_variable_index(optimizer, v) for v in reversed(variables)] == [2, 1, 0]


def swaps_the_class_of_a_layer() -> None:
    layer = keras.layers.BatchNormalization()
    layer.build((None, 4))
    before = layer.weights
    private_api.swap_class(layer, PaddingAwareBatchNormalization)
    assert type(layer) is PaddingAwareBatchNormalization
    assert private_api.get_library_class(layer) is keras.layers.BatchNormalization
    assert [id(w) for w in layer.weights] == [id(w) for w in before]
    assert layer(tf.ones([2, 4])).shape == (2, 4)
    private_api.swap_class(layer, private_api.get_library_class(layer))
    assert type(layer) is keras.layers.BatchNormalization


def finds_the_download_of_weights() -> None:
    from keras.src.utils import file_utils

    original = file_utils.get_file
    download = private_api.find_download(lambda: keras.applications.MobileNetV2(alpha=0.35, include_top=False))
    assert download is not None
    assert download[0].endswith("0.35_224_no_top.h5")
    assert download[1].startswith("https://")
    assert download[1].endswith(download[0])
    assert private_api.find_download(network) is None
    assert file_utils.get_file is original


def parses_a_saved_model(tmp_path: Path) -> None:
    module = tf.Module()
    module.twice = tf.function(lambda x: 2 * x, input_signature=[tf.TensorSpec([], tf.float32)])
    tf.saved_model.save(module, str(tmp_path))
    proto = private_api.make_saved_model_proto()
    proto.ParseFromString((tmp_path / "saved_model.pb").read_bytes())
    nodes = [node.op for part in proto.meta_graphs for f in part.graph_def.library.function for node in f.node_def]
    assert "Mul" in nodes


def numbers_the_next_function() -> None:
    def traced() -> str:
        return tf.function(lambda: tf.constant(1)).get_concrete_function().name.decode()  # type: ignore[no-any-return]

    before = int(traced().rpartition("_")[2])
    private_api.advance_function_numbers(before + 10_000)
    assert before + 10_000 < int(traced().rpartition("_")[2]) < before + 10_100
    private_api.advance_function_numbers(0)


def exchanges_slices() -> None:
    with tf.Graph().as_default():  # two processes run it in tests/e2e/test_virtual_replicas.py
        operation = private_api.all_to_all(tf.zeros([2, 3]), 2, key=1).op
    assert operation.type == "CollectiveAllToAllV2"
    assert [tf.get_static_value(x).tolist() for x in operation.inputs[1:4]] == [2, 1 << 20, 1]


def ends_a_session_of_hparams() -> None:
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    info = plugin_data_pb2.SessionEndInfo(end_time_secs=7.0)
    (value,) = private_api.make_session_end_summary(info).value
    assert value.tag == metadata.SESSION_END_INFO_TAG
    assert metadata.parse_session_end_info_plugin_data(value.metadata.plugin_data.content) == info


def client() -> storage.Client:
    return storage.Client(project="none", credentials=AnonymousCredentials())


def mounts_a_transport() -> None:
    made, adapter = client(), HTTPAdapter()
    private_api.mount_transport(made, adapter)
    assert isinstance(made._http, requests.Session)
    assert made._http.get_adapter("https://storage.googleapis.com/") is adapter
    assert made._http.get_adapter("http://localhost/") is adapter


def disables_requests_for_the_bucket() -> None:
    made = client()
    assert made._bucket_metadata_cache is not None
    private_api.disable_bucket_metadata(made)
    assert made._bucket_metadata_cache is None


def returns_the_credentials() -> None:
    assert isinstance(private_api.get_credentials(client()), AnonymousCredentials)


def detects_a_grid_search(tmp_path: Path) -> None:
    assert importlib.import_module("hydra._internal.core_plugins.basic_sweeper").BasicSweeper
    results = []
    for more in ([], ["hydra/sweeper=optuna", "seed=choice(1, 2)", "hydra.sweeper.n_trials=1"]):
        compose(
            ["-m", f"hydra.sweep.dir={tmp_path}", *more],
            run_job=lambda _tree, _overrides, settings: float(results.append(private_api.is_grid(settings)) is None),
        )
    assert results == [True, False]


def lists_operations_and_their_tensors() -> None:
    first, conv, relu = network().operations
    assert isinstance(first, keras.layers.InputLayer)
    assert relu.input is conv.output
    assert conv.input is first.output


def accepts_arrays_as_statistics() -> None:
    layer = keras.layers.Normalization(mean=[1.0, 2.0], variance=[4.0, 4.0])
    layer.build((None, 2))
    before = layer.mean, layer.variance
    layer.mean, layer.variance = np.asarray(before[0]) + 1, np.asarray(before[1])
    np.testing.assert_allclose(layer(tf.constant([[2.0, 3.0]])), [[0.0, 0.0]], atol=1e-6)
    layer.mean, layer.variance = before
    np.testing.assert_allclose(layer(tf.constant([[1.0, 2.0]])), [[0.0, 0.0]], atol=1e-6)


def writes_events() -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    assert Event(summary=Summary(), file_version="brain.Event:2", wall_time=1.0).wall_time == 1
    assert RecordWriter.write


def describes_hparams() -> None:
    from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2, summary_v2
    from tensorboard.plugins.scalar.summary_v2 import scalar_pb

    columns = [summary_v2.HParam("seed")], [summary_v2.Metric("val_accuracy", display_name="accuracy")]
    assert summary_v2.hparams_config_pb(*columns).value
    assert summary_v2.hparams_pb({"seed": 1}, trial_id="0", start_time_secs=1.0).value
    ended = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_FAILURE)
    assert ended.status != api_pb2.STATUS_SUCCESS
    assert scalar_pb("val_accuracy", 0.5).value[0].tag == "val_accuracy"


def has_the_schema_of_litert() -> None:
    from ai_edge_litert import schema_py_generated as schema

    assert schema.ModelT.InitFromPackedBuf
    assert schema.BufferT().data is None
    assert schema.MetadataT().name is None


async def no_app(_scope: object, _receive: object, _send: object) -> None:
    raise AssertionError("an unexpected request")


def serves_connections() -> None:
    from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

    async def begin() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            config = uvicorn.Config(no_app, http=H11Protocol, lifespan="off", log_config=None, log_level="critical")
            server = uvicorn.Server(config)
            config.load()
            server.lifespan = config.lifespan_class(config)
            await server.startup(sockets=[listener])
            assert [s.sockets[0].getsockname() for s in server.servers] == [listener.getsockname()]
            connection = H11Protocol(config, server.server_state, server.lifespan.state)
            assert connection.loop is asyncio.get_running_loop()
            assert connection.cycle is None
            assert connection.transport is None
            assert connection.conn.their_state is importlib.import_module("h11").IDLE
            for name in ("connection_made", "data_received", "eof_received", "connection_lost", "shutdown"):
                assert callable(getattr(H11Protocol, name))
            cycle = set(RequestResponseCycle.__init__.__code__.co_names)
            assert {"response_complete", "more_body", "keep_alive"} <= cycle
            await server.shutdown(sockets=[listener])

    asyncio.run(begin())


def captures_signals() -> None:
    server = uvicorn.Server(uvicorn.Config(no_app))
    with uvicorn.Server.capture_signals(server):
        pass
    assert asyncio.iscoroutinefunction(uvicorn.Server.shutdown)
    assert server.should_exit is False
    serves_connections()


CHECKS: dict[str, Callable[..., None]] = {
    "Function._run_through_graph": runs_a_network_with_other_operations,
    "KerasTensor._keras_history": returns_the_producer_of_a_tensor,
    "Optimizer._get_variable_index": returns_the_index_of_a_variable,
    "keras.src.utils.file_utils.get_file": finds_the_download_of_weights,
    "Layer.__class__": swaps_the_class_of_a_layer,
    "tensorflow.core.protobuf": parses_a_saved_model,
    "framework.ops.uid": numbers_the_next_function,
    "collective_ops.all_to_all_v2": exchanges_slices,
    "summary_v2._summary_pb": ends_a_session_of_hparams,
    "Client._http": mounts_a_transport,
    "Client._bucket_metadata_cache": disables_requests_for_the_bucket,
    "Client._credentials": returns_the_credentials,
    "hydra._internal.core_plugins.basic_sweeper": detects_a_grid_search,
    **dict.fromkeys(["Function.operations", "Operation.input", "Operation.output"], lists_operations_and_their_tensors),
    **dict.fromkeys(["Normalization.mean", "Normalization.variance"], accepts_arrays_as_statistics),
    **dict.fromkeys(["compat.proto", "summary.writer.record_writer"], writes_events),
    **dict.fromkeys(["plugins.hparams", "plugins.scalar.summary_v2"], describes_hparams),
    **dict.fromkeys(["H11Protocol", "conn", "cycle", "loop", "transport"], serves_connections),
    **dict.fromkeys(["servers", "server_state", "lifespan"], serves_connections),
    **dict.fromkeys(["Server", "capture_signals", "shutdown"], captures_signals),
    "schema_py_generated": has_the_schema_of_litert,
}


def test_every_row_of_the_tables_has_a_check() -> None:
    assert [name for _, name in ROWS if name not in CHECKS] == []
    assert set(CHECKS) == {name for _, name in ROWS}


@pytest.mark.parametrize(("library", "name"), ROWS, ids=[name for _, name in ROWS])
def test_the_installed_library_has_it(library: str, name: str, tmp_path: Path) -> None:
    check = CHECKS[name]
    with needs(library, name):
        check(tmp_path) if check.__code__.co_argcount else check()


def test_a_removed_name_is_reported_with_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("keras.src.optimizers.base_optimizer.BaseOptimizer._get_variable_index")
    with pytest.raises(pytest.fail.Exception) as failed, needs("keras", "Optimizer._get_variable_index"):
        returns_the_index_of_a_variable()
    assert f"keras {version('keras')} no longer has Optimizer._get_variable_index" in str(failed.value)
    assert "AttributeError" in str(failed.value)


# ---------------------------------------------------------------------------------------------------------------
# The rule: no other module uses a private name of another library. Forbidden are
#   - `x._name`, read, written or deleted, also by getattr, setattr, delattr and hasattr with a literal name, unless it
#     is a function, class, class attribute, global or attribute of `self` or `cls` of this package;
#   - an assignment to `x.__class__`;
#   - an import from a private module (`_name` anywhere in its path, or one of the trees below), and of a `_name` from a
#     module of another package.
# Allowed are names in Python's documentation: those below, and every `__name__`.

DOCUMENTED = {"os._exit", "sys._current_frames"}
PRIVATE_TREES = ("keras.src", "tensorflow.python", "tensorflow.core", "hydra._internal")
BY_NAME = {"getattr", "setattr", "delattr", "hasattr"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(trees: list[ast.Module]) -> set[str]:
    """Names that the package defines: functions, classes, class attributes, globals, attributes of self."""
    names = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef | ast.Module):
            targets = [
                target
                for part in node.body
                if isinstance(part, ast.Assign | ast.AnnAssign)
                for target in (part.targets if isinstance(part, ast.Assign) else [part.target])
            ]
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        if not (isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)):
            continue
        if ast.unparse(node.value) in ("self", "cls"):
            names.add(node.attr)
    return names


def faults(tree: ast.Module, own: set[str]) -> list[str]:
    """Uses of private names of other libraries in a module, as "line: code"."""
    uses = []
    for node in ast.walk(tree):
        wrong = False
        match node:
            case ast.Attribute(attr="__class__", ctx=ast.Store()):
                wrong = True
            case ast.Attribute(attr=name):
                wrong = is_private(name) and name not in own and ast.unparse(node) not in DOCUMENTED
            case ast.Call(func=ast.Name(id=called), args=[_, ast.Constant(value=str(name)), *_]) if called in BY_NAME:
                wrong = (is_private(name) and name not in own) or (called == "setattr" and name == "__class__")
            case ast.Import(names=names):
                wrong = any(is_private_module(alias.name) for alias in names)
            case ast.ImportFrom(module=str(module), names=names):
                wrong = is_private_module(module) or any(
                    is_private_module(f"{module}.{alias.name}") for alias in names if not module.startswith("trainer")
                )
        if wrong:
            uses.append(f"{node.lineno}: {ast.unparse(node)}")  # type: ignore[attr-defined]
    return uses


def is_private_module(path: str) -> bool:
    return any(map(is_private, path.split("."))) or any(f"{path}.".startswith(f"{tree}.") for tree in PRIVATE_TREES)


def test_no_other_module_uses_private_names() -> None:
    trees = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
    own = own_names(list(trees.values()))
    uses = {str(path.relative_to(PACKAGE)): faults(tree, own) for path, tree in trees.items()}
    assert len(uses.pop("private_api.py")) > 5
    assert {path: wrong for path, wrong in uses.items() if wrong} == {}


BAD = """
from __future__ import annotations
import os, sys
import keras.src.layers
from google.cloud.storage import _helpers
from tensorflow.python.eager import context
from trainer.data.images import _own

_table = {}

class Layer(keras.Layer):
    _limit: int = 3

    def _mine(self):
        self._saved = self._private_of_keras
        self._saved = type(self).__name__
        other._saved.attribute = self._mine()

def run(model, layer):
    model._private = layer._limit
    del model._cache
    getattr(model, "_handle", None)
    hasattr(model, "__len__")
    layer.__class__ = Layer
    setattr(layer, "__class__", Layer)
    model.layers[0]._inbound_nodes.clear()
    sys._current_frames()
    os._exit(_table)
"""


def test_the_rule_detects_each_violation() -> None:
    tree = ast.parse(BAD)
    assert sorted(faults(tree, own_names([tree])), key=lambda fault: int(fault.split(":")[0])) == [
        "4: import keras.src.layers",
        "5: from google.cloud.storage import _helpers",
        "6: from tensorflow.python.eager import context",
        "15: self._private_of_keras",
        "20: model._private",
        "21: model._cache",
        "22: getattr(model, '_handle', None)",
        "24: layer.__class__",
        "25: setattr(layer, '__class__', Layer)",
        "26: model.layers[0]._inbound_nodes",
    ]
