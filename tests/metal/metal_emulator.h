// Run a Metal Shading Language kernel on the CPU, with any C++17 compiler.
//
// What lives here: what MSL has and C++ lacks (simd operations, barriers, address spaces, 16-bit
// floats) and the machinery that runs a grid. What does not: how MSL text becomes C++ (one regular
// expression per construct, in metal_emulator.py).
//
// Each Metal thread is a fiber; threadgroups run one after the other. A fiber runs until it meets a
// collective (a barrier, a simd operation) and parks there. When all that must take part are parked
// at the same source line, they go on. Every access to threadgroup memory and to an output is checked
// for bounds, for races and for being read before it was written. A fault ends the process with a
// message that names the source line, and exit code 3.
#ifndef METAL_EMULATOR_H
#define METAL_EMULATOR_H
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <type_traits>
#include <vector>

using uint = unsigned;
using ushort = unsigned short;
using uchar = unsigned char;
using ulong = unsigned long;

#define SITE int site = __builtin_LINE()  // the line of the caller, as a default argument

namespace emu {

template <class... A>
[[noreturn]] void die(const char* format, A... a) {
  std::fprintf(stderr, format, a...);
  std::fputc('\n', stderr);
  std::fflush(nullptr);
  _exit(3);
}

// ------------------------------------------------------------------------------ 16-bit floats
// Every operator rounds to 16 bits, as in MSL; float with 16-bit gives float. A float does not
// become a 16-bit float by itself: MSL would round silently, here the cast must be written.
template <class Codec>
struct Small {
  uint16_t bits;
  Small() = default;
  explicit Small(float x) : bits(Codec::down(x)) {}
  template <class N, std::enable_if_t<std::is_integral<N>::value, int> = 0>
  Small(N x) : bits(Codec::down(float(x))) {}
  operator float() const { return Codec::up(bits); }
  Small operator-() const { return Small(-float(*this)); }
#define SMALL_OPERATOR(op)                                                            \
  friend Small operator op(Small a, Small b) { return Small(float(a) op float(b)); }  \
  Small& operator op##=(float b) { return *this = Small(float(*this) op b); }
  SMALL_OPERATOR(+) SMALL_OPERATOR(-) SMALL_OPERATOR(*) SMALL_OPERATOR(/)
#undef SMALL_OPERATOR
};

struct Bfloat {
  static uint16_t down(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    return x != x ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  }
  static float up(uint16_t b) {
    uint32_t u = uint32_t(b) << 16;
    float x;
    std::memcpy(&x, &u, 4);
    return x;
  }
};

struct Half {
  static uint16_t down(float x) {
    _Float16 h = (_Float16)x;
    uint16_t b;
    std::memcpy(&b, &h, 2);
    return b;
  }
  static float up(uint16_t b) {
    _Float16 h;
    std::memcpy(&h, &b, 2);
    return (float)h;
  }
};

// ---------------------------------------------------------------------- the running threadgroup
struct uint3 { uint x, y, z; };

enum Space { Device, Threadgroup, Constant };
enum Wait { Ready, InSimd, AtBarrier, Done };

constexpr size_t kStack = 128 << 10;        // bytes of a fiber's stack
constexpr size_t kThreadgroupLimit = 32 << 10;
constexpr size_t kSlot = 16;                // bytes a lane may exchange

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Wait wait;
  int site;
  uint3 position, grid_position;
  uint index, lane, simdgroup, parity, active;
};

// Who touched an element, and between which barriers.
struct Access {
  long group = -1;
  uint thread = 0, epoch = 0, simd_epoch = 0;
};
struct Cell {
  bool written = false;
  Access write, read[2];
};

struct Variable {
  int id;
  std::unique_ptr<char[]> bytes;
  std::vector<Cell> cells;
};

struct Group {
  std::vector<Fiber> fibers;
  Fiber* current;
  ucontext_t main;
  uint3 id, size, grid, groups;
  long serial = -1;                         // number of this threadgroup in its dispatch
  std::vector<std::array<char, 2 * 32 * kSlot>> slots;
  std::vector<Variable> variables;          // threadgroup memory
  size_t used;
  // Barriers passed so far that order each space: by all, and inside each simdgroup.
  uint epoch[2];
  std::vector<std::array<uint, 2>> simd_epoch;
  bool orders[2];
  void (*body)(void*);
  void* argument;
};
inline Group G;

inline void park(Wait wait, int site) {
  Fiber* f = G.current;
  f->wait = wait;
  f->site = site;
  swapcontext(&f->context, &G.main);
}

// What each lane of the simdgroup gave; `active` gets the lanes that took part.
template <class V>
std::array<V, 32> exchange(V value, int site, uint* active = nullptr) {
  static_assert(sizeof(V) <= kSlot, "too large to exchange");
  Fiber* f = G.current;
  char* base = G.slots[f->simdgroup].data() + (f->parity ^= 1) * 32 * kSlot;
  std::memcpy(base + f->lane * kSlot, &value, sizeof(V));
  park(InSimd, site);
  std::array<V, 32> all;
  for (uint lane = 0; lane < 32; ++lane) std::memcpy(&all[lane], base + lane * kSlot, sizeof(V));
  if (active) *active = f->active;
  return all;
}

// ------------------------------------------------------------------------------ checked memory
// Two accesses of one element by different threads, one of them a write, need a barrier between
// them that orders its space; inside one simdgroup a simdgroup_barrier is enough. Nothing orders
// two threadgroups of one dispatch.
inline bool ordered(const Access& before, Space space) {
  const Fiber* f = G.current;
  if (before.group < 0) return true;
  if (before.group != G.serial) return false;
  if (before.thread == f->index || before.epoch != G.epoch[space]) return true;
  return before.thread / 32 == f->simdgroup &&
         before.simd_epoch != G.simd_epoch[f->simdgroup][space];
}

inline void touch(Cell& cell, bool write, Space space, int site) {
  const Fiber* f = G.current;
  const char* what = space == Device ? "an output" : "threadgroup memory";
  if (!write && !cell.written)
    die("line %d: thread %u reads %s that nobody has written", site, f->index, what);
  if (!ordered(cell.write, space))
    die("line %d: race on %s: thread %u %s what thread %u of group %ld wrote, no barrier between",
        site, what, f->index, write ? "overwrites" : "reads", cell.write.thread, cell.write.group);
  Access now{G.serial, f->index, G.epoch[space], G.simd_epoch[f->simdgroup][space]};
  if (write) {
    for (const Access& r : cell.read)
      if (!ordered(r, space))
        die("line %d: race on %s: thread %u overwrites what thread %u of group %ld reads, no barrier between",
            site, what, f->index, r.thread, r.group);
    cell.written = true;
    cell.write = now;
  } else {
    // Two readers are enough to notice a writer: one of them is another thread.
    const Access& first = cell.read[0];
    bool replace = first.group != G.serial || first.thread == f->index || first.epoch != now.epoch;
    cell.read[replace ? 0 : 1] = now;
  }
}

// One element that can be written. Its value is taken at once: `auto x = p[i]` does not compile.
template <class T, Space S>
struct Reference {
  T* at;
  Cell* cell;
  int site;
  T get() const { return touch(*cell, false, S, site), *at; }
  T set(T v) const { return touch(*cell, true, S, site), *at = v; }
  operator T() && { return get(); }
  template <class U, std::enable_if_t<std::is_arithmetic<U>::value && !std::is_same<U, T>::value, int> = 0>
  explicit operator U() && { return U(get()); }
  T operator=(T v) && { return set(v); }
  T operator=(Reference&& o) && { return set(o.get()); }
  T operator+=(T v) && { return set(T(get() + v)); }
  T operator-=(T v) && { return set(T(get() - v)); }
  T operator*=(T v) && { return set(T(get() * v)); }
};

struct Index {
  long i;
  int site;
  template <class N>
  Index(N n, int s = __builtin_LINE()) : i(long(n)), site(s) {}
};

// A pointer that knows its address space and its bounds. Spaces do not convert into each other.
template <class T, Space S>
struct Pointer {
  T* at;
  long low, high;  // valid indices from here
  Cell* cells;     // of this element; none for inputs
  template <class U, std::enable_if_t<std::is_same<const U, T>::value, int> = 0>
  Pointer(const Pointer<U, S>& o) : at(o.at), low(o.low), high(o.high), cells(o.cells) {}
  Pointer(T* at, long low, long high, Cell* cells) : at(at), low(low), high(high), cells(cells) {}

  decltype(auto) operator[](Index x) const {
    if (x.i < low || x.i >= high)
      die("line %d: %s index %ld outside [%ld, %ld)", x.site,
          S == Threadgroup ? "threadgroup" : "device", x.i, low, high);
    if constexpr (std::is_const<T>::value) {
      if (cells) touch(cells[x.i], false, S, x.site);
      return std::remove_const_t<T>(at[x.i]);
    } else {
      return Reference<T, S>{at + x.i, cells + x.i, x.site};
    }
  }
  decltype(auto) operator*() const { return (*this)[Index(0)]; }
  Pointer operator+(long k) const { return {at + k, low - k, high - k, cells ? cells + k : nullptr}; }
  Pointer operator-(long k) const { return *this + -k; }
  Pointer& operator+=(long k) { return *this = *this + k; }
};

template <class T, size_t N, size_t M>
struct Table {  // a two-dimensional threadgroup array
  Pointer<T, Threadgroup> all;
  Pointer<T, Threadgroup> operator[](Index x) const {
    if (x.i < 0 || x.i >= long(N)) die("line %d: threadgroup row %ld outside [0, %zu)", x.site, x.i, N);
    return {all.at + x.i * M, 0, long(M), all.cells + x.i * M};
  }
};

// The first thread to arrive allocates; garbage is what a variable starts with.
template <class T, size_t N>
Pointer<T, Threadgroup> threadgroup_array(int id) {
  for (Variable& v : G.variables)
    if (v.id == id) return {(T*)v.bytes.get(), 0, long(N), v.cells.data()};
  G.used = ((G.used + 15) & ~size_t(15)) + N * sizeof(T);
  if (G.used > kThreadgroupLimit) die("threadgroup memory: %zu bytes, more than 32 KiB", G.used);
  G.variables.push_back({id, std::unique_ptr<char[]>(new char[N * sizeof(T)]), std::vector<Cell>(N)});
  std::memset(G.variables.back().bytes.get(), 0xff, N * sizeof(T));
  return threadgroup_array<T, N>(id);
}
template <class T, size_t N, size_t M>
Table<T, N, M> threadgroup_array(int id) { return {threadgroup_array<T, N * M>(id)}; }

// ------------------------------------------------------------------------------ running a grid
[[noreturn]] inline void stuck() {
  std::fprintf(stderr, "divergent simd operation, or a barrier that not all threads reach:\n");
  for (uint i = 0; i < G.fibers.size(); ++i) {
    const Fiber& f = G.fibers[i];
    if (i && f.site == G.fibers[i - 1].site && f.wait == G.fibers[i - 1].wait) continue;
    std::fprintf(stderr, "  from thread %u: %s line %d\n", i,
                 f.wait == Done ? "finished, last seen at" : f.wait == InSimd ? "simd operation at" : "barrier at",
                 f.site);
  }
  std::fflush(nullptr);
  _exit(3);
}

// A simdgroup whose live lanes all wait at one simd operation goes on.
inline bool release_simdgroup(uint s) {
  uint first = s * 32, end = std::min<uint>(G.fibers.size(), first + 32), live = 0;
  int site = -1;
  for (uint t = first; t < end; ++t) {
    Fiber& f = G.fibers[t];
    if (f.wait == Done) continue;
    if (f.wait != InSimd || (live && f.site != site)) return false;
    site = f.site;
    live |= 1u << f.lane;
  }
  for (uint t = first; t < end; ++t)
    if (G.fibers[t].wait == InSimd) G.fibers[t].wait = Ready, G.fibers[t].active = live;
  return live;
}

inline bool release_barrier() {
  for (Fiber& f : G.fibers)
    if (f.wait != AtBarrier || f.site != G.fibers[0].site) return false;
  for (int space : {Device, Threadgroup}) G.epoch[space] += G.orders[space];
  for (Fiber& f : G.fibers) f.wait = Ready;
  return true;
}

inline void run_group() {
  static const char* seed = std::getenv("METAL_EMULATOR_SEED");
  static std::mt19937 random(seed ? std::atoi(seed) : 0);
  std::vector<uint> order(G.fibers.size());
  for (uint i = 0; i < order.size(); ++i) order[i] = i;
  for (;;) {
    if (seed) std::shuffle(order.begin(), order.end(), random);
    for (uint i : order)
      if (G.fibers[i].wait == Ready) G.current = &G.fibers[i], swapcontext(&G.main, &G.fibers[i].context);
    bool moved = false;
    for (uint s = 0; s < G.slots.size(); ++s) moved |= release_simdgroup(s);
    if (moved) continue;
    if (std::all_of(G.fibers.begin(), G.fibers.end(), [](Fiber& f) { return f.wait == Done; })) return;
    if (!release_barrier()) stuck();
  }
}

inline void fiber_main() {
  G.body(G.argument);
  G.current->wait = Done;
  swapcontext(&G.current->context, &G.main);
}

inline void start_fiber(Fiber& f, uint index, uint3 tgs) {
  f.wait = Ready;
  f.site = 0;
  f.parity = 0;
  f.index = index;
  f.lane = index % 32;
  f.simdgroup = index / 32;
  f.position = {index % G.size.x, index / G.size.x % G.size.y, index / G.size.x / G.size.y};
  f.grid_position = {G.id.x * tgs.x + f.position.x, G.id.y * tgs.y + f.position.y,
                     G.id.z * tgs.z + f.position.z};
  if (!f.stack) f.stack.reset(new char[kStack]);
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack.get();
  f.context.uc_stack.ss_size = kStack;
  f.context.uc_link = nullptr;
  makecontext(&f.context, fiber_main, 0);
}

inline void start_group(uint3 id, uint3 tgs) {
  G.id = id;
  ++G.serial;
  G.size = {std::min(tgs.x, G.grid.x - id.x * tgs.x), std::min(tgs.y, G.grid.y - id.y * tgs.y),
            std::min(tgs.z, G.grid.z - id.z * tgs.z)};
  uint threads = G.size.x * G.size.y * G.size.z, simdgroups = (threads + 31) / 32;
  G.fibers.resize(threads);
  G.slots.resize(simdgroups);
  G.simd_epoch.assign(simdgroups, {1, 1});
  G.epoch[Device] = G.epoch[Threadgroup] = 1;
  G.variables.clear();
  G.used = 0;
  for (uint i = 0; i < threads; ++i) start_fiber(G.fibers[i], i, tgs);
}

template <class F>
void launch(uint3 grid, uint3 tgs, F kernel) {  // as dispatchThreads: the grid counts threads
  tgs = {std::min(tgs.x, grid.x), std::min(tgs.y, grid.y), std::min(tgs.z, grid.z)};
  uint threads = tgs.x * tgs.y * tgs.z;
  if (threads > 1024) die("threadgroup of %u threads, more than 1024", threads);
  G.grid = grid;
  G.groups = {(grid.x + tgs.x - 1) / tgs.x, (grid.y + tgs.y - 1) / tgs.y, (grid.z + tgs.z - 1) / tgs.z};
  G.body = [](void* p) { (*static_cast<F*>(p))(); };
  G.argument = &kernel;
  for (uint z = 0; z < G.groups.z; ++z)
    for (uint y = 0; y < G.groups.y; ++y)
      for (uint x = 0; x < G.groups.x; ++x) start_group({x, y, z}, tgs), run_group();
}

// A kernel argument: bytes read from `in`; for an output also who wrote what.
struct Buffer {
  const char* name;
  size_t count, item;
  std::unique_ptr<char[]> bytes;
  std::vector<Cell> cells;
  Buffer(const char* name, size_t count, size_t item, bool output, bool initialized, FILE* in)
      : name(name), count(count), item(item), bytes(new char[count * item + 1]), cells(output ? count : 0) {
    if (std::fread(bytes.get(), item, count, in) != count) die("input file too short at %s", name);
    for (Cell& c : cells) c.written = initialized;
  }
  template <class T, Space S>
  Pointer<T, S> pointer() { return {(T*)bytes.get(), 0, long(count), cells.empty() ? nullptr : cells.data()}; }
  template <class T>
  const T& scalar() { return *(const T*)bytes.get(); }
  void finish(FILE* out) {
    for (size_t i = 0; i < count; ++i)
      if (!cells[i].written) die("output %s: element %zu of %zu is never written", name, i, count);
    std::fwrite(bytes.get(), item, count, out);
  }
};

namespace attribute {
inline uint3 thread_position_in_grid() { return G.current->grid_position; }
inline uint3 thread_position_in_threadgroup() { return G.current->position; }
inline uint3 threadgroup_position_in_grid() { return G.id; }
inline uint3 threads_per_threadgroup() { return G.size; }
inline uint3 threadgroups_per_grid() { return G.groups; }
inline uint3 threads_per_grid() { return G.grid; }
inline uint thread_index_in_threadgroup() { return G.current->index; }
inline uint thread_index_in_simdgroup() { return G.current->lane; }
inline uint simdgroup_index_in_threadgroup() { return G.current->simdgroup; }
inline uint simdgroups_per_threadgroup() { return G.slots.size(); }
inline uint threads_per_simdgroup() { return 32; }
inline uint thread_execution_width() { return 32; }
}  // namespace attribute
}  // namespace emu

// -------------------------------------------------------------------------------- MSL's library
using emu::uint3;
using bfloat = emu::Small<emu::Bfloat>;
using half = emu::Small<emu::Half>;
using bfloat16_t = bfloat;
using float16_t = half;

namespace metal {
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
inline bool orders(mem_flags flags, emu::Space space) { return int(flags) >> space & 1; }

inline void threadgroup_barrier(mem_flags flags, SITE) {
  for (auto space : {emu::Device, emu::Threadgroup}) emu::G.orders[space] = orders(flags, space);
  emu::park(emu::AtBarrier, site);
}
inline void simdgroup_barrier(mem_flags flags, SITE) {
  uint live;
  emu::exchange(0, site, &live);
  const emu::Fiber* f = emu::G.current;
  if (f->lane == uint(__builtin_ctz(live)))
    for (auto space : {emu::Device, emu::Threadgroup})
      emu::G.simd_epoch[f->simdgroup][space] += orders(flags, space);
  emu::exchange(0, site);  // nobody goes on before the count has moved
}

// Pairwise over the lanes that take part.
template <class T, class F>
T simd_fold(T value, F f, int site) {
  uint live;
  auto all = emu::exchange(value, site, &live);
  bool have[32];
  for (int i = 0; i < 32; ++i) have[i] = live >> i & 1;
  for (int w = 1; w < 32; w *= 2)
    for (int i = 0; i < 32; i += 2 * w) {
      if (have[i] && have[i + w]) all[i] = f(all[i], all[i + w]);
      else if (have[i + w]) all[i] = all[i + w], have[i] = true;
    }
  return all[0];
}

inline uint lane() { return emu::G.current->lane; }

#define FOR_TYPE(T)                                                                                        \
  inline T simd_sum(T v, SITE) { return simd_fold(v, [](T a, T b) { return T(a + b); }, site); }           \
  inline T simd_product(T v, SITE) { return simd_fold(v, [](T a, T b) { return T(a * b); }, site); }       \
  inline T simd_max(T v, SITE) { return simd_fold(v, [](T a, T b) { return a > b ? a : b; }, site); }      \
  inline T simd_min(T v, SITE) { return simd_fold(v, [](T a, T b) { return a < b ? a : b; }, site); }      \
  inline T simd_shuffle(T v, ushort from, SITE) {                                                          \
    auto all = emu::exchange(v, site);                                                                     \
    if (from > 31) emu::die("line %d: simd_shuffle from lane %d", site, from);                             \
    return all[from];                                                                                      \
  }                                                                                                        \
  inline T simd_broadcast(T v, ushort from, SITE) { return simd_shuffle(v, from, site); }                  \
  inline T simd_shuffle_xor(T v, ushort m, SITE) { return emu::exchange(v, site)[(lane() ^ m) & 31]; }     \
  inline T simd_shuffle_down(T v, ushort d, SITE) {                                                        \
    auto all = emu::exchange(v, site);                                                                     \
    return lane() + d < 32 ? all[lane() + d] : v;                                                          \
  }                                                                                                        \
  inline T simd_shuffle_up(T v, ushort d, SITE) {                                                          \
    auto all = emu::exchange(v, site);                                                                     \
    return lane() >= d ? all[lane() - d] : v;                                                              \
  }                                                                                                        \
  inline T max(T a, T b) { return a > b ? a : b; }                                                         \
  inline T min(T a, T b) { return a < b ? a : b; }                                                         \
  inline T clamp(T x, T low, T high) { return min(max(x, low), high); }
FOR_TYPE(float) FOR_TYPE(int) FOR_TYPE(uint) FOR_TYPE(half) FOR_TYPE(bfloat)
#undef FOR_TYPE

inline namespace math {
using std::abs; using std::ceil; using std::cos; using std::exp; using std::exp2; using std::fabs;
using std::floor; using std::fma; using std::isinf; using std::isnan; using std::log; using std::log2;
using std::pow; using std::sin; using std::sqrt; using std::tanh;
inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }
}  // namespace math
namespace fast { using namespace math; }
namespace precise { using namespace math; }

using std::numeric_limits;
template <class T>
T select(T a, T b, bool second) { return second ? b : a; }
template <class To, class From>
To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs equal sizes");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
}  // namespace metal
using namespace metal;

// Pointers were rewritten before this; what is left of the address spaces says nothing to C++.
#define device
#define constant const
#define thread
#define kernel

#endif
