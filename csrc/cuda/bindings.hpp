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
using PairsTuple = std::tuple<std::array<Address, 2>, std::array<int, 3>, std::array<Address, 5>, std::array<Address, 6>,
                              bool>;

inline Pairs pairs_from(const PairsTuple& t) {
  const auto& [rows, sizes, reals, keys, symmetric] = t;
  const auto real = [&](int i) { return pointer<const float>(reals[i]); };
  const auto key = [&](int i) { return pointer<const i64>(keys[i]); };
  return {pointer<const void>(rows[0]), pointer<const void>(rows[1]), sizes[0], sizes[1], sizes[2],
          real(0), real(1), real(2), real(3), real(4), key(0), key(1), key(2), key(3), key(4), key(5), symmetric};
}

using SidesArray = std::array<Address, 4>;

inline Sides sides_from(const SidesArray& a) {
  const auto real = [&](int i) { return pointer<const float>(a[i]); };
  return {real(0), real(1), real(2), real(3)};
}

// pairs; sides; out, sum, total; blocks, splits
using GradSideTuple = std::tuple<PairsTuple, SidesArray, std::array<Address, 3>, std::array<int, 2>>;

inline GradSide grad_side_from(const GradSideTuple& t) {
  const auto& [pairs, sides, outs, counts] = t;
  return {pairs_from(pairs),        sides_from(sides),        pointer<float>(outs[0]), pointer<float>(outs[1]),
          pointer<float>(outs[2]), counts[0], counts[1]};
}

// pairs; parts, out; count, blocks
using FinishSideTuple = std::tuple<PairsTuple, std::array<Address, 2>, std::array<int, 2>>;

inline FinishSide finish_side_from(const FinishSideTuple& t) {
  const auto& [pairs, vectors, counts] = t;
  return {pairs_from(pairs), pointer<const float>(vectors[0]), pointer<float>(vectors[1]), counts[0], counts[1]};
}

using SumsFunction = void (*)(const Pairs&, Dtype, Link, const Sums&, Target);
using GradFunction = void (*)(const GradSide&, const GradSide&, Dtype, Link, const float*, Target);

// One pair of kernels for sums and gradients, and the tiles that the plan must know: rows and columns of both, and how many
// parts of the sums over rows a span of columns has.
inline void bind_products(pybind11::module_ module, const char* name, SumsFunction sums, GradFunction grad,
                          std::array<int, 5> (*tiles)(int depth)) {
  using Free = pybind11::call_guard<pybind11::gil_scoped_release>;
  module = module.def_submodule(name);
  module.def("tiles", tiles);
  module.def("sums",
             [=](const PairsTuple& pairs, int dtype, int link, const std::array<Address, 3>& vectors,
                 const std::array<int, 5>& plan, int blocks, Address stream) {
               const auto& [room, row_span, col_span, row_spans, units] = plan;
               const Sums to{pointer<const float>(vectors[0]), pointer<float>(vectors[1]), pointer<float>(vectors[2]),
                             room, row_span, col_span, row_spans, units};
               sums(pairs_from(pairs), Dtype(dtype), Link(link), to, {blocks, pointer<void>(stream)});
             },
             Free());
  module.def("grad",
             [=](const GradSideTuple& rows, const GradSideTuple& cols, int dtype, int link, Address balance, int blocks,
                 Address stream) {
               grad(grad_side_from(rows), grad_side_from(cols), Dtype(dtype), Link(link), pointer<const float>(balance),
                    {blocks, pointer<void>(stream)});
             },
             Free());
}

inline void bind(pybind11::module_ module) {
  using Free = pybind11::call_guard<pybind11::gil_scoped_release>;
  module.attr("parts") = kParts;
  module.attr("keys_in_a_range") = kRange;
  module.attr("deepest") = kDeepest;
  bind_products(module, "ampere", sums, grad, [](int depth) {
    return std::array{kSumsRows, sums_cols(depth), kGradRows, grad_cols(depth), 1};
  });
#ifdef FASTCL_HOPPER
  bind_products(module, "hopper", hopper_sums, hopper_grad, [](int depth) {
    return std::array{kHopperSumsRows, kHopperSumsCols, kHopperGradRows, hopper_grad_cols(depth), 2};
  });
#endif
  module.def("bounds",
             [](const PairsTuple& pairs, int dtype, Address bounds, Address row_ranges, Address col_ranges, int blocks,
                Address stream) {
               cuda::bounds(pairs_from(pairs), Dtype(dtype), pointer<float>(bounds), pointer<i64>(row_ranges),
                            pointer<i64>(col_ranges), {blocks, pointer<void>(stream)});
             },
             Free());
  module.def("finish",
             [](const FinishSideTuple& rows, const FinishSideTuple& cols, int dtype, int link, Address bounds, int room,
                int blocks, Address stream) {
               cuda::finish(finish_side_from(rows), finish_side_from(cols), Dtype(dtype), Link(link),
                            pointer<const float>(bounds), room, {blocks, pointer<void>(stream)});
             },
             Free());
  module.def("balance",
             [](const PairsTuple& pairs, int dtype, int link, const SidesArray& sides, Address balance, int blocks,
                Address stream) {
               cuda::balance(pairs_from(pairs), Dtype(dtype), Link(link), sides_from(sides), pointer<float>(balance),
                             {blocks, pointer<void>(stream)});
             },
             Free());
}

}  // namespace fastcl::cuda
