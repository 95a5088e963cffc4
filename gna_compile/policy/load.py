"""Loading a policy: by shipped name, by path or from a dict, once per process and file."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import stat
import threading
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gna_compile.policy.conflicts import conflicts
from gna_compile.policy.document import MAX_BYTES, Document, KeyPath, read_mapping, read_yaml
from gna_compile.policy.errors import PolicyError
from gna_compile.policy.rules import DeclaredLayout, Phase, Policy, Rule

if TYPE_CHECKING:  # pydantic takes a tenth of a second to import: only when a policy is loaded
    from pydantic import BaseModel, ValidationError

    from gna_compile.policy.schema import LayoutEntry, PolicyFile, SegmentEntry

_SUFFIXES = (".yaml", ".yml")
_loaded: dict[str, Policy] = {}
_lock = threading.Lock()


def load_policy(source: str | os.PathLike[str] | Mapping[str, Any] | Policy) -> Policy:
    """The policy that `source` names.

    Args:
        source: name of a shipped policy (`hunyuan-video-720p`), path of a `.yaml` or `.yml` file,
            the same content as a dict, or a policy that is loaded already.

    A file is read once per process: later calls return the same object, whatever became of the
    file, until `clear_cache()`.

    Raises:
        PolicyError: if there is no such policy, or it is not valid; lists all problems found.
    """
    if isinstance(source, Policy):
        return source
    if isinstance(source, Mapping):
        return _build(read_mapping(source), name="inline", source=None)
    if not isinstance(source, (str, os.PathLike)):
        raise PolicyError([f"a policy is a name, a path or a dict, not {type(source).__name__}"])
    path = _locate(source)
    with _lock:
        key = str(path)
        if key not in _loaded:
            _loaded[key] = _build(read_yaml(_read(path), key), name=path.stem, source=key)
        return _loaded[key]


def clear_cache() -> None:
    """Forgets the files read so far, so that changed ones are read again."""
    with _lock:
        _loaded.clear()


def shipped_policies() -> tuple[str, ...]:
    """Names of the policies that come with the package, sorted."""
    return tuple(sorted(_shipped()))


def policy_text(source: str | os.PathLike[str]) -> str:
    """The text of a policy file, comments included, by shipped name or by path.

    Raises:
        PolicyError: if there is no such policy, or it is not UTF-8 text.
    """
    return _read(_locate(source))


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a policy file, for editors."""
    from gna_compile.policy.schema import json_schema as generate

    return generate()


@lru_cache(maxsize=1)
def _shipped() -> dict[str, Path]:
    package = Path(__file__).resolve().parent.parent
    # A wheel holds them in the package, a checkout beside it; in site-packages the first exists.
    places = (package / "policies", package.parent / "policies")
    folder = next(place for place in places if place.is_dir())
    return {path.stem: path for path in folder.iterdir() if path.suffix in _SUFFIXES}


def _locate(source: str | os.PathLike[str]) -> Path:
    text = os.fsdecode(source)
    if not isinstance(source, str) or text.endswith(_SUFFIXES) or os.path.basename(text) != text:
        return _absolute(text)
    if text in _shipped():
        return _shipped()[text]
    names = ", ".join(shipped_policies())
    near = difflib.get_close_matches(text, _shipped(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; there are: {names}."
    raise PolicyError(
        [f"no policy named {text!r} is shipped{hint} A path must end in .yaml or .yml"]
    )


def _absolute(text: str) -> Path:
    try:
        if b"\0" in os.fsencode(text):
            raise PolicyError([f"{text!r} contains a NUL character; no file has such a path"])
        return Path(text).expanduser().absolute()
    except UnicodeEncodeError:
        raise PolicyError([f"{text!r} is not text; no file has such a path"]) from None
    except (OSError, RuntimeError) as error:  # no home directory, no working directory
        raise PolicyError([f"{text!r} cannot be made absolute: {error}"]) from None


def _read(path: Path) -> str:
    """The text of a file, of which no more is read than a policy may have.

    Raises:
        PolicyError: if it is no regular file (a FIFO would block), cannot be read, is larger than
            256 KiB or is not UTF-8.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise PolicyError([f"{path}: cannot be read: is not a regular file"])
        with open(path, "rb", opener=_open_without_waiting) as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise PolicyError([f"{path}: cannot be read: {error.strerror or error}"]) from None
    if len(content) > MAX_BYTES:
        raise PolicyError([f"{path}:1: is larger than {MAX_BYTES} bytes; a policy is a short file"])
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PolicyError(
            [f"{path}: is not UTF-8 text: {error.reason} at byte {error.start}"]
        ) from None


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _build(document: Document, name: str, source: str | None) -> Policy:
    file = _validate(document)
    rules = tuple(_rule(file, index, document) for index in range(len(file.rules)))
    for path, text in conflicts(file, rules):
        document.problem(path, text)
    document.raise_problems()
    return Policy(
        name=file.name or name,
        fingerprint=_fingerprint(file),
        rules=rules,
        phase_steps=tuple(
            Phase(phase, steps.first, steps.of) if steps else Phase(phase)
            for phase, steps in file.phases.items()
        ),
        source=source,
        min_tokens=file.min_tokens,
        min_speedup=file.min_speedup,
        allow_slow_providers=file.allow_slow_providers,
        layout=_layout(file.layout),
        global_tokens=file.global_tokens,
        key_mask=file.key_mask,
    )


def _fingerprint(file: PolicyFile) -> str:
    content = file.model_dump(exclude={"name"})
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _layout(entry: LayoutEntry | list[SegmentEntry] | None) -> DeclaredLayout | None:
    if entry is None:
        return None
    if not isinstance(entry, list):
        return DeclaredLayout.of_grid(entry.grid, entry.prefix, entry.suffix)
    parts = [part.text if part.grid is None else part.grid for part in entry]
    segments: list[Any] = []
    for part in parts:  # neighboring global tokens are one segment
        if segments and not (isinstance(part, tuple) or isinstance(segments[-1], tuple)):
            segments[-1] += part
        else:
            segments.append(part)
    if isinstance(segments[0], tuple) and isinstance(segments[-1], tuple):
        return DeclaredLayout(tuple(segments))
    prefix = 0 if isinstance(segments[0], tuple) else segments.pop(0)
    suffix = 0 if isinstance(segments[-1], tuple) else segments.pop()
    return DeclaredLayout(tuple(segments), prefix, suffix)


def _rule(file: PolicyFile, index: int, document: Document) -> Rule:
    entry = file.rules[index]
    key_mask = entry.key_mask or file.key_mask
    # A key that means the same in the file and in the rule needs no line of its own.
    translated = {"index", "tokens", "dense", "layout", "global_tokens", "key_mask"}
    names = {field.name for field in fields(Rule)} & type(entry).model_fields.keys() - translated
    given = {name: value for name in names if (value := getattr(entry, name)) is not None}
    return Rule(
        **given,
        index=index,
        where=document.place(("rules", index)),
        indices=entry.index or (),
        modules=entry.module or (),
        min_tokens=entry.tokens.min if entry.tokens else None,
        max_tokens=entry.tokens.max if entry.tokens else None,
        dense=entry.dense is not None,
        layout=_layout(entry.layout or file.layout),
        global_tokens=entry.global_tokens or file.global_tokens,
        key_mask=None if key_mask == "none" else key_mask,
    )


def _validate(document: Document) -> PolicyFile:
    """Types and values, key by key."""
    from pydantic import ValidationError

    from gna_compile.policy.schema import PolicyFile

    if not isinstance(document.tree, dict):
        document.problem((), "must be keys and values; start it with `version: 1` and `rules:`")
        document.raise_problems()
    for path in _empty(document.tree):
        document.problem(path, "has no value; give one or remove the key")
    document.raise_problems()
    try:
        return PolicyFile.model_validate(document.tree)
    except ValidationError as error:
        _report(error, document)
    document.raise_problems()
    raise AssertionError("a validation error has at least one line")


def _empty(value: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    """Key paths of nulls; only a phase may have none."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, child in items:
        if child is None and path != ("phases",):
            yield (*path, key)
        else:
            yield from _empty(child, (*path, key))


_FORMS = ("<one grid>", "<segments>")  # of a layout: `schema.ONE_GRID` and `schema.SEGMENTS`


def _report(error: ValidationError, document: Document) -> None:
    for line in error.errors(include_url=False):
        path = tuple(part for part in line["loc"] if part not in _FORMS)
        kind = line["type"]
        value = repr(line["input"])
        value = value if len(value) <= 60 else value[:57] + "..."
        if kind == "extra_forbidden":
            known = _known_keys(path)
            near = difflib.get_close_matches(str(path[-1]), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "known keys: " + ", ".join(known)
            document.problem(path, f"is not a key of a policy; {hint}")
        elif kind == "missing":
            document.problem(
                path, "is missing" + ("; write `version: 1`" if path == ("version",) else "")
            )
        elif kind == "too_short":
            document.problem(path, "is empty; add at least one")
        elif kind == "policy":
            document.problem(path, line["msg"])
        elif kind in ("model_type", "model_attributes_type", "dict_type"):
            document.problem(path, f"{value} must be keys and values")
        else:
            text = line["msg"].removeprefix("Input ").removeprefix("should be ")
            document.problem(
                path, f"{value} should be {text}" if text != line["msg"] else f"{value}: {text}"
            )


def _known_keys(path: KeyPath) -> list[str]:
    from gna_compile.policy import schema

    model: type[BaseModel] = schema.PolicyFile
    if path[0] == "phases":
        model = schema.Steps
    elif path[-3:-2] == ("layout",):
        model = schema.SegmentEntry
    elif path[-2:-1] == ("layout",):
        model = schema.LayoutEntry
    elif path[-2:-1] == ("tokens",):
        model = schema.TokenRange
    elif len(path) > 1:
        model = schema.RuleEntry
    return list(model.model_fields)
