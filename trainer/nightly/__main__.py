"""`python -m trainer.nightly`."""

from trainer.cluster.signals import exit_on_sigterm
from trainer.nightly import main

if __name__ == "__main__":
    exit_on_sigterm()  # except while a run trains, which saves first
    main()
