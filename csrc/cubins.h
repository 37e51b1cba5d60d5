// The machine code embedded in this module.
#pragma once

#include <string_view>
#include <vector>

namespace vlmo {

struct Cubin {
  const char* name;            // of the .cu file
  const char* target;          // e.g. "sm_70"
  std::string_view image;      // an ELF file
  std::string_view resources;  // JSON: the ptxas report on each kernel in it
};

const std::vector<Cubin>& cubins();

// The cubin that a device of this compute capability runs: the exact target, else the nearest lower
// minor version of the same major version. Null if there is none.
const Cubin* find_cubin(std::string_view name, int major, int minor);

}  // namespace vlmo
