#include "machine_limits.h"

#include <sched.h>

#include <algorithm>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>

#include "lowbit.h"
#include "threads.h"

namespace lowbit {
namespace {

// The number behind `name` in a file of lines "name number", or of one number where the name is empty; -1 where there is none.
long long read_number(const std::string& path, const char* name) {
    FILE* file = fopen(path.c_str(), "r");
    if (!file) return -1;
    char line[256];
    long long value = -1;
    const size_t length = strlen(name);
    while (value < 0 && fgets(line, sizeof line, file)) {
        long long found = 0;
        if (!strncmp(line, name, length) && sscanf(line + length, " %lld", &found) == 1) value = found;
    }
    fclose(file);
    return value;
}

int cores_paid(long quota, long period) {
    if (quota <= 0 || period <= 0) return 0;
    return std::max<int>(1, static_cast<int>((quota + period - 1) / period));
}

// Where the kernel's hierarchy of version 2 puts this process ("/" in most containers); empty without one.
std::string own_group() {
    FILE* file = fopen("/proc/self/cgroup", "r");
    if (!file) return "";
    char line[PATH_MAX + 16];
    std::string path;
    while (path.empty() && fgets(line, sizeof line, file))
        if (!strncmp(line, "0::", 3)) path.assign(line + 3, strcspn(line + 3, "\n"));
    fclose(file);
    return path;
}

// Call visit(directory) for the group of this process and those around it: a limit of any of them holds.
template <class Visit>
void for_each_group(const Visit& visit) {
    std::string path = own_group();
    while (path.size() > 1) {
        visit("/sys/fs/cgroup" + path);
        path.resize(path.rfind('/'));
    }
    visit(std::string("/sys/fs/cgroup"));
}

int container_cores() {
    int least = INT_MAX;
    const auto count = [&](int cores) {
        if (cores > 0) least = std::min(least, cores);
    };
    for_each_group([&](const std::string& group) { count(quota_cores((group + "/cpu.max").c_str())); });
    const char* older = "/sys/fs/cgroup/cpu/cpu.cfs_";  // version 1
    count(cores_paid(static_cast<long>(read_number(std::string(older) + "quota_us", "")), static_cast<long>(read_number(std::string(older) + "period_us", ""))));
    return least;
}

}  // namespace

int quota_cores(const char* path) {
    FILE* file = fopen(path, "r");
    if (!file) return 0;
    long quota = 0, period = 0;
    const int found = fscanf(file, "%ld %ld", &quota, &period);
    fclose(file);
    return found == 2 ? cores_paid(quota, period) : 0;
}

int threads_named(const char* text) {
    const long number = text ? strtol(text, nullptr, 10) : 0;
    return number > 0 ? static_cast<int>(std::min<long>(number, kMostThreads)) : 0;
}

int default_threads() {
    if (const int named = threads_named(getenv("OMP_NUM_THREADS"))) return named;
    cpu_set_t set;
    CPU_ZERO(&set);
    const int cores = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : static_cast<int>(std::thread::hardware_concurrency());
    return std::clamp(std::min(cores, container_cores()), 1, kMostThreads);
}

int64_t available_bytes() {
    const long long kilobytes = read_number("/proc/meminfo", "MemAvailable:");
    long long least = kilobytes < 0 ? LLONG_MAX : kilobytes * 1024;
    const auto limit = [&](const std::string& most_at, const std::string& used_at, const std::string& idle_at, const char* idle_name) {
        const long long most = read_number(most_at, ""), used = read_number(used_at, "");
        if (most < 0 || used < 0) return;
        // Pages of files that nobody has used lately are given back before anything fails.
        const long long idle = std::max(read_number(idle_at, idle_name), 0LL);
        least = std::min(least, std::max(most - used + idle, 0LL));
    };
    for_each_group([&](const std::string& group) { limit(group + "/memory.max", group + "/memory.current", group + "/memory.stat", "inactive_file"); });
    const std::string older = "/sys/fs/cgroup/memory/memory.";  // version 1
    limit(older + "limit_in_bytes", older + "usage_in_bytes", older + "stat", "total_inactive_file");
    return least == LLONG_MAX ? -1 : static_cast<int64_t>(least);
}

}  // namespace lowbit

extern "C" int lowbit_quota(const char* path) { return path ? lowbit::quota_cores(path) : 0; }
