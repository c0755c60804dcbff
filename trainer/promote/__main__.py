"""`python -m trainer.promote`."""

from trainer.cluster.signals import exit_on_sigterm
from trainer.promote import main

if __name__ == "__main__":
    exit_on_sigterm()  # whatever was written so far is invisible to servers
    main()
