"""Options that several verbs share: which model, how sparse, in which files, and values by commas.

A preset names config and policy together; single options change one field of them. Every verb begins with the preset
"default", which is what `BAAttConfig()` and `Policy()` are.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from baatt.backend import IMPLS, choose_backend
from baatt.cli.errors import UsageError
from baatt.config import PRESETS, BAAttConfig, Policy, Preset
from baatt.lab import loading
from baatt.lab.describe import selection_name
from baatt.lab.options import add_options, chosen, given, options_of, read_dials, variants

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from baatt.models.llada import MaskedDiffusionLM

#: Suffixes of numbers of tokens.
UNITS = {"K": 2**10, "M": 2**20}


def add_sparse_options(
    parser: argparse.ArgumentParser,
    *,
    many: Mapping[str, Sequence[Any] | None] | None = None,
    without: Collection[str] = (),
    dense_layers: bool = True,
    impl: bool = True,
) -> None:
    """--preset, an option for every field of `BAAttConfig`, --dense-layers, --impl.

    Args:
        many: fields that take several values by commas, as in `add_options`; read them by `read_configs`.
        without: fields that become no option.
        dense_layers, impl: False leaves the option out, where there is no model, or nothing to choose.
    """
    group = parser.add_argument_group(
        "sparse attention",
        "(E2), (C1) and so on are equations of docs/method.md; BA-Att is the paper's score; qk in 1024: queries and "
        "keys sorted by norm in segments of 1024 tokens.",
    )
    presets = "; ".join(
        f"{name}: {selection_name(vars(config), policy.dense_layers)}" for name, (config, policy) in PRESETS.items()
    )
    group.add_argument(
        "--preset", choices=list(PRESETS), default="default",
        help=f"the options below, together; {presets} (default: default)",
    )  # fmt: skip
    config = PRESETS["default"].config
    names = [field.name for field in dataclasses.fields(config) if field.name not in without]
    add_options(group, type(config), only=names, many=many)
    if dense_layers:
        add_options(group, Policy, only=("dense_layers",))
    if impl:
        group.add_argument("--impl", choices=IMPLS, default="auto", help="implementation (default: auto)")


def read_preset(arguments: argparse.Namespace) -> Preset:
    """The preset with what was given; of fields with several values the first."""
    preset = PRESETS[arguments.preset]
    return Preset(read_configs(arguments)[0], chosen(arguments, preset.policy))


def read_configs(arguments: argparse.Namespace) -> list[BAAttConfig]:
    """The preset's config with every combination of what was given."""
    base = PRESETS[arguments.preset].config
    return variants(base, given(arguments, type(base)))


def read_settings(
    arguments: argparse.Namespace, others: Mapping[type, Sequence[str]]
) -> tuple[list[BAAttConfig], list[Policy], dict[type, dict[str, Any]]]:
    """The preset's config and policy with every combination of what was given as options and by --dial.

    Args:
        others: further dataclasses, with the names of their fields that --dial knows; their values come last.
    """
    dials = {BAAttConfig: list(options_of(BAAttConfig)), Policy: ["dense_layers"], **others}
    texts: dict[type, list[str]] = {cls: [] for cls in dials}
    for text in arguments.dial:
        owner = next((cls for cls, names in dials.items() if text.partition("=")[0] in names), None)
        if owner is None:
            known = ", ".join(name for names in dials.values() for name in names)
            raise UsageError(f"--dial must be NAME=VALUE,... once for each of {known}, got {text!r}")
        texts[owner].append(text)
    values = {cls: given(arguments, cls) | read_dials(found, cls) for cls, found in texts.items()}
    preset = PRESETS[arguments.preset]
    # Not sorted among the other options, and without 0: that is dense attention, there anyway.
    sparsities = sorted({value for value in values[BAAttConfig].pop("sparsity") if value != 0})
    configs = variants(preset.config, values[BAAttConfig])
    configs = [one for config in configs for one in variants(config, {"sparsity": sparsities})]
    return configs, variants(preset.policy, values[Policy]), values


def add_model_options(
    parser: argparse.ArgumentParser, *, any_kind: bool = False, usual: str = "needle", folder: str | None = None
) -> None:
    """--model, --device, --dtype; --trust-remote-code where a model may be of any kind that `baatt.enable` knows.

    Args:
        usual: the model that is taken where none is given, for the help.
        folder: what else than a language model --model takes, which then has no name.
    """
    group = parser.add_argument_group("model")
    layout = "in LLaDA's layout or of transformers" if any_kind else "in LLaDA's layout"
    text = (
        f"folder {layout}, or a name: needle, shipped with baatt; smollm2, of `baatt fetch smollm2` (default: {usual})"
    )
    if folder is not None:
        text = f"folder {folder} (default: the model shipped with baatt)"
    group.add_argument("--model", type=loading.find_model if folder is None else Path, help=text)
    if any_kind:
        text = "run the modelling code that a transformers folder brings"
        group.add_argument("--trust-remote-code", action="store_true", help=text)
    group.add_argument("--device", default="cpu", help='where to run, e.g. "cpu" or "cuda" (default: cpu)')
    group.add_argument(
        "--dtype", choices=list(loading.DTYPES), default="float32", help="of the weights (default: float32)"
    )


def read_device(name: str) -> torch.device:
    """What --device names; a UsageError where there is none."""
    try:
        return loading.find_device(name)
    except ValueError as error:
        raise UsageError(f"--{error}") from None


def read_place(arguments: argparse.Namespace) -> torch.device:
    """What --device names; a UsageError where there is none, or --impl does not run there."""
    device = read_device(arguments.device)
    try:
        choose_backend(arguments.impl, device)
    except RuntimeError as error:
        raise UsageError(f"--impl {arguments.impl} is refused: {error}") from None
    return device


def model_folder(arguments: argparse.Namespace) -> Path:
    """The folder of --model, of the needle model where none is given."""
    folder: Path | None = arguments.model
    return loading.find_model("needle") if folder is None else folder


def load_model(arguments: argparse.Namespace, policy: Policy | None = None) -> "tuple[MaskedDiffusionLM, Tokenizer]":
    """Model and tokenizer of the chosen folder, on the chosen device.

    Raises:
        UsageError: no such device, an implementation that does not run there, or dense layers that are not there.
    """
    device = read_place(arguments)
    model, tokenizer = loading.load_model(model_folder(arguments), dtype=loading.DTYPES[arguments.dtype], device=device)
    try:
        (policy or Policy()).check_layers(model.config.n_layers)
    except ValueError as error:
        raise UsageError(str(error).replace("policy.dense_layers", "--dense-layers")) from None
    return model, tokenizer


def load_any_model(
    arguments: argparse.Namespace, *, head: bool = False, gguf: str | None = None
) -> "tuple[Any, Tokenizer]":
    """The model of --model: of LLaDA's layout by us, of every other by transformers; `head`, `gguf` as there."""
    try:
        config = json.loads((model_folder(arguments) / "config.json").read_bytes())
    except (OSError, ValueError):
        config = None  # our loader says what is missing
    if gguf is None and (not isinstance(config, dict) or config.get("model_type") == "llada"):
        return load_model(arguments)
    try:
        return loading.load_transformers(
            arguments.model, dtype=loading.DTYPES[arguments.dtype], device=read_place(arguments),
            trust_remote_code=arguments.trust_remote_code, head=head, gguf=gguf,
        )  # fmt: skip
    except ImportError as error:
        raise UsageError(f"--model is not in LLaDA's layout: {error}") from None


def check_files(arguments: argparse.Namespace, *files: str, pictures: Collection[str] = ()) -> None:
    """Refuse files that could not be written before a minute is spent on them.

    Args:
        files, pictures: names of the options, of which a picture must be a PNG and needs matplotlib.

    Raises:
        UsageError: a folder, one that cannot be written, another format, or no matplotlib.
    """
    for name in (*files, *pictures):
        path: Path | None = getattr(arguments, name)
        if path is None:
            continue
        flag = f"--{name.replace('_', '-')}"
        if not path.parent.is_dir():
            raise UsageError(f"{flag} must lie in an existing folder, {path.parent} is none")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise UsageError(f"{flag} must lie in a folder that can be written, {path.parent} is none")
        if path.is_dir():
            raise UsageError(f"{flag} must be a file, {path} is a folder")
        if name in pictures and path.suffix.lower() != ".png":
            raise UsageError(f"{flag} must end in .png, got {path.name!r}")
        if name in pictures and importlib.util.find_spec("matplotlib") is None:
            raise UsageError(f"{flag}: the picture needs matplotlib: pip install 'baatt[plots]'")


def check_store(folder: Path) -> None:
    """Refuse a folder for answers that could not be made or written; a UsageError as of `check_files`."""
    nearest = next(one for one in (folder, *folder.parents) if one.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"--store must lie in a folder that can be written, {nearest} is none")


# Types for argparse.


def seed(text: str) -> int:
    """A whole number that a generator of PyTorch takes."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if not -(2**63) <= number < 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number of 64 bits, got {number}")
    return number


def at_least(least: int) -> Callable[[str], int]:
    """A whole number with a lower limit."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {number}")
        return number

    return read


def lengths(text: str) -> list[int]:
    """Numbers of tokens by commas such as 1024,4K, each once, from short to long."""
    found = []
    for part in text.split(","):
        number, unit = (part[:-1], part[-1].upper()) if part[-1:].upper() in UNITS else (part, "")
        if not (number.isascii() and number.isdigit() and int(number) > 0):
            raise argparse.ArgumentTypeError(f"must be positive numbers of tokens such as 4096,8K, got {part!r}")
        found.append(int(number) * UNITS.get(unit, 1))
    return sorted(set(found))


def length(text: str) -> int:
    """One number of tokens such as 4096 or 4K."""
    found = lengths(text)
    if len(found) != 1:
        raise argparse.ArgumentTypeError(f"must be one number of tokens such as 4096 or 4K, got {text!r}")
    return found[0]


def layer_numbers(text: str) -> tuple[int, ...]:
    """Numbers of layers by commas; negative ones count from the last."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers of layers by commas, got {text!r}") from None


def names_of(known: Collection[str], groups: Mapping[str, Sequence[str]] | None = None) -> Callable[[str], list[str]]:
    """Names by commas, each once, or the name of a group of them."""

    def read(text: str) -> list[str]:
        names = list((groups or {}).get(text, text.split(",")))
        if any(name not in known for name in names):
            raise argparse.ArgumentTypeError(f"must be of {','.join([*known, *(groups or {})])}, got {text!r}")
        return list(dict.fromkeys(names))

    return read
