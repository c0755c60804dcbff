"""Entry point of `python -m trainer.promote`."""

from trainer.cluster.signals import exit_on_sigterm
from trainer.promote import main

if __name__ == "__main__":
    exit_on_sigterm()  # SIGTERM may end the process at any time: servers do not see an incomplete version
    main()
