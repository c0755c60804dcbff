"""`python -m trainer.compare RUN RUN ... [output=FILE.html]`: compare runs on the examples they have in common.

    RUN               output_dir of a finished run, or a folder written by `python -m trainer.evaluate`, local or in a
                      bucket; the first one is the reference
    output=FILE.html  page to write (default: compare.html)

Example: python -m trainer.compare outputs/a outputs/b output=compare.html

Exit codes: 0 done; 2 the runs cannot be compared.
"""

import sys
from pathlib import Path

from trainer.cli.arguments import format_usage, parse_arguments, require_address
from trainer.cli.process import exit_with_code
from trainer.errors import ConfigError
from trainer.monitoring.log import log
from trainer.storage.local import delete_stale_temporary_files
from trainer.storage.path import canonicalize_address


def main() -> None:
    """Run `python -m trainer.compare`, and exit with a code of `trainer.errors`."""
    with exit_with_code():
        options, addresses = parse_arguments(sys.argv[1:], __doc__, {"output": ""}, other_arguments="[^-](?s:.*)")
        addresses = [require_address(address) for address in addresses]
        if len(addresses) < 2 or len(set(map(canonicalize_address, addresses))) != len(addresses):
            raise ConfigError("at least two different runs are required", fix=f"write {format_usage(__doc__)}")
        output = Path(options.get("output", "compare.html")).expanduser()
        if output.suffix != ".html":
            raise ConfigError("is not an HTML file", key="output", value=output, fix="use output=compare.html")
        from trainer.report import compare  # here, because it imports matplotlib

        names = compare.make_distinct_names(addresses)
        comparison = compare.compare_runs(list(map(compare.read_scored_run, addresses, names)))
        delete_stale_temporary_files(output.parent, output.name)
        compare.write_comparison(output, comparison)  # before the table, since a closed pipe can end the process
        compare.print_comparison(comparison)
        log.info(f"page: {output}")


if __name__ == "__main__":
    main()
