"""Names of the alternatives in plain Keras (`benchmarks/plain_keras.py`), in a module that imports nothing slow."""

PEERS = ("notebook", "corrected", "best")
