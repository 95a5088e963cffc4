// The forward kernel: persistent blocks of 16 warps, each with one role; a block does many query tiles.
//
// A query tile is 256 rows, two boxes of 128 that share key tiles of 128 and skip those that only the
// other needs. Boxes of the raster grid arrive in shared memory as the swizzled rows that the matrix
// unit reads, through rank-5 tensor maps, so tokens are never permuted. Products are accumulated in
// tensor memory: scores come from there to the registers of the softmax, one row a thread, and go back
// as weights, the left factor of the output's product. While one half's scores are softened, the matrix
// unit works for the other half. The order of products is that of public kernels (CUTLASS's example 77,
// FlashAttention-4): of the steps of a half, weights times values, then scores of the next tile.
//
//   plan      works out the next query tile                                        one warp
//   load      walks its key tiles, judges them for both halves, has all loaded     one warp
//   multiply  asks the matrix unit for products                                    one thread
//   soften    masks scores, makes weights, corrects the output on a new offset     four warps a half
//   finish    divides the output by the sums, stores it and the logsumexp          four warps
#pragma once

#include "../cuda/logsumexp.cuh"
#include "../cuda/tma.cuh"
#include "careful.cuh"
#include "layout.cuh"
#include "ptx.cuh"
#include "softmax.cuh"

namespace gna::sm100 {

template <typename Element, int head_dim, bool careful>
struct Forward {
  using Shape = Shared<head_dim>;
  static constexpr int boxes = Shape::boxes;
  static constexpr int stages = Shape::stages;
  static constexpr int tile_bytes = Shape::tile_bytes;
  // Of 16 exponentials: with heads of 64, products take half as long.
  static constexpr int polynomials = head_dim == 64 ? 6 : 3;

  const Parameters& parameters;
  const Problem& problem;
  Shape& shared;

  __device__ __forceinline__ Forward(const Parameters& parameters, Shape& shared)
      : parameters(parameters), problem(parameters.problem), shared(shared) {}

  __device__ __forceinline__ void init_barriers() const {
    constexpr int soften_warps = 8, finish_warps = 4;
    const auto init = [](uint64_t* barriers, int count, int arrivals) {
      for (int i = 0; i < count; ++i) barrier_init(barriers + i, arrivals);
    };
    init(&shared.query_full, 1, 1);
    init(&shared.query_empty, 1, 1);
    init(shared.tiles_full, stages, 1);
    init(shared.tiles_empty, stages, 1);
    init(shared.records_full, Shape::records, 1);
    init(shared.records_empty, Shape::records, 1 + soften_warps + (careful ? finish_warps : 0));
    init(shared.works_full, Shape::work_slots, 1);
    init(shared.works_empty, Shape::work_slots, 1 + soften_warps + finish_warps);
    init(shared.scores_full, 2, 1);
    init(shared.weights_full, 2, soften_warps / 2);
    init(shared.last_weights_full, 2, soften_warps / 2);
    init(shared.output_full, 2, 1);
    init(shared.output_empty, 2, finish_warps);
    init(shared.statistics_full, 2, soften_warps / 2);
    init(shared.statistics_empty, 2, finish_warps);
    init(&shared.values_full, 1, 1);
    init(&shared.clean_full, 1, finish_warps);
    init(&shared.clean_empty, 1, soften_warps);
    barrier_init_fence();
  }

  // Load ------------------------------------------------------------------------------------------

  __device__ __forceinline__ void load_query(const WorkRecord& work) const {
    arrive_expecting(&shared.query_full, 2 * tile_bytes);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int at[max_axes];
      place_of_rows(problem, work, half * half_rows, at);
      load_tile<boxes, tile_bytes>(parameters.query.of_part[work.tile.part],
                                   plane_of(parameters.query, work.batch, work.head),
                                   &shared.query_full, shared.query[half], at[2], at[1], at[0]);
    }
  }

  __device__ __forceinline__ void load() const {
    const int lane = threadIdx.x % 32;
    const bool leads = lane == 0;
    const int axis = smaller(lane % 4, max_axes - 1);
    const int log2_extent = problem.axes[axis].log2_key;
    PipelineState<Shape::work_slots> slot;
    PipelineState<Shape::records> record;
    PipelineState<stages> tile;
    PipelineState<1> query;
    const auto hand_on = [&](const KeyRecord& made) {
      wait(shared.records_empty + record.stage(), record.phase() ^ 1);
      if (leads) {
        shared.key_records[record.stage()] = made;
        arrive(shared.records_full + record.stage());
      }
      record.advance();
    };
    const auto load_next = [&](const Maps& maps, const WorkRecord& work, const KeyTile& at) {
      wait(shared.tiles_empty + tile.stage(), tile.phase() ^ 1);
      if (leads)
        load_keys<boxes>(parameters, maps, work, at, shared.tiles_full + tile.stage(),
                         shared.tiles[tile.stage()]);
      tile.advance();
    };
    for (;; slot.advance()) {
      wait(shared.works_full + slot.stage(), slot.phase());
      const WorkRecord& work = shared.work_records[slot.stage()];
      if (work.done) break;
      wait(&shared.query_empty, query.phase() ^ 1);
      if (leads) load_query(work);
      query.advance();
      const RowsAxis rows = work.halves[lane / 4 % 2][axis];
      for (KeyWalk walk(work.tile); !walk.done;) {
        const KeyTile at = walk.tile;
        uint32_t flags = judge(parameters, work, rows, log2_extent, at);
        walk.next(problem, work.tile);
        if (walk.done) flags |= last_tile;
        hand_on({{at.at[0], at.at[1], at.at[2]}, flags});
        load_next(parameters.key, work, at);
        load_next(parameters.value, work, at);
      }
      __syncwarp();
      release(shared.works_empty + slot.stage());
    }
    hand_on({{0, 0, 0}, no_more_work | skipped | skipped << half_bits});
    // The block's shared memory must last until all buffers have been released.
    wait(&shared.query_empty, query.phase() ^ 1);
    for (int i = 0; i < stages; ++i, tile.advance())
      wait(shared.tiles_empty + tile.stage(), tile.phase() ^ 1);
  }

  // Multiply --------------------------------------------------------------------------------------

  struct Half {
    uint32_t scores, output;  // tensor memory
    uint32_t query;           // descriptor
    uint32_t steps = 0;       // key tiles done, of all query tiles
    bool fresh = true;        // there is no output yet
  };

  __device__ __forceinline__ static bool is_skipped(uint32_t flags, int half) {
    return flags >> (half * half_bits) & skipped;
  }

  // Scores of a half from the keys in a stage.
  __device__ __forceinline__ void multiply_keys(const Half& half, int stage) const {
    const uint32_t keys = matrix_descriptor(shared_address(shared.tiles[stage]), 16);
#pragma unroll
    for (int k = 0; k < head_dim / 16; ++k) {
      const uint32_t offset = (k / 4 * key_box_bytes + k % 4 * 32) >> 4;
      multiply(half.scores, half.query + offset, keys + offset, product_of<Element, key_rows, false>,
               k > 0);
    }
  }

  // Adds weights times the values in a stage to the output of a half. It starts before the last weights
  // are there.
  __device__ __forceinline__ void multiply_values(const Half& half, int index, int stage) const {
    const uint32_t values = matrix_descriptor(shared_address(shared.tiles[stage]), key_box_bytes);
    wait(shared.weights_full + index, half.steps & 1);
    after_barrier();
#pragma unroll
    for (int k = 0; k < key_rows / 16; ++k) {
      if (k == key_rows / 16 * 3 / 4) {
        wait(shared.last_weights_full + index, half.steps & 1);
        after_barrier();
      }
      multiply_stored(half.output, half.scores + 8 * k, values + k * (16 * row_bytes >> 4),
                      product_of<Element, head_dim, true>, careful || k > 0 || !half.fresh);
    }
  }

  // One thread. Each round ends a key tile and starts the next one, half after half, also from one
  // query tile to the next.
  __device__ __forceinline__ void multiply_all(uint32_t tensor_memory) const {
    PipelineState<Shape::records> record;
    PipelineState<stages> keys, values{1};
    PipelineState<1> query, item, clean;
    Half halves[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      halves[half].scores = tensor_memory + scores_column(half);
      halves[half].output = tensor_memory + output_column(half);
      halves[half].query = matrix_descriptor(shared_address(shared.query[half]), 16);
    }

    const auto end_tile = [&](uint32_t flags, int half) {
      Half& state = halves[half];
      if (state.fresh) wait(shared.output_empty + half, item.phase() ^ 1);
      if (!is_skipped(flags, half)) {
        multiply_values(state, half, values.stage());
        ++state.steps;
        state.fresh = false;
      }
      if (flags & last_tile) {
        arrive_when_done(shared.output_full + half);
        state.fresh = true;
      }
    };
    const auto start_tile = [&](uint32_t flags, int half) {
      if (is_skipped(flags, half)) return;
      multiply_keys(halves[half], keys.stage());
      arrive_when_done(shared.scores_full + half);
    };

    bool started = false;         // there is a tile to end
    bool takes_new_query = true;  // the next tile is a query tile's first
    for (uint32_t flags = 0;;) {
      if (started) {
        wait(shared.tiles_full + values.stage(), values.phase());
        if constexpr (careful) {
          arrive(&shared.values_full);
          wait(&shared.clean_full, clean.phase());
          clean.advance();
        }
        end_tile(flags, 0);
      }
      wait(shared.records_full + record.stage(), record.phase());
      const uint32_t next = shared.key_records[record.stage()].flags;
      arrive(shared.records_empty + record.stage());
      record.advance();
      const bool goes_on = !(next & no_more_work);
      if (goes_on) {
        if (takes_new_query) {
          wait(&shared.query_full, query.phase());
          query.advance();
        }
        wait(shared.tiles_full + keys.stage(), keys.phase());
        start_tile(next, 0);
      }
      if (started) {
        end_tile(flags, 1);
        arrive_when_done(shared.tiles_empty + values.stage());
        values.advance(2);
        if (flags & last_tile) item.advance();
      }
      if (!goes_on) break;
      start_tile(next, 1);
      arrive_when_done(shared.tiles_empty + keys.stage());
      keys.advance(2);
      takes_new_query = next & last_tile;
      if (takes_new_query) arrive_when_done(&shared.query_empty);
      flags = next;
      started = true;
    }
    // Until the last output has been read.
    for (int half = 0; half < 2; ++half) wait(shared.output_empty + half, item.phase() ^ 1);
    after_barrier();
  }

  // Soften ----------------------------------------------------------------------------------------

  // The next key record of a warp that reads them all.
  __device__ __forceinline__ KeyRecord take_record(PipelineState<Shape::records>& record) const {
    wait(shared.records_full + record.stage(), record.phase());
    const int4 raw = *reinterpret_cast<const int4*>(shared.key_records + record.stage());
    __syncwarp();
    release(shared.records_empty + record.stage());
    record.advance();
    return {{raw.x, raw.y, raw.z}, static_cast<uint32_t>(uniform(raw.w))};
  }

  // Whether a half needs a mask for the tile, and which.
  __device__ __forceinline__ bool find_mask(const WorkRecord& work, const KeyRecord& tile, int half,
                                            int row, MaskWords& words) const {
    const uint32_t axes = tile.flags >> (half * half_bits) & axes_masked;
    if (axes != 0)
      grid_mask(parameters, work, half * half_rows + row, tile, axes, words);
    else if (tile.flags & globals_masked)
      global_mask(parameters, work.batch, tile.flags >> part_shift & 3, tile.at[2], words);
    else
      return false;
    return true;
  }

  // Multiplies the output of the warp's rows, 32 columns at a time.
  __device__ __forceinline__ static void rescale_output(uint32_t output, float by) {
    if constexpr (careful) by = fmaxf(by, 0x1p-149f);  // 0 would make NaN of inf
#pragma unroll 1
    for (int column = 0; column < head_dim; column += 32) {
      float part[32];
      load_columns(part, output + column);
      wait_loads(part);
#pragma unroll
      for (float& x : part) x *= by;
      store_columns(output + column, part);
    }
  }

  // Puts the weights into the place of their scores, and says so when most of them are there and when
  // all are.
  template <int polynomials_of_16>
  __device__ __forceinline__ void weigh_all(const float (&scores)[128], Row& state,
                                            uint32_t in_scores, int half) const {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      uint32_t weights[16];
      weigh<Element, polynomials_of_16>(scores + 32 * part, parameters.scale_log2, state, weights);
      store_columns(in_scores + 16 * part, weights);
      if (part < 2) continue;
      wait_stores();
      before_barrier();
      __syncwarp();
      release((part == 2 ? shared.weights_full : shared.last_weights_full) + half);
    }
  }

  __device__ __forceinline__ void soften(int half, uint32_t tensor_memory) const {
    const int row = threadIdx.x % 128;
    const uint32_t lanes = tensor_memory + (row / 32 * 32 << 16);
    const uint32_t in_scores = lanes + scores_column(half);
    const uint32_t in_output = lanes + output_column(half);
    const float scale = parameters.scale_log2;
    PipelineState<Shape::work_slots> slot;
    PipelineState<Shape::records> record;
    PipelineState<1> step, clean;
    for (;; slot.advance()) {
      const PipelineState<1> item{slot.count};
      wait(shared.works_full + slot.stage(), slot.phase());
      const WorkRecord& work = shared.work_records[slot.stage()];
      if (uniform(static_cast<int>(work.done))) break;
      Row state;
      bool fresh = true;  // there is no output yet
      for (bool ended = false; !ended;) {
        const KeyRecord tile = take_record(record);
        ended = tile.flags & last_tile;
        if (is_skipped(tile.flags, half)) {
          if constexpr (careful) {
            wait(&shared.clean_full, clean.phase());
            release(&shared.clean_empty);
            clean.advance();
          }
          continue;
        }
        MaskWords words;
        if constexpr (careful)
          for (uint32_t& word : words.word) word = all_bits;
        const bool masked = find_mask(work, tile, half, row, words);
        wait(shared.scores_full + half, step.phase());
        step.advance();
        after_barrier();
        if constexpr (careful) {
          wait(&shared.clean_full, clean.phase());
          clean.advance();
          if (fresh) wait(shared.output_empty + half, item.phase() ^ 1);
          after_barrier();
          add_non_finite<head_dim>(in_output, fresh, shared.non_finite, words);
          __syncwarp();
          release(&shared.clean_empty);
        }
        float scores[128];
        const auto take_scores = [&] {
#pragma unroll
          for (int column = 0; column < 128; column += 32)
            load_columns(scores + column, in_scores + column);
          wait_loads(scores);
          if (masked) hide(scores, words);
        };
        take_scores();
        const float scaled = largest_of(scores) * scale;
        if (__any_sync(full_warp, scaled > state.limit)) {
          // The products before these scores are done, so the output is there to be corrected. Nobody
          // holds the scores meanwhile.
          const float by = raise_offset(state, scaled, careful ? 0.0f : most_shifted<Element>);
          if (!fresh) rescale_output(in_output, by);
          take_scores();
        }
        // As in dense attention, and whatever comes of the weights.
        if (!(scaled < infinity)) state.sum = nanf("");
        fresh = false;
        // Compute capability 10.0 has half as many exponentials a clock as 10.3.
        if (parameters.minor == 0)
          weigh_all<polynomials>(scores, state, in_scores, half);
        else
          weigh_all<0>(scores, state, in_scores, half);
      }
      wait(shared.statistics_empty + half, item.phase() ^ 1);
      shared.statistics[half][row] = {state.offset, state.sum};
      __syncwarp();
      release(shared.statistics_full + half);
      release(shared.works_empty + slot.stage());
    }
  }

  // Finish ----------------------------------------------------------------------------------------

  __device__ __forceinline__ void finish(uint32_t tensor_memory) const {
    const uint32_t lanes = tensor_memory + (threadIdx.x % 128 / 32 * 32 << 16);
    PipelineState<Shape::work_slots> slot;
    PipelineState<Shape::staged_boxes> staged;
    uint32_t tiles = 0;
    for (;; slot.advance()) {
      wait(shared.works_full + slot.stage(), slot.phase());
      const WorkRecord& work = shared.work_records[slot.stage()];
      if (uniform(static_cast<int>(work.done))) break;
      if constexpr (careful) clean_values(tiles);
#pragma unroll 1
      for (int half = 0; half < 2; ++half) finish_half(work, half, lanes, slot.count & 1, staged);
      __syncwarp();
      release(shared.works_empty + slot.stage());
    }
    if (threadIdx.x % 128 == 0) wait_stores_read();
  }

  __device__ __forceinline__ void finish_half(const WorkRecord& work, int half, uint32_t lanes,
                                              uint32_t parity,
                                              PipelineState<Shape::staged_boxes>& staged) const {
    const int row = threadIdx.x % 128;
    const bool has_rows = uniform(static_cast<int>(work.has_rows[half]));
    wait(shared.statistics_full + half, parity);
    const Statistics statistics = shared.statistics[half][row];
    __syncwarp();
    release(shared.statistics_empty + half);
    wait(shared.output_full + half, parity);
    after_barrier();
    const float inverse = statistics.sum == 0.0f ? 0.0f : __fdividef(1.0f, statistics.sum);
    float zero = 0.0f;
    if (has_rows) {
#pragma unroll 1
      for (int box = 0; box < boxes; ++box, staged.advance()) {
        uint8_t* const to = shared.output[staged.stage()];
        // The box that was here before has gone out.
        if (row == 0) wait_stores_read<Shape::staged_boxes - 1>();
        named_sync<128>(1);
#pragma unroll
        for (int column = 0; column < box_columns; column += 32) {
          float part[32];
          load_columns(part, lanes + output_column(half) + box * box_columns + column);
          wait_loads(part);
#pragma unroll
          for (float& x : part) {
            zero += 0.0f * x;
            x *= inverse;
          }
#pragma unroll
          for (int i = 0; i < 32; i += 8) {
            const int chunk = (column + i) / 8 ^ row % 8;
            *reinterpret_cast<uint4*>(to + row * row_bytes + chunk * 16) = {
                pack<Element>(part[i], part[i + 1]), pack<Element>(part[i + 2], part[i + 3]),
                pack<Element>(part[i + 4], part[i + 5]), pack<Element>(part[i + 6], part[i + 7])};
          }
        }
        fence_shared_for_copies();
        named_sync<128>(1);
        if (row == 0) {
          int at[max_axes];
          place_of_rows(problem, work, half * half_rows, at);
          store_box(parameters.output.of_part[work.tile.part], to, box * box_columns, at[2], at[1],
                    at[0], plane_of(parameters.output, work.batch, work.head));
          commit_stores();
        }
      }
    }
    before_barrier();
    __syncwarp();
    release(shared.output_empty + half);
    if (!has_rows) return;
    // A sum that is NaN comes from scores, and is right.
    if (!careful && zero != 0.0f && statistics.sum == statistics.sum) demand_redo(parameters);
    store_logsumexp(parameters, work, half * half_rows + row, statistics.offset, statistics.sum);
  }

  // Cleans all values of a query tile, as they come. `tiles`: key tiles of all query tiles so far.
  __device__ __forceinline__ void clean_values(uint32_t& tiles) const {
    for (bool ended = false; !ended; ++tiles) {
      PipelineState<Shape::records> record{tiles};
      const PipelineState<stages> values{2 * tiles + 1};
      ended = take_record(record).flags & last_tile;
      wait(&shared.values_full, tiles & 1);
      wait(&shared.clean_empty, ~tiles & 1);
      take_out_non_finite<Element, head_dim, 128>(shared.tiles[values.stage()], threadIdx.x % 128,
                                                  shared.non_finite);
      __syncwarp();
      release(&shared.clean_full);
    }
  }
};

template <typename Element, int head_dim, bool careful>
struct Kernel {
  // Rows are loaded and stored by halves.
  static constexpr int log2_query_tile = log2_tile;
  static constexpr int log2_query_box = log2_half;
  static constexpr int log2_output_box = log2_half;
  static constexpr int threads = 512;
  static constexpr int shared_bytes = sm100::shared_bytes<head_dim>;

  __device__ __forceinline__ static void run(const Parameters& parameters) {
    using Shape = Shared<head_dim>;
    extern __shared__ __align__(1024) uint8_t raw[];
    auto& shared = *reinterpret_cast<Shape*>(raw);
    const Forward<Element, head_dim, careful> kernel(parameters, shared);
    const int warp = uniform(static_cast<int>(threadIdx.x) / 32);
    if (threadIdx.x == 0) kernel.init_barriers();
    if (warp == multiply_warp) allocate_tensor_memory<tensor_columns>(&shared.tensor_memory);
    before_barrier();
    __syncthreads();
    after_barrier();
    const uint32_t tensor_memory = shared.tensor_memory;
    if (warp < output_warp) {
      take_registers<Shape::soften_registers>();
      kernel.soften(warp / 4, tensor_memory);
    } else if (warp < multiply_warp) {
      give_registers<Shape::finish_registers>();
      kernel.finish(tensor_memory);
    } else {
      give_registers<Shape::other_registers>();
      if (warp == multiply_warp) {
        if (elected()) kernel.multiply_all(tensor_memory);
        __syncwarp();
        free_tensor_memory<tensor_columns>(tensor_memory);
      } else if (warp == load_warp) {
        kernel.load();
      } else if (warp == plan_warp) {
        plan<Shape::work_slots>(parameters, shared.work_records,
                                {shared.works_full, shared.works_empty});
      }
    }
  }
};

}  // namespace gna::sm100
