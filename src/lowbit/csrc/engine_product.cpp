#include "engine_product.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "threads.h"

namespace lowbit {
namespace {

// Weights that a thread takes at a time when decoding: small enough that the last part keeps nobody waiting for long.
constexpr int64_t kLeastPart = 8 << 10, kMostPart = 16 << 10;
constexpr int64_t kPartsPerThread = 6;
constexpr int64_t kLeastUnit = 16;  // tokens that a thread takes at a time to make them ready
constexpr int64_t kPlainRows = kTightRows;  // so that plain and tight matrices can be paired

ProductJob job_of(const View& view, const Form& form, void* y, int y_dtype, int64_t y_stride) {
    ProductJob job = view.header ? form.job(*view.header) : form.job(view.plain_rows());
    job.bias = view.bias;
    job.y = y;
    job.y_dtype = y_dtype;
    job.y_stride = y_stride;
    return job;
}

}  // namespace

int64_t View::bytes() const { return header ? header->total_bytes : tight ? tight->total_bytes : rows * cols * dtype_bytes(dtype); }

int64_t View::group_bytes() const { return tight ? tight->block_bytes : kPlainRows * cols * dtype_bytes(dtype); }

bool View::rounds_to_brains(int64_t tokens, int compute) const {
    return !header && (tight || dtype == LOWBIT_BF16) && lowbit::rounds_to_brains(true, tokens, compute);
}

PlainRows View::plain_rows() const {
    if (tight) return {rows, cols, nullptr, engine_isa().read_tight, tight};
    return {rows, cols, static_cast<const uint16_t*>(data), nullptr, nullptr};
}

View view_of(const lowbit_matrix& matrix, int64_t index) {
    View view;
    if (matrix.kind == LOWBIT_ABSENT) return view;
    view.rows = matrix.rows;
    view.cols = matrix.cols;
    view.dtype = matrix.dtype;
    view.bias = matrix.bias ? matrix.bias + index * matrix.rows : nullptr;
    const int64_t step = matrix.kind != LOWBIT_PLAIN ? matrix.bytes : matrix.rows * matrix.cols * dtype_bytes(matrix.dtype);
    view.data = static_cast<const uint8_t*>(matrix.data) + index * step;
    if (matrix.kind == LOWBIT_PREPARED) view.header = static_cast<const Header*>(view.data);
    if (matrix.kind == LOWBIT_TIGHT) view.tight = static_cast<const TightHeader*>(view.data);
    return view;
}

void Input::start(const void* from, int type, int64_t row_stride, int64_t count) {
    rows = from;
    dtype = type;
    stride = row_stride;
    tokens = count;
    form_count = 0;
}

const Form* Input::form_for(const View& view, int compute, uint8_t* room, int64_t* used) {
    if (!view.header && !view.rounds_to_brains(tokens, compute)) return nullptr;
    const Form wanted = view.header ? plan_form(*view.header, tokens, compute) : plan_brains(view.rows, view.cols, tokens);
    for (int i = 0; i < form_count; ++i)
        if (same_form(forms[i], wanted)) return &forms[i];
    Form& form = forms[form_count++];
    form = wanted;
    form.activations.x = rows;
    form.activations.dtype = dtype;
    form.activations.stride = stride;
    form.activations.data = room + *used;
    *used += form.bytes();
    return &form;
}

int64_t Input::stretches() const {
    int64_t count = 0;
    for (int i = 0; i < form_count; ++i) count += forms[i].stretches();
    return count;
}

void Input::balance(int64_t stretch) const {
    int i = 0;
    for (; stretch >= forms[i].stretches(); ++i) stretch -= forms[i].stretches();
    forms[i].balance(stretch);
}

void Input::make_all_ready() const {
    for (int64_t stretch = 0; stretch < stretches(); ++stretch) balance(stretch);
    make_ready(0, tokens, rows);
}

int64_t Input::unit() const {
    int64_t unit = 1;
    for (int i = 0; i < form_count; ++i) unit = std::lcm(unit, int64_t{forms[i].activations.tile});
    return divide_up(kLeastUnit, unit) * unit;
}

void Input::make_ready(int64_t begin, int64_t end, const void* from) const {
    for (int i = 0; i < form_count; ++i) {
        Form form = forms[i];
        form.activations.x = from;
        const int64_t tile = form.activations.tile;
        for (int64_t t = begin / tile; t * tile < end; ++t) form.make_ready(t);
    }
}

int64_t room_for(const View& view, int64_t tokens, int compute) {
    if (!view.header) return view.rounds_to_brains(tokens, compute) ? plan_brains(view.rows, view.cols, tokens).bytes() : 0;
    int64_t most = 0;
    for (int64_t count : {int64_t{1}, int64_t{2}, int64_t{4}, kFewTokens, tokens})
        if (count <= tokens) most = std::max(most, plan_form(*view.header, count, compute).bytes());
    return most + plan_form(*view.header, std::min<int64_t>(tokens, 8), compute).bytes();
}

bool Task::pairs_with(const View& other, const Form* other_form) const {
    return other && other.rows == view.rows && !other.header == !view.header && form == other_form &&
           (!view.header || view.header->block_bytes == other.header->block_bytes);
}

void Task::cut(int64_t count, int64_t unit_bytes, int team) {
    units = count;
    per_item = std::max<int64_t>(std::clamp(count * unit_bytes / (team * kPartsPerThread), kLeastPart, kMostPart) / unit_bytes, 1);
    items = divide_up(count, per_item);
}

Task::Span Task::span(int64_t item) const { return {item * per_item, std::min((item + 1) * per_item, units)}; }

void Task::plan(int team) {
    const int64_t matrices = second ? 2 : 1;
    if (!view.header && form && form->brains) items = form->items(view.rows);
    else if (!view.header) cut(divide_up(view.rows, kPlainRows), view.group_bytes() * matrices, team);
    else if (form->few) cut(view.header->blocks, view.header->block_bytes * matrices, team);
    else items = form->items(*view.header, joins() ? 2 : 1);
}

const uint8_t* Task::begin_of(const View& of, int64_t item) const {
    if (of.tight) return of.tight->block(span(item).begin);
    if (!of.header) return static_cast<const uint8_t*>(of.data) + span(item).begin * of.group_bytes();
    return form->few ? block_at(*of.header, span(item).begin) : nullptr;
}

namespace {

Piece run_plain(const Task& task, const View& view, void* y, int64_t item, const uint8_t* next) {
    const Task::Span units = task.span(item);
    const int64_t begin = units.begin * kPlainRows, end = std::min(units.end * kPlainRows, view.rows);
    const DenseJob job = {static_cast<const float*>(task.input->rows), task.input->stride, task.input->tokens, view.data, view.dtype, view.cols,
                          begin, end, view.bias, static_cast<float*>(y), task.y_stride, next};
    if (view.tight) engine_isa().tight(job);
    else engine_isa().dense(job);
    return {0, task.input->tokens, begin, end};
}

Piece panel_piece(const View& view, const Form& form, int64_t item) {
    const int64_t panels = divide_up(divide_up(view.rows, kBlockRows), form.panel_blocks), rows = form.panel_blocks * kBlockRows;
    const int64_t token = item / panels * form.token_block, row = item % panels * rows;
    return {token, std::min(token + form.token_block, form.activations.tokens), row, std::min(row + rows, view.rows)};
}

Piece run_prepared(const Task& task, const View& view, const Form& form, void* y, int64_t item, const uint8_t* next) {
    ProductJob job = job_of(view, form, y, task.y_dtype, task.y_stride);
    job.next = next;
    job.later = !task.mlp && !task.caps();
    const int64_t tokens = form.activations.tokens;
    if (form.few) {
        const Task::Span span = task.span(item);
        form.run(job, span.begin, span.end);
        return {0, tokens, span.begin * kBlockRows, std::min(span.end * kBlockRows, view.rows)};
    }
    form.run(job, item, item + 1);
    return panel_piece(view, form, item);
}

Piece run_one(const Task& task, const View& view, const Form* form, void* y, int64_t item, const uint8_t* next) {
    return form ? run_prepared(task, view, *form, y, item, next) : run_plain(task, view, y, item, next);
}

}  // namespace

namespace {

// Numbers of a panel item.
constexpr int64_t kPanelNumbers = 258 * 32;

void join_mlp(const void* by, const float* gate, const float* up, int64_t count, float* y) {
    engine_isa().activate(*static_cast<const lowbit_mlp*>(by), gate, up, count, y);
}

}  // namespace

bool Task::pairs_near() const {
    return second && second_form && mlp && form && !form->few && !form->folded && !form->brains &&
           form->token_block * form->panel_blocks * kBlockRows <= kPanelNumbers;
}

void Task::run_near(int64_t item) const {
    alignas(64) static thread_local float near[2][kPanelNumbers];
    const Piece piece = panel_piece(view, *form, item);
    const int64_t width = form->panel_blocks * kBlockRows, before = piece.token_begin * width + piece.row_begin;
    for (int i = 0; i < 2; ++i) {
        // Where the first output of all would lie.
        void* first = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(near[i]) - static_cast<uintptr_t>(before) * sizeof(float));
        const Form& own = i ? *second_form : *form;
        ProductJob job = job_of(i ? second : view, own, first, LOWBIT_FP32, width);
        own.run(job, item, item + 1);
    }
    for (int64_t t = piece.token_begin; t < piece.token_end; ++t) {
        const int64_t row = (t - piece.token_begin) * width;
        engine_isa().activate(*mlp, near[0] + row, near[1] + row, piece.row_end - piece.row_begin, static_cast<float*>(y) + t * y_stride + piece.row_begin);
    }
}

Piece Task::run(int64_t item, const uint8_t* next) const {
    if (pairs_near()) {
        run_near(item);
        return {};
    }
    if (joins()) {
        ProductJob job = form->job(*view.header, 2);
        job.y = y;
        job.y_dtype = y_dtype;
        job.y_stride = y_stride;
        job.second = second.header;
        job.join = join_mlp;
        job.later = true;
        job.joined_by = mlp;
        form->run(job, item, item + 1);
        return {};
    }
    const uint8_t* other = second ? begin_of(second, item) : next;
    const Piece piece = run_one(*this, view, form, y, item, other);
    if (second) run_one(*this, second, second_form, z, item, next);
    const bool capped = caps();
    if (!mlp && !capped) return piece;
    const int64_t count = piece.row_end - piece.row_begin;
    for (int64_t t = piece.token_begin; t < piece.token_end; ++t) {
        const int64_t place = t * y_stride + piece.row_begin;
        float* row = static_cast<float*>(y) + place;
        if (mlp) engine_isa().activate(*mlp, row, second ? z + place : nullptr, count, row);
        if (capped) engine_isa().cap(row, multiplier, soft_cap, count);
    }
    return piece;
}

}  // namespace lowbit
