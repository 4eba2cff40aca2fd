// Stands in for NVIDIA's libcuda.so.1 where there is no GPU: what Triton's launcher calls, and no more.
//
// Nothing runs. A kernel is loaded by reading its cubin (an ELF file): registers, parameters, the bound
// on its threads. A launch is refused where an H100's driver refuses it, and otherwise left in a record
// that bench/fake_driver.py reads. Built by that module, with the headers that come with Triton.

#include <cuda.h>
#include <elf.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// An H100, and where bench/fake_cuda.py puts the memory of tensors.
enum { SMS = 132, REGISTERS = 65536, SHARED = 227 * 1024, SHARED_SM = 228 * 1024 };
enum { WARP = 32, THREADS_SM = 2048, BLOCKS_SM = 32 };
static const uint64_t MEMORY = UINT64_C(1) << 56;

// Of a cubin's .nv.info sections: entries of a format byte, an attribute byte and 16 bits, which are a
// value or the size of what follows.
enum { SIZED = 0x04, MAX_THREADS = 0x05, REQUIRED_THREADS = 0x10, PARAMETER = 0x17, REGISTER_COUNT = 0x2f };
enum { MAX_PARAMETERS = 1024, MAX_BYTES = 4096 }; // of a launch, before CUDA 12.1; at least 4 bytes each

typedef struct {
  int registers, threads, parameters, bytes, shared_limit;
  uint16_t offset[MAX_PARAMETERS], size[MAX_PARAMETERS];
} Kernel;

typedef struct {
  uint64_t function;
  uint32_t grid[3], block[3], shared, cooperative, parameters, bytes;
  int32_t registers;
  char refusal[128]; // empty where it was accepted
  unsigned char values[MAX_BYTES]; // of the parameters, as the kernel would find them
} Launch;

Launch last_launch; // read by Python

static CUresult refuse(CUresult code, const char *why) {
  snprintf(last_launch.refusal, sizeof last_launch.refusal, "%s", why);
  return code;
}

static uint32_t word(const char *at) {
  uint32_t value;
  memcpy(&value, at, sizeof value);
  return value;
}

static const Elf64_Shdr *find_section(const char *image, const char *prefix, const char *rest) {
  const Elf64_Ehdr *head = (const Elf64_Ehdr *)image;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + head->e_shoff);
  const char *names = image + sections[head->e_shstrndx].sh_offset;
  for (int i = 0; i < head->e_shnum; i++) {
    const char *name = names + sections[i].sh_name;
    if (!strncmp(name, prefix, strlen(prefix)) && !strcmp(name + strlen(prefix), rest))
      return &sections[i];
  }
  return NULL;
}

static uint32_t symbol_of(const char *image, const char *name) {
  const Elf64_Shdr *table = find_section(image, ".symtab", ""), *text = find_section(image, ".strtab", "");
  if (!table || !text)
    return 0;
  const Elf64_Sym *symbols = (const Elf64_Sym *)(image + table->sh_offset);
  for (uint32_t i = 1; i < table->sh_size / sizeof *symbols; i++)
    if (!strcmp(image + text->sh_offset + symbols[i].st_name, name))
      return i;
  return 0;
}

static bool read_parameter(Kernel *kernel, const char *at) { // its index, ordinal and offset, flags and size
  uint32_t ordinal = word(at + 4) & 0xffff, offset = word(at + 4) >> 16, size = word(at + 8) >> 18;
  if (ordinal >= MAX_PARAMETERS || offset + size > MAX_BYTES)
    return false;
  kernel->offset[ordinal] = (uint16_t)offset;
  kernel->size[ordinal] = (uint16_t)size;
  kernel->parameters++;
  if ((int)(offset + size) > kernel->bytes)
    kernel->bytes = (int)(offset + size);
  return true;
}

static bool read_info(Kernel *kernel, const char *image, const Elf64_Shdr *section, uint32_t symbol) {
  const char *at = image + section->sh_offset, *end = at + section->sh_size;
  while (at + 4 <= end) {
    unsigned char format = (unsigned char)at[0], attribute = (unsigned char)at[1];
    uint32_t size = word(at) >> 16;
    at += 4;
    if (format != SIZED)
      continue;
    if (attribute == REGISTER_COUNT && word(at) == symbol)
      kernel->registers = (int)word(at + 4);
    if (attribute == PARAMETER && !read_parameter(kernel, at))
      return false;
    if (attribute == MAX_THREADS || attribute == REQUIRED_THREADS)
      kernel->threads = (int)(word(at) * word(at + 4) * word(at + 8));
    at += size;
  }
  return true;
}

static CUresult read_cubin(Kernel *kernel, const char *image, const char *name) {
  if (memcmp(image, ELFMAG, SELFMAG))
    return CUDA_ERROR_INVALID_IMAGE;
  const Elf64_Shdr *all = find_section(image, ".nv.info", ""), *own = find_section(image, ".nv.info.", name);
  uint32_t symbol = symbol_of(image, name);
  if (!all || !own || !symbol)
    return CUDA_ERROR_NOT_FOUND;
  if (!read_info(kernel, image, all, symbol) || !read_info(kernel, image, own, symbol))
    return refuse(CUDA_ERROR_INVALID_IMAGE, "more than 4096 bytes of parameters");
  return kernel->registers ? CUDA_SUCCESS : CUDA_ERROR_INVALID_IMAGE;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  Kernel *kernel = calloc(1, sizeof *kernel); // lives as long as the process, as Triton's own cache
  if (!kernel)
    return CUDA_ERROR_OUT_OF_MEMORY;
  kernel->threads = 1024;
  kernel->shared_limit = 48 * 1024;
  last_launch = (Launch){0};
  CUresult code = read_cubin(kernel, (const char *)module, name);
  if (code == CUDA_SUCCESS)
    *function = (CUfunction)kernel;
  else
    free(kernel);
  return code;
}

// Registers are given to a warp in units of 256.
static int warps_that_fit(const Kernel *kernel) {
  int of_warp = (kernel->registers * WARP + 255) / 256 * 256;
  return REGISTERS / of_warp;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  const Kernel *kernel = (const Kernel *)function;
  int threads = warps_that_fit(kernel) * WARP;
  switch (attribute) {
  case CU_FUNC_ATTRIBUTE_NUM_REGS:
    *value = kernel->registers;
    return CUDA_SUCCESS;
  case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
    *value = threads < kernel->threads ? threads : kernel->threads;
    return CUDA_SUCCESS;
  case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: // spills are the report's business
  case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: // Triton's is dynamic
    *value = 0;
    return CUDA_SUCCESS;
  default:
    return CUDA_ERROR_INVALID_VALUE;
  }
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
    return CUDA_SUCCESS;
  if (value > SHARED)
    return CUDA_ERROR_INVALID_VALUE;
  ((Kernel *)function)->shared_limit = value;
  return CUDA_SUCCESS;
}

static uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

static CUresult check(const Launch *launch, const Kernel *kernel) {
  uint64_t threads = (uint64_t)launch->block[0] * launch->block[1] * launch->block[2];
  uint64_t blocks = (uint64_t)launch->grid[0] * launch->grid[1] * launch->grid[2];
  int warps = (int)((threads + WARP - 1) / WARP);
  if (!blocks || launch->grid[0] > INT32_MAX || launch->grid[1] > 65535 || launch->grid[2] > 65535)
    return refuse(CUDA_ERROR_INVALID_VALUE, "a grid of no or too many programs");
  if (!threads || threads > (uint64_t)kernel->threads)
    return refuse(CUDA_ERROR_INVALID_VALUE, "more threads than the kernel is compiled for");
  if (launch->shared > (uint32_t)kernel->shared_limit)
    return refuse(CUDA_ERROR_INVALID_VALUE, "more shared memory than was asked for");
  if (warps > warps_that_fit(kernel))
    return refuse(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "too many registers");
  if (launch->cooperative) {
    uint64_t fit = least(least(BLOCKS_SM, THREADS_SM / threads), (uint64_t)(warps_that_fit(kernel) / warps));
    fit = least(fit, SHARED_SM / (launch->shared + 1024)); // the system keeps 1 KiB of a block's
    if (blocks > fit * SMS)
      return refuse(CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE, "more programs than can be resident at once");
  }
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  const Kernel *kernel = (const Kernel *)function;
  last_launch = (Launch){
      .function = (uint64_t)(uintptr_t)function,
      .grid = {config->gridDimX, config->gridDimY, config->gridDimZ},
      .block = {config->blockDimX, config->blockDimY, config->blockDimZ},
      .shared = config->sharedMemBytes,
      .registers = kernel->registers,
      .parameters = (uint32_t)kernel->parameters,
      .bytes = (uint32_t)kernel->bytes,
  };
  (void)extra;
  for (int i = 0; i < kernel->parameters; i++)
    memcpy(last_launch.values + kernel->offset[i], parameters[i], kernel->size[i]);
  for (unsigned i = 0; i < config->numAttrs; i++)
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE)
      last_launch.cooperative = (uint32_t)config->attrs[i].value.cooperative;
  return check(&last_launch, kernel);
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  (void)attribute;
  if (pointer < MEMORY) // the host's
    return CUDA_ERROR_INVALID_VALUE;
  memcpy(value, &pointer, sizeof pointer);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  (void)device;
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
    *value = SHARED;
    break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
    *value = SHARED_SM;
    break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
    *value = REGISTERS;
    break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
    *value = SMS;
    break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
    *value = WARP;
    break;
  default: // clocks and the like
    *value = 1;
  }
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  static char message[160];
  snprintf(message, sizeof message, "error %d%s%s", (int)error, last_launch.refusal[0] ? ": " : "", last_launch.refusal);
  *text = message;
  return CUDA_SUCCESS;
}

static int context;

CUresult cuCtxGetCurrent(CUcontext *current) {
  *current = (CUcontext)&context;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext current) {
  (void)current;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *current, CUdevice device) {
  (void)device;
  return cuCtxGetCurrent(current);
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
  (void)function;
  (void)config;
  return CUDA_SUCCESS;
}

// Called nowhere here, but linked to.
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
  (void)limit;
  *value = 0;
  return CUDA_ERROR_NOT_SUPPORTED;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) {
  (void)limit;
  (void)value;
  return CUDA_ERROR_NOT_SUPPORTED;
}

CUresult cuDriverGetVersion(int *version) { // a PyTorch with CUDA asks: there is no GPU
  *version = 0;
  return CUDA_ERROR_STUB_LIBRARY;
}
