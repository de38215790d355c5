/* A stand-in for libcuda.so.1 on a machine without a GPU, for Triton's launchers and for our layers: it accepts what they
   ask of a driver, and notes each launch as a line of the file that FAKE_CUDA_LOG names: kernel, its binary (a hash of
   what was loaded), grid, block, shared memory, and for each argument its bytes in hexadecimal, as many as FAKE_CUDA_SIZES says for the kernel ("name:884...").
   FAKE_CUDA_CAPABILITY: of its one GPU, e.g. 89. FAKE_CUDA_FAILS: a function that returns an error. Nothing is computed.
*/
#include "cuda.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST 4096
static char name_of[MOST][128];
static unsigned long long image_of[MOST], modules[MOST];
static size_t names, module_count;

/* FNV-1a of an image: of an ELF file, whose section headers end it, or of text. */
static unsigned long long hash(const void *image) {
  const unsigned char *bytes = image;
  size_t size = strlen(image);
  if (!memcmp(bytes, "\177ELF", 4)) {
    unsigned long long offset;
    unsigned short entry, count;
    memcpy(&offset, bytes + 40, 8);
    memcpy(&entry, bytes + 58, 2);
    memcpy(&count, bytes + 60, 2);
    size = offset + (size_t)entry * count;
  }
  unsigned long long value = 0xcbf29ce484222325ULL;
  for (size_t i = 0; i < size; i++)
    value = (value ^ bytes[i]) * 0x100000001b3ULL;
  return value;
}
static CUmodule load(const void *image) {
  if (module_count < MOST)
    modules[module_count++] = hash(image);
  return (CUmodule)module_count;
}

static CUresult result(const char *function) {
  const char *fails = getenv("FAKE_CUDA_FAILS");
  return fails && !strcmp(fails, function) ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
}

static void note(CUfunction f, const unsigned *g, const unsigned *b, unsigned shared, void **args) {
  FILE *log = getenv("FAKE_CUDA_LOG") ? fopen(getenv("FAKE_CUDA_LOG"), "a") : NULL;
  size_t id = (size_t)f;
  if (!log)
    return;
  const char *name = id && id <= names ? name_of[id - 1] : "?";
  unsigned long long image = id && id <= names ? image_of[id - 1] : 0;
  fprintf(log, "%s image=%016llx grid=%u,%u,%u block=%u,%u,%u shared=%u", name, image, g[0], g[1], g[2], b[0], b[1], b[2], shared);
  const char *sizes = getenv("FAKE_CUDA_SIZES");
  for (size_t length = strlen(name); sizes && *sizes; sizes = strchr(sizes, ' ') ? strchr(sizes, ' ') + 1 : "") {
    if (strncmp(sizes, name, length) || sizes[length] != ':')
      continue;
    const char *size = sizes + length + 1;
    for (int i = 0; size[i] >= '1' && size[i] <= '8'; i++) {
      fputc(' ', log);
      for (int byte = size[i] - '1'; byte >= 0; byte--)
        fprintf(log, "%02x", ((unsigned char *)args[i])[byte]);
    }
    break;
  }
  fputc('\n', log);
  fclose(log);
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **args, void **extra) {
  unsigned g[] = {c->gridDimX, c->gridDimY, c->gridDimZ}, b[] = {c->blockDimX, c->blockDimY, c->blockDimZ};
  note(f, g, b, c->sharedMemBytes, args);
  return result("cuLaunchKernelEx");
}
CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, CUstream s, void **args, void **extra) {
  unsigned g[] = {gx, gy, gz}, b[] = {bx, by, bz};
  note(f, g, b, shared, args);
  return result("cuLaunchKernel");
}
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) {
  if (names < MOST) {
    image_of[names] = (size_t)m && (size_t)m <= module_count ? modules[(size_t)m - 1] : 0;
    strncpy(name_of[names++], name, sizeof(name_of[0]) - 1);
  }
  *f = (CUfunction)names;
  return result("cuModuleGetFunction");
}
CUresult cuPointerGetAttribute(void *to, CUpointer_attribute a, CUdeviceptr p) {
  *(CUdeviceptr *)to = p;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult r, const char **s) {
  *s = "unspecified launch failure";
  return CUDA_SUCCESS;
}
CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *v) {
  *v = 13000;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) { return result("cuFuncSetAttribute"); }
CUresult cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction f) {
  *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return CUDA_SUCCESS; }
CUresult cuFuncGetModule(CUmodule *m, CUfunction f) {
  *m = (CUmodule)1;
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule *m, const void *image) {
  *m = load(image);
  return result("cuModuleLoadData");
}
CUresult cuModuleLoadDataEx(CUmodule *m, const void *image, unsigned n, CUjit_option *o, void **v) {
  *m = load(image);
  return CUDA_SUCCESS;
}
static int unloaded;
CUresult cuModuleUnload(CUmodule m) {
  unloaded++;
  return CUDA_SUCCESS;
}
int fake_loaded(void) { return (int)module_count; }
int fake_unloaded(void) { return unloaded; }
CUresult cuCtxGetCurrent(CUcontext *c) {
  *c = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext c) { return CUDA_SUCCESS; }
CUresult cuCtxPushCurrent(CUcontext c) { return CUDA_SUCCESS; }
CUresult cuCtxPopCurrent(CUcontext *c) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *d) {
  *d = 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetLimit(CUlimit l, size_t v) { return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *v, CUlimit l) {
  *v = 0;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) {
  *c = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice *d, int i) {
  *d = i;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) {
  const char *capability = getenv("FAKE_CUDA_CAPABILITY");
  int number = capability ? atoi(capability) : 90;
  *v = a == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR   ? number / 10
       : a == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR ? number % 10
       : a == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT     ? 132
       : a == CU_DEVICE_ATTRIBUTE_WARP_SIZE                ? 32
                                                           : 232448;
  return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction f, const CUlaunchConfig *c) {
  *n = 1;
  return CUDA_SUCCESS;
}
