"""The peers of the whole recipe, which `benchmarks/plain_keras.py` describes. Without imports, which would cost time."""

PEERS = ("notebook", "corrected", "best")
