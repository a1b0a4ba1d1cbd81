# Sets CMAKE_CUDA_COMPILER to an nvcc of 12.8 or newer: the system's or, where it has none or the environment variable
# JAX_KVPOOL_CUDA_WHEELS is set, that of the compiler wheels (nvidia-cuda-nvcc, nvidia-cuda-crt, nvidia-nvvm,
# nvidia-cuda-runtime, nvidia-cuda-cccl) beside the building Python.
include(CheckLanguage)

if(NOT DEFINED ENV{JAX_KVPOOL_CUDA_WHEELS})
  check_language(CUDA)
endif()
if(CMAKE_CUDA_COMPILER)
  # Asked here, since enable_language fails on an nvcc that does not know our architectures.
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --version OUTPUT_VARIABLE nvcc_version ERROR_QUIET)
  string(REGEX MATCH "release ([0-9.]+)" _ "${nvcc_version}")
  if(NOT CMAKE_MATCH_1 OR CMAKE_MATCH_1 VERSION_LESS 12.8)
    message(WARNING "${CMAKE_CUDA_COMPILER} is release '${CMAKE_MATCH_1}', 12.8 or newer is needed: not used")
    unset(CMAKE_CUDA_COMPILER)
    unset(CMAKE_CUDA_COMPILER CACHE)
  endif()
endif()
if(NOT CMAKE_CUDA_COMPILER)
  execute_process(COMMAND "${Python_EXECUTABLE}" -c "import nvidia; print(*nvidia.__path__, sep=';')"
    OUTPUT_STRIP_TRAILING_WHITESPACE OUTPUT_VARIABLE nvidia_dirs ERROR_QUIET)
  foreach(nvidia_dir IN LISTS nvidia_dirs)
    if(EXISTS "${nvidia_dir}/cu13/bin/nvcc")
      set(CMAKE_CUDA_COMPILER "${nvidia_dir}/cu13/bin/nvcc")
      # The wheels keep libraries in lib, where nvcc looks in lib64.
      set(CMAKE_CUDA_FLAGS "${CMAKE_CUDA_FLAGS} -L${nvidia_dir}/cu13/lib")
      string(APPEND CMAKE_MODULE_LINKER_FLAGS " -L${nvidia_dir}/cu13/lib")
      break()
    endif()
  endforeach()
endif()
