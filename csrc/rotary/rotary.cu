// Rotary embedding, and with it the norm of queries and keys. Read rotary_kernel first.
//
// A warp has a token. It finds the token's position once, and each lane reads its part of that position's cosines and
// sines once, for all heads: per token they are few beside the heads, but not if every head read them again. So a lane
// keeps its place within a head, and goes from head to head.
//
// A place is a pair of vectors, a slot: kSize neighbours of the first half of what is rotated, and their partners half
// of it further on. What is not rotated (the rest of a head) makes slots too, of two vectors side by side. For heads of
// 64 and 16 bits a head has four slots, and the warp works on eight heads at a time: whole lines of memory in each
// access. The number of lanes for a head is a power of two, so of heads of 96 a quarter of the lanes idles.
//
// In place, a store may change what the next load reads, for all that the compiler knows. So that loads do not wait for
// stores, a lane loads the slots of kBatch heads before it stores one. Four of them are 128 bytes for each thread.
//
// With the norm, the lanes of a head add up its squares by shuffles. Blocks stay (a grid of as many as run at a time),
// for each block keeps the two weights in shared memory. Their gradients are sums over all tokens: a lane adds up those
// of its slot over a run of tokens, a block its lanes' in a fixed order into one row of `partials`, and a second kernel
// adds those up in double. There are no atomics, so the result is the same every time. Such a thread needs 160
// registers, so the backward has 12 warps on a multiprocessor, where the forward has 16.
//
// With kSize = 1 the same kernels serve everything: widths that are no multiple of a vector, memory that does not begin
// at one. Then a lane may have many slots of a head, and with the norm reads them once more from the cache; and the
// weights' gradients have a kernel of their own. All this is chosen by bytes and registers; no time on a GPU has
// been taken so far.

#include "rotary/rotary.h"

#include <algorithm>

#include "device/bounds.cuh"
#include "device/elementwise.cuh"
#include "device/numeric.cuh"
#include "device/reduce.cuh"
#include "device/vector.cuh"
#include "host/launch.h"
#include "host/multiprocessors.h"

namespace fastgpt {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;
constexpr int kBatch = 4;        // heads whose loads are on their way at a time
constexpr int kNormBlocks = 2;   // of a multiprocessor, for kernels whose blocks stay
constexpr int kSumWarps = 4, kSumThreads = kSumWarps * kWarp, kSumBlocks = 3;  // of the norm's backward
constexpr int kWidestNorm = 256; // heads on the norm's vector path: their weights are in shared memory
constexpr int64_t kMostTokensOfSum = 512;  // that a block adds up before it writes a partial sum

template <class T>
using Wide = decltype(widen(T()));

// A head's slots, and how the lanes of a warp share them out. The lane's own are slot(), slot() + lanes, ...
struct Slots {
  int pairs, all, lanes, groups;

  __device__ __forceinline__ Slots(const RotaryPlan& plan, int size) {
    pairs = int(plan.half) / size;
    const int rest = int(plan.width - 2 * plan.half) / size;
    all = pairs + (rest + 1) / 2;
    lanes = 1;
    while (lanes < all && lanes < kWarp) lanes *= 2;
    groups = kWarp / lanes;
  }
  __device__ __forceinline__ int first() const { return int(threadIdx.x % kWarp) % lanes; }
  __device__ __forceinline__ int group() const { return int(threadIdx.x % kWarp) / lanes; }
};

// Where the two vectors of a slot are within a head; the second may not exist.
struct Places {
  int first, second;
  bool rotated, both;

  template <int kSize>
  static __device__ __forceinline__ Places of(const RotaryPlan& plan, const Slots& slots, int slot) {
    if (slot < slots.pairs) return {slot * kSize, slot * kSize + int(plan.half), true, true};
    const int first = 2 * int(plan.half) + 2 * (slot - slots.pairs) * kSize;
    return {first, first + kSize, false, in_bounds(first + kSize, int(plan.width))};
  }
};

// Of one token: where its heads begin, and its row of the tables.
struct Token {
  int64_t index, batch, of_batch, position;

  __device__ __forceinline__ Token(const RotaryPlan& plan, int64_t index_) : index(index_) {
    batch = index / plan.tokens;
    of_batch = position = index - batch * plan.tokens;
    if (!plan.positions) return;
    const int64_t at = batch * plan.positions_batch + of_batch;
    position = plan.long_positions ? static_cast<const int64_t*>(plan.positions)[at]
                                   : static_cast<const int32_t*>(plan.positions)[at];
  }
  template <class T>
  __device__ __forceinline__ const T* in(const ConstHeads& heads) const {
    return static_cast<const T*>(heads.data) + batch * heads.batch + of_batch * heads.token;
  }
  template <class T>
  __device__ __forceinline__ T* out(const RotaryPlan& plan, void* heads) const {
    return static_cast<T*>(heads) + index * (plan.q_heads + plan.k_heads + plan.v_heads) * plan.width;
  }
};

// The tokens of a warp, when every warp of the grid has one at a time.
__device__ __forceinline__ int64_t token_of_warp() { return int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; }

template <int kSize, class A>
__device__ __forceinline__ void load_all(A (&to)[kSize], const A* from) {
  constexpr int kStep = kSize * sizeof(A) >= 16 ? 16 / sizeof(A) : 1;
#pragma unroll
  for (int i = 0; i < kSize; i += kStep) {
    const Vec<A, kStep> loaded = load<kStep>(from + i);
#pragma unroll
    for (int j = 0; j < kStep; ++j) to[i + j] = loaded.at[j];
  }
}

template <class A, int kSize>
struct Turn {
  A cos[kSize], sin[kSize];

  // NaN where there is no such position: nothing is read there.
  __device__ __forceinline__ void read_turn(const RotaryPlan& plan, const Token& token, int first) {
    if (in_bounds(uint64_t(token.position), uint64_t(plan.table_rows))) {
      const int64_t at = token.position * plan.half + first;
      load_all(cos, static_cast<const A*>(plan.cos) + at);
      load_all(sin, static_cast<const A*>(plan.sin) + at);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) cos[i] = sin[i] = A(NAN);
    }
  }
};

template <class T, int kSize>
struct Pair {
  Vec<T, kSize> first, second;

  __device__ __forceinline__ void read_pair(const T* head, const Places& at) {
    first = load<kSize>(head + at.first);
    second = Vec<T, kSize>{};
    if (at.both) second = load<kSize>(head + at.second);
  }
  __device__ __forceinline__ void write(T* head, const Places& at) const {
    store_whole(head + at.first, first);
    if (at.both) store_whole(head + at.second, second);
  }
};

// The heads that do not change, of one token.
template <class T, int kSize>
__device__ __forceinline__ void copy_values(const RotaryPlan& plan, const ConstHeads& x, const Token& token, T* y) {
  const int of_head = int(plan.width) / kSize, all = int(plan.v_heads) * of_head;
  const int64_t first = plan.q_heads + plan.k_heads;
  const T* from = token.in<T>(x) + first * x.head;
  T* to = y + first * plan.width;
  for (int i = threadIdx.x % kWarp; i < all; i += kWarp) {
    const int head = i / of_head;
    store_whole(to + int64_t(i) * kSize, load<kSize>(from + head * x.head + (i - head * of_head) * kSize));
  }
}

template <class T, int kSize>
__global__ __launch_bounds__(kThreads) void rotary_kernel(Rotary p) {
  using A = Wide<T>;
  const RotaryPlan& plan = p.plan;
  const int64_t index = token_of_warp();
  if (!in_bounds(index, plan.batches * plan.tokens)) return;
  const Token token(plan, index);
  const Slots slots(plan, kSize);
  const int heads = int(plan.q_heads + plan.k_heads), end = p.in_place ? slots.pairs : slots.all;
  const T* x = token.in<T>(p.x);
  T* y = token.out<T>(plan, p.y);

  for (int slot = slots.first(); slot < end; slot += slots.lanes) {
    const Places at = Places::of<kSize>(plan, slots, slot);
    Turn<A, kSize> turn;
    if (at.rotated) turn.read_turn(plan, token, at.first);
    for (int head = slots.group(); head < heads; head += kBatch * slots.groups) {
      Pair<T, kSize> pairs[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t here = head + i * slots.groups;
        if (in_bounds(here, int64_t(heads))) pairs[i].read_pair(x + here * p.x.head, at);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t here = head + i * slots.groups;
        if (!in_bounds(here, int64_t(heads))) continue;
        if (at.rotated) {
#pragma unroll
          for (int j = 0; j < kSize; ++j) {
            const A a = widen(pairs[i].first.at[j]), b = widen(pairs[i].second.at[j]);
            const A sin = p.backwards ? -turn.sin[j] : turn.sin[j];
            pairs[i].first.at[j] = narrow<T>(a * turn.cos[j] - b * sin);
            pairs[i].second.at[j] = narrow<T>(b * turn.cos[j] + a * sin);
          }
        }
        pairs[i].write(y + here * plan.width, at);
      }
    }
  }
  if (!p.in_place) copy_values<T, kSize>(plan, p.x, token, y);
}

// ---- with the norm -----------------------------------------------------------------------------------------------

// The sum over the lanes of a head; every lane of the warp is here.
template <class A>
__device__ __forceinline__ A sum_of_head(A x, int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// Something of each channel of a head, in shared memory, for lanes that take kSize neighbours by 16 bytes. Where those are
// two accesses (floats of 16-bit heads), neighbouring lanes would begin 32 bytes apart and half of the banks have two of
// them to serve. So all first halves lie together and then all second ones, 16 banks further on: whoever takes single
// channels in their order meets no bank twice either.
template <class A, int kSize>
struct alignas(16) Channels {
  static constexpr int kStep = kSize * sizeof(A) > 16 ? 16 / sizeof(A) : kSize, kHalves = kSize / kStep;
  static_assert(kHalves <= 2);
  static constexpr int kBetween = kHalves == 1 ? 0 : kWidestNorm / 2 + 16;
  A data[kHalves == 1 ? kWidestNorm : 2 * kBetween];

  static __device__ __forceinline__ int place(int channel) {
    return channel % kSize / kStep * kBetween + channel / kSize * kStep + channel % kStep;
  }
  // `first` is a multiple of kSize.
  __device__ __forceinline__ void read_channels(A (&to)[kSize], int first) const {
#pragma unroll
    for (int i = 0; i < kSize; i += kStep) {
      const Vec<A, kStep> loaded = load<kStep>(data + first / kSize * kStep + i / kStep * kBetween);
#pragma unroll
      for (int j = 0; j < kStep; ++j) to[i + j] = loaded.at[j];
    }
  }
  __device__ __forceinline__ void write_channels(const A (&from)[kSize], int first) {
#pragma unroll
    for (int i = 0; i < kSize; i += kStep) {
      Vec<A, kStep> stored;
#pragma unroll
      for (int j = 0; j < kStep; ++j) stored.at[j] = from[i + j];
      store(data + first / kSize * kStep + i / kStep * kBetween, stored);
    }
  }
};

// One of the two weights: in shared memory, or with kSize = 1 where the caller has it.
template <class A, int kSize>
struct Weight {
  const void* data;
  DType dtype;

  __device__ __forceinline__ void read_weight(A (&first)[kSize], A (&second)[kSize], const Places& at) const {
    if constexpr (kSize == 1) {
      first[0] = load_as<A>(data, dtype, at.first);
      second[0] = at.both ? load_as<A>(data, dtype, at.second) : A(0);
    } else {
      const Channels<A, kSize>& kept = *static_cast<const Channels<A, kSize>*>(data);
      kept.read_channels(first, at.first);
      if (at.both) kept.read_channels(second, at.second);
    }
  }
};

// The weights of queries (0) and keys (1), for the kernels whose blocks stay.
template <class A, int kSize, class P>
__device__ __forceinline__ void take_weights(const P& p, Weight<A, kSize> (&weights)[2]) {
  if constexpr (kSize == 1) {
    weights[0] = {p.q_weight, p.q_weight_dtype};
    weights[1] = {p.k_weight, p.k_weight_dtype};
  } else {
    using Kept = Channels<A, kSize>;
    __shared__ Kept kept[2];
    for (int i = threadIdx.x; i < p.plan.width; i += int(blockDim.x)) {
      kept[0].data[Kept::place(i)] = load_as<A>(p.q_weight, p.q_weight_dtype, i);
      kept[1].data[Kept::place(i)] = load_as<A>(p.k_weight, p.k_weight_dtype, i);
    }
    __syncthreads();
    weights[0].data = &kept[0];
    weights[1].data = &kept[1];
  }
}

// What a lane of these kernels needs besides heads: the turn and the weights at its slot. On the vector path a lane has one
// slot, and reads them when a token, or its query or key heads, begin; with kSize = 1 it reads them at every slot.
template <class A, int kSize>
struct NormLane {
  const RotaryPlan& plan;
  Slots slots;
  Places places;
  Weight<A, kSize> weights[2];
  Turn<A, kSize> turn;
  A first[kSize], second[kSize];  // weights

  template <class P>
  __device__ __forceinline__ explicit NormLane(const P& p) : plan(p.plan), slots(plan, kSize) {
    places = Places::of<kSize>(plan, slots, slots.first());
    take_weights<A, kSize>(p, weights);
  }
  __device__ __forceinline__ void begin_token(const Token& token) {
    if (kSize > 1 && slots.first() < slots.pairs) turn.read_turn(plan, token, places.first);
  }
  __device__ __forceinline__ void begin_part(int part) {
    if (kSize > 1 && slots.first() < slots.all) weights[part].read_weight(first, second, places);
  }
  __device__ __forceinline__ void begin_slot(const Token& token, int part, const Places& at) {
    if constexpr (kSize == 1) {
      weights[part].read_weight(first, second, at);
      if (at.rotated) turn.read_turn(plan, token, at.first);
    }
  }
};

template <class T, int kSize>
__global__ __launch_bounds__(kThreads, kNormBlocks) void rotary_norm_forward_kernel(RotaryNormForward p) {
  using A = Wide<T>;
  const RotaryPlan& plan = p.plan;
  const A width = A(plan.width);
  NormLane<A, kSize> lane(p);
  const Slots& slots = lane.slots;
  const Turn<A, kSize>& turn = lane.turn;

  for (int64_t index = token_of_warp(); index < plan.batches * plan.tokens; index += int64_t(gridDim.x) * kWarps) {
    const Token token(plan, index);
    const T* x = token.in<T>(p.x);
    T* y = token.out<T>(plan, p.y);
    lane.begin_token(token);
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int begin = part ? int(plan.q_heads) : 0, heads = int(part ? plan.k_heads : plan.q_heads);
      lane.begin_part(part);

      for (int group = 0; group < heads; group += slots.groups) {
        const int64_t head = group + slots.group();
        const bool exists = in_bounds(head, int64_t(heads));
        Pair<T, kSize> pair;
        A squares = 0;
        for (int slot = slots.first(); exists && slot < slots.all; slot += slots.lanes) {
          pair.read_pair(x + (begin + head) * p.x.head, Places::of<kSize>(plan, slots, slot));
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            const A a = widen(pair.first.at[i]), b = widen(pair.second.at[i]);
            squares += a * a;
            squares += b * b;
          }
        }
        const A rstd = inverse_sqrt(sum_of_head(squares, slots.lanes) / width + A(p.eps));
        for (int slot = slots.first(); exists && slot < slots.all; slot += slots.lanes) {
          const Places at = Places::of<kSize>(plan, slots, slot);
          if constexpr (kSize == 1) pair.read_pair(x + (begin + head) * p.x.head, at);
          lane.begin_slot(token, part, at);
          Pair<T, kSize> y_pair;
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            const A a = widen(pair.first.at[i]) * rstd * lane.first[i];
            const A b = widen(pair.second.at[i]) * rstd * lane.second[i];
            y_pair.first.at[i] = narrow<T>(at.rotated ? a * turn.cos[i] - b * turn.sin[i] : a);
            y_pair.second.at[i] = narrow<T>(at.rotated ? b * turn.cos[i] + a * turn.sin[i] : b);
          }
          y_pair.write(y + (begin + head) * plan.width, at);
        }
      }
    }
    copy_values<T, kSize>(plan, p.x, token, y);
  }
}

// With xhat = x * rstd, g the gradient turned back, and w the weight:
//   d_weight = sum(g * xhat);  d_x = rstd * (g * w - xhat * mean(g * w * xhat))
template <class T, int kSize>
__global__ __launch_bounds__(kSumThreads, kSumBlocks) void rotary_norm_backward_kernel(RotaryNormBackward p) {
  using A = Wide<T>;
  const RotaryPlan& plan = p.plan;
  const A width = A(plan.width);
  NormLane<A, kSize> lane(p);
  const Slots& slots = lane.slots;
  const Turn<A, kSize>& turn = lane.turn;

  A d_first[2][kSize] = {}, d_second[2][kSize] = {};  // of the weights, on the vector path
  const int64_t run = int64_t(blockIdx.x) * p.tokens_of_sum;
  const int64_t end = min(run + p.tokens_of_sum, plan.batches * plan.tokens);
  for (int64_t index = run + threadIdx.x / kWarp; index < end; index += kSumWarps) {
    const Token token(plan, index);
    const T *x = token.in<T>(p.x), *d_y = token.in<T>(p.d_y);
    lane.begin_token(token);
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int begin = part ? int(plan.q_heads) : 0, heads = int(part ? plan.k_heads : plan.q_heads);
      lane.begin_part(part);

      for (int group = 0; group < heads; group += slots.groups) {
        const int64_t head = group + slots.group();
        const bool exists = in_bounds(head, int64_t(heads));
        const T *x_head = x + (begin + head) * p.x.head, *d_y_head = d_y + (begin + head) * p.d_y.head;
        Pair<T, kSize> of_x;
        A g_first[kSize], g_second[kSize];  // the gradient turned back
        const auto read_head = [&](const Places& at) {
          Pair<T, kSize> of_d_y;
          of_x.read_pair(x_head, at);
          of_d_y.read_pair(d_y_head, at);
          lane.begin_slot(token, part, at);
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            const A a = widen(of_d_y.first.at[i]), b = widen(of_d_y.second.at[i]);
            g_first[i] = at.rotated ? a * turn.cos[i] + b * turn.sin[i] : a;
            g_second[i] = at.rotated ? b * turn.cos[i] - a * turn.sin[i] : b;
          }
        };

        A squares = 0, products = 0;  // of x * x, and of g * w * x
        for (int slot = slots.first(); exists && slot < slots.all; slot += slots.lanes) {
          const Places at = Places::of<kSize>(plan, slots, slot);
          read_head(at);
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            const A a = widen(of_x.first.at[i]), b = widen(of_x.second.at[i]);
            squares += a * a;
            products += g_first[i] * lane.first[i] * a;
            if (!at.both) continue;
            squares += b * b;
            products += g_second[i] * lane.second[i] * b;
          }
        }
        const A rstd = inverse_sqrt(sum_of_head(squares, slots.lanes) / width + A(p.eps));
        const A mean = sum_of_head(products, slots.lanes) * rstd / width;
        if constexpr (kSize == 1) {
          if (exists && slots.first() == 0)
            static_cast<A*>(p.rstd)[index * (plan.q_heads + plan.k_heads) + begin + head] = rstd;
        }
        for (int slot = slots.first(); exists && slot < slots.all; slot += slots.lanes) {
          const Places at = Places::of<kSize>(plan, slots, slot);
          if constexpr (kSize == 1) read_head(at);
          Pair<T, kSize> d_x;
#pragma unroll
          for (int i = 0; i < kSize; ++i) {
            const A a = widen(of_x.first.at[i]) * rstd, b = widen(of_x.second.at[i]) * rstd;
            d_x.first.at[i] = narrow<T>(rstd * (g_first[i] * lane.first[i] - a * mean));
            d_x.second.at[i] = narrow<T>(rstd * (g_second[i] * lane.second[i] - b * mean));
            if constexpr (kSize > 1) {
              d_first[part][i] += g_first[i] * a;
              d_second[part][i] += g_second[i] * b;
            }
          }
          if (p.d_x) d_x.write(token.out<T>(plan, p.d_x) + (begin + head) * plan.width, at);
        }
      }
    }
    if (p.d_x) copy_values<T, kSize>(plan, p.d_y, token, token.out<T>(plan, p.d_x));
  }

  if constexpr (kSize > 1) {
    if (!p.partials) return;
    using Sums = Channels<A, kSize>;
    __shared__ Sums of_warp[kSumWarps][2];
    const int warp = threadIdx.x / kWarp;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        for (int distance = slots.lanes; distance < kWarp; distance *= 2) {
          d_first[part][i] += __shfl_xor_sync(0xffffffffu, d_first[part][i], distance);
          d_second[part][i] += __shfl_xor_sync(0xffffffffu, d_second[part][i], distance);
        }
      }
      if (slots.group() > 0 || slots.first() >= slots.all) continue;
      const Places at = Places::of<kSize>(plan, slots, slots.first());
      of_warp[warp][part].write_channels(d_first[part], at.first);
      if (at.both) of_warp[warp][part].write_channels(d_second[part], at.second);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * plan.width; i += kSumThreads) {
      const int part = i / int(plan.width), column = i - part * int(plan.width);
      A sum = 0;
      for (int other = 0; other < kSumWarps; ++other) sum += of_warp[other][part].data[Sums::place(column)];
      static_cast<A*>(p.partials)[blockIdx.x * 2 * plan.width + i] = sum;
    }
  }
}

// The generic path's partial sums: a thread for each channel of queries (y = 0) or keys (y = 1) and run of tokens.
template <class T>
__global__ __launch_bounds__(kThreads) void rotary_norm_partials_kernel(RotaryNormBackward p) {
  using A = Wide<T>;
  const RotaryPlan& plan = p.plan;
  const int64_t column = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (!in_bounds(column, plan.width)) return;
  const int part = blockIdx.y;
  const int64_t begin = part ? plan.q_heads : 0, heads = part ? plan.k_heads : plan.q_heads;
  const bool rotated = column < 2 * plan.half, second = column >= plan.half;
  const int64_t slot = second ? column - plan.half : column, partner = second ? slot : column + plan.half;

  for (int64_t sum = blockIdx.z; sum < p.sums; sum += gridDim.z) {
    const int64_t end = min((sum + 1) * p.tokens_of_sum, plan.batches * plan.tokens);
    A of_run = 0;
    for (int64_t index = sum * p.tokens_of_sum; index < end; ++index) {
      const Token token(plan, index);
      Turn<A, 1> turn{{A(1)}, {A(0)}};
      if (rotated) turn.read_turn(plan, token, int(slot));
      for (int64_t head = begin; head < begin + heads; ++head) {
        const T* d_y = token.in<T>(p.d_y) + head * p.d_y.head;
        A g = widen(d_y[column]);
        if (rotated) g = g * turn.cos[0] + widen(d_y[partner]) * (second ? -turn.sin[0] : turn.sin[0]);
        const A rstd = static_cast<const A*>(p.rstd)[index * (plan.q_heads + plan.k_heads) + head];
        of_run += g * widen(token.in<T>(p.x)[head * p.x.head + column]) * rstd;
      }
    }
    static_cast<A*>(p.partials)[(2 * sum + part) * plan.width + column] = of_run;
  }
}

// A block for 32 channels of both weights, side by side.
template <class A>
__global__ __launch_bounds__(kThreads) void rotary_norm_sum_kernel(RotaryNormBackward p) {
  const int64_t width = p.plan.width, i = int64_t(blockIdx.x) * kWarp + threadIdx.x % kWarp;
  const bool exists = in_bounds(i, 2 * width);
  const double sum = sum_of_column<kWarps>(static_cast<const A*>(p.partials) + i, p.sums, 2 * width, exists);
  if (!exists || threadIdx.x >= kWarp) return;
  if (i < width) store_as(p.d_q_weight, p.q_weight_dtype, i, sum);
  else store_as(p.d_k_weight, p.k_weight_dtype, i - width, sum);
}

// ---- launchers ---------------------------------------------------------------------------------------------------

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t tokens_of(const RotaryPlan& plan) { return plan.batches * plan.tokens; }

int64_t blocks_that_stay(int on_one) { return int64_t(multiprocessors()) * on_one; }

}  // namespace

bool rotary_norm_fits_vectors(const RotaryPlan& plan) {
  return plan.width <= kWidestNorm && plan.width * bytes_of(plan.dtype) <= 2 * 16 * kWarp;
}

void rotary_split_tokens(RotaryNormBackward& p) {
  const int64_t all = tokens_of(p.plan), blocks = std::min(divided_up(all, kSumWarps), blocks_that_stay(kSumBlocks));
  p.tokens_of_sum = all == 0 ? 1 : std::min(divided_up(all, blocks), kMostTokensOfSum);
  p.sums = divided_up(all, p.tokens_of_sum);
}

void launch_rotary(const Rotary& p, RotaryPath path, Stream stream) {
  const int64_t all = tokens_of(p.plan);
  if (all == 0) return;
  with_vectors(p.plan.dtype, path == RotaryPath::vector, [&](auto zero, auto size) {
    const LaunchShape shape{dim3(unsigned(divided_up(all, kWarps))), dim3(kThreads), 0, stream};
    launch(rotary_kernel<decltype(zero), size()>, shape, p);
  });
}

void launch_rotary_norm_forward(const RotaryNormForward& p, RotaryPath path, Stream stream) {
  const int64_t all = tokens_of(p.plan);
  if (all == 0) return;
  with_vectors(p.plan.dtype, path == RotaryPath::vector, [&](auto zero, auto size) {
    const dim3 grid(unsigned(std::min(divided_up(all, kWarps), blocks_that_stay(kNormBlocks))));
    launch(rotary_norm_forward_kernel<decltype(zero), size()>, {grid, dim3(kThreads), 0, stream}, p);
  });
}

void launch_rotary_norm_backward(const RotaryNormBackward& p, RotaryPath path, Stream stream) {
  with_vectors(p.plan.dtype, path == RotaryPath::vector, [&](auto zero, auto size) {
    using T = decltype(zero);
    if (p.sums > 0) {
      launch(rotary_norm_backward_kernel<T, size()>, {dim3(unsigned(p.sums)), dim3(kSumThreads), 0, stream}, p);
    }
    if (!p.d_q_weight) return;
    if (path == RotaryPath::generic && p.sums > 0) {
      const dim3 grid(unsigned(divided_up(p.plan.width, kThreads)), 2, unsigned(std::min<int64_t>(p.sums, 1024)));
      launch(rotary_norm_partials_kernel<T>, {grid, dim3(kThreads), 0, stream}, p);
    }
    const dim3 grid(unsigned(divided_up(2 * p.plan.width, kWarp)));
    launch(rotary_norm_sum_kernel<Wide<T>>, {grid, dim3(kThreads), 0, stream}, p);
  });
}

}  // namespace fastgpt
