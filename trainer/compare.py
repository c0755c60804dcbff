"""`python -m trainer.compare RUN RUN ... [output=FILE.html]`: compare runs on the examples they have in common.

Each RUN is the output_dir of a finished run, local or in a bucket, or a folder written by `python -m trainer.evaluate`.
The first is the reference. Prints a table and writes a page (default: compare.html). Exit code 0, or 2 if the runs
cannot be compared.
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
            raise ConfigError("at least two different runs are required", fix=f"write {usage(__doc__)}")
        output = Path(own.get("output", "compare.html")).expanduser()
        if output.suffix != ".html":
            raise ConfigError("is not an HTML file", key="output", value=output, fix="use output=compare.html")
        from trainer.report import compare  # matplotlib is imported only now

        named = zip(addresses, compare.short_names(addresses), strict=True)
        comparison = compare.compare_runs([compare.read_scored_run(address, name) for address, name in named])
        compare.print_comparison(comparison)
        compare.write_comparison(output, comparison)
        log.info(f"page: {output}")


if __name__ == "__main__":
    main()
