"""Mutants of the kernels: each must be caught. README.md says how they are caught.

A mutation is an edit of the CUDA source. An edited kernel is compiled to PTX and takes the place of the
true one, the host code staying as it is; or the host code is edited, and the kernels stay.
`python -m ptx.mutations` prints README.md's table.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ptx import build, interpreter
from ptx.attention import ARCHITECTURES, Attention, library, library_of

FORWARD = "{name}/forward.cuh"
SHARED = "cuda/"
HOST = SHARED + "host.cu"


@dataclass(frozen=True)
class Mutation:
    """One edit.

    Attributes:
        kernel: sm90 or sm100.
        bug: what it does, in words.
        file: under csrc.
        old: text that occurs there.
        new: what replaces it.
        problem: of PROBLEMS.
    """

    kernel: str
    bug: str
    file: str
    old: str
    new: str
    problem: str = "plain"

    @property
    def name(self) -> str:
        return f"{self.kernel}: {self.bug}"


def _plain(kernel: str) -> Attention:
    log2 = 4 if kernel == "sm100" else 3
    return Attention([(20, 9, 1, 1, False, log2, 3), (24, 17, 1, 1, False, 4, 4)])


def _wide(kernel: str) -> Attention:
    """More key tiles for a query tile than there are stages."""
    return Attention([(800, 800, 1, 1, False, 8 if kernel == "sm100" else 7, 7)])


def _globals(kernel: str) -> Attention:
    log2 = 4 if kernel == "sm100" else 3
    axes = [(20, 5, 1, 1, False, log2, 3), (24, 17, 1, 1, False, 4, 4)]
    return Attention(axes, prefix=3, suffix=2, masks_keys=True)


def _long(kernel: str) -> Attention:
    """Causal, so that halves of a query tile skip key tiles; scores that grow."""
    return Attention([(700, 400, 1, 1, True, 8 if kernel == "sm100" else 7, 7)], scale=3.0)


def _skewed(kernel: str) -> Attention:
    """Causal on a grid: halves skip tiles, and what they see of others is masked by a product."""
    log2 = 5 if kernel == "sm100" else 4
    return Attention([(48, 40, 1, 1, True, log2, 3), (24, 9, 1, 1, False, 3, 4)], scale=1.0)


def _steep(kernel: str) -> Attention:
    """Scores of which some exceed all before by more than a weight can hold."""
    return Attention([(700, 400, 1, 1, False, 8 if kernel == "sm100" else 7, 7)], scale=12.0)


def _careful(kernel: str) -> Attention:
    attention = _plain(kernel)
    attention.poison["value"] = [((0, 0, 100, 3), float("nan")), ((0, 0, 300, 40), float("inf"))]
    return attention


PROBLEMS: dict[str, Callable[[str], Attention]] = {
    "plain": _plain,
    "wide": _wide,
    "globals": _globals,
    "long": _long,
    "skewed": _skewed,
    "steep": _steep,
    "careful": _careful,
}


def _sm90(bug: str, file: str, old: str, new: str, **rest: object) -> Mutation:
    return Mutation("sm90", bug, file.format(name="sm90"), old, new, **rest)  # type: ignore[arg-type]


def _sm100(bug: str, file: str, old: str, new: str, **rest: object) -> Mutation:
    return Mutation("sm100", bug, file.format(name="sm100"), old, new, **rest)  # type: ignore[arg-type]


MUTATIONS = [
    _sm90(
        "keys are not released after the scores of a tile",
        FORWARD,
        "matrix_wait<1>();\n          pin(scores);\n          release(keys.empty + key.stage());",
        "matrix_wait<1>();\n          pin(scores);",
    ),
    _sm90(
        "keys are released before the scores are there",
        FORWARD,
        "matrix_wait<1>();\n          pin(scores);\n          release(keys.empty + key.stage());",
        "release(keys.empty + key.stage());\n          matrix_wait<1>();\n          pin(scores);",
        problem="wide",
    ),
    _sm90(
        "values are released before the output is there",
        FORWARD,
        "matrix_wait<0>();\n          pin(output);\n          pin(weights);\n"
        "          if (takes_turn && passes_late) pass_turn(half);\n"
        "          release(values.empty + value.stage());",
        "release(values.empty + value.stage());\n          matrix_wait<0>();\n"
        "          pin(output);\n          pin(weights);\n"
        "          if (takes_turn && passes_late) pass_turn(half);",
    ),
    _sm90(
        "the loader of values waits for the other parity",
        FORWARD,
        "wait(values.empty + value.stage(), value.phase() ^ 1);",
        "wait(values.empty + value.stage(), value.phase());",
    ),
    _sm90(
        "the loader of keys does not wait for a free stage",
        FORWARD,
        "        wait(keys.empty + key.stage(), key.phase() ^ 1);\n",
        "",
        problem="wide",
    ),
    _sm90(
        "nobody waits for keys",
        FORWARD,
        "    wait(keys.full + key.stage(), key.phase());\n",
        "",
    ),
    _sm90(
        "values are not awaited in the loop",
        FORWARD,
        "          wait(values.full + value.stage(), value.phase());\n"
        "          start_output(output, weights, value.stage());\n          if (takes",
        "          start_output(output, weights, value.stage());\n          if (takes",
    ),
    _sm90(
        "the query is given back before its last scores",
        FORWARD,
        "        start_scores(scores, half, key.stage(), hides, operands);\n"
        "        if (takes_turn) pass_turn(half);\n        ended = tile.flags & last_tile;",
        "        ended = tile.flags & last_tile;\n        if (ended) release(queries.empty);\n"
        "        start_scores(scores, half, key.stage(), hides, operands);\n"
        "        if (takes_turn) pass_turn(half);",
        problem="long",
    ),
    _sm90(
        "a half that skips a tile does not release its values",
        FORWARD,
        "          release(values.empty + key.stage());\n          key.advance();",
        "          key.advance();",
        problem="long",
    ),
    _sm90(
        "a half takes its turn with a tile that the other skips",
        FORWARD,
        "          takes_turn = !(tile.flags & other_skip);",
        "          takes_turn = true;",
        problem="skewed",
    ),
    _sm90(
        "no proxy fence before the output is stored",
        FORWARD,
        "    fence_shared_for_copies();\n    named_sync<128>(3 + half);",
        "    named_sync<128>(3 + half);",
    ),
    _sm90(
        "no barrier before the output is stored",
        FORWARD,
        "    fence_shared_for_copies();\n    named_sync<128>(3 + half);",
        "    fence_shared_for_copies();",
    ),
    _sm90(
        "the output overwrites what is still being stored",
        FORWARD,
        "    if (thread == 0) wait_stores_read();\n    named_sync<128>(3 + half);",
        "    named_sync<128>(3 + half);",
    ),
    _sm90(
        "the block ends while its output is being stored",
        FORWARD,
        "    if (thread == 0) wait_stores_read();\n  }",
        "  }",
    ),
    _sm90(
        "no wgmma.fence before the output's products",
        FORWARD,
        "    pin(weights);\n    matrix_fence();",
        "    pin(weights);",
    ),
    _sm90(
        "scores are read before they are there",
        FORWARD,
        "        matrix_wait<0>();\n        pin(scores);\n        release(keys.empty + key.stage());\n"
        "        if (ended) release(queries.empty);\n        if (tile",
        "        pin(scores);\n        release(keys.empty + key.stage());\n"
        "        if (ended) release(queries.empty);\n        if (tile",
    ),
    _sm90(
        "the coordinates of keys are not shown to the tensor core",
        FORWARD,
        "      fence_shared_for_copies();\n    }\n    __syncthreads();",
        "    }\n    __syncthreads();",
    ),
    _sm90(
        "masks end after their first step",
        FORWARD,
        "if (parameters.key_coordinates.steps == 2)",
        "if (parameters.key_coordinates.steps == 3)",
    ),
    _sm90(
        "a mask is that of the tile after",
        FORWARD,
        "find_hidden(parameters, rows, tile, masked_axes(tile, shift), hidden);\n"
        "        hidden_operands(hidden, operands);\n        if (takes_turn) await_turn(half);",
        "if (takes_turn) await_turn(half);",
    ),
    _sm90(
        "masks are written while the tensor core reads them",
        FORWARD,
        "            find_hidden(parameters, rows, next, masked_axes(next, shift), hidden);\n",
        "            find_hidden(parameters, rows, next, masked_axes(next, shift), hidden);\n"
        "            hidden_operands(hidden, operands);\n",
    ),
    _sm90(
        "masks by words are forgotten",
        FORWARD,
        "if (flags & by_words) flags |= words_masked;",
        "",
        problem="globals",
    ),
    _sm90(
        "a warp that must raise its offsets leaves the loop alone",
        FORWARD,
        "          if (raises) {\n            raise_and_weigh(",
        "          if (raises) break;\n          if (raises) {\n            raise_and_weigh(",
        problem="steep",
    ),
    _sm90(
        "rows that have seen nothing yet are taken to have an offset",
        FORWARD,
        "bool settled = have_offsets(rows);",
        "bool settled = true;",
        problem="skewed",
    ),
    _sm90(
        "what hides is infinite itself, so that nothing times it is NaN",
        "include/gna/coordinate_mask.h",
        "hidden_element = 0xff7f",
        "hidden_element = 0xff80",
    ),
    _sm90(
        "large weights are not turned back into scores",
        FORWARD,
        "if (raises) unweigh(scores);",
        "",
        problem="long",
    ),
    _sm90(
        "the tensor core steps through a row by 16 bytes",
        FORWARD,
        "k % 4 * 32) >> 4",
        "k % 4 * 16) >> 4",
    ),
    _sm90(
        "the output is swizzled otherwise than its map",
        FORWARD,
        "(n % 8 + lane / 16) ^ (at % 8)",
        "(n % 8 + lane / 16) ^ (at % 4)",
    ),
    _sm90(
        "one arrival too few is expected for work records",
        FORWARD,
        "barrier_init(works.empty + slot, computing_warps + 2)",
        "barrier_init(works.empty + slot, computing_warps + 1)",
    ),
    _sm90(
        "barriers are not shown to TMA",
        FORWARD,
        "    barrier_init_fence();\n",
        "",
        problem="careful",
    ),
    _sm90(
        "barriers are used before they are known",
        FORWARD,
        "    __syncthreads();\n    if (threadIdx.x < 128)",
        "    if (threadIdx.x < 128)",
    ),
    _sm90(
        "more registers than an SM has",
        FORWARD,
        "take_registers<232>();",
        "take_registers<240>();",
    ),
    _sm90(
        "a box starts one key further",
        SHARED + "tma.cuh",
        "token_of(query.axes[2], tile.at[2])",
        "token_of(query.axes[2], tile.at[2] + 1)",
    ),
    _sm90(
        "no bytes are expected",
        SHARED + "tma.cuh",
        "arrive_expecting(full, bytes);",
        "arrive(full);",
    ),
    _sm90(
        "too many bytes are expected",
        SHARED + "tma.cuh",
        "arrive_expecting(full, bytes);",
        "arrive_expecting(full, bytes + 16);",
    ),
    _sm90(
        "work records are handed on before all lanes have written",
        SHARED + "tile_scheduler.cuh",
        "  __syncwarp();\n  return true;",
        "  return true;",
    ),
    _sm90(
        "values without what is not finite are not shown to the tensor core",
        SHARED + "nonfinite.cuh",
        "  fence_shared_for_copies();\n  return found;",
        "  return found;",
        problem="careful",
    ),
    _sm90(
        "boxes are described with another swizzle",
        HOST,
        "CU_TENSOR_MAP_SWIZZLE_128B",
        "CU_TENSOR_MAP_SWIZZLE_64B",
    ),
    _sm90(
        "boxes are described one token too long",
        HOST,
        "box[a + 1] = view.extents[a] * steps[a + 1];",
        "box[a + 1] = view.extents[a] * steps[a + 1] + (a == 0);",
    ),
    _sm90(
        "the part after the grid begins one token early",
        HOST,
        "part == prefix_part ? 0 : problem.prefix + inner",
        "part == prefix_part ? 0 : problem.prefix + inner - 1",
        problem="globals",
    ),
    _sm90(
        "the map of the grid ends one row late",
        HOST,
        "grid.lengths[a] = axis.length;",
        "grid.lengths[a] = axis.length + (a == 1);",
    ),
    _sm90(
        "two query tiles store the same rows",
        SHARED + "tile_scheduler.cuh",
        "index += gridDim.x) {",
        "index += gridDim.x - (index == 3)) {",
    ),
    _sm100(
        "boxes are described with another swizzle",
        HOST,
        "CU_TENSOR_MAP_SWIZZLE_128B",
        "CU_TENSOR_MAP_SWIZZLE_64B",
    ),
    _sm100(
        "scores are read without a fence after the barrier",
        FORWARD,
        "        step.advance();\n        after_barrier();",
        "        step.advance();",
    ),
    _sm100(
        "weights are announced without a fence before the barrier",
        FORWARD,
        "      wait_stores();\n      before_barrier();",
        "      wait_stores();",
    ),
    _sm100(
        "weights are announced before they are there",
        FORWARD,
        "      wait_stores();\n      before_barrier();",
        "      before_barrier();",
    ),
    _sm100(
        "the last weights are not awaited",
        FORWARD,
        "        wait(shared.last_weights_full + index, half.steps & 1);\n",
        "",
    ),
    _sm100(
        "weights are read from the wrong columns",
        FORWARD,
        "half.scores + 8 * k",
        "half.scores + 16 * k",
    ),
    _sm100(
        "a stage of values is given back before the second half has used it",
        FORWARD,
        "        end_tile(flags, 1);\n        arrive_when_done(shared.tiles_empty + values.stage());",
        "        arrive_when_done(shared.tiles_empty + values.stage());\n        end_tile(flags, 1);",
        problem="wide",
    ),
    _sm100(
        "a stage of keys is given back before the second half has used it",
        FORWARD,
        "      start_tile(next, 1);\n      arrive_when_done(shared.tiles_empty + keys.stage());",
        "      arrive_when_done(shared.tiles_empty + keys.stage());\n      start_tile(next, 1);",
        problem="wide",
    ),
    _sm100(
        "an output is begun while the one before is still being read",
        FORWARD,
        "      if (state.fresh) wait(shared.output_empty + half, item.phase() ^ 1);\n",
        "",
    ),
    _sm100(
        "tensor memory is not freed",
        FORWARD,
        "      free_tensor_memory<tensor_columns>(tensor_memory);\n",
        "",
    ),
    _sm100(
        "tensor memory is freed while the last output is being read",
        FORWARD,
        "    for (int half = 0; half < 2; ++half) wait(shared.output_empty + half, item.phase() ^ 1);\n",
        "",
    ),
    _sm100(
        "scores add to what was there",
        FORWARD,
        "product_of<Element, key_rows, false>,\n               k > 0);",
        "product_of<Element, key_rows, false>,\n               true);",
    ),
    _sm100(
        "scores are announced to the other half",
        FORWARD,
        "arrive_when_done(shared.scores_full + half);",
        "arrive_when_done(shared.scores_full + (half ^ 1));",
    ),
    _sm100(
        "every warp reads the lanes of the first",
        FORWARD,
        "    const uint32_t lanes = tensor_memory + (row / 32 * 32 << 16);",
        "    const uint32_t lanes = tensor_memory;",
    ),
    _sm100(
        "values are taken for rows along the sum",
        FORWARD,
        "product_of<Element, head_dim, true>",
        "product_of<Element, head_dim, false>",
    ),
    _sm100(
        "the descriptor lacks its version",
        "{name}/ptx.cuh",
        "2u << 29 | 1u << 14 | 1024 >> 4",
        "2u << 29 | 1024 >> 4",
    ),
    _sm100(
        "the descriptor names another swizzle",
        "{name}/ptx.cuh",
        "2u << 29 | 1u << 14 | 1024 >> 4",
        "4u << 29 | 1u << 14 | 1024 >> 4",
    ),
    _sm100(
        "loaded scores are used before they are there",
        FORWARD,
        "          wait_loads(scores);\n",
        "",
    ),
    _sm100(
        "a corrected output is not awaited",
        FORWARD,
        "      wait_loads(part);\n#pragma unroll\n      for (float& x : part) x *= by;",
        "#pragma unroll\n      for (float& x : part) x *= by;",
        problem="long",
    ),
    _sm100(
        "key records are not given back",
        FORWARD,
        "    release(shared.records_empty + record.stage());\n",
        "",
    ),
    _sm100(
        "key records are overwritten unread",
        FORWARD,
        "      wait(shared.records_empty + record.stage(), record.phase() ^ 1);\n",
        "",
        problem="wide",
    ),
    _sm100(
        "queries are not given back",
        FORWARD,
        "      if (takes_new_query) arrive_when_done(&shared.query_empty);\n",
        "",
    ),
    _sm100(
        "statistics are overwritten unread",
        FORWARD,
        "      wait(shared.statistics_empty + half, item.phase() ^ 1);\n",
        "",
    ),
    _sm100(
        "no proxy fence before the output is stored",
        FORWARD,
        "        fence_shared_for_copies();\n        named_sync<128>(1);",
        "        named_sync<128>(1);",
    ),
    _sm100(
        "the output overwrites what is still being stored",
        FORWARD,
        "wait_stores_read<Shape::staged_boxes - 1>()",
        "wait_stores_read<Shape::staged_boxes>()",
    ),
    _sm100(
        "the output is given back without a fence",
        FORWARD,
        "    before_barrier();\n    __syncwarp();\n    release(shared.output_empty + half);",
        "    __syncwarp();\n    release(shared.output_empty + half);",
    ),
    _sm100(
        "one arrival too few is expected for weights",
        FORWARD,
        "init(shared.weights_full, 2, soften_warps / 2)",
        "init(shared.weights_full, 2, soften_warps / 2 - 1)",
    ),
    _sm100(
        "halves store to each other's rows",
        FORWARD,
        "          place_of_rows(problem, work, half * half_rows, at);\n          store_box",
        "          place_of_rows(problem, work, (half ^ 1) * half_rows, at);\n          store_box",
    ),
    _sm100(
        "values are cleaned before they are there",
        FORWARD,
        "      wait(&shared.values_full, tiles & 1);\n",
        "",
        problem="careful",
    ),
    _sm100(
        "more registers than an SM has",
        FORWARD,
        "take_registers<Shape::soften_registers>();",
        "take_registers<Shape::soften_registers + 8>();",
    ),
]


@contextmanager
def _edited(mutation: Mutation) -> Iterator[Path]:
    """A copy of csrc with the edit.

    Raises:
        ValueError: the source does not hold what the edit replaces.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "csrc"
        for part in ("include", "cuda", mutation.kernel):
            shutil.copytree(build.ROOT / "csrc" / part, copy / part)
        file = copy / mutation.file
        text = file.read_text()
        if mutation.old not in text:
            raise ValueError(f"{mutation.name}: {mutation.file} has changed; this edit is void")
        file.write_text(text.replace(mutation.old, mutation.new, 1))
        yield copy


def _ptx_of(kernel: str, csrc: Path) -> str:
    """For bf16 and heads of 64."""
    made = csrc / "kernel.ptx"
    flags = [flag for flag in build.NVCC_FLAGS if flag != "--no-compress"]
    flags += [f"-arch={ARCHITECTURES[kernel][0]}", f"-I{csrc / 'include'}"]
    source = csrc / kernel / "kernels" / "bf16_64.cu"
    command = [str(build.NVCC), "-ptx", *flags, str(source), "-o", str(made)]
    subprocess.run(command, check=True, capture_output=True)
    return made.read_text()


@contextmanager
def planted(mutation: Mutation) -> Iterator[interpreter.Library]:
    """The kernel's library with the bug in it."""
    with _edited(mutation) as csrc:
        if mutation.file == HOST:
            yield library_of(mutation.kernel, csrc)
            return
        text = _ptx_of(mutation.kernel, csrc)
    loaded = library(mutation.kernel)
    kernel = f"7forwardINS_{len(mutation.kernel)}{mutation.kernel}6KernelE13__nv_bfloat16Li64E"
    original = loaded.text(kernel)
    loaded.replace_text(kernel, text)
    try:
        yield loaded
    finally:
        loaded.replace_text(kernel, original)


def caught(mutation: Mutation, schedules: int = 24) -> str | None:
    """What catches a mutation, with the schedule that does; None if nothing does.

    A kernel that is right only because a careful launch follows stores its output twice.
    """
    attention = PROBLEMS[mutation.problem](mutation.kernel)
    stores = _stores(mutation.kernel, mutation.problem)
    with planted(mutation) as loaded:
        for schedule in range(schedules):
            try:
                counted = attention.check(mutation.kernel, schedule=schedule, loaded=loaded)
            except interpreter.PtxError as error:
                return f"schedule {schedule}: {str(error).splitlines()[0]}"
            except AssertionError as error:
                return f"schedule {schedule}: wrong result {str(error)[:60]}"
            if counted.stores != stores:
                return f"schedule {schedule}: its work is done again"
    return None


@lru_cache
def _stores(kernel: str, problem: str) -> int:
    return PROBLEMS[problem](kernel).check(kernel).stores


def _in_brief(how: str) -> str:
    """An error without its numbers and operands."""
    if "wrong result" in how:
        return "wrong result"
    if "done again" in how:
        return "the careful kernel does its work again"
    text = how.split(": launching the kernel: ")[-1]
    where = re.match(
        r"(?:warp \d+, line \d+, (?:@ ?!? ?%\w+ )?|what line \d+, )([\w.:]+).*?: (?=[\da-zD%])",
        text,
    )
    if where:
        parts = where[1].split(".")
        opcode = ".".join(parts[: 4 if parts[0] == "cp" else 2])
        text = f"`{opcode}` {text[where.end() :]}"
    text = re.sub(r"thread \d+ exits", "a thread exits", text)
    text = re.sub(r"%\w+", "a register", text)
    text = re.sub(
        r" \(line \d+\)| of warp \d+| at (0x[\da-f]+|\d+)| \(a wait, fences, a barrier\)", "", text
    )
    return re.sub(r"(byte|lane|column|line|thread|warp) (0x[\da-f]+|\d+)", r"a \1", text)


def main() -> None:
    print("| kernel | bug | found as |\n|---|---|---|")
    for mutation in MUTATIONS:
        how = caught(mutation)
        print(f"| {mutation.kernel} | {mutation.bug} | {_in_brief(how) if how else 'NOT CAUGHT'} |")


if __name__ == "__main__":
    main()
