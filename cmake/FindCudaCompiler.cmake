# Sets CMAKE_CUDA_COMPILER to the system's nvcc or, without one, to that of the compiler wheels (nvidia-cuda-nvcc,
# nvidia-cuda-crt, nvidia-nvvm, nvidia-cuda-runtime, nvidia-cuda-cccl) beside the building Python.
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  execute_process(COMMAND "${Python_EXECUTABLE}" -c
    "import importlib.util as u; print(*(u.find_spec('nvidia') or u).submodule_search_locations or [''], sep=';')"
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
