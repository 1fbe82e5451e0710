"""The command line: apr (or python -m apr) info | run | batch | bench | train | soak."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from apr.commands import batch, bench, info, run, soak, train
from apr.errors import Error
from apr.hf.world import joined_ranks

COMMANDS = {"info": info, "run": run, "batch": batch, "bench": bench, "train": train, "soak": soak}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="apr", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))
    options = parser.parse_args(arguments)
    try:
        with joined_ranks():
            COMMANDS[options.command].main(options)
    except Error as error:
        print(f"apr: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("apr: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
