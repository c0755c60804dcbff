"""The peers of the whole recipe (`benchmarks/plain_keras.py`). Without imports, which would cost time."""

PEERS = ("notebook", "corrected", "best")
