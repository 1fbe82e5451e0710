# The instances of the attention kernels, KIND_DIM_ROWS_STAGES for each type of numbers; instances.cpp is given their
# names. For each kind and size, those that ask for less come first.
set(shapes_bf16 small_64_16_4 small_64_32_4 small_128_16_2 small_128_16_3 small_128_32_2 small_128_32_3 small_256_16_2
  wide_64_128_8 wide_128_128_5 wide_256_128_2 plain_576_16_2
  coded_64_16_4 coded_64_32_4 coded_128_16_2 coded_128_32_2 coded_256_16_2)
set(shapes_fp16 ${shapes_bf16})
set(shapes_fp32 plain_128_16_3 plain_256_16_2 plain_576_16_2)
set(type_bf16 BFloat16)
set(type_fp16 Float16)
set(type_fp32 Float32)
set(APR_INSTANCES "")
foreach(number bf16 fp16 fp32)
  foreach(shape ${shapes_${number}})
    string(REPLACE "_" ";" parts ${shape})
    list(GET parts 0 kind)
    list(GET parts 1 dim)
    list(GET parts 2 rows)
    list(GET parts 3 stages)
    set(name ${kind}_${number}_${dim}_${rows}_${stages})
    set(compiled_for "${APR_CUDA_ARCHITECTURES}")
    if(kind STREQUAL wide)
      set(compiled_for 90a-real)
    endif()
    apr_gpu_instance(${kind} ${name} "${compiled_for}" APR_NUMBER=${type_${number}} APR_DIM=${dim} APR_ROWS=${rows}
      APR_STAGES=${stages})
    string(APPEND APR_INSTANCES "one(${name}) ")
  endforeach()
endforeach()
file(CONFIGURE OUTPUT instances.h CONTENT "#define APR_INSTANCES(one) @APR_INSTANCES@\n" @ONLY)
