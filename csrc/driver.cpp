#include "driver.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "cubins.h"

namespace vlmo {
namespace {

// The part of cuda.h that is used here. These names and numbers are part of the driver's ABI.
using CUresult = int;
using CUdevice = int;
using CUcontext = struct CUctx_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
using CUstream = struct CUstream_st*;
constexpr int kCapabilityMajor = 75;
constexpr int kCapabilityMinor = 76;
constexpr int kMaxDynamicSharedBytes = 8;
constexpr unsigned kSharedBytesWithoutOptIn = 48 * 1024;
void* const kParamEnd = nullptr;
void* const kParamBufferPointer = reinterpret_cast<void*>(1);
void* const kParamBufferSize = reinterpret_cast<void*>(2);

struct Driver {
  CUresult (*cuInit)(unsigned);
  CUresult (*cuGetErrorName)(CUresult, const char**);
  CUresult (*cuDeviceGet)(CUdevice*, int);
  CUresult (*cuDeviceGetAttribute)(int*, int, CUdevice);
  CUresult (*cuDevicePrimaryCtxRetain)(CUcontext*, CUdevice);
  CUresult (*cuCtxPushCurrent)(CUcontext);
  CUresult (*cuCtxPopCurrent)(CUcontext*);
  CUresult (*cuModuleLoadData)(CUmodule*, const void*);
  CUresult (*cuModuleGetFunction)(CUfunction*, CUmodule, const char*);
  CUresult (*cuFuncSetAttribute)(CUfunction, int, int);
  CUresult (*cuLaunchKernel)(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                             unsigned, CUstream, void**, void**);
  std::string missing;  // why the pointers above cannot be used, or empty

  Driver();
  std::string error_name(CUresult status) const;
};

Driver::Driver() {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
  if (library == nullptr) {
    missing = "libcuda.so.1 not found: no NVIDIA driver is installed.";
    return;
  }
  const auto load = [&](auto& function, const char* symbol) {
    function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, symbol));
    if (function == nullptr) missing = std::string("libcuda.so.1 has no ") + symbol + ".";
  };
  load(cuInit, "cuInit");
  load(cuGetErrorName, "cuGetErrorName");
  load(cuDeviceGet, "cuDeviceGet");
  load(cuDeviceGetAttribute, "cuDeviceGetAttribute");
  load(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain");
  load(cuCtxPushCurrent, "cuCtxPushCurrent_v2");
  load(cuCtxPopCurrent, "cuCtxPopCurrent_v2");
  load(cuModuleLoadData, "cuModuleLoadData");
  load(cuModuleGetFunction, "cuModuleGetFunction");
  load(cuFuncSetAttribute, "cuFuncSetAttribute");
  load(cuLaunchKernel, "cuLaunchKernel");
  if (!missing.empty()) return;
  const CUresult status = cuInit(0);
  if (status != 0) missing = "the NVIDIA driver does not start: " + error_name(status) + ".";
}

std::string Driver::error_name(CUresult status) const {
  const char* name = nullptr;
  cuGetErrorName(status, &name);
  return name != nullptr ? name : "CUDA error " + std::to_string(status);
}

const Driver& driver() {
  static const Driver instance;
  return instance;
}

void check(CUresult status, const std::string& kernel, const char* call) {
  if (status == 0) return;
  throw std::runtime_error(kernel + ": " + call + ": " + driver().error_name(status));
}

class ScopedContext {
 public:
  ScopedContext(CUcontext context, const std::string& kernel) {
    check(driver().cuCtxPushCurrent(context), kernel, "cuCtxPushCurrent");
  }
  ~ScopedContext() {
    CUcontext popped;
    driver().cuCtxPopCurrent(&popped);
  }
  ScopedContext(const ScopedContext&) = delete;
  ScopedContext& operator=(const ScopedContext&) = delete;
};

struct Device {
  CUcontext context;
  int major;
  int minor;
};

struct Function {
  CUfunction handle;
  unsigned shared_bytes_allowed;
};

// Devices, modules and functions loaded so far. Nothing is ever unloaded: at exit the driver may
// shut down before this module.
std::mutex mutex;
std::map<int, Device> devices;
std::map<std::pair<int, const Cubin*>, CUmodule> modules;
std::map<std::pair<CUmodule, std::string>, Function> functions;

const Device& find_device(int ordinal, const std::string& kernel) {
  const auto found = devices.find(ordinal);
  if (found != devices.end()) return found->second;
  CUdevice handle;
  Device device;
  check(driver().cuDeviceGet(&handle, ordinal), kernel, "cuDeviceGet");
  check(driver().cuDeviceGetAttribute(&device.major, kCapabilityMajor, handle), kernel,
        "cuDeviceGetAttribute");
  check(driver().cuDeviceGetAttribute(&device.minor, kCapabilityMinor, handle), kernel,
        "cuDeviceGetAttribute");
  check(driver().cuDevicePrimaryCtxRetain(&device.context, handle), kernel,
        "cuDevicePrimaryCtxRetain");
  return devices.emplace(ordinal, device).first->second;
}

// Expects the device's context to be current.
CUmodule find_module(const std::string& name, int ordinal, const Device& device,
                     const std::string& kernel) {
  const Cubin* cubin = find_cubin(name, device.major, device.minor);
  if (cubin == nullptr) {
    throw std::runtime_error(kernel + ": no cubin '" + name + "' for sm_" +
                             std::to_string(device.major) + std::to_string(device.minor));
  }
  const auto found = modules.find({ordinal, cubin});
  if (found != modules.end()) return found->second;
  CUmodule module;
  check(driver().cuModuleLoadData(&module, cubin->image.data()), kernel, "cuModuleLoadData");
  modules[{ordinal, cubin}] = module;
  return module;
}

CUfunction find_function(CUmodule module, const std::string& kernel, unsigned shared_bytes) {
  auto found = functions.find({module, kernel});
  if (found == functions.end()) {
    CUfunction handle;
    check(driver().cuModuleGetFunction(&handle, module, kernel.c_str()), kernel,
          "cuModuleGetFunction");
    found = functions.emplace(std::pair(module, kernel), Function{handle, kSharedBytesWithoutOptIn})
                .first;
  }
  Function& function = found->second;
  if (shared_bytes > function.shared_bytes_allowed) {
    check(driver().cuFuncSetAttribute(function.handle, kMaxDynamicSharedBytes,
                                      static_cast<int>(shared_bytes)),
          kernel, "cuFuncSetAttribute");
    function.shared_bytes_allowed = shared_bytes;
  }
  return function.handle;
}

}  // namespace

std::optional<std::string> why_no_driver() {
  if (driver().missing.empty()) return std::nullopt;
  return driver().missing;
}

void launch(const std::string& cubin, const std::string& kernel, const LaunchShape& shape,
            std::uintptr_t stream, int device, std::string_view arguments) {
  if (!driver().missing.empty()) throw std::runtime_error(kernel + ": " + driver().missing);
  std::unique_lock<std::mutex> lock(mutex);
  const Device& target = find_device(device, kernel);
  const ScopedContext scope(target.context, kernel);
  const CUmodule module = find_module(cubin, device, target, kernel);
  const CUfunction function = find_function(module, kernel, shape.shared_bytes);
  lock.unlock();

  size_t size = arguments.size();
  void* extra[] = {kParamBufferPointer, const_cast<char*>(arguments.data()), kParamBufferSize,
                   &size, kParamEnd};
  const auto& [grid, block, shared_bytes] = shape;
  check(driver().cuLaunchKernel(function, grid[0], grid[1], grid[2], block[0], block[1], block[2],
                                shared_bytes, reinterpret_cast<CUstream>(stream), nullptr, extra),
        kernel, "cuLaunchKernel");
}

}  // namespace vlmo
