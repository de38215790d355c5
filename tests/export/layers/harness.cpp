// What TensorRT does with a layer, for tests: create it of its record, attach, tell shapes, enqueue, serialise.

#include <NvInfer.h>
#include <NvInferRuntime.h>

#include <dlfcn.h>

#include <cstring>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

std::string gMessages;

struct Logger final : ILogger {
    void log(Severity, AsciiChar const* message) noexcept override { gMessages += std::string(message) + "\n"; }
} gLogger;

struct Finder final : ILoggerFinder {
    ILogger* findLogger() noexcept override { return &gLogger; }
} gFinder;

using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);

}  // namespace

extern "C" {

char const* messages() { return gMessages.c_str(); }

int count(char const* library) {
    void* handle = dlopen(library, RTLD_NOW);
    if (handle == nullptr) {
        gMessages += dlerror();
        return -1;
    }
    reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(handle, "setLoggerFinder"))(&gFinder);
    int32_t found = 0;
    reinterpret_cast<GetCreators>(dlsym(handle, "getCreators"))(found);
    return found;
}

// A layer that is created of `record`, in base64 where it is built, or null.
void* create(char const* library, char const* name, char const* record, int size, int building) {
    gMessages.clear();
    if (count(library) < 0) {
        return nullptr;
    }
    int32_t found = 0;
    auto* const* creators = reinterpret_cast<GetCreators>(dlsym(dlopen(library, RTLD_NOW), "getCreators"))(found);
    PluginField field("record", record, PluginFieldType::kCHAR, size);
    PluginFieldCollection fields{size < 0 ? 0 : 1, &field};
    for (int32_t i = 0; i < found; ++i) {
        auto* creator = static_cast<IPluginCreatorV3One*>(creators[i]);
        if (std::strcmp(creator->getPluginName(), name) == 0) {
            return creator->createPlugin(name, &fields, building ? TensorRTPhase::kBUILD : TensorRTPhase::kRUNTIME);
        }
    }
    gMessages += "no such layer";
    return nullptr;
}

void destroy(void* layer) { delete static_cast<IPluginV3*>(layer); }

static IPluginV3OneRuntime* runtime(void* layer) {
    auto* plugin = static_cast<IPluginV3*>(layer);
    return static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

static IPluginV3OneBuild* build(void* layer) {
    auto* plugin = static_cast<IPluginV3*>(layer);
    return static_cast<IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
}

void* attach(void* layer) { return runtime(layer)->attachToContext(nullptr); }

int serialised(void* layer, char const** data) {
    auto const* fields = runtime(layer)->getFieldsToSerialize();
    *data = static_cast<char const*>(fields->fields[0].data);
    return fields->fields[0].length;
}

// `shapes`: for each tensor its number of dimensions, then these.
static std::vector<PluginTensorDesc> described(int const*& shapes, int tensors) {
    std::vector<PluginTensorDesc> found(tensors);
    for (auto& each : found) {
        each.dims.nbDims = *shapes++;
        for (int i = 0; i < each.dims.nbDims; ++i) {
            each.dims.d[i] = *shapes++;
        }
    }
    return found;
}

int shape(void* layer, int const* shapes, int inputs, int outputs) {
    auto const in = described(shapes, inputs), out = described(shapes, outputs);
    return runtime(layer)->onShapeChange(in.data(), inputs, out.data(), outputs);
}

int enqueue(void* layer, int const* shapes, int inputs, int outputs, void const* const* from, void* const* to, void* workspace) {
    auto const in = described(shapes, inputs), out = described(shapes, outputs);
    return runtime(layer)->enqueue(in.data(), out.data(), from, to, workspace, nullptr);
}

long workspace(void* layer, int batch) {
    DynamicPluginTensorDesc input{};
    input.max.nbDims = 1;
    input.max.d[0] = batch;
    return static_cast<long>(build(layer)->getWorkspaceSize(&input, 1, nullptr, 0));
}

// Whether tensor number `position` may have this type and format.
int takes(void* layer, int position, int inputs, int outputs, int type, int format) {
    std::vector<DynamicPluginTensorDesc> tensors(inputs + outputs);
    tensors[position].desc.type = static_cast<DataType>(type);
    tensors[position].desc.format = static_cast<TensorFormat>(format);
    return build(layer)->supportsFormatCombination(position, tensors.data(), inputs, outputs);
}

}  // extern "C"
