// One instance of the kernel for few rows, for pages of codes.
#define APR_CODED true
#include "kernels/cuda/small.cu"
