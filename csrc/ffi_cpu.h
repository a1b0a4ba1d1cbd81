#pragma once

#include "xla/ffi/api/c_api.h"

extern "C" {
XLA_FFI_Error* KvPoolLoadCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* KvPoolStoreCpu(XLA_FFI_CallFrame* call_frame);
}
