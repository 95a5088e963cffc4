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

MAINLOOP = "{name}/mainloop.cuh"
EPILOGUE = "{name}/epilogue.cuh"
KERNEL = "{name}/kernel.cuh"
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


def _some_globals(kernel: str) -> Attention:
    """Of the query tiles of global tokens, the first and the last are not asked for."""
    tile = 256 if kernel == "sm100" else 128
    axes = [(8, 5, 1, 1, False, 4 if kernel == "sm100" else 3, 3), (16, 9, 1, 1, False, 4, 4)]
    attention = Attention(axes, prefix=2 * tile + 44, suffix=tile + 20, batch=2)
    attention.global_queries = range(tile + 2, attention.prefix + 1)
    return attention


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


def _fallback(kernel: str) -> Attention:
    attention = _plain(kernel)
    attention.poison["value"] = [((0, 0, 100, 3), float("nan")), ((0, 0, 300, 40), float("inf"))]
    return attention


PROBLEMS: dict[str, Callable[[str], Attention]] = {
    "plain": _plain,
    "wide": _wide,
    "globals": _globals,
    "some globals": _some_globals,
    "long": _long,
    "skewed": _skewed,
    "steep": _steep,
    "fallback": _fallback,
}


def _sm90(bug: str, file: str, old: str, new: str, **rest: object) -> Mutation:
    return Mutation("sm90", bug, file.format(name="sm90"), old, new, **rest)  # type: ignore[arg-type]


def _sm100(bug: str, file: str, old: str, new: str, **rest: object) -> Mutation:
    return Mutation("sm100", bug, file.format(name="sm100"), old, new, **rest)  # type: ignore[arg-type]


MUTATIONS = [
    _sm90(
        "keys are not released after the scores of a tile",
        MAINLOOP,
        "wgmma_wait<1>();\n          warpgroup_fence_operand(scores);\n          k.consumer_release(key);",
        "wgmma_wait<1>();\n          warpgroup_fence_operand(scores);",
    ),
    _sm90(
        "keys are released before the scores are there",
        MAINLOOP,
        "wgmma_wait<1>();\n          warpgroup_fence_operand(scores);\n          k.consumer_release(key);",
        "k.consumer_release(key);\n          wgmma_wait<1>();\n          warpgroup_fence_operand(scores);",
        problem="wide",
    ),
    _sm90(
        "values are released before the output is there",
        MAINLOOP,
        "wgmma_wait<0>();\n          warpgroup_fence_operand(output);\n          warpgroup_fence_operand(probs);\n"
        "          if (takes_turn && turn_ends_late) warp_scheduler_barrier_arrive(half);\n"
        "          v.consumer_release(value);",
        "v.consumer_release(value);\n          wgmma_wait<0>();\n"
        "          warpgroup_fence_operand(output);\n          warpgroup_fence_operand(probs);\n"
        "          if (takes_turn && turn_ends_late) warp_scheduler_barrier_arrive(half);",
    ),
    _sm90(
        "the loader of values waits for the other parity",
        MAINLOOP,
        "v.producer_acquire(value);",
        "mbarrier_wait(v.empty + value.index(), value.phase());",
    ),
    _sm90(
        "the loader of keys does not wait for a free stage",
        MAINLOOP,
        "        k.producer_acquire(key);\n",
        "",
        problem="wide",
    ),
    _sm90(
        "nobody waits for keys",
        MAINLOOP,
        "    k.consumer_wait(key);\n",
        "",
    ),
    _sm90(
        "values are not awaited in the loop",
        MAINLOOP,
        "          v.consumer_wait(value);\n"
        "          issue_pv(output, probs, value.index());\n          if (takes",
        "          issue_pv(output, probs, value.index());\n          if (takes",
    ),
    _sm90(
        "the query is released before its last scores",
        MAINLOOP,
        "        issue_qk(scores, half, key.index(), is_masked, mask);\n"
        "        if (takes_turn) warp_scheduler_barrier_arrive(half);\n        is_last = tile.flags & last_tile;",
        "        is_last = tile.flags & last_tile;\n        if (is_last) q.consumer_release(query);\n"
        "        issue_qk(scores, half, key.index(), is_masked, mask);\n"
        "        if (takes_turn) warp_scheduler_barrier_arrive(half);",
        problem="long",
    ),
    _sm90(
        "a half that skips a tile does not release its values",
        MAINLOOP,
        "          v.consumer_release(key);\n          key.advance();",
        "          key.advance();",
        problem="long",
    ),
    _sm90(
        "a half takes its turn with a tile that the other skips",
        MAINLOOP,
        "          takes_turn = !(tile.flags & skipped_there);",
        "          takes_turn = true;",
        problem="skewed",
    ),
    _sm90(
        "no proxy fence before the output is stored",
        EPILOGUE,
        "  fence_proxy_async();\n  named_barrier_sync<consumer_threads>(epilogue_barrier + half);",
        "  named_barrier_sync<consumer_threads>(epilogue_barrier + half);",
    ),
    _sm90(
        "no barrier before the output is stored",
        EPILOGUE,
        "  fence_proxy_async();\n  named_barrier_sync<consumer_threads>(epilogue_barrier + half);",
        "  fence_proxy_async();",
    ),
    _sm90(
        "the output overwrites what is still being stored",
        EPILOGUE,
        "  if (thread == 0) tma_store_wait_read();\n  named_barrier_sync<consumer_threads>(epilogue_barrier + half);",
        "  named_barrier_sync<consumer_threads>(epilogue_barrier + half);",
    ),
    _sm90(
        "the block ends while its output is being stored",
        MAINLOOP,
        "    if (thread == 0) tma_store_wait_read();\n  }",
        "  }",
    ),
    _sm90(
        "no wgmma.fence before the output's products",
        MAINLOOP,
        "    warpgroup_fence_operand(probs);\n    wgmma_fence();",
        "    warpgroup_fence_operand(probs);",
    ),
    _sm90(
        "scores are read before they are there",
        MAINLOOP,
        "        wgmma_wait<0>();\n        warpgroup_fence_operand(scores);\n        k.consumer_release(key);\n"
        "        if (is_last) q.consumer_release(query);\n        if (tile",
        "        warpgroup_fence_operand(scores);\n        k.consumer_release(key);\n"
        "        if (is_last) q.consumer_release(query);\n        if (tile",
    ),
    _sm90(
        "the coordinates of keys are not shown to the tensor core",
        KERNEL,
        "      fence_proxy_async();\n    }\n    __syncthreads();",
        "    }\n    __syncthreads();",
    ),
    _sm90(
        "masks end after their first step",
        MAINLOOP,
        "if (params.key_coordinates.steps == 2)",
        "if (params.key_coordinates.steps == 3)",
    ),
    _sm90(
        "a mask is that of the tile after",
        MAINLOOP,
        "find_masked_coordinates(params, attended, tile, masked_axes(tile.flags, half), masked);\n"
        "        make_mask_operand(masked, mask);\n        if (takes_turn) warp_scheduler_barrier_sync(half);",
        "if (takes_turn) warp_scheduler_barrier_sync(half);",
    ),
    _sm90(
        "masks are written while the tensor core reads them",
        MAINLOOP,
        "            find_masked_coordinates(params, attended, next, masked_axes(next.flags, half), masked);\n",
        "            find_masked_coordinates(params, attended, next, masked_axes(next.flags, half), masked);\n"
        "            make_mask_operand(masked, mask);\n",
    ),
    _sm90(
        "bitmasks are forgotten",
        MAINLOOP,
        "if (flags & need_bitmask) flags |= needs_bitmask;",
        "",
        problem="globals",
    ),
    _sm90(
        "a warp that must update its row maxima leaves the loop alone",
        MAINLOOP,
        "          if (updates) {\n            update_row_max_and_exp2<",
        "          if (updates) break;\n          if (updates) {\n            update_row_max_and_exp2<",
        problem="steep",
    ),
    _sm90(
        "rows without a score so far are taken to have a row max",
        MAINLOOP,
        "bool has_row_max = all_have_row_max(softmax);",
        "bool has_row_max = true;",
        problem="skewed",
    ),
    _sm90(
        "the mask's element is infinite itself, so that nothing times it is NaN",
        "include/gna/coordinate_mask.h",
        "masked_element = 0xff7f",
        "masked_element = 0xff80",
    ),
    _sm90(
        "scores are not recovered from large probabilities",
        MAINLOOP,
        "if (updates) recover_scores(scores);",
        "",
        problem="long",
    ),
    _sm90(
        "the tensor core steps through a row by 16 bytes",
        MAINLOOP,
        "i % 4 * 32) >> 4",
        "i % 4 * 16) >> 4",
    ),
    _sm90(
        "the output is swizzled otherwise than its map",
        EPILOGUE,
        "(n % 8 + lane / 16) ^ (at % 8)",
        "(n % 8 + lane / 16) ^ (at % 4)",
    ),
    _sm90(
        "one arrival too few is expected for work tiles",
        MAINLOOP,
        "work_pipeline.init(1, consumer_warps + 2)",
        "work_pipeline.init(1, consumer_warps + 1)",
    ),
    _sm90(
        "barriers are not shown to TMA",
        MAINLOOP,
        "    fence_mbarrier_init();\n",
        "",
        problem="fallback",
    ),
    _sm90(
        "barriers are used before they are known",
        KERNEL,
        "    __syncthreads();\n    if (threadIdx.x < producer_threads)",
        "    if (threadIdx.x < producer_threads)",
    ),
    _sm90(
        "more registers than an SM has",
        KERNEL,
        "reg_alloc<consumer_registers>();",
        "reg_alloc<consumer_registers + 8>();",
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
        "mbarrier_arrive_and_expect_tx(full, bytes);",
        "mbarrier_arrive(full);",
    ),
    _sm90(
        "too many bytes are expected",
        SHARED + "tma.cuh",
        "mbarrier_arrive_and_expect_tx(full, bytes);",
        "mbarrier_arrive_and_expect_tx(full, bytes + 16);",
    ),
    _sm90(
        "work tiles are handed on before all lanes have written",
        SHARED + "tile_scheduler.cuh",
        "  __syncwarp();\n  return true;",
        "  return true;",
    ),
    _sm90(
        "values without what is not finite are not shown to the tensor core",
        SHARED + "nonfinite.cuh",
        "  fence_proxy_async();\n  return found;",
        "  return found;",
        problem="fallback",
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
        "the range of global queries ends one early",
        HOST,
        "{plain.global_begin, plain.global_end}",
        "{plain.global_begin, plain.global_end - 1}",
        problem="some globals",
    ),
    _sm90(
        "the tiles of global queries start with the first",
        SHARED + "tile_scheduler.cuh",
        "(global ? params.global_tiles.begin : first_of_grid)",
        "(global ? 0 : first_of_grid)",
        problem="some globals",
    ),
    _sm90(
        "the grid's tiles follow those of the global queries that are asked for",
        SHARED + "tile_scheduler.cuh",
        "(global ? params.global_tiles.begin : first_of_grid)",
        "(global ? params.global_tiles.begin : globals)",
        problem="some globals",
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
        MAINLOOP,
        "        step.advance();\n        tcgen05_after_thread_sync();",
        "        step.advance();",
    ),
    _sm100(
        "P is announced without a fence before the barrier",
        MAINLOOP,
        "      tmem_wait_store();\n      tcgen05_before_thread_sync();",
        "      tmem_wait_store();",
    ),
    _sm100(
        "P is announced before it is there",
        MAINLOOP,
        "      tmem_wait_store();\n      tcgen05_before_thread_sync();",
        "      tcgen05_before_thread_sync();",
    ),
    _sm100(
        "the last quarter of P is not awaited",
        MAINLOOP,
        "        mbarrier_wait(shared.last_probs_full + index, half.steps & 1);\n",
        "",
    ),
    _sm100(
        "P is read from the wrong columns",
        MAINLOOP,
        "half.scores + 8 * k",
        "half.scores + 16 * k",
    ),
    _sm100(
        "a stage of values is released before the second half has used it",
        MAINLOOP,
        "        end_tile(flags, 1);\n        tcgen05_commit(kv.empty + values.index());",
        "        tcgen05_commit(kv.empty + values.index());\n        end_tile(flags, 1);",
        problem="wide",
    ),
    _sm100(
        "a stage of keys is released before the second half has used it",
        MAINLOOP,
        "      start_tile(next, 1);\n      tcgen05_commit(kv.empty + keys.index());",
        "      tcgen05_commit(kv.empty + keys.index());\n      start_tile(next, 1);",
        problem="wide",
    ),
    _sm100(
        "an output is begun while the one before is still being read",
        MAINLOOP,
        "      if (state.fresh) mbarrier_wait(shared.output_empty + half, work_tile.phase() ^ 1);\n",
        "",
    ),
    _sm100(
        "tensor memory is not freed",
        KERNEL,
        "      tmem_free<tmem_columns>(tmem);\n",
        "",
    ),
    _sm100(
        "tensor memory is freed while the last output is being read",
        MAINLOOP,
        "    for (int half = 0; half < 2; ++half)\n      mbarrier_wait(shared.output_empty + half, work_tile.phase() ^ 1);\n",
        "",
    ),
    _sm100(
        "scores add to what was there",
        MAINLOOP,
        "instruction_descriptor<Element, tile_n, false>, k > 0);",
        "instruction_descriptor<Element, tile_n, false>, true);",
    ),
    _sm100(
        "scores are announced to the other half",
        MAINLOOP,
        "tcgen05_commit(shared.scores_full + half);",
        "tcgen05_commit(shared.scores_full + (half ^ 1));",
    ),
    _sm100(
        "every warp reads the lanes of the first",
        MAINLOOP,
        "    const uint32_t lanes = tmem + (row / 32 * 32 << 16);",
        "    const uint32_t lanes = tmem;",
    ),
    _sm100(
        "values are taken for rows along the sum",
        MAINLOOP,
        "instruction_descriptor<Element, head_dim, true>",
        "instruction_descriptor<Element, head_dim, false>",
    ),
    _sm100(
        "the descriptor lacks its version",
        "{name}/tcgen05.cuh",
        "2u << 29 | 1u << 14 | 1024 >> 4",
        "2u << 29 | 1024 >> 4",
    ),
    _sm100(
        "the descriptor names another swizzle",
        "{name}/tcgen05.cuh",
        "2u << 29 | 1u << 14 | 1024 >> 4",
        "4u << 29 | 1u << 14 | 1024 >> 4",
    ),
    _sm100(
        "loaded scores are used before they are there",
        MAINLOOP,
        "          tmem_wait_load(scores);\n",
        "",
    ),
    _sm100(
        "a rescaled output is not awaited",
        MAINLOOP,
        "      tmem_wait_load(part);\n#pragma unroll\n      for (float& x : part) x *= by;",
        "#pragma unroll\n      for (float& x : part) x *= by;",
        problem="long",
    ),
    _sm100(
        "key tile infos are not released",
        MAINLOOP,
        "    key_tile_info.consumer_release(key_tile);\n",
        "",
    ),
    _sm100(
        "key tile infos are overwritten unread",
        MAINLOOP,
        "      key_tile_info.producer_acquire(key_tile);\n",
        "",
        problem="wide",
    ),
    _sm100(
        "queries are not released",
        MAINLOOP,
        "      if (is_new_query) tcgen05_commit(q.empty);\n",
        "",
    ),
    _sm100(
        "row stats are overwritten unread",
        MAINLOOP,
        "      mbarrier_wait(shared.row_stats_empty + half, work_tile.phase() ^ 1);\n",
        "",
    ),
    _sm100(
        "no proxy fence before the output is stored",
        EPILOGUE,
        "        fence_proxy_async();\n        named_barrier_sync<epilogue_threads>(epilogue_barrier);",
        "        named_barrier_sync<epilogue_threads>(epilogue_barrier);",
    ),
    _sm100(
        "the output overwrites what is still being stored",
        EPILOGUE,
        "tma_store_wait_read<Storage::output_stages - 1>()",
        "tma_store_wait_read<Storage::output_stages>()",
    ),
    _sm100(
        "the output is released without a fence",
        EPILOGUE,
        "    tcgen05_before_thread_sync();\n    __syncwarp();\n    arrive_by_warp(shared.output_empty + half);",
        "    __syncwarp();\n    arrive_by_warp(shared.output_empty + half);",
    ),
    _sm100(
        "one arrival too few is expected for P",
        MAINLOOP,
        "init_halves(shared.probs_full, softmax_warps / 2)",
        "init_halves(shared.probs_full, softmax_warps / 2 - 1)",
    ),
    _sm100(
        "halves store to each other's rows",
        EPILOGUE,
        "          coordinates_of_rows(params.problem, work, half * half_rows, at);\n          tma_store",
        "          coordinates_of_rows(params.problem, work, (half ^ 1) * half_rows, at);\n          tma_store",
    ),
    _sm100(
        "values are cleaned before they are there",
        EPILOGUE,
        "      mbarrier_wait(&shared.v_full, tiles & 1);\n",
        "",
        problem="fallback",
    ),
    _sm100(
        "more registers than an SM has",
        KERNEL,
        "reg_alloc<Storage::softmax_registers>();",
        "reg_alloc<Storage::softmax_registers + 8>();",
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

    A kernel that is right only because the fallback follows stores its output twice.
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
        return "the fallback kernel does its work again"
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
