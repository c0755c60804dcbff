"""Entry point of `python -m trainer.nightly`."""

from trainer.cluster.signals import exit_on_sigterm
from trainer.nightly import main

if __name__ == "__main__":
    exit_on_sigterm()  # SIGTERM ends the process, except while a run trains: the run first saves a checkpoint
    main()
