// Python module _simulated: the CUDA kernels, run by the simulator on addresses of ordinary memory.
#include "../cuda/bindings.hpp"
#include "../cuda/run.cuh"
#include "../cuda/tile.cuh"
#include "probes.cuh"
#include "simulator.hpp"

static std::vector<decltype(sim::left_out)> listed;

PYBIND11_MODULE(_simulated, module) {
  using namespace fastcl;
  using namespace fastcl::cuda;
  bind(module);
  // What can be left out of the kernels that have run since the places were forgotten.
  module.def("forget_places", [] {
    sim::places.clear();
    ++sim::times_left_out;
  });
  module.def("places", [] {
    std::vector<std::string> names;
    listed.clear();
    for (const auto& [place, name] : sim::places) {
      listed.push_back(place);
      names.push_back(name);
    }
    return names;
  });
  // Leaves out what stands at a place, by its number in the last list; -1: nothing.
  module.def("leave_out", [](int number) {
    sim::left_out = number < 0 ? decltype(sim::left_out){} : listed.at(number);
    ++sim::times_left_out;
  });
  module.def("seed", [](unsigned seed) { sim::seed = seed; });
  // Until they are freed, touching these bytes is an error, where the simulator was built with AddressSanitizer.
  module.def("forbid", [](Address begin, size_t bytes) { sim::forbid(pointer<void>(begin), bytes); });
  module.def("tf32", [](Address a, Address b, Address out, int depth) {
    run<32>(tf32_kernel, {1, nullptr}, 0, pointer<const float>(a), pointer<const float>(b), pointer<float>(out), depth);
  });
  module.def("negate", [](Address from, Address to, int rows, int depth, i64 pitch) {
    const auto map = [=](Address at) { return tensor_map(pointer<void>(at), rows, depth, pitch, Dtype::bf16); };
    run(negate_kernel, {1, nullptr}, kProbeShared, map(from), map(to), (rows + 63) / 64, (depth + 63) / 64);
  });
  module.def("exp2_by_polynomial", exp2_by_polynomial);
  module.attr("sanitized") = sim::kSanitized;
}
