// The Python module vlmo._C: the operations on the CPU; the embedded cubins and their launch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/bindings.h"
#include "cubins.h"
#include "driver.h"

namespace py = pybind11;

namespace {

const vlmo::Cubin& embedded(const std::string& name, const std::string& target) {
  for (const vlmo::Cubin& cubin : vlmo::cubins()) {
    if (name == cubin.name && target == cubin.target) return cubin;
  }
  throw py::key_error("no cubin '" + name + "' for " + target);
}

std::vector<std::pair<std::string, std::string>> list_cubins() {
  std::vector<std::pair<std::string, std::string>> names;
  for (const vlmo::Cubin& cubin : vlmo::cubins()) names.emplace_back(cubin.name, cubin.target);
  return names;
}

std::optional<std::string> target_for(const std::string& name, int major, int minor) {
  const vlmo::Cubin* cubin = vlmo::find_cubin(name, major, minor);
  if (cubin == nullptr) return std::nullopt;
  return cubin->target;
}

void launch(const std::string& cubin, const std::string& kernel, std::array<unsigned, 3> grid,
            std::array<unsigned, 3> block, unsigned shared_bytes, std::uintptr_t stream, int device,
            const py::bytes& args) {
  const std::string_view view = args;
  const py::gil_scoped_release release;  // a full launch queue blocks
  vlmo::launch(cubin, kernel, {grid, block, shared_bytes}, stream, device, view);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Kernels for the CPU, embedded CUDA kernels and their launch by the driver.";
  vlmo::bind_cpu(module);
  module.def("cubins", &list_cubins, "(name, target) of every embedded cubin.");
  module.def(
      "image",
      [](const std::string& n, const std::string& t) { return py::bytes(embedded(n, t).image); },
      py::arg("name"), py::arg("target"), "The machine code of one cubin, an ELF file.");
  module.def(
      "resources",
      [](const std::string& n, const std::string& t) { return py::str(embedded(n, t).resources); },
      py::arg("name"), py::arg("target"),
      "JSON: registers, spills and shared memory of each kernel in a cubin, as ptxas reports "
      "them.");
  module.def("target_for", &target_for, py::arg("name"), py::arg("major"), py::arg("minor"),
             "The target of the cubin that a compute capability would run, or None.");
  module.def("why_no_driver", &vlmo::why_no_driver,
             "One sentence that says why nothing can be launched here, or None.");
  module.def("launch", &launch, py::arg("cubin"), py::arg("kernel"), py::arg("grid"),
             py::arg("block"), py::arg("shared_bytes"), py::arg("stream"), py::arg("device"),
             py::arg("args"),
             "Launch a kernel on a stream of the device's primary context.\n\n"
             "args is the kernel's parameter block: struct.pack with native alignment, 'q' for a\n"
             "pointer (tensor.data_ptr()) or an int64, 'i' for an int32, 'f' for a float.\n\n"
             "Raises RuntimeError with the kernel's name and the driver's error name.");
}
