// Python module _simulated: the CUDA kernels, run by the simulator on addresses of ordinary memory.
#include "../cuda/bindings.hpp"
#include "simulator.hpp"

PYBIND11_MODULE(_simulated, module) {
  fastcl::cuda::bind(module);
  // Even seeds: asynchronous copies land when they are waited for; odd: at once. Other than 0: warps in a random order.
  module.def("seed", [](unsigned seed) { sim::seed = seed; });
}
