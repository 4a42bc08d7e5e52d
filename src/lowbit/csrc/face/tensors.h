// The tensors of a folder's safetensors files, as views of the mapped files.
//
//   file = header length u64 | header JSON {name: {dtype, shape, data_offsets}} | the tensors' bytes
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace lowbit {

// A whole file in memory, read as it is looked at.
class MappedFile {
public:
    explicit MappedFile(const std::string& path);
    ~MappedFile();
    // Throws Refusal when the file was cut off since.
    void check() const;
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;
    const uint8_t* data() const { return data_; }
    int64_t size() const { return size_; }

private:
    const uint8_t* data_ = nullptr;
    int64_t size_ = 0;
};

struct Tensor {
    std::string dtype;  // as safetensors names it: F32, BF16, I32, ...
    std::vector<int64_t> shape;
    const uint8_t* data;
    int64_t bytes;

    int64_t count() const;
    // lowbit_dtype of plain numbers; throws Refusal for other types.
    int number_type() const;
    // Give the pages back that lie wholly inside: they are clean copies of the file.
    void release() const;
};

class TensorFiles {
public:
    // Every file was checked: headers whole, tensors inside the file and as long as their shapes say.
    TensorFiles(const std::string& folder, const std::vector<std::string>& files);
    const Tensor& at(int64_t file, const std::string& name) const;
    // Throws Refusal when one of the files was cut off since.
    void check() const;

private:
    std::vector<std::unique_ptr<MappedFile>> files_;
    std::vector<std::map<std::string, Tensor>> tensors_;
};

// A small file as text; throws Refusal when it is missing.
std::string read_file(const std::string& path);

}  // namespace lowbit
