"""From the wishes of a user to one resolved config: a named or given file, and ``--set`` on top.

A config is a plain Python file of sections, read once by mmengine's ``Config`` (so ``_base_``
works), and a nested dict of plain values from then on. What it leaves out gets the task's default.
Known is what a packaged config or a default names; any other key is refused with the nearest.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parent / "configs"


class UserError(ValueError):
    """What the user asked for cannot be done; the text says what, where, and what to do."""


def add_arguments(
    parser: argparse.ArgumentParser, work_dir: str, example: str, config: str = "miniworld"
) -> None:
    """Options of every verb that runs by a config; ``example`` is a change of it."""
    add = parser.add_argument
    add("--config", default=config, metavar="NAME|PATH", help=f"default: {config}")
    add(
        "--work-dir",
        type=Path,
        default=Path(work_dir),
        metavar="DIR",
        help=f"default: {work_dir}; everything is cached and reported here",
    )
    add("--device", default="auto", help="auto (the default), cpu, cuda, …")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"change the config, such as {example}; values are Python literals",
    )


def load_config(
    task: str,
    name_or_path: str = "miniworld",
    overrides: Iterable[str] = (),
    defaults: Mapping[str, Mapping[str, Any]] | None = None,
    free: Collection[str] = (),
) -> dict[str, Any]:
    """Resolve a config of ``task`` to a nested dict of JSON values.

    Args:
        task: folder of ``experiments/configs``, such as ``"oad"``.
        name_or_path: a packaged name (``"thumos14"``) or the path of a ``.py`` file.
        overrides: ``"a.b=value"`` each; the value is a Python literal, or else text.
        defaults: section -> key -> value, for the sections that the config has.
        free: sections whose keys a config names itself, such as the tasks of a mix; whoever reads
            them checks them.

    Raises:
        UserError: no such config, a key that is not known, a value of another type, a key without
            value.
    """
    path = find_config(task, name_or_path)
    defaults = _plain(defaults or {}, "defaults")
    packaged = [
        {section: {} if section in free else values for section, values in _read(file).items()}
        for file in packaged_configs(task).values()
    ]
    schema = _schema([flatten(defaults), *map(flatten, packaged)])
    config = _read(path)
    _refuse_unknown(flatten(config), schema, where=str(path))
    for section in defaults.keys() & config.keys():
        config[section] = {**defaults[section], **config[section]}
    for override in overrides:
        _apply(config, override, schema)
    _refuse_missing(config, packaged, where=str(path))
    return config


def field_defaults(record: type, leave_out: Iterable[str] = ()) -> dict[str, Any]:
    """Defaults of a dataclass, as a section for ``load_config``."""
    values = {}
    for field in dataclasses.fields(record):
        if field.name in leave_out:
            continue
        if field.default is not dataclasses.MISSING:
            values[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = field.default_factory()
    return values


def find_config(task: str, name_or_path: str) -> Path:
    """The file that a name or a path means."""
    known = packaged_configs(task)
    if name_or_path in known:
        return known[name_or_path]
    path = Path(name_or_path)
    if path.suffix == ".py" and path.is_file():
        return path
    raise UserError(
        f"no config {name_or_path!r} for {task}{_nearest(name_or_path, known)}: known names are "
        f"{', '.join(sorted(known))}; anything else must be the path of an existing .py file"
    )


def packaged_configs(task: str) -> dict[str, Path]:
    """Name -> file of the configs that come with the suite; names with an underscore are bases."""
    files = (CONFIGS / task).glob("*.py")
    return {file.stem: file for file in sorted(files) if not file.stem.startswith("_")}


def sections(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Those sections of a config, as far as it has them."""
    return {name: config[name] for name in names if name in config}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``; an empty dict stays as a leaf."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def digest(config: Mapping[str, Any]) -> str:
    """Sixteen hex digits that two configs share exactly when they are equal as JSON."""
    text = json.dumps(config, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read(path: Path) -> dict[str, Any]:
    from mmengine.config import Config

    values = Config.fromfile(str(path)).to_dict()
    asked = {key: value for key, value in values.items() if not key.startswith("_")}
    return _plain(asked, str(path))  # without names that the file uses for itself


def _plain(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(values, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{where}: {error}; a config holds numbers, texts, lists, dicts, True, False and None"
        ) from error


def _schema(flats: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Every known key, flat, with an example value (None only where all are None)."""
    schema: dict[str, Any] = {}
    for flat in flats:
        schema.update({key: value for key, value in flat.items() if schema.get(key) is None})
    return schema


def _refuse_unknown(keys: Iterable[str], schema: Mapping[str, Any], where: str) -> None:
    unknown = [key for key in keys if not _is_known(key, schema)]
    if unknown:
        lines = [f"unknown key {key!r}{_nearest(key, schema)}" for key in unknown]
        raise UserError(f"{where}: " + "; ".join(lines))


def _refuse_missing(
    config: Mapping[str, Any], packaged: Iterable[Mapping[str, Any]], where: str
) -> None:
    """Refuse a config without a key that every packaged config of the task has."""
    common = set.intersection(*(set(flatten(other)) for other in packaged))
    present = tuple(f"{key}." for key in flatten(config))  # an open dict may have been filled
    missing = [
        key for key in sorted(common) if not any(found.startswith(f"{key}.") for found in present)
    ]
    if missing:
        raise UserError(
            f"{where}: no value for {', '.join(missing)}; start the file with "
            "_base_ = [...] naming a packaged config, and state only what differs"
        )


def _is_known(key: str, schema: Mapping[str, Any]) -> bool:
    """Known itself, or lying below a dict that is open: empty, with no known key inside."""
    parents = [key[:end] for end, letter in enumerate(key) if letter == "."]
    return key in schema or any(
        schema.get(parent) == {} and not any(known.startswith(f"{parent}.") for known in schema)
        for parent in parents
    )


def _apply(config: dict[str, Any], override: str, schema: Mapping[str, Any]) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"--set {override}: expected key=value, such as --set train.epochs=3")
    value = _literal(text)
    _refuse_unknown(flatten({key: value}), schema, where=f"--set {override}")
    *parents, leaf = key.split(".")
    if parents and parents[0] not in config:
        raise UserError(
            f"--set {override}: this config has no section {parents[0]!r}; it has "
            + ", ".join(repr(section) for section in config)
        )
    inner = config
    for parent in parents:
        inner = inner.setdefault(parent, {})
    _check_type(override, inner.get(leaf), schema.get(key), value)
    inner[leaf] = value


def _literal(text: str) -> Any:
    try:
        return json.loads(json.dumps(ast.literal_eval(text.strip()), allow_nan=False))
    except (ValueError, SyntaxError, TypeError):
        return text


def _check_type(override: str, old: Any, example: Any, new: Any) -> None:
    """Refuse ``flag=true`` (a text) where a bool stands; None fits everywhere, int fits float."""
    model = example if old is None else old
    if model is None or new is None or type(new) is type(model):
        return
    if isinstance(model, float) and type(new) is int:
        return
    raise UserError(
        f"--set {override}: {new!r} is of type {type(new).__name__}, but this key holds "
        f"{type(model).__name__} values such as {model!r} (values are Python literals)"
    )


def _nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)``, by the whole dotted name or by its last part, or nothing."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:
        leaf = name.rpartition(".")[2]
        leaves = {key.rpartition(".")[2]: key for key in known}
        close = [leaves[match] for match in difflib.get_close_matches(leaf, leaves, n=1)]
    return f" (did you mean {close[0]!r}?)" if close else ""
