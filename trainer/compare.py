"""`python -m trainer.compare RUN RUN ... [output=FILE.html]`: runs side by side, on the examples they share.

Each RUN is the output_dir of a finished run, here or in a bucket, or a folder that `python -m trainer.evaluate` wrote.
The first is what the others are compared with. Prints a table and writes a page (compare.html where nothing else is
said). Exit code 0, or 2 where runs cannot be compared.
"""

import sys
from pathlib import Path

from trainer.cli.arguments import read_arguments, usage
from trainer.cli.process import exit_with_code
from trainer.errors import ConfigError
from trainer.monitoring.log import log


def main() -> None:
    """Entry point of `python -m trainer.compare`; exits with a documented code (`trainer.errors`)."""
    with exit_with_code():
        own, addresses = read_arguments(sys.argv[1:], __doc__, {"output": ""}, rest="[^-](?s:.*)")
        if len(addresses) < 2 or len(set(addresses)) != len(addresses):
            raise ConfigError(f"name at least two runs, each once: {usage(__doc__)}")
        output = Path(own.get("output", "compare.html")).expanduser()
        if output.suffix != ".html":
            raise ConfigError(f"output={output}: give the name of a page, such as output=compare.html")
        from trainer.report.compare import compare_runs, write_comparison  # matplotlib is imported only now
        from trainer.report.compare_runs import names_of, read_scored, show

        runs = [read_scored(address, name) for address, name in zip(addresses, names_of(addresses), strict=True)]
        found = compare_runs(runs)
        show(found)
        write_comparison(output, found)
        log.info(f"page: {output}")


if __name__ == "__main__":
    main()
