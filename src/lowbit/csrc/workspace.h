// The buffers that a step works in, made once for the largest step and for a number of threads.
#pragma once
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <memory>
#include <vector>

#include "engine_product.h"
#include "team.h"

namespace lowbit {

// 64-byte aligned numbers; their pages are only taken when touched. Large ones ask for huge pages: a prompt writes columns of rows that
// are thousands of bytes apart, each in a page of its own otherwise (a tenth of the time of a prompt of 512, 1.1 B).
template <class T>
class Buffer {
public:
    bool make(int64_t count) {
        constexpr int64_t kHugePage = int64_t{2} << 20, kLarge = kHugePage / 2;
        const int64_t wanted = std::max<int64_t>(count, 1) * static_cast<int64_t>(sizeof(T));
        const int64_t page = wanted >= kLarge ? kHugePage : 64, bytes = (wanted + page - 1) / page * page;
        data_.reset(static_cast<T*>(aligned_alloc(static_cast<size_t>(page), static_cast<size_t>(bytes))));
#if defined(__linux__)
        if (data_ && page == kHugePage) madvise(data_.get(), static_cast<size_t>(bytes), MADV_HUGEPAGE);
#endif
        return data_ != nullptr;
    }
    T* get() const { return data_.get(); }
    T& operator[](int64_t index) const { return data_.get()[index]; }

private:
    struct Free {
        void operator()(T* data) const { free(data); }
    };
    std::unique_ptr<T, Free> data_;
};

// Work of an expert that got tokens: one product.
struct ExpertTask {
    Input input;
    Task task;
    int64_t first;  // of its assignments
};

constexpr int64_t kNearTokens = 48;

// What a thread keeps for itself. A step allocates nothing: a thread that ran out of memory would leave the others at a barrier.
struct Room {
    Buffer<float> hidden, x;       // [kAloneTokens][widest]
    Buffer<float> near;            // [kNearTokens][hidden]: rows between a norm and the forms made of them
    Buffer<uint8_t> packed;        // forms of an input, kAloneTokens
    Buffer<float> row;             // one row of q, k and v, normalised
    Buffer<float> branch;          // one token's sum of experts, or its norm
    Buffer<float> queries, scores, out, most, total;  // of an attention item
    Buffer<uint8_t> bytes;
    Buffer<int64_t> positions;
    Buffer<float> slopes;
    std::vector<ExpertTask> expert_tasks;
    Buffer<float> parted;          // gate and up of one row where they come interleaved
};

struct Workspace {
    int threads = 0;
    Team team;
    std::vector<Room> rooms;
    Buffer<float> hidden, x, narrow;    // [chunk][hidden], [chunk][widest input], [chunk][embedding width]
    Buffer<float> qkv, attention;       // [chunk][q + 2 kv], [chunk][q]
    Buffer<float> gate, up;             // [chunk][widest MLP]
    Buffer<float> branches[2];          // what attention and MLP add
    Buffer<uint8_t> packed;
    Buffer<float> turns;                // cosines and sines [rope][chunk][rotary_dim]
    Buffer<float> split_out, split_most, split_total;  // partial results of attention
    int64_t split_rows = 0;
    // Experts: assignments are pairs of a token and an expert, sorted by expert.
    Buffer<float> router, expert_x, expert_gate, expert_out, shared_gate, shared_up, shared_out, shared_router;
    Buffer<uint8_t> expert_packed;
    int64_t expert_packed_bytes = 0;
    Buffer<int32_t> assigned_token, assigned_place;  // [chunk * top_k]: of each assignment; of each (token, rank) its assignment
    Buffer<float> assigned_weight;                   // [chunk * top_k] by (token, rank)
    std::vector<int64_t> expert_begin, expert_next;  // [experts + 1]
};

}  // namespace lowbit
