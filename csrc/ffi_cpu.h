#pragma once

#include "xla/ffi/api/c_api.h"

extern "C" {
XLA_FFI_Error* KvPoolLoadCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* KvPoolStoreCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* KvPoolLoadByEngineCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* KvPoolStoreByEngineCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* KvPoolScratchCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* KvPoolStartCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* KvPoolWaitCpu(XLA_FFI_CallFrame* call_frame);
}
