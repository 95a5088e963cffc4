"""The schema of a policy file: each key's type and values. Keys together: see `conflicts`."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from gna_compile.policy.rules import DEFAULT_PHASE, Window

MAX_SIZE = 10**9  # tokens along an axis, or of a site
MAX_AXES = 3

T = TypeVar("T")

_FRACTION = re.compile(r"([1-9][0-9]{0,8})/([1-9][0-9]{0,8})")
_RANGE = re.compile(r"(0|[1-9][0-9]{0,8})-(0|[1-9][0-9]{0,8})")


def _refuse(text: str) -> PydanticCustomError:
    return PydanticCustomError("policy", "{text}", {"text": text})


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _version(value: Any) -> Any:
    if not _is_int(value) or value != 1:
        raise _refuse(f"{value!r} is not a version of the format that this release reads; write 1")
    return value


def _size(value: Any) -> int:
    if not _is_int(value):
        raise _refuse(f"{value!r} must be a whole number")
    if not 1 <= value <= MAX_SIZE:
        raise _refuse(f"{value} must lie between 1 and {MAX_SIZE}")
    return int(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _refuse(f"{value!r} must be true or false")
    return value


def _window(value: Any) -> Window:
    if value == "full":
        return "full"
    if isinstance(value, str) and (found := _FRACTION.fullmatch(value)):
        share = Fraction(int(found[1]), int(found[2]))
        if share > 1:
            raise _refuse(f"{value} is more than the whole axis; write a share up to 1/1")
        return "full" if share == 1 else share
    if not _is_int(value):
        raise _refuse(
            f"{value!r} must be a number of tokens, `full`, or a share of the axis written as `1/2`"
        )
    return _size(value)


def _base_length(value: Any) -> int | Literal["full"]:
    return "full" if value == "full" else _size(value)


def _axes(value: Any, entry: Callable[[Any], T]) -> tuple[T, ...]:
    if not isinstance(value, list):
        raise _refuse(f"{value!r} must be a list with one entry per axis, like [16, 44, 80]")
    if not 1 <= len(value) <= MAX_AXES:
        raise _refuse(f"has {len(value)} entries; a token grid has 1 to {MAX_AXES} axes")
    entries = []
    for index, item in enumerate(value):
        try:
            entries.append(entry(item))
        except PydanticCustomError as error:
            raise _refuse(f"entry {index}: {error.message()}") from None
    return tuple(entries)


def _per_axis(entry: Callable[[Any], T]) -> PlainValidator:
    return PlainValidator(lambda v: _axes(v, entry) if isinstance(v, list) else entry(v))


def _names(value: Any) -> tuple[str, ...]:
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise _refuse(f"{value!r} must be a name or a list of names")
    return tuple(names)


def _ranges(what: str) -> Callable[[Any], tuple[tuple[int, int], ...]]:
    def parse(value: Any) -> tuple[tuple[int, int], ...]:
        ranges = []
        for item in value if isinstance(value, list) else [value]:
            found = _RANGE.fullmatch(item) if isinstance(item, str) else None
            if found:
                low, high = int(found[1]), int(found[2])
                if low > high:
                    raise _refuse(f"the range {item} runs backwards; write {high}-{low}")
                ranges.append((low, high))
            elif _is_int(item) and 0 <= item <= MAX_SIZE:
                ranges.append((item, item))
            else:
                raise _refuse(f"{item!r} must be a {what} number from 0 on, or a range like `3-9`")
        if not ranges:
            raise _refuse(f"is empty; name at least one {what} number")
        return tuple(ranges)

    return parse


def _which_grids(value: Any) -> str | int:
    if value in ("all", "first", "last", "largest") or (_is_int(value) and 0 <= value < 2**31):
        return value
    raise _refuse(f"{value!r} must be all, first, last, largest, or the number of a grid from 0 on")


def _phase_names(value: Any) -> Any:
    """A list of phase names is short for a mapping of them without steps."""
    if not isinstance(value, list):
        if isinstance(value, dict) and "" in value:
            raise _refuse("has a phase without a name; give it one or remove it")
        return value
    if not all(isinstance(name, str) and name for name in value):
        raise _refuse(f"{value!r} must be a list of phase names, or name: {{first: 9, of: 28}}")
    if len(set(value)) < len(value):
        raise _refuse("names a phase twice")
    return dict.fromkeys(value)


_SIZE_JSON = {"type": "integer", "minimum": 1, "maximum": MAX_SIZE}
_WINDOW_JSON = {
    "anyOf": [
        _SIZE_JSON,
        {"const": "full"},
        {"type": "string", "pattern": "^[1-9][0-9]{0,8}/[1-9][0-9]{0,8}$"},
    ]
}
_NAME_JSON = {"type": "string", "minLength": 1}
_INDEX_JSON = {
    "anyOf": [
        {"type": "integer", "minimum": 0, "maximum": MAX_SIZE},
        {"type": "string", "pattern": "^(0|[1-9][0-9]{0,8})-(0|[1-9][0-9]{0,8})$"},
    ]
}


def _list_json(entry: dict[str, Any], most: int | None = MAX_AXES) -> dict[str, Any]:
    bound = {} if most is None else {"maxItems": most}
    return {"type": "array", "items": entry, "minItems": 1, **bound}


def _either_json(entry: dict[str, Any], most: int | None = MAX_AXES) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [entry, _list_json(entry, most)]})


Size = Annotated[int, PlainValidator(_size), WithJsonSchema(_SIZE_JSON)]
Count = Annotated[int, Field(strict=True, ge=0, le=MAX_SIZE)]
Flag = Annotated[bool, Field(strict=True)]
Grid = Annotated[
    tuple[int, ...],
    PlainValidator(lambda v: _axes(v, _size)),
    WithJsonSchema(_list_json(_SIZE_JSON)),
]
BaseGrid = Annotated[
    tuple[Any, ...],
    PlainValidator(lambda v: _axes(v, _base_length)),
    WithJsonSchema(_list_json({"anyOf": [_SIZE_JSON, {"const": "full"}]})),
]
Windows = Annotated[Any, _per_axis(_window), _either_json(_WINDOW_JSON)]
Sizes = Annotated[Any, _per_axis(_size), _either_json(_SIZE_JSON)]
Flags = Annotated[Any, _per_axis(_flag), _either_json({"type": "boolean"})]
Names = Annotated[tuple[str, ...], PlainValidator(_names), _either_json(_NAME_JSON, None)]
Indices = Annotated[
    tuple[tuple[int, int], ...], PlainValidator(_ranges("layer")), _either_json(_INDEX_JSON, None)
]
Heads = Annotated[
    tuple[tuple[int, int], ...], PlainValidator(_ranges("head")), _either_json(_INDEX_JSON, None)
]
WhichGrids = Annotated[
    Any,
    PlainValidator(_which_grids),
    WithJsonSchema(
        {
            "anyOf": [
                {"enum": ["all", "first", "last", "largest"]},
                {"type": "integer", "minimum": 0, "maximum": 2**31 - 1},
            ]
        }
    ),
]
BetweenGrids = Literal["full", "none", "aligned"]
GlobalTokens = Literal["prefix", "suffix", "none"]
KeyMask = Literal["global_tokens", "none"]


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Steps(Closed):
    """The first `first` of every `of` steps."""

    first: Size
    of: Size


_STEPS_JSON = {
    "type": "object",
    "properties": {"first": _SIZE_JSON, "of": _SIZE_JSON},
    "required": ["first", "of"],
    "additionalProperties": False,
}
_PHASES_JSON = {
    "anyOf": [
        {"type": "array", "items": _NAME_JSON, "uniqueItems": True},
        {
            "type": "object",
            "propertyNames": {"minLength": 1, "not": {"const": DEFAULT_PHASE}},
            "additionalProperties": {"anyOf": [{"type": "null"}, _STEPS_JSON]},
        },
    ]
}
Phases = Annotated[
    dict[str, Steps | None], BeforeValidator(_phase_names), WithJsonSchema(_PHASES_JSON)
]


class TokenRange(Closed):
    """Number of tokens of the site, global tokens included; both ends belong to the range."""

    min: Count | None = None
    max: Count | None = None


class SegmentEntry(Closed):
    """A part of a sequence: `text: 512` (tokens off any grid), or `grid: [64, 64]`."""

    text: Size | None = None
    grid: Grid | None = None

    @model_validator(mode="after")
    def _is_one(self) -> SegmentEntry:
        if (self.text is None) == (self.grid is None):
            raise _refuse("must be one of `text: 512` and `grid: [64, 64]`")
        return self


class LayoutEntry(Closed):
    """How tokens lie: `prefix` global tokens, the grid in raster order, `suffix` global tokens."""

    grid: Grid
    prefix: Count | None = None
    suffix: Count | None = None


ONE_GRID, SEGMENTS = "<one grid>", "<segments>"
"""The two forms of a layout, as they stand in the location of an error."""


def _form(value: Any) -> str:
    return SEGMENTS if isinstance(value, list) else ONE_GRID


def _with_a_grid(segments: list[SegmentEntry]) -> list[SegmentEntry]:
    if all(segment.grid is None for segment in segments):
        raise _refuse("has no grid; write it as `[text: 512, grid: [64, 64]]`")
    return segments


Layout = Annotated[
    Annotated[LayoutEntry, Tag(ONE_GRID)]
    | Annotated[list[SegmentEntry], AfterValidator(_with_a_grid), Tag(SEGMENTS)],
    Discriminator(_form),
]


class RuleEntry(Closed):
    """A rule: which layers, and what becomes of them."""

    layers: Names | None = Field(
        None,
        description="Glob(s) on the layer's fully qualified name; a glob may start and end at any dot.",
    )
    index: Indices | None = Field(
        None, description="Layer numbers (the first number in the name): 3, `3-9`, or a list."
    )
    module: Names | None = Field(
        None, description="Glob(s) on the class name of any module around the attention."
    )
    tokens: TokenRange | None = Field(None, description="Only sites with this many tokens.")
    grid_rank: Annotated[int, Field(strict=True, ge=1, le=MAX_AXES)] | None = Field(
        None, description="Only token grids with this many axes."
    )
    phases: Names | None = Field(None, description="Only in these phases.")
    heads: Heads | None = Field(
        None, description="Only for these query heads, from 0 on: 3, `0-7`, or a list."
    )
    dense: Flag | None = Field(None, description="true: leave dense.")
    window: Windows | None = Field(
        None, description="Keys a query sees per axis: tokens, `full`, or a share such as 1/2."
    )
    stride: Sizes | None = Field(
        None, description="Queries per axis that share one window; at most the window."
    )
    dilation: Sizes | None = Field(None, description="Step between the keys of a window, per axis.")
    causal: Flags | None = Field(None, description="No key after the query, per axis.")
    base_grid: BaseGrid | None = Field(
        None,
        description="Grid that window and stride are given for, to be scaled; `full`: do not.",
    )
    grids: WhichGrids | None = Field(
        None, description="Which grids of a sequence get the window; the others stay full."
    )
    between_grids: BetweenGrids | None = Field(
        None,
        description="What grids see of each other: all, nothing, or their windows where they align.",
    )
    layout: Layout | None = Field(None, description="Overrides the policy's layout.")
    global_tokens: GlobalTokens | None = Field(
        None, description="Overrides the policy's global_tokens."
    )
    key_mask: KeyMask | None = Field(None, description="Overrides the policy's key_mask.")


CONDITIONS = frozenset({"layers", "index", "module", "tokens", "grid_rank", "phases", "heads"})
"""The keys of a rule that say where it applies; any other says what it does there."""


class PolicyFile(Closed):
    """A gna-compile policy: which attention layers become neighborhood attention."""

    version: Annotated[
        Literal[1], BeforeValidator(_version), Field(description="Version of this format.")
    ]
    name: Annotated[str, Field(strict=True, min_length=1)] | None = Field(
        None, description="For people; by default the file's name."
    )
    min_tokens: Count = Field(1024, description="Sites with fewer tokens stay dense.")
    min_speedup: Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)] = Field(
        1.0, description="Sites with a smaller predicted speedup over dense attention stay dense."
    )
    allow_slow_providers: Flag = Field(
        False, description="Rewrite on a device even where no fast provider takes the problem."
    )
    layout: Layout | None = Field(
        None, description="How the tokens lie, for all rules; without it, it is read off the graph."
    )
    global_tokens: GlobalTokens | None = Field(
        None, description="Where tokens that are not on the declared grid lie."
    )
    key_mask: KeyMask | None = Field(
        None,
        description="global_tokens: the boolean mask of these layers hides global tokens only.",
    )
    phases: Phases = Field(
        {},
        description="Phases besides `default`: names, or name: {first: 9, of: 28}.",
    )
    rules: Annotated[
        list[RuleEntry],
        Field(min_length=1, description="The first rule that matches a layer decides."),
    ]


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a policy file, for editors.

    Absent is the only way to leave a key out, so the `null`s that pydantic adds are removed.
    """
    schema = _without_null(PolicyFile.model_json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _without_null(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_null(item) for item in value]
    if not isinstance(value, dict):
        return value
    result = {key: _without_null(item) for key, item in value.items()}
    if "default" in result and result["default"] is None:
        del result["default"]
        options = [item for item in result.get("anyOf", []) if item != {"type": "null"}]
        if len(options) == 1:
            del result["anyOf"]
            result = {**options[0], **result}
        elif options:
            result["anyOf"] = options
    return result
