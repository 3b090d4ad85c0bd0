// A CUDA driver with one sm_90 device on which nothing runs: launches return at once, and each is written down with its
// arguments at the offsets that the kernel's own parameter table gives them.
#include <cuda.h>
#include <elf.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { kMostParameters = 1024, kLogBytes = 1 << 20 };

typedef struct {
  unsigned offset, size;
} Parameter;
typedef struct {
  char name[256];
  unsigned count;
  Parameter parameters[kMostParameters];
} Function;

static char text[kLogBytes];
static size_t used;
static int recording = 1;

// .nv.info.<kernel>: entries of a format, an attribute and a size; 0x17 is a parameter's number, offset and size.
static void read_parameters(const char* image, Function* f) {
  const Elf64_Ehdr* header = (const Elf64_Ehdr*)image;
  const Elf64_Shdr* sections = (const Elf64_Shdr*)(image + header->e_shoff);
  const char* names = image + sections[header->e_shstrndx].sh_offset;
  char wanted[300];
  snprintf(wanted, sizeof(wanted), ".nv.info.%s", f->name);
  for (int i = 0; i < header->e_shnum; ++i) {
    if (strcmp(names + sections[i].sh_name, wanted)) continue;
    const unsigned char *at = (const unsigned char*)image + sections[i].sh_offset, *end = at + sections[i].sh_size;
    while (at + 4 <= end) {
      const unsigned format = at[0], attribute = at[1], size = at[2] | at[3] << 8;
      at += 4;
      if (format != 4) continue;  // its value was in the place of the size
      if (attribute == 0x17) {
        unsigned words[3];
        memcpy(words, at, sizeof(words));
        const unsigned number = words[1] & 0xffff;
        if (number < kMostParameters) {
          f->parameters[number] = (Parameter){words[1] >> 16, words[2] >> 18};
          if (number >= f->count) f->count = number + 1;
        }
      }
      at += size;
    }
  }
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  *module = (CUmodule)image;  // which the caller keeps
  return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  Function* f = calloc(1, sizeof(Function));
  snprintf(f->name, sizeof(f->name), "%s", name);
  read_parameters((const char*)module, f);
  *function = (CUfunction)f;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction function, void** parameters, void** extra) {
  (void)extra;
  const Function* f = (const Function*)function;
  if (!recording || used + 300 + 40 * f->count > kLogBytes) return CUDA_SUCCESS;
  used += sprintf(text + used, "%s\t%u %u %u\t%u %u %u\t%u\t", f->name, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX,
                  c->blockDimY, c->blockDimZ, c->sharedMemBytes);
  for (unsigned i = 0; i < f->count; ++i) {
    used += sprintf(text + used, "%u:", f->parameters[i].offset);
    for (unsigned b = 0; b < f->parameters[i].size; ++b)
      used += sprintf(text + used, "%02x", ((const unsigned char*)parameters[i])[b]);
    text[used++] = ' ';
  }
  text[used++] = '\n';
  text[used] = 0;
  return CUDA_SUCCESS;
}

// ---- for the tests ----
void stub_record(int on) { recording = on; }
const char* stub_launches(void) {  // since it was last asked
  static char found[kLogBytes];
  memcpy(found, text, used + 1);
  used = 0;
  text[0] = 0;
  return found;
}

// ---- what Triton asks besides ----
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  (void)device;
  switch ((int)attribute) {
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 227 << 10; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    default: *value = 0;
  }
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  (void)function;
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  (void)attribute;
  *(CUdeviceptr*)data = pointer;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult status, const char** string) {
  (void)status;
  *string = "the stub driver has no such call";
  return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int number) {
  *device = number;
  return CUDA_SUCCESS;
}
#define NOTHING(name, ...) \
  CUresult name(__VA_ARGS__) { return CUDA_SUCCESS; }
#define REFUSED(name, ...) \
  CUresult name(__VA_ARGS__) { return CUDA_ERROR_NOT_SUPPORTED; }
#pragma GCC diagnostic ignored "-Wunused-parameter"
NOTHING(cuDevicePrimaryCtxRetain, CUcontext* context, CUdevice device)
NOTHING(cuCtxSetCurrent, CUcontext context)
NOTHING(cuFuncSetAttribute, CUfunction function, CUfunction_attribute attribute, int value)
NOTHING(cuFuncSetCacheConfig, CUfunction function, CUfunc_cache config)
REFUSED(cuCtxGetLimit, size_t* value, CUlimit limit)
REFUSED(cuCtxSetLimit, CUlimit limit, size_t value)
REFUSED(cuOccupancyMaxActiveClusters, int* clusters, CUfunction function, const CUlaunchConfig* config)
