// Laying bf16 matrices out tightly (tight.h), looking at what was laid out, and giving it back.
#include "tight.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "engine_api.h"
#include "engine_isa.h"
#include "error.h"
#include "number.h"
#include "threads.h"

namespace lowbit {
namespace {

constexpr char kTightMagic[8] = {'l', 'b', 't', 'i', 'g', 'h', 't', '1'};
constexpr int64_t kMostColumns = 1 << 16;  // an exception has 16 bits for its column
constexpr int64_t kMostTight = int64_t{1} << 39;  // weights whose exceptions 32 bits count
constexpr int64_t kPartBlocks = 16;        // that a thread takes at a time
constexpr int64_t kSample = 1 << 18;       // weights that the table is made from: a byte of one in 10,000 appears 26 times
constexpr int64_t kLeastOthers = 16;       // of a small matrix

int64_t round_line(int64_t bytes) { return divide_up(bytes, kVector) * kVector; }

int64_t most_others(int64_t rows, int64_t cols) { return std::max(rows * cols / kTightLimit, std::min(kLeastOthers, rows * cols)); }

// Everything that follows from the sizes.
TightHeader place_parts(int64_t rows, int64_t cols, int64_t count) {
    TightHeader header{};
    memcpy(header.magic, kTightMagic, sizeof kTightMagic);
    header.rows = rows;
    header.cols = cols;
    header.blocks = divide_up(rows, kTightRows);
    header.units = divide_up(cols, kTightUnit);
    header.block_bytes = header.units * kTightUnitBytes;
    header.starts_offset = kTightHeaderBytes + header.blocks * header.block_bytes;
    header.others_offset = header.starts_offset + round_line((header.blocks * kTightRows + 1) * static_cast<int64_t>(sizeof(uint32_t)));
    header.count = count;
    header.total_bytes = header.others_offset + round_line(count * static_cast<int64_t>(sizeof(uint32_t)));
    return header;
}

uint64_t seal_of(TightHeader header) {
    header.seal = 0;
    uint64_t words[sizeof header / sizeof(uint64_t)];
    memcpy(words, &header, sizeof words);
    return mix_words(words, sizeof words / sizeof words[0]);
}

int check_shape(int64_t rows, int64_t cols) {
    if (rows <= 0 || cols <= 0 || rows > kMostTight / cols)
        return fail(LOWBIT_BAD_ARGUMENT, "a weight of %lld x %lld makes no sense", static_cast<long long>(rows), static_cast<long long>(cols));
    if (cols > kMostColumns)
        return fail(LOWBIT_UNSUPPORTED, "the tight form has room for %lld inputs, not %lld", static_cast<long long>(kMostColumns), static_cast<long long>(cols));
    return LOWBIT_OK;
}

// 0x00 and the 15 most frequent upper bytes of rows from all over the matrix.
TightTable make_table(const uint16_t* weight, int64_t rows, int64_t cols) {
    int64_t seen[256] = {};
    const int64_t step = std::max<int64_t>(rows * cols / kSample, 1);
    for (int64_t row = 0; row < rows; row += step)
        for (int64_t k = 0; k < cols; ++k) ++seen[weight[row * cols + k] >> 8];
    uint8_t order[256];
    for (int i = 0; i < 256; ++i) order[i] = static_cast<uint8_t>(i);
    seen[0] = INT64_MAX;
    std::stable_sort(order, order + 256, [&](uint8_t a, uint8_t b) { return seen[a] > seen[b]; });
    TightTable table;
    memset(table.name, kNoName, sizeof table.name);
    for (int i = 0; i < 16; ++i) {
        table.high[i] = order[i];
        table.name[order[i]] = static_cast<uint8_t>(i);
    }
    return table;
}

struct Tightening {
    const uint16_t* weight;
    TightHeader header;
    TightTable table;
    uint8_t* tight;
    uint32_t* starts;  // of each row how many exceptions it has, one place further on
    std::vector<std::vector<uint32_t>> parts;
    std::atomic<int64_t> others{0};
    std::atomic<bool> out_of_memory{false};
    int64_t most;
};

void split_part(Tightening* work, int64_t part) {
    const TightHeader& header = work->header;
    const int64_t begin = part * kPartBlocks, end = std::min(begin + kPartBlocks, header.blocks);
    std::vector<uint32_t>& found = work->parts[static_cast<size_t>(part)];
    const std::unique_ptr<uint32_t[]> row_others(new uint32_t[static_cast<size_t>(header.cols)]);
    for (int64_t block = begin; block < end; ++block) {
        if (work->others.load(std::memory_order_relaxed) > work->most) return;
        uint8_t* to = work->tight + kTightHeaderBytes + block * header.block_bytes;
        memset(to, 0, static_cast<size_t>(header.block_bytes));
        for (int64_t row = block * kTightRows; row < std::min((block + 1) * kTightRows, header.rows); ++row) {
            const int64_t count = engine_isa().split_row(work->weight + row * header.cols, header.cols, static_cast<int>(row % kTightRows), work->table, to, row_others.get());
            work->starts[row + 1] = static_cast<uint32_t>(count);
            found.insert(found.end(), row_others.get(), row_others.get() + count);
            work->others.fetch_add(count, std::memory_order_relaxed);
        }
    }
}

int tighten(const uint16_t* weight, int64_t rows, int64_t cols, void* tight, int64_t* used) {
    Tightening work;
    work.weight = weight;
    work.header = place_parts(rows, cols, 0);
    work.table = make_table(weight, rows, cols);
    work.tight = static_cast<uint8_t*>(tight);
    work.starts = reinterpret_cast<uint32_t*>(work.tight + work.header.starts_offset);
    work.most = most_others(rows, cols);
    const int64_t parts = divide_up(work.header.blocks, kPartBlocks), padded = work.header.blocks * kTightRows;
    work.parts.resize(static_cast<size_t>(parts));
    memset(work.starts, 0, static_cast<size_t>(work.header.others_offset - work.header.starts_offset));
    parallel_for(parts, 1, [&](int64_t begin, int64_t end, int) {
        try {
            for (; begin < end; ++begin) split_part(&work, begin);
        } catch (const std::bad_alloc&) {
            work.out_of_memory.store(true);
        }
    });
    if (work.out_of_memory.load()) return fail(LOWBIT_NO_MEMORY, "not enough memory to lay a weight out tightly");
    const int64_t count = work.others.load();
    if (count > work.most)
        return fail(LOWBIT_UNSUPPORTED, "more than one of %lld weights lies outside the 16 most frequent exponents: the weight stays plain", static_cast<long long>(kTightLimit));
    for (int64_t row = 0; row < padded; ++row) work.starts[row + 1] += work.starts[row];
    TightHeader header = place_parts(rows, cols, count);
    memcpy(header.high, work.table.high, sizeof header.high);
    header.seal = seal_of(header);
    memset(work.tight, 0, kTightHeaderBytes);
    memcpy(work.tight, &header, sizeof header);
    uint8_t* to = work.tight + header.others_offset;
    memset(to, 0, static_cast<size_t>(header.total_bytes - header.others_offset));
    for (const std::vector<uint32_t>& part : work.parts) {
        if (!part.empty()) memcpy(to, part.data(), part.size() * sizeof(uint32_t));
        to += part.size() * sizeof(uint32_t);
    }
    *used = header.total_bytes;
    return LOWBIT_OK;
}

// put(k, bf16) for the inputs of a row; those that are exceptions come a second time.
template <class Put>
void visit_row(const TightHeader& header, int64_t row, const Put& put) {
    const int64_t lane = row % kTightRows;
    const uint8_t* unit = header.block(row / kTightRows);
    for (int64_t k = 0; k < header.cols; k += kTightUnit, unit += kTightUnitBytes) {
        const uint8_t *low = unit + lane * kTightUnit, *names = unit + kTightRows * kTightUnit + lane / 2 * kTightUnit;
        const int width = static_cast<int>(std::min(kTightUnit, header.cols - k));
        for (int i = 0; i < width; ++i) {
            const int place = tight_place(i), name = names[place] >> (lane % 2 * 4) & 15;
            put(k + i, static_cast<uint16_t>(header.high[name] << 8 | low[place]));
        }
    }
    const uint32_t *starts = header.starts() + row, *others = header.others();
    for (uint32_t i = starts[0]; i < starts[1]; ++i) put(others[i] >> 16, static_cast<uint16_t>(others[i]));
}

// Products follow these without looking again.
bool others_hold(const TightHeader& header) {
    const uint32_t *starts = header.starts(), *others = header.others();
    if (starts[0] != 0 || starts[header.blocks * kTightRows] != header.count) return false;
    for (int64_t row = 0; row < header.blocks * kTightRows; ++row)
        if (starts[row] > starts[row + 1]) return false;
    for (int64_t i = 0; i < header.count; ++i)
        if (others[i] >> 16 >= static_cast<uint64_t>(header.cols)) return false;
    return true;
}

const TightHeader* refuse(const char* sentence) {
    fail(LOWBIT_BAD_ARGUMENT, "%s", sentence);
    return nullptr;
}

}  // namespace

const TightHeader* check_tight(const void* tight, int64_t bytes) {
    if (!tight || bytes < kTightHeaderBytes || bytes > kMostElements) return refuse("a tight weight has not the bytes of its header, or more than any weight");
    if (reinterpret_cast<uintptr_t>(tight) % kVector) return refuse("a tight weight must lie on a 64-byte boundary");
    const TightHeader* header = static_cast<const TightHeader*>(tight);
    if (memcmp(header->magic, kTightMagic, sizeof kTightMagic)) return refuse("the buffer does not hold a weight that lowbit_tighten laid out");
    if (header->seal != seal_of(*header)) return refuse("the header of a tight weight was written over; lay the weight out again");
    if (check_shape(header->rows, header->cols)) return nullptr;
    if (header->count < 0 || header->count > most_others(header->rows, header->cols)) return refuse("a tight weight has more exceptions than its form allows");
    TightHeader wanted = place_parts(header->rows, header->cols, header->count);
    memcpy(wanted.high, header->high, sizeof wanted.high);
    wanted.seal = header->seal;
    if (memcmp(&wanted, header, sizeof wanted) || header->high[0] != 0 || header->total_bytes > bytes)
        return refuse("the parts of a tight weight do not lie where its sizes say");
    return others_hold(*header) ? header : refuse("the exceptions of a tight weight are damaged: lay the weight out again");
}

void read_tight_row(const TightHeader& header, int64_t row, float* to) {
    visit_row(header, row, [&](int64_t k, uint16_t weight) { to[k] = from_bf16(weight); });
}

}  // namespace lowbit

using namespace lowbit;

extern "C" int lowbit_tight_pays(void) { return engine_isa().tight_pays; }

extern "C" int64_t lowbit_tight_bytes(int64_t rows, int64_t cols) {
    if (check_shape(rows, cols)) return -1;
    return place_parts(rows, cols, most_others(rows, cols)).total_bytes;
}

extern "C" int lowbit_tighten(const void* weight, int64_t rows, int64_t cols, void* tight, int64_t tight_bytes, int64_t* used) try {
    const int64_t wanted = lowbit_tight_bytes(rows, cols);
    if (wanted < 0) return check_shape(rows, cols);
    if (!weight || !tight || !used) return fail(LOWBIT_BAD_ARGUMENT, "a weight to lay out tightly needs numbers, room and a place for its size");
    if (reinterpret_cast<uintptr_t>(tight) % kVector) return fail(LOWBIT_BAD_ARGUMENT, "a tight weight must lie on a 64-byte boundary");
    if (tight_bytes < wanted || tight_bytes > kMostElements)
        return fail(LOWBIT_BAD_ARGUMENT, "a tight weight [%lld, %lld] may take %lld bytes, got room for %lld", static_cast<long long>(rows), static_cast<long long>(cols),
                    static_cast<long long>(wanted), static_cast<long long>(tight_bytes));
    return tighten(static_cast<const uint16_t*>(weight), rows, cols, tight, used);
} catch (...) {
    return caught();
}

extern "C" int lowbit_loosen(const void* tight, int64_t tight_bytes, void* weight) try {
    const TightHeader* header = check_tight(tight, tight_bytes);
    if (!header) return LOWBIT_BAD_ARGUMENT;
    if (!weight) return fail(LOWBIT_BAD_ARGUMENT, "a weight needs room");
    uint16_t* to = static_cast<uint16_t*>(weight);
    parallel_for(header->rows, 16, [&](int64_t begin, int64_t end, int) {
        for (; begin < end; ++begin) visit_row(*header, begin, [&](int64_t k, uint16_t value) { to[begin * header->cols + k] = value; });
    });
    return LOWBIT_OK;
} catch (...) {
    return caught();
}
