// Python module _simulated: the CUDA kernels, run by the simulator on addresses of ordinary memory.
#include "../cuda/bindings.hpp"
#include "simulator.hpp"

PYBIND11_MODULE(_simulated, module) {
  fastcl::cuda::bind(module);
  // Even seeds: asynchronous copies land when they are waited for; odd: at once. Other than 0: warps in a random order.
  module.def("places", [] {
    std::vector<std::string> all;
    for (const auto& [key, name] : sim::places) all.push_back(name);
    return all;
  });
  // Leaves out what stands at a place, by its number in places(); -1: nothing.
  module.def("leave_out", [](int place) {
    sim::left_out = {};
    ++sim::times_left_out;
    if (place >= 0) sim::left_out = std::next(sim::places.begin(), place)->first;
  });
  module.def("seed", [](unsigned seed) { sim::seed = seed; });
  // Until they are freed, touching these bytes is an error, where the simulator was built with AddressSanitizer.
  module.def("forbid", [](fastcl::cuda::Address begin, size_t bytes) { sim::forbid(reinterpret_cast<void*>(begin), bytes); });
  module.attr("sanitized") = sim::kSanitized;
}
