"""kubetune: fine-tune image classifiers in phases, on a laptop or on a cluster of preemptible nodes."""

__version__ = "0.1.0"
