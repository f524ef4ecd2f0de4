/* A CUDA driver without a GPU: two devices, the rules on contexts and stream capture that the loader must keep, and a
   record of what it was asked. The entry points are those of the CUDA driver's C interface. */
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#ifdef _WIN32
#define EXPORT __declspec(dllexport)
#else
#define EXPORT
#endif

typedef struct { int device; const char *name; } Handle;

static Handle contexts[2] = {{0, "context"}, {1, "context"}};
static Handle modules[256], functions[256];
static int module_count, function_count;
static __thread Handle *stack[16];
static __thread int depth, mode;

/* Set by the tests: the call that fails, with what, and the driver's version. */
EXPORT char stub_failing[64];
EXPORT int stub_code, stub_version = 13000, stub_capability[2] = {9, 0}, stub_parameter_bytes = 16;

/* Read by the tests. */
EXPORT int stub_loads, stub_retained, stub_dynamic_shared, stub_attempts, stub_launches;
EXPORT unsigned stub_shape[7];
EXPORT char stub_image[64], stub_packed[64];
EXPORT void *stub_stream;
EXPORT int stub_launch_device;

EXPORT void stub_reset(void) {
  depth = mode = 0;
  module_count = function_count = stub_loads = stub_retained = stub_dynamic_shared = stub_attempts = stub_launches = 0;
  stub_failing[0] = stub_code = 0;
  stub_version = 13000;
  stub_capability[0] = 9, stub_capability[1] = 0;
  stub_parameter_bytes = 16;
}
EXPORT void stub_set_device(int device) { depth = 1, stack[0] = &contexts[device]; }
EXPORT int stub_depth(void) { return depth; }
EXPORT int stub_mode(void) { return mode; }

static Handle *current(void) { return depth ? stack[depth - 1] : NULL; }

#define CHECK() do { if (!strcmp(stub_failing, __func__)) return stub_code; } while (0)

EXPORT int cuInit(unsigned flags) { CHECK(); return flags ? 1 : 0; }
EXPORT int cuDriverGetVersion(int *version) { CHECK(); *version = stub_version; return 0; }
EXPORT int cuDeviceGet(int *device, int index) {
  CHECK();
  if (index < 0 || index > 1) return 101;
  *device = index;
  return 0;
}
EXPORT int cuDeviceGetName(char *name, int size, int device) {
  CHECK();
  snprintf(name, size, "Stub %d", device);
  return 0;
}
EXPORT int cuDeviceGetAttribute(int *value, int attribute, int device) {
  CHECK();
  switch (attribute) {
    case 16: *value = 100 + device; return 0; /* multiprocessors */
    case 38: *value = 50 << 20; return 0;     /* L2 */
    case 75: *value = stub_capability[0]; return 0;
    case 76: *value = stub_capability[1]; return 0;
    case 97: *value = 200000; return 0;       /* shared memory, opt-in */
  }
  return 1;
}
EXPORT int cuDevicePrimaryCtxRetain(Handle **context, int device) {
  CHECK();
  *context = &contexts[device];
  stub_retained++;
  return 0;
}
EXPORT int cuCtxGetCurrent(Handle **context) { CHECK(); *context = current(); return 0; }
EXPORT int cuCtxPushCurrent_v2(Handle *context) { CHECK(); stack[depth++] = context; return 0; }
EXPORT int cuCtxPopCurrent_v2(Handle **context) {
  CHECK();
  if (!depth) return 201;
  *context = stack[--depth];
  return 0;
}
EXPORT int cuThreadExchangeStreamCaptureMode(int *other) {
  CHECK();
  int before = mode;
  mode = *other;
  *other = before;
  return 0;
}
EXPORT int cuModuleLoadData(Handle **module, const char *image) {
  CHECK();
  if (!current()) return 201;
  if (mode != 2) return 900; /* a capture that is not relaxed */
  if (!strncmp(image, "bad", 3)) return 200;
  strncpy(stub_image, image, sizeof stub_image - 1);
  *module = &modules[module_count++];
  (*module)->device = current()->device;
  stub_loads++;
  return 0;
}
EXPORT int cuModuleGetFunction(Handle **function, Handle *module, const char *name) {
  CHECK();
  if (mode != 2) return 900;
  if (!strcmp(name, "absent")) return 500;
  *function = &functions[function_count++];
  (*function)->device = module->device;
  return 0;
}
EXPORT int cuFuncGetAttribute(int *value, int attribute, Handle *function) {
  CHECK();
  int values[] = {[0] = 768, [1] = 1000, [3] = 0, [4] = 40};
  *value = values[attribute];
  return function ? 0 : 400;
}
EXPORT int cuFuncSetAttribute(Handle *function, int attribute, int value) {
  CHECK();
  if (attribute != 8 || !function || value > 200000 - 1000) return 1;
  stub_dynamic_shared = value;
  return 0;
}
#ifndef OLD_DRIVER
EXPORT int cuFuncGetParamInfo(Handle *function, size_t index, size_t *offset, size_t *size) {
  CHECK();
  if (!function || index) return 1;
  *offset = 0;
  *size = stub_parameter_bytes;
  return 0;
}
#endif
EXPORT int cuLaunchKernel(Handle *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                          unsigned block_y, unsigned block_z, unsigned shared, void *stream, void **parameters,
                          void **extra) {
  stub_attempts++;
  CHECK();
  if (!current()) return 201;
  if (current()->device != function->device) return 400;
  if (extra || !parameters) return 1;
  unsigned shape[7] = {grid_x, grid_y, grid_z, block_x, block_y, block_z, shared};
  memcpy(stub_shape, shape, sizeof shape);
  memcpy(stub_packed, parameters[0], stub_parameter_bytes);
  stub_stream = stream;
  stub_launch_device = function->device;
  stub_launches++;
  return 0;
}
EXPORT int cuGetErrorName(int code, const char **name) {
  if (code == 12345) return 1;
  *name = code == 200 ? "CUDA_ERROR_INVALID_IMAGE" : code == 701 ? "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES" : "CUDA_ERROR_X";
  return 0;
}
EXPORT int cuGetErrorString(int code, const char **text) {
  if (code == 12345) return 1;
  *text = "what went wrong";
  return 0;
}
