"""The steps of random models: stems, forms, special tokens, convolutions, attention, reorderings.

Each function draws one step from the maker's random numbers, registers what it needs there and
returns the step. Its decorator says how often it is drawn for tame programs, which do what real
models do, and for wild ones, which do anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from token_identities import (
    CONTEXT,
    HEADS,
    NEUTRAL,
    SPECIAL,
    C,
    Identities,
    InputSpec,
    Maker,
    Ops,
    Sizes,
    State,
    Step,
    Values,
)
from torch import Tensor


@dataclass(frozen=True)
class Kind:
    make: Callable[[Maker], Step]
    tame: float
    wild: float


STEMS: dict[str, Kind] = {}
STEPS: dict[str, Kind] = {}


def stem(tame: float = 1, wild: float = 1) -> Callable[[Callable[[Maker], Step]], Any]:
    return lambda make: STEMS.setdefault(make.__name__, Kind(make, tame, wild)).make


def step(tame: float = 1, wild: float = 1) -> Callable[[Callable[[Maker], Step]], Any]:
    return lambda make: STEPS.setdefault(make.__name__, Kind(make, tame, wild)).make


def start(m: Maker, form: str, *, t: int, is_open: bool = False) -> None:
    m.form, m.t, m.h, m.w = form, t, m.sizes.h, m.sizes.w
    m.is_open |= is_open


@stem(3, 3)
def image_conv(m: Maker) -> Step:
    p = m.rng.choice([1, 2, 2, 3])
    i = m.input(InputSpec("image", "bchw", lambda s: (s.b, 3, s.h * p, s.w * p)))
    weight = m.weight(C, 3, p, p)
    start(m, "bchw", t=1)

    def run(o: Ops, s: State) -> State:
        x = o.conv(s.inputs[i], weight, (p, p), (0, 0))
        return State(x, x.shape[0], 1, x.shape[2], x.shape[3], s.inputs)

    return run


@stem()
def image_linear(m: Maker) -> Step:
    p = m.rng.choice([1, 2])
    i = m.input(InputSpec("image", "bchw", lambda s: (s.b, 3, s.h * p, s.w * p)))
    weight = m.weight(C, 3 * p * p)
    flat = m.rng.random() < 0.6
    start(m, "bnc" if flat else "bhwc", t=1)

    def run(o: Ops, s: State) -> State:
        b, _, height, width = s.inputs[i].shape
        h, w = height // p, width // p
        x = s.inputs[i].reshape(b, 3, h, p, w, p).permute(0, 2, 4, 3, 5, 1)
        x = x.reshape(b, h * w, 3 * p * p) if flat else x.reshape(b, h, w, 3 * p * p)
        return State(o.linear(x, weight), b, 1, h, w, s.inputs)

    return run


@stem(2, 2)
def video_conv3d(m: Maker) -> Step:
    p, pt = m.rng.choice([1, 2]), m.rng.choice([1, 1, 2])
    i = m.input(InputSpec("video", "bcthw", lambda s: (s.b, 3, s.t * pt, s.h * p, s.w * p)))
    weight = m.weight(C, 3, pt, p, p)
    start(m, "bcthw", t=m.sizes.t)

    def run(o: Ops, s: State) -> State:
        x = o.conv(s.inputs[i], weight, (pt, p, p), (0, 0, 0))
        return State(x, x.shape[0], x.shape[2], x.shape[3], x.shape[4], s.inputs)

    return run


@stem(2, 2)
def video_frames(m: Maker) -> Step:
    p = m.rng.choice([1, 2])
    i = m.input(InputSpec("video", "btchw", lambda s: (s.b, s.t, 3, s.h * p, s.w * p)))
    weight = m.weight(C, 3, p, p)
    start(m, "fchw", t=m.sizes.t)

    def run(o: Ops, s: State) -> State:
        b, t = s.inputs[i].shape[:2]
        x = o.conv(s.inputs[i].flatten(0, 1), weight, (p, p), (0, 0))
        return State(x, b, t, x.shape[2], x.shape[3], s.inputs)

    return run


@stem(0.5, 1)
def channels_last(m: Maker) -> Step:
    i = m.input(InputSpec("image", "bhwc", lambda s: (s.b, s.h, s.w, C), is_vague=True))
    weight = m.weight(C, C)
    start(m, "bhwc", t=1, is_open=True)

    def run(o: Ops, s: State) -> State:
        x = o.linear(s.inputs[i], weight)
        return State(x, x.shape[0], 1, x.shape[1], x.shape[2], s.inputs)

    return run


def ids_of(sizes: Sizes) -> Tensor:
    rows, columns = torch.arange(float(sizes.h)), torch.arange(float(sizes.w))
    grid = torch.meshgrid(torch.zeros(1), rows, columns, indexing="ij")
    return torch.stack(grid, -1).reshape(-1, 3)


@stem(1, 1)
def packed_with_ids(m: Maker) -> Step:
    """FLUX: tokens [B, N, C], and ids that say where they lie; wild: or lie in another order."""
    m.need(not m.dynamic)
    order = None
    if m.wild and m.rng.random() < 0.5:
        order, kind = permutation(m, m.sizes.h * m.sizes.w)
        m.say(kind)

    def ids(s: Sizes) -> Tensor:
        return ids_of(s) if order is None else ids_of(s)[order]

    i = m.input(InputSpec("latent", "bnc", lambda s: (s.b, s.h * s.w, C), order=order))
    j = m.input(InputSpec("ids", "", lambda s: (s.h * s.w, 3), make=ids, code=NEUTRAL))
    weight, wave = m.weight(C, C), by_ids(m)
    start(m, "bnc", t=1)
    sizes = m.sizes

    def run(o: Ops, s: State) -> State:
        x = o.linear(s.inputs[i], weight)
        return State(wave(o, x, s.inputs[j]), x.shape[0], 1, sizes.h, sizes.w, s.inputs)

    return run


def by_ids(m: Maker) -> Callable[[Ops, Tensor, Tensor], Tensor]:
    """Multiplies tokens by waves of their ids: axis by axis as FLUX does, of their sum, or others."""
    how = m.rng.choice(["axes", "axes", "axes", "sum", "sum", "linear"])
    m.say(how)
    m.is_open |= how == "linear"
    weight, frequencies = m.weight(C, 3), m.weight(C)

    def run(o: Ops, x: Tensor, ids: Tensor) -> Tensor:
        if how == "linear":
            angles = o.linear(ids, weight)
        elif how == "sum":
            angles = o.each(lambda ids: ids.sum(-1, keepdim=True), ids)[..., :1]
        else:
            bands = o.weight(frequencies).split([4, 6, 6])
            columns = [ids[:, axis : axis + 1] for axis in range(3)]
            pairs = zip(columns, bands, strict=True)
            angles = torch.cat([o.each(torch.mul, column, band) for column, band in pairs], -1)
        return o.each(lambda x, angles: x * angles.cos(), x, angles)

    return run


@stem(0.4, 1)
def packed_two_images(m: Maker) -> Step:
    """FLUX Kontext: ids (0, h, w) and (1, h, w) are two images."""
    m.need(not m.dynamic and m.sizes.h * m.sizes.w <= 48)
    one = m.input(InputSpec("latent", "bnc", lambda s: (s.b, s.h * s.w, C)))
    two = m.input(InputSpec("latent", "bnc", lambda s: (s.b, s.h * s.w, C)))

    def both(s: Sizes) -> Tensor:
        ids = ids_of(s)
        return torch.cat([ids, ids + torch.tensor([1.0, 0.0, 0.0])])

    j = m.input(InputSpec("ids", "", lambda s: (2 * s.h * s.w, 3), make=both, code=NEUTRAL))
    weight, wave = m.weight(C, C), by_ids(m)
    start(m, "bnc", t=2)
    sizes = m.sizes

    def run(o: Ops, s: State) -> State:
        x = o.linear(torch.cat([s.inputs[one], s.inputs[two]], 1), weight)
        return State(wave(o, x, s.inputs[j]), x.shape[0], 2, sizes.h, sizes.w, s.inputs)

    return run


def _flat(name: str, form: str, tokens: int, **rest: Any) -> InputSpec:
    return InputSpec(name, form, lambda s: (s.b, tokens, C), **rest)


def _table(ids: Tensor) -> InputSpec:
    return InputSpec("ids", "", lambda s: tuple(ids.shape), make=lambda s: ids, code=NEUTRAL)


@stem(0.6, 1.5)
def packed_pieces(m: Maker) -> Step:
    """Text and images in any order, of any sizes, with ids in one table or several."""
    m.need(not m.dynamic)
    rng, sizes = m.rng, m.sizes
    parts: list[int] = []
    ids: list[Tensor] = []
    for number in range(rng.randint(2, 4)):
        first = float(number) if rng.random() < 0.8 else 0.0
        if rng.random() < 0.35:
            count = rng.choice([1, 3, 4])
            parts.append(m.input(_flat("text", "blc", count)))
            steps = torch.arange(float(count))[:, None]
            ids.append(first + steps * torch.tensor(rng.choice([[0, 0, 0], [0, 0, 1], [1, 1, 1]])))
            continue
        h, w = rng.randint(2, sizes.h), rng.randint(2, sizes.w)
        cells = torch.arange(sizes.h * sizes.w).view(sizes.h, sizes.w)[:h, :w].flatten()
        own = ids_of(replace(sizes, h=h, w=w)) + torch.tensor([first, rng.choice([0.0, 3.0]), 0.0])
        cut = w * rng.randint(1, h - 1) if rng.random() < 0.2 else 0
        for rows in [slice(0, cut), slice(cut, h * w)] if cut else [slice(0, h * w)]:
            n = len(cells[rows])
            # One row by itself is a mere enumeration, as text has it.
            is_vague, order = n == w, cells[rows]
            parts.append(m.input(_flat("latent", "bnc", n, order=order, is_vague=is_vague)))
            ids.append(own[rows])
    if rng.random() < 0.6:
        ids = [torch.cat(ids)]
    tables = [m.input(_table(table)) for table in ids]
    weight, wave = m.weight(C, C), by_ids(m)
    tokens = sum(map(len, ids))
    start(m, "bnc", t=1, is_open=True)
    m.h, m.w = 1, tokens

    def run(o: Ops, s: State) -> State:
        x = o.linear(torch.cat([s.inputs[part] for part in parts], 1), weight)
        x = wave(o, x, torch.cat([s.inputs[table] for table in tables]))
        return State(x, x.shape[0], 1, 1, tokens, s.inputs)

    return run


@stem(0.5, 0.5)
def packed_view(m: Maker) -> Step:
    """Tokens [B, H·W, C] that the model itself views as an image."""
    m.need(not m.dynamic)
    i = m.input(InputSpec("latent", "bnc", lambda s: (s.b, s.h * s.w, C), is_vague=True))
    weight = m.weight(C, C)
    start(m, "bhwc", t=1, is_open=True)
    sizes = m.sizes

    def run(o: Ops, s: State) -> State:
        x = o.linear(s.inputs[i], weight).unflatten(1, (sizes.h, sizes.w))
        return State(x, x.shape[0], 1, x.shape[1], x.shape[2], s.inputs)

    return run


@stem(0.3, 0.7)
def sequence(m: Maker) -> Step:
    i = m.input(InputSpec("sequence", "blc", lambda s: (s.b, s.h * s.w, C)))
    weight = m.weight(C, C)
    start(m, "bnc", t=1)
    m.h, m.w = 1, m.sizes.h * m.sizes.w

    def run(o: Ops, s: State) -> State:
        x = o.linear(s.inputs[i], weight)
        return State(x, x.shape[0], 1, 1, x.shape[1], s.inputs)

    return run


@stem(0.5, 1.5)
def two_images(m: Maker) -> Step:
    """Two images of one size that pretend to be two frames."""
    m.need(m.sizes.h * m.sizes.w <= 48)
    ones = [m.input(InputSpec("image", "bchw", lambda s: (s.b, 3, s.h, s.w))) for _ in range(2)]
    how = m.rng.choice(["cat", "stack", "batch"])
    m.say(how)
    weight = m.weight(C, 3, 1, 1)
    start(m, "bnc", t=2)

    def run(o: Ops, s: State) -> State:
        one, two = (s.inputs[i] for i in ones)
        b, _, h, w = one.shape
        if how == "batch":
            x = o.conv(torch.cat([one, two]), weight, (1, 1), (0, 0)).flatten(2).transpose(1, 2)
            x = torch.cat(x.chunk(2, 0), 1)
        else:
            parts = [o.conv(x, weight, (1, 1), (0, 0)).flatten(2).mT for x in (one, two)]
            x = torch.cat(parts, 1) if how == "cat" else torch.stack(parts, 1).flatten(1, 2)
        return State(x, b, 2, h, w, s.inputs)

    return run


@stem(0.1, 1)
def batch_as_frames(m: Maker) -> Step:
    """The images of a batch, put behind one another."""
    m.need(m.sizes.h * m.sizes.w <= 48 and m.sizes.b == 2)
    i = m.input(InputSpec("image", "bchw", lambda s: (s.b, 3, s.h, s.w)))
    weight = m.weight(C, 3, 1, 1)
    start(m, "bnc", t=2)

    def run(o: Ops, s: State) -> State:
        x = o.conv(s.inputs[i], weight, (1, 1), (0, 0))
        b, _, h, w = x.shape
        return State(x.flatten(2).transpose(1, 2).flatten(0, 1)[None], 1, b, h, w, s.inputs)

    return run


# Forms


@step(3, 2)
def change_form(m: Maker) -> Step:
    """Permutes, flattens and unflattens, as models do between their parts."""
    has_specials = m.pre + m.post > 0
    ways = {
        "bchw": ["bhwc", "bnc"],
        "fchw": ["fhwc", "fnc", "bcthw"],
        "bcthw": ["bthwc", "bnc", "btnc", "fchw"],
        "bhwc": ["bnc", "bchw"],
        "fhwc": ["fnc", "fchw", "bthwc"],
        "bthwc": ["bnc", "btnc", "bcthw", "fhwc"],
        "fnc": ["btnc"] if has_specials else ["btnc", "fhwc"],
        "btnc": ["fnc"] if has_specials else ["fnc", "bnc", "bthwc"],
        "bnc": [] if has_specials else ["bthwc" if m.t > 1 else "bhwc"],
    }[m.form]
    m.need(bool(ways))
    return to_form(m, m.rng.choice(ways))


def to_form(m: Maker, target: str) -> Step:
    """A step from one form to another; several calls where there is no direct way."""
    source, m.form = m.form, target
    spelling = m.rng.randrange(2)

    def run(o: Ops, s: State) -> State:
        return replace_x(s, convert(s, source, target, spelling))

    return run


def replace_x(s: State, x: Tensor, **changes: Any) -> State:
    fields = {"b": s.b, "t": s.t, "h": s.h, "w": s.w, "pre": s.pre, "post": s.post} | changes
    return State(x=x, inputs=s.inputs, **fields)


def convert(s: State, source: str, target: str, spelling: int) -> Tensor:
    """Between forms, always by torch's own operators."""
    x, b, t, h, w = s.x, s.b, s.t, s.h, s.w
    if source == target:
        return x
    # To channels last first.
    if source in ("bchw", "fchw"):
        if target == source[0] + "nc" and spelling:
            return x.flatten(2).transpose(1, 2)
        x, source = x.permute(0, 2, 3, 1), source[0] + "hwc"
    elif source == "bcthw":
        if target == "bnc" and spelling:
            return x.flatten(2).transpose(1, 2)
        x, source = x.permute(0, 2, 3, 4, 1), "bthwc"
    if source == "fhwc" and target in ("bthwc", "bcthw", "bnc", "btnc"):
        x, source = x.unflatten(0, (b, t)), "bthwc"
    if source == "fnc" and target in ("btnc", "bnc"):
        x, source = x.unflatten(0, (b, t)), "btnc"
    if source == "fnc" and target in ("fhwc", "fchw", "bthwc", "bcthw"):
        x, source = x.unflatten(1, (h, w)), "fhwc"
        if target.startswith("b"):
            x, source = x.unflatten(0, (b, t)), "bthwc"
    if source == "btnc" and target in ("fnc", "bnc"):
        return x.flatten(0, 1) if target == "fnc" else x.flatten(1, 2)
    if source == "btnc" and target != "btnc":
        x, source = x.unflatten(2, (h, w)), "bthwc"
    if source == "bnc" and target in ("bhwc", "bchw"):
        x, source = (x.view(b, h, w, -1) if x.is_contiguous() else x.unflatten(1, (h, w))), "bhwc"
    if source == "bnc" and target != "bnc":
        x, source = (x.reshape(b, t, h, w, -1) if spelling else x.unflatten(1, (t, h, w))), "bthwc"
    if source == "bthwc":
        if target.startswith("f"):
            x, source = x.flatten(0, 1), "fhwc"
        elif target == "bnc":
            return x.flatten(1, 3) if spelling else x.reshape(b, t * h * w, x.shape[-1])
        elif target == "btnc":
            return x.flatten(2, 3)
        elif target == "bcthw":
            return x.permute(0, 4, 1, 2, 3)
    if source in ("bhwc", "fhwc"):
        if target[1:] == "nc":
            return x.flatten(1, 2) if spelling else x.reshape(x.shape[0], -1, x.shape[-1])
        if target[1:] == "chw":
            return x.permute(0, 3, 1, 2)
    return x


def in_form(m: Maker, *forms: str) -> Callable[[Ops, State], State]:
    """Brings the tokens into one of `forms` if they have a lattice, as part of a step."""
    if m.form in forms:
        return lambda o, s: s
    m.need(m.pre + m.post == 0)
    video = {"bcthw", "bthwc", "btnc", "fchw", "fhwc", "fnc"}
    image = {"bchw", "bhwc"}
    if m.form in image:
        options = [f for f in forms if f in image or f == "bnc"]
    elif m.form == "bnc" and m.t == 1:
        options = list(forms)
    else:
        options = [f for f in forms if f in video or f == "bnc"]
    m.need(bool(options))
    return to_form(m, m.rng.choice(options))


def channels(form: str) -> int:
    return form.index("c")


# Elementwise


@step(3, 1)
def elementwise(m: Maker) -> Step:
    how = m.rng.choice(
        ["gelu", "norm", "rms", "modulate", "mlp", "gate", "cast", "clone", "groups"]
    )
    m.say(how)
    before = in_form(
        m, *{"norm": ("bnc", "fnc", "btnc", "bhwc", "bthwc", "fhwc")}.get(how, (m.form,))
    )
    if how in ("rms", "modulate", "mlp", "gate"):
        m.need(m.form.endswith("c"))
    if how == "groups":
        m.need(channels(m.form) == 1)
    up, down = m.weight(2 * C, C), m.weight(C, 2 * C)
    scale = m.weight(C)

    def run(o: Ops, s: State) -> State:
        s = before(o, s)
        x = s.x
        if how == "gelu":
            x = o.each(lambda x: F.gelu(x) + 0.5 * x, x)
        elif how == "norm":
            x = o.each(lambda x: F.layer_norm(x, (C,)), x)
        elif how == "groups":
            x = o.each(lambda x: F.group_norm(x, 4), x)
        elif how == "rms":
            x = o.each(lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6), x)
        elif how == "modulate":
            x = o.each(lambda x, g: F.layer_norm(x, (C,)) * (1 + g) + g, x, o.weight(scale))
        elif how == "mlp":
            hidden = o.each(F.silu, o.linear(x, up))
            x = o.each(torch.add, x, o.linear(hidden, down))
        elif how == "gate":
            x = o.each(lambda x, g: x * g.sigmoid(), x, o.weight(scale))
        elif how == "cast":
            x = o.each(lambda x: x.double().float(), x)
        else:
            x = x.clone()
        return replace_x(s, x)

    return run


@step(2, 1.5)
def position_table(m: Maker) -> Step:
    m.need(not m.dynamic)
    m.need(m.form != "fchw" or m.t > 0)
    shape = {
        "bnc": (1, m.pre + m.t * m.h * m.w + m.post, C),
        "fnc": (1, m.pre + m.h * m.w + m.post, C),
        "btnc": m.rng.choice([(1, m.t, 1, C), (1, 1, m.pre + m.h * m.w + m.post, C)]),
        "bhwc": m.rng.choice([(1, m.h, m.w, C), (m.h, 1, C)]),
        "fhwc": (1, m.h, m.w, C),
        "bchw": m.rng.choice([(1, C, m.h, m.w), (C, 1, m.w)]),
        "fchw": (1, C, m.h, m.w),
        "bthwc": m.rng.choice([(1, m.t, m.h, m.w, C), (m.t, 1, 1, C), (1, m.h, m.w, C)]),
        "bcthw": m.rng.choice([(1, C, m.t, m.h, m.w), (C, m.t, 1, 1)]),
    }[m.form]
    table = m.weight(*shape, scale=0.5)
    as_input = m.rng.random() < 0.3
    m.say(f"{m.form}{' from an input' if as_input else ''}")
    i = -1
    if as_input:
        i = m.input(InputSpec("table", "", lambda s: shape, code=NEUTRAL))

    def run(o: Ops, s: State) -> State:
        other = s.inputs[i] if as_input else o.weight(table)
        return replace_x(s, o.each(torch.add, s.x, other))

    return run


@step(0.7, 0.3)
def sincos_in_graph(m: Maker) -> Step:
    before = in_form(m, "bhwc", "bthwc")
    form = m.form
    weight = m.weight(C, len(form) - 2)

    def run(o: Ops, s: State) -> State:
        s = before(o, s)
        sizes = s.x.shape[1:-1]

        def table() -> Tensor:
            grid = torch.meshgrid(*(torch.arange(n) for n in sizes), indexing="ij")
            return torch.stack(grid, -1).float()

        angles = o.linear(o.neutral(table), weight)
        return replace_x(s, o.each(lambda x, a: x + a.sin(), s.x, angles))

    return run


# Special tokens


@step(3, 3)
def special_tokens(m: Maker) -> Step:
    """Before or after: a parameter, text, a pooled mean, zeros."""
    before = in_form(m, "bnc", "fnc", "btnc")
    dim = m.form.index("n")
    kinds = ["parameter", "mean", "zeros"] + (["text", "text"] if m.form == "bnc" else [])
    kind = m.rng.choice(kinds)
    at_end = m.rng.random() < 0.4
    m.say(f"{kind} {'after' if at_end else 'before'} in {m.form}")
    m.need(m.post == 0 if at_end else m.pre == 0)
    count = {"text": m.sizes.text, "mean": 1}.get(kind, m.rng.choice([1, 2, 4]))
    weight = m.weight(*[1] * (len(m.form) - 2), count, C, scale=1.0)
    i = m.text() if kind == "text" else -1
    projection = m.weight(C, C)
    if at_end:
        m.post += count
    else:
        m.pre += count

    def run(o: Ops, s: State) -> State:
        s = before(o, s)
        x = s.x
        if kind == "text":
            extra = o.linear(s.inputs[i], projection)
            if extra.shape[0] != x.shape[0]:
                extra = extra[: x.shape[0]]
        elif kind == "mean":
            extra = o.special(o.opaque(lambda x: x.mean(dim, keepdim=True), x, SPECIAL))
        elif kind == "zeros":
            extra = o.special(x.new_zeros(*x.shape[:-2], count, C))
        else:
            extra = o.special(o.weight(weight)).expand(*x.shape[:-2], -1, -1)
        x = torch.cat([x, extra] if at_end else [extra, x], dim)
        length = extra.shape[dim]
        if at_end:
            return replace_x(s, x, post=s.post + length)
        return replace_x(s, x, pre=s.pre + length)

    return run


@step(1.5, 1)
def drop_specials(m: Maker) -> Step:
    m.need(m.pre + m.post > 0)
    dim = m.form.index("n")
    m.pre = m.post = 0
    how = m.rng.choice(["slice", "narrow", "split"])
    m.say(how)

    def run(o: Ops, s: State) -> State:
        n = s.x.shape[dim]
        if how == "narrow":
            x = s.x.narrow(dim, s.pre, n - s.pre - s.post)
        elif how == "split":
            x = s.x.split([s.pre, n - s.pre - s.post, s.post], dim)[1]
        else:
            x = s.x[:, s.pre : n - s.post] if dim == 1 else s.x[:, :, s.pre : n - s.post]
        return replace_x(s, x, pre=0, post=0)

    return run


@step(1.5, 0.7)
def parts_apart(m: Maker) -> Step:
    """Split, each part processed on its own, joined again (in order; wild: or not)."""
    before = in_form(m, "bnc", "fnc", "btnc")
    dim = m.form.index("n")
    one, two = m.weight(C, C), m.weight(C, C)
    at_specials = m.pre > 0 and m.rng.random() < 0.7
    swapped = m.rng.random() < 0.5 and m.wild
    if swapped and at_specials:
        m.need(m.post == 0)
        m.pre, m.post = 0, m.pre
    fraction = m.rng.choice(["frame", "half", "row"])
    m.say(f"{'specials' if at_specials else fraction}{' swapped' if swapped else ''}")

    def run(o: Ops, s: State) -> State:
        s = before(o, s)
        first = s.pre + {"frame": s.h * s.w, "half": s.h * s.w * s.t // 2, "row": s.w}[fraction]
        if s.x.shape[dim] <= first:
            first = s.x.shape[dim] // 2
        if at_specials:
            first = s.pre
        a, b = (
            s.x.tensor_split([first], dim)
            if swapped
            else (
                s.x.narrow(dim, 0, first),
                s.x.narrow(dim, first, s.x.shape[dim] - first),
            )
        )
        a, b = o.linear(a, one), o.each(torch.add, b, o.linear(b, two))
        x = torch.cat([b, a] if swapped else [a, b], dim)
        if swapped and at_specials:
            return replace_x(s, x, pre=0, post=s.pre)
        return replace_x(s, x)

    return run


# Convolutions and other sizes


@step(1.5, 1)
def convolution(m: Maker) -> Step:
    """Of stride 1, with or without a residual."""
    before = in_form(m, "bchw", "fchw", "bcthw")
    rank = len(m.form) - 2
    kernel = [m.rng.choice([1, 3]) for _ in range(rank)]
    weight = m.weight(C, C, *kernel)
    residual = m.rng.random() < 0.6
    m.say(f"{m.form} {kernel}{' residual' if residual else ''}")

    def run(o: Ops, s: State) -> State:
        s = before(o, s)
        y = o.conv(s.x, weight, [1] * rank, [k // 2 for k in kernel])
        return replace_x(s, o.each(torch.add, s.x, y) if residual else y)

    return run


@step(1, 1)
def coarser(m: Maker) -> Step:
    """Half the height and width: strided convolution, pooling, token merge, pixel_unshuffle."""
    m.need(m.h % 2 == 0 and m.w % 2 == 0 and m.h * m.w >= 16)
    before = in_form(m, "bchw", "fchw", "bhwc", "fhwc")
    how = m.rng.choice(
        ["conv", "conv3", "pool", "unshuffle"]
        if m.form[1] == "c"
        else ["merge", "slices", "unfold"]
    )
    m.say(how)
    weight = m.weight(C, C, *{"conv": (2, 2), "conv3": (3, 3)}.get(how, (2, 2)))
    linear = m.weight(C, 4 * C)
    m.h, m.w = m.h // 2, m.w // 2

    def run(o: Ops, s: State) -> State:
        s = before(o, s)
        x, h, w = s.x, s.h // 2, s.w // 2
        if how in ("conv", "conv3"):
            x = o.conv(x, weight, (2, 2), (1, 1) if how == "conv3" else (0, 0))
        elif how == "pool":
            x = o.pool(x, (2, 2))
        elif how == "unshuffle":
            x = F.pixel_unshuffle(x, 2)
            x = o.linear(x.permute(0, 2, 3, 1), linear).permute(0, 3, 1, 2)
        elif how == "unfold":
            x = o.linear(x.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3), linear)
        elif how == "merge":
            x = x.view(-1, h, 2, w, 2, C) if x.is_contiguous() else x.reshape(-1, h, 2, w, 2, C)
            x = o.linear(x.permute(0, 1, 3, 2, 4, 5).reshape(-1, h, w, 4 * C), linear)
        else:
            parts = [x[:, i::2, j::2] for j in range(2) for i in range(2)]
            x = o.linear(torch.cat(parts, -1), linear)
        return replace_x(s, x, h=h, w=w)

    return run


@step(0.4, 0.5)
def finer(m: Maker) -> Step:
    """Twice the height and width: interpolation or a token split. May stay dense."""
    before = in_form(m, "bchw", "bhwc")
    m.need(m.t == 1 and m.h > 1 and m.h * m.w <= 25)
    form = m.form
    m.say(m.form)
    m.h, m.w, m.is_open = 2 * m.h, 2 * m.w, True

    def split(x: Tensor) -> Tensor:
        b, h, w, _ = x.shape
        x = torch.cat([x, x * 0.9, x * 1.1, x * 0.8], -1).unflatten(-1, (2, 2, C))
        return x.permute(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, C)

    def resize(x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")

    def run(o: Ops, s: State) -> State:
        s = before(o, s)
        x = o.lattice(s.x, split if form == "bhwc" else resize, (1, 0.5, 0.5), form)
        return replace_x(s, x, h=2 * s.h, w=2 * s.w)

    return run


@step(0.6, 0.6)
def crop(m: Maker) -> Step:
    before = in_form(m, "bhwc", "bthwc", "bchw", "bcthw")
    axis = m.rng.choice([a for a in "thw" if a in m.form])
    m.need(getattr(m, axis) >= 3)
    dim = m.form.index(axis)
    start_at = m.rng.choice([0, 1])
    m.say(axis)
    setattr(m, axis, getattr(m, axis) - 1)

    def run(o: Ops, s: State) -> State:
        s = before(o, s)
        x = s.x.narrow(dim, start_at, s.x.shape[dim] - 1)
        return replace_x(s, x, **{axis: getattr(s, axis) - 1})

    return run


# Attention


def rope(m: Maker) -> Callable[[Ops, Tensor], Tensor]:
    """A rotation of [..., N, D], spelled in one of three ways."""
    how = m.rng.choice(["half", "setitem", "stack"])

    def run(o: Ops, x: Tensor) -> Tensor:
        n, d = x.shape[-2:]

        def angles() -> Tensor:
            return torch.outer(torch.arange(n).float(), torch.arange(1.0, d // 2 + 1) * 0.3)

        table = o.neutral(angles)
        cos, sin = o.each(torch.cos, table), o.each(torch.sin, table)
        if how == "half":
            a, b = x.chunk(2, -1)
        else:
            a, b = x[..., 0::2], x[..., 1::2]
        one = o.each(lambda a, b, c, s: a * c - b * s, a, b, cos, sin)
        two = o.each(lambda a, b, c, s: a * s + b * c, a, b, cos, sin)
        if how == "half":
            return torch.cat([one, two], -1)
        if how == "stack":
            return torch.stack([one, two], -1).flatten(-2)
        out = torch.empty_like(x)
        out[..., 0::2] = one
        out[..., 1::2] = two
        return out

    return run


Attend = Callable[[Ops, Tensor, "Tensor | None", "Tensor | None"], Tensor]


def attention(m: Maker) -> Attend:
    """Projections, heads, RoPE, a site and the output projection, over [..., N, C].

    The function takes queries' tokens, and where they differ those of keys and of values.
    """
    ways = [
        "chunk",
        "unflatten",
        "separate",
        "flat",
        "one head",
        "folded",
        "interleaved",
        "grouped",
    ]
    wild = m.wild
    way = m.rng.choice(
        [*ways, *(["sequence first", "wrong view", "inplace"] if wild else ["sequence first"])]
    )
    fused = m.weight(3 * C, C)
    q_weight, k_weight, v_weight = m.weight(C, C), m.weight(C, C), m.weight(C, C)
    out_weight = m.weight(C, C)
    rotate = rope(m) if m.rng.random() < 0.35 else None
    peel = m.rng.choice(
        ["scale, add_", "clone, mul_", "clone, setitem", "cast, mul_", "view, mul_"]
    )
    on_keys = m.rng.random() < 0.5
    m.say(f"({way}{' ' + peel if way == 'inplace' else ''}{' rope' if rotate else ''})")
    site = m.site(m.rng.choice(["matmul", "scaled"]) if way == "inplace" else None)
    if way == "inplace":
        m.site_open[site] = True

    def projected(o: Ops, x: Tensor, y: Tensor, z: Tensor) -> list[Tensor]:
        if way in ("separate", "folded", "grouped", "wrong view") or x is not y or y is not z:
            return [o.linear(x, q_weight), o.linear(y, k_weight), o.linear(z, v_weight)]
        return list(o.linear(x, fused).chunk(3, -1))

    def run(o: Ops, x: Tensor, y: Tensor | None = None, z: Tensor | None = None) -> Tensor:
        same = y is None and z is None
        y = x if y is None else y
        z = y if z is None else z
        lead, n = x.shape[:-2], x.shape[-2]
        parts: Sequence[Tensor]
        if way == "unflatten" and same:
            qkv = o.linear(x, fused).unflatten(-1, (3, HEADS, C // HEADS)).movedim(-3, 0)
            parts = qkv.transpose(-3, -2).unbind(0)
        elif way == "interleaved" and same:
            qkv = o.linear(x, fused).unflatten(-1, (HEADS, 3, C // HEADS)).transpose(-4, -3)
            parts = [qkv[..., i, :] for i in range(3)]
        elif way == "sequence first" and x.dim() == 3:
            parts = [p.transpose(0, 1) for p in projected(o, x, y, z)]
            parts = [p.reshape(p.shape[0], -1, C // HEADS).transpose(0, 1) for p in parts]
        elif way == "wrong view":
            parts = [
                p.contiguous().view(*p.shape[:-2], HEADS, p.shape[-2], C // HEADS)
                for p in projected(o, x, y, z)
            ]
        elif way in ("flat", "inplace"):
            parts = projected(o, x, y, z)
        elif way == "one head":
            parts = [p.unsqueeze(-3) for p in projected(o, x, y, z)]
        else:
            parts = projected(o, x, y, z)
            parts = [p.unflatten(-1, (HEADS, C // HEADS)).transpose(-3, -2) for p in parts]
        if way == "grouped":
            parts = [parts[0], *(p[..., :1, :, :].expand_as(p) for p in parts[1:])]
        if way == "folded":
            parts = [p.reshape(-1, *p.shape[-2:]) for p in parts]
        q, k, v = parts
        if rotate is not None:
            q, k = rotate(o, q), rotate(o, k)
        if way == "inplace":
            if on_keys:
                k = changed_in_place(o, k, peel)
            else:
                q = changed_in_place(o, q, peel)
        out = o.site(site, q, k, v)
        if way == "folded":
            out = out.reshape(*lead, HEADS, n, C // HEADS)
        if way == "sequence first" and x.dim() == 3:
            out = out.transpose(0, 1).reshape(n, -1, C).transpose(0, 1)
        elif way == "one head":
            out = out.squeeze(-3)
        elif way == "wrong view":
            out = out.reshape(*lead, n, C)
        elif way not in ("flat", "inplace"):
            out = out.transpose(-3, -2).flatten(-2)
        return o.linear(out, out_weight)

    return run


def changed_in_place(o: Ops, x: Tensor, how: str) -> Tensor:
    """A copy of `x` whose values are changed after the fact, as far as identities go unmoved."""
    if how == "scale, add_":
        x = o.each(lambda x: x * 0.7, x)
        o.inplace(lambda x: x.add_(1.0), x)
    elif how == "clone, mul_":
        x = x.clone()
        o.inplace(lambda x: x.mul_(3.0), x)
    elif how == "clone, setitem":
        x = x.clone()
        half = x[..., :8]
        o.inplace(lambda half: half.mul_(4.0), half)
    elif how == "cast, mul_":
        x = o.each(lambda x: x.to(torch.float32, copy=True), x)
        o.inplace(lambda x: x.mul_(3.0), x)
    else:
        x = x.contiguous().clone()
        o.inplace(lambda x: x.mul_(3.0), x.view(-1))
    return x


def residual(o: Ops, s: State, out: Tensor) -> State:
    return replace_x(s, o.each(torch.add, s.x, out))


@step(6, 5)
def self_attention(m: Maker) -> Step:
    before = in_form(m, "bnc", "fnc", "btnc")
    normed = m.rng.random() < 0.5
    checkpointed = m.rng.random() < 0.1 and not m.dynamic
    m.say(f"{m.form}{' checkpointed' if checkpointed else ''}")
    attend = attention(m)

    def run(o: Ops, s: State) -> State:
        s = before(o, s)
        x = o.each(lambda x: F.layer_norm(x, (C,)), s.x) if normed else s.x
        if checkpointed and isinstance(o, Values):
            from torch.utils.checkpoint import checkpoint

            out = checkpoint(lambda x: attend(o, x, None, None), x, use_reentrant=False)
        else:
            out = attend(o, x, None, None)
        return residual(o, s, out)

    return run


@step(1, 0.7)
def axial_attention(m: Maker) -> Step:
    """Along one axis, or over frames at each place; the other axes are batch."""
    before = in_form(m, "bhwc", "bthwc", "fhwc")
    axis = m.rng.choice([a for a in "thw" if a in m.form])
    m.need(getattr(m, axis) > 1)
    dim = m.form.index(axis)
    m.say(axis)
    attend = attention(m)

    def run(o: Ops, s: State) -> State:
        s = before(o, s)
        moved = s.x.movedim(dim, -2)
        out = attend(o, moved.reshape(-1, *moved.shape[-2:]), None, None)
        return residual(o, s, out.reshape(moved.shape).movedim(-2, dim))

    return run


@step(1, 1)
def window_attention(m: Maker) -> Step:
    """Windows of the lattice as batch entries, contiguous or dilated; wild: shifted."""
    m.need(m.h % 2 == 0 and m.w % 2 == 0)
    before = in_form(m, "bhwc", "fhwc")
    dilated = m.rng.random() < 0.3
    shifted = m.rng.random() < (0.5 if m.wild else 0.2)
    m.say(f"{'dilated ' if dilated else ''}{'shifted' if shifted else ''}")
    attend = attention(m)

    def run(o: Ops, s: State) -> State:
        s = before(o, s)
        b, h, w, c = s.x.shape
        x = s.x.roll((1, 1), (1, 2)) if shifted else s.x
        if dilated:
            x = x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 2, 4, 1, 3, 5)
        else:
            x = x.reshape(b, 2, h // 2, 2, w // 2, c).permute(0, 1, 3, 2, 4, 5)
        shape = x.shape
        x = attend(o, x.reshape(-1, (h // 2) * (w // 2), c), None, None).reshape(shape)
        x = x.permute(0, 3, 1, 4, 2, 5) if dilated else x.permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(b, h, w, c)
        return residual(o, s, x.roll((-1, -1), (1, 2)) if shifted else x)

    return run


@step(0.7, 0.5)
def text_cross_attention(m: Maker) -> Step:
    before = in_form(m, "bnc")
    m.need(m.sizes.b == 1 or m.t == 1 or m.inputs[0].form[0] == "b")
    i = m.text()
    attend = attention(m)

    def run(o: Ops, s: State) -> State:
        s = before(o, s)
        text = s.inputs[i]
        if text.shape[0] != s.x.shape[0]:
            text = text[: s.x.shape[0]]
        return residual(o, s, attend(o, s.x, text, text))

    return run


@step(0.5, 0.5)
def joint_attention(m: Maker) -> Step:
    """Text and image with projections of their own, one attention (MMDiT)."""
    before = in_form(m, "bnc")
    m.need(m.pre + m.post == 0)
    i = m.text()
    weights = [m.weight(3 * C, C) for _ in range(2)]
    outs = [m.weight(C, C) for _ in range(2)]
    text_first = m.rng.random() < 0.5
    site = m.site("sdpa")

    def run(o: Ops, s: State) -> State:
        s = before(o, s)
        text = s.inputs[i][: s.x.shape[0]]
        streams = [text, s.x] if text_first else [s.x, text]
        order = weights if text_first else weights[::-1]
        split = [
            o.linear(x, weight).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            for x, weight in zip(streams, order, strict=True)
        ]
        q, k, v = (torch.cat([part[index] for part in split], -2) for index in range(3))
        out = o.site(site, q, k, v).transpose(1, 2).flatten(2)
        count = text.shape[1]
        image = out[:, count:] if text_first else out[:, :-count]
        return residual(o, s, o.linear(image, outs[0]))

    return run


# Wild: attention between different tokens


@step(0.5, 3)
def other_keys(m: Maker) -> Step:
    """Keys or values that are not the queries' tokens."""
    before = in_form(m, "bnc", "fnc", "btnc")
    ways = [
        "roll",
        "flip",
        "batch roll",
        "first row",
        "values rolled",
        "swapped halves",
        "one more",
    ]
    ways += ["next frame", "cached"] if m.form == "btnc" else ["cached"]
    ways += ["two streams", "shared positions"] if m.form == "bnc" else []
    if m.form == "btnc":
        ways += ["first frame"] * 2
    how = m.rng.choice(ways)
    m.say(how)
    n = m.pre + m.post + m.t * m.h * m.w if m.form == "bnc" else m.pre + m.post + m.h * m.w
    m.need(how not in ("batch roll", "first row") or m.sizes.b > 1 or m.form == "fnc")
    shape: Callable[[Sizes], tuple[int, ...]]
    if how in ("cached", "two streams", "shared positions"):
        m.need(not m.dynamic and m.form == "bnc")
        b = m.sizes.b if "batch_as_frames" not in m.names else 1
        m.need("batch_as_frames" not in m.names)
        shape = lambda s: (b, n, C)  # noqa: E731
        i = m.input(InputSpec("cache", "blc", shape))
    else:
        i = -1
    weight, table = m.weight(C, C), m.weight(1, n, C)
    attend = attention(m)

    def run(o: Ops, s: State) -> State:
        s = before(o, s)
        x = s.x
        y: Tensor = x
        z: Tensor | None = None
        if how == "roll":
            y = x.roll(1, -2)
        elif how == "flip":
            y = x.flip(-2)
        elif how == "batch roll":
            y = x.roll(1, 0)
        elif how == "first row":
            y = x[:1].expand_as(x)
        elif how == "values rolled":
            z = x.roll(s.w, -2)
        elif how == "swapped halves":
            y = torch.cat(x.tensor_split(2, -2)[::-1], -2)
        elif how == "one more":
            y = torch.cat([x, x[..., :1, :]], -2)
        elif how == "next frame":
            y = torch.cat([x[:, 1:], x[:, :1]], 1)
        elif how == "first frame":
            y = x[:, :1].expand_as(x)
        elif how == "cached":
            y = s.inputs[i]
        elif how == "two streams":
            y = o.linear(s.inputs[i], weight)
        else:
            y = o.each(torch.add, o.linear(s.inputs[i], weight), o.weight(table))
            x = o.each(torch.add, x, o.weight(table))
        return residual(o, s, attend(o, x, y, z))

    return run


@step(0.3, 1.5)
def frames_pooled(m: Maker) -> Step:
    """Tokens that are sums of some of the frames, and keys that are sums of others."""
    before = in_form(m, "btnc")
    m.need(m.pre + m.post == 0 and m.t > 1)
    # What a sum of two sources' tokens is, is not decided here.
    several = {"second_source", "packed_two_images", "two_images"}
    m.need(not several & {name.split(" ")[0] for name in m.names})
    by_channels = m.rng.random() < 0.5
    some, others = m.rng.choice(
        [((0, 2), (0, 2)), ((0, 2), (0, 2)), ((0, 1), (1, 2)), ((1, 2), (0, 2)), ((0, 2), (0, 1))]
    )
    m.say(f"{some} {others}{' in channels' if by_channels else ''}")
    half = m.t // 2
    weights = [m.weight(C, C * half * (stop - start)) for start, stop in (some, others)]
    attend = attention(m)
    m.form, m.t = "bnc", 1

    def pooled(o: Ops, x: Tensor, part: tuple[int, int], weight: int) -> Tensor:
        frames = x[:, half * part[0] : half * part[1]]
        if by_channels:
            return o.linear(frames.transpose(1, 2).flatten(2), weight)
        return o.mean(frames, 1)

    def run(o: Ops, s: State) -> State:
        s = before(o, s)
        x = pooled(o, s.x, some, weights[0])
        y = x if others == some else pooled(o, s.x, others, weights[1])
        return residual(o, replace_x(s, x, t=1), attend(o, x, y, None))

    return run


# Wild: order


def permutation(m: Maker, n: int) -> tuple[Tensor, str]:
    """A permutation of n that is not the identity, unless it happens to be."""
    kind = m.rng.choice(["random", "interlaced", "reversed", "rotated", "windows", "swap"])
    places = torch.arange(n)
    if kind == "random":
        places = torch.randperm(n, generator=m.generator)
    elif kind == "interlaced":
        places = torch.cat([places[0::2], places[1::2]])
    elif kind == "reversed":
        places = places.flip(0)
    elif kind == "rotated":
        places = places.roll(m.rng.randrange(1, n) if n > 1 else 0)
    elif kind == "windows" and n % 4 == 0:
        places = places.view(2, -1, 2).transpose(0, 1).reshape(-1)
    else:
        places = places.clone()
        places[[0, n - 1]] = places[[n - 1, 0]]
    return places, kind


@step(0.4, 4)
def reorder(m: Maker) -> Step:
    """Tokens picked or written in another order, along any dimension of tokens."""
    m.need(not m.dynamic)
    dims = [i for i, letter in enumerate(m.form) if letter in "thwn"]
    dim = m.rng.choice(dims)
    letter = m.form[dim]
    size = m.pre + m.post + m.tokens if letter == "n" else getattr(m, letter)
    order, kind = permutation(m, size)
    index = m.index(order)
    inverse = m.index(torch.argsort(order))
    how = m.rng.choice(
        [
            "select",
            "index",
            "gather",
            "take_along",
            "index_copy_",
            "scatter_",
            "setitem",
            "blocks",
            "argsort",
        ]
    )
    if how == "blocks":
        m.need(size % 4 == 0)
    blocks = m.index(permutation(m, max(size // 4, 1))[0])
    undo = m.rng.random() < 0.25
    then = m.rng.choice(["", "", "table", "residual", "attend"])
    m.say(f"{letter} {kind} by {how} {'undone ' if undo else ''}{then}")
    shape = [1] * len(m.form)
    shape[dim], shape[channels(m.form)] = size, C
    table = m.weight(*shape)
    attend = None
    if then == "attend":
        m.need(m.form in ("bnc", "fnc", "btnc"))
        attend = attention(m)

    def moved(o: Ops, x: Tensor, places: Tensor) -> Tensor:
        view = [1] * x.dim()
        view[dim] = -1
        wide = places.view(view).expand_as(x)
        if how == "select":
            return x.index_select(dim, places)
        if how == "index":
            where: Any = (*[slice(None)] * dim, places)
            return x[where]
        if how == "gather":
            return x.gather(dim, wide)
        if how == "take_along":
            return torch.take_along_dim(x, places.view(view), dim)
        if how == "argsort":
            return x.index_select(dim, torch.argsort(places))
        if how == "blocks":
            parts = x.unflatten(dim, (-1, 4))
            return parts.index_select(dim, o.buffer(blocks)).flatten(dim, dim + 1)
        out = torch.empty_like(x)
        if how == "index_copy_":
            out.index_copy_(dim, places, x)
        elif how == "scatter_":
            out.scatter_(dim, wide, x)
        else:
            where = (*[slice(None)] * dim, places)
            out[where] = x
        return out

    def run(o: Ops, s: State) -> State:
        x = moved(o, s.x, o.buffer(index))
        if attend is not None:
            x = attend(o, x, None, None)
        if undo and how not in ("blocks", "argsort"):
            x = moved(o, x, o.buffer(inverse))
        if then == "table":
            x = o.each(torch.add, x, o.weight(table))
        elif then in ("residual", "attend"):
            x = o.each(torch.add, x, s.x)
        return replace_x(s, x)

    return run


@step(0.2, 3)
def shift_or_flip(m: Maker) -> Step:
    """roll, flip or transposition by torch's own operators; often with something added."""
    how = m.rng.choice(["roll", "flip", "transpose", "cat", "arithmetic"])
    dims = [i for i, letter in enumerate(m.form) if letter in "thwn"]
    dim = m.rng.choice(dims)
    then = m.rng.choice(["", "scale", "residual", "attend"])
    m.say(f"{how} {m.form[dim]} {then}")
    if how == "transpose":
        m.need("h" in m.form and (then != "residual" or m.h == m.w))
        m.h, m.w = m.w, m.h
        dim = m.form.index("h")
    bias = m.weight(*([C] if m.form.endswith("c") else [C, *[1] * (len(m.form) - 2)]))
    attend = None
    if then == "attend":
        m.need(m.form in ("bnc", "fnc", "btnc"))
        attend = attention(m)
    amount = m.rng.choice([1, 2])

    def run(o: Ops, s: State) -> State:
        x = s.x
        if how == "roll":
            x = x.roll(amount, dim)
        elif how == "flip":
            x = x.flip(dim)
        elif how == "transpose":
            x = x.transpose(dim, dim + 1)
        elif how == "cat":
            n = x.shape[dim]
            x = torch.cat([x.narrow(dim, 1, n - 1), x.narrow(dim, 0, 1)], dim)
        else:
            n = x.shape[dim]
            x = x.index_select(dim, (torch.arange(n) + amount) % n)
        if attend is not None:
            x = attend(o, x, None, None)
        if then == "scale":
            x = o.each(torch.add, x, o.weight(bias))
        elif then in ("residual", "attend"):
            x = o.each(torch.add, x, s.x)
        if how == "transpose":
            return replace_x(s, x, h=s.w, w=s.h)
        return replace_x(s, x)

    return run


@step(0.2, 1)
def partition_and_stay(m: Maker) -> Step:
    """Window order (or a column order) that is never undone, then whole-sequence attention."""
    m.need(m.h % 2 == 0 and m.w % 2 == 0)
    before = in_form(m, "bhwc", "fhwc")
    dilated = m.rng.random() < 0.3

    def run(o: Ops, s: State) -> State:
        s = before(o, s)
        b, h, w, c = s.x.shape
        if dilated:
            x = s.x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 2, 4, 1, 3, 5)
        else:
            x = s.x.reshape(b, 2, h // 2, 2, w // 2, c).permute(0, 1, 3, 2, 4, 5)
        return replace_x(s, x.reshape(b, h, w, c))

    return run


@step(0.1, 2)
def in_place(m: Maker) -> Step:
    """Tokens overwritten by others in a clone or through a view."""
    how = m.rng.choice(["swap rows", "copy_", "view", "shift", "alias"])
    m.say(how)
    before = in_form(m, "bnc", "fnc", "bhwc", "bthwc")
    m.need(m.form[1] == "n" or getattr(m, m.form[1]) >= 2)

    def run(o: Ops, s: State) -> State:
        s = before(o, s)
        x = s.x.clone()
        if how == "swap rows":
            x[:, 0] = s.x[:, 1]
            x[:, 1] = s.x[:, 0]
        elif how == "copy_":
            x.copy_(s.x.flip(1))
        elif how == "view":
            x[:, :1].copy_(s.x[:, -1:])
        elif how == "shift":
            x[:, 1:] = s.x[:, :-1]
        else:
            y = x.transpose(0, 1)
            y[0] = s.x[:, -1]
        return replace_x(s, x)

    return run


# Wild: other sizes


@step(0.3, 2)
def copies(m: Maker) -> Step:
    """Copies of tokens that pretend to be frames, or an axis of their own."""
    before = in_form(m, "bnc", "bhwc")
    m.need(m.t == 1 and m.h * m.w <= 48 and m.pre + m.post == 0)
    how = m.rng.choice(["cat", "stack", "stack and embed", "repeat", "expand", "interleave"])
    m.say(how)
    form = m.form
    e = m.weight(1, 2, *[1] * (len(form) - 2), C)
    if how == "interleave":
        m.h *= 2
        if form == "bnc":
            m.h, m.w = m.h * m.w // 2, 2
    else:
        m.t = 2
        m.form = "bnc" if form == "bnc" else "bthwc"

    def run(o: Ops, s: State) -> State:
        s = before(o, s)
        x = s.x
        if how == "interleave":
            x = x.repeat_interleave(2, 1)
            if form == "bnc":
                return replace_x(s, x, h=s.h * s.w, w=2)
            return replace_x(s, x, h=2 * s.h)
        if how == "cat" or how == "repeat":
            x = torch.cat([x, x], 1) if how == "cat" else x.repeat(1, 2, *[1] * (x.dim() - 2))
            x = x.unflatten(1, (2, -1))
        elif how == "expand":
            x = x[:, None].expand(-1, 2, *[-1] * (x.dim() - 1))
        else:
            x = torch.stack([x, o.each(lambda x: 2 * x, x)], 1)
            if how == "stack and embed":
                x = o.each(torch.add, x, o.weight(e))
        return replace_x(s, x.flatten(1, 2) if form == "bnc" else x, t=2)

    return run


@step(0.4, 1)
def second_source(m: Maker) -> Step:
    """Another image or another call of a stem beside the first, as frames or as an extra row."""
    before = in_form(m, "bnc", "bhwc")
    m.need(m.pre + m.post == 0 and m.t == 1 and not m.dynamic and m.h * m.w <= 48)
    m.need("batch_as_frames" not in m.names)
    h, w, form = m.h, m.w, m.form
    i = m.input(InputSpec("other", "bchw", lambda s: (s.b, 3, h, w)))
    weight = m.weight(C, 3, 1, 1)
    how = m.rng.choice(["frames", "rows", "sum"])
    if how == "sum":
        # Aligned cell by cell, as control signals are; what else it could mean is not decided here.
        aligned = {"image_conv", "elementwise", "position_table", "self_attention", "second_source"}
        m.need(
            {name.split(" ")[0] for name in m.names} <= aligned
            and m.inputs[0].shape(m.sizes)[2] == h
        )
    m.say(how)
    if how == "frames":
        m.t, m.form = 2, "bnc" if form == "bnc" else "bthwc"
    elif how == "rows":
        m.h *= 2

    def run(o: Ops, s: State) -> State:
        s = before(o, s)
        y = o.conv(s.inputs[i], weight, (1, 1), (0, 0)).permute(0, 2, 3, 1)
        y = y.flatten(1, 2) if form == "bnc" else y
        if how == "sum":
            return replace_x(s, o.each(torch.add, s.x, y))
        if how == "frames" and form == "bhwc":
            return replace_x(s, torch.stack([s.x, y], 1), t=2)
        x = torch.cat([s.x, y], 1)
        return replace_x(s, x, t=2) if how == "frames" else replace_x(s, x, h=2 * s.h)

    return run


@step(0.7, 2)
def specials_between(m: Maker) -> Step:
    """Row separators, or the special tokens of frames, that end up inside the sequence."""
    if m.form in ("fnc", "btnc") and m.pre + m.post > 0:
        m.need(m.t > 1)
        source, pre, post = m.form, m.pre, m.post
        m.say("of frames")
        m.w, m.h, m.form, m.pre, m.post = pre + m.h * m.w + post, 1, "bnc", 0, 0

        def join(o: Ops, s: State) -> State:
            x = s.x.unflatten(0, (s.b, s.t)) if source == "fnc" else s.x
            n = x.shape[2]
            return replace_x(s, x.flatten(1, 2), h=1, w=n, pre=0, post=0)

        return join
    before = in_form(m, "bhwc", "fhwc")
    m.need(m.h > 1)
    weight = m.weight(1, 1, 1, C)
    at_end = m.rng.random() < 0.7
    m.say("of rows")
    m.w += 1

    def run(o: Ops, s: State) -> State:
        s = before(o, s)
        extra = o.special(o.weight(weight)).expand(*s.x.shape[:2], 1, C)
        x = torch.cat([s.x, extra] if at_end else [extra, s.x], 2)
        return replace_x(s, x, w=s.w + 1)

    return run


@step(0.6, 2)
def over_flat_image(m: Maker) -> Step:
    """[B, C, T, H·W] under a convolution or pooling, or a frame's [C, H·W] under Conv1d."""
    before = in_form(m, "btnc", "fnc")
    m.need(m.pre + m.post == 0)
    form = m.form
    how = m.rng.choice(["3x1", "3x3", "pool", "1d", "1d"])
    if form == "fnc":
        how = "1d"
    m.need(how != "pool" or (m.t % 2 == 0))
    kernel: tuple[int, ...] = (1,) if m.rng.random() < 0.5 else (3,)
    kernel = {"3x1": (3, 1), "3x3": (3, 3)}.get(how, kernel)
    weight = m.weight(C, C, *kernel)
    plus = m.rng.random() < 0.5
    m.say(f"{how}{kernel[0] if how == '1d' else ''}{' residual' if plus else ''}")
    if how == "pool":
        m.t //= 2

    def run(o: Ops, s: State) -> State:
        s = before(o, s)
        x = s.x
        if how == "1d":
            y = x.flatten(0, 1) if form == "btnc" else x
            y = o.conv(y.transpose(1, 2), weight, (1,), (kernel[0] // 2,)).transpose(1, 2)
            y = y.unflatten(0, x.shape[:2]) if form == "btnc" else y
            return replace_x(s, o.each(torch.add, x, y) if plus else y)
        y = x.permute(0, 3, 1, 2)
        if how == "pool":
            return replace_x(s, o.pool(y, (2, 1)).permute(0, 2, 3, 1), t=s.t // 2)
        y = o.conv(y, weight, (1, 1), (kernel[0] // 2, kernel[1] // 2)).permute(0, 2, 3, 1)
        return replace_x(s, o.each(torch.add, x, y) if plus else y)

    return run


@step(0, 1.5)
def opaque_operator(m: Maker) -> Step:
    """Operators that mix or move tokens in ways that only data or numbers tell.

    Alone they leave no grid; added to tokens they keep these tokens' order, if anything.
    """
    before = in_form(m, "bnc", "fnc")
    how = m.rng.choice(["cumsum", "sort", "matmul", "fft", "by score", "pooled", "linear"])
    n = m.pre + m.tokens + m.post
    m.need(not m.dynamic or how not in ("matmul", "linear"))
    matrix = m.index(torch.eye(n)[torch.randperm(n, generator=m.generator)])
    mixing = m.weight(n, n) if how == "linear" else -1
    plus = m.rng.random() < 0.4
    m.say(f"{how}{' residual' if plus else ''}")
    if plus:
        m.is_open = True

    def run(o: Ops, s: State) -> State:
        s = before(o, s)
        x = s.x
        if how == "cumsum":
            y = o.opaque(lambda x: x.cumsum(1) * 0.3, x, CONTEXT)
        elif how == "sort":
            y = o.opaque(lambda x: x.sort(1).values, x, CONTEXT)
        elif how == "matmul":
            y = o.opaque(lambda x: o.buffer(matrix) @ x, x, CONTEXT)
        elif how == "linear":
            y = o.opaque(lambda x: (x.transpose(1, 2) @ o_weight(o, mixing)).mT, x, CONTEXT)
        elif how == "fft":
            y = o.opaque(lambda x: torch.fft.fft(x, dim=1).real, x, CONTEXT)
        elif how == "pooled":
            y = o.opaque(lambda x: x.mean(1, keepdim=True).expand_as(x), x, CONTEXT)
        else:

            def sorted_by_score(x: Tensor) -> Tensor:
                order = x[..., 0].argsort(1)
                return x.gather(1, order[..., None].expand_as(x))

            y = o.opaque(sorted_by_score, x, CONTEXT)
        return replace_x(s, o.each(torch.add, x, y) if plus or how == "pooled" else y)

    return run


def o_weight(o: Ops, index: int) -> Tensor:
    """A weight as numbers, also in the run on identities."""
    return o.maker.weights[index] if isinstance(o, Identities) else o.weight(index)


@step(0, 1)
def across_batch(m: Maker) -> Step:
    """Batch rows rolled, or mixed with their neighbors."""
    m.need(m.sizes.b > 1 and m.form[0] == "b")
    how = m.rng.choice(["roll", "add"])
    m.say(how)

    def run(o: Ops, s: State) -> State:
        y = s.x.roll(1, 0)
        return replace_x(s, y if how == "roll" else o.each(torch.add, s.x, y))

    return run
