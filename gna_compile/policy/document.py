"""YAML text to plain values with the line of each, safely: no tags, no aliases, bounded depth."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gna_compile.policy.errors import PolicyError

MAX_BYTES = 256 * 1024  # of a policy file; no more of one is read
MAX_DEPTH = 16

KeyPath = tuple[str | int, ...]

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_PLAIN_TAGS = {
    f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map")
}

_TIMESTAMP = "tag:yaml.org,2002:timestamp"  # 2026-01-31, which is a name here
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass
class Document:
    """Plain values (dict, list, str, int, float, bool, None) and where they stand.

    Attributes:
        origin: the file, or "<dict>".
        tree: the values.
        lines: line (from 1) of each value by key path; empty for a dict.
    """

    origin: str
    tree: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def place(self, path: KeyPath) -> str:
        """`file:line` of a value, or of the nearest one around it that is written down."""
        for stop in range(len(path), -1, -1):
            if path[:stop] in self.lines:
                return f"{self.origin}:{self.lines[path[:stop]]}"
        return self.origin

    def problem(self, path: KeyPath, text: str) -> None:
        """Notes that the value at `path` is wrong."""
        spelled = spell(path)
        self.problems.append(f"{self.place(path)}: {spelled + ': ' if spelled else ''}{text}")

    def raise_problems(self) -> None:
        """Raises all noted problems together, in the order of the file; does nothing if none.

        Raises:
            PolicyError: see above.
        """
        if self.problems:
            raise PolicyError(sorted(self.problems, key=_line_of))


def spell(path: KeyPath) -> str:
    """A key path as people write it: `rules[2].window`."""
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else key
    return text


def read_yaml(text: str, origin: str) -> Document:
    """Parses one YAML document.

    Raises:
        PolicyError: for broken YAML, an empty file, nesting deeper than 16, aliases, tags,
            duplicate keys and numbers not in plain decimal.
    """
    import yaml

    document = Document(origin, lines={(): 1})
    try:
        _check_events(yaml.parse(text, Loader=yaml.SafeLoader), origin)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        what = " ".join(filter(None, (error.context, error.problem)))
        raise PolicyError([f"{origin}:{line}: is not valid YAML: {what}"]) from None
    except yaml.YAMLError as error:
        raise PolicyError(
            [f"{origin}:1: is not valid YAML: {' '.join(str(error).split())}"]
        ) from None
    if root is None:
        raise PolicyError([f"{origin}:1: is empty; start it with `version: 1` and `rules:`"])
    document.tree = _plain(root, (), document)
    document.raise_problems()
    return document


def read_mapping(source: Mapping[str, Any]) -> Document:
    """The same for values that are plain already: copied, tuples to lists, keys checked."""
    document = Document("<dict>")
    document.tree = _copy(source, (), document)
    document.raise_problems()
    return document


def _check_events(events: Any, origin: str) -> None:
    """Refuses what could make the composed tree larger or deeper than the text."""
    import yaml

    depth, documents = 0, 0
    for event in events:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise PolicyError(
                [f"{origin}:{line}: aliases (*{event.anchor}) are not allowed; write the value out"]
            )
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise PolicyError(
                    [f"{origin}:{line}: a second document starts here; a policy is one document"]
                )
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise PolicyError([f"{origin}:{line}: is nested deeper than {MAX_DEPTH} levels"])
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _plain(node: Any, path: KeyPath, document: Document) -> Any:
    import yaml

    document.lines.setdefault(path, node.start_mark.line + 1)
    if node.tag not in _PLAIN_TAGS and node.tag != _TIMESTAMP:
        document.problem(path, f"the tag {node.tag} is not allowed; write a plain value")
        return 0
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child, (*path, index), document) for index, child in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, child in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                document.problem(path, "a key is a list or a mapping; write a plain name")
                continue
            key, here = key_node.value, (*path, key_node.value)
            if key in values:
                line = document.lines[here]
                document.lines[here] = key_node.start_mark.line + 1
                document.problem(here, f"is given twice, first in line {line}; remove one")
                continue
            document.lines[here] = key_node.start_mark.line + 1
            values[key] = _plain(child, here, document)
        return values
    return _scalar(node, path, document)


def _scalar(node: Any, path: KeyPath, document: Document) -> Any:
    text, kind = node.value, node.tag.rpartition(":")[2]
    if kind == "null":
        return None
    if kind == "bool":
        if text.lower() in _BOOLEANS:
            return _BOOLEANS[text.lower()]
        document.problem(path, f"{text[:40]} is not true or false")
        return False
    if kind == "int":
        if _INTEGER.fullmatch(text):
            return int(text)
        document.problem(
            path, f"{text[:40]} is not a plain decimal number; write it with digits only"
        )
        return 0
    if kind == "float":
        try:
            return float(
                text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan")
            )
        except ValueError:
            document.problem(path, f"{text[:40]} is not a plain decimal number")
            return 0.0
    return text


def _copy(value: Any, path: KeyPath, document: Document) -> Any:
    if len(path) > MAX_DEPTH:
        raise PolicyError([f"{document.origin}: is nested deeper than {MAX_DEPTH} levels"])
    if isinstance(value, Mapping):
        values = {}
        for key, child in value.items():
            if isinstance(key, str):
                values[key] = _copy(child, (*path, key), document)
            else:
                document.problem(path, f"the key {key!r} is not a string")
        return values
    if isinstance(value, (list, tuple)):
        return [_copy(child, (*path, index), document) for index, child in enumerate(value)]
    return value


def _line_of(problem: str) -> int:
    found = re.match(r".*?:(\d+): ", problem)
    return int(found[1]) if found else 0
