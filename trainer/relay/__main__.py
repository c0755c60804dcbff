"""`python -m trainer.relay`."""

from trainer.cluster.signals import exit_on_sigterm
from trainer.relay import main

if __name__ == "__main__":
    exit_on_sigterm()  # until the server listens
    main()
