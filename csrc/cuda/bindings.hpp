// The CUDA kernels as a Python module: of fastcl._C where it was built with them, and of the simulator in tests.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "launch.hpp"

namespace fastcl::cuda {

using Address = uintptr_t;  // 0 where a tensor is absent

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// x, y; M, N, D; scale, row_bias, col_bias, row_ceiling, col_ceiling; drop_x, drop_y, only_x, only_y, row_ranges,
// col_ranges; symmetric
using PairsTuple =
    std::tuple<std::array<Address, 2>, std::array<int, 3>, std::array<Address, 5>, std::array<Address, 6>, bool>;

inline Pairs pairs_from(const PairsTuple& t) {
  const auto& [rows, sizes, reals, keys, symmetric] = t;
  const auto real = [&](int i) { return pointer<const float>(reals[i]); };
  const auto key = [&](int i) { return pointer<const i64>(keys[i]); };
  return {pointer<const void>(rows[0]),
          pointer<const void>(rows[1]),
          sizes[0],
          sizes[1],
          sizes[2],
          real(0),
          real(1),
          real(2),
          real(3),
          real(4),
          key(0),
          key(1),
          key(2),
          key(3),
          key(4),
          key(5),
          symmetric};
}

// lse, grad, positive; stride
using UpstreamTuple = std::tuple<std::array<Address, 3>, int>;

inline Upstream upstream_from(const UpstreamTuple& t) {
  const auto& [vectors, stride] = t;
  const auto real = [&](int i) { return pointer<const float>(vectors[i]); };
  return {real(0), real(1), real(2), stride};
}

using SidesTuple = std::tuple<UpstreamTuple, UpstreamTuple>;

inline Sides sides_from(const SidesTuple& t) { return {upstream_from(std::get<0>(t)), upstream_from(std::get<1>(t))}; }

// pairs; sides; out, sum, total; blocks, splits
using GradSideTuple = std::tuple<PairsTuple, SidesTuple, std::array<Address, 3>, std::array<int, 2>>;

inline GradSide grad_side_from(const GradSideTuple& t) {
  const auto& [pairs, sides, outs, counts] = t;
  return {
      pairs_from(pairs), sides_from(sides), pointer<float>(outs[0]), pointer<float>(outs[1]), pointer<float>(outs[2]),
      counts[0],         counts[1]};
}

// pairs; parts, out, positive, loss; count, blocks
using FinishSideTuple = std::tuple<PairsTuple, std::array<Address, 4>, std::array<int, 2>>;

inline FinishSide finish_side_from(const FinishSideTuple& t) {
  const auto& [pairs, vectors, counts] = t;
  return {pairs_from(pairs),
          pointer<const float>(vectors[0]),
          pointer<float>(vectors[1]),
          pointer<const float>(vectors[2]),
          pointer<float>(vectors[3]),
          counts[0],
          counts[1]};
}

// x, y, z, length, positive, scale; count, depth
using ViewsTuple = std::tuple<std::array<Address, 6>, std::array<int, 2>>;

inline Views views_from(const ViewsTuple& t) {
  const auto& [at, sizes] = t;
  return {pointer<const void>(at[0]),
          pointer<const void>(at[1]),
          pointer<void>(at[2]),
          pointer<float>(at[3]),
          pointer<float>(at[4]),
          pointer<const float>(at[5]),
          sizes[0],
          sizes[1]};
}

// parts, out, dots; splits, pitch
using RestoreSideTuple = std::tuple<std::array<Address, 3>, std::array<int, 2>>;

inline RestoreSide restore_side_from(const RestoreSideTuple& t) {
  const auto& [at, counts] = t;
  return {pointer<const float>(at[0]), pointer<void>(at[1]), pointer<float>(at[2]), counts[0], counts[1]};
}

using SumsFunction = void (*)(const Pairs&, Dtype, Link, const Sums&, Target);
using GradFunction = void (*)(const GradSide&, const GradSide&, Dtype, Link, Target);

// One pair of kernels for sums and gradients, and what the plan must know of them: rows and columns of their tiles, how
// many parts of the sums over rows a span of columns has, and how many blocks of sums fit on a processor.
inline void bind_products(pybind11::module_ module, const char* name, SumsFunction sums, GradFunction grad,
                          std::array<int, 6> (*tiles)(int depth)) {
  using Free = pybind11::call_guard<pybind11::gil_scoped_release>;
  module = module.def_submodule(name);
  module.def("tiles", tiles);
  module.def(
      "sums",
      [=](const PairsTuple& pairs, int dtype, int link, const std::array<Address, 3>& vectors,
          const std::array<int, 5>& plan, int blocks, Address stream) {
        const auto& [room, row_span, col_span, row_spans, units] = plan;
        const Sums to{pointer<const float>(vectors[0]),
                      pointer<float>(vectors[1]),
                      pointer<float>(vectors[2]),
                      room,
                      row_span,
                      col_span,
                      row_spans,
                      units};
        sums(pairs_from(pairs), Dtype(dtype), Link(link), to, {blocks, pointer<void>(stream)});
      },
      Free());
  module.def(
      "grad",
      [=](const GradSideTuple& rows, const GradSideTuple& cols, int dtype, int link, int blocks, Address stream) {
        grad(grad_side_from(rows), grad_side_from(cols), Dtype(dtype), Link(link), {blocks, pointer<void>(stream)});
      },
      Free());
}

// What has strips of weights besides.
inline void bind_strips(pybind11::module_ module) {
  using Free = pybind11::call_guard<pybind11::gil_scoped_release>;
  module.def(
      "weights",
      [](const PairsTuple& pairs, const SidesTuple& sides, int dtype, int link, const std::array<Address, 4>& at,
         i64 pitch, i64 low, const std::array<int, 4>& plan, int blocks, Address stream) {
        const auto& [row_span, col_span, row_spans, units] = plan;
        const GradSide side{pairs_from(pairs), sides_from(sides)};
        const Sums to{nullptr, pointer<float>(at[0]), pointer<float>(at[1]), 0, row_span, col_span, row_spans, units};
        const Strip strip{pointer<void>(at[2]), pitch, low, pointer<float>(at[3])};
        hopper_weights(side, Dtype(dtype), Link(link), to, strip, {blocks, pointer<void>(stream)});
      },
      Free());
  module.def(
      "product",
      [](const std::array<Address, 4>& at, i64 pitch, const std::array<int, 3>& sizes, bool transposed, bool add,
         int dtype, int blocks, Address stream) {
        const auto& [rows, depth, inner] = sizes;
        hopper_product({pointer<float>(at[0]), pointer<const float>(at[1]), rows, depth, inner, add},
                       pointer<const void>(at[2]), pitch, pointer<const void>(at[3]), transposed, Dtype(dtype),
                       {blocks, pointer<void>(stream)});
      },
      Free());
}

inline void bind(pybind11::module_ module) {
  using Free = pybind11::call_guard<pybind11::gil_scoped_release>;
  module.attr("parts") = kParts;
  module.attr("keys_in_a_range") = kRange;
  module.attr("deepest") = kDeepest;
  bind_products(module, "ampere", sums, grad,
                [](int depth) { return std::array{kSumsRows, sums_cols(depth), kGradRows, grad_cols(depth), 1, 2}; });
#ifdef FASTCL_HOPPER
  bind_products(module, "hopper", hopper_sums, hopper_grad, [](int depth) {
    if (depth > kDeepest) return std::array{kHopperWideRows, kHopperWideCols, kHopperWideRows, kHopperWideCols, 2, 1};
    return std::array{kHopperSumsRows, kHopperSumsCols, kHopperGradRows, hopper_grad_cols(depth), 2, 1};
  });
  bind_strips(module.attr("hopper"));
#endif
  module.attr("views_rows") = kViewsRows;
  module.def(
      "bounds",
      [](const PairsTuple& pairs, int dtype, Address bounds, Address row_ranges, Address col_ranges, int blocks,
         Address stream) {
        cuda::bounds(pairs_from(pairs), Dtype(dtype), pointer<float>(bounds), pointer<i64>(row_ranges),
                     pointer<i64>(col_ranges), {blocks, pointer<void>(stream)});
      },
      Free());
  module.def(
      "finish",
      [](const FinishSideTuple& rows, const FinishSideTuple& cols, int dtype, int link, Address bounds, int room,
         int blocks, Address stream) {
        cuda::finish(finish_side_from(rows), finish_side_from(cols), Dtype(dtype), Link(link),
                     pointer<const float>(bounds), room, {blocks, pointer<void>(stream)});
      },
      Free());
  module.def(
      "prepare",
      [](const ViewsTuple& views, int raw, int dtype, Address bounds, Address keys, Address ranges, int blocks,
         Address stream) {
        cuda::prepare(views_from(views), Dtype(raw), Dtype(dtype), pointer<float>(bounds), pointer<i64>(keys),
                      pointer<i64>(ranges), {blocks, pointer<void>(stream)});
      },
      Free());
  module.def(
      "restore",
      [](const ViewsTuple& views, const SidesTuple& sides, const RestoreSideTuple& x, const RestoreSideTuple& y,
         int raw, int dtype, int blocks, Address stream) {
        cuda::restore(views_from(views), sides_from(sides), restore_side_from(x), restore_side_from(y), Dtype(raw),
                      Dtype(dtype), {blocks, pointer<void>(stream)});
      },
      Free());
}

}  // namespace fastcl::cuda
