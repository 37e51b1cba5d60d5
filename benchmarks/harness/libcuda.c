// Stands in for the NVIDIA driver where there is none, so that Triton's own launcher can be timed:
// every call succeeds at once, and launches are counted. harness/pretended.py compiles it.
#include <stddef.h>
#include <stdint.h>

static uint64_t launches, functions;

uint64_t pretended_launches(void) { return launches; }

#define SUCCEEDS(name) \
  int name(void) { return 0; }
SUCCEEDS(cuInit)
SUCCEEDS(cuCtxSetCurrent)
SUCCEEDS(cuCtxSetLimit)
SUCCEEDS(cuModuleUnload)
SUCCEEDS(cuFuncSetAttribute)
SUCCEEDS(cuFuncSetCacheConfig)
SUCCEEDS(cuPointerGetAttributes)
SUCCEEDS(cuTensorMapEncodeTiled)
SUCCEEDS(cuTensorMapEncodeIm2col)

int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
int cuDeviceGetCount(int* count) { return *count = 1, 0; }
int cuCtxGetDevice(int* device) { return *device = 0, 0; }
int cuCtxGetLimit(size_t* value, int limit) { return *value = 0, 0; }
int cuCtxGetCurrent(void** context) { return *context = &launches, 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = &launches, 0; }
int cuStreamIsCapturing(void* stream, int* status) { return *status = 0, 0; }
int cuModuleLoadData(void** module, const void* image) { return *module = (void*)image, 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) {
  return *function = (void*)(uintptr_t)++functions, 0;
}
// An H100: attributes 75 and 76 are the compute capability, 97 the shared memory of a block.
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 97 ? 232448 : 65536;
  return 0;
}
// Attribute 0 is the largest number of threads, 4 that of registers; the others are sizes.
int cuFuncGetAttribute(int* value, int attribute, void* function) {
  return *value = attribute == 0 ? 1024 : attribute == 4 ? 255 : 0, 0;
}
int cuGetErrorString(int error, const char** text) { return *text = "pretended", 0; }
int cuOccupancyMaxActiveClusters(int* count, void* function, void* config) {
  return *count = 1, 0;
}
int cuPointerGetAttribute(void* data, int attribute, uint64_t pointer) {
  return *(uint64_t*)data = pointer, 0;
}
int cuLaunchKernelEx(void* config, void* function, void** parameters, void** extra) {
  return ++launches, 0;
}
