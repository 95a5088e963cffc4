// The forward kernel: one warpgroup loads, two compute, each block works through many query tiles.
//
// A query tile is 128 rows, 64 for each computing warpgroup; key tiles are 128 keys. Boxes of the
// raster grid arrive in shared memory as the swizzled rows that the matrix unit reads, through rank-5
// tensor maps, so tokens are never permuted. Within a warpgroup the softmax of a tile runs beside the
// matrix work of the tile before it, and the two warpgroups take turns at the matrix unit, as in
// FlashAttention-3 (arXiv 2407.08608).
#pragma once

#include "parameters.cuh"
#include "ptx.cuh"
#include "scores.cuh"

namespace gna::sm90 {

// Which query tile of which head is to be done.
struct Work {
  int32_t batch, head;
  int32_t tile;  // of the head
};

// All work: the query tiles of global tokens, which are the longest, of all heads; then head by head.
__device__ __forceinline__ bool work_of(const Parameters& parameters, int index, Work& work) {
  const int globals = global_query_tiles(parameters.problem);
  const int grids = grid_query_tiles(parameters.problem);
  const int heads = parameters.batch * parameters.heads;
  int head;
  if (index < globals * heads) {
    head = index / globals;
    work.tile = index % globals;
  } else {
    index -= globals * heads;
    head = index / grids;
    work.tile = globals + index % grids;
  }
  work.batch = head / parameters.heads;
  work.head = head % parameters.heads;
  return head < heads;
}

// A ring of buffers in shared memory: each is filled by the copy engine and released by every warp.
struct Ring {
  uint64_t* full;
  uint64_t* empty;
};

struct Place {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <typename Element, int head_dim>
struct Forward {
  using Shape = Layout<head_dim>;
  static constexpr int boxes = Shape::boxes;
  static constexpr int stages = Shape::stages;
  static constexpr int tile_bytes = Shape::tile_bytes;
  static constexpr int warps = 8;  // that compute

  const Parameters& parameters;
  const Problem& problem;
  uint8_t* shared;
  Ring queries, keys, values;

  __device__ __forceinline__ Forward(const Parameters& parameters, uint8_t* shared)
      : parameters(parameters), problem(parameters.problem), shared(shared) {
    auto* barriers = reinterpret_cast<uint64_t*>(shared + Shape::barriers);
    keys = {barriers, barriers + stages};
    values = {barriers + 2 * stages, barriers + 3 * stages};
    queries = {barriers + 4 * stages, barriers + 4 * stages + 1};
  }

  __device__ __forceinline__ void init_barriers() const {
    for (int stage = 0; stage < stages; ++stage)
      for (const Ring& ring : {keys, values}) {
        barrier_init(ring.full + stage, 1);
        barrier_init(ring.empty + stage, warps);
      }
    barrier_init(queries.full, 1);
    barrier_init(queries.empty, warps);
    barrier_init_fence();
  }

  // Loading ---------------------------------------------------------------------------------------

  __device__ __forceinline__ void load_tile(const CUtensorMap& map, int plane, uint64_t* full,
                                            uint8_t* to, int w, int h, int t) const {
    arrive_expecting(full, tile_bytes);
#pragma unroll
    for (int box = 0; box < boxes; ++box)
      load_box(map, full, to + box * box_bytes, box * box_columns, w, h, t, plane);
  }

  __device__ __forceinline__ static int plane_of(const Maps& maps, int batch, int head) {
    return maps.planes.per_batch * batch + maps.planes.per_head * head;
  }

  __device__ __forceinline__ void load_keys(const Maps& maps, const Work& work,
                                            const QueryTile& query, const KeyTile& tile,
                                            uint64_t* full, uint8_t* to) const {
    const int plane = plane_of(maps, work.batch, work.head / parameters.heads_per_kv_head);
    if (tile.part == grid_part)
      load_tile(query.part == grid_part ? maps.of_part[grid_part] : maps.undilated, plane, full, to,
                query.group[2] + query.step[2] * tile.at[2],
                query.group[1] + query.step[1] * tile.at[1],
                query.group[0] + query.step[0] * tile.at[0]);
    else
      load_tile(maps.of_part[tile.part], plane, full, to, tile.at[2], 0, 0);
  }

  __device__ __forceinline__ void load() const {
    Place key, query;
    Work work;
    for (int index = blockIdx.x; work_of(parameters, index, work); index += gridDim.x) {
      const QueryTile tile = query_tile(problem, work.tile);
      if (tile.empty) continue;
      wait(queries.empty, query.parity ^ 1);
      const bool of_grid = tile.part == grid_part;
      load_tile(parameters.query.of_part[tile.part],
                plane_of(parameters.query, work.batch, work.head), queries.full,
                shared + Shape::query,
                of_grid ? tile.group[2] + tile.step[2] * tile.queries[2].begin : tile.first,
                of_grid ? tile.group[1] + tile.step[1] * tile.queries[1].begin : 0,
                of_grid ? tile.group[0] + tile.step[0] * tile.queries[0].begin : 0);
      query.advance(1);
      for (KeyWalk walk(tile); !walk.done; walk.next(problem, tile)) {
        wait(keys.empty + key.stage, key.parity ^ 1);
        load_keys(parameters.key, work, tile, walk.tile, keys.full + key.stage,
                  shared + Shape::key + key.stage * tile_bytes);
        wait(values.empty + key.stage, key.parity ^ 1);
        load_keys(parameters.value, work, tile, walk.tile, values.full + key.stage,
                  shared + Shape::value + key.stage * tile_bytes);
        key.advance(stages);
      }
    }
  }

  // Computing -------------------------------------------------------------------------------------

  // Every warp has read the buffer.
  __device__ __forceinline__ static void release(uint64_t* empty) {
    if (threadIdx.x % 32 == 0) arrive(empty);
  }

  // The two warpgroups take turns, one turn for each key tile, at handing work to the matrix unit.
  __device__ __forceinline__ static void await_turn(int half) { named_sync<256>(1 + half); }
  __device__ __forceinline__ static void pass_turn(int half) { named_arrive<256>(2 - half); }

  __device__ __forceinline__ void start_scores(float (&scores)[64], int half, int stage) const {
    const uint64_t a =
        matrix_descriptor(shared_address(shared + Shape::query) + half * half_rows * row_bytes, 16);
    const uint64_t b =
        matrix_descriptor(shared_address(shared + Shape::key) + stage * tile_bytes, 16);
    pin(scores);
    matrix_fence();
#pragma unroll
    for (int k = 0; k < head_dim / 16; ++k) {
      const uint64_t offset = (k / 4 * box_bytes + k % 4 * 32) >> 4;
      multiply<Element>(scores, a + offset, b + offset, k > 0);
    }
    matrix_commit();
    pin(scores);
  }

  __device__ __forceinline__ void start_output(float (&output)[head_dim / 2], uint32_t (&weights)[32],
                                               int stage) const {
    const uint64_t b =
        matrix_descriptor(shared_address(shared + Shape::value) + stage * tile_bytes, box_bytes);
    pin(output);
    pin(weights);
    matrix_fence();
#pragma unroll
    for (int k = 0; k < 8; ++k)
      multiply_add<Element>(output, weights + 4 * k, b + k * (16 * row_bytes >> 4));
    matrix_commit();
    pin(output);
  }

  __device__ __forceinline__ void mask(float (&scores)[64], const ThreadRows& rows, int batch,
                                       const KeyTile& tile) const {
    uint32_t words[2][4];
    if (tile.part == grid_part)
      grid_mask(problem, rows, tile, words);
    else
      global_mask(parameters, batch, tile, words);
    hide(scores, words);
  }

  __device__ __forceinline__ void compute(int half) const {
    const int thread = threadIdx.x % 128;
    const int row = half * half_rows + thread / 32 * 16 + thread % 32 / 4;
    const float scale = parameters.scale_log2;
    const bool hides_globals = parameters.key_mask != nullptr;
    Place key, query;
    Work work;
    if (half == 1) pass_turn(half);
    for (int index = blockIdx.x; work_of(parameters, index, work); index += gridDim.x) {
      const QueryTile tile = query_tile(problem, work.tile);
      if (tile.empty) continue;
      const Rows own = rows_of(problem, tile, half * half_rows, log2_half);
      ThreadRows rows;
      start_rows(problem, tile, row, rows);
      float scores[64], output[head_dim / 2], rescale[2];
      uint32_t weights[32];
#pragma unroll
      for (float& x : output) x = 0.0f;

      wait(queries.full, query.parity);
      KeyWalk walk(tile);
      while (true) {
        for (; !walk.done && !visits(problem, own, walk.tile); walk.next(problem, tile)) {
          await_turn(half);
          pass_turn(half);
          wait(keys.full + key.stage, key.parity);
          release(keys.empty + key.stage);
          wait(values.full + key.stage, key.parity);
          release(values.empty + key.stage);
          key.advance(stages);
        }
        if (walk.done) break;

        wait(keys.full + key.stage, key.parity);
        await_turn(half);
        start_scores(scores, half, key.stage);
        pass_turn(half);
        matrix_wait<0>();
        pin(scores);
        release(keys.empty + key.stage);
        if (!is_interior(problem, own, walk.tile, hides_globals))
          mask(scores, rows, work.batch, walk.tile);
        soften(scores, rows, scale, rescale);
        rescale_rows(output, rescale);
        pack_weights<Element>(scores, weights);
        Place value = key;
        key.advance(stages);
        walk.next(problem, tile);

        // The scores of a tile, and the output of the tile before it.
        for (; !walk.done && visits(problem, own, walk.tile); walk.next(problem, tile)) {
          wait(keys.full + key.stage, key.parity);
          await_turn(half);
          start_scores(scores, half, key.stage);
          wait(values.full + value.stage, value.parity);
          start_output(output, weights, value.stage);
          pass_turn(half);
          matrix_wait<1>();
          pin(scores);
          release(keys.empty + key.stage);
          if (!is_interior(problem, own, walk.tile, hides_globals))
            mask(scores, rows, work.batch, walk.tile);
          soften(scores, rows, scale, rescale);
          matrix_wait<0>();
          pin(output);
          pin(weights);
          release(values.empty + value.stage);
          rescale_rows(output, rescale);
          pack_weights<Element>(scores, weights);
          value = key;
          key.advance(stages);
        }

        wait(values.full + value.stage, value.parity);
        start_output(output, weights, value.stage);
        matrix_wait<0>();
        pin(output);
        release(values.empty + value.stage);
      }
      release(queries.empty);
      query.advance(1);
      if (!own.empty) finish(output, rows, work, tile, half, row);
    }
    if (thread == 0) wait_stores_read();
  }

  // The end of a query tile: divides by the sums and stores.
  __device__ __forceinline__ void finish(float (&output)[head_dim / 2], ThreadRows& rows,
                                         const Work& work, const QueryTile& tile, int half,
                                         int row) const {
    const int thread = threadIdx.x % 128;
    const int lane = thread % 32;
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = row_sum(rows.sum[r]);
      inverse[r] = sum == 0.0f ? 0.0f : 1.0f / sum;
      if (lane % 4 == 0) store_logsumexp(rows.top[r], sum, work, tile, row + 8 * r);
    }
    scale_rows(output, inverse);

    uint8_t* const own = shared + Shape::output + half * boxes * half_rows * row_bytes;
    if (thread == 0) wait_stores_read();
    named_sync<128>(3 + half);
    const int at = thread / 32 * 16 + lane % 16;
#pragma unroll
    for (int n = 0; n < head_dim / 8; n += 2) {
      const int box = n / 8;
      const int chunk = (n % 8 + lane / 16) ^ (at % 8);
      store_matrices(shared_address(own + box * half_rows * row_bytes + at * row_bytes + chunk * 16),
                     pack<Element>(output[4 * n], output[4 * n + 1]),
                     pack<Element>(output[4 * n + 2], output[4 * n + 3]),
                     pack<Element>(output[4 * n + 4], output[4 * n + 5]),
                     pack<Element>(output[4 * n + 6], output[4 * n + 7]));
    }
    fence_shared_for_copies();
    named_sync<128>(3 + half);
    if (thread == 0) {
      int at[max_axes];
#pragma unroll
      for (int a = 0; a < max_axes; ++a)
        at[a] = tile.part != grid_part
                    ? 0
                    : tile.group[a] + tile.step[a] * (tile.queries[a].begin +
                                                      row_coordinate(problem, half * half_rows, a));
      if (tile.part != grid_part) at[2] = tile.first + half * half_rows;
#pragma unroll
      for (int box = 0; box < boxes; ++box)
        store_box(parameters.output.of_part[tile.part], own + box * half_rows * row_bytes,
                  box * box_columns, at[2], at[1], at[0],
                  plane_of(parameters.output, work.batch, work.head));
      commit_stores();
    }
  }

  __device__ __forceinline__ void store_logsumexp(float top, float sum, const Work& work,
                                                  const QueryTile& tile, int row) const {
    const int grid_tokens =
        problem.axes[0].length * problem.axes[1].length * problem.axes[2].length;
    bool inside = true;
    int token = 0;
    if (tile.part == grid_part) {
#pragma unroll
      for (int a = 0; a < max_axes; ++a) {
        const int position = tile.queries[a].begin + row_coordinate(problem, row, a);
        inside &= position < tile.axes[a].length;
        token = token * problem.axes[a].length + tile.group[a] + tile.step[a] * position;
      }
      token += problem.prefix;
    } else {
      token = tile.first + row;
      inside = token < part_tokens(problem, tile.part);
      token += tile.part == suffix_part ? problem.prefix + grid_tokens : 0;
    }
    if (!inside) return;
    constexpr float log_2 = 0.6931471805599453f;
    const int64_t tokens = static_cast<int64_t>(problem.prefix) + grid_tokens + problem.suffix;
    const int64_t head = static_cast<int64_t>(work.batch) * parameters.heads + work.head;
    parameters.logsumexp[head * tokens + token] =
        sum == 0.0f ? -infinity : (top * parameters.scale_log2 + log2f(sum)) * log_2;
  }
};

template <typename Element, int head_dim>
__global__ void __launch_bounds__(threads, 1) forward(const __grid_constant__ Parameters parameters) {
  extern __shared__ uint8_t raw[];
  uint8_t* const shared = raw + (1024 - shared_address(raw) % 1024) % 1024;
  const Forward<Element, head_dim> kernel(parameters, shared);
  if (threadIdx.x == 0) kernel.init_barriers();
  __syncthreads();
  if (threadIdx.x < 128) {
    give_registers<24>();
    if (threadIdx.x == 0) kernel.load();
  } else {
    take_registers<240>();
    kernel.compute(threadIdx.x / 128 - 1);
  }
}

}  // namespace gna::sm90
