// Products of a step: what they read and write, and how a team shares their weights.
#include "step.h"

namespace lowbit {

Task Step::task_of(Member& me, const View& view, float* y, int64_t y_stride) {
    Task task;
    int64_t used = 0;
    task.view = view;
    task.form = me.input.form_for(view, engine_.options.compute, nullptr, &used);
    task.input = &me.input;
    task.y = y;
    task.y_stride = y_stride;
    return task;
}

Step::Place Step::place_of(const Task* tasks, int64_t item) {
    for (; item >= tasks->items; ++tasks) item -= tasks->items;
    return {tasks, item};
}

int Step::write_to(Task* tasks, int count, float* to, bool wide) {
    for (int i = 0; i < count; ++i) wide = wide || !tasks[i].narrows();
    const int type = wide ? LOWBIT_FP32 : LOWBIT_BF16;
    uint8_t* place = reinterpret_cast<uint8_t*>(to);
    for (int i = 0; i < count; ++i) {
        tasks[i].y = place;
        tasks[i].y_dtype = type;
        place += tasks[i].view.rows * dtype_bytes(type);
    }
    return type;
}

// With few tokens memory decides: everybody reads a stretch of the weights, and those that come next are known, and asked for, while
// these are read.
void Step::run_tasks(Member& me, Task* tasks, int count, const Following& after) {
    int64_t total = 0;
    for (int i = 0; i < count; ++i) {
        tasks[i].plan(work_.team.size());
        total += tasks[i].items;
    }
    if (count_ > kFewTokens) {
        work_.team.share(total, 1, [&](int64_t item, int64_t) {
            const Place here = place_of(tasks, item);
            here.task->run(here.item);
        });
        return;
    }
    me.coming = first_part(me, after);
    work_.team.share_stretches(me.index, total, [&](int64_t item, int64_t next) {
        const Place here = place_of(tasks, item), there = next < 0 ? Place{} : place_of(tasks, next);
        here.task->run(here.item, there.task ? there.task->begin_of(there.task->view, there.item) : me.coming);
    });
}

const uint8_t* Step::first_part(const Member& me, const Following& after) const {
    Form form{};
    form.few = true;
    Task tasks[3];
    int count = 0;
    int64_t total = 0;
    for (const View* view : after.views) {
        if (!view || !*view) continue;
        Task& task = tasks[count++];
        task.view = *view;
        if (after.second) task.second = *after.second;
        task.form = &form;
        task.plan(work_.team.size());
        total += task.items;
    }
    const int64_t first = work_.team.first_of(me.index, total);
    if (first >= total) return nullptr;
    const Place place = place_of(tasks, first);
    return place.task->begin_of(place.task->view, place.item);
}

// The first matrices that a layer multiplies with, or the head behind the last one.
Step::Following Step::first_of(int64_t layer) const {
    if (layer == model_.layer_count) return {{plans_.head_in ? &plans_.head_in : &plans_.head}};
    const LayerPlan& plan = plans_.plans[static_cast<size_t>(layer)];
    if (plan.qkv) return {{&plan.qkv}};
    return {{&plan.q, &plan.k, &plan.v}};
}

}  // namespace lowbit
