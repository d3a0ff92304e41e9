"""One reader of options: from the fields of a frozen dataclass to argparse, to flat dicts of a harness, to one text.

In: dataclasses such as `BAAttConfig`, `Policy` and `SamplerConfig`, whose types, defaults, Args docstring and metadata
say everything: `{"choices": SCORES}` holds the names a field takes, `{"none": "whole"}` the word for None (or "none"),
`{"needs": "sparsity"}` the name without which a nested dataclass is not there. Out: options, values, instances. A field
that is added to a dataclass is an option everywhere at once. A verb calls `add_options` and `chosen`, or for lists of
values `add_options(many=)` and `variants`; `--dial NAME=V,V` is `read_dials`, a harness's arguments are `read_options`.
"""

import argparse
import dataclasses
import difflib
import functools
import inspect
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class OptionError(argparse.ArgumentTypeError, ValueError):
    """What an option must be, to be put behind its name: argparse shows it as it is."""


class Option(NamedTuple):
    """A field as an option.

    kind: int, float, str, bool, Path, or tuple for numbers of layers. none: the word for None, "" where it is refused.
    choices: what it takes, empty = anything of its kind. help: its entry of the docstring.
    """

    name: str
    kind: type
    none: str
    choices: tuple[Any, ...]
    help: str

    @property
    def flag(self) -> str:
        """Its name on a command line."""
        return f"--{self.name.replace('_', '-')}"

    def read(self, value: object) -> Any:
        """The value that a text means. What is no text is taken as it is, or as what a harness made of a text: 2024 for
        a folder's name, -1.0 or [0, 1] for layers.

        Raises:
            OptionError: "must be ..., got ...".
        """
        if self.none and value == self.none:
            return None
        try:
            found = _KINDS[self.kind][2](value)
        except ValueError:
            either = f', or "{self.none}"' if self.none else ""
            raise OptionError(f"must be {_KINDS[self.kind][1]}{either}, got {value!r}") from None
        if self.choices and found not in self.choices:
            raise OptionError(f"must be one of {list(self.choices)}, got {value!r}")
        return found

    def read_many(self, text: str) -> list[Any]:
        """Values by commas, each once."""
        return list(dict.fromkeys(self.read(part) for part in text.split(",")))

    def spell(self, value: object) -> str:
        """The text that `read` reads as this value."""
        if value is None:
            return self.none
        return ",".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def options_of(cls: type) -> dict[str, Option]:
    """The fields of a dataclass that have a readable type, by name. Nested dataclasses and pairs are left out."""
    hints, texts = get_type_hints(cls), _argument_texts(cls)
    found = {}
    for field in dataclasses.fields(cls):
        kind, optional = _kind(hints[field.name])
        if kind in _KINDS:
            none = field.metadata.get("none", "none") if optional else ""
            choices = tuple(field.metadata.get("choices", ()))
            found[field.name] = Option(field.name, kind, none, choices, texts.get(field.name, ""))
    return found


def add_options(
    group: argparse._ActionsContainer,
    cls: type,
    *,
    only: Collection[str] | None = None,
    many: Mapping[str, Sequence[Any] | None] | None = None,
    defaults: object = None,
) -> None:
    """An option for every field: `block_size` becomes `--block-size`.

    Args:
        group: a parser or one of its groups.
        cls: the dataclass.
        only: names of the fields that become options; None = all.
        many: fields that take several values by commas, which `given` returns as lists; each with the list that counts
            where nothing is given, None for no list.
        defaults: an instance of `cls` whose values the help names. What was not given stays out of the namespace, so
            that `chosen` can take it from a preset.
    """
    for name, option in options_of(cls).items():
        if only is not None and name not in only:
            continue
        several, usual = name in (many or {}), (many or {}).get(name)
        text = option.help + (", by commas" if several else "")
        if option.none:  # what the docstring calls None is another word here
            text = re.sub(r"\bNone\b", f'"{option.none}"', text)
        if usual is not None:
            text += f" (default: {','.join(map(option.spell, usual))})"
        elif defaults is not None:
            text += f" (default: {option.spell(getattr(defaults, name))})"
        keywords: dict[str, Any] = {"dest": f"{cls.__name__}.{name}"}
        keywords["default"] = argparse.SUPPRESS if usual is None else list(usual)
        if option.kind is bool:
            on = getattr(cls if defaults is None else defaults, name, False)
            keywords["action"] = argparse.BooleanOptionalAction if on else "store_true"
        else:
            shown = "{" + ",".join(map(str, option.choices)) + "}" if option.choices else _KINDS[option.kind][0]
            metavar = f"{shown}|{option.none}" if option.none else shown
            keywords |= {"metavar": metavar, "type": option.read_many if several else option.read}
        group.add_argument(option.flag, help=text.replace("%", "%%"), **keywords)


def given(arguments: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The fields of a dataclass whose options were given, with their values."""
    prefix = f"{cls.__name__}."
    return {key.removeprefix(prefix): value for key, value in vars(arguments).items() if key.startswith(prefix)}


def chosen(arguments: argparse.Namespace, base: T) -> T:
    """An instance of a dataclass, changed by the options that were given; errors as `variants`."""
    return variants(base, given(arguments, type(base)))[0]


def variants(base: T, values: Mapping[str, Any]) -> list[T]:
    """Every combination of values, each once, in the order of the fields; the last one changes fastest.

    Args:
        base: holds the values of the other fields.
        values: field -> a value, or a list of them.

    Raises:
        TypeError, ValueError: what the dataclass refuses, under the option's name.
    """
    options = options_of(type(base))
    names = [name for name in options if name in values]
    lists = [value if isinstance(value := values[name], list) else [value] for name in names]
    try:
        combinations = [dict(zip(names, one, strict=True)) for one in itertools.product(*lists)]
        return list(dict.fromkeys(dataclasses.replace(base, **one) for one in combinations))  # type: ignore[type-var]
    except (TypeError, ValueError) as error:
        name, _, rest = str(error).partition(" ")
        if name not in options:
            raise
        raise type(error)(f"{options[name].flag} {rest}") from None


def read_value(cls: type, name: str, value: object) -> Any:
    """The value of one field; a ValueError where there is no such field or it is not of its kind."""
    _refuse_unknown([name], list(options_of(cls)), "an option")
    try:
        return options_of(cls)[name].read(value)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


def read_dials(texts: Iterable[str], cls: type, what: str = "--dial") -> dict[str, list[Any]]:
    """NAME=VALUE,VALUE texts: field -> values, for `variants`. Layers are joined by +: dense_layers=none,0,0+1.

    Raises:
        ValueError: another form, a name that is unknown or there twice, or a value not of the field's kind.
    """
    options, found = options_of(cls), {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or name in found:
            raise ValueError(f"{what} must be NAME=VALUE,... once for each of {', '.join(options)}, got {text!r}")
        _refuse_unknown([name], list(options), what)
        try:
            found[name] = options[name].read_many(values)
        except ValueError as error:
            raise ValueError(f"{what} {name} {error}") from None
    return found


def read_options(cls: type[T], values: Mapping[str, Any], what: str = "model_args") -> T:
    """An instance from a flat dict of texts or values, such as a harness hands over. None counts as not given.

    The fields of nested dataclasses are named like the others. One whose metadata says that it `needs` a name is left
    at its default without it (or with "none" for it), and then its other fields are refused.

    Raises:
        TypeError, ValueError: an unknown name, one that is missing, or a value that the dataclass refuses.
    """
    _refuse_unknown(values, _flat_names(cls), what)
    return _build(cls, {name: value for name, value in values.items() if value is not None}, what)


def _build(cls: type[T], values: Mapping[str, Any], what: str) -> T:
    found = {name: read_value(cls, name, values[name]) for name in options_of(cls) if name in values}
    for field, part in _parts(cls):
        needed, names = field.metadata.get("needs"), [name for name in _flat_names(part) if name in values]
        if needed is not None and values.get(needed, "none") == "none":
            if others := [name for name in names if name != needed]:
                raise ValueError(f"{what} must have {needed} beside {', '.join(others)}, got none")
        elif names:
            found[field.name] = _build(part, values, what)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and found.get(field.name) in (None, ""):
            raise ValueError(f"{what} must have {field.name}, got none")
    return cls(**found)


def _parts(cls: type) -> list[tuple[dataclasses.Field[Any], Any]]:
    """The fields that hold a dataclass, with it."""
    hints = get_type_hints(cls)
    pairs = [(field, _kind(hints[field.name])[0]) for field in dataclasses.fields(cls)]
    return [(field, kind) for field, kind in pairs if dataclasses.is_dataclass(kind)]


def _flat_names(cls: type) -> list[str]:
    return [*options_of(cls), *(name for _, part in _parts(cls) for name in _flat_names(part))]


def _refuse_unknown(names: Iterable[str], known: Sequence[str], what: str) -> None:
    if unknown := [name for name in names if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"{what} must be among {', '.join(known)}; got {', '.join(unknown)}{hint}")


def _kind(hint: Any) -> tuple[Any, bool]:
    """The type without None, and whether None is taken."""
    if get_origin(hint) in (Union, UnionType):
        members = [one for one in get_args(hint) if one is not NoneType]
        return (_kind(members[0])[0] if len(members) == 1 else None), NoneType in get_args(hint)
    return (tuple if get_args(hint) == (int, ...) else hint), False


@functools.cache
def _argument_texts(cls: type) -> dict[str, str]:
    """Field -> what the Args section of the docstring says of it, those of base classes included."""
    texts: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        section = re.search(r"^Args:\n(.*?)(\n\n|\Z)", inspect.cleandoc(one.__doc__ or ""), re.DOTALL | re.MULTILINE)
        for entry in re.split(r"\n {4}(?=\S)", "\n" + section[1] if section else ""):
            names, _, text = entry.partition(": ")
            texts |= dict.fromkeys(names.split(", "), " ".join(text.replace("`", "").split()).removesuffix("."))
    return texts


def _read_integer(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    return value


def _read_bool(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.lower() not in ("true", "false"):
        raise ValueError(value)
    return value.lower() == "true"


def _read_layers(value: Any) -> tuple[int, ...]:
    """Numbers by commas, or by + where commas separate options."""
    if value == "none":
        return ()
    parts = re.split("[,+]", value) if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    return tuple(_read_integer(part) for part in parts)


#: kind of a field -> what stands for a value in the help, what a value must be, and how a text or value is read.
_KINDS: dict[type, tuple[str, str, Callable[[Any], Any]]] = {
    int: ("N", "a whole number", _read_integer),
    float: ("X", "a number", lambda value: float(value) if isinstance(value, str) else value),
    str: ("NAME", "a name", lambda value: value if isinstance(value, bool) else str(value)),
    bool: ("BOOL", "true or false", _read_bool),
    Path: ("PATH", "a path", lambda value: Path(str(value)).expanduser()),
    tuple: ("N,N|none", 'numbers of layers such as 0,1 or 0+1, or "none"', _read_layers),
}
