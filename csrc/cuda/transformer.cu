// One token a row through a stack of transformer blocks as one persistent kernel: a block an SM, all at the same time.
//
// A block has a part of the rows of every matrix, and some heads of some rows. Its weights and old keys come through a
// ring in shared memory that is up to a layer long (step_ring.h), so memory is read while blocks wait for each other.
// Results travel in words with the number of their phase (step_words.h); there is no barrier between blocks.
//
// A layer has the phases qkv, attention, proj, (cross q, cross attention, cross proj,) gate and up, down. Why no word
// is overwritten before all who need it have read it, and why nobody waits for ever:
//  1. Phases have the numbers 1, 2, ... of the launch, below 2^16; the words are zero when it starts. So a word with
//     the number that a reader waits for is of that phase.
//  2. A block stores a word of phase n only after all its warps have read all of phase n - 1 that it needs, its last
//     words only when they read no more of it: a barrier of the block is between. Then it goes on.
//  3. Together the readers of phase n - 1 read each of its words, for a matrix each reader all of them; who has no
//     words of phase n reads none. So when a block stores a word of phase n + 1, all words of phase n exist, of phase
//     n - 1 if n + 1 is attention; and by 2 all reading of the phase before them is over.
//  4. The words of a phase lie where those of an earlier phase lay: of a matrix at least two phases back (x: proj and
//     down; q for cross attention three), of attention three. By 3 nobody needs those any more.
//  5. By 1 to 4 phase n needs nothing but phase n - 1, by induction every phase ends, if all blocks run: they do, the
//     launch is cooperative. A copy waits for a tile that all warps of its own block release in a fixed order.
// Caches: the keys that are copied are those of earlier launches; this step's own travels in words.
#include "../core/transformer.h"

#include "kernels.h"
#include "launch.h"
#include "step_consumer.h"

namespace flexkernels::cuda {
namespace {

using namespace step;

template <typename T, bool kInt8, int kWide>
__global__ void __launch_bounds__(kThreads, 1)
    transformer_step_kernel(const __grid_constant__ TransformerStep p, const __grid_constant__ Counted counted) {
// newer GPUs run it in more registers than a lane has
#if __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1000
  const int slots = counted.slots;
  const Shared s = carve(p, slots);
  if (threadIdx.x == 0) {
    for (int i = 0; i < slots; ++i) {
      ptx::mbarrier_init(s.full + i, 1);
      ptx::mbarrier_init(s.empty + i, kWarps);
    }
    ptx::mbarrier_fence();
  }
  __syncthreads();
  if (threadIdx.x >= kConsumers) {
    if (threadIdx.x > kConsumers) return;
    Producer<kInt8> producer{p, counted, s, {}, ptx::evict_first()};
    producer.at.slots = slots;
    return producer.step();
  }
  Consumer<T, kInt8, kWide>(p, counted, s).step();
#endif
}

typedef void (*Kernel)(TransformerStep, Counted);

template <typename T, bool kInt8>
Kernel kernel_of_width(const TransformerStep& p) {
  // the width and the hidden width that warps with one block of the width take
  constexpr int kWidth = kWarps * kBlock, kHidden = 3 * kWidth;
  static_assert(kStepMaxWidth == 2 * kWidth && kStepMaxHidden == 2 * kHidden, "a warp has at most two blocks");
  const bool wide = p.width > kWidth || p.hidden > kHidden;
  return wide ? transformer_step_kernel<T, kInt8, 2> : transformer_step_kernel<T, kInt8, 1>;
}

template <typename T>
Kernel kernel_of_weights(const TransformerStep& p) {
  return p.int8 ? kernel_of_width<T, true>(p) : kernel_of_width<T, false>(p);
}

Kernel kernel_of(const TransformerStep& p) {
  return p.dtype == Dtype::bf16 ? kernel_of_weights<bf16>(p) : kernel_of_weights<f16>(p);
}

// tiles that a pair of runs of a matrix takes, all of which must be in the ring together
int pair_of_runs(const TransformerStep& p, int k) { return 2 * ((kRun * k * (p.int8 ? 1 : 2) + kTile - 1) / kTile); }

// tiles of the ring; more than 16 keep nothing busy that 16 do not
int ring_slots(const TransformerStep& p, int blocks) {
  constexpr int kMost = 16;
  const int64_t room = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - shared_beside_ring(p, blocks, kMost);
  const int64_t slots = room / kTile;
  return static_cast<int>(slots < kMost ? slots : kMost);
}

Division divided(int n, int blocks) { return {n / blocks, n % blocks}; }

Counted counted_of(const TransformerStep& p, int blocks, int slots) {
  return {slots,
          p.rows <= 2   ? 1
          : p.rows <= 4 ? 2
                        : 3,
          divided(3 * p.width, blocks),
          divided(p.width, blocks),
          divided(p.hidden, blocks),
          1.0f / static_cast<float>(p.width)};
}

unsigned shared_bytes(const TransformerStep& p, int blocks, int slots) {
  return static_cast<unsigned>(slots * kTile + shared_beside_ring(p, blocks, slots));
}

}  // namespace

const char* transformer_step_refusal(const TransformerStep& p) {
  if (p.dtype == Dtype::f32) return "it takes bfloat16 and float16";
  if (p.rows > kStepMaxRows) return "it takes at most 8 rows";
  if (p.width % kBlock || p.width > kStepMaxWidth) return "it takes widths up to 2048 that are multiples of 64";
  if (p.hidden % kBlock || p.hidden < kBlock || p.hidden > kStepMaxHidden) {
    return "it takes hidden widths up to 6144 that are multiples of 64";
  }
  if (p.head_dim != 64 && p.head_dim != 128) return "it takes a head_dim of 64 or 128";
  if (device_attribute(cudaDevAttrComputeCapabilityMajor) != 9) return "it needs compute capability 9.0";
  if (!device_attribute(cudaDevAttrCooperativeLaunch)) return "the device has no cooperative launches";
  const int blocks = multiprocessors(), slots = ring_slots(p, blocks);
  const int widest = p.width > p.hidden ? p.width : p.hidden;
  if (slots < kBatchRuns || slots < pair_of_runs(p, widest))
    return "the device has too little shared memory for its ring";
  const unsigned bytes = shared_bytes(p, blocks, slots);
  const Kernel kernel = kernel_of(p);
  cudaFuncAttributes made{};
  check_launch("transformer_step", cudaFuncGetAttributes(&made, kernel));
  // code of an older architecture that the driver has compiled for this one is an empty kernel
  if (made.ptxVersion < 90) return "it was not compiled for compute capability 9.0";
  check_launch("transformer_step",
               cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  int resident = 0;
  check_launch("transformer_step", cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, bytes));
  return resident < 1 ? "a block does not fit on a multiprocessor" : nullptr;
}

void transformer_step_launch(const TransformerStep& p, void* on) {
  const cudaStream_t stream = static_cast<cudaStream_t>(on);
  const int blocks = multiprocessors(), slots = ring_slots(p, blocks);
  check_launch("transformer_step", cudaMemsetAsync(p.words, 0, step_words(p) * sizeof(uint32_t), stream));
  Launch at{"transformer_step", dim3(blocks), dim3(kThreads), stream, shared_bytes(p, blocks, slots)};
  at.cooperative = true;
  launch(at, kernel_of(p), p, counted_of(p, blocks, slots));
}

}  // namespace flexkernels::cuda
