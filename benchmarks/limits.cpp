// Prints the machine's limits once: GB/s read, int8 GOP/s of the vector registers, int8 GOP/s of the tiles (0 where absent).
//
//   g++ -O3 -std=c++17 -march=native -pthread benchmarks/limits.cpp -o limits && ./limits THREADS
#include "limits.h"

#include <algorithm>
#include <cstdio>

int main(int count, char** arguments) {
    const int threads = count > 1 ? atoi(arguments[1]) : 1;
    const uint8_t* stream = limits::make_stream();
    double bandwidth = 0;
    for (int i = 0; i < 3; ++i) bandwidth = std::max(bandwidth, limits::bandwidth(stream, threads));
    printf("%.2f %.1f %.1f\n", bandwidth, limits::vector_peak(threads), limits::tile_peak(threads));
    return 0;
}
