#include "tensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <iterator>

#include "../map_guard.h"
#include "json.h"
#include "refusal.h"

namespace lowbit {
namespace {

constexpr int64_t kLengthBytes = 8;

int bytes_of(const std::string& dtype) {
    for (const auto& [name, bytes] : {std::pair<const char*, int>{"F32", 4}, {"F16", 2}, {"BF16", 2}, {"I32", 4}, {"U32", 4}, {"I64", 8}, {"U8", 1}, {"I8", 1}})
        if (dtype == name) return bytes;
    return 0;
}

Tensor read_entry(const Json& entry, const MappedFile& file, int64_t start, const std::string& path) {
    Tensor tensor;
    tensor.dtype = entry.at("dtype").text();
    for (const Json& side : entry.at("shape").list()) tensor.shape.push_back(side.integer());
    const int64_t begin = entry.at("data_offsets").list().at(0).integer(), end = entry.at("data_offsets").list().at(1).integer();
    if (begin < 0 || end < begin || end > file.size() - start)
        throw Refusal(LOWBIT_BAD_ARGUMENT, path + " is truncated: it should have at least " + std::to_string(start + end) + " bytes and has " +
                                               std::to_string(file.size()) + "; get it again");
    tensor.data = file.data() + start + begin;
    tensor.bytes = end - begin;
    const int size = bytes_of(tensor.dtype);
    if (size && tensor.count() != tensor.bytes / size) throw Refusal(LOWBIT_BAD_ARGUMENT, path + " is damaged: a tensor's bytes are not as many as its shape says");
    return tensor;
}

}  // namespace

MappedFile::MappedFile(const std::string& path) {
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat status {};
    if (file < 0 || fstat(file, &status) || !S_ISREG(status.st_mode)) {
        if (file >= 0) close(file);
        throw Refusal(LOWBIT_BAD_ARGUMENT, path + " is missing or cannot be read");
    }
    size_ = status.st_size;
    void* data = size_ ? mmap(nullptr, static_cast<size_t>(size_), PROT_READ, MAP_PRIVATE, file, 0) : MAP_FAILED;
    close(file);
    if (data == MAP_FAILED) throw Refusal(LOWBIT_BAD_ARGUMENT, path + " is empty or cannot be mapped");
    data_ = static_cast<const uint8_t*>(data);
    if (lowbit_guard_map(data, size_, path.c_str()) == LOWBIT_OK) return;
    munmap(data, static_cast<size_t>(size_));
    throw Refusal(LOWBIT_UNSUPPORTED, lowbit_last_error());
}

MappedFile::~MappedFile() {
    lowbit_release_map(data_);
    munmap(const_cast<uint8_t*>(data_), static_cast<size_t>(size_));
}

void MappedFile::check() const {
    if (int status = check_mapped(data_)) throw Refusal(status, lowbit_last_error());
}

int64_t Tensor::count() const {
    int64_t count = 1;
    for (int64_t side : shape)
        if (side < 0 || __builtin_mul_overflow(count, side, &count)) return -1;
    return count;
}

int Tensor::number_type() const {
    if (dtype == "F32") return LOWBIT_FP32;
    if (dtype == "BF16") return LOWBIT_BF16;
    if (dtype == "F16") return LOWBIT_FP16;
    throw Refusal(LOWBIT_UNSUPPORTED, "weights stored as " + dtype + " are not read; save the model with save_low_bit");
}

void Tensor::release() const {
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), begin = reinterpret_cast<uintptr_t>(data);
    const uintptr_t first = (begin + page - 1) / page * page, last = (begin + static_cast<uintptr_t>(bytes)) / page * page;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

TensorFiles::TensorFiles(const std::string& folder, const std::vector<std::string>& files) {
    for (const std::string& name : files) {
        const std::string path = folder + "/" + name;
        const MappedFile& file = *files_.emplace_back(std::make_unique<MappedFile>(path));
        uint64_t length = 0;
        if (file.size() >= kLengthBytes) memcpy(&length, file.data(), sizeof length);
        if (file.size() < kLengthBytes || length > static_cast<uint64_t>(file.size() - kLengthBytes))
            throw Refusal(LOWBIT_BAD_ARGUMENT, path + " is truncated or no safetensors file");
        const int64_t start = kLengthBytes + static_cast<int64_t>(length);
        const Json header = Json::parse({reinterpret_cast<const char*>(file.data()) + kLengthBytes, length}, path);
        auto& tensors = tensors_.emplace_back();
        for (const auto& [tensor, entry] : header.object())
            if (tensor != "__metadata__") tensors.emplace(tensor, read_entry(entry, file, start, path));
    }
}

void TensorFiles::check() const {
    for (const auto& file : files_) file->check();
}

const Tensor& TensorFiles::at(int64_t file, const std::string& name) const {
    if (file >= 0 && file < static_cast<int64_t>(tensors_.size())) {
        const auto& tensors = tensors_[static_cast<size_t>(file)];
        const auto found = tensors.find(name);
        if (found != tensors.end()) return found->second;
    }
    throw Refusal(LOWBIT_BAD_ARGUMENT, "the folder's files lack the tensor " + name + "; is one of them missing or from another save?");
}

std::string read_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw Refusal(LOWBIT_BAD_ARGUMENT, path + " is missing or cannot be read");
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

}  // namespace lowbit
