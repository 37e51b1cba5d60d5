// Adds the operations on the CPU to the Python module.
#pragma once

#include <pybind11/pybind11.h>

namespace vlmo {

void bind_cpu(pybind11::module_& module);

}  // namespace vlmo
