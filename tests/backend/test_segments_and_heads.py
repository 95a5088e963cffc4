"""Sequences of several grids and heads that differ, from a policy to numbers."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from masked_model import layout_mask, masked, segments_of
from models import build, flux_ids, main_output
from torch import Tensor, nn
from torch.nn import functional as F

import gna_compile
from gna_compile.reasons import Reason
from gna_compile.report.rows import Row

HEADS, WIDTH, TEXT = 6, 48, 5
WINDOW, STRIDE = (3, 4), (1, 2)


class Joint(nn.Module):
    """One attention over text and packed images, whose places are in `img_ids`."""

    def __init__(self, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.kv_heads = kv_heads
        self.to_q = nn.Linear(WIDTH, WIDTH)
        self.to_kv = nn.Linear(WIDTH, 2 * WIDTH * kv_heads // HEADS)
        self.place = nn.Linear(3, WIDTH)

    def forward(self, text: Tensor, x: Tensor, img_ids: Tensor) -> Tensor:
        x = torch.cat([text, x + self.place(img_ids)], 1)
        q = self.to_q(x).unflatten(2, (HEADS, -1)).transpose(1, 2)
        k, v = self.to_kv(x).unflatten(2, (2 * self.kv_heads, -1)).transpose(1, 2).chunk(2, 1)
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=self.kv_heads < HEADS)


def images(*sizes: tuple[int, int]) -> Tensor:
    parts = [flux_ids(size) for size in sizes]
    for number, part in enumerate(parts):
        part[:, 0] = number
    return torch.cat(parts)


def inputs(ids: Tensor, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, TEXT, WIDTH), torch.randn(batch, len(ids), WIDTH), ids


def policy(*rules: dict[str, Any], **top: Any) -> dict[str, Any]:
    small: dict[str, Any] = {"min_tokens": 0, "min_speedup": 0, "allow_slow_providers": True}
    return {"version": 1, **small, **top, "rules": list(rules)}


def rows(model: nn.Module, given: tuple[Tensor, ...], rules: dict[str, Any]) -> Row:
    (row,) = gna_compile.explain(model, *given, policy=rules, quiet=True).rows
    return row


def compiled(model: nn.Module, rules: dict[str, Any]) -> Any:
    torch._dynamo.reset()
    options: dict[str, Any] = {"policy": rules, "inner": "aot_eager"}
    return torch.compile(model, backend="gna", options=options)


def expected(model: Joint, given: tuple[Tensor, ...], masks: list[Tensor]) -> Tensor:
    """In float64, with a mask [tokens, tokens] for each head."""
    text, x, ids = (t.double() for t in given)
    model = model.double()
    x = torch.cat([text, x + model.place(ids)], 1)
    q = model.to_q(x).unflatten(2, (HEADS, -1)).transpose(1, 2)
    k, v = model.to_kv(x).unflatten(2, (2 * model.kv_heads, -1)).transpose(1, 2).chunk(2, 1)
    k, v = (t.repeat_interleave(HEADS // model.kv_heads, 1) for t in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~torch.stack(masks), -torch.inf)
    model.float()
    return (scores.softmax(-1) @ v).float()


def mask(
    grids: list[tuple[int, int]], windows: list[tuple[int, int] | None], between: str = "full"
) -> Tensor:
    """Bool [tokens, tokens] of text and then grids, each with its window, None for a full one."""
    starts = [TEXT]
    for height, width in grids:
        starts.append(starts[-1] + height * width)
    see = torch.ones(starts[-1], starts[-1], dtype=torch.bool)
    for i, (grid, window) in enumerate(zip(grids, windows, strict=True)):
        for j in range(len(grids)):
            here = slice(starts[i], starts[i + 1]), slice(starts[j], starts[j + 1])
            if i != j and between == "none":
                see[here] = False
            elif window is not None and (i == j or between == "aligned"):
                see[here] = oracle.mask(grid, window, STRIDE)
    return see


TWO = [(6, 8), (6, 8)]


@pytest.mark.parametrize(
    ("rule", "grids", "windows"),
    [
        ({}, TWO, [WINDOW, WINDOW]),
        ({}, [(6, 8), (4, 5)], [WINDOW, WINDOW]),
        ({"grids": "first"}, TWO, [WINDOW, None]),
        ({"grids": "last"}, [(4, 5), (6, 8)], [None, WINDOW]),
        ({"grids": "largest"}, [(4, 5), (6, 8), (6, 8)], [None, WINDOW, None]),
        ({"grids": 2}, [(4, 5), (6, 8), (6, 8)], [None, None, WINDOW]),
        ({"between_grids": "none"}, TWO, [WINDOW, WINDOW]),
        ({"between_grids": "aligned"}, TWO, [WINDOW, WINDOW]),
        ({"between_grids": "none", "grids": "first"}, TWO, [WINDOW, None]),
    ],
)
def test_grids(rule: dict[str, Any], grids: list[Any], windows: list[Any]) -> None:
    model, given = Joint(), inputs(images(*grids))
    rules = policy({"window": list(WINDOW), "stride": list(STRIDE), **rule})
    row = rows(model, given, rules)
    assert row.layout == " + ".join([str(TEXT), *(f"{h}x{w}" for h, w in grids)])
    assert row.window == " + ".join("full" if w is None else "3x4" for w in windows)
    see = mask(grids, windows, str(rule.get("between_grids", "full")))
    assert row.flop_share == pytest.approx(see.float().mean().item())
    actual = compiled(model, rules)(*given)
    torch.testing.assert_close(actual, expected(model, given, [see] * HEADS))
    actual.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("rule", "grids", "code", "words"),
    [
        ({"grids": 2}, TWO, Reason.LAYOUT_MISMATCH, "grid 2, counted from 0, and there are 2"),
        ({"window": 5}, [(6, 8), (4, 5)], Reason.WINDOW_EXCEEDS_GRID, "grid 1 of 5 + 6×8 + 4×5"),
        (
            {"between_grids": "aligned"},
            [(6, 8), (4, 5)],
            Reason.LAYOUT_MISMATCH,
            "cannot be aligned",
        ),
        ({"window": [2, 3, 4]}, TWO, Reason.LAYOUT_MISMATCH, "the rule is for 3 axes"),
    ],
)
def test_grids_that_a_rule_does_not_fit(
    rule: dict[str, Any], grids: list[Any], code: Reason, words: str
) -> None:
    row = rows(Joint(), inputs(images(*grids)), policy({"window": 3, **rule}))
    assert row.reason == code.value and words in row.detail


def test_two_images_that_are_one_by_their_tokens_alone() -> None:
    """As many tokens as a larger image; only the ids tell, and they are asked at every call."""
    model, rules = Joint(), policy({"window": list(WINDOW), "stride": list(STRIDE)})
    run = compiled(model, rules)
    for grids in (TWO, [(12, 8)], [(6, 8), (6, 8)], [(8, 12)], [(8, 6), (6, 8)]):
        given = inputs(images(*grids))
        if grids in (TWO, [(6, 8), (6, 8)]):
            see = mask(TWO, [WINDOW, WINDOW])
        else:  # compiled for two images of 6 x 8: dense
            see = torch.ones(TEXT + 96, TEXT + 96, dtype=torch.bool)
        torch.testing.assert_close(run(*given), expected(model, given, [see] * HEADS))


@pytest.mark.parametrize("kv_heads", [6, 3])
def test_heads(kv_heads: int) -> None:
    model, given = Joint(kv_heads), inputs(images((6, 8)))
    other = (5, 3)
    rules = policy(
        {"heads": "0-1", "window": list(WINDOW), "stride": list(STRIDE)},
        {"heads": [4, "5-40"], "window": list(other), "stride": list(STRIDE)},
    )
    row = rows(model, given, rules)
    assert row.window == "0-1: 3x4; 2-3: full; 4-5: 5x3"
    masks = [mask([(6, 8)], [window]) for window in (WINDOW, None, other) for _ in range(2)]
    assert row.flop_share == pytest.approx(torch.stack(masks).float().mean().item())
    torch.testing.assert_close(compiled(model, rules)(*given), expected(model, given, masks))


def test_heads_of_several_grids_and_a_rule_for_the_rest() -> None:
    model, given = Joint(), inputs(images(*TWO))
    rules = policy(
        {"heads": 2, "dense": True},
        {"heads": "0-3", "window": list(WINDOW), "stride": list(STRIDE), "grids": "first"},
        {"window": list(WINDOW), "stride": list(STRIDE)},
    )
    assert (
        rows(model, given, rules).window
        == "0-1: 3x4 + full; 2: full; 3: 3x4 + full; 4-5: 3x4 + 3x4"
    )
    first, both, dense = ([WINDOW, None], [WINDOW, WINDOW], [None, None])
    windows: list[Any] = [first, first, dense, first, both, both]
    masks = [mask(TWO, own) for own in windows]
    torch.testing.assert_close(compiled(model, rules)(*given), expected(model, given, masks))


def test_rules_that_cannot_share_a_layer() -> None:
    given = inputs(images((6, 8)))
    low, high = {"heads": "0-2", "window": 3}, {"heads": "3-5", "window": 4}
    row = rows(Joint(3), given, policy(low, high))
    assert row.reason == Reason.HEADS.value and "multiples of 2" in row.detail
    row = rows(Joint(), given, policy(low, {**high, "between_grids": "none"}))
    assert row.reason == Reason.HEADS.value and "`between_grids` differ" in row.detail
    row = rows(Joint(), given, policy({"heads": "9-12", "window": 3}))
    assert row.reason == Reason.NO_RULE.value
    row = rows(Joint(), given, policy({"heads": "0-5", "dense": True}, {"window": 3}))
    assert row.reason == Reason.RULE_DENSE.value


def test_heads_without_a_rule_stay_dense_or_the_layer_does() -> None:
    """Nothing but a window may be taken from them."""
    given = inputs(images(*TWO))
    window: dict[str, Any] = {"heads": "0-2", "window": list(WINDOW), "stride": list(STRIDE)}
    for rest in ([], [{"dense": True}]):
        rules = policy({**window, "between_grids": "none"}, *rest)
        assert rows(Joint(), given, rules).reason == Reason.HEADS.value
        model, rules = Joint(), policy({**window, "between_grids": "aligned"}, *rest)
        see = mask(TWO, [WINDOW, WINDOW], "aligned")
        dense = torch.ones_like(see)
        actual = compiled(model, rules)(*given)
        torch.testing.assert_close(actual, expected(model, given, [see] * 3 + [dense] * 3))


def test_a_full_window_may_still_part_grids() -> None:
    model, given = Joint(), inputs(images(*TWO))
    rules = policy({"window": "full", "between_grids": "none"})
    see = mask(TWO, [None, None], "none")
    torch.testing.assert_close(
        compiled(model, rules)(*given), expected(model, given, [see] * HEADS)
    )


class FoldedHeads(nn.Module):
    """Attention whose heads are not all in dimension 1."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.patch, self.qkv = nn.Conv2d(3, WIDTH, 1), nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).mT
        q, k, v = (t.unflatten(2, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        shape = q.shape
        if self.how == "batch":
            q, k, v = (t.flatten(0, 1)[:, None] for t in (q, k, v))
        elif self.how == "three":
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        elif self.how == "half":
            q, k, v = (t.unflatten(1, (2, -1)).flatten(0, 1) for t in (q, k, v))
        elif self.how == "rows first":
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).reshape(shape)


@pytest.mark.parametrize("how", ["batch", "three", "half", "rows first"])
def test_rules_of_heads_want_heads(how: str) -> None:
    image = torch.randn(2, 3, 6, 8)
    row = rows(FoldedHeads(how), (image,), policy({"heads": 0, "window": 3}))
    assert (row.decision, row.reason) == ("dense", Reason.HEADS.value), row
    # Nor may a head that cannot be told apart get the rule of the others.
    row = rows(FoldedHeads(how), (image,), policy({"heads": 5, "dense": True}, {"window": 3}))
    assert row.reason == Reason.HEADS.value
    assert rows(FoldedHeads(how), (image,), policy({"window": 3})).decision == "gna"
    assert rows(FoldedHeads(""), (image,), policy({"heads": 0, "window": 3})).decision == "gna"


class TwoTables(Joint):
    """Text has places, too; `img_ids` are the image's."""

    def forward(self, text: Tensor, x: Tensor, img_ids: Tensor, txt_ids: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(text + self.place(txt_ids), x, img_ids)


def test_ids_of_text_that_place_it_later_are_noticed() -> None:
    model, rules = TwoTables(), policy({"window": list(WINDOW), "stride": list(STRIDE)})
    run = compiled(model, rules)
    text, x = torch.randn(1, 12, WIDTH), torch.randn(1, 48, WIDTH)
    ids = images((6, 8))
    plain = torch.compile(model, backend="eager")
    for txt_ids, is_rewritten in ((torch.zeros(12, 3), True), (flux_ids((3, 4)), False)):
        given = text, x, ids, txt_ids
        same = torch.allclose(run(*given), plain(*given), atol=1e-5)
        assert same is not is_rewritten


class Guided(nn.Module):
    """Rows of the batch are two inputs with ids of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.joint = Joint()

    def forward(self, one: Tensor, two: Tensor, img_ids: Tensor, cond_ids: Tensor) -> Tensor:
        places = torch.stack([img_ids, cond_ids])
        x = torch.cat([one, two]) + self.joint.place(places)
        return self.joint(x[:, :0], x, torch.zeros(len(img_ids), 3))


def test_ids_of_every_row_of_the_batch_are_checked() -> None:
    model, rules = Guided(), policy({"window": list(WINDOW), "stride": list(STRIDE)})
    one, two = torch.randn(2, 1, 48, WIDTH)
    same, other = flux_ids((6, 8)), flux_ids((4, 12))
    run, plain = compiled(model, rules), torch.compile(model, backend="eager")
    for ids in ((same, same), (same, other), (other, same)):
        dense = torch.allclose(run(one, two, *ids), plain(one, two, *ids), atol=1e-5)
        assert dense or ids == (same, same)


def test_rules_for_all_heads_alike_are_one_launch() -> None:
    rules = policy({"heads": "0-2", "window": 3}, {"heads": "3-5", "window": 3})
    assert rows(Joint(), inputs(images((6, 8))), rules).window == "3x3"


# Prepared models: what the inputs of a call show


SMALL: dict[str, Any] = {"min_tokens": 60, "key_mask": "global_tokens"}
HALVES = {"window": "1/2", "stride": 2}


def masked_run(model: nn.Module, given: dict[str, Any], layout: str) -> Tensor:
    """The model in eager mode with half of each grid's axes as window."""
    grids = [grid for grid in segments_of(layout) if not isinstance(grid, int)]
    windows = [tuple(max(n // 2, 1) for n in grid) for grid in grids]
    see = layout_mask(layout, windows, [tuple(min(2, n) for n in w) for w in windows])
    with masked(model, lambda call: see), torch.no_grad():
        return main_output(model(**given))


def test_a_prepared_model_block_by_block_follows_its_ids() -> None:
    built, plain = build("flux-kontext"), build("flux-kontext").model
    gna_compile.prepare(built.model, policy(HALVES, **SMALL))
    built.model.compile_repeated_blocks(backend="gna", options={"inner": "aot_eager"})  # type: ignore[operator]
    text = built.inputs["encoder_hidden_states"].shape[1]
    for grids in (TWO, [(6, 8), (8, 6)], [(12, 8)], [(4, 10), (6, 8), (5, 6)], TWO):
        ids = images(*grids)
        given = {**built.inputs, "img_ids": ids, "hidden_states": torch.randn(1, len(ids), 16)}
        layout = " + ".join([str(text), *(f"{h}x{w}" for h, w in grids)])
        with torch.no_grad():
            actual = main_output(built.model(**given))
        torch.testing.assert_close(actual, masked_run(plain, given, layout), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "layout",
    [
        {"layout": [{"text": 14}, {"grid": [8, 10]}, {"grid": [6, 5]}]},
        {"layout": [{"grid": [8, 10]}, {"grid": [6, 5]}], "global_tokens": "prefix"},
    ],
)
def test_declared_grids_follow_the_shapes_that_a_model_is_given(layout: dict[str, Any]) -> None:
    """Qwen-Image-Edit: the sizes of the image and of the reference are an argument."""
    built, plain = build("qwen-image"), build("qwen-image").model
    gna_compile.prepare(built.model, policy(HALVES, **SMALL, **layout))
    run = torch.compile(built.model, backend="gna", options={"inner": "aot_eager"})
    for image, reference in (((8, 10), (6, 5)), ((10, 8), (6, 5)), ((9, 6), (4, 8))):
        tokens = image[0] * image[1] + reference[0] * reference[1]
        given = {**built.inputs, "hidden_states": torch.randn(1, tokens, 16)}
        given["img_shapes"] = [[(1, *image), (1, *reference)]]
        words = "14 + {}x{} + {}x{}".format(*image, *reference)
        with torch.no_grad():
            actual = main_output(run(**given))
        torch.testing.assert_close(actual, masked_run(plain, given, words), rtol=1e-4, atol=1e-4)
    given["img_shapes"] = [[(1, *image)]]
    given["hidden_states"] = given["hidden_states"][:, : image[0] * image[1]]
    with torch.no_grad():
        torch.testing.assert_close(main_output(run(**given)), main_output(plain(**given)))


def test_a_declared_list_that_the_graph_contradicts() -> None:
    two = {"layout": [{"text": TEXT}, {"grid": [6, 8]}, {"grid": [6, 8]}]}
    given = inputs(images(*TWO))
    assert rows(Joint(), given, policy({"window": 3}, **two)).decision == "gna"
    row = rows(Joint(), inputs(images((8, 12))), policy({"window": 3}, **two))
    assert row.reason == Reason.LAYOUT_MISMATCH.value
    assert "declared is 5 + 6×8 + 6×8, the graph shows 5 + 8×12 (values of img_ids)" in row.detail
