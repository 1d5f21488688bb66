"""Step 3: a YAML file and dotted options become typed settings, or one sentence about what is wrong with them."""

import dataclasses
import difflib
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml  # type: ignore[import-untyped]  # it has no annotations, and safe_load is all we take
from docstring_parser import parse
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from eagle3.errors import ConfigError

Settings = TypeVar("Settings")

# What the public trainers call a setting, for people who come from one of them.
_OTHER_NAMES = {
    "target.model": ("model_name_or_path", "target_model_path", "verifier_name_or_path"),
    "target.dtype": ("torch_dtype", "precision"),
    "data.train": ("train_data_path", "dataset_path"),
    "data.validation": ("eval_data_path", "val_data_path"),
    "data.max_length": ("max_seq_length", "max_len", "total_seq_len", "model_max_length"),
    "draft.vocab_size": ("draft_vocab_size",),
    "unroll.steps": ("ttt_steps", "ttt_length", "num_unroll"),
    "train.epochs": ("num_epochs", "num_train_epochs", "max_epochs"),
    "train.batch_size": ("per_device_train_batch_size", "micro_batch_size"),
    "train.lr": ("learning_rate", "max_lr"),
    "train.max_grad_norm": ("clip_grad_norm", "grad_clip"),
    "checkpoint.every_steps": ("save_steps", "save_interval"),
    "checkpoint.restore_from": ("resume_from_checkpoint", "resume"),
    "out": ("output_dir", "save_path"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A setting as the docstring of its section describes it.

    Attributes:
        name: Dotted.
        kind: Its type.
        default: JSON-ready; None also where it is required.
        is_required: Whether it has no default.
        meaning: At least one sentence.
    """

    name: str
    kind: Any
    default: Any
    is_required: bool
    meaning: str


def read_settings(settings: type[Settings], arguments: Sequence[str]) -> Settings:
    """Read a tree of settings from dotted options and the YAML files that `--config` names; what stands later wins.

    Args:
        settings: A frozen dataclass, its sections being dataclasses too.
        arguments: Of the command line, behind the command's name.

    Returns:
        The settings, checked.

    Raises:
        ConfigError: A setting is unknown, missing, mistyped or out of range, or a file cannot be read.
    """
    parser = ArgumentParser(allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(settings, as_group=False)
    types_of = dict(_leaves(settings))
    arguments = _with_shipped_configs(_with_switches(arguments, types_of))
    _refuse_unknown(arguments, list(types_of))
    try:
        parsed = parser.parse_args(arguments)
    except ArgumentError as error:
        raise ConfigError(_one_sentence(str(error), types_of)) from error
    _refuse_empty(parsed, types_of)
    values = vars(parser.instantiate(parsed))
    return settings(**{field.name: values[field.name] for field in dataclasses.fields(settings)})  # type: ignore[arg-type]  # a dataclass


def shipped_configs() -> list[str]:
    """The names of the YAML files that come with the package; `--config` takes them where no such file exists."""
    return sorted(file.name for file in resources.files("eagle3").joinpath("configs").iterdir())


def described_sections(settings: type) -> Iterator[tuple[str, list[Setting]]]:
    """The settings of a tree as their docstrings describe them, section by section.

    Yields:
        The sentence of a section and its settings. The first has no sentence: the settings outside of sections.
    """
    hints, sections = get_type_hints(settings), {}
    top: list[Setting] = []
    for field in dataclasses.fields(settings):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            sections[field.name] = kind
        else:
            top.append(_described(field, settings, ""))
    yield "", top
    for name, section in sections.items():
        own = [_described(field, section, f"{name}.") for field in dataclasses.fields(section)]
        yield parse(section.__doc__ or "").short_description or name, own


def _described(field: "dataclasses.Field[Any]", section: Any, prefix: str) -> Setting:
    docs = [parse(kind.__doc__ or "").params for kind in reversed(section.__mro__)]
    meanings = {param.arg_name: param.description for params in docs for param in params}
    is_required = field.default is field.default_factory is dataclasses.MISSING
    default = None if field.default is dataclasses.MISSING else field.default
    return Setting(
        name=f"{prefix}{field.name}",
        kind=get_type_hints(section)[field.name],
        default=default,
        is_required=is_required,
        meaning=" ".join((meanings[field.name] or "").split()),
    )


def nearest(name: str, known: Sequence[str]) -> str:
    """The known setting that an unknown one is most likely meant to be.

    Args:
        name: Dotted, as it was typed.
        known: Dotted names, at least one.
    """
    section, _, leaf = name.rpartition(".")

    def likeness(candidate: str) -> tuple[float, float]:
        own_section, _, own_leaf = candidate.rpartition(".")
        spellings = (own_leaf, *_OTHER_NAMES.get(candidate, ()))
        by_leaf = max(_ratio(leaf, spelling) for spelling in spellings)
        whole = _ratio(name, candidate)
        return max(by_leaf + (0.2 if section == own_section else 0.0), whole), whole

    return max(known, key=likeness)


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one.lower().replace("-", "_"), other).ratio()


def _leaves(settings: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and type of each setting of a tree."""
    for name, kind in get_type_hints(settings).items():
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            yield from _leaves(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", kind


def _with_switches(arguments: Sequence[str], types_of: dict[str, Any]) -> list[str]:
    """Write `true` behind the name of a setting that is either true or false and was given without a value."""
    written = []
    for argument, following in zip(arguments, [*arguments, "--"][1:], strict=True):
        written.append(argument)
        if types_of.get(argument.removeprefix("--")) is bool and following.startswith("--"):
            written.append("true")
    return written


def _with_shipped_configs(arguments: Sequence[str]) -> list[str]:
    """Put the path of a shipped file where only its name was given."""
    found = list(arguments)
    for index, argument in enumerate(found):
        option, equals, value = argument.partition("=")
        if option != "--config":
            continue
        place = index if equals else index + 1
        name = value if equals else (found[place] if place < len(found) else "")
        if name in shipped_configs() and not Path(name).exists():
            path = str(resources.files("eagle3").joinpath("configs", name))
            found[place] = f"--config={path}" if equals else path
    return found


def _refuse_unknown(arguments: Sequence[str], known: Sequence[str]) -> None:
    names = [(argument[2:].partition("=")[0], "") for argument in arguments if argument.startswith("--")]
    for path in _config_paths(arguments):
        names += [(name, f" ({path})") for name in _keys(_read_yaml(path), known)]
    for name, where in names:
        if name not in known and name not in ("config", "help"):
            below = [setting for setting in known if where and setting.startswith(f"{name}.")]
            if below:
                raise ConfigError(f"{name} needs settings below it, such as {below[0]}; or leave it out.{where}")
            raise ConfigError(f"{name} is unknown; did you mean {nearest(name, known)}?{where}")


def _refuse_empty(values: Namespace, types_of: dict[str, Any]) -> None:
    """Refuses what the parser lets through: the empty text of an unset variable, and a file's `lr:` without a value."""
    for name, kind in types_of.items():
        value = values[name]
        if value == "" or (value is None and type(None) not in alternatives(kind)):
            raise ConfigError(f"{name} is empty, but must be {in_words(kind)}.")


def _config_paths(arguments: Sequence[str]) -> Iterator[str]:
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        if argument == "--config" or argument.startswith("--config="):
            path = argument.partition("=")[2] or following
            if not path or path.startswith("--"):
                raise ConfigError("--config needs the path of a YAML file behind it.")
            yield path


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        shipped = ", ".join(shipped_configs())
        raise ConfigError(
            f"The config file {path} cannot be read: {error.strerror}. Give a YAML file, or one that comes with "
            f"eagle3: {shipped}."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"The config file {path} is not YAML in UTF-8: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"The config file {path} must hold settings such as `train:` with `lr: 1e-4` below it.")
    return content


def _keys(content: dict[str, Any], known: Sequence[str], prefix: str = "") -> Iterator[str]:
    """Dotted names of what a file sets; a section that holds no settings counts as one unknown name."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and any(setting.startswith(f"{name}.") for setting in known):
            yield from _keys(value, known, f"{name}.")
        else:
            yield name


def _one_sentence(message: str, types_of: dict[str, Any]) -> str:
    """What the parser found, in the words of this command line."""
    missing = re.match(r"the following arguments are required: (.*)", message)
    if missing:
        names = missing[1].split(", ")
        verb = "is" if len(names) == 1 else "are"
        options = " and ".join(f"--{name}" for name in names)
        return f"{options} {verb} required; give {'it' if verb == 'is' else 'them'} as an option or in the config file."
    lonely = re.match(r"argument --(\S+): expected one argument", message)
    if lonely and lonely[1] in types_of:
        return f"--{lonely[1]} needs a value behind it: {in_words(types_of[lonely[1]])}."
    stray = re.match(r"unrecognized arguments: (.*)", message)
    if stray:
        return f"{stray[1]} belongs to no setting; settings are given as --NAME VALUE, and --help lists them."
    mistyped = re.match(r'Parser key "([^"]+)"', message)
    value = re.search(r"(?:Got value|Given value): (.*)", message)
    if mistyped and value and mistyped[1] in types_of:
        return f"{mistyped[1]} is {value[1]}, but must be {in_words(types_of[mistyped[1]])}."
    return f"The settings cannot be read: {' '.join(message.split())}."


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The types that a setting may have; of `Literal["a"] | None` python makes another union than of `int | None`."""
    return get_args(kind) if get_origin(kind) in (types.UnionType, Union) else (kind,)


def in_words(kind: Any) -> str:
    """The type of a setting as people call it: `a whole number or null`."""
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"a list of {len(get_args(kind))} whole numbers"
    if get_origin(kind) is list:
        return "a list"
    parts = alternatives(kind)
    if len(parts) > 1:
        return " or ".join(map(in_words, parts))
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return words.get(kind, getattr(kind, "__name__", str(kind)))
