// The forward kernel: one warpgroup prepares and loads, two compute; a block does many query tiles.
//
// A query tile is 128 rows, 64 for each computing warpgroup; key tiles are 128 keys. Boxes of the
// raster grid arrive in shared memory as the swizzled rows that the matrix unit reads, through rank-5
// tensor maps, so tokens are never permuted. The two warpgroups take turns at the matrix unit, so that
// one's softmax runs beside the other's products, and a turn holds the scores of a tile and the output
// of the tile before it, as in FlashAttention-3 (arXiv 2407.08608). The matrix unit masks too: see
// coordinate_mask.h.
//
// Who does what: one warp works out the next query tile (geometry, and what each row sees); one walks
// its key tiles, judges them for both halves of the rows and has them loaded; one has the values loaded;
// the computing warps find all decisions in shared memory.
#pragma once

#include "../cuda/logsumexp.cuh"
#include "../cuda/tma.cuh"
#include "parameters.cuh"
#include "ptx.cuh"
#include "scores.cuh"

namespace gna::sm90 {

template <typename Element, int head_dim>
struct Forward {
  using Shape = Layout<head_dim>;
  static constexpr int boxes = Shape::boxes;
  static constexpr int stages = Shape::stages;
  static constexpr int slots = Shape::work_slots;
  static constexpr int tile_bytes = Shape::tile_bytes;
  static constexpr int computing_warps = 8;

  const Parameters& parameters;
  const Problem& problem;
  uint8_t* shared;
  KeyRecord* key_records;
  WorkRecord* work_records;
  NonFinite<head_dim>& non_finite;
  Pipeline queries, keys, values, works;

  __device__ __forceinline__ Forward(const Parameters& parameters, uint8_t* shared)
      : parameters(parameters),
        problem(parameters.problem),
        shared(shared),
        key_records(reinterpret_cast<KeyRecord*>(shared + Shape::key_records)),
        work_records(reinterpret_cast<WorkRecord*>(shared + Shape::work_records)),
        non_finite(*reinterpret_cast<NonFinite<head_dim>*>(shared + Shape::non_finite)) {
    auto* barriers = reinterpret_cast<uint64_t*>(shared + Shape::barriers);
    keys = {barriers, barriers + stages};
    values = {barriers + 2 * stages, barriers + 3 * stages};
    queries = {barriers + 4 * stages, barriers + 4 * stages + 1};
    works = {barriers + 4 * stages + 2, barriers + 4 * stages + 2 + slots};
  }

  __device__ __forceinline__ void init_barriers() const {
    for (int stage = 0; stage < stages; ++stage)
      for (const Pipeline& ring : {keys, values}) {
        barrier_init(ring.full + stage, 1);
        barrier_init(ring.empty + stage, computing_warps);
      }
    barrier_init(queries.full, 1);
    barrier_init(queries.empty, computing_warps);
    for (int slot = 0; slot < slots; ++slot) {
      barrier_init(works.full + slot, 1);
      barrier_init(works.empty + slot, computing_warps + 2);
    }
    barrier_init_fence();
  }

  // Loading ---------------------------------------------------------------------------------------

  __device__ __forceinline__ void load_query(const WorkRecord& work) const {
    int at[max_axes];
    place_of_rows(problem, work, 0, at);
    arrive_expecting(queries.full, tile_bytes);
    load_tile<boxes, tile_bytes>(parameters.query.of_part[work.tile.part],
                                 plane_of(parameters.query, work.batch, work.head), queries.full,
                                 shared + Shape::query, at[2], at[1], at[0]);
  }

  // One warp each; its first lane talks to the copy engine.
  __device__ __forceinline__ void load_queries_and_keys() const {
    const int lane = threadIdx.x % 32;
    const bool leads = lane == 0;
    uint32_t by_words = globals_masked;
    if (parameters.key_coordinates.steps == 0) by_words |= axes_masked | axes_masked << half_bits;
    const int axis = smaller(lane % 4, max_axes - 1);
    const int log2_extent = problem.axes[axis].log2_key;
    PipelineState<stages> key;
    PipelineState<1> query;
    for (PipelineState<slots> slot;; slot.advance()) {
      wait(works.full + slot.stage(), slot.phase());
      const WorkRecord& work = work_records[slot.stage()];
      if (work.done) break;
      wait(queries.empty, query.phase() ^ 1);
      if (leads) load_query(work);
      query.advance();
      const RowsAxis rows = work.halves[lane / 4 % 2][axis];
      for (KeyWalk walk(work.tile); !walk.done; key.advance()) {
        const KeyTile tile = walk.tile;
        uint32_t flags = judge(parameters, work, rows, log2_extent, tile);
        walk.next(problem, work.tile);
        if (flags & by_words) flags |= words_masked;
        if (walk.done) flags |= last_tile;
        wait(keys.empty + key.stage(), key.phase() ^ 1);
        if (leads) {
          key_records[key.stage()] = {{tile.at[0], tile.at[1], tile.at[2]}, flags};
          load_keys<boxes>(parameters, parameters.key, work, tile, keys.full + key.stage(),
                           shared + Shape::key + key.stage() * tile_bytes);
        }
      }
      __syncwarp();
      release(works.empty + slot.stage());
    }
  }

  __device__ __forceinline__ void load_values() const {
    const bool leads = threadIdx.x % 32 == 0;
    PipelineState<stages> value;
    for (PipelineState<slots> slot;; slot.advance()) {
      wait(works.full + slot.stage(), slot.phase());
      const WorkRecord& work = work_records[slot.stage()];
      if (work.done) break;
      for (KeyWalk walk(work.tile); !walk.done; walk.next(problem, work.tile), value.advance()) {
        wait(values.empty + value.stage(), value.phase() ^ 1);
        if (leads)
          load_keys<boxes>(parameters, parameters.value, work, walk.tile, values.full + value.stage(),
                           shared + Shape::value + value.stage() * tile_bytes);
      }
      __syncwarp();
      release(works.empty + slot.stage());
    }
  }

  __device__ __forceinline__ void plan_and_load() const {
    switch (uniform(threadIdx.x / 32)) {
      case 0:
        plan<slots>(parameters, work_records, works);
        break;
      case 1:
        load_queries_and_keys();
        break;
      case 2:
        load_values();
        break;
    }
  }

  // Computing -------------------------------------------------------------------------------------

  // The two warpgroups take turns at handing work to the matrix unit, one turn for each key tile that
  // neither of them skips. At head size 64 products are short and exponentials many: there, within
  // a run of tiles, a turn ends only when they are done, so that one's exponentials meet the other's
  // products.
  static constexpr bool passes_late = head_dim == 64;

  __device__ __forceinline__ static void await_turn(int half) { named_sync<256>(1 + half); }
  __device__ __forceinline__ static void pass_turn(int half) { named_arrive<256>(2 - half); }

  __device__ __forceinline__ KeyRecord await_keys(const PipelineState<stages>& key) const {
    wait(keys.full + key.stage(), key.phase());
    const int4 raw = *reinterpret_cast<const int4*>(key_records + key.stage());
    return {{raw.x, raw.y, raw.z}, static_cast<uint32_t>(raw.w)};
  }

  // `hides`: minus infinity where `operands`, made of what is hidden, say so.
  __device__ __forceinline__ void start_scores(float (&scores)[64], int half, int stage, bool hides,
                                               uint32_t (&operands)[8]) const {
    const uint32_t a =
        matrix_descriptor(shared_address(shared + Shape::query) + half * half_rows * row_bytes, 16);
    const uint32_t b =
        matrix_descriptor(shared_address(shared + Shape::key) + stage * tile_bytes, 16);
    pin(scores);
    pin(operands);
    // Each branch has a fence of its own: else the assembler adds one, or serialises all products.
    if (hides) {
      matrix_fence();
      const uint32_t coordinates =
          matrix_descriptor(shared_address(shared + Shape::coordinates), 16);
      multiply_bf16(scores, operands, coordinates, 0);
      if (parameters.key_coordinates.steps == 2) {
        matrix_fence();
        multiply_bf16(scores, operands + 4, coordinates + 2, 1);
      }
    }
    matrix_fence();
#pragma unroll
    for (int k = 0; k < head_dim / 16; ++k) {
      const uint32_t offset = (k / 4 * box_bytes + k % 4 * 32) >> 4;
      multiply<Element>(scores, a + offset, b + offset, k > 0 || hides);
    }
    matrix_commit();
    pin(scores);
  }

  __device__ __forceinline__ void start_output(float (&output)[head_dim / 2], uint32_t (&weights)[32],
                                               int stage) const {
    const uint32_t b =
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

  // The axes along which this half needs a mask of the tile.
  __device__ __forceinline__ static uint32_t masked_axes(const KeyRecord& tile, int shift) {
    return tile.flags >> shift & axes_masked;
  }

  __device__ __forceinline__ static bool hides_by_product(const KeyRecord& tile, int shift) {
    return masked_axes(tile, shift) != 0 && !(tile.flags & words_masked);
  }

  // Hides what this half does not see of a tile that is masked by words.
  __device__ __forceinline__ void hide_by_words(float (&scores)[64], const ThreadRows& rows, int batch,
                                                const KeyRecord& tile, int shift) const {
    MaskWords words;
    if (find_words(rows, batch, tile, shift, words)) hide(scores, words);
  }

  // Whether this half needs a mask for the tile, and which, as words.
  __device__ __forceinline__ bool find_words(const ThreadRows& rows, int batch, const KeyRecord& tile,
                                             int shift, MaskWords& words) const {
    if (const uint32_t axes = masked_axes(tile, shift))
      grid_mask(parameters, rows, tile, axes, words);
    else if (tile.flags & globals_masked)
      global_mask(parameters, batch, tile.flags >> part_shift & 3, tile.at[2], words);
    else
      return false;
    return true;
  }

  // Weights of shifted scores; raises offsets first, and scales `output` with them.
  __device__ __forceinline__ static void raise_and_weigh(float (&scores)[64], ThreadRows& rows,
                                                         float (&output)[head_dim / 2],
                                                         uint32_t (&weights)[32], float (&sum)[2]) {
    float rescale[2];
    raise_offsets(scores, rows, most_shifted<Element>, rescale);
    scale_rows(output, rescale);
    weigh<Element>(scores, weights, sum);
  }

  __device__ __forceinline__ void compute(int half) const {
    const int thread = threadIdx.x % 128;
    const int row = half * half_rows + thread / 32 * 16 + thread % 32 / 4;
    const int shift = half * half_bits;
    const uint32_t own_skip = skipped << shift, other_skip = skipped << (half_bits - shift);
    const float scale = parameters.scale_log2;
    PipelineState<stages> key;
    PipelineState<1> query;
    PipelineState<slots> slot;
    if (half == 1) pass_turn(half);
    while (true) {
      wait(works.full + slot.stage(), slot.phase());
      const WorkRecord& work = work_records[slot.stage()];
      if (uniform(static_cast<int>(work.done))) break;
      const int batch = work.batch;
      ThreadRows rows;
      start_rows(parameters, work, row, parameters.key_coordinates.steps == 0, rows);
      float scores[64], output[head_dim / 2], sum[2];
      uint32_t weights[32], hidden[2] = {}, operands[8] = {};
#pragma unroll
      for (float& x : output) x = 0.0f;

      wait(queries.full, query.phase());
      KeyRecord tile = await_keys(key), next;
      bool ended = false;
      while (true) {
        while (tile.flags & own_skip) {
          __syncwarp();  // all have read the record
          release(keys.empty + key.stage());
          wait(values.full + key.stage(), key.phase());
          release(values.empty + key.stage());
          key.advance();
          ended = tile.flags & last_tile;
          if (ended) break;
          tile = await_keys(key);
        }
        if (ended) {
          release(queries.empty);
          break;
        }

        bool hides = hides_by_product(tile, shift);
        bool takes_turn = !(tile.flags & other_skip);
        find_hidden(parameters, rows, tile, masked_axes(tile, shift), hidden);
        hidden_operands(hidden, operands);
        if (takes_turn) await_turn(half);
        start_scores(scores, half, key.stage(), hides, operands);
        if (takes_turn) pass_turn(half);
        ended = tile.flags & last_tile;
        if (!ended) {
          next = await_keys(key.next());
          find_hidden(parameters, rows, next, masked_axes(next, shift), hidden);
        }
        matrix_wait<0>();
        pin(scores);
        release(keys.empty + key.stage());
        if (ended) release(queries.empty);
        if (tile.flags & words_masked) hide_by_words(scores, rows, batch, tile, shift);
        shift_scores(scores, rows, scale);
        raise_and_weigh(scores, rows, output, weights, sum);
        for (int r = 0; r < 2; ++r) rows.sum[r] += sum[r];
        bool settled = have_offsets(rows);
        PipelineState<stages> value = key;
        key.advance();

        // The scores of a tile, and the output of the tile before it. Tiles that are masked by words are
        // left to the code above, for the instruction cache's sake.
        while (!ended) {
          tile = next;
          if (tile.flags & (own_skip | words_masked)) break;
          hides = hides_by_product(tile, shift);
          takes_turn = !(tile.flags & other_skip);
          if (hides) hidden_operands(hidden, operands);
          if (takes_turn) await_turn(half);
          start_scores(scores, half, key.stage(), hides, operands);
          wait(values.full + value.stage(), value.phase());
          start_output(output, weights, value.stage());
          if (takes_turn && !passes_late) pass_turn(half);
          ended = tile.flags & last_tile;
          if (!ended) {
            next = await_keys(key.next());
            find_hidden(parameters, rows, next, masked_axes(next, shift), hidden);
          }
          matrix_wait<1>();
          pin(scores);
          release(keys.empty + key.stage());
          if (ended) release(queries.empty);
          shift_scores(scores, rows, scale);
          matrix_wait<0>();
          pin(output);
          pin(weights);
          if (takes_turn && passes_late) pass_turn(half);
          release(values.empty + value.stage());
          bool raises = !settled;
          if (settled) {
            weigh<Element>(scores, weights, sum);
            raises = is_too_large<Element>(sum);
            if (raises) unweigh(scores);
          }
          if (raises) {
            raise_and_weigh(scores, rows, output, weights, sum);
            settled = have_offsets(rows);
          }
          for (int r = 0; r < 2; ++r) rows.sum[r] += sum[r];
          value = key;
          key.advance();
        }

        wait(values.full + value.stage(), value.phase());
        start_output(output, weights, value.stage());
        matrix_wait<0>();
        pin(output);
        release(values.empty + value.stage());
        if (ended) break;
      }
      query.advance();
      if (uniform(static_cast<int>(work.has_rows[half]))) finish(output, rows, work, half, row);
      __syncwarp();
      release(works.empty + slot.stage());
      slot.advance();
    }
    if (thread == 0) wait_stores_read();
  }

  // Computing carefully ---------------------------------------------------------------------------
  //
  // A weight of zero does not hide a value that is not finite, minus infinity does not hide a score that
  // is NaN or infinite, weights beyond 1 may take a huge value over the top, and the weight of a score
  // that exceeds the first ones of its row by 128 is infinite. Where any of that shows in the output, a
  // second kernel does all work again, in some four times the time: values that are not finite are
  // taken out of each tile and added to the rows that see them, and no weight exceeds 1. One step after
  // the other, both warpgroups together.

  __device__ __forceinline__ void compute_carefully(int half) const {
    const int thread = threadIdx.x % 128;
    const int row = half * half_rows + thread / 32 * 16 + thread % 32 / 4;
    PipelineState<stages> key;
    PipelineState<1> query;
    for (PipelineState<slots> slot;; slot.advance()) {
      wait(works.full + slot.stage(), slot.phase());
      const WorkRecord& work = work_records[slot.stage()];
      if (uniform(static_cast<int>(work.done))) break;
      ThreadRows rows;
      start_rows(parameters, work, row, true, rows);
      float scores[64], output[head_dim / 2], rescale[2];
      uint32_t weights[32], operands[8] = {};
#pragma unroll
      for (float& x : output) x = 0.0f;
      wait(queries.full, query.phase());
      for (bool ended = false; !ended; key.advance()) {
        const KeyRecord tile = await_keys(key);
        ended = tile.flags & last_tile;
        start_scores(scores, half, key.stage(), false, operands);
        matrix_wait<0>();
        pin(scores);
        release(keys.empty + key.stage());
        if (ended) release(queries.empty);
        MaskWords words;
        if (!find_words(rows, work.batch, tile, half * half_bits, words))
          for (auto& of_row : words.row)
            for (uint32_t& word : of_row) word = all_bits;
        hide(scores, words);
        shift_scores(scores, rows, parameters.scale_log2);
        raise_offsets(scores, rows, 0.0f, rescale);
        for (float& by : rescale) by = fmaxf(by, 0x1p-149f);  // 0 would make NaN of inf
        scale_rows(output, rescale);
        float sum[2];
        weigh<Element>(scores, weights, sum);
        for (int r = 0; r < 2; ++r) rows.sum[r] += sum[r];

        wait(values.full + key.stage(), key.phase());
        const bool found = named_any<256>(5, take_out_non_finite(key.stage()));
        start_output(output, weights, key.stage());
        matrix_wait<0>();
        pin(output);
        release(values.empty + key.stage());
        if (found) put_back_non_finite(output, words);
        named_sync<256>(5);
      }
      query.advance();
      if (uniform(static_cast<int>(work.has_rows[half]))) finish(output, rows, work, half, row);
      __syncwarp();
      release(works.empty + slot.stage());
    }
    if (thread == 0) wait_stores_read();
  }

  // By both warpgroups.
  __device__ __forceinline__ bool take_out_non_finite(int stage) const {
    return gna::cuda::take_out_non_finite<Element, head_dim, 256>(
        shared + Shape::value + stage * tile_bytes, threadIdx.x % 256 ^ 128, non_finite);
  }

  // Adds what was taken out to the rows that see it.
  __device__ __forceinline__ void put_back_non_finite(float (&output)[head_dim / 2],
                                                      const MaskWords& words) const {
#pragma unroll
    for (int n = 0; n < head_dim / 8; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * n + threadIdx.x % 4 * 2 + e;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          uint32_t nan = 0, plus = 0, minus = 0;
          for (int word = 0; word < 4; ++word) {
            nan |= non_finite.nan[word][column] & words.row[r][word];
            plus |= non_finite.plus[word][column] & words.row[r][word];
            minus |= non_finite.minus[word][column] & words.row[r][word];
          }
          float& x = output[4 * n + 2 * r + e];
          if (plus) x += infinity;
          if (minus) x -= infinity;
          if (nan) x = nanf("");
        }
      }
  }

  // Ending a query tile ---------------------------------------------------------------------------

  // Divides by the sums and stores.
  __device__ __forceinline__ void finish(float (&output)[head_dim / 2], ThreadRows& rows,
                                         const WorkRecord& work, int half, int row) const {
    const int thread = threadIdx.x % 128;
    const int lane = thread % 32;
    float sums[2] = {rows.sum[0], rows.sum[1]};
    row_reduce(sums, [](float a, float b) { return a + b; });
    float zero = 0.0f;
#pragma unroll
    for (int i = 0; i < head_dim / 2; ++i) zero += 0.0f * output[i];
    if (zero != 0.0f) demand_redo(parameters);
    const float inverse[2] = {sums[0] == 0.0f ? 0.0f : __fdividef(1.0f, sums[0]),
                              sums[1] == 0.0f ? 0.0f : __fdividef(1.0f, sums[1])};
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
      place_of_rows(problem, work, half * half_rows, at);
#pragma unroll
      for (int box = 0; box < boxes; ++box)
        store_box(parameters.output.of_part[work.tile.part], own + box * half_rows * row_bytes,
                  box * box_columns, at[2], at[1], at[0],
                  plane_of(parameters.output, work.batch, work.head));
      commit_stores();
    }
    // After the fence, which waits for stores to global memory too.
    const bool second = lane % 4 == 1;
    if (lane % 4 < 2)
      store_logsumexp(parameters, work, row + (second ? 8 : 0),
                      second ? rows.offset[1] : rows.offset[0], second ? sums[1] : sums[0]);
  }
};

template <typename Element, int head_dim, bool careful>
struct Kernel {
  // Rows are loaded for both computing warpgroups at once; each stores its own.
  static constexpr int log2_query_tile = log2_tile;
  static constexpr int log2_query_box = log2_tile;
  static constexpr int log2_output_box = log2_half;
  static constexpr int threads = 384;
  static constexpr int shared_bytes = Layout<head_dim>::bytes;

  __device__ __forceinline__ static void run(const Parameters& parameters) {
    extern __shared__ uint8_t raw[];
    uint8_t* const shared = raw + (1024 - shared_address(raw) % 1024) % 1024;
    const Forward<Element, head_dim> kernel(parameters, shared);
    if (threadIdx.x == 0) kernel.init_barriers();
    if (!careful && threadIdx.x < 128) {
      write_coordinates(parameters.key_coordinates, shared + Layout<head_dim>::coordinates);
      fence_shared_for_copies();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
      give_registers<40>();
      kernel.plan_and_load();
    } else {
      take_registers<232>();
      const int half = uniform(static_cast<int>(threadIdx.x) / 128 - 1);
      if constexpr (careful)
        kernel.compute_carefully(half);
      else
        kernel.compute(half);
    }
  }
};

}  // namespace gna::sm90
