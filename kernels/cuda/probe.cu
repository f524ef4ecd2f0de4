// The smallest program: that it compiles and loads shows that the others can.

struct Args {
  long long* out;
  long long value;
};

extern "C" __global__ void probe(const __grid_constant__ Args args) {
  if (threadIdx.x == 0) args.out[blockIdx.x] = args.value + blockIdx.x;
}
