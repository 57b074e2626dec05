// Python module _simulated: the CUDA kernels, run by the simulator on addresses of ordinary memory.
#include "../cuda/bindings.hpp"
#include "../cuda/tile.cuh"
#include "simulator.hpp"

static std::vector<decltype(sim::left_out)> listed;

PYBIND11_MODULE(_simulated, module) {
  fastcl::cuda::bind(module);
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
  module.def("forbid",
             [](fastcl::cuda::Address begin, size_t bytes) { sim::forbid(reinterpret_cast<void*>(begin), bytes); });
  module.def("exp2_by_polynomial", fastcl::cuda::exp2_by_polynomial);
  module.attr("sanitized") = sim::kSanitized;
}
