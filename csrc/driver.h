// Launches embedded kernels through the CUDA driver, which is opened at run time: this module links
// to neither CUDA nor torch and can be imported without a driver.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace vlmo {

// One sentence that says why nothing can be launched here, or nullopt. Opens and initialises the
// driver at the first call.
std::optional<std::string> why_no_driver();

struct LaunchShape {
  std::array<unsigned, 3> grid;
  std::array<unsigned, 3> block;
  unsigned shared_bytes;  // dynamic; launch() opts in to more than 48 KiB
};

// Launches on a stream of the device's primary context, the one that torch uses. The cubin for the
// device is loaded once per device. `arguments` is the kernel's parameter block.
// Throws std::runtime_error with the driver's error name.
void launch(const std::string& cubin, const std::string& kernel, const LaunchShape& shape,
            std::uintptr_t stream, int device, std::string_view arguments);

}  // namespace vlmo
