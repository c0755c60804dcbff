"""Entry point of `python -m trainer.relay`."""

from trainer.cluster.signals import exit_on_sigterm
from trainer.relay import main

if __name__ == "__main__":
    exit_on_sigterm()  # SIGTERM ends the process until the server has installed its own handler
    main()
