"""`python -m trainer.rates`."""

from trainer.cluster.signals import exit_on_sigterm
from trainer.rates import main

if __name__ == "__main__":
    exit_on_sigterm()  # the page is written at the end
    main()
