// Cross-entropy: losses of rows of logits, and their gradients. Read cross_entropy_kernel first.
//
// The logits are by far the largest tensor of a small model's step, so all that matters is how often they are moved. A
// row takes two passes: one that finds its largest logit and the sum of e^(x - largest), in one go (the sum so far is
// scaled down whenever a larger logit turns up); and one that writes the gradients, over the logits if so asked.
// Between the two the row stays in shared memory: one read and one write.
//
// To keep a fast memory busy, much must be on its way at any time. cp.async takes a row to shared memory without passing
// registers, so each thread has kAhead vectors of 16 bytes on their way: with two blocks of 512 threads 128 KB for each
// multiprocessor, four times what an H200 reads in the microsecond that a read takes. A thread reads what it copied
// itself, so nobody waits for anybody but in the sum over the row; and a warp that has written its part of a row goes on
// to the next one while others still write. A grid of as many blocks as run at a time takes every n-th row.
//
// 50304 columns of 16 bits are 98 KB, so a multiprocessor of an H100 or H200 (227 KB for blocks) has two rows. Of a row
// that does not fit (226 KB there, 162 KB on an A100) as much is kept as fits. Its block is alone on the multiprocessor, so
// it has twice the registers, and they keep 96 KB more: all of 128256 columns on either, of 151936 on the larger. What is
// left is read a second time, soon enough to be found in the L2 cache: of 256000 columns 36 % on an H100, so 2.36 movements
// in the place of 2. The registers are asked for first, and are on their way while the rest comes to shared memory.
//
// Three tiles: a warp for each row of up to 128 vectors, whose sums need no barrier; 512 threads for wider ones; and the
// same with registers that keep a part of the row.
//
// The backward of an op that saw only its forward reads the logits once more, and writes once; the largest logit and the
// sum are known by then, so every thread works alone: cross_entropy_backward_kernel.
//
// Where a tensor does not allow 16-byte accesses, the same kernels run with single elements. cross_entropy.cpp:
// choose_path says which it is. All this is arithmetic; no time on a GPU has been taken so far.
//
// Losses are float, whatever the logits are stored in, so their e^x are the library's; those of gradients in 16 bits are
// one approximate instruction. The probability of a target near 1 must not lose its distance from 1: its own term is not
// in the sum, and where it is the peak, whose term is 1, the loss is log1p of the sum of the others. The target's gradient
// comes from that by expm1. A target that is out of range makes its row NaN, and nothing is read at it.

#include "cross_entropy/cross_entropy.h"

#include <algorithm>

#include "device/elementwise.cuh"
#include "device/reduce.cuh"
#include "host/launch.h"
#include "host/multiprocessors.h"
#include "ptx/cp_async.cuh"

namespace fastgpt {
namespace {

template <int row_threads, int threads, int in_registers = 0>
struct Rows {
  static constexpr int kRowThreads = row_threads;
  static constexpr int kThreads = threads;
  static constexpr int kRows = kThreads / kRowThreads;  // that a block works on at a time
  static constexpr int kInRegisters = in_registers;     // vectors of a row that each thread keeps there
};
// kBlocks: on a multiprocessor at a time, at most.
struct NarrowTile : Rows<kWarp, 128> {
  static constexpr int kBlocks = 8;
};
struct WideTile : Rows<512, 512> {
  static constexpr int kBlocks = 2;
};
struct WidestTile : Rows<512, 512, 12> {
  static constexpr int kBlocks = 1;
};
// Doubles take twice the registers.
template <class T, class Tile>
constexpr int kBlocksOf = sizeof(T) == 8 ? Tile::kBlocks / 2 : Tile::kBlocks;
// So they leave none to spare.
constexpr bool spares_registers(int element_bytes) { return element_bytes < 8; }

constexpr int kWidestNarrowRow = 128;  // vectors, or single elements
constexpr int kAhead = 8;              // vectors that a thread has on their way to shared memory
constexpr int kBackwardThreads = 256;

// e^x that will be stored as a T: in 16 bits nobody sees that one instruction is wrong by 2^-22.
template <class T, class A>
__device__ __forceinline__ A power(A x) {
  if constexpr (sizeof(T) == 2) return exp2_approx(1.4426950f * x);  // 1 / ln 2
  else return exp(x);
}

// x - peak; a row of nothing but -inf has no probabilities, but a part of a row may.
template <class A>
__device__ __forceinline__ A base_of(A peak) {
  return peak == -A(INFINITY) ? A(0) : peak;
}

// ---- what is known of a row -----------------------------------------------------------------------------------

struct Target {
  bool ignored;
  int column;  // -1: out of range
};

__device__ __forceinline__ Target target_of(const CrossEntropy& p, int64_t row) {
  const int64_t target = p.targets_are_int64 ? static_cast<const int64_t*>(p.targets)[row]
                                             : int64_t(static_cast<const int32_t*>(p.targets)[row]);
  return {target == p.ignore_index, target >= 0 && target < p.vocab_size ? int(target) : -1};
}

// The logits of a vector whose first column is `first`, as they are computed with; -inf in padding columns.
template <class T, int kSize, class A = decltype(widen(T()))>
__device__ __forceinline__ void widen_logits(A (&x)[kSize], const Vec<T, kSize>& v, const CrossEntropy& p, int first) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) x[i] = widen(v.at[i]);
  if (p.softcap != 0) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) x[i] = A(p.softcap) * tanh(x[i] / A(p.softcap));
  }
  if (first + kSize > p.vocab_size) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) x[i] = first + i < p.vocab_size ? x[i] : -A(INFINITY);
  }
}

// What a thread has seen of a row: peak and sum of all columns but the target. The sum for label smoothing is one of
// logits that may be far from 0, next to each other: in double it keeps their digits.
template <class A>
struct Seen {
  A peak = -A(INFINITY), sum = 0, target_logit = 0;
  double total = 0;

  template <class T, int kSize>
  __device__ __forceinline__ void add(const Vec<T, kSize>& v, const CrossEntropy& p, int first, int target) {
    A x[kSize];
    widen_logits(x, v, p, first);
    if (p.label_smoothing != 0) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) total += first + i < p.vocab_size ? double(x[i]) : 0.0;
    }
    if (unsigned(target - first) < unsigned(kSize)) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (first + i != target) continue;
        target_logit = x[i];
        x[i] = -A(INFINITY);
      }
    }
    A larger = peak;
#pragma unroll
    for (int i = 0; i < kSize; ++i) larger = max(larger, x[i]);  // NaN is in the sum, not here
    const A base = base_of(larger);
    sum *= exp(peak - base);
    peak = larger;
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum += exp(x[i] - base);
  }

  // Takes the target in, once all columns have been seen. Returns the rest: the sum of all columns less 1, which is the
  // peak's own term. If the target is the peak, that is the sum of the others, to the last digit.
  __device__ __forceinline__ A add_target() {
    const A larger = max(peak, target_logit), base = base_of(larger);
    const A others = sum * exp(peak - base);
    peak = larger;
    return others + (exp(target_logit - base) - 1);
  }
};

template <class A>
__device__ __forceinline__ void join(A& peak, A& sum, A other_peak, A other_sum) {
  const A larger = max(peak, other_peak), base = base_of(larger);
  sum = sum * exp(peak - base) + other_sum * exp(other_peak - base);
  peak = larger;
}

// Joins what the threads of a row have seen. owner: the thread whose target_logit counts. The order never changes, so
// all threads get the same.
template <class Tile, class A>
__device__ __forceinline__ void join_threads(Seen<A>& seen, int owner, bool with_total) {
  constexpr unsigned kAll = 0xffffffffu;
  A peak = seen.peak;
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) peak = max(peak, __shfl_xor_sync(kAll, peak, distance));
  seen.sum = warp_sum(seen.sum * exp(seen.peak - base_of(peak)));
  seen.peak = peak;
  if (with_total) seen.total = warp_sum(seen.total);

  if constexpr (Tile::kRowThreads == kWarp) {
    seen.target_logit = __shfl_sync(kAll, seen.target_logit, owner);
  } else {
    constexpr int kWarps = Tile::kRowThreads / kWarp;
    __shared__ A peaks[kWarps], sums[kWarps], target_logit;
    __shared__ double totals[kWarps];
    __syncthreads();  // what the row before this one left here has been read
    if (threadIdx.x % kWarp == 0) {
      const int warp = threadIdx.x / kWarp;
      peaks[warp] = seen.peak;
      sums[warp] = seen.sum;
      totals[warp] = seen.total;
    }
    if (int(threadIdx.x) == owner) target_logit = seen.target_logit;
    __syncthreads();
    seen = {peaks[0], sums[0], target_logit, totals[0]};
    for (int warp = 1; warp < kWarps; ++warp) {
      join(seen.peak, seen.sum, peaks[warp], sums[warp]);
      seen.total += totals[warp];
    }
  }
}

// The factors of a row's gradients.
template <class T, class A>
struct Gradient {
  A d_loss, peak, rest, factor, of_all, z_part;  // of_all: what is subtracted from every column
  Target target;

  __device__ __forceinline__ Gradient(const CrossEntropy& p, Target target, A d_loss, A peak, A rest)
      : d_loss(d_loss), peak(peak), rest(rest), z_part(0), target(target) {
    if (p.z_loss != 0) z_part = 2 * A(p.z_loss) * (peak + log1p(rest));
    factor = target.column < 0 ? A(NAN) : d_loss * (1 + z_part) / (1 + rest);
    of_all = d_loss * A(p.label_smoothing) / A(p.vocab_size);
  }

  template <int kSize>
  __device__ __forceinline__ Vec<T, kSize> of(const Vec<T, kSize>& v, const CrossEntropy& p, int first) const {
    Vec<T, kSize> d;
    if (target.ignored || first >= p.vocab_size) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) d.at[i] = narrow<T>(A(0));
      return d;
    }
    A x[kSize], d_x[kSize];
    widen_logits(x, v, p, first);
#pragma unroll
    for (int i = 0; i < kSize; ++i) d_x[i] = factor * power<T>(x[i] - peak) - of_all;
    if (unsigned(target.column - first) < unsigned(kSize)) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (first + i != target.column) continue;
        const A nll = (peak - x[i]) + log1p(rest);
        d_x[i] = d_loss * (expm1(-nll) + z_part * exp(-nll) + A(p.label_smoothing)) - of_all;
      }
    }
    if (p.softcap != 0) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const A t = x[i] / A(p.softcap);
        d_x[i] *= 1 - t * t;
      }
    }
    if (first + kSize > p.vocab_size) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) d_x[i] = first + i < p.vocab_size ? d_x[i] : A(0);
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) d.at[i] = narrow<T>(d_x[i]);
    return d;
  }
};

// Asks for one of a row's vectors to be copied, if there is such a one.
template <int kSize, class T>
__device__ __forceinline__ void request(T* row_in_shared, const T* row, int vector, int vectors) {
  if (in_bounds(vector, vectors)) cp_async(row_in_shared + vector * kSize, row + vector * kSize);
  cp_async_commit();
}

// The vectors that a thread keeps in registers, the one whose turn it is in front: registers have no index, and a loop with
// a few moves in it is a twelfth of the code that all its turns written out would be.
template <class T, int kSize, class Tile, int kCount = Tile::kInRegisters>
struct InRegisters {
  Vec<T, kSize> at[kCount];

  // `first` is the thread's own; the row ends before `vectors`.
  __device__ __forceinline__ void read_row(const T* row, int first, int vectors) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int vector = first + i * Tile::kRowThreads;
      at[i] = {};
      if (in_bounds(vector, vectors)) at[i] = load<kSize>(row + vector * kSize);
    }
  }
  // After as many calls as there are vectors the first is in front again.
  __device__ __forceinline__ Vec<T, kSize> next() {
    const Vec<T, kSize> front = at[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) at[i - 1] = at[i];
    at[kCount - 1] = front;
    return front;
  }
};
template <class T, int kSize, class Tile>
struct InRegisters<T, kSize, Tile, 0> {
  __device__ __forceinline__ void read_row(const T*, int, int) {}
  __device__ __forceinline__ Vec<T, kSize> next() { return {}; }
};

// ---- kernels --------------------------------------------------------------------------------------------------

template <class T, int kSize, class Tile>
__global__ __launch_bounds__(Tile::kThreads, kBlocksOf<T, Tile>) void cross_entropy_kernel(CrossEntropy p) {
  using A = decltype(widen(T()));
  const int lane = threadIdx.x % Tile::kRowThreads, of_block = threadIdx.x / Tile::kRowThreads;
  const int vectors = (p.vocab_size + kSize - 1) / kSize;  // that have logits
  const int kept = p.kept_vectors;  // in shared memory: all of them, or a multiple of kRowThreads
  const int kept_at_all = kept + Tile::kInRegisters * Tile::kRowThreads;  // and in registers

  for (int64_t row = int64_t(blockIdx.x) * Tile::kRows + of_block; row < p.rows;
       row += int64_t(gridDim.x) * Tile::kRows) {
    const auto in_memory = [&](int vector) {
      return static_cast<const T*>(p.logits.data) + row * p.logits.stride + vector * kSize;
    };
    const auto in_shared = [&](int vector) { return &dynamic_shared<T>() + (of_block * kept + vector) * kSize; };
    const Target target = target_of(p, row);
    InRegisters<T, kSize, Tile> in_registers;
    Seen<A> seen;
    A rest = 0;
    if (!target.ignored) {
      const auto add = [&](int vector, const Vec<T, kSize>& x) { seen.add(x, p, vector * kSize, target.column); };
      in_registers.read_row(in_memory(0), kept + lane, vectors);
      if constexpr (kSize > 1) {
        if (kept > 0) {
#pragma unroll
          for (int i = 0; i < kAhead; ++i) {
            request<kSize>(in_shared(0), in_memory(0), lane + i * Tile::kRowThreads, kept);
          }
        }
        for (int vector = lane; vector < kept; vector += Tile::kRowThreads) {
          request<kSize>(in_shared(0), in_memory(0), vector + kAhead * Tile::kRowThreads, kept);
          cp_async_wait<kAhead>();
          add(vector, load<kSize>(in_shared(vector)));
        }
      }
#pragma unroll 1
      for (int vector = kept + lane; vector < kept_at_all; vector += Tile::kRowThreads) {
        const Vec<T, kSize> x = in_registers.next();
        if (vector < vectors) add(vector, x);
      }
#pragma unroll 4
      for (int vector = kept_at_all + lane; vector < vectors; vector += Tile::kRowThreads) {
        add(vector, load<kSize>(in_memory(vector)));
      }
      const int owner = target.column < 0 ? 0 : target.column / kSize % Tile::kRowThreads;
      join_threads<Tile>(seen, owner, p.label_smoothing != 0);
      rest = seen.add_target();
    }

    if (lane == 0) {
      A loss = 0;
      if (!target.ignored) {
        const A log_sum = log1p(rest), smoothing = A(p.label_smoothing);
        loss = (seen.peak - seen.target_logit) + log_sum;  // the difference first: exact where the loss is small
        if (p.label_smoothing != 0) {
          const A mean_distance = A(double(seen.peak) - seen.total / p.vocab_size);
          loss = (1 - smoothing) * loss + smoothing * (mean_distance + log_sum);
        }
        if (p.z_loss != 0) loss += A(p.z_loss) * (seen.peak + log_sum) * (seen.peak + log_sum);
        if (target.column < 0) loss = A(NAN);
      }
      static_cast<A*>(p.losses)[row] = loss;
      if (p.peak_and_rest) store(static_cast<A*>(p.peak_and_rest) + 2 * row, Vec<A, 2>{seen.peak, rest});
    }
    if (!p.d_logits) continue;

    const Gradient<T, A> gradient(p, target, static_cast<const A*>(p.d_losses)[row], seen.peak, rest);
    const auto write = [&](int vector, const Vec<T, kSize>& x) {
      store_whole(static_cast<T*>(p.d_logits) + row * p.d_stride + vector * kSize, gradient.of(x, p, vector * kSize));
    };
    const int read = target.ignored ? 0 : vectors;
    for (int vector = lane; vector < min(kept, read); vector += Tile::kRowThreads) {
      write(vector, load<kSize>(in_shared(vector)));
    }
#pragma unroll 1
    for (int vector = kept + lane; vector < kept_at_all; vector += Tile::kRowThreads) {
      const Vec<T, kSize> x = in_registers.next();
      if (vector < read) write(vector, x);
    }
    for (int vector = min(kept_at_all, read) + lane; vector < p.columns / kSize; vector += Tile::kRowThreads) {
      Vec<T, kSize> x{};
      if (vector < read) x = load<kSize>(in_memory(vector));  // padding need not be read
      write(vector, x);
    }
  }
}

template <class T, int kSize>
__global__ __launch_bounds__(kBackwardThreads) void cross_entropy_backward_kernel(CrossEntropy p) {
  using A = decltype(widen(T()));
  const Place here = place_of_thread<kSize>(p.rows, p.columns);
  if (!here.exists) return;
  const Target target = target_of(p, here.row);
  const A* const known = static_cast<const A*>(p.known) + 2 * here.row;
  const Gradient<T, A> gradient(p, target, static_cast<const A*>(p.d_losses)[here.row], known[0], known[1]);
  Vec<T, kSize> x{};
  if (!target.ignored && here.column < p.vocab_size) x = load<kSize>(here.in<T>(p.logits));
  store(here.in<T>(p.d_logits, p.d_stride), gradient.of(x, p, int(here.column)));
}

// ---- launchers ------------------------------------------------------------------------------------------------

// Shared memory that a block takes besides the rows it keeps: what join_threads declares, and what the system reserves.
constexpr int64_t kOtherSharedBytes = 1024;

int vectors_of_row(const CrossEntropy& p, int size) { return (p.vocab_size + size - 1) / size; }

template <class T, int kSize, class Tile>
void launch_tile(CrossEntropy p, Stream stream) {
  p.kept_vectors = p.d_logits && kSize > 1 ? cross_entropy_kept_vectors(p) : 0;
  const int64_t shared = int64_t(p.kept_vectors) * kSize * sizeof(T) * Tile::kRows;
  const int64_t fit = (most_shared_bytes() + kOtherSharedBytes) / (shared + 2 * kOtherSharedBytes);
  const int64_t stay = std::max<int64_t>(1, std::min<int64_t>(kBlocksOf<T, Tile>, fit));
  const int64_t blocks = std::min((p.rows + Tile::kRows - 1) / Tile::kRows, stay * multiprocessors());
  launch(cross_entropy_kernel<T, kSize, Tile>, {dim3(unsigned(blocks)), dim3(Tile::kThreads), size_t(shared), stream},
         p);
}

}  // namespace

int cross_entropy_kept_vectors(const CrossEntropy& p) {
  const int vectors = vectors_of_row(p, 16 / bytes_of(p.dtype));
  const int64_t fit = (most_shared_bytes() - kOtherSharedBytes) / 16;
  return vectors <= fit ? vectors : int(fit / WideTile::kRowThreads * WideTile::kRowThreads);
}

int cross_entropy_vectors_in_registers(const CrossEntropy& p) {
  if (!spares_registers(bytes_of(p.dtype))) return 0;
  const int left = vectors_of_row(p, 16 / bytes_of(p.dtype)) - cross_entropy_kept_vectors(p);
  return std::min(left, WidestTile::kInRegisters * WidestTile::kRowThreads);
}

void launch_cross_entropy(const CrossEntropy& p, CrossEntropyPath path, Stream stream) {
  if (p.rows == 0) return;
  with_vectors(p.dtype, path == CrossEntropyPath::vector, [&](auto zero, auto size) {
    using T = decltype(zero);
    if (vectors_of_row(p, size) <= kWidestNarrowRow) return launch_tile<T, size(), NarrowTile>(p, stream);
    if constexpr (size() > 1 && spares_registers(sizeof(T))) {
      if (p.d_logits && cross_entropy_vectors_in_registers(p) > 0) return launch_tile<T, size(), WidestTile>(p, stream);
    }
    launch_tile<T, size(), WideTile>(p, stream);
  });
}

void launch_cross_entropy_backward(const CrossEntropy& p, CrossEntropyPath path, Stream stream) {
  if (p.rows == 0) return;
  with_vectors(p.dtype, path == CrossEntropyPath::vector, [&](auto zero, auto size) {
    const dim3 blocks(elementwise_blocks(p.rows, p.columns, size, kBackwardThreads));
    launch(cross_entropy_backward_kernel<decltype(zero), size()>, {blocks, dim3(kBackwardThreads), 0, stream}, p);
  });
}

}  // namespace fastgpt
