"""`python -m trainer.predict`."""

from trainer.cluster.signals import exit_on_sigterm

if __name__ == "__main__":
    exit_on_sigterm()  # SIGTERM and SIGINT end the process during the imports below, which take seconds

from trainer.predict import main

if __name__ == "__main__":
    main()
