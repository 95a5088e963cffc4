// The epilogue of a query tile: divides the output by the row sums and stores it, with the logsumexp.
#pragma once

#include "../cuda/logsumexp.cuh"
#include "../cuda/tma.cuh"
#include "softmax.cuh"

namespace gna::sm90 {

// One consumer warpgroup. `shared`: SharedStorage::output. `row`: the first of this thread's two rows.
template <typename Element, int head_dim>
__device__ __forceinline__ void epilogue(const Params& params, uint8_t* shared,
                                         float (&output)[head_dim / 2], const Softmax& softmax,
                                         const WorkTileInfo& work, int half, int row) {
  constexpr int boxes = SharedStorage<head_dim>::boxes;
  const int thread = threadIdx.x % consumer_threads;
  const int lane = thread % 32;
  float sums[2] = {softmax.row_sum[0], softmax.row_sum[1]};
  row_reduce(sums, [](float a, float b) { return a + b; });
  float zero = 0.0f;
#pragma unroll
  for (int i = 0; i < head_dim / 2; ++i) zero += 0.0f * output[i];
  if (zero != 0.0f) request_fallback(params);
  const float inverse[2] = {sums[0] == 0.0f ? 0.0f : __fdividef(1.0f, sums[0]),
                            sums[1] == 0.0f ? 0.0f : __fdividef(1.0f, sums[1])};
  rescale_rows(output, inverse);

  // Registers to shared memory, once the previous tile's output has left it.
  uint8_t* const own = shared + half * boxes * half_rows * row_bytes;
  if (thread == 0) tma_store_wait_read();
  named_barrier_sync<consumer_threads>(epilogue_barrier + half);
  const int at = thread / 32 * 16 + lane % 16;
#pragma unroll
  for (int n = 0; n < head_dim / 8; n += 2) {
    const int box = n / 8;
    const int chunk = (n % 8 + lane / 16) ^ (at % 8);
    stmatrix(own + box * half_rows * row_bytes + at * row_bytes + chunk * 16,
             pack<Element>(output[4 * n], output[4 * n + 1]),
             pack<Element>(output[4 * n + 2], output[4 * n + 3]),
             pack<Element>(output[4 * n + 4], output[4 * n + 5]),
             pack<Element>(output[4 * n + 6], output[4 * n + 7]));
  }
  fence_proxy_async();
  named_barrier_sync<consumer_threads>(epilogue_barrier + half);

  // Shared memory to global memory: TMA leaves out rows outside the grid.
  if (thread == 0) {
    int at[max_axes];
    coordinates_of_rows(params.problem, work, half * half_rows, at);
#pragma unroll
    for (int box = 0; box < boxes; ++box)
      tma_store(params.output.of_part[work.tile.part], own + box * half_rows * row_bytes,
                box * box_columns, at[2], at[1], at[0], plane_of(params.output, work.batch, work.head));
    tma_store_commit();
  }
  // After the fence, which waits for stores to global memory too.
  const bool second = lane % 4 == 1;
  if (lane % 4 < 2)
    store_logsumexp(params, work, row + (second ? 8 : 0),
                    second ? softmax.row_max[1] : softmax.row_max[0], second ? sums[1] : sums[0]);
}

}  // namespace gna::sm90
