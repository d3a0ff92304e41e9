"""`baatt VERB ...`: reads the verb and hands over to its file.

What the caller can mend ends in one line on stderr and exit code 2; a defect of ours keeps its traceback.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import NoReturn

from baatt import __version__
from baatt.cli import bench, demo, doctor, generate
from baatt.cli.errors import UsageError

VERBS = {"demo": demo, "generate": generate, "bench": bench, "doctor": doctor}


class OneLineParser(argparse.ArgumentParser):
    """Errors in one line, like all others of this program."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (try {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = OneLineParser(prog="baatt", description="Block approximate sparse attention for diffusion models.")
    parser.add_argument("--version", action="version", version=f"baatt {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=OneLineParser)
    for name, module in VERBS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        verb = verbs.add_parser(name, help=summary, description=summary)
        module.add_arguments(verb)
        verb.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    try:
        arguments = build_parser().parse_args(argv)
        arguments.command = shlex.join(["baatt", *(sys.argv[1:] if argv is None else argv)])
        arguments.run(arguments)
    except (UsageError, OSError, ValueError, TypeError) as error:
        print(f"baatt: {' '.join(str(error).split())}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        print("baatt: interrupted", file=sys.stderr)  # noqa: T201
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
