// Two devices that torch takes for accelerators and whose memory is the host's, so that a model can
// be spread over several devices where there is none. Every operation runs on the CPU; one whose
// tensors lie on different devices is refused, as it is on GPUs; those for which the host would
// have to wait for a GPU are noted.
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/histc.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace {

constexpr auto kPretend = c10::DeviceType::PrivateUse1;
thread_local c10::DeviceIndex current = 0;
thread_local std::vector<std::string> waits;
thread_local int falls_back = 0;  // while it does, copies are the CPU's own

void wait_for(const std::string& what) {
  if (falls_back == 0) waits.push_back(what);
}

struct FallsBack {
  FallsBack() { ++falls_back; }
  ~FallsBack() { --falls_back; }
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kPretend; }
  c10::Device exchangeDevice(c10::Device d) const override {
    const c10::Device old = getDevice();
    current = d.index();
    return old;
  }
  c10::Device getDevice() const override { return {kPretend, current}; }
  void setDevice(c10::Device d) const override { current = d.index(); }
  void uncheckedSetDevice(c10::Device d) const noexcept override { current = d.index(); }
  c10::Stream getStream(c10::Device d) const override {
    return c10::Stream(c10::Stream::DEFAULT, d);
  }
  c10::Stream getDefaultStream(c10::Device d) const override { return getStream(d); }
  c10::Stream exchangeStream(c10::Stream s) const override { return getStream(s.device()); }
  c10::DeviceIndex deviceCount() const noexcept override { return 2; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* p = bytes == 0 ? nullptr : std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    return {p, p, &std::free, {kPretend, current}};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
};
Memory memory;
REGISTER_ALLOCATOR(kPretend, &memory);

// Memory of the host that devices copy from while the host goes on.
struct Pinned final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* p = bytes == 0 ? nullptr : std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    held.insert(p);
    return {p, p, &let_go, c10::Device(c10::DeviceType::CPU)};
  }
  static void let_go(void* p) {
    held.erase(p);
    std::free(p);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &let_go; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to, from, bytes);
  }
  static inline std::set<const void*> held;
};
Pinned pinned;

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isPinnedPtr(const void* p) const override { return Pinned::held.count(p) != 0; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 2; }
};

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(size, &memory,
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device> device, std::optional<bool>) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(size, stride, &memory,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

const at::Tensor& resize(const at::Tensor& x, at::IntArrayRef size,
                         std::optional<at::MemoryFormat> format) {
  const c10::OptionalDeviceGuard guard(x.device());
  return at::native::resize_(x, size, format);
}

// The same memory as a tensor of the CPU.
at::Tensor host(const at::Tensor& x) {
  return at::from_blob(x.data_ptr(), x.sizes(), x.strides(), x.options().device(at::kCPU));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool goes_on) {
  const bool takes = from.device().is_privateuseone(), gives = to.device().is_privateuseone();
  if (takes && !gives) wait_for("a copy to the host");
  if (gives && !takes && !(goes_on && from.is_pinned())) wait_for("a copy from the host");
  host(to).copy_(host(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  if (to.numel() != from.numel()) to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const at::Tensor& x) {
  wait_for("a number");
  return host(x).item();
}

at::Tensor& set_storage(at::Tensor& x, at::Storage from, int64_t offset, at::IntArrayRef size,
                        at::IntArrayRef stride) {
  x.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(from));
  x.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return x;
}

at::Tensor& set_whole_storage(at::Tensor& x, at::Storage from) {
  const int64_t size = static_cast<int64_t>(from.nbytes() / x.dtype().itemsize());
  return set_storage(x, std::move(from), 0, {size}, {1});
}

at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias, c10::SymIntArrayRef stride,
                       c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed,
                       c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  const FallsBack fallback;
  std::optional<at::Tensor> there;
  if (bias && bias->defined()) there = host(*bias);
  return at::convolution_symint(host(x), host(weight), there, stride, padding, dilation, transposed,
                                output_padding, groups)
      .to(x.device());
}

// Experts are counted so, in whole numbers, which the CPU does not do.
at::Tensor histc(const at::Tensor& x, int64_t bins, const at::Scalar& least,
                 const at::Scalar& most) {
  const FallsBack fallback;
  return host(x).to(at::kFloat).histc(bins, least, most).to(x.options());
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  std::optional<c10::Device> first;
  const auto see = [&](const at::Tensor& x) {
    if (!x.defined() || x.dim() == 0 || x.device().type() != kPretend) return;
    if (!first) first = x.device();
    TORCH_CHECK(x.device() == *first, op.schema().name(), ": expected all tensors on one device, ",
                "but found ", first->str(), " and ", x.device().str());
  };
  for (const c10::IValue& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (value.isTensor()) see(value.toTensor());
    if (value.isTensorList())
      for (const at::Tensor& x : value.toTensorVector()) see(x);
  }
  const std::string& name = op.schema().name();
  for (const char* sized :
       {"nonzero", "masked_select", "_unique", "unique_", "equal", "repeat_inter"})
    if (name.rfind(std::string("aten::") + sized, 0) == 0) wait_for(name);
  const FallsBack fallback;
  try {
    at::native::cpu_fallback(op, stack);
  } catch (const c10::IndexError& error) {
    std::fprintf(stderr, "an assertion of the device: %s\n", error.what());
    std::abort();  // a GPU serves nobody after it
  }
}

// What the host waited for since it was last asked.
std::vector<std::string> told_waits() { return std::exchange(waits, {}); }
TORCH_LIBRARY(pretend, m) { m.def("waits() -> str[]", &told_waits); }

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("convolution_overrideable", &convolution);
  m.impl("histc", &histc);
  m.impl("unfold", &at::native::unfold);
  m.impl("view", &at::native::view);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("resize_", &resize);
}

const bool registered = [] {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  return true;
}();

}  // namespace
