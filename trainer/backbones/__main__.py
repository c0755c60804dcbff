"""`python -m trainer.backbones`."""

from trainer.backbones import main
from trainer.cluster.signals import exit_on_sigterm

if __name__ == "__main__":
    exit_on_sigterm()  # what was written so far is complete
    main()
