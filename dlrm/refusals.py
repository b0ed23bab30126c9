"""What the user asked for cannot be done: said in one line, with what is allowed and the nearest valid spelling."""

import difflib
import inspect
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Union, get_args, get_origin

import yaml

CONF = Path(__file__).resolve().parent.parent / "conf"
NO_TEXT = re.compile(  # a word of an override, alone or in a list, that is null, a truth value or a number to hydra
    r"(?:^|[,[( ])(?:null|true|false|[+-]?(?:inf|nan|\d[\d._e+-]*))(?=[,\]) ]|$)", re.IGNORECASE
)
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}


class ConfigError(Exception):
    """What the user asked for cannot be done; the message names the key, the value and what is allowed."""


def check_choices(arguments: Iterable[str]) -> None:
    """Refuse null, and whatever else is no text, for one of a group's choices, and the removal of what every run needs:
    hydra, or we, would end in a traceback."""
    for argument in arguments:
        group, _, value = argument.lstrip("+").partition("=")
        folder = CONF / group.partition("@")[0]
        is_no_text = re.search(
            r"(?:^|[,[( ])(null|true|false|[+-]?(?:inf|nan|\d[\d._e+-]*))(?=[,\]) ]|$)", value, re.IGNORECASE
        )
        if is_no_text and folder != CONF and folder.is_dir():
            allowed = sorted(path.stem for path in folder.glob("*.yaml"))
            raise ConfigError(f"{argument}: must be one of {some(allowed)}, or left out")
        if is_no_text and re.fullmatch(r"hydra(/\w+)?", group):
            raise ConfigError(f"{argument}: must be the name of one of Hydra's choices, as in hydra/launcher=basic")
        if group.startswith("~") and is_needed(group[1:]):
            raise ConfigError(f"{argument}: every run needs {group[1:]}; it can be set, {group[1:]}=..., not removed")


def is_needed(path: str) -> bool:
    """Whether no run can do without a path of the config: a component, a key of the root, or one of the trainer's."""
    first, *below = re.split("[./]", path)
    if first in ("trainer", "checkpoint", "optimizer"):
        return not below or below[0] in (*keys_below(first), *groups(first)) and not below[1:]
    return not below and first in (*keys_below(""), *groups()) and first not in ("experiment", "protocol", "sweep")


def check_keys(key: str, target, node: dict) -> None:
    """Refuse a key of the node that the target's constructor does not take."""
    allowed = list(inspect.signature(target).parameters)
    for name in node:
        if name not in allowed and not name.startswith("_"):
            raise ConfigError(
                f"{key}.{name}: {target.__name__} has no such key; it has {some(allowed)}{near(name, allowed)}"
            )


def check_types(key: str, target, node: dict) -> None:
    """Refuse a value of the node that is not what the target's constructor says it takes."""
    for name, parameter in inspect.signature(target).parameters.items():
        if name in node and (allowed := _kinds(parameter.annotation)):
            if not any(_is(node[name], kind) for kind in allowed):
                words = " or ".join(dict.fromkeys(_word(kind) for kind in allowed))
                raise ConfigError(f"{key}.{name}={_spelt(node[name])}: must be {words}")


def _kinds(annotation) -> list:
    """The alternatives of an annotation that a config can hold and this can judge: scalars and lists of numbers."""
    alternatives = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else [annotation]
    known = [a for a in alternatives if a in WORDS or (_item(a) in (int, float))]
    return known if set(known) != {NoneType} else []


def _item(annotation) -> object:
    """What a list of this annotation has: int of Sequence[int] and of tuple[int, ...]; None if it is no list."""
    return get_args(annotation)[0] if get_origin(annotation) in (Sequence, tuple, list) else None


def _is(value: object, kind) -> bool:
    if kind not in WORDS:
        return isinstance(value, list) and all(_is(one, _item(kind)) for one in value)
    if kind is str:  # what null means is for the owner to say
        return isinstance(value, str | None)
    return isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))


def _spelt(value: object) -> str:
    """As a command line has it."""
    return json.dumps(value) if isinstance(value, bool | None) else str(value)


def _word(kind) -> str:
    return WORDS[kind] if kind in WORDS else f"a list of {WORDS[_item(kind)].removeprefix('a ')}s"


def check_number(key: str, value, low: float, high: float, *, whole: bool = False) -> None:
    """Refuse what is no number in [low, high]."""
    kind = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        span = f"{low} to {high}" if high < float("inf") else f"at least {low}"
        raise ConfigError(f"{key}={value}: must be a {'whole ' if whole else ''}number, {span}")


def explain(error: Exception) -> str:
    """Hydra's refusal in one line, with what is allowed and the nearest valid spelling."""
    text = str(error)
    if missing := re.search(r"Missing mandatory value.*full_key: (\S+)", text, re.DOTALL):
        return f"{missing[1]} is not set, and has no default: {missing[1]}=..."
    if absent := re.search(r"config group '([^']+)' does not exist", text):
        return f"{absent[1]} is no group; the groups are {some(groups())}" + near(absent[1], groups())
    if option := re.search(r"Could not find '(.+)/([^/']+)'", text):
        group, name = option.groups()
        allowed = sorted(getattr(error, "options", None) or ())
        plugins = "; `make launchers` installs more (docs/sweeps.md)" * (group in ("hydra/launcher", "hydra/sweeper"))
        return f"{group}={name}: must be one of {some(allowed)}" + near(name, allowed) + plugins
    if key := re.search(r"Could not override '([^']+)'", text):
        return _no_key(key[1].split("@")[0])
    return (text.splitlines()[0] if text else repr(error)) + _quoted(getattr(error, "override", None) or "")


def _quoted(override: str) -> str:
    """How to say an override that hydra's grammar does not take: text of other letters, or with = # and the like."""
    key, _, value = override.partition("=")
    is_plain = re.fullmatch(r"[\w\s.,:/+*@?|%-]*", value, re.ASCII)
    if is_plain or value[0] in "[{" or re.search(r"['\"]", value) or not re.fullmatch(r"[+~]*[\w/@.]*\w", key):
        return ""
    quoted = ",".join(f"'{word}'" for word in value.split(","))  # of a sweep each
    return f'; quote the value, for Hydra and for the shell: "{key}={quoted}"'


def _no_key(path: str) -> str:
    """Why a path of the config cannot be set, and what can be beside its first part that is no key."""
    first, *rest = parts = re.split("[./]", path)
    if first == "hydra":
        ours = [f"hydra.{part}.{key}" for part in keys_below("hydra") for key in keys_below(f"hydra.{part}")]
        return f"{path} is no key of Hydra's, which python train.py --cfg hydra shows" + near(path, ours)
    if first == "features" and rest[1:]:  # any backend's hyperparameters
        parts = ["embedding", *rest[1:]]
    for i, name in enumerate(parts):
        parent = ".".join(parts[:i])
        allowed = [*keys_below(parent), *groups(parent)]
        if name not in allowed and parent not in ("features", "expected"):  # which are empty in config.yaml
            return f"{path} is no key; {parent or 'the root'} has {some(allowed) or 'none'}" + near(name, allowed)
    return f"{path} is not in the config as composed: add it with a plus, +{path}=..."


def keys_below(parent: str) -> list[str]:
    """Keys that some choice of config puts under `parent`."""
    nodes = [_select(yaml.safe_load((CONF / "config.yaml").read_text()), parent)]
    group, *rest = parent.split(".")
    if group in groups():
        inner = CONF / group / (rest[0] if rest else "?")
        folders = (inner,) if inner.is_dir() else (CONF / group, CONF / group / "common")
        place = ".".join(rest[inner.is_dir() :])
        files = [file for folder in folders for file in folder.glob("*.yaml")]
        nodes += [_select(yaml.safe_load(file.read_text()), place) for file in files]
    keys = itertools.chain.from_iterable(node.keys() for node in nodes if isinstance(node, dict))
    return [key for key in dict.fromkeys(keys) if key not in ("defaults", "hydra") and not str(key).startswith("_")]


def _select(node, path: str):
    for key in path.split(".") if path else ():
        node = node.get(key) if isinstance(node, dict) else None
    return node


def groups(parent: str = "") -> list[str]:
    """Names of the groups of choices at a path of the config."""
    folder = CONF / parent.replace(".", "/")
    return sorted(one.name for one in folder.glob("*") if one.is_dir() and one.name != "common")


def near(name: object, allowed: Iterable) -> str:
    matches = difflib.get_close_matches(str(name), [str(a) for a in allowed], n=1)
    return f" - did you mean {matches[0]}?" if matches else ""


def some(names: Iterable) -> str:
    names = [str(name) for name in names]
    return ", ".join(names) if len(names) <= 40 else f"{', '.join(names[:40])}, ... ({len(names)} in all)"
