// Just enough of Metal's library for clang's C++ for OpenCL front end to check a kernel's types and
// address spaces. Nothing here runs. Included by the text that opencl_check.py writes.
#define device __global
#define constant __constant
#define threadgroup __local
#define thread __private

struct bfloat16_t {
  ushort bits;
  bfloat16_t() = default;
  explicit bfloat16_t(float);
  operator float() const __private;
  operator float() const __global;
  operator float() const __constant;
  operator float() const __local;
};
typedef bfloat16_t bfloat;
typedef half float16_t;
typedef unsigned char uint8_t;
typedef int int32_t;
typedef unsigned uint32_t;
typedef long int64_t;

namespace mem_flags {
enum { mem_none, mem_device, mem_threadgroup };
}
void threadgroup_barrier(int);
void simdgroup_barrier(int);

#define FOR_TYPE(T)                \
  T simd_sum(T);                   \
  T simd_product(T);               \
  T simd_max(T);                   \
  T simd_min(T);                   \
  T simd_broadcast(T, ushort);     \
  T simd_shuffle(T, ushort);       \
  T simd_shuffle_xor(T, ushort);   \
  T simd_shuffle_down(T, ushort);  \
  T simd_shuffle_up(T, ushort);
FOR_TYPE(float) FOR_TYPE(int) FOR_TYPE(uint)
#undef FOR_TYPE

#define MATH                                                                       \
  float exp(float); float exp2(float); float log(float); float log2(float);        \
  float sin(float); float cos(float); float tanh(float); float sqrt(float);        \
  float rsqrt(float); float fma(float, float, float); float fabs(float);           \
  float max(float, float); float min(float, float); int max(int, int);             \
  int min(int, int); uint max(uint, uint); uint min(uint, uint);
namespace metal {
MATH
namespace precise { MATH }
namespace fast { MATH }
}  // namespace metal
#undef MATH
