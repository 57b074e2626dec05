// From raw rows to the operands of sums and gradients, and back. A warp takes a row and its partner, a lane of it eight
// neighbouring features of both.
#pragma once

#include <type_traits>

#include "sides.cuh"

namespace fastcl::cuda {

constexpr int kEach = kDeepest / 32;  // features of a lane
static_assert(kViewsRows == kWarps);

template <Dtype R>
struct alignas(16) Packet {
  std::conditional_t<R == Dtype::f32, float, uint16_t> v[kEach];
};

// The features of this lane, zeros past the depth.
struct Features {
  float v[kEach];
};

__device__ __forceinline__ float dot(const Features& a, const Features& b) {
  float total = 0.0f;
#pragma unroll
  for (int e = 0; e < kEach; e++) total += a.v[e] * b.v[e];
  return warp_sum(total);
}

template <Dtype R>
__device__ __forceinline__ Features unpacked(const Packet<R>& packet) {
  Features f;
#pragma unroll
  for (int e = 0; e < kEach; e++)
    if constexpr (R == Dtype::f32)
      f.v[e] = packet.v[e];
    else
      f.v[e] = ptx::widen<R>(packet.v[e]);
  return f;
}

template <Dtype R>
__device__ __forceinline__ Packet<R> packed(const Features& f) {
  Packet<R> packet;
#pragma unroll
  for (int e = 0; e < kEach; e += 2)
    if constexpr (R == Dtype::f32) {
      packet.v[e] = f.v[e];
      packet.v[e + 1] = f.v[e + 1];
    } else {
      const uint32_t both = ptx::narrow2<R>(f.v[e], f.v[e + 1]);
      packet.v[e] = uint16_t(both);
      packet.v[e + 1] = uint16_t(both >> 16);
    }
  return packet;
}

// Which packet of a matrix is row i's and this lane's; only where the lane is inside the row.
__device__ __forceinline__ i64 packet_at(i64 i, int depth) { return i * depth / kEach + threadIdx.x % 32; }
__device__ __forceinline__ bool inside(int depth) { return ptx::guard(int(threadIdx.x % 32) * kEach < depth); }

template <Dtype R>
__device__ __forceinline__ Features read(const void* rows, i64 i, int depth) {
  return inside(depth) ? unpacked<R>(static_cast<const Packet<R>*>(rows)[packet_at(i, depth)]) : Features{};
}

template <Dtype R>
__device__ __forceinline__ void write(void* rows, i64 i, int depth, const Packet<R>& packet) {
  if (inside(depth)) static_cast<Packet<R>*>(rows)[packet_at(i, depth)] = packet;
}

// Divides a row by its length, and returns that: +inf, and a row of zeros, below the smallest number.
__device__ __forceinline__ float normalize(Features& f) {
  float largest = 0.0f;
#pragma unroll
  for (int e = 0; e < kEach; e++) largest = fmaxf(largest, fabsf(f.v[e]));
  largest = warp_max(largest);
  const bool tiny = largest < kTiny;
  // Divided by the largest entry first, squares stay in range.
#pragma unroll
  for (int e = 0; e < kEach; e++) f.v[e] /= tiny ? 1.0f : largest;
  const float squared = dot(f, f), norm = tiny ? INFINITY : sqrtf(squared);
#pragma unroll
  for (int e = 0; e < kEach; e++) f.v[e] /= norm;
  return tiny ? INFINITY : norm * largest;
}

// Row i of a view becomes row `to` of z; its features as they were rounded.
template <Dtype R, Dtype T>
__device__ __forceinline__ Features prepared(const Views& v, const void* view, int i, int to) {
  Features f = read<R>(view, i, v.depth);
  if (v.length) {
    const float length = normalize(f);
    if (threadIdx.x % 32 == 0) v.length[to] = length;
  }
  const Packet<T> packet = packed<T>(f);
  write(v.z, to, v.depth, packet);
  return unpacked<T>(packet);
}

// Rows of both views as they will be multiplied, with bounds (4, kParts) where those are asked for; logits of partners,
// drop keys (the number of a row in its view) and their ranges.
template <Dtype R, Dtype T>
__global__ void __launch_bounds__(kThreads) prepare_kernel(const Views v, float* bounds, i64* keys, i64* ranges) {
  const int lane = threadIdx.x % 32;
  const float scale = *v.scale;
  float longest = 0.0f;
  for (int i = blockIdx.x * kWarps + threadIdx.x / 32; i < v.count; i += gridDim.x * kWarps) {
    const Features x = prepared<R, T>(v, v.x, i, i), y = prepared<R, T>(v, v.y, i, v.count + i);
    const float p = scale * dot(x, y);
    if (lane < 2) {
      v.positive[lane * v.count + i] = p;
      keys[lane * v.count + i] = i;
    }
    if (bounds) longest = fmaxf(longest, fmaxf(nan_to_inf(dot(x, x)), nan_to_inf(dot(y, y))));
  }
  if (bounds) {
    longest = block_max(longest, reinterpret_cast<float*>(ptx::shared_memory()));
    if (threadIdx.x < 4) bounds[threadIdx.x * kParts + blockIdx.x] = threadIdx.x < 2 ? longest : 0.0f;  // no biases
  }
  for (int i = blockIdx.x * kThreads + threadIdx.x; i * kRange < 2 * v.count; i += gridDim.x * kThreads) {
    const int first = i * kRange, last = min(first + kRange, 2 * v.count) - 1;
    const bool of_one_view = ptx::guard(first >= v.count || last < v.count);
    ranges[2 * i] = of_one_view ? first % v.count : 0;
    ranges[2 * i + 1] = of_one_view ? last % v.count : v.count - 1;
  }
}

// The gradient of row i of a view: adds the parts of its negatives in order, and its partner's share, multiplies by the
// scale, and goes through the length: (dz - z <z, dz>) / |x|.
template <Dtype R>
__device__ __forceinline__ void restore_row(const Views& v, const RestoreSide& side, const void* view, int i,
                                            const float* length, const Features& own, const Features& partner,
                                            float share) {
  if (!side.parts) return;
  Features dz{};
  for (int split = 0; split < side.splits; split++) {
    const Features part = read<Dtype::f32>(side.parts, i64(split) * side.pitch + i, v.depth);
#pragma unroll
    for (int e = 0; e < kEach; e++) dz.v[e] += part.v[e];
  }
#pragma unroll
  for (int e = 0; e < kEach; e++) dz.v[e] += share * partner.v[e];
  const float along = dot(dz, own), scale = *v.scale;
  if (threadIdx.x % 32 == 0) side.dots[i] = along;
#pragma unroll
  for (int e = 0; e < kEach; e++) dz.v[e] *= scale;
  if (length) {
    Features z = read<R>(view, i, v.depth);  // not as it was rounded
#pragma unroll
    for (int e = 0; e < kEach; e++) z.v[e] /= *length;
    const float radial = dot(z, dz);
#pragma unroll
    for (int e = 0; e < kEach; e++) dz.v[e] = (dz.v[e] - z.v[e] * radial) / *length;
  }
  write(side.out, i, v.depth, packed<R>(dz));
}

template <Dtype R, Dtype T>
__global__ void __launch_bounds__(kThreads)
    restore_kernel(const Views v, const Sides sides, const RestoreSide x, const RestoreSide y) {
  const int i = blockIdx.x * kWarps + threadIdx.x / 32;
  if (!ptx::guard(i < v.count)) return;
  // The loss is -log sigmoid(p - n): what n receives, p receives with the other sign, from both of its anchors.
  const float share = -upstream(sides.row, i) - (sides.col.grad ? upstream(sides.col, i) : 0.0f);
  const Features first = read<T>(v.z, i, v.depth), second = read<T>(v.z, v.count + i, v.depth);
  restore_row<R>(v, x, v.x, i, v.length ? v.length + i : nullptr, first, second, share);
  restore_row<R>(v, y, v.y, i, v.length ? v.length + v.count + i : nullptr, second, first, share);
}

}  // namespace fastcl::cuda
