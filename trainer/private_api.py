"""All uses of private APIs of other libraries.

A library can rename or remove a private name in any release without notice. Therefore each use is a function in this
module, and no other module uses a private name. `tests/test_private_api.py` tests every row of these tables with the
installed versions. After an incompatible upgrade, it fails and prints the library, its version and the name.

Private names, with the function that wraps each:

| library | name | function | public API that would replace it |
| --- | --- | --- | --- |
| keras | `Function._run_through_graph` | `run_through_graph` | `clone_model(call_function=)`, if it took tensors |
| keras | `KerasTensor._keras_history` | `get_producer` | an `operation` attribute of tensors; there is none |
| keras | `Optimizer._get_variable_index` | `get_variable_index` | learning rates per variable; there are none |
| keras | `keras.src.utils.file_utils.get_file` | `find_download` | the addresses of weights; there are none |
| keras | `Layer.__class__` | `swap_class` | `clone_model(clone_function=)`, if it reused the variables |
| tensorflow | `tensorflow.core.protobuf` | `make_saved_model_proto` | a parser of `saved_model.pb`; there is none |
| tensorflow | `framework.ops.uid` | `advance_function_numbers` | names of functions without a counter |
| tensorflow | `collective_ops.all_to_all_v2` | `all_to_all` | an `all_to_all` of the replica context; there is none |
| tensorboard | `summary_v2._summary_pb` | `make_session_end_summary` | a function in `hparams.api`; there is none |
| google-cloud-storage | `Client._http` | `mount_transport` | an argument of `Client`; Google's samples use it |
| google-cloud-storage | `Client._bucket_metadata_cache` | `disable_bucket_metadata` | an argument of `Client` |
| google-cloud-storage | `Client._credentials` | `get_credentials` | a property of `Client`; there is none |
| hydra-core | `hydra._internal.core_plugins.basic_sweeper` | `is_grid` | a sweeper kind in `HydraConf`; there is none |

Undocumented names without an underscore, with the modules that use them:

| library | name | used in |
| --- | --- | --- |
| keras | `Function.operations`, `Operation.input`, `Operation.output` | models/bn_folding.py, features/cut.py |
| keras | `Normalization.mean`, `Normalization.variance` | models/grad_cam.py |
| tensorboard | `compat.proto`, `summary.writer.record_writer` | cli/sweep.py, runs/metrics.py |
| tensorboard | `plugins.hparams`, `plugins.scalar.summary_v2` | cli/sweep.py |
| uvicorn | `H11Protocol` and its attributes `conn`, `cycle`, `loop`, `transport` | serving/server.py |
| uvicorn | `Server`: `servers`, `server_state`, `lifespan`, `capture_signals`, `shutdown` | serving/server.py |
| ai-edge-litert | `schema_py_generated` | exporting/tflite.py |

Each function imports its library, because modules that run without TensorFlow import this module.
"""

import warnings
from collections.abc import Callable
from typing import Any

# ---------------------------------------------------------------------------------------------------------------
# Keras


def run_through_graph(network: Any, inputs: Any, operation_fn: Callable[[Any], Callable[..., Any]]) -> Any:
    """Compute the outputs of a functional `keras.Model` from `inputs`, replacing its operations by other functions.

    `operation_fn(operation)` returns the function that is called with the inputs of the operation.
    """
    return network._run_through_graph(inputs, operation_fn=operation_fn)


def get_producer(tensor: Any) -> Any:
    """Return the layer or operation whose output is this `keras.KerasTensor`."""
    return tensor._keras_history.operation


def get_variable_index(optimizer: Any, variable: Any) -> int:
    """Return the index of a variable in the list of variables that the optimizer was built with."""
    return optimizer._get_variable_index(variable)


def swap_class(layer: Any, cls: type) -> None:
    """Change the class of a layer to a base class, or to a subclass that adds no state. Its variables do not change."""
    layer.__class__ = cls


class _DownloadRequested(Exception):
    """Ends `build` in `find_download` at its first download."""


def find_download(build: Callable[[], Any]) -> tuple[str, str] | None:
    """Return the file name and URL of the first file that `build` would download with Keras, or None if there is none.

    `build` is called, but nothing is downloaded. Not thread-safe.
    """
    from keras.src.utils import file_utils

    def report(fname: str, origin: str, **_: Any) -> None:
        raise _DownloadRequested(fname, origin)

    original_get_file, file_utils.get_file = file_utils.get_file, report
    try:
        with warnings.catch_warnings():  # Keras warns if there are no weights for the image size
            warnings.simplefilter("ignore")
            build()
    except _DownloadRequested as download:
        name, url = download.args
        return name, url
    finally:
        file_utils.get_file = original_get_file
    return None


def get_library_class(layer: Any) -> type:
    """Return the class of a layer, or its nearest base class that this package does not define."""
    return next(cls for cls in type(layer).__mro__ if cls.__module__.partition(".")[0] != __package__)


# ---------------------------------------------------------------------------------------------------------------
# TensorFlow, TensorBoard

_ALL_TO_ALL_GROUP = 1 << 20  # group key that is not used by a strategy, because strategies count their groups from 1


def make_saved_model_proto() -> Any:
    """Return an empty `SavedModel` message, into which a `saved_model.pb` can be parsed."""
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    return SavedModel()


def advance_function_numbers(number: int) -> None:
    """Advance the counter in the names of TensorFlow's functions to at least `number`."""
    from tensorflow.python.framework.ops import uid

    while uid() < number:
        pass


def all_to_all(rows: Any, num_replicas: int, key: int) -> Any:
    """Send row i of `rows`, [replicas, ...], to replica i. Return the rows that the replicas send to this one.

    Must be called in the replica context of a `MultiWorkerMirroredStrategy` with one replica per worker.

    Args:
        key: identifies the call, the same on all workers. All calls with the same key must have the same shape.

    Returns:
        A tensor [replicas, ...], whose row i is from replica i.
    """
    from tensorflow.python.ops.collective_ops import all_to_all_v2

    return all_to_all_v2(rows, group_size=num_replicas, group_key=_ALL_TO_ALL_GROUP, instance_key=key)


def make_session_end_summary(session_end_info: Any) -> Any:
    """Return the `Summary` message of a `SessionEndInfo`, which completes a run's row on TensorBoard's HParams page."""
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2, summary_v2

    data = plugin_data_pb2.HParamsPluginData(session_end_info=session_end_info)
    return summary_v2._summary_pb(metadata.SESSION_END_INFO_TAG, data)


# ---------------------------------------------------------------------------------------------------------------
# Google Cloud Storage


def mount_transport(client: Any, adapter: Any) -> None:
    """Send all requests of a `storage.Client` through a `requests.adapters.HTTPAdapter`."""
    client._http.mount("https://", adapter)
    client._http.mount("http://", adapter)


def disable_bucket_metadata(client: Any) -> None:
    """Stop a `storage.Client` from requesting bucket metadata for tracing, which needs storage.buckets.get."""
    client._bucket_metadata_cache = None


def get_credentials(client: Any) -> Any:
    """Return the `google.auth.credentials.Credentials` of a `storage.Client`."""
    return client._credentials


# ---------------------------------------------------------------------------------------------------------------
# Hydra


def is_grid(hydra_settings: Any) -> bool:
    """Return whether a `HydraConf` uses Hydra's basic sweeper, which runs a grid search."""
    return hydra_settings.sweeper["_target_"].endswith(".BasicSweeper")
