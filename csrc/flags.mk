# Compiler flags, one definition for csrc/Makefile and setup.py: lines of NAME = words.
CORE_FLAGS = -std=c11 -fPIC -fvisibility=hidden -D_GNU_SOURCE -Wall -Wextra -Wshadow -Wpointer-arith -Wstrict-prototypes -Wmissing-prototypes -Wvla
CORE_LIBS = -lm -ldl -lpthread

# The only files compiled for more than the baseline machine; left out on other machines.
FLAGS_variant_avx2 = -mavx2 -mfma
FLAGS_variant_avx512 = -mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512
FLAGS_variant_avx512bf16 = -mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512 -mavx512bf16

# Host code for any machine with C++20; device code for Hopper, whose instructions need the "a", and
# PTX without these, which later devices' drivers compile.
CUDA_FLAGS = -std=c++20 -O3 -lineinfo -gencode arch=compute_90a,code=sm_90a -gencode arch=compute_90,code=compute_90 -cudart static -Xcompiler -fPIC,-fvisibility=hidden,-Wall -Icsrc
