"""`python -m trainer.look`."""

from trainer.cluster.signals import exit_on_sigterm
from trainer.look import main

if __name__ == "__main__":
    exit_on_sigterm()  # each file is written atomically, and the next start writes all of them again
    main()
