// Python module _simulated: the CUDA kernels, run by the simulator on addresses of ordinary memory.
#include "../cuda/bindings.hpp"
#include "simulator.hpp"

PYBIND11_MODULE(_simulated, module) {
  fastcl::cuda::bind(module);
  module.def("places", [] {
    std::vector<std::string> all;
    for (const auto& [key, name] : sim::places) all.push_back(name);
    return all;
  });
  // Leaves out what stands at a place, by its number in places(); -1: nothing.
  module.def("leave_out", [](int place) {
    sim::left_out = {};
    if (place >= 0) sim::left_out = std::next(sim::places.begin(), place)->first;
  });
  module.def("seed", [](unsigned seed) { sim::seed = seed; });
}
