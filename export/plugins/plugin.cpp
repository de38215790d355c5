// Layers of TensorRT and TensorRT-RTX that launch Triton's kernels, compiled beforehand, through the CUDA driver.
//
// A layer is a record, which agln_fast/export/records.py writes: ports with shapes, types and formats, binaries for each
// compute capability, and for each batch the launches with their grids and arguments. Nothing here knows an operator.
// The driver is looked up when a layer is first run; the library links against nothing of CUDA, nor of TensorRT.

#include <NvInfer.h>
#include <NvInferRuntime.h>
#include <cuda.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#ifndef AGLN_LAYERS
#error "AGLN_LAYERS: the names of the layers, as strings with commas between them"
#endif

namespace {

using namespace nvinfer1;

constexpr char kVERSION[] = "1";
constexpr char kNAMESPACE[] = "agln";
constexpr char kRECORD[] = "record";
constexpr size_t kMOST_ARGUMENTS = 64;
constexpr uint64_t kALIGNMENT = 16;  // bytes
constexpr unsigned kSHARED_WITHOUT_ASKING = 48U << 10;

ILoggerFinder* gLoggerFinder = nullptr;

void report(std::string const& message) noexcept {
    ILogger* logger = gLoggerFinder == nullptr ? nullptr : gLoggerFinder->findLogger();
    if (logger != nullptr) {
        logger->log(ILogger::Severity::kERROR, ("agln-fast: " + message).c_str());
    } else {
        std::fprintf(stderr, "agln-fast: %s\n", message.c_str());
    }
}

// Runs `act`, which may throw; a failure is reported, and `otherwise` returned: nothing may leave a layer's methods.
template <typename Act, typename Result>
Result guarded(Act const& act, Result otherwise) noexcept {
    try {
        return act();
    } catch (std::exception const& error) {
        report(error.what());
        return otherwise;
    }
}

// ---------------------------------------------------------------------------------------------------------- the driver

struct Driver {
    decltype(&cuCtxGetDevice) ctxGetDevice;
    decltype(&cuCtxGetCurrent) ctxGetCurrent;
    decltype(&cuCtxPushCurrent) ctxPushCurrent;
    decltype(&cuCtxPopCurrent) ctxPopCurrent;
    decltype(&cuDeviceGetAttribute) deviceGetAttribute;
    decltype(&cuModuleLoadData) moduleLoadData;
    decltype(&cuModuleUnload) moduleUnload;
    decltype(&cuModuleGetFunction) moduleGetFunction;
    decltype(&cuFuncSetAttribute) funcSetAttribute;
    decltype(&cuLaunchKernel) launchKernel;
    decltype(&cuGetErrorString) getErrorString;

    Driver() {
        void* library = dlopen("libcuda.so.1", RTLD_NOW);
        if (library == nullptr) {
            throw std::runtime_error("the NVIDIA driver (libcuda.so.1) cannot be opened");
        }
        find(library, "cuCtxGetDevice", ctxGetDevice);
        find(library, "cuCtxGetCurrent", ctxGetCurrent);
        find(library, "cuCtxPushCurrent_v2", ctxPushCurrent);
        find(library, "cuCtxPopCurrent_v2", ctxPopCurrent);
        find(library, "cuDeviceGetAttribute", deviceGetAttribute);
        find(library, "cuModuleLoadData", moduleLoadData);
        find(library, "cuModuleUnload", moduleUnload);
        find(library, "cuModuleGetFunction", moduleGetFunction);
        find(library, "cuFuncSetAttribute", funcSetAttribute);
        find(library, "cuLaunchKernel", launchKernel);
        find(library, "cuGetErrorString", getErrorString);
    }

    void check(CUresult result, std::string const& call) const {
        if (result != CUDA_SUCCESS) {
            char const* words = nullptr;
            getErrorString(result, &words);
            throw std::runtime_error(call + " failed: " + (words == nullptr ? "unknown error" : words));
        }
    }

    int attribute(CUdevice_attribute which) const {
        CUdevice device{};
        int value{};
        check(ctxGetDevice(&device), "cuCtxGetDevice");
        check(deviceGetAttribute(&value, which, device), "cuDeviceGetAttribute");
        return value;
    }

private:
    template <typename Function>
    static void find(void* library, char const* name, Function& function) {
        function = reinterpret_cast<Function>(dlsym(library, name));
        if (function == nullptr) {
            throw std::runtime_error(std::string("the NVIDIA driver has no ") + name + ": install a newer one");
        }
    }
};

Driver const& driver();

// Whether there is a driver, and a CUDA context in this thread.
bool hasDevice() noexcept {
    try {
        CUcontext context{};
        return driver().ctxGetCurrent(&context) == CUDA_SUCCESS && context != nullptr;
    } catch (std::exception const&) {
        return false;
    }
}

Driver const& driver() {
    static Driver const found;  // if it throws, the next call tries again
    return found;
}

// ---------------------------------------------------------------------------------------------------------- the record

struct Port {
    DataType type{};
    TensorFormat format{};
    std::vector<int32_t> shape;  // -1: the batch
};

enum class Place : int32_t { kINPUT, kOUTPUT, kWORKSPACE, kVALUE };

struct Argument {
    Place place{};
    int32_t index{};
    uint64_t offset{};  // bytes
    uint64_t value{};
};

struct Launch {
    size_t function{};  // of Record::functions
    unsigned grid[3]{};
    unsigned threads{};
    unsigned shared{};
    std::vector<Argument> arguments;
};

struct Program {
    uint64_t workspace{};
    std::vector<Launch> launches;
};

struct Function {
    size_t binary{};
    std::string name;
    unsigned shared{};

    bool operator==(Function const& other) const {
        return binary == other.binary && name == other.name && shared == other.shared;
    }
};

class Reader {
public:
    Reader(char const* data, size_t size) : mNext(data), mLeft(size) {}

    void bytes(void* target, size_t size) {
        need(size);
        std::memcpy(target, mNext, size);
        mNext += size;
        mLeft -= size;
    }
    int32_t number() { return read<int32_t>(); }
    uint64_t large() { return read<uint64_t>(); }
    // Not negative, and no more than what is left could hold.
    size_t count() {
        int32_t const value = number();
        if (value < 0 || static_cast<size_t>(value) > mLeft) {
            fail();
        }
        return static_cast<size_t>(value);
    }
    size_t index(size_t end) {
        int32_t const value = number();
        if (value < 0 || static_cast<size_t>(value) >= end) {
            fail();
        }
        return static_cast<size_t>(value);
    }
    unsigned positive() {
        int32_t const value = number();
        if (value < 1) {
            fail();
        }
        return static_cast<unsigned>(value);
    }
    std::string text() {
        std::string found(count(), '\0');
        bytes(&found[0], found.size());
        return found;
    }
    size_t left() const { return mLeft; }
    void end() const {
        if (mLeft != 0) {
            fail();
        }
    }
    [[noreturn]] static void fail() {
        throw std::runtime_error("a layer's record is damaged, or of another version: build the engine again");
    }

private:
    template <typename T>
    T read() {
        T value{};
        bytes(&value, sizeof(T));
        return value;
    }
    void need(size_t size) const {
        if (size > mLeft) {
            fail();
        }
    }
    char const* mNext;
    size_t mLeft;
};

// CRC-32 of IEEE 802.3, as in zlib.
uint32_t checksum(char const* data, size_t size) {
    uint32_t crc = ~0U;
    for (size_t i = 0; i < size; ++i) {
        crc ^= static_cast<unsigned char>(data[i]);
        for (int bit = 0; bit < 8; ++bit) {
            crc = crc >> 1 ^ (crc & 1U ? 0xedb88320U : 0U);
        }
    }
    return ~crc;
}

struct Record {
    std::string data;  // all of it, as it was read
    std::vector<Port> inputs;
    std::vector<Port> outputs;
    std::vector<std::string> binaries;
    std::vector<Function> functions;
    // By compute capability, and batch. A negative one: PTX, for all from there on that are not named.
    std::map<int, std::map<int, Program>> programs;

    Record(std::string const& op, std::string source) : data(std::move(source)) {
        uint32_t sum{};
        if (data.size() < sizeof(sum)) {
            Reader::fail();
        }
        size_t const length = data.size() - sizeof(sum);
        std::memcpy(&sum, data.data() + length, sizeof(sum));
        if (sum != checksum(data.data(), length)) {
            Reader::fail();
        }
        Reader reader(data.data(), length);
        char magic[4];
        reader.bytes(magic, sizeof(magic));
        if (std::memcmp(magic, "AGLN", sizeof(magic)) != 0 || reader.number() != 1 || reader.text() != op) {
            Reader::fail();
        }
        readPorts(reader, inputs);
        readPorts(reader, outputs);
        binaries.resize(reader.count());
        for (std::string& binary : binaries) {
            binary = reader.text();
        }
        for (size_t left = reader.count(); left > 0; --left) {
            int const capability = reader.number();
            if (capability == 0 || capability < -1000 || capability > 1000) {
                Reader::fail();
            }
            int const batch = static_cast<int>(reader.positive());
            readProgram(reader, programs[capability][batch]);
        }
        reader.end();
        if (inputs.empty() || outputs.empty() || programs.empty()) {
            Reader::fail();
        }
    }

    uint64_t workspace(int64_t mostImages) const {
        uint64_t most = 0;
        for (auto const& device : programs) {
            for (auto const& program : device.second) {
                most = program.first <= mostImages ? std::max(most, program.second.workspace) : most;
            }
        }
        return most;
    }

private:
    static void readPorts(Reader& reader, std::vector<Port>& ports) {
        static constexpr DataType kTYPES[] = {
            DataType::kFLOAT, DataType::kHALF, DataType::kBF16, DataType::kINT8, DataType::kINT32};
        ports.resize(reader.count());
        for (Port& port : ports) {
            port.type = kTYPES[reader.index(sizeof(kTYPES) / sizeof(kTYPES[0]))];
            bool const channelsLast = reader.index(2) == 1;
            port.format = !channelsLast                    ? TensorFormat::kLINEAR
                        : port.type == DataType::kFLOAT    ? TensorFormat::kHWC
                                                           : TensorFormat::kHWC8;
            port.shape.resize(reader.index(Dims::MAX_DIMS + 1));
            for (int32_t& side : port.shape) {
                side = reader.number();
            }
            if (port.shape.empty() || std::any_of(port.shape.begin(), port.shape.end(), [](int32_t side) {
                    return side < 1 && side != -1;
                })) {
                Reader::fail();
            }
        }
    }

    void readProgram(Reader& reader, Program& program) {
        program.workspace = reader.large();
        program.launches.resize(reader.count());
        for (Launch& launch : program.launches) {
            Function function;
            function.binary = reader.index(binaries.size());
            function.name = reader.text();
            for (unsigned& side : launch.grid) {
                side = reader.positive();
            }
            launch.threads = reader.positive();
            launch.shared = static_cast<unsigned>(reader.index(1U << 30));
            function.shared = launch.shared;
            auto const known = std::find(functions.begin(), functions.end(), function);
            launch.function = static_cast<size_t>(known - functions.begin());
            if (known == functions.end()) {
                functions.push_back(function);
            }
            launch.arguments.resize(reader.index(kMOST_ARGUMENTS + 1));
            for (Argument& argument : launch.arguments) {
                readArgument(reader, argument, program.workspace);
            }
        }
    }

    void readArgument(Reader& reader, Argument& argument, uint64_t workspace) const {
        argument.place = static_cast<Place>(reader.index(4));
        argument.index = reader.number();
        argument.offset = reader.large();
        std::string const value = reader.text();
        size_t const ends[] = {inputs.size(), outputs.size(), 1, 1};
        bool const outside = argument.index < 0 || static_cast<size_t>(argument.index) >= ends[static_cast<int>(argument.place)];
        bool const beyond = argument.place == Place::kWORKSPACE && argument.offset >= workspace;
        bool const isValue = argument.place == Place::kVALUE;
        if (outside || beyond || value.size() > sizeof(argument.value) || value.empty() == isValue) {
            Reader::fail();
        }
        std::memcpy(&argument.value, value.data(), value.size());
    }
};

// A record's kernels in the current CUDA context.
class Kernels {
public:
    Kernels(std::shared_ptr<Record const> record) : mRecord(std::move(record)) {
        Driver const& cuda = driver();
        cuda.check(cuda.ctxGetCurrent(&mContext), "cuCtxGetCurrent");
        int const major = cuda.attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
        int const minor = cuda.attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
        mPrograms = choose(10 * major + minor);
        mFunctions.resize(mRecord->functions.size());
        try {
            std::map<size_t, CUmodule> modules;
            for (auto const& program : *mPrograms) {
                for (Launch const& launch : program.second.launches) {
                    load(launch.function, modules);
                }
            }
        } catch (...) {
            unload();
            throw;
        }
    }
    Kernels(Kernels const&) = delete;
    Kernels& operator=(Kernels const&) = delete;
    ~Kernels() { unload(); }

    Program const& program(int64_t batch) const {
        auto const found = mPrograms->find(static_cast<int>(batch));
        if (found == mPrograms->end()) {
            throw std::runtime_error("no kernels for a batch of " + std::to_string(batch) + ": build for it");
        }
        return found->second;
    }

    void run(Program const& program, void const* const* inputs, void* const* outputs, void* workspace, CUstream stream) const {
        Driver const& cuda = driver();
        for (Launch const& launch : program.launches) {
            uint64_t values[kMOST_ARGUMENTS];
            void* addresses[kMOST_ARGUMENTS];
            for (size_t i = 0; i < launch.arguments.size(); ++i) {
                Argument const& argument = launch.arguments[i];
                values[i] = value(argument, inputs, outputs, workspace);
                // The kernels were compiled for such addresses; others would be a fault that ends the context.
                if (argument.place != Place::kVALUE && argument.offset % kALIGNMENT == 0 && values[i] % kALIGNMENT != 0) {
                    throw std::runtime_error("a tensor begins at no multiple of 16 bytes");
                }
                addresses[i] = &values[i];
            }
            cuda.check(cuda.launchKernel(mFunctions[launch.function], launch.grid[0], launch.grid[1], launch.grid[2],
                           launch.threads, 1, 1, launch.shared, stream, addresses, nullptr),
                "cuLaunchKernel");
        }
    }

private:
    std::map<int, Program> const* choose(int capability) const {
        auto const exact = mRecord->programs.find(capability);
        if (exact != mRecord->programs.end()) {
            return &exact->second;
        }
        std::string names;
        for (auto const& each : mRecord->programs) {
            if (each.first < 0 && capability >= -each.first) {
                return &each.second;
            }
            names += each.first < 0 ? " sm" + std::to_string(-each.first) + " and later" : ", sm" + std::to_string(each.first);
        }
        throw std::runtime_error(
            "this GPU is sm" + std::to_string(capability) + ", and the engine's layers are for" + names + ": build it for this one");
    }

    void load(size_t index, std::map<size_t, CUmodule>& modules) {
        if (mFunctions[index] != nullptr) {
            return;
        }
        Driver const& cuda = driver();
        Function const& function = mRecord->functions[index];
        CUmodule& module = modules[function.binary];
        if (module == nullptr) {
            cuda.check(cuda.moduleLoadData(&module, mRecord->binaries[function.binary].data()), "cuModuleLoadData");
            mModules.push_back(module);
        }
        CUfunction& loaded = mFunctions[index];
        cuda.check(cuda.moduleGetFunction(&loaded, module, function.name.c_str()), "cuModuleGetFunction " + function.name);
        if (function.shared > kSHARED_WITHOUT_ASKING) {
            cuda.check(cuda.funcSetAttribute(loaded, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                           static_cast<int>(function.shared)),
                "cuFuncSetAttribute " + function.name);
        }
    }

    void unload() noexcept {
        Driver const& cuda = driver();
        if (mModules.empty() || cuda.ctxPushCurrent(mContext) != CUDA_SUCCESS) {
            return;  // the context is gone, and its modules with it
        }
        for (CUmodule module : mModules) {
            cuda.moduleUnload(module);
        }
        CUcontext previous{};
        cuda.ctxPopCurrent(&previous);
    }

    static uint64_t value(Argument const& argument, void const* const* inputs, void* const* outputs, void* workspace) {
        switch (argument.place) {
        case Place::kINPUT: return reinterpret_cast<uint64_t>(inputs[argument.index]) + argument.offset;
        case Place::kOUTPUT: return reinterpret_cast<uint64_t>(outputs[argument.index]) + argument.offset;
        case Place::kWORKSPACE: return reinterpret_cast<uint64_t>(workspace) + argument.offset;
        case Place::kVALUE: break;
        }
        return argument.value;
    }

    std::shared_ptr<Record const> mRecord;
    std::map<int, Program> const* mPrograms{};
    std::vector<CUmodule> mModules;
    std::vector<CUfunction> mFunctions;
    CUcontext mContext{};
};

// ----------------------------------------------------------------------------------------------------------- the layer

class Layer final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
public:
    Layer(char const* name, std::shared_ptr<Record const> record) : mName(name), mRecord(std::move(record)) {
        mField = PluginField(kRECORD, mRecord->data.data(), PluginFieldType::kCHAR, static_cast<int32_t>(mRecord->data.size()));
        mFields = {1, &mField};
    }

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
        case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
        case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
        case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }
    IPluginV3* clone() noexcept override {
        return guarded([this]() -> IPluginV3* { return new Layer(mName, mRecord); }, static_cast<IPluginV3*>(nullptr));
    }

    AsciiChar const* getPluginName() const noexcept override { return mName; }
    AsciiChar const* getPluginVersion() const noexcept override { return kVERSION; }
    AsciiChar const* getPluginNamespace() const noexcept override { return kNAMESPACE; }

    int32_t getNbOutputs() const noexcept override { return static_cast<int32_t>(mRecord->outputs.size()); }
    int32_t configurePlugin(DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*, int32_t) noexcept override {
        return 0;
    }
    int32_t getOutputDataTypes(DataType* types, int32_t, DataType const*, int32_t) const noexcept override {
        for (Port const& port : mRecord->outputs) {
            *types++ = port.type;
        }
        return 0;
    }
    int32_t getOutputShapes(DimsExprs const* inputs, int32_t, DimsExprs const*, int32_t, DimsExprs* outputs, int32_t,
        IExprBuilder& builder) noexcept override {
        for (Port const& port : mRecord->outputs) {
            outputs->nbDims = static_cast<int32_t>(port.shape.size());
            for (size_t i = 0; i < port.shape.size(); ++i) {
                outputs->d[i] = port.shape[i] < 0 ? inputs[0].d[0] : builder.constant(port.shape[i]);
            }
            ++outputs;
        }
        return 0;
    }
    bool supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* tensors, int32_t inputs, int32_t) noexcept override {
        Port const& port = position < inputs ? mRecord->inputs[position] : mRecord->outputs[position - inputs];
        return tensors[position].desc.type == port.type && tensors[position].desc.format == port.format;
    }
    size_t getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t, DynamicPluginTensorDesc const*, int32_t) const noexcept override {
        return mRecord->workspace(inputs[0].max.d[0]);
    }

    int32_t setTactic(int32_t) noexcept override { return 0; }
    int32_t onShapeChange(PluginTensorDesc const* inputs, int32_t inputCount, PluginTensorDesc const* outputs, int32_t outputCount) noexcept override {
        return guarded([&] {
            // An engine's builder attaches nothing, and may time layers all the same, where there is a GPU.
            if (mKernels == nullptr && !hasDevice()) {
                return 0;
            }
            prepare();
            check(mRecord->inputs, inputs, inputCount);
            check(mRecord->outputs, outputs, outputCount);
            mKernels->program(inputs[0].dims.d[0]);
            return 0;
        }, -1);
    }
    int32_t enqueue(PluginTensorDesc const* inputs, PluginTensorDesc const*, void const* const* from, void* const* to, void* workspace,
        cudaStream_t stream) noexcept override {
        return guarded([&] {
            prepare();
            mKernels->run(mKernels->program(inputs[0].dims.d[0]), from, to, workspace, reinterpret_cast<CUstream>(stream));
            return 0;
        }, -1);
    }
    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override {
        return guarded([this]() -> IPluginV3* {
            auto attached = std::make_unique<Layer>(mName, mRecord);
            attached->mKernels = std::make_shared<Kernels>(mRecord);
            return attached.release();
        }, static_cast<IPluginV3*>(nullptr));
    }
    PluginFieldCollection const* getFieldsToSerialize() noexcept override { return &mFields; }

private:
    // Loaded once; an attached layer comes with them.
    void prepare() {
        if (mKernels == nullptr) {
            mKernels = std::make_shared<Kernels>(mRecord);
        }
    }

    void check(std::vector<Port> const& ports, PluginTensorDesc const* tensors, int32_t count) const {
        bool fits = static_cast<size_t>(count) == ports.size();
        for (size_t i = 0; fits && i < ports.size(); ++i) {
            Dims const& found = tensors[i].dims;
            fits = static_cast<size_t>(found.nbDims) == ports[i].shape.size();
            for (int32_t side = 0; fits && side < found.nbDims; ++side) {
                fits = ports[i].shape[side] < 0 || ports[i].shape[side] == found.d[side];
            }
        }
        if (!fits) {
            throw std::runtime_error(std::string(mName) + " was built for other shapes");
        }
    }

    char const* mName;
    std::shared_ptr<Record const> mRecord;
    std::shared_ptr<Kernels> mKernels;
    PluginField mField;
    PluginFieldCollection mFields{};
};

// The bytes of a text in base64 (RFC 4648, section 4), which is what an attribute of ONNX holds.
std::string decoded(char const* text, size_t size) {
    static constexpr char kALPHABET[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    std::string bytes;
    bytes.reserve(3 * size / 4);
    uint32_t bits = 0;
    int count = 0;
    for (size_t i = 0; i < size && text[i] != '=' && text[i] != '\0'; ++i) {
        char const* place = std::strchr(kALPHABET, text[i]);
        if (place == nullptr) {
            Reader::fail();
        }
        bits = bits << 6 | static_cast<uint32_t>(place - kALPHABET);
        count += 6;
        if (count >= 8) {
            count -= 8;
            bytes.push_back(static_cast<char>(bits >> count & 0xff));
        }
    }
    return bytes;
}

class Creator final : public IPluginCreatorV3One {
public:
    explicit Creator(char const* name) : mName(name) {}

    IPluginV3* createPlugin(AsciiChar const*, PluginFieldCollection const* fields, TensorRTPhase phase) noexcept override {
        return guarded([&]() -> IPluginV3* {
            for (int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i) {
                PluginField const& field = fields->fields[i];
                if (std::strcmp(field.name, kRECORD) == 0 && field.length > 0) {
                    std::string data(static_cast<char const*>(field.data), static_cast<size_t>(field.length));
                    if (phase == TensorRTPhase::kBUILD) {
                        data = decoded(data.data(), data.size());
                    }
                    return new Layer(mName, std::make_shared<Record>(mName, std::move(data)));
                }
            }
            throw std::runtime_error(std::string(mName) + " has no record");
        }, static_cast<IPluginV3*>(nullptr));
    }
    PluginFieldCollection const* getFieldNames() noexcept override { return &mFields; }
    AsciiChar const* getPluginName() const noexcept override { return mName; }
    AsciiChar const* getPluginVersion() const noexcept override { return kVERSION; }
    AsciiChar const* getPluginNamespace() const noexcept override { return kNAMESPACE; }

private:
    char const* mName;
    PluginField mField{kRECORD, nullptr, PluginFieldType::kCHAR, 0};
    PluginFieldCollection mFields{1, &mField};
};

}  // namespace

extern "C" __attribute__((visibility("default"))) IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static char const* const names[] = {AGLN_LAYERS};
    static std::vector<std::unique_ptr<Creator>> const creators = [] {
        std::vector<std::unique_ptr<Creator>> made;
        for (char const* name : names) {
            made.push_back(std::make_unique<Creator>(name));
        }
        return made;
    }();
    static std::vector<IPluginCreatorInterface*> const listed = [] {
        std::vector<IPluginCreatorInterface*> found;
        for (auto const& creator : creators) {
            found.push_back(creator.get());
        }
        return found;
    }();
    count = static_cast<int32_t>(listed.size());
    return listed.data();
}

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(ILoggerFinder* finder) { gLoggerFinder = finder; }

#define AGLN_TEXT_OF(x) #x
#define AGLN_TEXT(x) AGLN_TEXT_OF(x)

// Some programs, such as Triton Inference Server, only load a library of layers, and never ask it for them. Where
// AGLN_FAST_REGISTER_LAYERS is 1 it gives them to the TensorRT that is loaded already; whoever asks, too, would get them
// twice. Another major version's registry has other methods in other places: it must not be called.
__attribute__((constructor)) static void registerLayers() {
    char const* asked = std::getenv("AGLN_FAST_REGISTER_LAYERS");
    if (asked == nullptr || std::strcmp(asked, "1") != 0) {
        return;
    }
    void* library = dlopen("libnvinfer.so." AGLN_TEXT(NV_TENSORRT_MAJOR), RTLD_NOW | RTLD_NOLOAD);
    void* symbol = library == nullptr ? nullptr : dlsym(library, "getPluginRegistry");
    if (symbol == nullptr) {
        report("no TensorRT " AGLN_TEXT(NV_TENSORRT_MAJOR) ", with whose headers this library was compiled, is loaded: "
               "load the library after it, or compile it with the headers of the other");
        return;
    }
    IPluginRegistry* registry = reinterpret_cast<IPluginRegistry* (*)()>(symbol)();
    int32_t count = 0;
    IPluginCreatorInterface* const* creators = getCreators(count);
    for (int32_t i = 0; i < count; ++i) {
        if (!registry->registerCreator(*creators[i], kNAMESPACE)) {
            report("TensorRT takes no layers of ours: it has them already");
            return;
        }
    }
}
