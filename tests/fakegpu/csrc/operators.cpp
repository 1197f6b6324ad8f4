// Tensors on the device: how they are made and copied, and every other operator as its CPU kernel, run later on the shadow of its arguments.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <cstring>
#include <memory>

#include "allocators.h"
#include "guard.h"

namespace fakegpu {
namespace {

using c10::Device;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;
using torch::jit::Stack;
constexpr c10::DeviceType kType = c10::DeviceType::PrivateUse1;
const DispatchKeySet kCpu(DispatchKey::CPU);

bool on_device(const at::Tensor& t) { return t.defined() && t.device().type() == kType; }
const void* memory_of(const at::Tensor& t) { return t.unsafeGetTensorImpl()->storage().data(); }
bool is_pinned(const at::Tensor& t) { return t.is_cpu() && g_pinned_memory.owns(memory_of(t)); }
at::TensorOptions like(const at::Tensor& t, c10::DeviceType where) { return at::TensorOptions().dtype(t.scalar_type()).device(where); }

// A CPU tensor over the shadow of t's memory: for operations that run on a stream.
at::Tensor shadow_of(const at::Tensor& t) {
    const char* const base = static_cast<const char*>(memory_of(t));
    if (!base) return at::empty_strided(t.sizes(), t.strides(), like(t, at::kCPU));
    return at::from_blob(shadow(base + t.storage_offset() * static_cast<int64_t>(t.element_size())), t.sizes(), t.strides(), like(t, at::kCPU));
}

// The bytes of t: one stretch, or equal stretches at a regular distance; for all else the stretch from the first to the last.
Region region_of(const at::Tensor& t) {
    const size_t element = t.element_size();
    Region r;
    r.first = reinterpret_cast<size_t>(memory_of(t)) + static_cast<size_t>(t.storage_offset()) * element;
    std::vector<std::pair<size_t, size_t>> dims;  // stride in bytes, size
    for (int64_t i = 0; i < t.dim(); ++i)
        if (t.size(i) > 1) dims.emplace_back(static_cast<size_t>(t.stride(i)) * element, static_cast<size_t>(t.size(i)));
    std::sort(dims.begin(), dims.end());
    r.row_bytes = element;
    size_t i = 0;
    while (i < dims.size() && dims[i].first == r.row_bytes) r.row_bytes *= dims[i++].second;
    if (i < dims.size() && dims[i].first > r.row_bytes) {
        r.stride = dims[i].first, r.rows = dims[i].second;
        for (++i; i < dims.size() && dims[i].first == r.stride * r.rows; ++i) r.rows *= dims[i].second;
    }
    if (i < dims.size()) {
        size_t end = element;
        for (const auto& [stride, size] : dims) end += stride * (size - 1);
        r.row_bytes = end, r.rows = 1, r.stride = 0;
    }
    return r;
}
void touch(const at::Tensor& t, bool write, std::vector<Touch>& touches) {
    if (t.numel()) touches.push_back({region_of(t), write});
}

// -- making tensors ---------------------------------------------------------------------------------------------------------

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<Device> device,
                 std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
    TORCH_CHECK(!pin.value_or(false), "only CPU memory can be pinned");
    const c10::DeviceGuard on(c10::device_or_default(device));
    return at::detail::empty_generic(size, &device_allocator(), DispatchKeySet(DispatchKey::PrivateUse1), c10::dtype_or_default(dtype), format);
}
at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<Device> device, std::optional<bool> pin) {
    TORCH_CHECK(!pin.value_or(false), "only CPU memory can be pinned");
    const c10::DeviceGuard on(c10::device_or_default(device));
    return at::detail::empty_strided_generic(size, stride, &device_allocator(), DispatchKeySet(DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}
at::Tensor as_strided(const at::Tensor& t, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
    return at::cpu::as_strided_symint(t, size, stride, offset);
}
at::Tensor view(const at::Tensor& t, c10::SymIntArrayRef size) { return at::native::view(t, C10_AS_INTARRAYREF_SLOW(size)); }
at::Tensor reshape_alias(const at::Tensor& t, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
    return at::native::_reshape_alias(t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}
at::Tensor& set_tensor(at::Tensor& t, const at::Tensor& source) { return at::native::set_tensor_(t, source); }
at::Tensor& set_storage(at::Tensor& t, at::Storage source) { return at::native::set_(t, source); }
at::Tensor& set_strided(at::Tensor& t, at::Storage source, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
    return at::cpu::set_(t, source, offset, size, stride);
}
const at::Tensor& resize(const at::Tensor& t, c10::SymIntArrayRef size, std::optional<at::MemoryFormat>) {
    const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
    const size_t needed = at::detail::computeStorageNbytesContiguous(sizes, t.element_size(), static_cast<size_t>(t.storage_offset()));
    if (needed > t.storage().nbytes()) at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(t.storage(), needed);
    t.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
    return t;
}
void record_stream(at::Tensor& t, c10::Stream stream) { device_allocator().recordStream(t.storage().data_ptr(), stream); }

// -- copies -------------------------------------------------------------------------------------------------------------------

at::Tensor copy(const at::Tensor& source, const at::Tensor& target, bool non_blocking) {
    if (!source.numel()) return target;
    const bool to_host = !on_device(target), from_host = !on_device(source);
    const at::Tensor& there = from_host ? target : source;
    const c10::DeviceGuard on(there.device());
    int stream;
    {
        Lock lock;
        open_once();
        stream = current_stream(there.device().index());
        std::vector<Touch> touches;
        if (!from_host || is_pinned(source)) touch(source, false, touches);
        if (!to_host || is_pinned(target)) touch(target, true, touches);
        // A pageable source is read at the call, as CUDA stages it; a pinned one later, by DMA.
        const at::Tensor from = !from_host || is_pinned(source) ? shadow_of(source) : source.clone();
        const at::Tensor to = !to_host || is_pinned(target) ? shadow_of(target) : target;
        if (to_host && is_pinned(target) && g_machine.poison && to.is_contiguous()) std::memset(to.data_ptr(), 0xFB, to.nbytes());
        // As on CUDA: a copy between devices is ordered with both.
        const int peer = !from_host && !to_host && source.device() != target.device() ? current_stream(target.device().index()) : -1;
        if (peer >= 0) order(peer, stream);
        const char* const name = to_host ? "copy to host" : from_host ? "copy to device" : "copy";
        // Only views are captured: how long the memory lives is the allocator's business, as on real devices.
        const uint64_t epoch = give(stream, name, touches, [from, to] { const_cast<at::Tensor&>(to).copy_(from); }, to_host || from_host);
        if (peer >= 0) order(stream, peer);
        const at::Tensor& host = to_host ? target : source;
        if (non_blocking && (to_host || from_host) && is_pinned(host)) {
            const Region region = region_of(host);
            note_use(memory_of(host), stream);
            revoke(region.first, region.end(), from_host, stream, epoch);
            return target;
        }
        if (!to_host && (non_blocking || !from_host)) return target;
    }
    synchronize(stream);
    return target;
}
at::Tensor copy_and_resize(const at::Tensor& source, const at::Tensor& target) {
    const_cast<at::Tensor&>(target).resize_(source.sizes());
    return copy(source, target, false);
}
at::Tensor to_host(const at::Tensor& t) {
    const auto host = at::empty_strided(t.sizes(), t.strides(), like(t, at::kCPU));
    copy(t, host, false);
    return host;
}
at::Scalar local_scalar(const at::Tensor& t) { return to_host(t).item(); }

// -- everything else ------------------------------------------------------------------------------------------------------------

template <class F>
IValue map_tensors(const IValue& value, F f) {
    if (value.isTensor()) return f(value.toTensor());
    if (value.isTensorList()) {
        c10::List<at::Tensor> mapped;
        for (const at::Tensor& t : value.toTensorVector()) mapped.push_back(f(t));
        return mapped;
    }
    if (value.isOptionalTensorList()) {
        c10::List<std::optional<at::Tensor>> mapped;
        for (const std::optional<at::Tensor> t : value.toOptionalTensorList()) mapped.push_back(t.has_value() ? std::optional<at::Tensor>(f(*t)) : t);
        return mapped;
    }
    return value;
}

// Arguments that an operator writes although its schema does not say so.
bool writes_silently(const std::string& op, const std::string& argument) {
    return (op == "native_batch_norm" || op == "batch_norm_update_stats") && (argument == "running_mean" || argument == "running_var");
}

class Call {
public:
    Call(const c10::OperatorHandle& op, Stack* stack) : op_(op), schema_(op.schema()), stack_(stack) {
        const std::string& full = schema_.operator_name().name;
        name_ = full.substr(full.find(':') + 2);
        const size_t n = schema_.arguments().size();
        arguments_ = torch::jit::last(*stack, n).vec();
        torch::jit::drop(*stack, n);
        look();
    }

    void run() {
        const c10::DeviceGuard on(device_);
        if (!names_device_ && writes_only_ && !resizes_)
            give_in_place();
        else if (!names_device_ && returns_new_ && written_.empty() && give_functional())
            return;
        else
            run_now();
    }

private:
    void look() {
        for (size_t i = 0; i < arguments_.size(); ++i) {
            const auto* const alias = schema_.arguments()[i].alias_info();
            const bool writes = alias && alias->isWrite();
            if (arguments_[i].isDevice()) {
                names_device_ = true;
                device_ = arguments_[i].toDevice();
                if (device_.index() < 0) device_ = Device(kType, static_cast<c10::DeviceIndex>(t_device));
            }
            const bool silently = writes_silently(name_, schema_.arguments()[i].name());
            map_tensors(arguments_[i], [&](const at::Tensor& t) {
                if (!on_device(t)) return t;
                if (!found_ && !names_device_) device_ = t.device();
                found_ = true;
                touch(t, writes || silently, touches_);
                if (writes) {
                    written_.push_back(t);
                    resizes_ |= t.numel() == 0;
                }
                return t;
            });
        }
        for (const auto& result : schema_.returns()) {
            const bool is_argument = result.alias_info() && result.alias_info()->isWrite();
            writes_only_ &= is_argument;
            returns_new_ &= !is_argument;
        }
    }
    bool writes(size_t argument) const {
        const auto* const alias = schema_.arguments()[argument].alias_info();
        return alias && alias->isWrite();
    }
    // The arguments for the CPU kernel. Host tensors are read now, as a launch would.
    Stack cpu_arguments() const {
        Stack stack;
        for (const IValue& argument : arguments_)
            stack.push_back(argument.isDevice() ? IValue(Device(at::kCPU)) : map_tensors(argument, [](const at::Tensor& t) {
                if (on_device(t)) return shadow_of(t);
                return t.defined() && !t.unsafeGetTensorImpl()->is_wrapped_number() ? t.clone() : t;
            }));
        return stack;
    }
    void push_argument_of(size_t result) {
        for (size_t i = 0; i < arguments_.size(); ++i)
            if (writes(i) && *schema_.arguments()[i].alias_info() == *schema_.returns()[result].alias_info()) {
                stack_->push_back(arguments_[i]);
                return;
            }
        TORCH_CHECK(false, "fakegpu: ", name_, " returns no argument of its own");
    }

    // foo_(), foo(out=), _foreach_foo_(), _fused_adamw_()
    void give_in_place() {
        Lock lock;
        open_once();
        const Stack cpu = cpu_arguments();
        const auto op = kernel();
        give(current_stream(device_.index()), name_, touches_, [cpu, op] {
            Stack stack = cpu;  // a replayed graph runs it again
            op.redispatchBoxed(kCpu, &stack);
        });
        for (size_t r = 0; r < schema_.returns().size(); ++r) push_argument_of(r);
    }

    // Shapes from the meta kernel, data later. False: there is none, or they depend on data.
    bool give_functional() {
        Stack shapes;
        for (const IValue& argument : kernel_arguments(arguments_))
            shapes.push_back(map_tensors(argument, [](const at::Tensor& t) {
                return on_device(t) ? at::empty_strided(t.sizes(), t.strides(), like(t, at::kMeta)) : t;
            }));
        const auto op = kernel();
        try {
            op.redispatchBoxed(DispatchKeySet(DispatchKey::Meta), &shapes);
        } catch (const std::exception&) {
            return false;
        }
        for (const IValue& value : shapes)
            if (!value.isTensor() && !value.isTensorList()) return false;
        Lock lock;
        open_once();
        std::vector<IValue> results;
        auto targets = std::make_shared<std::vector<at::Tensor>>();
        for (const IValue& value : shapes)
            results.push_back(map_tensors(value, [&](const at::Tensor& shape) {
                if (!shape.defined()) {
                    targets->push_back(shape);
                    return shape;
                }
                auto t = empty_strided(shape.sizes(), shape.strides(), shape.scalar_type(), {}, device_, {});
                touch(t, true, touches_);
                targets->push_back(shadow_of(t));
                return t;
            }));
        const Stack cpu = kernel_arguments(cpu_arguments());
        give(current_stream(device_.index()), name_, touches_, [cpu, op, targets] {
            Stack stack = cpu;
            op.redispatchBoxed(kCpu, &stack);
            size_t k = 0;
            for (const IValue& value : stack)
                map_tensors(value, [&](const at::Tensor& result) {
                    at::Tensor& target = (*targets)[k++];
                    if (target.defined() && result.defined()) target.copy_(result);
                    return result;
                });
        });
        for (const IValue& result : results) stack_->push_back(result);
        return true;
    }

    // Data-dependent shapes, factories, outputs that are resized: the stream is drained first, which is always legal.
    void run_now() {
        const int stream = [&] {
            Lock lock;
            open_once();
            const int current = current_stream(device_.index());
            give(current, name_, touches_, nullptr);
            return current;
        }();
        synchronize(stream);
        Stack cpu = kernel_arguments(cpu_arguments());
        std::vector<at::Tensor> written;
        for (size_t i = 0; i < arguments_.size(); ++i)
            if (writes(i))
                map_tensors(cpu[i], [&](const at::Tensor& t) {
                    written.push_back(t);
                    return t;
                });
        kernel().redispatchBoxed(kCpu, &cpu);
        for (size_t i = 0; i < written_.size() && i < written.size(); ++i)
            if (written[i].sizes() != written_[i].sizes() || resizes_) {
                written_[i].resize_(written[i].sizes());
                copy(written[i], written_[i], false);
            }
        for (size_t r = 0; r < schema_.returns().size(); ++r) {
            if (schema_.returns()[r].alias_info() && schema_.returns()[r].alias_info()->isWrite()) {
                push_argument_of(r);
                continue;
            }
            stack_->push_back(map_tensors(cpu[r], [&](const at::Tensor& t) {
                if (!t.defined()) return t;
                auto result = empty_strided(t.sizes(), t.strides(), t.scalar_type(), {}, device_, {});
                copy(t, result, false);
                return result;
            }));
        }
    }

    // Convolution has operators of its own for devices like this one; on the CPU they have other names.
    c10::OperatorHandle kernel() const {
        auto& dispatcher = c10::Dispatcher::singleton();
        if (name_ == "convolution_overrideable") return dispatcher.findSchemaOrThrow("aten::convolution", "");
        if (name_ == "convolution_backward_overrideable") return dispatcher.findSchemaOrThrow("aten::convolution_backward", "");
        return op_;
    }
    Stack kernel_arguments(Stack arguments) const {
        if (name_ == "convolution_backward_overrideable") {  // + bias_sizes
            const at::Tensor& weight = arguments_[2].toTensor();
            const bool transposed = arguments_[6].toBool();
            const int64_t channels = transposed ? weight.size(1) * arguments_[8].toInt() : weight.size(0);
            arguments.insert(arguments.begin() + 3, IValue(std::vector<int64_t>{channels}));
        }
        return arguments;
    }

    const c10::OperatorHandle& op_;
    const c10::FunctionSchema& schema_;
    Stack* stack_;
    std::string name_;
    std::vector<IValue> arguments_;
    Device device_ = Device(kType, static_cast<c10::DeviceIndex>(t_device));
    bool found_ = false, names_device_ = false, writes_only_ = true, returns_new_ = true, resizes_ = false;
    std::vector<Touch> touches_;
    std::vector<at::Tensor> written_;
};

void fallback(const c10::OperatorHandle& op, DispatchKeySet, Stack* stack) { Call(op, stack).run(); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
    m.impl("empty.memory_format", empty);
    m.impl("empty_strided", empty_strided);
    m.impl("as_strided", as_strided);
    m.impl("view", view);
    m.impl("_reshape_alias", reshape_alias);
    m.impl("resize_", resize);
    m.impl("set_.source_Tensor", set_tensor);
    m.impl("set_.source_Storage", set_storage);
    m.impl("set_.source_Storage_storage_offset", set_strided);
    m.impl("_copy_from", copy);
    m.impl("_copy_from_and_resize", copy_and_resize);
    m.impl("_local_scalar_dense", local_scalar);
    m.impl("record_stream", record_stream);
    m.impl("convolution_overrideable", torch::CppFunction::makeFromBoxedFunction<&fallback>());
    m.impl("convolution_backward_overrideable", torch::CppFunction::makeFromBoxedFunction<&fallback>());
}
// One operation, as CUDA's kernel is; of a device that has none it would be some thirty of torch's own.
TORCH_LIBRARY_IMPL(fastckpt, PrivateUse1, m) { m.impl("fingerprint", torch::CppFunction::makeFromBoxedFunction<&fallback>()); }
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

}  // namespace
}  // namespace fakegpu
