// The Python module fastcl._C: the only C++ file that knows Python. Tensors arrive as addresses and strides, so the
// module is built without torch and serves every version of it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "contrastive.hpp"
#include "doubles.hpp"
#include "engine.hpp"
#include "normalize.hpp"
#ifdef FASTCL_CUDA
#include "cuda/bindings.hpp"
#endif

namespace py = pybind11;
using namespace py::literals;

namespace {

using fastcl::i64;
using Address = uintptr_t;  // 0 where a tensor is absent
using RowsTuple = std::tuple<Address, int, i64, i64, i64, i64>;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

fastcl::Rows rows(const RowsTuple& t) {
  const auto& [data, dtype, count, depth, row_stride, col_stride] = t;
  return {at<void>(data), fastcl::Dtype(dtype), count, depth, row_stride, col_stride};
}

// Asks for large pages: the first touch of a large buffer otherwise costs more than what is written to it.
void expect_large(Address address, i64 bytes) {
#ifdef __linux__
  constexpr Address page = 4096;
  const Address begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  if (bytes >= 4 << 20) madvise(at<void>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
#endif
}

template <class Real>
fastcl::SideOf<Real> side(Address lse, Address grad) {
  return {at<Real>(lse), at<Real>(grad)};
}

// Python's constructor of an engine for pairs whose numbers are Real.
template <class Engine, class Real>
auto from_python() {
  return py::init([](const RowsTuple& x, const RowsTuple& y, bool symmetric, double scale, Address row_bias,
                     Address col_bias, Address drop_x, Address drop_y, Address only_x, Address only_y,
                     Address row_ceiling, Address col_ceiling, const std::string& isa, int threads) {
    const fastcl::PairsOf<Real> pairs{rows(x),
                                      rows(y),
                                      symmetric,
                                      Real(scale),
                                      at<Real>(row_bias),
                                      at<Real>(col_bias),
                                      at<Real>(row_ceiling),
                                      at<Real>(col_ceiling),
                                      at<i64>(drop_x),
                                      at<i64>(drop_y),
                                      at<i64>(only_x),
                                      at<i64>(only_y)};
    return std::make_unique<Engine>(pairs, isa.c_str(), threads);
  });
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  using fastcl::Doubles;
  using fastcl::Engine;
  using Free = py::call_guard<py::gil_scoped_release>;
  module.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const char* name : fastcl::instruction_sets()) names.push_back(name);
    return names;
  });
  module.def("expect_large", expect_large);
  py::class_<Engine>(module, "Engine")
      .def(from_python<Engine, float>(), Free())
      .def("guided_by", &Engine::guided_by, py::keep_alive<1, 2>())
      .def_property_readonly("work_bytes", &Engine::work_bytes)
      .def_property_readonly("tiles", &Engine::tiles)
      .def_property_readonly("tile_bytes", &Engine::tile_bytes)
      .def_property_readonly("wide", &Engine::wide)
      .def("packed_bytes", &Engine::packed_bytes, "gradient"_a)
      .def(
          "pack", [](Engine& e, Address packed, bool gradient) { e.pack(at<void>(packed), gradient); }, Free())
      .def(
          "reuse", [](Engine& e, Address packed) { return e.reuse(at<void>(packed)); }, Free())
      .def(
          "reduce",
          [](Engine& e, int link, bool both, Address work, Address kept, i64 keep, Address row, Address col) {
            return e.reduce(fastcl::Link(link), both, at<void>(work), at<void>(kept), keep, at<float>(row),
                            at<float>(col));
          },
          Free())
      .def(
          "grad",
          [](Engine& e, int link, Address row_lse, Address row_grad, Address col_lse, Address col_grad, Address work,
             Address kept, i64 keep, Address dx, Address dy, Address row_sum, Address col_sum) {
            e.grad(fastcl::Link(link), side<float>(row_lse, row_grad), side<float>(col_lse, col_grad), at<void>(work),
                   at<void>(kept), keep, at<float>(dx), at<float>(dy), at<float>(row_sum), at<float>(col_sum));
          },
          Free())
      .def(
          "reduce_grad",
          [](Engine& e, Address work, Address row, Address dx) {
            return e.reduce_grad(at<void>(work), at<float>(row), at<float>(dx));
          },
          Free())
      .def(
          "topk",
          [](Engine& e, Address work, i64 k, Address values, Address indices) {
            e.topk(at<void>(work), k, at<float>(values), at<i64>(indices));
          },
          Free());
  py::class_<Doubles>(module, "Doubles")
      .def(from_python<Doubles, double>())
      .def("guided_by", &Doubles::guided_by, py::keep_alive<1, 2>())
      .def(
          "reduce", [](Doubles& d, int link, Address row) { d.reduce(fastcl::Link(link), at<double>(row)); }, Free())
      .def(
          "grad",
          [](Doubles& d, int link, Address row_lse, Address row_grad, Address col_lse, Address col_grad, Address dx,
             Address row_sum) {
            d.grad(fastcl::Link(link), side<double>(row_lse, row_grad), side<double>(col_lse, col_grad), at<double>(dx),
                   at<double>(row_sum));
          },
          Free())
      .def(
          "topk",
          [](Doubles& d, i64 k, Address values, Address indices) { d.topk(k, at<double>(values), at<i64>(indices)); },
          Free());
  module.def(
      "normalize",
      [](const RowsTuple& x, int threads, int dtype, Address unit, Address length) {
        fastcl::normalize(rows(x), threads, fastcl::Dtype(dtype), at<void>(unit), at<void>(length));
      },
      Free());
  module.def(
      "normalize_grad",
      [](const RowsTuple& x, Address length, const RowsTuple& grad, int threads, Address dx) {
        fastcl::normalize_grad(rows(x), at<void>(length), rows(grad), threads, at<void>(dx));
      },
      Free());
  module.def(
      "losses",
      [](const RowsTuple& z, float scale, i64 anchors, Address lse, Address positive, int threads, Address loss) {
        fastcl::losses({rows(z), scale}, {anchors, at<float>(lse), at<float>(positive)}, threads, at<float>(loss));
      },
      Free());
  module.def(
      "upstreams",
      [](i64 anchors, Address lse, Address positive, Address grad, i64 stride, Address grad_of_lse, Address kept_lse) {
        fastcl::upstreams({anchors, at<float>(lse), at<float>(positive)}, at<float>(grad), stride,
                          at<float>(grad_of_lse), at<float>(kept_lse));
      },
      Free());
  module.def(
      "restore",
      [](const RowsTuple& z, float scale, const RowsTuple& x, Address length, i64 first, i64 anchors,
         Address grad_of_lse, Address dz, i64 pitch, int threads, Address dx, Address dots) {
        fastcl::restore({rows(z), scale}, rows(x), at<float>(length), first, anchors, at<float>(grad_of_lse),
                        at<float>(dz), pitch, threads, at<void>(dx), at<float>(dots));
      },
      Free());
#ifdef FASTCL_CUDA
  fastcl::cuda::bind(module.def_submodule("cuda"));
#endif
}
