// Stands in for the NVIDIA driver where there is none: logs each call that vlmo._C makes as one
// line of stdout. FAKE_CAPABILITY is the compute capability ("72"), FAKE_FAIL the call that fails.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {

int logged(const char* call, const std::string& detail = "") {
  std::printf("%s %s\n", call, detail.c_str());
  std::fflush(stdout);
  const char* failing = std::getenv("FAKE_FAIL");
  return failing != nullptr && std::strcmp(failing, call) == 0 ? 700 : 0;
}

template <typename T>
T handle(std::uintptr_t value) {
  return reinterpret_cast<T>(value);
}

}  // namespace

extern "C" {
int cuInit(unsigned) { return logged("cuInit"); }
int cuGetErrorName(int, const char** name) {
  *name = "CUDA_ERROR_FAKE";
  return 0;
}
int cuDeviceGet(int* device, int ordinal) {
  *device = 100 + ordinal;
  return logged("cuDeviceGet", std::to_string(ordinal));
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
  const int capability = std::atoi(std::getenv("FAKE_CAPABILITY"));
  *value = attribute == 75 ? capability / 10 : capability % 10;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = handle<void*>(device);
  return logged("cuDevicePrimaryCtxRetain", std::to_string(device));
}
int cuCtxPushCurrent_v2(void* context) {
  return logged("cuCtxPushCurrent", std::to_string(reinterpret_cast<std::uintptr_t>(context)));
}
int cuCtxPopCurrent_v2(void**) { return logged("cuCtxPopCurrent"); }
int cuModuleLoadData(void** module, const void* image) {
  *module = handle<void*>(7);
  // The target is in the low byte of e_flags of the ELF header.
  return logged("cuModuleLoadData", std::to_string(static_cast<const unsigned char*>(image)[48]));
}
int cuModuleGetFunction(void** function, void*, const char* name) {
  *function = handle<void*>(8);
  return logged("cuModuleGetFunction", name);
}
int cuFuncSetAttribute(void*, int attribute, int value) {
  return logged("cuFuncSetAttribute", std::to_string(attribute) + " " + std::to_string(value));
}
int cuLaunchKernel(void*, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void* stream, void** parameters, void** extra) {
  const auto* block = static_cast<const unsigned char*>(extra[1]);
  const size_t size = *static_cast<size_t*>(extra[3]);
  char shape[160];
  std::snprintf(shape, sizeof shape, "%u %u %u / %u %u %u / %u / %zu / %d :", gx, gy, gz, bx, by,
                bz, shared, reinterpret_cast<size_t>(stream), parameters == nullptr);
  std::string detail = shape;
  for (size_t i = 0; i < size; ++i) detail += " " + std::to_string(block[i]);
  return logged("cuLaunchKernel", detail);
}
}
